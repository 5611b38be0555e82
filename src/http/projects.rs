//! `/v1/projects`: each project has its own prompts, backbones, datasets, jobs and keys.
//!
//! The project `default` always exists, and its keys are the operator's: with the scope `admin` they create and list
//! projects. They do not see inside other projects; the key that comes with a new project is for the people who work
//! there.

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::api_keys;
use crate::http::api_keys::NewApiKey;
use crate::http::error::Problem;
use crate::http::extract::{Json, Path, Query};
use crate::http::page::{Page, PageQuery};
use crate::registry::DEFAULT_PROJECT;
use crate::registry::projects;
use crate::registry::projects::Project;
use promptweave_domain::api_key::{KeyName, Scope};
use promptweave_domain::reference::ResourceName;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_project, list_projects))
        .routes(routes!(get_project))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateProject {
    #[schema(value_type = String, pattern = "^[a-z0-9][a-z0-9._-]{0,127}$", example = "vision")]
    name: ResourceName,
}

/// A project and its first key.
#[derive(Serialize, ToSchema)]
struct NewProject {
    #[serde(flatten)]
    project: Project,
    /// Its first key, with every scope.
    api_key: NewApiKey,
}

/// The only project that `caller` sees; None means all.
fn only(caller: &Caller) -> Option<Uuid> {
    Some(caller.project_id).filter(|id| *id != DEFAULT_PROJECT)
}

/// Create a project and its first key, which is shown only this once
#[utoipa::path(
    post,
    path = "/projects",
    tag = "projects",
    security(("api_key" = ["admin"])),
    request_body = CreateProject,
    responses(
        (status = 201, body = NewProject, headers(("location" = String))),
        (status = 403, description = "`scope_missing`; `not_the_default_project`: only keys of the \
            project `default` make projects"),
        (status = 409, description = "`name_taken`"),
        (status = 422, description = "`invalid_body`"),
    )
)]
async fn create_project(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<CreateProject>,
) -> Result<impl IntoResponse, Problem> {
    if only(&caller).is_some() {
        let detail =
            "only keys of the project `default` make projects; ask whoever runs the server";
        let code = "not_the_default_project";
        return Err(Problem::new(StatusCode::FORBIDDEN, code, detail));
    }
    let name: KeyName = "came with the project".parse().map_err(Problem::internal)?;
    let mut transaction = state.pool.begin().await?;
    let project = projects::create(&mut transaction, &body.name).await?;
    let id = state.clock.new_id();
    let api_key =
        api_keys::make(&mut transaction, id, project.id, &name, &Scope::ALL.into()).await?;
    transaction.commit().await?;
    let headers = [
        (header::LOCATION, format!("/v1/projects/{}", project.name)),
        (header::CACHE_CONTROL, "no-store".to_owned()),
    ];
    let made = NewProject { project, api_key };
    Ok((StatusCode::CREATED, headers, JsonResponse(made)))
}

/// List projects by name: all of them for a key of `default`, else the key's own
#[utoipa::path(
    get,
    path = "/projects",
    tag = "projects",
    security(("api_key" = ["admin"])),
    params(PageQuery),
    responses((status = 200, body = Page<Project>))
)]
async fn list_projects(
    State(state): State<AppState>,
    caller: Caller,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<Project>>, Problem> {
    let (after, limit) = (page.after::<ResourceName>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    let found = projects::list(&mut conn, only(&caller), after.as_ref(), limit).await?;
    Ok(JsonResponse(
        page.page(found, |project| project.name.to_string())?,
    ))
}

/// Get a project by name; only a key of `default` sees other projects than its own
#[utoipa::path(
    get,
    path = "/projects/{name}",
    tag = "projects",
    security(("api_key" = ["admin"])),
    params(("name" = String, Path)),
    responses(
        (status = 200, body = Project),
        (status = 404, description = "`project_not_found`"),
    )
)]
async fn get_project(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
) -> Result<JsonResponse<Project>, Problem> {
    let found = projects::find(&mut *state.pool.acquire().await?, &name).await?;
    let seen = found.filter(|project| only(&caller).is_none_or(|id| id == project.id));
    seen.map(JsonResponse).ok_or_else(|| {
        Problem::not_found("project_not_found", format!("there is no project `{name}`"))
    })
}

//! `/v1/prompts`: the names that prompt versions are published under.

use std::collections::BTreeMap;

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::Deserialize;
use sqlx::PgConnection;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::access::Caller;
use super::error::Problem;
use super::extract::{Json, Path, Query, escape};
use super::page::{Page, PageQuery};
use crate::domain::reference::ResourceName;
use crate::registry::prompts::{self, Prompt};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_prompt, list_prompts))
        .routes(routes!(get_prompt))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreatePrompt {
    #[schema(value_type = String, pattern = "^[a-z0-9][a-z0-9._-]{0,127}$", example = "dtd")]
    name: ResourceName,
    #[serde(default)]
    #[schema(max_length = 4096)]
    description: String,
    #[serde(default)]
    tags: BTreeMap<String, String>,
}

const MAX_DESCRIPTION: usize = 4096;
const MAX_TAGS: usize = 64;
const MAX_TAG: usize = 256;

impl CreatePrompt {
    fn check(&self) -> Result<(), Problem> {
        let refuse =
            |pointer: String, rule: String| Err(Problem::field("invalid_body", pointer, rule));
        if self.description.chars().count() > MAX_DESCRIPTION {
            let rule = format!("has more than {MAX_DESCRIPTION} characters");
            return refuse("/description".to_owned(), rule);
        }
        if self.tags.len() > MAX_TAGS {
            return refuse(
                "/tags".to_owned(),
                format!("has more than {MAX_TAGS} entries"),
            );
        }
        for (key, value) in &self.tags {
            if key.is_empty() || key.len().max(value.len()) > MAX_TAG {
                let rule = format!("keys have 1 to {MAX_TAG} bytes, values at most {MAX_TAG}");
                return refuse(format!("/tags/{}", escape(key)), rule);
            }
        }
        Ok(())
    }
}

/// Create a prompt, which versions are then published under
#[utoipa::path(
    post,
    path = "/prompts",
    tag = "prompts",
    security(("api_key" = ["write"])),
    request_body = CreatePrompt,
    responses(
        (status = 201, body = Prompt, headers(("location" = String))),
        (status = 409, description = "`name_taken`"),
        (status = 422, description = "`invalid_body`, `reserved_name`"),
    )
)]
async fn create_prompt(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<CreatePrompt>,
) -> Result<impl IntoResponse, Problem> {
    body.check()?;
    let mut conn = state.pool.acquire().await?;
    let CreatePrompt {
        name,
        description,
        tags,
    } = &body;
    let prompt = prompts::create(&mut conn, caller.project_id, name, description, tags).await?;
    let location = format!("/v1/prompts/{}", prompt.name);
    Ok((
        StatusCode::CREATED,
        [(header::LOCATION, location)],
        JsonResponse(prompt),
    ))
}

/// List prompts by name
#[utoipa::path(
    get,
    path = "/prompts",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(PageQuery),
    responses((status = 200, body = Page<Prompt>))
)]
async fn list_prompts(
    State(state): State<AppState>,
    caller: Caller,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<Prompt>>, Problem> {
    let (after, limit) = (page.after::<ResourceName>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    let found = prompts::list(&mut conn, caller.project_id, after.as_ref(), limit).await?;
    Ok(JsonResponse(
        page.page(found, |prompt| prompt.name.to_string())?,
    ))
}

/// A prompt by name
#[utoipa::path(
    get,
    path = "/prompts/{name}",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(("name" = String, Path)),
    responses(
        (status = 200, body = Prompt),
        (status = 404, description = "`prompt_not_found`"),
    )
)]
async fn get_prompt(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
) -> Result<JsonResponse<Prompt>, Problem> {
    let mut conn = state.pool.acquire().await?;
    Ok(JsonResponse(
        existing(&mut conn, caller.project_id, &name).await?,
    ))
}

/// [`existing`], held until the transaction ends.
pub(super) async fn locked(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Prompt, Problem> {
    prompts::lock(conn, project_id, name)
        .await?
        .ok_or_else(|| not_found(name))
}

pub(super) async fn existing(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Prompt, Problem> {
    prompts::find(conn, project_id, name)
        .await?
        .ok_or_else(|| not_found(name))
}

fn not_found(name: &ResourceName) -> Problem {
    Problem::not_found("prompt_not_found", format!("there is no prompt `{name}`"))
}

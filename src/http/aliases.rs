//! `/v1/prompts/{name}/aliases`: movable names of versions, so that `dtd:production` can be read
//! wherever a prompt is named.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json as JsonResponse};
use serde::Deserialize;
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::boundary::RequestId;
use crate::http::conditional::Preconditions;
use crate::http::error::Problem;
use crate::http::extract::{Json, Path, Query};
use crate::http::page::{Page, PageQuery};
use crate::http::prompts::{existing, locked};
use crate::registry::aliases;
use crate::registry::aliases::{Alias, AliasEvent, ChangedBy, NewAlias};
use crate::registry::prompts::Prompt;
use promptweave_domain::reference::{AliasName, ResourceName};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_aliases))
        .routes(routes!(set_alias, get_alias, delete_alias))
        .routes(routes!(list_alias_history))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct AliasPath {
    #[param(value_type = String)]
    name: ResourceName,
    /// Like a prompt's name, but not all digits and not beginning with `sha256`.
    #[param(value_type = String, example = "production")]
    alias: AliasName,
}

/// The new state of an alias.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SetAlias {
    /// The version it points to.
    #[schema(minimum = 1)]
    version: i32,
    /// A protected alias cannot be moved or deleted (409). To unprotect it, send `false` with the version that it has
    /// now. If left out, the protection stays as it is; a new alias is not protected.
    protected: Option<bool>,
}

/// Point an alias to a version: create, move or protect it
///
/// An existing alias needs `If-Match` with its ETag (or `*`), so that of two concurrent moves neither overwrites the
/// other unseen. `If-None-Match: *` creates the alias only if there is none.
#[utoipa::path(
    put,
    path = "/prompts/{name}/aliases/{alias}",
    tag = "prompts",
    security(("api_key" = ["write"])),
    params(
        AliasPath,
        ("if-match" = Option<String>, Header, description = "ETag of the alias as it was read, or `*`"),
        ("if-none-match" = Option<String>, Header, description = "`*`: only if there is none"),
    ),
    request_body = SetAlias,
    responses(
        (status = 200, description = "It is so now, or was before", body = Alias,
         headers(("etag" = String))),
        (status = 201, description = "It was made", body = Alias,
         headers(("location" = String), ("etag" = String))),
        (status = 404, description = "`prompt_not_found`"),
        (status = 409, description = "`alias_protected`"),
        (status = 412, description = "`precondition_failed`: it is another by now"),
        (status = 422, description = "`invalid_body`, `invalid_path`, `unknown_version`"),
        (status = 428, description = "`precondition_required`: it is there; send `If-Match`"),
    )
)]
async fn set_alias(
    State(state): State<AppState>,
    caller: Caller,
    Path(AliasPath { name, alias }): Path<AliasPath>,
    Extension(RequestId(request_id)): Extension<RequestId>,
    preconditions: Preconditions,
    Json(SetAlias { version, protected }): Json<SetAlias>,
) -> Result<Response, Problem> {
    let mut tx = state.pool.begin().await?;
    let prompt = locked(&mut tx, caller.project_id, &name).await?;
    let current = aliases::find(&mut tx, caller.project_id, &prompt, &alias).await?;
    preconditions.check_change(current.as_ref().map(etag).as_deref())?;
    let new = NewAlias { version, protected };
    let by = changed_by(&caller, request_id);
    aliases::set(
        &mut tx,
        caller.project_id,
        &prompt,
        &alias,
        current.as_ref(),
        new,
        &by,
    )
    .await?;
    let set = existing_alias(&mut tx, caller.project_id, &prompt, &alias).await?;
    tx.commit().await?;
    let etag = [(header::ETAG, etag(&set))];
    Ok(match current {
        Some(_) => (etag, JsonResponse(set)).into_response(),
        None => {
            let location = format!("/v1/prompts/{name}/aliases/{alias}");
            let location = [(header::LOCATION, location)];
            (StatusCode::CREATED, location, etag, JsonResponse(set)).into_response()
        }
    })
}

/// An alias, and the version it points to
#[utoipa::path(
    get,
    path = "/prompts/{name}/aliases/{alias}",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(
        AliasPath,
        ("if-none-match" = Option<String>, Header, description = "ETag of a copy at hand"),
    ),
    responses(
        (status = 200, body = Alias, headers(("etag" = String))),
        (status = 304, description = "The copy at hand is this one"),
        (status = 404, description = "`prompt_not_found`, `alias_not_found`"),
        (status = 422, description = "`invalid_path`"),
    )
)]
async fn get_alias(
    State(state): State<AppState>,
    caller: Caller,
    Path(AliasPath { name, alias }): Path<AliasPath>,
    preconditions: Preconditions,
) -> Result<Response, Problem> {
    let mut conn = state.pool.acquire().await?;
    let prompt = existing(&mut conn, caller.project_id, &name).await?;
    let found = existing_alias(&mut conn, caller.project_id, &prompt, &alias).await?;
    let etag = etag(&found);
    let not_modified = preconditions.has_copy(&etag);
    let etag = [(header::ETAG, etag)];
    Ok(if not_modified {
        (StatusCode::NOT_MODIFIED, etag).into_response()
    } else {
        (etag, JsonResponse(found)).into_response()
    })
}

/// Delete an alias; its history stays
#[utoipa::path(
    delete,
    path = "/prompts/{name}/aliases/{alias}",
    tag = "prompts",
    security(("api_key" = ["write"])),
    params(
        AliasPath,
        ("if-match" = Option<String>, Header, description = "ETag of the alias as it was read, or `*`"),
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "`prompt_not_found`, `alias_not_found`"),
        (status = 409, description = "`alias_protected`"),
        (status = 412, description = "`precondition_failed`: it is another by now"),
        (status = 422, description = "`invalid_path`"),
        (status = 428, description = "`precondition_required`"),
    )
)]
async fn delete_alias(
    State(state): State<AppState>,
    caller: Caller,
    Path(AliasPath { name, alias }): Path<AliasPath>,
    Extension(RequestId(request_id)): Extension<RequestId>,
    preconditions: Preconditions,
) -> Result<StatusCode, Problem> {
    let mut tx = state.pool.begin().await?;
    let prompt = locked(&mut tx, caller.project_id, &name).await?;
    let current = existing_alias(&mut tx, caller.project_id, &prompt, &alias).await?;
    preconditions.check_change(Some(&etag(&current)))?;
    let by = changed_by(&caller, request_id);
    aliases::delete(&mut tx, caller.project_id, &prompt, &current, &by).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List a prompt's aliases by name
#[utoipa::path(
    get,
    path = "/prompts/{name}/aliases",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(("name" = String, Path), PageQuery),
    responses(
        (status = 200, body = Page<Alias>),
        (status = 404, description = "`prompt_not_found`"),
        (status = 422, description = "`invalid_path`, `invalid_page_size`, `invalid_page_token`"),
    )
)]
async fn list_aliases(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<Alias>>, Problem> {
    let (after, limit) = (page.after::<AliasName>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    let prompt = existing(&mut conn, caller.project_id, &name).await?;
    let found = aliases::list(&mut conn, caller.project_id, &prompt, after.as_ref(), limit).await?;
    Ok(JsonResponse(
        page.page(found, |alias| alias.alias.to_string())?,
    ))
}

/// List an alias's changes, newest first: who moved it, from where to where
///
/// A deleted alias keeps its history.
#[utoipa::path(
    get,
    path = "/prompts/{name}/aliases/{alias}/history",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(AliasPath, PageQuery),
    responses(
        (status = 200, body = Page<AliasEvent>),
        (status = 404, description = "`prompt_not_found`, `alias_not_found`: it never was"),
        (status = 422, description = "`invalid_path`, `invalid_page_size`, `invalid_page_token`"),
    )
)]
async fn list_alias_history(
    State(state): State<AppState>,
    caller: Caller,
    Path(AliasPath { name, alias }): Path<AliasPath>,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<AliasEvent>>, Problem> {
    let (before, limit) = (page.after::<i32>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    let prompt = existing(&mut conn, caller.project_id, &name).await?;
    let events =
        aliases::history(&mut conn, caller.project_id, &prompt, &alias, before, limit).await?;
    if events.is_empty() && before.is_none() {
        return Err(not_found(&name, &alias));
    }
    Ok(JsonResponse(
        page.page(events, |event| event.seq.to_string())?,
    ))
}

async fn existing_alias(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    alias: &AliasName,
) -> Result<Alias, Problem> {
    let found = aliases::find(conn, project_id, prompt, alias).await?;
    found.ok_or_else(|| not_found(&prompt.name, alias))
}

fn etag(alias: &Alias) -> String {
    format!("\"{}\"", alias.seq)
}

fn changed_by(caller: &Caller, request_id: String) -> ChangedBy {
    ChangedBy {
        request_id,
        key_id: caller.key_id,
    }
}

fn not_found(name: &ResourceName, alias: &AliasName) -> Problem {
    Problem::not_found(
        "alias_not_found",
        format!("prompt `{name}` has no alias `{alias}`"),
    )
}

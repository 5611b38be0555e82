//! `/v1/api-keys`: the keys of the caller's project, and what each may do.
//!
//! A key with the scope `admin` may create other keys of any scope, for its own project only. A project's first key is
//! created with the project, or by `promptweave keys`.

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::{Json, Path, Query};
use crate::http::page::{Page, PageQuery};
use crate::registry::api_keys;
use crate::registry::api_keys::StoredKey;
use promptweave_domain::api_key::{ApiKey, KeyName, Scope, Scopes};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_api_key, list_api_keys))
        .routes(routes!(get_api_key, revoke_api_key))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateApiKey {
    /// What the key is for.
    #[schema(value_type = String, min_length = 1, max_length = 128, example = "continuous integration")]
    name: KeyName,
    /// At least one scope; no scope includes another.
    #[schema(value_type = Vec<Scope>, min_items = 1)]
    scopes: Scopes,
}

/// A key as it is shown once, to the client that created it.
#[derive(Serialize, ToSchema)]
pub(super) struct NewApiKey {
    /// The whole key. It is not stored anywhere, so keep it.
    #[schema(example = "pr_019305d6c1a07c3a8f5e2b7d94c60a11_…")]
    key: String,
    #[serde(flatten)]
    stored: StoredKey,
}

impl NewApiKey {
    pub(super) fn location(&self) -> String {
        format!("/v1/api-keys/{}", self.stored.id)
    }
}

/// Creates and stores a key.
pub(super) async fn make(
    conn: &mut PgConnection,
    id: Uuid,
    project_id: Uuid,
    name: &KeyName,
    scopes: &Scopes,
) -> Result<NewApiKey, Problem> {
    let key = ApiKey::generate(id).map_err(Problem::internal)?;
    api_keys::insert(conn, project_id, &key, name, scopes).await?;
    Ok(NewApiKey {
        stored: existing(conn, project_id, id).await?,
        key: key.text().expose_secret().to_owned(),
    })
}

async fn existing(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<StoredKey, Problem> {
    let found = api_keys::find(conn, project_id, id).await?;
    found.ok_or_else(|| not_found(id))
}

fn not_found(id: Uuid) -> Problem {
    let detail = format!("there is no API key {id}; `GET /v1/api-keys` lists what there is");
    Problem::not_found("api_key_not_found", detail)
}

/// Create a key of this project; only this answer shows it
#[utoipa::path(
    post,
    path = "/api-keys",
    tag = "api-keys",
    security(("api_key" = ["admin"])),
    request_body = CreateApiKey,
    responses(
        (status = 201, body = NewApiKey, headers(("location" = String))),
        (status = 422, description = "`invalid_body`"),
    )
)]
async fn create_api_key(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<CreateApiKey>,
) -> Result<impl IntoResponse, Problem> {
    if body.scopes.is_empty() {
        let detail = "a key needs a scope: read, write, run or admin";
        return Err(Problem::field("invalid_body", "/scopes", detail));
    }
    let mut transaction = state.pool.begin().await?;
    let id = state.clock.new_id();
    let CreateApiKey { name, scopes } = &body;
    let key = make(&mut transaction, id, caller.project_id, name, scopes).await?;
    transaction.commit().await?;
    let headers = [
        (header::LOCATION, key.location()),
        (header::CACHE_CONTROL, "no-store".to_owned()),
    ];
    Ok((StatusCode::CREATED, headers, JsonResponse(key)))
}

/// List this project's keys, newest first, with revoked ones and without secrets
#[utoipa::path(
    get,
    path = "/api-keys",
    tag = "api-keys",
    security(("api_key" = ["admin"])),
    params(PageQuery),
    responses((status = 200, body = Page<StoredKey>))
)]
async fn list_api_keys(
    State(state): State<AppState>,
    caller: Caller,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<StoredKey>>, Problem> {
    let (before, limit) = (page.after::<Uuid>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    let found = api_keys::list(&mut conn, caller.project_id, before, limit).await?;
    Ok(JsonResponse(page.page(found, |key| key.id.to_string())?))
}

/// A key by id, without its secret
#[utoipa::path(
    get,
    path = "/api-keys/{id}",
    tag = "api-keys",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 200, body = StoredKey),
        (status = 404, description = "`api_key_not_found`"),
    )
)]
async fn get_api_key(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<JsonResponse<StoredKey>, Problem> {
    let mut conn = state.pool.acquire().await?;
    Ok(JsonResponse(
        existing(&mut conn, caller.project_id, id).await?,
    ))
}

/// Revoke a key, immediately and permanently; a key may revoke itself
#[utoipa::path(
    delete,
    path = "/api-keys/{id}",
    tag = "api-keys",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 204, description = "It opens nothing any more, whether or not it did before"),
        (status = 404, description = "`api_key_not_found`"),
    )
)]
async fn revoke_api_key(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<StatusCode, Problem> {
    let mut conn = state.pool.acquire().await?;
    if !api_keys::revoke(&mut conn, caller.project_id, id).await? {
        return Err(not_found(id));
    }
    Ok(StatusCode::NO_CONTENT)
}

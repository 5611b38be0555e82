//! `/v1/prompts/{name}/versions/{ref}/content`: the file of a version.

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use bytes::Bytes;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::db::DbError;
use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::content::File;
use crate::http::error::Problem;
use crate::http::extract::Path;
use crate::http::prompt_versions::{PROMPT_FILE, PromptFileBytes, VersionPath};
use crate::registry::prompt_versions;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(get_content))
}

/// Download the file of a version, whole or a range of its bytes
///
/// `HEAD` answers with the headers alone. `Content-Digest` covers the bytes in the answer, `Repr-Digest` the whole
/// file; the ETag is the file's digest.
#[utoipa::path(
    get,
    path = "/prompts/{name}/versions/{ref}/content",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(
        VersionPath,
        ("if-none-match" = Option<String>, Header, description = "ETag of a copy at hand"),
        ("range" = Option<String>, Header, description = "One range of bytes, e.g. `bytes=1000-`; \
            several at once are answered with the whole file"),
        ("if-range" = Option<String>, Header, description = "ETag that the file must have for \
            `range` to count"),
    ),
    responses(
        (status = 200, description = "safetensors", content_type = PROMPT_FILE, body = PromptFileBytes,
         headers(("etag" = String), ("content-digest" = String), ("repr-digest" = String),
            ("accept-ranges" = String), ("cache-control" = String))),
        (status = 206, description = "The range", content_type = PROMPT_FILE, body = PromptFileBytes,
         headers(("etag" = String), ("content-range" = String), ("content-digest" = String),
            ("repr-digest" = String), ("cache-control" = String))),
        (status = 304, description = "The copy at hand is this one", headers(("etag" = String))),
        (status = 404, description = "`prompt_not_found`, `version_not_found`"),
        (status = 416, description = "`range_not_satisfiable`: the file ends before it",
         headers(("content-range" = String))),
    )
)]
async fn get_content(
    State(state): State<AppState>,
    caller: Caller,
    Path(path): Path<VersionPath>,
    method: Method,
    request: HeaderMap,
) -> Result<Response, Problem> {
    let immutable = path.is_immutable();
    let mut conn = state.pool.acquire().await?;
    let version = path.resolve(&mut conn, caller.project_id).await?;
    let file = File {
        digest: version.digest,
        size: version.size as u64,
        kind: PROMPT_FILE,
        name: format!("{}-{}.safetensors", version.prompt, version.version),
        immutable,
        ranges: true,
    };
    if let Some(not_modified) = file.not_modified(&request) {
        return Ok(not_modified);
    }
    let range = file.range(&method, &request)?;
    if method == Method::HEAD {
        return Ok(file.whole(&method, Body::empty()));
    }
    let bytes = prompt_versions::content(&mut conn, &version.digest)
        .await?
        .map(Bytes::from)
        .ok_or(DbError::RowCount(0))?;
    Ok(match range {
        None => file.whole(&method, bytes),
        Some(range) => file.part(range, &bytes),
    })
}

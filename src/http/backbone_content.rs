//! `/v1/backbones/{name}/content`: the weights of a backbone.

use axum::extract::State;
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::backbones::existing;
use crate::http::content::File;
use crate::http::error::Problem;
use crate::http::extract::Path;
use promptweave_domain::reference::ResourceName;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(get_backbone_content))
}

/// A safetensors file.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct BackboneBytes(Vec<u8>);

/// Download the weights of a backbone, whole or a range of the bytes
///
/// The file is `model.safetensors` with timm's names, whichever library the checkpoint came from. Its sha256 is
/// `model_digest` and the ETag. `config` of the backbone is its `config.json`.
#[utoipa::path(
    get,
    path = "/backbones/{name}/content",
    tag = "backbones",
    security(("api_key" = ["read"])),
    params(
        ("name" = String, Path),
        ("if-none-match" = Option<String>, Header, description = "ETag of a copy at hand"),
        ("range" = Option<String>, Header, description = "One range of bytes, e.g. `bytes=1000-`; \
            several at once are answered with the whole file"),
        ("if-range" = Option<String>, Header, description = "ETag that the file must have for \
            `range` to count"),
    ),
    responses(
        (status = 200, description = "safetensors", content_type = "application/octet-stream", body = BackboneBytes,
         headers(("etag" = String), ("content-digest" = String), ("repr-digest" = String),
            ("accept-ranges" = String), ("cache-control" = String))),
        (status = 206, description = "The range", content_type = "application/octet-stream", body = BackboneBytes,
         headers(("etag" = String), ("content-range" = String), ("repr-digest" = String))),
        (status = 304, description = "The copy at hand is this one", headers(("etag" = String))),
        (status = 404, description = "`backbone_not_found`"),
        (status = 416, description = "`range_not_satisfiable`: the file ends before it",
         headers(("content-range" = String))),
    )
)]
async fn get_backbone_content(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
    method: Method,
    request: HeaderMap,
) -> Result<Response, Problem> {
    let mut conn = state.pool.acquire().await?;
    let backbone = existing(&mut conn, caller.project_id, &name).await?;
    drop(conn);
    let file = File {
        digest: backbone.model_digest,
        size: backbone.model_size as u64,
        kind: "application/octet-stream",
        name: format!("{name}.safetensors"),
        immutable: true,
        ranges: true,
    };
    file.serve(&state.blobs, &method, &request).await
}

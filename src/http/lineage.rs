//! `/v1/prompts/{name}/versions/{ref}/lineage`: what a version was made of, or what was made with it.

use axum::Json as JsonResponse;
use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::{Path, Query};
use crate::http::prompt_versions::VersionPath;
use crate::registry::lineage;
use crate::registry::lineage::{Direction, Graph};

const DEFAULT_DEPTH: u32 = 16;
const MAX_DEPTH: u32 = 64;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(get_lineage))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct LineageQuery {
    /// `up` follows what the version was made of, `down` what was made with it; `up` by default.
    #[serde(default)]
    #[param(inline)]
    direction: Direction,
    /// The most edges to follow one after another; 16 by default.
    #[serde(default = "default_depth")]
    #[param(minimum = 1, maximum = 64, default = 16)]
    depth: u32,
}

fn default_depth() -> u32 {
    DEFAULT_DEPTH
}

/// Get what a version was made of, and how much of each; or what was made with it
///
/// The answer is a graph of versions with the weight α on every edge. A composed prompt may itself be a source of
/// others. `effective_weight` multiplies the weights along a path and sums over paths.
#[utoipa::path(
    get,
    path = "/prompts/{name}/versions/{ref}/lineage",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(VersionPath, LineageQuery),
    responses(
        (status = 200, body = Graph),
        (status = 404, description = "`prompt_not_found`, `version_not_found`"),
        (status = 422, description = "`invalid_depth`, `invalid_query`, `invalid_reference`, \
            `invalid_path`"),
    )
)]
async fn get_lineage(
    State(state): State<AppState>,
    caller: Caller,
    Path(path): Path<VersionPath>,
    Query(LineageQuery { direction, depth }): Query<LineageQuery>,
) -> Result<JsonResponse<Graph>, Problem> {
    if !(1..=MAX_DEPTH).contains(&depth) {
        let detail = format!("is {depth}; it must lie in 1..={MAX_DEPTH}");
        return Err(Problem::field("invalid_depth", "/depth", detail));
    }
    let mut conn = state.pool.acquire().await?;
    let version = path.resolve(&mut conn, caller.project_id).await?;
    let graph = lineage::walk(&mut conn, caller.project_id, version.id, direction, depth).await?;
    Ok(JsonResponse(graph))
}

//! `/v1/workers`, and `/readyz/workers`: uploads never go down with the workers, so their health is
//! asked apart.

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::AppState;
use super::error::Problem;
use crate::jobs::workers::{self, Worker};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_workers))
}

/// Outside `/v1`.
pub fn health_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(readyz_workers))
}

#[derive(Debug, Serialize, ToSchema)]
struct Workers {
    items: Vec<Worker>,
}

/// Workers that were seen within a day, the newest first
#[utoipa::path(get, path = "/workers", tag = "workers", security(("api_key" = ["admin"])), responses((status = 200, body = Workers)))]
async fn list_workers(State(state): State<AppState>) -> Result<JsonResponse<Workers>, Problem> {
    let items = workers::list(&mut *state.pool.acquire().await?).await?;
    Ok(JsonResponse(Workers { items }))
}

#[derive(Debug, Serialize, ToSchema)]
struct WorkersHealth {
    #[schema(example = "ok")]
    status: &'static str,
}

/// Whether some worker can work: its engine answered, or made progress, within the last minute
#[utoipa::path(
    get,
    path = "/readyz/workers",
    tag = "health",
    responses(
        (status = 200, body = WorkersHealth),
        (status = 503, description = "`no_worker` or `database_unavailable`"),
    )
)]
async fn readyz_workers(
    State(state): State<AppState>,
) -> Result<JsonResponse<WorkersHealth>, Problem> {
    if workers::any_ready(&mut *state.pool.acquire().await?).await? {
        return Ok(JsonResponse(WorkersHealth { status: "ok" }));
    }
    Err(Problem::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "no_worker",
        "no worker's engine has answered within the last minute; jobs wait until one does",
    )
    .retry_after(5))
}

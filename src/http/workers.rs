//! `/v1/workers`, and `/readyz/workers`: the health of workers, apart from the server's, because uploads work without
//! them.

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::Path;
use crate::jobs::workers;
use crate::jobs::workers::{Drain, Worker};
use crate::registry::DEFAULT_PROJECT;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_workers))
        .routes(routes!(drain_worker))
}

/// Routes outside `/v1`.
pub fn health_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(readyz_workers))
}

#[derive(Debug, Serialize, ToSchema)]
struct Workers {
    items: Vec<Worker>,
}

/// List workers that were seen within a day, newest first
#[utoipa::path(get, path = "/workers", tag = "workers", security(("api_key" = ["admin"])), responses((status = 200, body = Workers)))]
async fn list_workers(State(state): State<AppState>) -> Result<JsonResponse<Workers>, Problem> {
    let items = workers::list(&mut *state.pool.acquire().await?).await?;
    Ok(JsonResponse(Workers { items }))
}

/// Drain a worker: it finishes its job, claims no more, and ends
///
/// Its state is `draining` until then. Its process ends with status 0; under `promptweave up`, it stays down until `up`
/// is started again.
#[utoipa::path(
    post,
    path = "/workers/{id}/drain",
    tag = "workers",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 202, description = "It claims nothing more, whether or not it did before"),
        (status = 403, description = "`scope_missing`; `not_the_default_project`: workers are the operator's, \
            and work for all projects"),
        (status = 404, description = "`worker_not_found`"),
        (status = 409, description = "`worker_ended`"),
    )
)]
async fn drain_worker(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<StatusCode, Problem> {
    if caller.project_id != DEFAULT_PROJECT {
        let detail =
            "only keys of the project `default` drain workers; ask whoever runs the server";
        let code = "not_the_default_project";
        return Err(Problem::new(StatusCode::FORBIDDEN, code, detail));
    }
    let mut conn = state.pool.acquire().await?;
    match workers::drain(&mut conn, id).await? {
        Some(Drain::Requested) => Ok(StatusCode::ACCEPTED),
        Some(Drain::Ended(state)) => Err(Problem::new(
            StatusCode::CONFLICT,
            "worker_ended",
            format!("worker {id} is {state} and has nothing to finish"),
        )),
        None => Err(Problem::not_found(
            "worker_not_found",
            format!("there is no worker {id}; GET /v1/workers lists those of the last day"),
        )),
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct WorkersHealth {
    #[schema(example = "ok")]
    status: &'static str,
}

/// Check that a worker can work: it passed its self-test, or made progress, within the last minute
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
        "no worker has passed its self-test within the last minute; jobs wait until one does, and \
         GET /v1/workers says what became of each",
    )
    .retry_after(5))
}

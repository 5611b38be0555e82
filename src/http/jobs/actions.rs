//! What can be asked of a job of any kind: to stop, to be tried again.

use axum::Json as JsonResponse;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::jobs::{LOOK_AGAIN_AFTER, Resource, code, existing, not_found};
use crate::jobs::requests;
use crate::jobs::requests::Cancellation;
use promptweave_domain::job::JobState;

/// How a tuning or a ranking that succeeded is computed once more.
pub const FORCE: &str = "post it with `force`";

/// One that waits is cancelled at once; one that runs stops at its next step.
pub async fn cancel<S: Resource>(
    state: &AppState,
    caller: &Caller,
    id: Uuid,
) -> Result<Response, Problem> {
    let mut conn = state.pool.acquire().await?;
    // One of another kind is none.
    existing::<S>(&mut conn, caller.project_id, id).await?;
    let status = match requests::cancel(&mut conn, caller.project_id, id).await? {
        None => return Err(not_found::<S>(id)),
        Some(Cancellation::Requested) => StatusCode::ACCEPTED,
        Some(Cancellation::Cancelled | Cancellation::AlreadyOver(JobState::Cancelled)) => {
            StatusCode::OK
        }
        Some(Cancellation::AlreadyOver(state)) => {
            let detail = format!("{} `{id}` has {} already", S::KIND, state.name());
            return Err(Problem::conflict(code::<S>("over"), detail));
        }
    };
    let job = existing::<S>(&mut conn, caller.project_id, id).await?;
    Ok((status, JsonResponse(S::Response::from(job))).into_response())
}

/// One that failed or was cancelled goes back into the queue as it was posted; `repeat` says how one that succeeded is
/// computed once more.
pub async fn retry<S: Resource>(
    conn: &mut PgConnection,
    caller: &Caller,
    id: Uuid,
    repeat: &str,
) -> Result<Response, Problem> {
    existing::<S>(conn, caller.project_id, id).await?;
    let kind = S::KIND;
    match requests::retry(conn, caller.project_id, id).await? {
        None => return Err(not_found::<S>(id)),
        Some(Ok(())) => {}
        Some(Err(JobState::Succeeded)) => {
            let detail = format!("{kind} `{id}` has succeeded; to compute it again, {repeat}");
            return Err(Problem::conflict(code::<S>("over"), detail));
        }
        Some(Err(state)) => {
            let detail = format!("{kind} `{id}` is {}; cancel it first", state.name());
            return Err(Problem::conflict(code::<S>("not_over"), detail));
        }
    }
    let again = [(header::RETRY_AFTER, LOOK_AGAIN_AFTER.to_string())];
    let job = existing::<S>(conn, caller.project_id, id).await?;
    let answer = JsonResponse(S::Response::from(job));
    Ok((StatusCode::ACCEPTED, again, answer).into_response())
}

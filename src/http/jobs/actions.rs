//! Actions on a job of any kind: cancel, retry.

use axum::Json as JsonResponse;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::jobs::{LOOK_AGAIN_AFTER, Resource, code, existing, not_found};
use crate::jobs::requests;
use crate::jobs::requests::Cancellation;
use promptweave_domain::job::JobState;

/// Cancels a job: a waiting one immediately, a running one at its next step.
pub async fn cancel<S: Resource>(
    state: &AppState,
    caller: &Caller,
    id: Uuid,
) -> Result<Response, Problem> {
    let mut conn = state.pool.acquire().await?;
    // A job of another kind is not found.
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

/// Queues a failed or cancelled job again as it was posted.
pub async fn retry<S: Resource>(
    state: &AppState,
    caller: &Caller,
    id: Uuid,
) -> Result<Response, Problem> {
    let mut tx = state.pool.begin().await?;
    existing::<S>(&mut tx, caller.project_id, id).await?;
    let kind = S::KIND;
    match requests::retry(&mut tx, caller.project_id, id).await? {
        None => return Err(not_found::<S>(id)),
        Some(Ok(())) => {}
        Some(Err(JobState::Succeeded)) => {
            let detail = format!(
                "{kind} `{id}` has succeeded; to compute it again, {}",
                S::REPEAT
            );
            return Err(Problem::conflict(code::<S>("over"), detail));
        }
        Some(Err(state)) => {
            let detail = format!("{kind} `{id}` is {}; cancel it first", state.name());
            return Err(Problem::conflict(code::<S>("not_over"), detail));
        }
    }
    let job = existing::<S>(&mut tx, caller.project_id, id).await?;
    job.spec.hold(&mut tx, state, caller.project_id).await?;
    tx.commit().await?;
    let again = [(header::RETRY_AFTER, LOOK_AGAIN_AFTER.to_string())];
    let answer = JsonResponse(S::Response::from(job));
    Ok((StatusCode::ACCEPTED, again, answer).into_response())
}

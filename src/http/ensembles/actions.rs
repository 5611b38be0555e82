//! What can be asked of an ensemble: to stop, to be tried again, to be repeated.

use axum::extract::State;
use axum::response::Response;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::ensembles::answer::Ensemble;
use crate::http::error::Problem;
use crate::http::extract::Path;
use crate::http::jobs;
use crate::http::jobs::{JobRequest, accept, existing};
use crate::jobs::plan::default_output;
use crate::registry::references;
use promptweave_domain::job::EnsembleSpec;

/// Cancel an ensemble
///
/// A waiting ensemble is cancelled immediately; a running one stops at its next step.
#[utoipa::path(
    post,
    path = "/ensembles/{id}/cancel",
    tag = "ensembles",
    security(("api_key" = ["run"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "It is cancelled", body = Ensemble),
        (status = 202, description = "It was asked to stop", body = Ensemble),
        (status = 404, description = "`ensemble_not_found`"),
        (status = 409, description = "`ensemble_over`: it has succeeded or failed"),
    )
)]
pub(super) async fn cancel_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<Response, Problem> {
    jobs::actions::cancel::<EnsembleSpec>(&state, &caller, id).await
}

/// Retry an ensemble
///
/// A failed or cancelled ensemble is queued again as it was posted, with as many attempts as a new one.
#[utoipa::path(
    post,
    path = "/ensembles/{id}/retry",
    tag = "ensembles",
    security(("api_key" = ["run"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 202, body = Ensemble, headers(("retry-after" = u32))),
        (status = 404, description = "`ensemble_not_found`"),
        (status = 409, description = "`ensemble_not_over` (it waits or runs), `ensemble_over` (it has \
            succeeded; see `replay`)"),
        (status = 410, description = "`statistics_deleted`: those that it is solved again from"),
    )
)]
pub(super) async fn retry_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<Response, Problem> {
    let mut tx = state.pool.begin().await?;
    let answer = jobs::actions::retry::<EnsembleSpec>(&mut tx, &caller, id, "replay it").await?;
    let job = existing::<EnsembleSpec>(&mut tx, caller.project_id, id).await?;
    hold_statistics(&mut tx, &state, &caller, &job.spec).await?;
    tx.commit().await?;
    Ok(answer)
}

/// Keeps the statistics that the ensemble is solved from, if it was made by `solve`, until the job is queued in the
/// same transaction.
async fn hold_statistics(
    conn: &mut PgConnection,
    state: &AppState,
    caller: &Caller,
    spec: &EnsembleSpec,
) -> Result<(), Problem> {
    let Some(from) = &spec.solved_from else {
        return Ok(());
    };
    let origin = existing::<EnsembleSpec>(conn, caller.project_id, from.ensemble).await?;
    crate::http::ensembles::outcome::check_statistics(origin.id, origin.statistics_deleted_at)?;
    references::hold(conn, &state.blobs, &from.statistics).await?;
    Ok(())
}

/// Compute an ensemble again, and compare the answers
///
/// This makes a new ensemble with the same specification, published under its own name. Its `replay` has the largest
/// difference of a weight once both have succeeded.
#[utoipa::path(
    post,
    path = "/ensembles/{id}/replay",
    tag = "ensembles",
    security(("api_key" = ["run"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 202, body = Ensemble, headers(("location" = String), ("retry-after" = u32))),
        (status = 404, description = "`ensemble_not_found`"),
        (status = 410, description = "`statistics_deleted`: those that it was solved again from"),
        (status = 429, description = "`queue_full`", headers(("retry-after" = u32))),
    )
)]
pub(super) async fn replay_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<Response, Problem> {
    let mut tx = state.pool.begin().await?;
    let job = existing::<EnsembleSpec>(&mut tx, caller.project_id, id).await?;
    hold_statistics(&mut tx, &state, &caller, &job.spec).await?;
    let new_id = state.clock.new_id();
    let mut spec = job.spec;
    spec.output = default_output(&spec.target.dataset, new_id);
    let order = JobRequest {
        id: new_id,
        priority: job.priority,
        spec: &spec,
        replay_of: Some(id),
        reuse: None,
    };
    let accepted = accept(&state, &mut tx, caller.project_id, order).await?;
    tx.commit().await?;
    Ok(accepted)
}

//! Replays of an ensemble, and what a retry or a replay keeps.

use axum::extract::State;
use axum::response::Response;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::ensembles::answer::Ensemble;
use crate::http::error::Problem;
use crate::http::extract::Path;
use crate::http::jobs::{JobRequest, accept, existing};
use crate::jobs::plan::default_output;
use crate::registry::references;
use promptweave_domain::job::EnsembleSpec;

/// Keeps the statistics that the ensemble is solved from, if it was made by `solve`, until the job is queued in the
/// same transaction.
pub(super) async fn hold_statistics(
    conn: &mut PgConnection,
    state: &AppState,
    project_id: Uuid,
    spec: &EnsembleSpec,
) -> Result<(), Problem> {
    let Some(from) = &spec.solved_from else {
        return Ok(());
    };
    let origin = existing::<EnsembleSpec>(conn, project_id, from.ensemble).await?;
    crate::http::ensembles::statistics::check_statistics(origin.id, origin.file_deleted_at)?;
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
    hold_statistics(&mut tx, &state, caller.project_id, &job.spec).await?;
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

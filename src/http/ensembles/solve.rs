//! `/v1/ensembles/{id}/solve`: new weights from an ensemble's stored statistics.

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::ensembles::Output;
use crate::http::ensembles::answer::Ensemble;
use crate::http::ensembles::statistics::with_statistics;
use crate::http::error::Problem;
use crate::http::extract::{Draft, Path};
use crate::http::jobs::{JobRequest, accept, check_priority, default_priority};
use crate::http::named::Source;
use crate::jobs::plan::check_ensemble_name;
use crate::jobs::plan::solve::{SolveRequest, pin_aliases, plan};
use crate::jobs::requests::Reuse;
use crate::registry::references;
use promptweave_domain::job::DEFAULT_PRIORITY;
use promptweave_domain::objective::Objective;
use promptweave_domain::reference::ResourceName;

/// Every field, and the body itself, may be left out; then α is solved for with the ensemble's own settings.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SolveEnsemble {
    /// Some of the ensemble's sources, each named once; all by default. A name alone means the version that the
    /// ensemble used; an alias means the version that it points to now.
    #[schema(min_items = 1, max_items = 64)]
    sources: Option<Vec<Source>>,
    /// Replaces the ensemble's whole objective, so repeat what should stay. `head`, `align_tokens` and
    /// `alignment.gradient_normalization` are fixed by the statistics and must not change; a `fallback`,
    /// `experimental.refine` and `.scale`, and choices by validation need the backbone and are refused. If left out, the objective is the
    /// ensemble's own without `refine`, `fallback` and `scale`, at the trade-off and `uniform_mix` that it chose; if it
    /// fell back, it is `single_best` by `validation`.
    objective: Option<Objective>,
    #[serde(default)]
    output: Output,
    /// Jobs with a smaller number go first; 100 by default.
    #[serde(default = "default_priority")]
    #[schema(minimum = 0, maximum = 1000, default = 100)]
    priority: i32,
    /// Solve even if an ensemble with the same `spec_digest` waits, runs or has succeeded.
    #[serde(default)]
    force: bool,
}

impl Default for SolveEnsemble {
    fn default() -> Self {
        Self {
            sources: None,
            objective: None,
            output: Output::default(),
            priority: DEFAULT_PRIORITY,
            force: false,
        }
    }
}

/// Solve an ensemble again from its statistics, for some of its sources or another objective
///
/// This makes a new ensemble with its own composed prompt. It needs neither backbone nor images and takes seconds. It
/// is not evaluated: `diagnostics.composed_score` is null.
#[utoipa::path(
    post,
    path = "/ensembles/{id}/solve",
    tag = "ensembles",
    security(("api_key" = ["run"])),
    params(("id" = Uuid, Path)),
    request_body = Option<SolveEnsemble>,
    responses(
        (status = 200, description = "It was solved for before", body = Ensemble,
         headers(("location" = String))),
        (status = 202, body = Ensemble, headers(("location" = String), ("retry-after" = u32))),
        (status = 404, description = "`ensemble_not_found`"),
        (status = 409, description = "`ensemble_not_finished`, `ensemble_failed`, \
            `ensemble_cancelled`"),
        (status = 410, description = "`statistics_deleted`: their time is over"),
        (status = 422, description = "`no_sources`, `unknown_source`, `ambiguous_source`, \
            `same_source`, `invalid_objective`, `reserved_name`, `output_too_long`, `name_taken`, `invalid_priority`; `invalid_request` where there are several"),
        (status = 429, description = "`queue_full`", headers(("retry-after" = u32))),
    )
)]
pub(super) async fn solve_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
    body: Option<Draft<Option<SolveEnsemble>>>,
) -> Result<Response, Problem> {
    let Draft { body, mut mistakes } = body.unwrap_or_default();
    let body = body.unwrap_or_default();
    mistakes.note(check_priority(body.priority))?;
    let named = |sources: Vec<Source>| sources.into_iter().map(|source| source.prompt).collect();
    let mut request = SolveRequest {
        sources: body.sources.map(named),
        objective: body.objective,
        output: body.output.name,
    };
    let solved = with_statistics(&state, &caller, id).await?;
    let job_id = state.clock.new_id();
    let mut tx = state.pool.begin().await?;
    // The statistics must stay at least until the job that needs them is queued.
    references::hold(&mut tx, &state.blobs, &solved.statistics).await?;
    if let Some(sources) = &mut request.sources {
        pin_aliases(&mut tx, caller.project_id, sources).await?;
    }
    let spec = mistakes.finish(plan(job_id, &solved, &request))?;
    check_ensemble_name(&mut tx, caller.project_id, &spec).await?;
    let output = request.output.as_ref().map(ResourceName::as_str);
    let order = JobRequest {
        id: job_id,
        priority: body.priority,
        spec: &spec,
        replay_of: None,
        reuse: (!body.force).then_some(Reuse { output }),
    };
    let accepted = accept(&state, &mut tx, caller.project_id, order).await?;
    tx.commit().await?;
    Ok(accepted)
}

//! `/v1/ensembles`: jobs that learn source weights for a target and compose the prompt.

mod answer;
mod replay;
mod solve;
mod statistics;
mod validate;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::Draft;
use crate::http::jobs::{JobRequest, accept, check_priority, default_priority};
use crate::http::named::{Source, Target};
use crate::jobs::plan::{EnsembleRequest, plan};
use crate::jobs::requests::Reuse;
use answer::Ensemble;
use promptweave_domain::early_stopping::EarlyStopping;
use promptweave_domain::objective::Objective;
use promptweave_domain::reference::ResourceName;

pub fn router() -> OpenApiRouter<AppState> {
    operations::router()
        .routes(routes!(create_ensemble))
        .routes(routes!(validate::validate_ensemble))
        .routes(routes!(statistics::get_ensemble_statistics))
        .routes(routes!(replay::replay_ensemble))
        .routes(routes!(solve::solve_ensemble))
}

// ---- Requests ------------------------------------------------------------------------------

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateEnsemble {
    target: Target,
    /// The prompts to weigh, each named once. All must have the same shape and be made for the same backbone.
    #[schema(min_items = 1, max_items = 64)]
    sources: Vec<Source>,
    /// The backbone. It may be left out if only one registered backbone fits the sources.
    #[schema(value_type = Option<String>, example = "vit-s14")]
    backbone: Option<ResourceName>,
    #[serde(default)]
    objective: Objective,
    /// Take no more gradients than it needs for weights this certain, and say so in the result.
    early_stopping: Option<EarlyStopping>,
    #[serde(default)]
    output: Output,
    /// Jobs with a smaller number go first; 100 by default.
    #[serde(default = "default_priority")]
    #[schema(minimum = 0, maximum = 1000, default = 100)]
    priority: i32,
    /// Compute it even if an ensemble with the same `spec_digest` waits, runs or has succeeded.
    #[serde(default)]
    force: bool,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Output {
    /// The prompt the result becomes a version of; `<dataset>-<short id>` by default.
    #[schema(value_type = Option<String>, example = "food-composed")]
    pub name: Option<ResourceName>,
}

// ---- Handlers ------------------------------------------------------------------------------

/// Learn how much of each source prompt helps a target, and compose the prompt
///
/// The request is resolved and checked here; a worker then does the work as a job. If an ensemble with the same
/// `spec_digest` waits, runs or has succeeded (and is published under `output.name`, if given), the answer is that
/// ensemble, unless `force` is set.
#[utoipa::path(
    post,
    path = "/ensembles",
    tag = "ensembles",
    security(("api_key" = ["run"])),
    request_body = CreateEnsemble,
    responses(
        (status = 200, description = "It was computed before", body = Ensemble,
         headers(("location" = String))),
        (status = 202, body = Ensemble, headers(("location" = String), ("retry-after" = u32))),
        (status = 422, description = "`unknown_dataset`, `unknown_split`, `empty_target`, \
            `one_class`, `empty_split`, `same_split`, `invalid_max_samples`, `no_sources`, \
            `too_many_sources`, `unknown_prompt`, `not_a_prompt`, `output_too_long`, `name_taken` (of the ensemble), `same_source`, `deep_prompt_not_composable`, \
            `width_mismatch`, `length_mismatch`, `unknown_backbone`, `backbone_required`, \
            `backbone_ambiguous`, `backbone_mismatch`, `preprocessing_mismatch`, \
            `invalid_objective`, `invalid_early_stopping`, `too_large` (features above 4 GiB), `invalid_priority`; \
            `invalid_request` where there are several, each with its own in errors"),
        (status = 429, description = "`queue_full`: as many jobs wait as the operator lets",
         headers(("retry-after" = u32))),
    )
)]
async fn create_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Draft { body, mut mistakes }: Draft<CreateEnsemble>,
) -> Result<Response, Problem> {
    let (priority, force) = (body.priority, body.force);
    mistakes.note(check_priority(priority))?;
    let request = body.request();
    let id = state.clock.new_id();
    let mut conn = state.pool.acquire().await?;
    let spec = mistakes.finish(plan(&mut conn, caller.project_id, id, &request).await)?;
    let order = JobRequest {
        id,
        priority,
        spec: &spec,
        replay_of: None,
        reuse: (!force).then(|| request.reuse()),
    };
    accept(&state, &mut conn, caller.project_id, order).await
}

impl CreateEnsemble {
    fn request(self) -> EnsembleRequest {
        let (dataset, samples) = self.target.samples();
        EnsembleRequest {
            dataset,
            samples,
            sources: self.sources.into_iter().map(|it| it.prompt).collect(),
            backbone: self.backbone,
            objective: self.objective,
            early_stopping: self.early_stopping,
            output: self.output.name,
        }
    }
}

impl EnsembleRequest {
    fn reuse(&self) -> Reuse<'_> {
        let output = self.output.as_ref().map(ResourceName::as_str);
        Reuse { output }
    }
}

mod operations {
    use super::answer::Ensemble;
    use crate::http::jobs::operations::job_operations;
    use promptweave_domain::composition::CompositionResult;
    use promptweave_domain::job::EnsembleSpec;

    job_operations! {
        EnsembleSpec => Ensemble, CompositionResult;
        one: "ensemble", a: "an ensemble",
        result: "Get an ensemble's source weights, both terms, trade-off path and diagnostics",
        events: "",
        retry: "A failed or cancelled ensemble is queued again as it was posted, with as many attempts as a new one. To \
                compute one again that has succeeded, `replay` it.",
        gone: "`statistics_deleted`: those that it is solved again from",
    }
}

//! `/v1/rankings`: jobs that score prompts for a target, and make none.

use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::Draft;
use crate::http::jobs::{
    JobRequest, JobStatus, JobUrls, Resource, accept, check_priority, default_priority,
};
use crate::http::named::{Source, Target};
use crate::jobs::Job;
use crate::jobs::plan::ranking::{RankingRequest, plan};
use crate::jobs::requests::Reuse;
use promptweave_domain::ranking::RankingObjective;
use promptweave_domain::reference::ResourceName;
use promptweave_domain::specification::RankingSpec;

pub fn router() -> OpenApiRouter<AppState> {
    operations::router().routes(routes!(create_ranking))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateRanking {
    /// The target, which must have no `eval_split`.
    target: Target,
    /// The prompts to score, each named once. All must have the same shape and be made for the same backbone.
    #[schema(min_items = 1, max_items = 64)]
    sources: Vec<Source>,
    /// The backbone. It may be left out if only one registered backbone fits the sources.
    #[schema(value_type = Option<String>, example = "vit-s14")]
    backbone: Option<ResourceName>,
    #[serde(default)]
    objective: RankingObjective,
    /// Jobs with a smaller number go first; 100 by default.
    #[serde(default = "default_priority")]
    #[schema(minimum = 0, maximum = 1000, default = 100)]
    priority: i32,
    /// Rank even if a ranking with the same `spec_digest` waits, runs or has succeeded.
    #[serde(default)]
    force: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct RankingJob {
    #[serde(flatten)]
    job: JobStatus,
    /// The specification, with every reference resolved when it was posted.
    spec: RankingSpec,
    urls: JobUrls,
}

impl Resource for RankingSpec {
    type Response = RankingJob;
}

impl From<Job<RankingSpec>> for RankingJob {
    fn from(job: Job<RankingSpec>) -> Self {
        Self {
            job: JobStatus::from(&job),
            urls: JobUrls::of::<RankingSpec>(job.id),
            spec: job.spec,
        }
    }
}

/// Score prompts for a target by every transferability metric
///
/// The result is one table, where higher is better. Its metrics are H-score (plain, adjusted and cross-validated),
/// LogME, LEEP, NCE, OTCE, and the similarities of SPoT and PANDA to a prompt that is tuned on the target for a few
/// epochs. Nothing is weighed, composed or published. If a ranking with the same `spec_digest` waits, runs or has
/// succeeded, the answer is that ranking, unless `force` is set.
#[utoipa::path(
    post,
    path = "/rankings",
    tag = "rankings",
    security(("api_key" = ["run"])),
    request_body = CreateRanking,
    responses(
        (status = 200, description = "It was computed before", body = RankingJob,
         headers(("location" = String))),
        (status = 202, body = RankingJob, headers(("location" = String), ("retry-after" = u32))),
        (status = 422, description = "`unknown_dataset`, `unknown_split`, `empty_target`, `one_class`, \
            `nothing_to_evaluate`, `invalid_max_samples`, `no_sources`, `too_many_sources`, `unknown_prompt`, `not_a_prompt`, `same_source`, \
            `deep_prompt_not_composable`, `width_mismatch`, `length_mismatch`, `unknown_backbone`, `backbone_required`, \
            `backbone_ambiguous`, `backbone_mismatch`, `preprocessing_mismatch`, `invalid_objective`, \
            `too_large` (features above 4 GiB), `invalid_priority`; `invalid_request` where there are several, each with its \
            own in errors"),
        (status = 429, description = "`queue_full`: as many jobs wait as the operator lets",
         headers(("retry-after" = u32))),
    )
)]
async fn create_ranking(
    State(state): State<AppState>,
    caller: Caller,
    Draft { body, mut mistakes }: Draft<CreateRanking>,
) -> Result<Response, Problem> {
    mistakes.note(check_priority(body.priority))?;
    let (dataset, samples) = body.target.samples();
    let request = RankingRequest {
        dataset,
        samples,
        sources: body.sources.into_iter().map(|it| it.prompt).collect(),
        backbone: body.backbone,
        objective: body.objective,
    };
    let mut conn = state.pool.acquire().await?;
    let spec = mistakes.finish(plan(&mut conn, caller.project_id, &request).await)?;
    let order = JobRequest {
        id: state.clock.new_id(),
        priority: body.priority,
        spec: &spec,
        replay_of: None,
        reuse: (!body.force).then_some(Reuse { output: None }),
    };
    accept(&state, &mut conn, caller.project_id, order).await
}

mod operations {
    use super::RankingJob;
    use crate::http::jobs::operations::job_operations;
    use promptweave_domain::ranking::Ranking;
    use promptweave_domain::specification::RankingSpec;

    job_operations! {
        RankingSpec => RankingJob, Ranking;
        one: "ranking", a: "a ranking",
        result: "Get the table: one row per source, in the order of the request",
        events: "",
        retry: "A failed or cancelled ranking is queued again as it was posted.",
    }
}

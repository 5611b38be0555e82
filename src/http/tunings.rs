//! `/v1/tunings`: jobs that train a prompt and its head for a target, and publish them.

use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::ensembles::Output;
use crate::http::error::Problem;
use crate::http::extract::Draft;
use crate::http::jobs::{
    JobRequest, JobStatus, JobUrls, Resource, accept, check_priority, default_priority,
};
use crate::http::named::{Source, Target};
use crate::jobs::Job;
use crate::jobs::plan::tuning::{TuningRequest, plan};
use crate::jobs::requests::Reuse;
use promptweave_domain::reference::ResourceName;
use promptweave_domain::specification::TuningSpec;
use promptweave_domain::tuning::{Grid, TuningOptions};

pub fn router() -> OpenApiRouter<AppState> {
    operations::router().routes(routes!(create_tuning))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateTuning {
    target: Target,
    /// The prompt to start from, for example a composed one; by default the initial prompt of `options.init_seed`. Its
    /// head is used too if it has the same classes, but not when something is chosen by held-out images, which the head
    /// may have seen.
    start: Option<Source>,
    /// The backbone. It may be left out if only one registered backbone is the one of `start`.
    #[schema(value_type = Option<String>, example = "vit-s14")]
    backbone: Option<ResourceName>,
    /// Options of the tuning. With a `start`, `num_tokens` and `init_seed` are those of the start.
    #[serde(default)]
    options: TuningOptions,
    /// Learning rates and weight decays to try on held-out images (the split `val`, or every fifth image). The best
    /// pair then tunes on all images. At most 64 pairs.
    #[serde(default)]
    grid: Grid,
    #[serde(default)]
    output: Output,
    /// Jobs with a smaller number go first; 100 by default.
    #[serde(default = "default_priority")]
    #[schema(minimum = 0, maximum = 1000, default = 100)]
    priority: i32,
    /// Tune even if a tuning with the same `spec_digest` waits, runs or has succeeded.
    #[serde(default)]
    force: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TuningJob {
    #[serde(flatten)]
    job: JobStatus,
    /// The specification, with every reference resolved when it was posted.
    spec: TuningSpec,
    urls: TuningUrls,
}

#[derive(Debug, Serialize, ToSchema)]
struct TuningUrls {
    #[serde(flatten)]
    job: JobUrls,
    /// The tuned prompt's file, once there is one.
    tuned: Option<String>,
}

impl Resource for TuningSpec {
    type Response = TuningJob;
}

impl From<Job<TuningSpec>> for TuningJob {
    fn from(job: Job<TuningSpec>) -> Self {
        let tuned = job.result.as_ref().and_then(|result| {
            let (prompt, version) = (result.tuned.prompt.as_ref()?, result.tuned.version?);
            Some(format!("/v1/prompts/{prompt}/versions/{version}/content"))
        });
        Self {
            job: JobStatus::from(&job),
            urls: TuningUrls {
                job: JobUrls::of::<TuningSpec>(job.id),
                tuned,
            },
            spec: job.spec,
        }
    }
}

/// Train a prompt and a head for a target
///
/// The method is VPT, shallow or deep, on the frozen backbone. The request is resolved and checked here; a worker then
/// does the work as a job. It keeps a checkpoint after every epoch, so that another attempt continues from there. If a
/// tuning with the same `spec_digest` waits, runs or has succeeded (and is published under `output.name`, if given),
/// the answer is that tuning, unless `force` is set.
#[utoipa::path(
    post,
    path = "/tunings",
    tag = "tunings",
    security(("api_key" = ["run"])),
    request_body = CreateTuning,
    responses(
        (status = 200, description = "It was computed before", body = TuningJob,
         headers(("location" = String))),
        (status = 202, body = TuningJob, headers(("location" = String), ("retry-after" = u32))),
        (status = 422, description = "`invalid_options`, `reserved_name`, `unknown_dataset`, `unknown_split`, \
            `empty_target`, `one_class`, `empty_split`, `same_split`, `invalid_max_samples`, `too_few_images` (to hold \
            some out), `unknown_prompt`, `not_a_prompt`, `deep_start`, `width_mismatch`, `unknown_backbone`, `backbone_required`, \
            `backbone_ambiguous`, `backbone_mismatch`, `preprocessing_mismatch`, `invalid_priority`; `invalid_request` where there are \
            several, each with its own in errors"),
        (status = 429, description = "`queue_full`: as many jobs wait as the operator lets",
         headers(("retry-after" = u32))),
    )
)]
async fn create_tuning(
    State(state): State<AppState>,
    caller: Caller,
    Draft { body, mut mistakes }: Draft<CreateTuning>,
) -> Result<Response, Problem> {
    mistakes.note(check_priority(body.priority))?;
    let (dataset, samples) = body.target.samples();
    let request = TuningRequest {
        dataset,
        samples,
        start: body.start.map(|start| start.prompt),
        backbone: body.backbone,
        options: body.options,
        grid: body.grid,
        output: body.output.name,
    };
    let id = state.clock.new_id();
    let mut conn = state.pool.acquire().await?;
    let spec = mistakes.finish(plan(&mut conn, caller.project_id, id, &request).await)?;
    let output = request.output.as_ref().map(ResourceName::as_str);
    let order = JobRequest {
        id,
        priority: body.priority,
        spec: &spec,
        replay_of: None,
        reuse: (!body.force).then_some(Reuse { output }),
    };
    accept(&state, &mut conn, caller.project_id, order).await
}

mod operations {
    use super::TuningJob;
    use crate::http::jobs::operations::job_operations;
    use promptweave_domain::specification::TuningSpec;
    use promptweave_domain::tuning::TuningResult;

    job_operations! {
        TuningSpec => TuningJob, TuningResult;
        one: "tuning", a: "a tuning",
        result: "Get the losses of every epoch, the choices made, and the scores on `eval_split`",
        events: " `epoch` events have the losses of an epoch. Each epoch is reported once, unless its checkpoint could \
                 not be stored and another attempt repeats it.",
        retry: "A failed or cancelled tuning is queued again as it was posted, and starts from the beginning.",
    }
}

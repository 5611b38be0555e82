//! `/v1/ensembles`: jobs that learn source weights for a target and compose the prompt.

mod actions;
mod answer;
mod events;
mod outcome;
mod resolve;
mod validate;

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use sqlx::PgConnection;
use tokio::time::{Duration, Instant, timeout_at};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::access::Caller;
use super::error::Problem;
use super::extract::{Json, Path, Query};
use super::page::{Page, PageQuery};
use crate::domain::composition::TargetSamples;
use crate::domain::dataset::Split;
use crate::domain::job::{DEFAULT_PRIORITY, EnsembleSpec};
use crate::domain::objective::Objective;
use crate::domain::reference::{Reference, ResourceName};
use crate::domain::sharing::StopWhen;
use crate::jobs::plan::{EnsembleRequest, PlanError, plan};
use crate::jobs::queue::QueueError;
use crate::jobs::requests::{self, NewJob, Posted, Reuse};
use crate::jobs::{self, ENSEMBLE, Job};
use answer::{Ensemble, path};

/// Seconds between two looks at a job.
const LOOK_AGAIN_AFTER: u32 = 1;
/// Seconds after which a full queue may have room.
const POST_AGAIN_AFTER: u32 = 10;
/// Longest that a request may wait for an ensemble, in seconds.
const MAX_WAIT: u32 = 60;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_ensemble, list_ensembles))
        .routes(routes!(validate::validate_ensemble))
        .routes(routes!(get_ensemble))
        .routes(routes!(outcome::get_ensemble_result))
        .routes(routes!(outcome::get_ensemble_statistics))
        .routes(routes!(events::list_ensemble_events))
        .routes(routes!(actions::cancel_ensemble))
        .routes(routes!(actions::retry_ensemble))
        .routes(routes!(actions::replay_ensemble))
        .routes(routes!(resolve::resolve_ensemble))
}

// ---- Requests ------------------------------------------------------------------------------

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateEnsemble {
    target: Target,
    /// The prompts to weigh, each once; all of one shape and made for one backbone.
    #[schema(min_items = 1, max_items = 64)]
    sources: Vec<Source>,
    /// May be left out where only one registered backbone fits the sources.
    #[schema(value_type = Option<String>, example = "vit-s14")]
    backbone: Option<ResourceName>,
    #[serde(default)]
    objective: Objective,
    /// Take no more gradients than it needs for weights this certain, and say so in the result.
    stop_when: Option<StopWhen>,
    #[serde(default)]
    output: Output,
    /// Jobs with a smaller number go first; 100 by default.
    #[serde(default = "default_priority")]
    #[schema(minimum = 0, maximum = 1000, default = 100)]
    priority: i32,
    /// Compute it also where an ensemble of the same `spec_digest` is under way or has a result.
    #[serde(default)]
    force: bool,
}

fn default_priority() -> i32 {
    DEFAULT_PRIORITY
}

/// Whose images the weights are learned on.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Target {
    /// `name`, `name:2` or `name@sha256:…`.
    #[schema(value_type = String, example = "food:1")]
    dataset: Reference,
    #[serde(default = "default_split")]
    #[schema(default = "train")]
    split: Split,
    /// Labelled images the result is tried on; never used to choose weights.
    eval_split: Option<Split>,
    /// At most this many images, a seeded stratified choice; no fewer than classes.
    #[serde(default = "default_max_samples")]
    #[schema(minimum = 2, maximum = 1_000_000, default = 2000)]
    max_samples: usize,
    #[serde(default)]
    seed: u64,
    /// Leave unreadable images out, and count them, instead of failing.
    #[serde(default)]
    skip_bad: bool,
}

fn default_split() -> Split {
    Split::Train
}

fn default_max_samples() -> usize {
    2000
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Source {
    /// `name`, `name:2`, `name:production` or `name@sha256:…`.
    #[schema(value_type = String, example = "dtd")]
    prompt: Reference,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Output {
    /// The prompt the result becomes a version of; `<dataset>-<short id>` by default.
    #[schema(value_type = Option<String>, example = "food-composed")]
    name: Option<ResourceName>,
}

impl From<PlanError> for Problem {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Registry(error) => error.into(),
            PlanError::Refused(refusal) => {
                Problem::field(refusal.code, refusal.pointer, refusal.detail)
            }
        }
    }
}

impl From<QueueError> for Problem {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::Db(error) => error.into(),
            QueueError::Registry(error) => error.into(),
            // No handler holds a lease.
            QueueError::LeaseLost(_) => Problem::internal(error),
        }
    }
}

// ---- Handlers ------------------------------------------------------------------------------

/// Learn how much of each source prompt helps a target, and compose the prompt
///
/// Everything is resolved and checked here; the work is a job that a worker takes. Where an ensemble of the
/// same `spec_digest` waits, runs or has succeeded (and is published under `output.name`, if one is asked
/// for), the answer is that one, unless `force` is set.
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
            `too_many_sources`, `unknown_prompt`, `same_source`, `deep_prompt_not_composable`, \
            `width_mismatch`, `length_mismatch`, `unknown_backbone`, `backbone_required`, \
            `backbone_ambiguous`, `backbone_mismatch`, `preprocessing_mismatch`, \
            `invalid_objective`, `invalid_stop_when`, `too_large` (features above 4 GiB), `invalid_priority`"),
        (status = 429, description = "`queue_full`: as many ensembles wait as the operator lets",
         headers(("retry-after" = u32))),
    )
)]
async fn create_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<CreateEnsemble>,
) -> Result<Response, Problem> {
    let (priority, force) = (body.priority, body.force);
    let request = body.request()?;
    let id = state.clock.new_id();
    let mut conn = state.pool.acquire().await?;
    let spec = plan(&mut conn, caller.project_id, id, &request).await?;
    let order = Order {
        id,
        priority,
        spec: &spec,
        replay_of: None,
        reuse: (!force).then(|| request.reuse()),
    };
    accept(&state, &mut conn, caller.project_id, order).await
}

impl CreateEnsemble {
    fn request(self) -> Result<EnsembleRequest, Problem> {
        check_priority(self.priority)?;
        let target = self.target;
        Ok(EnsembleRequest {
            dataset: target.dataset,
            samples: TargetSamples {
                split: target.split,
                eval_split: target.eval_split,
                max_samples: target.max_samples,
                seed: target.seed,
                skip_bad: target.skip_bad,
            },
            sources: self.sources.into_iter().map(|it| it.prompt).collect(),
            backbone: self.backbone,
            objective: self.objective,
            stop_when: self.stop_when,
            output: self.output.name,
        })
    }
}

impl EnsembleRequest {
    fn reuse(&self) -> Reuse<'_> {
        let output = self.output.as_ref().map(ResourceName::as_str);
        Reuse { output }
    }
}

fn check_priority(priority: i32) -> Result<(), Problem> {
    if (0..=1000).contains(&priority) {
        return Ok(());
    }
    let detail = format!("is {priority}; it must lie in 0..=1000");
    Err(Problem::field("invalid_priority", "/priority", detail))
}

/// A job to be put into the queue.
struct Order<'a> {
    id: Uuid,
    priority: i32,
    spec: &'a EnsembleSpec,
    replay_of: Option<Uuid>,
    reuse: Option<Reuse<'a>>,
}

/// Puts the job into the queue, and answers with it, or with one that is as good.
async fn accept(
    state: &AppState,
    conn: &mut PgConnection,
    project_id: Uuid,
    order: Order<'_>,
) -> Result<Response, Problem> {
    let new = NewJob {
        id: order.id,
        project_id,
        kind: ENSEMBLE,
        priority: order.priority,
        spec: order.spec,
        replay_of: order.replay_of,
    };
    let most = state.settings.max_queued;
    let (id, is_new) = match requests::post(conn, new, order.reuse, most).await? {
        Posted::Queued => (order.id, true),
        Posted::Same(id) => (id, false),
        Posted::Full => {
            let detail = format!(
                "{most} ensembles wait already, which is the most that the operator lets (--max-queued); \
                 post it again later, or ask for more workers"
            );
            let full = Problem::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", detail);
            return Err(full.retry_after(POST_AGAIN_AFTER));
        }
    };
    let job = existing(conn, project_id, id).await?;
    let location = [(header::LOCATION, path(id))];
    // A new one may be over already where a worker was quick; it was accepted all the same.
    Ok(match job.state.is_terminal() && !is_new {
        true => (StatusCode::OK, location, JsonResponse(Ensemble::from(job))).into_response(),
        false => {
            let again = [(header::RETRY_AFTER, LOOK_AGAIN_AFTER.to_string())];
            let ensemble = JsonResponse(Ensemble::from(job));
            (StatusCode::ACCEPTED, location, again, ensemble).into_response()
        }
    })
}

/// List ensembles, the newest first
#[utoipa::path(
    get,
    path = "/ensembles",
    tag = "ensembles",
    security(("api_key" = ["read"])),
    params(PageQuery),
    responses((status = 200, body = Page<Ensemble>))
)]
async fn list_ensembles(
    State(state): State<AppState>,
    caller: Caller,
    Query(query): Query<PageQuery>,
) -> Result<JsonResponse<Page<Ensemble>>, Problem> {
    let (before, limit) = (query.after()?, query.limit()?);
    let mut conn = state.pool.acquire().await?;
    let jobs = jobs::list(&mut conn, caller.project_id, None, before, limit).await?;
    let ensembles = jobs.into_iter().map(Ensemble::from).collect();
    Ok(JsonResponse(
        query.page(ensembles, |ensemble: &Ensemble| ensemble.id.to_string())?,
    ))
}

async fn existing(conn: &mut PgConnection, project_id: Uuid, id: Uuid) -> Result<Job, Problem> {
    jobs::find(conn, project_id, id)
        .await?
        .ok_or_else(|| not_found(id))
}

fn not_found(id: Uuid) -> Problem {
    Problem::not_found("ensemble_not_found", format!("there is no ensemble `{id}`"))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// Seconds to wait for the ensemble's end; the answer comes with it, or after them, or earlier where the
    /// operator lets nobody wait so long (`--max-wait-s`). 0 by default.
    #[serde(default)]
    #[param(minimum = 0, maximum = 60)]
    wait: u32,
}

/// An ensemble's state and progress
///
/// `Retry-After` is there as long as another look makes sense; with `wait` that look takes no polling.
#[utoipa::path(
    get,
    path = "/ensembles/{id}",
    tag = "ensembles",
    security(("api_key" = ["read"])),
    params(("id" = Uuid, Path), WaitQuery),
    responses(
        (status = 200, body = Ensemble),
        (status = 404, description = "`ensemble_not_found`"),
    )
)]
async fn get_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
    Query(WaitQuery { wait }): Query<WaitQuery>,
) -> Result<Response, Problem> {
    if wait > MAX_WAIT {
        let detail = format!("is {wait}; it must lie in 0..={MAX_WAIT}");
        return Err(Problem::field("invalid_query", "/wait", detail));
    }
    let job = match wait {
        0 => existing(&mut *state.pool.acquire().await?, caller.project_id, id).await?,
        wait => until_over(&state, caller.project_id, id, wait).await?,
    };
    let look_again = !job.state.is_terminal();
    let mut response = JsonResponse(Ensemble::from(job)).into_response();
    if look_again {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, LOOK_AGAIN_AFTER.into());
    }
    Ok(response)
}

/// The job when it is over, or as it is after `wait` seconds or when the server stops.
async fn until_over(
    state: &AppState,
    project_id: Uuid,
    id: Uuid,
    wait: u32,
) -> Result<Job, Problem> {
    let end = Instant::now()
        + state
            .settings
            .max_wait
            .min(Duration::from_secs(wait.into()));
    let mut waiting = state.watch.wait_for(id);
    loop {
        // No connection is held while it waits.
        let job = existing(&mut *state.pool.acquire().await?, project_id, id).await?;
        if job.state.is_terminal() {
            return Ok(job);
        }
        match timeout_at(end, waiting.look_again()).await {
            Ok(true) => {}
            Ok(false) | Err(_) => return Ok(job),
        }
    }
}

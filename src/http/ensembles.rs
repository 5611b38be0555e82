//! `/v1/ensembles`: jobs that learn source weights for a target and compose the prompt.

mod resolve;

use axum::Json as JsonResponse;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::access::Caller;
use super::content::File;
use super::error::Problem;
use super::extract::{Json, Path, Query};
use super::page::{Page, PageQuery};
use crate::domain::composition::{CompositionResult, Phase, TargetSamples};
use crate::domain::dataset::Split;
use crate::domain::digest::Digest;
use crate::domain::job::{DEFAULT_PRIORITY, EnsembleSpec, JobError, JobState};
use crate::domain::objective::Objective;
use crate::domain::reference::{Reference, ResourceName};
use crate::jobs::events::{self, JobEvent};
use crate::jobs::plan::{EnsembleRequest, PlanError, plan};
use crate::jobs::queue::{self, Cancellation, NewJob, QueueError};
use crate::jobs::resolve::Solved;
use crate::jobs::{self, ENSEMBLE, Job};
use crate::telemetry::chain;

/// Seconds between two looks at a job.
const LOOK_AGAIN_AFTER: u32 = 1;
const MAX_EVENTS: i64 = 200;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_ensemble, list_ensembles))
        .routes(routes!(get_ensemble))
        .routes(routes!(get_ensemble_result))
        .routes(routes!(get_ensemble_statistics))
        .routes(routes!(list_ensemble_events))
        .routes(routes!(cancel_ensemble))
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
    #[serde(default)]
    output: Output,
    /// Jobs with a smaller number go first; 100 by default.
    #[serde(default = "default_priority")]
    #[schema(minimum = 0, maximum = 1000, default = 100)]
    priority: i32,
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

// ---- Answers -------------------------------------------------------------------------------

#[derive(Debug, Serialize, ToSchema)]
struct Ensemble {
    id: Uuid,
    state: JobState,
    /// The phase in work, or the one it stopped in.
    phase: Option<Phase>,
    progress: Option<EnsembleProgress>,
    /// Attempts begun, of `max_attempts`.
    attempt: i32,
    max_attempts: i32,
    /// Somebody asked it to stop.
    cancel_requested: bool,
    priority: i32,
    /// What is computed, with every reference resolved when it was posted.
    spec: EnsembleSpec,
    /// Equal digests mean equal answers.
    #[schema(value_type = String, example = "sha256:…")]
    spec_digest: Digest,
    /// Of a failed job, or of the last attempt of one that waits for another.
    error: Option<JobError>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    started_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    finished_at: Option<OffsetDateTime>,
    urls: Urls,
}

/// How far the phase is.
#[derive(Debug, Serialize, ToSchema)]
struct EnsembleProgress {
    done: u64,
    total: u64,
}

#[derive(Debug, Serialize, ToSchema)]
struct Urls {
    #[serde(rename = "self")]
    this: String,
    events: String,
    cancel: String,
    result: String,
    statistics: String,
    /// The composed prompt's file, once there is one.
    composed: Option<String>,
    /// Where to solve again from its statistics, once there are some.
    resolve: Option<String>,
}

impl From<Job> for Ensemble {
    fn from(job: Job) -> Self {
        let this = path(job.id);
        let composed = job.result.as_ref().and_then(|result| {
            let (prompt, version) = (result.composed.prompt.as_ref()?, result.composed.version?);
            Some(format!("/v1/prompts/{prompt}/versions/{version}/content"))
        });
        Self {
            id: job.id,
            state: job.state,
            phase: job.progress.map(|progress| progress.phase),
            progress: job.progress.map(|progress| EnsembleProgress {
                done: progress.done,
                total: progress.total,
            }),
            attempt: job.attempt,
            max_attempts: job.max_attempts,
            cancel_requested: job.cancel_requested,
            priority: job.priority,
            spec: job.spec,
            spec_digest: job.spec_digest,
            error: job.error,
            created_at: job.created_at,
            started_at: job.started_at,
            finished_at: job.finished_at,
            urls: Urls {
                events: format!("{this}/events"),
                cancel: format!("{this}/cancel"),
                result: format!("{this}/result"),
                statistics: format!("{this}/statistics"),
                resolve: (job.statistics_digest.is_some() && job.statistics_deleted_at.is_none())
                    .then(|| format!("{this}/resolve")),
                composed,
                this,
            },
        }
    }
}

fn path(id: Uuid) -> String {
    format!("/v1/ensembles/{id}")
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
/// Everything is resolved and checked here; the work is a job that a worker takes.
#[utoipa::path(
    post,
    path = "/ensembles",
    tag = "ensembles",
    security(("api_key" = ["run"])),
    request_body = CreateEnsemble,
    responses(
        (status = 202, body = Ensemble, headers(("location" = String), ("retry-after" = u32))),
        (status = 422, description = "`unknown_dataset`, `unknown_split`, `empty_target`, \
            `one_class`, `empty_split`, `same_split`, `invalid_max_samples`, `no_sources`, \
            `too_many_sources`, `unknown_prompt`, `same_source`, `deep_prompt_not_composable`, \
            `width_mismatch`, `length_mismatch`, `unknown_backbone`, `backbone_required`, \
            `backbone_ambiguous`, `backbone_mismatch`, `preprocessing_mismatch`, \
            `invalid_objective`, `too_large` (features above 4 GiB), `invalid_priority`"),
    )
)]
async fn create_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<CreateEnsemble>,
) -> Result<impl IntoResponse, Problem> {
    let CreateEnsemble {
        target,
        sources,
        backbone,
        objective,
        output,
        priority,
    } = body;
    check_priority(priority)?;
    let request = EnsembleRequest {
        dataset: target.dataset,
        samples: TargetSamples {
            split: target.split,
            eval_split: target.eval_split,
            max_samples: target.max_samples,
            seed: target.seed,
            skip_bad: target.skip_bad,
        },
        sources: sources.into_iter().map(|source| source.prompt).collect(),
        backbone,
        objective,
        output: output.name,
    };
    let id = state.clock.new_id();
    let mut conn = state.pool.acquire().await?;
    let spec = plan(&mut conn, caller.project_id, id, &request).await?;
    accept(&mut conn, caller.project_id, id, priority, &spec).await
}

fn check_priority(priority: i32) -> Result<(), Problem> {
    if (0..=1000).contains(&priority) {
        return Ok(());
    }
    let detail = format!("is {priority}; it must lie in 0..=1000");
    Err(Problem::field("invalid_priority", "/priority", detail))
}

/// Puts the job into the queue, and answers with it.
async fn accept(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
    priority: i32,
    spec: &EnsembleSpec,
) -> Result<impl IntoResponse + use<>, Problem> {
    let new = NewJob {
        id,
        project_id,
        kind: ENSEMBLE,
        priority,
        spec,
    };
    queue::enqueue(conn, new).await?;
    let ensemble = Ensemble::from(existing(conn, project_id, id).await?);
    let headers = [
        (header::LOCATION, path(id)),
        (header::RETRY_AFTER, LOOK_AGAIN_AFTER.to_string()),
    ];
    Ok((StatusCode::ACCEPTED, headers, JsonResponse(ensemble)))
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

/// An ensemble's state and progress
///
/// `Retry-After` is there as long as another look makes sense.
#[utoipa::path(
    get,
    path = "/ensembles/{id}",
    tag = "ensembles",
    security(("api_key" = ["read"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 200, body = Ensemble),
        (status = 404, description = "`ensemble_not_found`"),
    )
)]
async fn get_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<Response, Problem> {
    let job = existing(&mut *state.pool.acquire().await?, caller.project_id, id).await?;
    let mut response = JsonResponse(Ensemble::from(job.clone())).into_response();
    if !job.state.is_terminal() {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, LOOK_AGAIN_AFTER.into());
    }
    Ok(response)
}

/// The ensemble once it succeeded; otherwise why it has no result.
async fn succeeded(state: &AppState, caller: &Caller, id: Uuid) -> Result<Solved, Problem> {
    let job = existing(&mut *state.pool.acquire().await?, caller.project_id, id).await?;
    let job = match Solved::try_from(job) {
        Ok(solved) => return Ok(solved),
        Err(job) => job,
    };
    Err(match job.state {
        JobState::Failed => {
            let reason = job.error.map(|e| format!(": {}: {}", e.code, e.detail));
            let detail = format!("ensemble `{id}` failed{}", reason.unwrap_or_default());
            Problem::conflict("ensemble_failed", detail)
        }
        JobState::Cancelled => {
            let detail = format!("ensemble `{id}` was cancelled; post it again");
            Problem::conflict("ensemble_cancelled", detail)
        }
        other => {
            let detail = format!("ensemble `{id}` is {}; ask again", other.name());
            Problem::conflict("ensemble_not_finished", detail).retry_after(LOOK_AGAIN_AFTER)
        }
    })
}

/// One that succeeded, whose statistics are still there.
async fn with_statistics(state: &AppState, caller: &Caller, id: Uuid) -> Result<Solved, Problem> {
    let solved = succeeded(state, caller, id).await?;
    match solved.statistics_deleted_at {
        None => Ok(solved),
        Some(at) => {
            let detail = format!(
                "the statistics of ensemble `{id}` were let go at {at}: they are kept for so many days as the \
                 operator says (--statistics-days); post the ensemble again"
            );
            Err(Problem::new(StatusCode::GONE, "statistics_deleted", detail))
        }
    }
}

/// Source weights, both terms, the path of trade-offs, diagnostics
#[utoipa::path(
    get,
    path = "/ensembles/{id}/result",
    tag = "ensembles",
    security(("api_key" = ["read"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 200, body = CompositionResult),
        (status = 404, description = "`ensemble_not_found`"),
        (status = 409, description = "`ensemble_not_finished`, `ensemble_failed`, \
            `ensemble_cancelled`"),
    )
)]
async fn get_ensemble_result(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<JsonResponse<CompositionResult>, Problem> {
    Ok(JsonResponse(succeeded(&state, &caller, id).await?.result))
}

/// What the numbers were computed from, as safetensors
#[utoipa::path(
    get,
    path = "/ensembles/{id}/statistics",
    tag = "ensembles",
    security(("api_key" = ["read"])),
    params(
        ("id" = Uuid, Path),
        ("if-none-match" = Option<String>, Header, description = "ETag of a copy at hand"),
    ),
    responses(
        (status = 200, content_type = "application/octet-stream", body = Vec<u8>,
         headers(("etag" = String), ("content-digest" = String), ("repr-digest" = String))),
        (status = 304, description = "The copy at hand is this one", headers(("etag" = String))),
        (status = 404, description = "`ensemble_not_found`"),
        (status = 409, description = "`ensemble_not_finished`, `ensemble_failed`, \
            `ensemble_cancelled`"),
        (status = 410, description = "`statistics_deleted`: their time is over"),
    )
)]
async fn get_ensemble_statistics(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
    method: Method,
    request: HeaderMap,
) -> Result<Response, Problem> {
    let digest = with_statistics(&state, &caller, id).await?.statistics;
    let (size, pieces) = state.blobs.stream(&digest).await?;
    let file = File {
        digest,
        size,
        kind: "application/octet-stream",
        name: format!("{id}-statistics.safetensors"),
        immutable: true,
        ranges: false,
    };
    if let Some(not_modified) = file.not_modified(&request) {
        return Ok(not_modified);
    }
    // The status is sent by then; what is left is to break off and to say why.
    let pieces = pieces.inspect_err(move |error| {
        tracing::error!(job.id = %id, error = chain(error), "statistics could not be sent whole");
    });
    Ok(file.whole(&method, Body::from_stream(pieces)))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct EventQuery {
    /// Only events with a larger number.
    #[serde(default)]
    #[param(minimum = 0)]
    after: i32,
}

#[derive(Debug, Serialize, ToSchema)]
struct Events {
    /// At most 200, in order.
    items: Vec<JobEvent>,
    /// `after` of the next request.
    last_seq: i32,
}

/// What happened to an ensemble, in order
#[utoipa::path(
    get,
    path = "/ensembles/{id}/events",
    tag = "ensembles",
    security(("api_key" = ["read"])),
    params(("id" = Uuid, Path), EventQuery),
    responses(
        (status = 200, body = Events),
        (status = 404, description = "`ensemble_not_found`"),
    )
)]
async fn list_ensemble_events(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
    Query(EventQuery { after }): Query<EventQuery>,
) -> Result<JsonResponse<Events>, Problem> {
    if after < 0 {
        let detail = format!("is {after}; events are counted from 1, and 0 asks for all of them");
        return Err(Problem::field("invalid_query", "/after", detail));
    }
    let mut conn = state.pool.acquire().await?;
    existing(&mut conn, caller.project_id, id).await?;
    let items = events::list(&mut conn, caller.project_id, id, after, MAX_EVENTS).await?;
    let last_seq = items.last().map_or(after, |event| event.seq);
    Ok(JsonResponse(Events { items, last_seq }))
}

/// Cancel an ensemble
///
/// One that waits is cancelled at once; one that runs stops at its next step.
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
async fn cancel_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<impl IntoResponse, Problem> {
    let mut conn = state.pool.acquire().await?;
    let status = match queue::cancel(&mut conn, caller.project_id, id).await? {
        None => return Err(not_found(id)),
        Some(Cancellation::Requested) => StatusCode::ACCEPTED,
        Some(Cancellation::Cancelled | Cancellation::AlreadyOver(JobState::Cancelled)) => {
            StatusCode::OK
        }
        Some(Cancellation::AlreadyOver(state)) => {
            let detail = format!("ensemble `{id}` has {} already", state.name());
            return Err(Problem::conflict("ensemble_over", detail));
        }
    };
    Ok((
        status,
        JsonResponse(Ensemble::from(
            existing(&mut conn, caller.project_id, id).await?,
        )),
    ))
}

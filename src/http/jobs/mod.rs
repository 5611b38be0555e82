//! What jobs of every kind have in common as resources; `/v1/ensembles`, `/v1/tunings`, `/v1/rankings` and
//! `/v1/predictions` are built on it.

pub(super) mod actions;
mod answer;
pub(super) mod events;
pub(super) mod operations;

use std::future::{Future, ready};

use axum::Json as JsonResponse;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use tokio::time::{Duration, Instant, timeout_at};
use utoipa::IntoParams;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::{FieldError, Problem};
use crate::http::page::{Page, PageQuery};
use crate::jobs;
use crate::jobs::Job;
use crate::jobs::plan::PlanError;
use crate::jobs::queue::QueueError;
use crate::jobs::requests;
use crate::jobs::requests::{EnqueueOutcome, NewJob, Reuse};
use promptweave_domain::job::{DEFAULT_PRIORITY, JobState};
use promptweave_domain::specification::Specification;

pub(super) use answer::{JobProgress, JobStatus, JobUrls, path};

/// Seconds between two looks at a job.
pub(super) const LOOK_AGAIN_AFTER: u32 = 1;
/// Seconds after which a full queue may have room.
const POST_AGAIN_AFTER: u32 = 10;
/// Longest that a request may wait for a job, in seconds.
const MAX_WAIT: u32 = 60;

/// A kind of job that clients see.
pub(super) trait Resource: Specification {
    type Response: From<Job<Self>> + Serialize;

    /// How a client computes a successful job again.
    const REPEAT: &'static str = "post it with `force`";

    /// Keeps what a job refers to, until it is queued again in the same transaction.
    fn hold(
        &self,
        _conn: &mut PgConnection,
        _state: &AppState,
        _project_id: Uuid,
    ) -> impl Future<Output = Result<(), Problem>> + Send {
        ready(Ok(()))
    }
}

/// A problem code that contains the kind, e.g. `tuning_not_found`.
pub(super) fn code<S: Specification>(what: &str) -> String {
    format!("{}_{what}", S::KIND)
}

impl From<PlanError> for Problem {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Registry(error) => error.into(),
            PlanError::Refused(refusals) => Problem::of_mistakes(
                (refusals.into_iter())
                    .map(|it| FieldError::new(it.code, it.pointer, it.detail))
                    .collect(),
            ),
        }
    }
}

impl From<QueueError> for Problem {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::Db(error) => error.into(),
            QueueError::Registry(error) => error.into(),
            // No handler holds a lease, so this is a bug.
            QueueError::LeaseLost(_) => Problem::internal(error),
        }
    }
}

// ---- Into the queue ------------------------------------------------------------------------

pub(super) fn default_priority() -> i32 {
    DEFAULT_PRIORITY
}

pub(super) fn check_priority(priority: i32) -> Result<(), Problem> {
    if (0..=1000).contains(&priority) {
        return Ok(());
    }
    let detail = format!("is {priority}; it must lie in 0..=1000");
    Err(Problem::field("invalid_priority", "/priority", detail))
}

/// A job to be put into the queue.
pub(super) struct JobRequest<'a, S> {
    pub id: Uuid,
    pub priority: i32,
    pub spec: &'a S,
    pub replay_of: Option<Uuid>,
    pub reuse: Option<Reuse<'a>>,
}

/// Puts the job into the queue, and answers with it or with an existing equivalent one.
pub(super) async fn accept<S: Resource>(
    state: &AppState,
    conn: &mut PgConnection,
    project_id: Uuid,
    request: JobRequest<'_, S>,
) -> Result<Response, Problem> {
    let new = NewJob {
        id: request.id,
        project_id,
        priority: request.priority,
        spec: request.spec,
        replay_of: request.replay_of,
    };
    let most = state.settings.max_queued;
    let (id, is_new) = match requests::post(conn, new, request.reuse, most).await? {
        EnqueueOutcome::Queued => (request.id, true),
        EnqueueOutcome::Same(id) => (id, false),
        EnqueueOutcome::Full => {
            let detail = format!(
                "{most} jobs wait already, which is the most that the operator lets (--max-queued); \
                 post it again later, or ask for more workers"
            );
            let full = Problem::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", detail);
            return Err(full.retry_after(POST_AGAIN_AFTER));
        }
    };
    let job = existing::<S>(conn, project_id, id).await?;
    let location = [(header::LOCATION, path::<S>(id))];
    // A new job may be over already if a worker was quick; the answer is still 202.
    let is_over = job.state.is_terminal() && !is_new;
    let answer = JsonResponse(S::Response::from(job));
    Ok(match is_over {
        true => (StatusCode::OK, location, answer).into_response(),
        false => {
            let again = [(header::RETRY_AFTER, LOOK_AGAIN_AFTER.to_string())];
            (StatusCode::ACCEPTED, location, again, answer).into_response()
        }
    })
}

// ---- Reading -------------------------------------------------------------------------------

pub(super) async fn list<S: Resource>(
    state: &AppState,
    caller: &Caller,
    query: &PageQuery,
) -> Result<JsonResponse<Page<S::Response>>, Problem> {
    let (before, limit) = (query.after()?, query.limit()?);
    let mut conn = state.pool.acquire().await?;
    let jobs = jobs::list::<S>(&mut conn, caller.project_id, None, before, limit).await?;
    let page = query.page(jobs, |job: &Job<S>| job.id.to_string())?;
    Ok(JsonResponse(Page {
        items: page.items.into_iter().map(S::Response::from).collect(),
        next_page_token: page.next_page_token,
    }))
}

pub(super) async fn existing<S: Specification>(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<Job<S>, Problem> {
    jobs::find(conn, project_id, id)
        .await?
        .ok_or_else(|| not_found::<S>(id))
}

pub(super) fn not_found<S: Specification>(id: Uuid) -> Problem {
    let detail = format!("there is no {} `{id}`", S::KIND);
    Problem::not_found(code::<S>("not_found"), detail)
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct WaitQuery {
    /// Seconds to wait for the job's end. The answer comes when the job ends or the time is up, or earlier if the
    /// operator allows less (`--max-wait-s`). 0 by default.
    #[serde(default)]
    #[param(minimum = 0, maximum = 60)]
    pub wait: u32,
}

/// Answers with the job now, or at its end if the client waits for that.
pub(super) async fn get<S: Resource>(
    state: &AppState,
    caller: &Caller,
    id: Uuid,
    WaitQuery { wait }: WaitQuery,
) -> Result<Response, Problem> {
    if wait > MAX_WAIT {
        let detail = format!("is {wait}; it must lie in 0..={MAX_WAIT}");
        return Err(Problem::field("invalid_query", "/wait", detail));
    }
    let job = match wait {
        0 => existing::<S>(&mut *state.pool.acquire().await?, caller.project_id, id).await?,
        wait => until_over(state, caller.project_id, id, wait).await?,
    };
    let look_again = !job.state.is_terminal();
    let mut response = JsonResponse(S::Response::from(job)).into_response();
    if look_again {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, LOOK_AGAIN_AFTER.into());
    }
    Ok(response)
}

/// The job when it is over, or its state after `wait` seconds or when the server stops.
async fn until_over<S: Specification>(
    state: &AppState,
    project_id: Uuid,
    id: Uuid,
    wait: u32,
) -> Result<Job<S>, Problem> {
    let longest = state.settings.max_wait;
    let end = Instant::now() + longest.min(Duration::from_secs(wait.into()));
    let mut waiting = state.watch.wait_for(id);
    loop {
        // The connection is returned before it waits.
        let job = existing::<S>(&mut *state.pool.acquire().await?, project_id, id).await?;
        if job.state.is_terminal() {
            return Ok(job);
        }
        match timeout_at(end, waiting.look_again()).await {
            Ok(true) => {}
            Ok(false) | Err(_) => return Ok(job),
        }
    }
}

/// The problem that says why a job has no result.
pub(super) fn no_result<S: Specification>(job: &Job<S>) -> Problem {
    let (kind, id) = (S::KIND, job.id);
    match job.state {
        JobState::Failed => {
            let reason = job.error.as_ref();
            let reason = reason.map(|error| format!(": {}: {}", error.code, error.detail));
            let detail = format!("{kind} `{id}` failed{}", reason.unwrap_or_default());
            Problem::conflict(code::<S>("failed"), detail)
        }
        JobState::Cancelled => {
            let detail = format!("{kind} `{id}` was cancelled; post it again");
            Problem::conflict(code::<S>("cancelled"), detail)
        }
        other => {
            let detail = format!("{kind} `{id}` is {}; ask again", other.name());
            Problem::conflict(code::<S>("not_finished"), detail).retry_after(LOOK_AGAIN_AFTER)
        }
    }
}

/// The result of a job that succeeded.
pub(super) async fn result<S: Specification>(
    state: &AppState,
    caller: &Caller,
    id: Uuid,
) -> Result<JsonResponse<S::Result>, Problem> {
    let mut conn = state.pool.acquire().await?;
    let job = existing::<S>(&mut conn, caller.project_id, id).await?;
    match job.result {
        Some(result) => Ok(JsonResponse(result)),
        None => Err(no_result(&job)),
    }
}

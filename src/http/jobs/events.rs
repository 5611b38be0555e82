//! What happened to a job: as a page, or as a stream of server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::marker::PhantomData;
use std::time::Duration;

use axum::Json as JsonResponse;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::jobs::{JobProgress, existing};
use crate::jobs::events;
use crate::jobs::events::JobEvent;
use crate::jobs::watch::Waiting;
use promptweave_domain::specification::Specification;

const MAX_EVENTS: i64 = 200;
/// Interval of comments on a quiet stream, so that no proxy takes it for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const LAST_EVENT_ID: &str = "last-event-id";

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Only events with a larger number.
    #[serde(default)]
    #[param(minimum = 0)]
    after: i32,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Events {
    /// At most 200, in order.
    items: Vec<JobEvent>,
    /// Number of the last event: the `after` of the next request.
    last_seq: i32,
}

/// Answers with a job's events, in order: as a page, or as server-sent events until the job is over, with `Accept:
/// text/event-stream`.
pub async fn list<S: Specification>(
    state: AppState,
    caller: &Caller,
    id: Uuid,
    EventQuery { after }: EventQuery,
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    let accept = headers.get(header::ACCEPT).and_then(|it| it.to_str().ok());
    let is_stream = accept.is_some_and(|accept| accept.contains("text/event-stream"));
    let mut after = number(after, "/after")?;
    if let Some(last) = headers.get(LAST_EVENT_ID) {
        let last = last.to_str().ok().and_then(|it| it.parse().ok());
        // This is checked for a page too: a value that the document does not allow is refused.
        let last = number(last.unwrap_or(-1), "/last-event-id")?;
        if is_stream {
            after = last;
        }
    }
    if is_stream {
        return follow::<S>(state, caller.project_id, id, after).await;
    }
    let mut conn = state.pool.acquire().await?;
    existing::<S>(&mut conn, caller.project_id, id).await?;
    let items = events::list(&mut conn, caller.project_id, id, after, MAX_EVENTS).await?;
    let last_seq = items.last().map_or(after, |event| event.seq);
    Ok(JsonResponse(Events { items, last_seq }).into_response())
}

fn number(after: i32, pointer: &str) -> Result<i32, Problem> {
    if after >= 0 {
        return Ok(after);
    }
    let detail =
        "must be the number of an event: they are counted from 1, and 0 asks for all of them";
    Err(Problem::field("invalid_query", pointer, detail))
}

async fn follow<S: Specification>(
    state: AppState,
    project_id: Uuid,
    id: Uuid,
    after: i32,
) -> Result<Response, Problem> {
    let mut following = Following::<S> {
        of: PhantomData,
        waiting: state.watch.wait_for(id),
        state,
        project_id,
        id,
        after,
        progress: None,
        ready: VecDeque::new(),
        next: Next::Wait,
    };
    // The first look is here, where an error can still have a status.
    following.look().await?;
    if following.next == Next::End && following.ready.is_empty() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let events = stream::unfold(following, Following::<S>::next);
    let events = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    // Asks proxies not to buffer the stream.
    Ok(([("x-accel-buffering", "no")], events).into_response())
}

/// The state of a client that follows a job's events.
struct Following<S> {
    of: PhantomData<S>,
    state: AppState,
    waiting: Waiting,
    project_id: Uuid,
    id: Uuid,
    /// Number of the last event that was sent.
    after: i32,
    /// The progress that was last sent.
    progress: Option<JobProgress>,
    ready: VecDeque<Event>,
    next: Next,
}

/// The next step, once the events in hand are sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Look,
    Wait,
    End,
}

impl<S: Specification> Following<S> {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), self));
            }
            match self.next {
                Next::Look => {}
                Next::Wait if self.waiting.look_again().await => {}
                Next::Wait | Next::End => return None,
            }
            // The client reconnects, and then gets the problem.
            if let Err(problem) = self.look().await {
                tracing::warn!(job.id = %self.id, error = ?problem, "a stream of events breaks off");
                return None;
            }
        }
    }

    async fn look(&mut self) -> Result<(), Problem> {
        let mut conn = self.state.pool.acquire().await?;
        // The job is read before the events, so that a job that is over has all its events read.
        let job = existing::<S>(&mut conn, self.project_id, self.id).await?;
        let items =
            events::list(&mut conn, self.project_id, self.id, self.after, MAX_EVENTS).await?;
        self.next = match items.len() as i64 {
            MAX_EVENTS => Next::Look,
            _ if job.state.is_terminal() => Next::End,
            _ => Next::Wait,
        };
        for item in items {
            self.after = item.seq;
            let event = Event::default().id(item.seq.to_string()).event(&item.kind);
            self.ready.push_back(data(event, &item));
        }
        let progress = JobProgress::of(&job);
        if self.next == Next::Wait && progress.is_some() && progress != self.progress {
            self.ready
                .push_back(data(Event::default().event("progress"), &progress));
            self.progress = progress;
        }
        Ok(())
    }
}

fn data(event: Event, data: &impl Serialize) -> Event {
    event.json_data(data).expect("plain data")
}

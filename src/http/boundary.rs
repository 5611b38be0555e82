//! The outermost layer: every request gets an id, a span and one line in the log, and every error leaves as a problem
//! document, whichever layer made it.

use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use tracing::{Instrument, debug, error, info, info_span, warn};

use crate::http::AppState;
use crate::http::error::Problem;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The id of a request, for handlers that record it.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

pub(super) async fn boundary(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    let id = client_id(&request).unwrap_or_else(|| state.clock.new_id().to_string());
    let path = request.uri().path().to_owned();
    let span = info_span!(
        "request",
        request.id = id,
        http.method = %request.method(),
        http.path = path,
        key.id = tracing::field::Empty,
    );
    request.extensions_mut().insert(RequestId(id.clone()));

    async {
        let mut response = next.run(request).await;
        if let Some(problem) = problem_of(&mut response) {
            write_problem(&mut response, &problem, &path, &id);
        }
        let header = HeaderValue::from_str(&id).expect("plain characters");
        response.headers_mut().insert(REQUEST_ID, header);
        let status = response.status().as_u16();
        let duration_ms = started.elapsed().as_millis() as u64;
        // Probes come every few seconds and say nothing new while they succeed.
        if status < 400 && (path == "/livez" || path.starts_with("/readyz")) {
            debug!(http.status = status, duration_ms, "request answered");
        } else {
            info!(http.status = status, duration_ms, "request answered");
        }
        response
    }
    .instrument(span)
    .await
}

/// The client's own request id, if it is short and plain enough to be logged and sent back.
fn client_id(request: &Request) -> Option<String> {
    let id = request.headers().get(REQUEST_ID)?.to_str().ok()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    ((1..=128).contains(&id.len()) && id.chars().all(plain)).then(|| id.to_owned())
}

fn problem_of(response: &mut Response) -> Option<Problem> {
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        return Some(problem);
    }
    // A library below made this error (no such route, wrong method, time-out): its status and headers stay.
    let status = response.status();
    (status.is_client_error() || status.is_server_error()).then(|| Problem::of_status(status))
}

fn write_problem(response: &mut Response, problem: &Problem, path: &str, id: &str) {
    if problem.status().is_server_error() {
        // A 503 is transient; every other 5xx is a bug in this program.
        let causes = problem.causes().unwrap_or_default();
        match problem.status().as_u16() {
            503 => warn!(problem.code = problem.code(), causes, "request failed"),
            _ => error!(problem.code = problem.code(), causes, "request failed"),
        }
    }
    let json = serde_json::to_vec(&problem.document(path, id)).expect("plain data");
    let headers = response.headers_mut();
    headers.remove(header::CONTENT_LENGTH);
    let kind = HeaderValue::from_static("application/problem+json");
    headers.insert(header::CONTENT_TYPE, kind);
    *response.body_mut() = Body::from(json);
}

//! `Idempotency-Key`: a POST that a client sends again has one effect and one answer.
//!
//! This is a layer around every POST of the scopes `write` and `run`. (`admin` has none, because an answer that shows
//! an API key's secret must not be stored.) The first request with a key claims it, works and stores its answer; others
//! are told to wait, then get that answer. Bodies are compared by a digest, taken while the handler reads, so that none
//! is held in memory for this. The work runs in its own task: it finishes, and its answer is stored, even if the client
//! has gone.
//!
//! It follows draft-ietf-httpapi-idempotency-key-header-07.

use std::collections::HashMap;
use std::convert::Infallible;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};

use axum::BoxError;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use futures::{StreamExt, stream};
use http_body_util::BodyExt;
use sqlx::PgPool;
use tokio::time::{Instant, interval_at, timeout_at};
use tracing::Instrument;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::{Header, ObjectBuilder, OpenApi, RefOr, Required, Type};

use crate::http::AppState;
use crate::http::access::{Caller, RequiredScopes};
use crate::http::error::Problem;
use crate::http::extract::body_interrupted;
use crate::http::openapi::{add_refusal, operations};
use crate::registry::idempotency::{Claim, Claimed, KeptAnswer, LEASE, RequestDigest, claim};
use promptweave_domain::api_key::Scope;
use promptweave_domain::digest::DigestBuilder;
use promptweave_domain::error_chain::chain;

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const MAX_KEY: usize = 255;
/// Seconds after which a client may ask again while its key is in use.
const ASK_AGAIN_AFTER: u32 = 1;
/// The headers that are stored with an answer's status and body.
const KEPT_HEADERS: [HeaderName; 4] = [
    header::CONTENT_TYPE,
    header::LOCATION,
    header::ETAG,
    header::RETRY_AFTER,
];

/// The operations that read the header, and whether they take a body.
pub(super) type KeyedOperations = HashMap<(Method, String), bool>;

/// The state of the layer.
#[derive(Clone, Debug)]
pub(super) struct Keyed {
    pub state: AppState,
    pub operations: Arc<KeyedOperations>,
}

/// Runs a request with a key once. A request without a key passes unchanged.
pub(super) async fn once(
    State(keyed): State<Keyed>,
    path: MatchedPath,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let operation = (request.method().clone(), path.as_str().to_owned());
    let Some(&takes_body) = keyed.operations.get(&operation) else {
        return Ok(next.run(request).await);
    };
    let Some(key) = key(request.headers())? else {
        return Ok(next.run(request).await);
    };
    let work = with_key(keyed.state, key, takes_body, request, next);
    let task = tokio::spawn(work.in_current_span());
    match task.await {
        Ok(answer) => answer,
        Err(ended) if ended.is_panic() => resume_unwind(ended.into_panic()),
        Err(ended) => Err(Problem::internal(ended)),
    }
}

fn key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(KEY).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let visible = |value: &&[u8]| value.iter().all(u8::is_ascii_graphic);
    let bytes = Some(value.as_bytes())
        .filter(visible)
        .filter(|bytes| (1..=MAX_KEY).contains(&bytes.len()));
    match (bytes, values.next()) {
        (Some(bytes), None) => Ok(Some(String::from_utf8_lossy(bytes).into_owned())),
        _ => {
            let detail = format!(
                "`Idempotency-Key` is to be there once, with 1 to {MAX_KEY} visible ASCII characters; \
                 a UUID does"
            );
            let code = "invalid_idempotency_key";
            Err(Problem::new(StatusCode::BAD_REQUEST, code, detail))
        }
    }
}

async fn with_key(
    state: AppState,
    key: String,
    takes_body: bool,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let caller: &Caller = Caller::of(request.extensions(), request.uri())?;
    let project_id = caller.project_id;
    let claimed = claim(&mut *state.pool.acquire().await?, project_id, &key).await?;
    // After this, nobody waits for the answer any more.
    let deadline = Instant::now() + state.settings.request_timeout;
    let (request, seen) = watched(request, takes_body, deadline);
    match claimed {
        Claimed::First(claim) => {
            let answer = renewed(&state.pool, &claim, next.run(request)).await;
            settle(&state.pool, &claim, answer, seen).await
        }
        Claimed::InFlight => Err(Problem::conflict(
            "idempotency_key_in_flight",
            "another request with this `Idempotency-Key` is at work; send this one again in a moment \
             to get its answer",
        )
        .retry_after(ASK_AGAIN_AFTER)),
        Claimed::Answered(kept) => replay(kept, request, seen).await,
    }
}

// ---- The request ---------------------------------------------------------------------------

/// The digest of a request, as far as its body has been read.
struct Seen {
    digest: DigestBuilder,
    size: u64,
    whole: bool,
}

impl Seen {
    fn request(&mut self) -> RequestDigest {
        RequestDigest {
            digest: std::mem::take(&mut self.digest).finish(),
            size: self.size,
        }
    }
}

type Watched = Arc<Mutex<Seen>>;

fn seen(watched: &Watched) -> std::sync::MutexGuard<'_, Seen> {
    watched.lock().expect("nothing panics while it is held")
}

#[derive(Debug, thiserror::Error)]
#[error("the request's body did not come in the time the server gives a request")]
struct BodyTooLate;

/// Wraps a request so that its body is digested as it is read, until `deadline`. A body that the operation does not use
/// is not part of the request.
fn watched(request: Request, takes_body: bool, deadline: Instant) -> (Request, Watched) {
    let (parts, body) = request.into_parts();
    let mut digest = DigestBuilder::default();
    let target = parts.uri.path_and_query().map_or("/", |it| it.as_str());
    digest.update(format!("{} {target}\n", parts.method).as_bytes());
    let watched = Arc::new(Mutex::new(Seen {
        digest,
        size: 0,
        whole: !takes_body,
    }));
    if !takes_body {
        return (Request::from_parts(parts, body), watched);
    }
    let start = (body.into_data_stream(), watched.clone());
    let pieces = stream::try_unfold(start, move |(mut pieces, watched)| async move {
        let next = timeout_at(deadline, pieces.next()).await;
        let piece = next.map_err(|_| BodyTooLate)?.transpose()?;
        let mut seen = seen(&watched);
        let Some(piece) = piece else {
            seen.whole = true;
            return Ok::<_, BoxError>(None);
        };
        seen.digest.update(&piece);
        seen.size += piece.len() as u64;
        drop(seen);
        Ok(Some((piece, (pieces, watched))))
    });
    let request = Request::from_parts(parts, Body::from_stream(pieces));
    (request, watched)
}

// ---- The answer ----------------------------------------------------------------------------

/// Awaits the answer of `work`, and renews the claim until it is there.
async fn renewed(pool: &PgPool, claim: &Claim, work: impl Future<Output = Response>) -> Response {
    tokio::select! {
        answer = work => answer,
        never = renew(pool, claim) => match never {},
    }
}

async fn renew(pool: &PgPool, claim: &Claim) -> Infallible {
    let mut tick = interval_at(Instant::now() + LEASE / 3, LEASE / 3);
    loop {
        tick.tick().await;
        let renewed = async { claim.renew(&mut *pool.acquire().await?).await };
        match renewed.await {
            Ok(true) => {}
            Ok(false) => tracing::warn!("an idempotency key was taken over by another request"),
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "an idempotency key cannot be renewed"
                );
            }
        }
    }
}

/// Stores a success, and releases the key after anything else. The work is done by then: the client gets its answer
/// even if storing fails.
async fn settle(
    pool: &PgPool,
    claim: &Claim,
    answer: Response,
    watched: Watched,
) -> Result<Response, Problem> {
    let (parts, body) = answer.into_parts();
    if !parts.status.is_success() || !seen(&watched).whole {
        let released = async { claim.release(&mut *pool.acquire().await?).await };
        if let Err(error) = released.await {
            tracing::warn!(
                error = chain(&error),
                "an idempotency key cannot be released"
            );
        }
        return Ok(Response::from_parts(parts, body));
    }
    // The body is JSON, and already in memory.
    let body = body.collect().await.map_err(Problem::internal)?.to_bytes();
    let header = |name: &HeaderName| {
        let value = parts.headers.get(name)?.to_str().ok()?;
        Some((name.to_string(), value.to_owned()))
    };
    let kept = KeptAnswer {
        request: seen(&watched).request(),
        status: parts.status.as_u16(),
        headers: KEPT_HEADERS.iter().filter_map(header).collect(),
        body: body.to_vec(),
    };
    let answered = async { claim.answer(&mut *pool.acquire().await?, &kept).await };
    match answered.await {
        Ok(true) => {}
        Ok(false) => tracing::error!("an idempotency key was lost to another request at work"),
        Err(error) => tracing::error!(error = chain(&error), "an answer cannot be kept"),
    }
    Ok(Response::from_parts(parts, Body::from(body)))
}

/// Sends the stored answer again, if this is the same request as the first.
async fn replay(kept: KeptAnswer, request: Request, watched: Watched) -> Result<Response, Problem> {
    if !seen(&watched).whole {
        let mut pieces = request.into_body().into_data_stream();
        while seen(&watched).size <= kept.request.size
            && let Some(piece) = pieces.next().await
        {
            piece.map_err(body_interrupted)?;
        }
    }
    if seen(&watched).request() != kept.request {
        return Err(Problem::unprocessable(
            "idempotency_key_reused",
            "this `Idempotency-Key` was sent with another request; use a new key for each request, and \
             the same one to repeat it with the same method, path, query and body",
        ));
    }
    let mut answer = Response::builder()
        .status(kept.status)
        .header(REPLAYED, "true");
    for (name, value) in kept.headers {
        answer = answer.header(name, value);
    }
    answer
        .body(Body::from(kept.body))
        .map_err(Problem::internal)
}

// ---- The document --------------------------------------------------------------------------

/// Documents the layer's answers on every POST that it handles, and collects these operations.
pub(super) fn document(document: &mut OpenApi, scopes: &RequiredScopes) -> KeyedOperations {
    let mut keyed = KeyedOperations::new();
    for (method, path, operation) in operations(document) {
        let route = (method, path.to_owned());
        let scope = scopes.get(&route);
        if route.0 == Method::POST && matches!(scope, Some(Scope::Write | Scope::Run)) {
            describe(operation);
            keyed.insert(route, operation.request_body.is_some());
        }
    }
    keyed
}

fn describe(operation: &mut Operation) {
    let text = ObjectBuilder::new()
        .schema_type(Type::String)
        .pattern(Some("^[!-~]+$"))
        .min_length(Some(1))
        .max_length(Some(MAX_KEY));
    let parameter = ParameterBuilder::new()
        .name(KEY.as_str())
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some(
            "A name of the client's own for this request, e.g. a UUID. Sent again within 24 hours, the \
             same request has no second effect and gets the first one's answer, if that was a success.",
        ))
        .schema(Some(text));
    operation
        .parameters
        .get_or_insert_default()
        .push(RefOr::T(parameter.build()));
    for (status, response) in &mut operation.responses.responses {
        if let RefOr::T(response) = response
            && status.starts_with('2')
        {
            let mut header = Header::default();
            header.description = Some("`true`: the answer to an earlier request".to_owned());
            response.headers.insert(REPLAYED.to_string(), header.into());
        }
    }
    for (status, refusal) in [
        ("400", "`invalid_idempotency_key`"),
        ("409", "`idempotency_key_in_flight`: ask again soon"),
        (
            "422",
            "`idempotency_key_reused`: it came with another request before",
        ),
    ] {
        add_refusal(operation, status, refusal);
    }
}

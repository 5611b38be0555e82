//! Access control: keys, scopes, and the [`Caller`] that handlers see.
//!
//! A route names its scope once, in its documentation (`security(("api_key" = ["read"]))`), and the check reads it from
//! there. Nothing below `/v1` is open: a route without a scope is a bug, found when the router is built. Health,
//! `/docs` and `/openapi.json` need no key.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::{Extensions, HeaderMap, HeaderValue, Method, StatusCode, Uri, header, request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::Span;
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Components, OpenApi, ResponseBuilder};
use uuid::Uuid;

use crate::http::AppState;
use crate::http::error::Problem;
use crate::http::openapi::operations;
use crate::http::rate_limit::{Client, Limiter};
use crate::registry::DEFAULT_PROJECT;
use crate::registry::api_keys;
use crate::registry::api_keys::Grant;
use promptweave_domain::api_key::{ApiKey, MalformedKey, Scope, Scopes};

/// Name of the security scheme in the document.
const SCHEME: &str = "api_key";
const V1: &str = "/v1/";

/// The client that sent a request, once its key was accepted. Handlers take it as an argument.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The only project whose resources the client sees.
    pub project_id: Uuid,
    /// None with `--no-auth`.
    pub key_id: Option<Uuid>,
    scopes: Scopes,
}

impl Caller {
    /// The caller when the server runs without keys.
    fn anyone() -> Self {
        Self {
            project_id: DEFAULT_PROJECT,
            key_id: None,
            scopes: Scope::ALL.into(),
        }
    }

    /// The caller of this request, for layers below the check.
    pub(super) fn of<'a>(extensions: &'a Extensions, uri: &Uri) -> Result<&'a Self, Problem> {
        extensions
            .get()
            .ok_or_else(|| Problem::internal(Unchecked(uri.path().to_owned())))
    }

    fn require(&self, scope: Scope) -> Result<(), Problem> {
        if self.scopes.contains(&scope) {
            return Ok(());
        }
        let detail = format!(
            "this needs the scope `{scope}`, which the key does not have; use a key that has it"
        );
        let challenge = format!("Bearer error=\"insufficient_scope\", scope=\"{scope}\"");
        let challenge = HeaderValue::try_from(challenge).expect("plain characters");
        Err(Problem::new(StatusCode::FORBIDDEN, "scope_missing", detail)
            .header(header::WWW_AUTHENTICATE, challenge))
    }
}

impl From<Grant> for Caller {
    fn from(grant: Grant) -> Self {
        Self {
            project_id: grant.project_id,
            key_id: Some(grant.key_id),
            scopes: grant.scopes,
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the handler of `{0}` wants a caller, and no key is asked for there")]
struct Unchecked(String);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, _: &S) -> Result<Self, Problem> {
        Self::of(&parts.extensions, &parts.uri).cloned()
    }
}

// ---- The check -----------------------------------------------------------------------------

/// The scope that each operation below `/v1` asks for.
pub type RequiredScopes = HashMap<(Method, String), Scope>;

/// The state of the check.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    pub state: AppState,
    pub scopes: Arc<RequiredScopes>,
    /// The rate limiter, if the operator set a limit.
    pub limiter: Option<Arc<Limiter>>,
}

/// Lets a request through to its handler, with its [`Caller`], or refuses it before its body is read.
pub(super) async fn check(
    State(gate): State<Gate>,
    path: MatchedPath,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    if !path.as_str().starts_with(V1) {
        return Ok(next.run(request).await);
    }
    let caller = caller(&gate.state, request.headers()).await;
    let Some(limiter) = &gate.limiter else {
        return pass(&gate, &path, caller?, request, next).await;
    };
    let client = match &caller {
        Ok(caller) => caller.key_id.map(Client::Key),
        Err(_) => None,
    };
    let left = limiter.count(client.unwrap_or_else(|| limiter.address(request.extensions())))?;
    let answered = match caller {
        Ok(caller) => pass(&gate, &path, caller, request, next).await,
        Err(problem) => Err(problem),
    };
    let mut response = answered.into_response();
    left.describe(&mut response);
    Ok(response)
}

async fn pass(
    gate: &Gate,
    path: &MatchedPath,
    caller: Caller,
    mut request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let method = match request.method() {
        // HEAD is answered by the handler of GET.
        &Method::HEAD => Method::GET,
        other => other.clone(),
    };
    // Without a scope there is no such operation, and the router answers 405.
    if let Some(scope) = gate.scopes.get(&(method, path.as_str().to_owned())) {
        caller.require(*scope)?;
    }
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

async fn caller(state: &AppState, headers: &HeaderMap) -> Result<Caller, Problem> {
    if !state.settings.authentication {
        return Ok(Caller::anyone());
    }
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        let detail = "this needs an API key; send it as `Authorization: Bearer pr_…` \
                      (`promptweave keys create` makes one)";
        return Err(unauthenticated("Bearer", detail));
    };
    const INVALID: &str = "Bearer error=\"invalid_token\"";
    let text = value.to_str().ok().and_then(|value| {
        let (scheme, text) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| text.trim())
    });
    let Some(text) = text else {
        let detail = "the header `authorization` does not read `Bearer pr_…`";
        return Err(unauthenticated("Bearer error=\"invalid_request\"", detail));
    };
    let key: ApiKey = text
        .parse()
        .map_err(|error: MalformedKey| unauthenticated(INVALID, &error.to_string()))?;
    let grant = api_keys::authenticate(&mut *state.pool.acquire().await?, &key).await?;
    let grant =
        grant.ok_or_else(|| unauthenticated(INVALID, "this key is unknown, or was revoked"))?;
    Span::current().record("key.id", tracing::field::display(grant.key_id));
    Ok(grant.into())
}

fn unauthenticated(challenge: &'static str, detail: &str) -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, "unauthenticated", detail).header(
        header::WWW_AUTHENTICATE,
        HeaderValue::from_static(challenge),
    )
}

// ---- The document --------------------------------------------------------------------------

/// Documents what the check may answer on every operation below `/v1`, and collects the scope that each one requires.
///
/// # Panics
/// If an operation does not name exactly one scope.
pub(super) fn document(document: &mut OpenApi) -> RequiredScopes {
    let scheme = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .bearer_format("pr_<id>_<secret><checksum>")
        .description(Some(
            "An API key. `promptweave up` writes one to `api-key` in its data directory, \
             `promptweave keys create` makes others.",
        ))
        .build();
    document
        .components
        .get_or_insert_with(Components::new)
        .add_security_scheme(SCHEME, SecurityScheme::Http(scheme));
    let mut scopes = RequiredScopes::new();
    for (method, path, operation) in operations(document) {
        if !path.starts_with(V1) {
            continue;
        }
        let Some(scope) = declared_scope(operation) else {
            panic!(
                "{method} {path} does not name one scope: security((\"{SCHEME}\" = [\"read\"]))"
            );
        };
        let refusals = [
            (
                "401",
                "`unauthenticated`: no key, or one that is mistyped, unknown or revoked",
            ),
            (
                "403",
                "`scope_missing`: the key lacks the scope of this operation",
            ),
            (
                "429",
                "`rate_limited`: more requests than the operator allows; `retry-after` says when the next is answered",
            ),
        ];
        for (status, description) in refusals {
            let response = ResponseBuilder::new().description(description).build();
            let responses = &mut operation.responses.responses;
            responses
                .entry(status.to_owned())
                .or_insert_with(|| response.into());
        }
        scopes.insert((method, path.to_owned()), scope);
    }
    scopes
}

fn declared_scope(operation: &Operation) -> Option<Scope> {
    let [declared] = operation.security.as_deref()? else {
        return None;
    };
    let requires = |scope: &Scope| *declared == SecurityRequirement::new(SCHEME, [scope.name()]);
    Scope::ALL.into_iter().find(requires)
}

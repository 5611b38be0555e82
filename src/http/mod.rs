//! The API: one file per resource with its types, handlers and `router()`. Handlers extract, call and map; SQL is in
//! [`crate::registry`], rules are in [`promptweave_domain`].

pub mod access;
mod aliases;
pub mod api_keys;
mod backbone_content;
mod backbone_uploads;
pub mod backbones;
pub mod boundary;
mod compose;
pub mod conditional;
mod content;
pub mod content_digest;
mod dataset_uploads;
pub mod datasets;
mod document;
pub mod ensembles;
pub mod error;
pub mod extract;
pub mod health;
mod idempotency;
mod jobs;
mod lineage;
mod links;
mod mistakes;
mod named;
pub mod openapi;
pub mod page;
mod peft;
mod predictions;
pub mod problem_codes;
pub mod projects;
mod prompt_changes;
mod prompt_content;
mod prompt_files;
mod prompt_versions;
pub mod prompts;
mod rankings;
pub mod rate_limit;
mod sources;
mod spool;
mod tunings;
mod webhook_deliveries;
pub mod webhooks;
pub mod workers;

use promptweave_domain::clock::Clock;
use promptweave_domain::error_chain::chain;
use std::any::Any;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use sqlx::PgPool;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::TimeoutLayer;
use utoipa_swagger_ui::SwaggerUi;

use crate::blobs::BlobStore;
use crate::jobs::watch::JobWatch;
use crate::registry::roots::AllowedRoots;
use crate::remote::network::Network;
use crate::remote::sources::Sources;
use rate_limit::{Limiter, RateLimit};

/// The limit of JSON bodies; uploads have [`HttpSettings::max_upload_bytes`].
const MAX_JSON_BYTES: usize = 1 << 20;

/// The state that handlers share.
#[derive(Clone, Debug)]
pub struct AppState {
    pub pool: PgPool,
    pub blobs: BlobStore,
    pub clock: Arc<dyn Clock>,
    pub watch: JobWatch,
    pub settings: Arc<HttpSettings>,
}

#[derive(Clone, Debug)]
pub struct HttpSettings {
    /// The largest uploaded file that is held in memory.
    pub max_upload_bytes: usize,
    /// The largest uploaded dataset, packed or not.
    pub max_dataset_bytes: u64,
    /// A request that takes longer is answered 503. This limits the registration of datasets too.
    pub request_timeout: Duration,
    /// The most jobs that may wait in the queue; more are answered 429.
    pub max_queued: u32,
    /// The longest that a request waits for a job's end; shorter than `request_timeout`.
    pub max_wait: Duration,
    /// Whether keys are required. Without them, everyone may do everything in the default project.
    pub authentication: bool,
    /// How often each client may ask; None sets no limit.
    pub rate_limit: Option<RateLimit>,
    /// The directories that datasets may be registered from.
    pub dataset_roots: AllowedRoots,
    /// The directories that backbones may be registered from.
    pub backbone_roots: AllowedRoots,
    /// The URIs that both may be fetched from; None allows none.
    pub sources: Option<Sources>,
    /// The addresses that webhooks may be sent to.
    pub network: Network,
    /// The directory in which packs are made before they go to the blob store; it must have room for a dataset.
    pub scratch_dir: PathBuf,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            max_upload_bytes: 64 << 20,
            max_dataset_bytes: 8 << 30,
            request_timeout: Duration::from_secs(300),
            max_queued: 10_000,
            max_wait: Duration::from_secs(60),
            authentication: true,
            rate_limit: None,
            dataset_roots: AllowedRoots::default(),
            backbone_roots: AllowedRoots::default(),
            sources: None,
            network: Network::default(),
            scratch_dir: std::env::temp_dir(),
        }
    }
}

/// The whole service, ready to be served.
pub fn router(state: AppState) -> Router {
    let openapi::Routes {
        routes,
        scopes,
        keyed,
    } = openapi::routes(&state.settings);
    let keyed = idempotency::Keyed {
        state: state.clone(),
        operations: Arc::new(keyed),
    };
    let gate = access::Gate {
        state: state.clone(),
        scopes: Arc::new(scopes),
        limiter: state.settings.rate_limit.map(Limiter::new).map(Arc::new),
    };
    // The last layer is the outermost.
    let (routes, document) = routes
        .route_layer(from_fn_with_state(keyed, idempotency::once))
        .route_layer(from_fn_with_state(gate, access::check))
        .split_for_parts();
    let docs = SwaggerUi::new("/docs").url("/openapi.json", document);
    layered(routes.merge(docs), state)
}

fn layered(routes: Router<AppState>, state: AppState) -> Router {
    // The first layer is the outermost.
    let layers = ServiceBuilder::new()
        .layer(from_fn_with_state(state.clone(), boundary::boundary))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(TimeoutLayer::with_status_code(
            StatusCode::SERVICE_UNAVAILABLE,
            state.settings.request_timeout,
        ))
        .layer(DefaultBodyLimit::max(MAX_JSON_BYTES));
    routes.layer(layers).with_state(state)
}

#[derive(Debug, thiserror::Error)]
#[error("a handler panicked: {0}")]
struct Panicked(String);

fn panicked(payload: Box<dyn Any + Send>) -> Response {
    let text = payload.downcast_ref::<String>().cloned().or_else(|| {
        payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
    });
    error::Problem::internal(Panicked(text.unwrap_or_default())).into_response()
}

/// The directory that a client named, under one of the operator's roots.
fn directory(roots: &AllowedRoots, name: &str) -> Result<PathBuf, error::Problem> {
    roots.find(name).map_err(|unknown| {
        error::Problem::field("unknown_directory", "/directory", unknown.to_string())
    })
}

/// An error about a registered directory with its causes, where the client's name for the directory replaces the
/// server's path.
fn chain_for_client(error: &(dyn Error + 'static), dir: &Path, name: &str) -> String {
    chain(error).replace(&dir.display().to_string(), name)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use axum::routing::get;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;
    use crate::db;
    use promptweave_domain::clock::MockClock;

    async fn panics() {
        panic!("the secret of the panic");
    }

    #[tokio::test]
    async fn a_panic_is_a_problem_that_tells_nothing() {
        let dir = tempfile::tempdir().unwrap();
        // The tests never connect to it.
        let pool = db::pool(
            "postgres://127.0.0.1:1".parse().unwrap(),
            &Default::default(),
        );
        let state = AppState {
            watch: JobWatch::new(pool.clone(), Default::default()),
            pool,
            blobs: BlobStore::directory(dir.path()).unwrap(),
            clock: Arc::new(MockClock::default()),
            settings: Arc::default(),
        };
        let router = layered(Router::new().route("/panics", get(panics)), state);
        let request = Request::get("/panics").body(Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert!(text.contains(r#""code":"internal_error""#), "{text}");
        assert!(!text.contains("secret"), "{text}");
    }
}

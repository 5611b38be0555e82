//! The API over its own database, called in process, and the files that tests register.

use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode, header};
use bytes::Bytes;
use http_body_util::BodyExt;
use promptweave::blobs::BlobStore;
use promptweave::http::{AppState, HttpSettings, router};
use promptweave::jobs::watch::JobWatch;
use promptweave::registry::roots::AllowedRoots;
use promptweave::registry::{DEFAULT_PROJECT, api_keys};
use promptweave_domain::api_key::{ApiKey, Scope};
use promptweave_domain::backbone::{BackboneConfig, Filter, Preprocessing};
use promptweave_domain::clock::MockClock;
use promptweave_domain::digest::Digest;
use promptweave_domain::prompt_file::{FORMAT, Head, Origin, PromptFile, PromptMetadata};
use promptweave_domain::tensor::{Stored, Tensor};
use promptweave_formats::backbone::{CONFIG_FILE, MODEL_FILE, expected_tensors};
use secrecy::ExposeSecret;
use serde_json::Value;
use sqlx::PgPool;
use tempfile::TempDir;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use uuid::Uuid;

use crate::contract;

/// Width of [`tiny_backbone`], and of the prompts that fit it.
pub const WIDTH: usize = 8;

pub struct TestApp {
    pub state: AppState,
    pub router: Router,
    /// The key sent with every request that names no other; it is made for the first request.
    key: OnceCell<String>,
    /// The directory with `blobs/`, and `roots/`, whose directories may be registered.
    pub dir: TempDir,
}

pub struct TestResponse {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl TestApp {
    pub fn new(pool: PgPool) -> Self {
        Self::with_settings(pool, |_| {})
    }

    pub fn with_settings(pool: PgPool, change: impl FnOnce(&mut HttpSettings)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let roots = dir.path().join("roots");
        fs::create_dir(&roots).unwrap();
        let mut settings = HttpSettings {
            dataset_roots: AllowedRoots::new(vec![roots.clone()]),
            backbone_roots: AllowedRoots::new(vec![roots]),
            ..HttpSettings::default()
        };
        change(&mut settings);
        let state = AppState {
            watch: JobWatch::new(pool.clone(), CancellationToken::new()),
            pool,
            blobs: BlobStore::directory(&dir.path().join("blobs")).unwrap(),
            clock: Arc::new(MockClock::default()),
            settings: Arc::new(settings),
        };
        Self {
            router: router(state.clone()),
            state,
            key: OnceCell::new(),
            dir,
        }
    }

    /// Changes the settings of an app that already holds data.
    pub fn set(&mut self, change: impl FnOnce(&mut HttpSettings)) {
        change(Arc::make_mut(&mut self.state.settings));
        self.router = router(self.state.clone());
    }

    /// Makes a directory that may be registered.
    pub fn root(&self, name: &str) -> std::path::PathBuf {
        let dir = self.dir.path().join("roots").join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// Sends a request, with a key of the default project that has every scope unless the request names its own.
    pub async fn send(&self, request: Request<Body>) -> TestResponse {
        self.send_as_is(self.keyed(request).await).await
    }

    /// Adds the key that [`Self::send`] sends.
    pub async fn keyed(&self, mut request: Request<Body>) -> Request<Body> {
        let headers = request.headers();
        if request.uri().path().starts_with("/v1/") && !headers.contains_key(header::AUTHORIZATION)
        {
            let make = || self.make_key(DEFAULT_PROJECT, &Scope::ALL);
            let key = self.key.get_or_init(make).await;
            let value = format!("Bearer {key}").parse().unwrap();
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        request
    }

    /// Stores a key and returns its text.
    pub async fn make_key(&self, project_id: Uuid, scopes: &[Scope]) -> String {
        let key = ApiKey::generate(Uuid::now_v7()).unwrap();
        let scopes = scopes.iter().copied().collect();
        let name = "a test".parse().unwrap();
        let mut conn = self.state.pool.acquire().await.unwrap();
        api_keys::insert(&mut conn, project_id, &key, &name, &scopes)
            .await
            .unwrap();
        key.text().expose_secret().to_owned()
    }

    pub async fn send_as_is(&self, request: Request<Body>) -> TestResponse {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let answer = TestResponse {
            status: parts.status,
            headers: parts.headers,
            body: body.collect().await.unwrap().to_bytes(),
        };
        contract::check(method.as_str(), &path, &answer);
        answer
    }

    pub async fn get(&self, path: &str) -> TestResponse {
        self.send(Request::get(path).body(Body::empty()).unwrap())
            .await
    }

    pub async fn post(&self, path: &str, json: &Value) -> TestResponse {
        self.post_text(path, &json.to_string()).await
    }

    pub async fn post_text(&self, path: &str, json: &str) -> TestResponse {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        self.send(request.body(Body::from(json.to_owned())).unwrap())
            .await
    }

    pub async fn post_empty(&self, path: &str) -> TestResponse {
        self.send(Request::post(path).body(Body::empty()).unwrap())
            .await
    }

    /// Uploads a file to `/v1/prompts/…/versions`.
    pub async fn upload(&self, path: &str, file: impl Into<Body>) -> TestResponse {
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(header::CONTENT_TYPE, "application/vnd.prompt+safetensors");
        self.send(request.body(file.into()).unwrap()).await
    }
}

impl TestResponse {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// The body of a success.
    #[track_caller]
    pub fn ok(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        self.json()
    }

    /// The body of an error, after a check of what all problem documents have.
    #[track_caller]
    pub fn problem(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["code"], code, "{problem}");
        assert_eq!(problem["status"], status);
        assert_eq!(problem["type"], format!("urn:promptweave:problem:{code}"));
        assert_eq!(problem["request_id"], self.header("x-request-id"));
        assert!(!problem["detail"].as_str().unwrap().is_empty());
        problem
    }
}

impl std::fmt::Debug for TestResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = String::from_utf8_lossy(&self.body);
        write!(f, "{} {:?} {text}", self.status, self.headers)
    }
}

/// A client of a server on a socket.
pub fn http_client() -> reqwest::Client {
    // A process has one provider; it may be installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

// ---- Files ---------------------------------------------------------------------------------

/// A head for two classes; its numbers depend on `seed`.
pub fn head(seed: u64) -> Head {
    let weight = (0..2 * WIDTH).map(|i| (i as f32 * 0.37 + seed as f32).sin());
    Head {
        weight: Tensor::new([2, WIDTH], weight.collect()),
        bias: Tensor::new([2], vec![0.25, -0.25]),
    }
}

/// A prompt of 2 tokens, [`WIDTH`] wide; its numbers depend on `seed`.
pub fn prompt_file(seed: u64) -> PromptFile {
    let values = (0..2 * WIDTH as u64).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 97.0 - 0.5);
    PromptFile {
        metadata: Some(PromptMetadata {
            format: FORMAT,
            backbone_digest: Some(Digest::of(b"some backbone")),
            preprocessing_id: Some("4-bicubic-imagenet".into()),
            init_seed: Some(u64::MAX),
            task: Some("digits".into()),
            classes: Some(vec!["zero".into(), "one".into()]),
            origin: Origin::Tuned,
            training: Some(serde_json::json!({"epochs": 3})),
            sources: Vec::new(),
        }),
        prompt_embeddings: Tensor::new([2, WIDTH], values.collect()),
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    }
}

/// Writes a backbone folder: one block, [`WIDTH`] wide, 4 × 4 pixels in patches of 2. Folders with the same `seed` have
/// the same weights.
pub fn tiny_backbone(dir: &Path, seed: u64, size: usize) {
    let config = BackboneConfig {
        architecture: "vit_tiny_test".into(),
        embed_dim: WIDTH,
        depth: 1,
        num_heads: 2,
        patch_size: 2,
        pos_grid: 2,
        norm_eps: 1e-6,
        preprocessing: Preprocessing {
            size,
            filter: Filter::Bicubic,
            antialias: true,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
        },
    };
    let tensors = expected_tensors(&config, 2 * WIDTH, false)
        .into_iter()
        .map(|(name, shape)| {
            let len: usize = shape.iter().product();
            let values = (0..len as u64).map(|i| ((i * 31 + seed) % 13) as f32 / 13.0);
            (name, Stored::from(&Tensor::new(shape, values.collect())))
        });
    let model = safetensors::serialize(tensors, None).unwrap();
    fs::write(dir.join(CONFIG_FILE), serde_json::to_vec(&config).unwrap()).unwrap();
    fs::write(dir.join(MODEL_FILE), model).unwrap();
}

/// A 4 × 4 PNG of one colour.
pub fn png(red: u8) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image::RgbImage::from_pixel(4, 4, image::Rgb([red, 0, 0]))
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// Writes files below `dir`, with the folders they need.
pub fn write_files(dir: &Path, files: &[(&str, &[u8])]) {
    for (path, bytes) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

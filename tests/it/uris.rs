//! Datasets and backbones from URIs: a web server, a bucket, and a stand-in for the Hub.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use axum::Router;
use axum::extract::Path as UrlPath;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Redirect, Response};
use axum::routing::get;
use promptweave::db::MIGRATOR;
use promptweave::remote::client::Client;
use promptweave::remote::sources::Sources;
use promptweave::remote::uri::AllowedUris;
use promptweave_domain::digest::Digest;
use serde_json::json;
use sqlx::PgPool;

use crate::app::{TestApp, png};
use crate::archives::tar;
use crate::remote::{network, serve};
use crate::s3;

const TOKEN: &str = "hf_secret";
const CONFIGS: [&str; 2] = ["config.json", "preprocessor_config.json"];
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn pets() -> Vec<u8> {
    tar(&[("train/cat/1.png", &png(1)), ("train/dog/2.png", &png(2))])
}

/// An app that may fetch what is below `allowed`, with the Hub at `hub`.
fn app(pool: PgPool, allowed: &[String], opened: &[SocketAddr], hub: SocketAddr) -> TestApp {
    let allowed = allowed.iter().map(|uri| uri.parse().unwrap()).collect();
    let opened: Vec<_> = opened.iter().map(SocketAddr::to_string).collect();
    let opened: Vec<_> = opened.iter().map(String::as_str).collect();
    let sources = Sources::new(
        AllowedUris::new(allowed),
        Client::new(network(&opened)).unwrap(),
        format!("http://{hub}").parse().unwrap(),
        Some(TOKEN),
        s3::builder(hub, s3::SECRET),
    );
    let scratch = tempfile::tempdir().unwrap().keep();
    TestApp::with_settings(pool, |settings| {
        settings.sources = Some(sources);
        settings.scratch_dir = scratch;
        settings.max_dataset_bytes = 100_000;
    })
}

fn assert_nothing_left(app: &TestApp) {
    let scratch = &app.state.settings.scratch_dir;
    assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_file_of_a_web_server_is_fetched_where_the_operator_allows_it(pool: PgPool) {
    let elsewhere = serve("127.0.0.1:0", Router::new().fallback(|| async { pets() })).await;
    let away = format!("http://{elsewhere}/pets.tar");
    let routes = Router::new()
        .route("/sets/pets.tar", get(|| async { pets() }))
        .route(
            "/sets/moved",
            get(|| async { Redirect::temporary("/sets/pets.tar") }),
        )
        .route(
            "/sets/away",
            get(move || async move { Redirect::temporary(&away) }),
        )
        .route("/sets/large", get(|| async { vec![0; 100_001] }))
        .route("/sets/words", get(|| async { "<html>not found</html>" }))
        .route("/secret.tar", get(|| async { pets() }));
    let at = serve("127.0.0.1:0", routes).await;
    let allowed = [format!("http://{at}/sets"), format!("http://{elsewhere}/")];
    // The second server's address is not opened.
    let app = app(pool, &allowed, &[at], at);
    let post = async |uri: String| {
        app.post("/v1/datasets", &json!({"name": "pets", "uri": uri}))
            .await
    };

    let dataset = post(format!("http://{at}/sets/pets.tar")).await.ok(201);
    assert_eq!(dataset["classes"], json!(["cat", "dog"]));
    assert_eq!(
        post(format!("http://{at}/sets/moved")).await.ok(200),
        dataset
    );
    for (uri, status, code) in [
        (format!("http://{at}/secret.tar"), 403, "uri_not_allowed"),
        (
            format!("http://{at}/sets/../secret.tar"),
            403,
            "uri_not_allowed",
        ),
        (
            format!("http://{elsewhere}/pets.tar"),
            403,
            "uri_not_allowed",
        ),
        (
            "https://169.254.169.254/latest".to_owned(),
            403,
            "uri_not_allowed",
        ),
        (
            format!("http://{at}/sets/%2e%2e%2fsecret.tar"),
            422,
            "invalid_uri",
        ),
        ("file:///etc/passwd".to_owned(), 422, "invalid_uri"),
        ("/etc/passwd".to_owned(), 422, "invalid_uri"),
        (format!("http://{at}/sets/away"), 422, "uri_failed"),
        (format!("http://{at}/sets/none"), 422, "uri_failed"),
        (format!("http://{at}/sets/large"), 413, "archive_too_large"),
        (format!("http://{at}/sets/words"), 415, "unsupported_format"),
    ] {
        post(uri).await.problem(status, code);
    }
    for body in [
        json!({"name": "a"}),
        json!({"name": "a", "directory": "a", "uri": "b"}),
    ] {
        let refused = app.post("/v1/datasets", &body).await;
        refused.problem(422, "directory_or_uri");
    }
    assert_nothing_left(&app);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn without_the_operators_word_nothing_is_fetched(pool: PgPool) {
    let app = TestApp::new(pool);
    for uri in [
        "https://example.org/pets.tar",
        "s3://bucket/pets.tar",
        "hf://datasets/org/pets",
    ] {
        let body = json!({"name": "pets", "uri": uri});
        let refused = app.post("/v1/datasets", &body).await;
        let refused = refused.problem(403, "uri_not_allowed");
        assert!(refused["detail"].as_str().unwrap().contains("--allow-uri"));
        app.post("/v1/backbones", &body)
            .await
            .problem(403, "uri_not_allowed");
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_object_of_a_bucket_is_fetched(pool: PgPool) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("bucket/sets")).unwrap();
    fs::write(dir.path().join("bucket/sets/pets.tar"), pets()).unwrap();
    fs::write(dir.path().join("bucket/sets/large.tar"), vec![0; 100_001]).unwrap();
    let at = s3::server(dir.path()).await;
    let app = app(pool, &["s3://bucket/sets".to_owned()], &[at], at);
    let post = async |uri: &str| {
        app.post("/v1/datasets", &json!({"name": "pets", "uri": uri}))
            .await
    };
    let dataset = post("s3://bucket/sets/pets.tar").await.ok(201);
    assert_eq!(dataset["split_counts"], json!({"train": 2}));
    post("s3://bucket/sets/none.tar")
        .await
        .problem(422, "uri_failed");
    post("s3://bucket/sets/large.tar")
        .await
        .problem(413, "archive_too_large");
    post("s3://other/sets/pets.tar")
        .await
        .problem(403, "uri_not_allowed");
    assert_nothing_left(&app);
}

/// Speaks the Hub's protocol for a dataset and a model; large files are on another server.
async fn hub() -> [SocketAddr; 2] {
    let file = |path: &str| fs::read(fixtures().join(path)).unwrap();
    let content = async |headers: HeaderMap, UrlPath(path): UrlPath<String>| -> Response {
        // Only the Hub may get the token.
        if headers.contains_key(header::AUTHORIZATION) {
            return StatusCode::BAD_REQUEST.into_response();
        }
        match fs::read(fixtures().join(path)) {
            Ok(bytes) => bytes.into_response(),
            Err(_) => StatusCode::NOT_FOUND.into_response(),
        }
    };
    let storage = serve("127.0.0.1:0", Router::new().route("/{*path}", get(content))).await;
    let moved = move |path: &str, digest: Digest| {
        let etag = format!("\"{}\"", digest.to_string().trim_start_matches("sha256:"));
        let location = format!("http://{storage}/{path}");
        let headers = [(header::LOCATION, location)];
        (StatusCode::FOUND, headers, [("x-linked-etag", etag)]).into_response()
    };
    let list = |files: &[&str]| {
        let siblings: Vec<_> = files.iter().map(|it| json!({"rfilename": it})).collect();
        axum::Json(json!({"sha": COMMIT, "siblings": siblings}))
    };
    let answer = move |headers: HeaderMap, UrlPath(path): UrlPath<String>| async move {
        if headers
            .get(header::AUTHORIZATION)
            .is_none_or(|it| it != "Bearer hf_secret")
        {
            return StatusCode::UNAUTHORIZED.into_response();
        }
        let (train, test) = (
            "train-00000-of-00002.parquet",
            "test-00000-of-00001.parquet",
        );
        let resolve = format!("datasets/org/pets/resolve/{COMMIT}/small/");
        let model = format!("org/vit/resolve/{COMMIT}/");
        match path.as_str() {
            "api/datasets/org/pets/revision/main" => {
                let small = [train, test].map(|file| format!("small/{file}"));
                list(&["README.md", &small[0], &small[1]]).into_response()
            }
            "api/datasets/org/lies/revision/refs/convert/parquet" => {
                list(&["default/train/0000.parquet"]).into_response()
            }
            "api/models/org/vit/revision/main" => list(&[
                CONFIGS[0],
                CONFIGS[1],
                "model.safetensors",
                "pytorch_model.bin",
            ])
            .into_response(),
            "api/models/org/pickled/revision/main" => list(&["pytorch_model.bin"]).into_response(),
            path if path.starts_with(&resolve) => {
                let name = format!("parquet/{}", &path[resolve.len()..]);
                moved(&name, Digest::of(&file(&name)))
            }
            path if path.starts_with(&model) => {
                let name = format!("checkpoints/hf_vit/{}", &path[model.len()..]);
                match path.ends_with(".json") {
                    true => file(&name).into_response(),
                    false => moved(&name, Digest::of(&file(&name))),
                }
            }
            path if path.ends_with("default/train/0000.parquet") => {
                moved(&format!("parquet/{train}"), Digest::of(b"something else"))
            }
            _ => StatusCode::NOT_FOUND.into_response(),
        }
    };
    let at = serve("127.0.0.1:0", Router::new().route("/{*path}", get(answer))).await;
    [at, storage]
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn repositories_of_the_hub_are_fetched_at_one_commit(pool: PgPool) {
    let [at, storage] = hub().await;
    let allowed = ["hf://datasets/org".to_owned(), "hf://org".to_owned()];
    let app = app(pool, &allowed, &[at, storage], at);
    let post = async |to: &str, uri: &str| {
        let path = format!("/v1/{to}");
        app.post(&path, &json!({"name": "it", "uri": uri})).await
    };
    let dataset = post("datasets", "hf://datasets/org/pets/small")
        .await
        .ok(201);
    assert_eq!(dataset["classes"], json!(["cat", "dog", "owl"]));
    assert_eq!(dataset["split_counts"], json!({"train": 4, "test": 3}));
    let backbone = post("backbones", "hf://org/vit").await.ok(201);
    let directory = app.root("vit");
    for file in CONFIGS.into_iter().chain(["model.safetensors"]) {
        fs::copy(
            fixtures().join("checkpoints/hf_vit").join(file),
            directory.join(file),
        )
        .unwrap();
    }
    let body = json!({"name": "it", "directory": "vit"});
    let same = app.post("/v1/backbones", &body).await.ok(200);
    assert_eq!(same["digest"], backbone["digest"]);

    for (to, uri, status, code, words) in [
        (
            "datasets",
            "hf://datasets/org/pets",
            422,
            "empty_dataset",
            "~parquet",
        ),
        (
            "datasets",
            "hf://datasets/org/lies@~parquet/default",
            422,
            "uri_failed",
            "the hub names",
        ),
        (
            "datasets",
            "hf://datasets/org/none",
            422,
            "uri_failed",
            "404",
        ),
        (
            "datasets",
            "hf://datasets/org",
            422,
            "invalid_uri",
            "org/name",
        ),
        (
            "datasets",
            "hf://datasets/other/pets",
            403,
            "uri_not_allowed",
            "--allow-uri",
        ),
        (
            "backbones",
            "hf://org/pickled",
            422,
            "invalid_backbone",
            "model.safetensors",
        ),
    ] {
        let problem = post(to, uri).await.problem(status, code);
        assert!(problem.to_string().contains(words), "{problem}");
        assert!(!problem.to_string().contains(TOKEN));
    }
    assert_nothing_left(&app);
}

//! `…/content` and statistics over HTTP: cached copies, ranges, and digests in both directions.

use axum::body::Body;
use axum::http::{Method, Request};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use promptweave::db::MIGRATOR;
use promptweave_domain::digest::Digest;
use serde_json::json;
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse, prompt_file};
use crate::ensembles::{Worker, furnished, post, request, until_state, url};
use crate::fixtures::FakeComposer;

const CONTENT: &str = "/v1/prompts/dtd/versions/1/content";

async fn with_version(pool: PgPool) -> (TestApp, Vec<u8>) {
    let app = TestApp::new(pool);
    app.post("/v1/prompts", &json!({"name": "dtd"}))
        .await
        .ok(201);
    let bytes = prompt_file(1).to_bytes();
    app.upload("/v1/prompts/dtd/versions", bytes.clone())
        .await
        .ok(201);
    (app, bytes)
}

async fn ask(app: &TestApp, method: Method, path: &str, headers: &[(&str, &str)]) -> TestResponse {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    app.send(request.body(Body::empty()).unwrap()).await
}

fn sha_256(bytes: &[u8]) -> String {
    format!(
        "sha-256=:{}:",
        STANDARD.encode(Digest::of(bytes).as_bytes())
    )
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_file_comes_whole_in_part_and_as_headers_alone(pool: PgPool) {
    let (app, bytes) = with_version(pool).await;
    let etag = format!("\"{}\"", Digest::of(&bytes));
    let size = bytes.len();
    let whole = app.get(CONTENT).await;
    assert_eq!((whole.status.as_u16(), &whole.body[..]), (200, &bytes[..]));
    assert_eq!(whole.header("content-digest"), sha_256(&bytes));
    assert_eq!(whole.header("repr-digest"), sha_256(&bytes));
    assert_eq!(whole.header("accept-ranges"), "bytes");

    let head = ask(&app, Method::HEAD, CONTENT, &[("range", "bytes=0-1")]).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    assert_eq!(head.header("content-length"), size.to_string());
    assert_eq!(head.header("etag"), etag);
    assert_eq!(head.header("repr-digest"), sha_256(&bytes));
    assert_eq!(head.header("content-digest"), "");

    let last = size - 1;
    for (range, from, to) in [
        ("bytes=0-0", 0, 0),
        ("bytes=8-19", 8, 19),
        ("bytes=8-", 8, last),
        ("bytes=-5", size - 5, last),
        ("bytes=8-99999999999999999999", 8, last),
        // This is the largest u64.
        ("bytes=8-18446744073709551615", 8, last),
        ("bytes=-99999999999999999999", 0, last),
    ] {
        let part = ask(&app, Method::GET, CONTENT, &[("range", range)]).await;
        assert_eq!(part.status, 206, "{range}");
        assert_eq!(part.body, bytes[from..=to], "{range}");
        let place = format!("bytes {from}-{to}/{size}");
        assert_eq!(part.header("content-range"), place);
        assert_eq!(part.header("content-digest"), sha_256(&bytes[from..=to]));
        assert_eq!(part.header("repr-digest"), sha_256(&bytes));
        assert_eq!(part.header("etag"), etag);
    }
    for range in [
        &format!("bytes={size}-"),
        "bytes=-0",
        "bytes=99999999-99999999",
    ] {
        let answer = ask(&app, Method::GET, CONTENT, &[("range", range)]).await;
        answer.problem(416, "range_not_satisfiable");
        assert_eq!(answer.header("content-range"), format!("bytes */{size}"));
    }
    for range in ["bytes=0-1,4-5", "bytes=5-4", "lines=1-2", "nonsense"] {
        let answer = ask(&app, Method::GET, CONTENT, &[("range", range)]).await;
        assert_eq!((answer.status.as_u16(), answer.body.len()), (200, size));
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_copy_at_hand_is_not_sent_again_and_a_part_fits_its_copy(pool: PgPool) {
    let (app, bytes) = with_version(pool).await;
    let etag = format!("\"{}\"", Digest::of(&bytes));
    let get = async |name: &str, value: &str| {
        let headers = [(name, value), ("range", "bytes=0-9")];
        let answer = ask(&app, Method::GET, CONTENT, &headers).await;
        answer.status.as_u16()
    };
    let (weak, among) = (format!("W/{etag}"), format!("\"x\", {etag}"));
    for known in [&etag, &weak, "*", &among] {
        assert_eq!(get("if-none-match", known).await, 304, "{known}");
    }
    assert_eq!(get("if-none-match", "\"x\"").await, 206);
    assert_eq!(get("if-range", &etag).await, 206);
    for other in [&weak, "\"x\"", "Tue, 24 Nov 2026 00:00:00 GMT"] {
        assert_eq!(get("if-range", other).await, 200, "{other}");
    }
    let known = [("if-none-match", etag.as_str())];
    let head = ask(&app, Method::HEAD, CONTENT, &known).await;
    assert_eq!(
        (head.status.as_u16(), head.header("etag")),
        (304, etag.as_str())
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_body_is_what_its_digest_says(pool: PgPool) {
    let (app, _) = with_version(pool).await;
    let upload = |digest: String, seed| {
        let request = Request::post("/v1/prompts/dtd/versions").header("content-digest", digest);
        let body = Body::from(prompt_file(seed).to_bytes());
        app.send(request.body(body).unwrap())
    };
    let right = sha_256(&prompt_file(2).to_bytes());
    upload(right.clone(), 2).await.ok(201);
    let answer = upload(right.clone(), 3).await;
    let problem = answer.problem(400, "content_digest_mismatch");
    let detail = problem["detail"].as_str().unwrap();
    let found = sha_256(&prompt_file(3).to_bytes());
    assert!(
        detail.contains(&right) && detail.contains(&found),
        "{detail}"
    );
    let answer = upload("sha-256=:AAAA:".to_owned(), 3).await;
    answer.problem(400, "invalid_content_digest");
    // JSON bodies are checked too.
    let request = Request::post("/v1/prompts")
        .header("content-type", "application/json")
        .header("content-digest", right);
    let body = Body::from(json!({"name": "other"}).to_string());
    let answer = app.send(request.body(body).unwrap()).await;
    answer.problem(400, "content_digest_mismatch");
    let versions = app.get("/v1/prompts/dtd/versions").await.ok(200);
    assert_eq!(versions["items"].as_array().unwrap().len(), 2);
}

/// Checks a file of the blob store at `path`: whole, as headers, and in parts that join to the whole.
async fn comes_in_parts(app: &TestApp, path: &str, bytes: &[u8]) {
    let size = bytes.len();
    let whole = app.get(path).await;
    assert_eq!(&whole.body[..], bytes);
    assert_eq!(whole.header("content-digest"), sha_256(bytes));
    assert_eq!(whole.header("accept-ranges"), "bytes");
    let head = ask(app, Method::HEAD, path, &[]).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    assert_eq!(head.header("content-length"), size.to_string());
    let etag = whole.header("etag");
    assert_eq!(etag, format!("\"{}\"", Digest::of(bytes)));
    let again = ask(app, Method::GET, path, &[("if-none-match", etag)]).await;
    assert_eq!((again.status.as_u16(), again.body.len()), (304, 0));
    let mut joined = Vec::new();
    for (range, from, to) in [
        ("bytes=0-3".to_owned(), 0, 4),
        (format!("bytes=4-{}", size - 3), 4, size - 2),
        ("bytes=-2".to_owned(), size - 2, size),
    ] {
        let headers = [("range", range.as_str()), ("if-range", etag)];
        let part = ask(app, Method::GET, path, &headers).await;
        assert_eq!(part.status, 206, "{range}");
        let place = format!("bytes {from}-{}/{size}", to - 1);
        assert_eq!(part.header("content-range"), place);
        assert_eq!(part.header("content-length"), (to - from).to_string());
        assert_eq!(part.header("repr-digest"), sha_256(bytes));
        // Its digest is not known when the headers are sent.
        assert_eq!(part.header("content-digest"), "");
        joined.extend_from_slice(&part.body);
    }
    assert_eq!(joined, bytes);
    let beyond = format!("bytes={size}-");
    let refused = ask(app, Method::GET, path, &[("range", &beyond)]).await;
    refused.problem(416, "range_not_satisfiable");
    let stale = [("range", "bytes=0-3"), ("if-range", "\"other\"")];
    assert_eq!(ask(app, Method::GET, path, &stale).await.status, 200);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn files_of_the_blob_store_come_in_parts_too(pool: PgPool) {
    let app = furnished(pool).await;
    let weights = std::fs::read(app.root("tiny").join("model.safetensors")).unwrap();
    comes_in_parts(&app, "/v1/backbones/tiny/content", &weights).await;
    let unknown = app.get("/v1/backbones/none/content").await;
    unknown.problem(404, "backbone_not_found");

    let ensemble = post(&app, &request()).await.ok(202);
    let worker = Worker::start(&app, &FakeComposer::default());
    let done = until_state(&app, &ensemble, "succeeded").await;
    worker.stop().await;
    comes_in_parts(&app, &url(&done, "statistics"), b"statistics").await;
}

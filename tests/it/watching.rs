//! Watching, retrying and replaying ensembles; and reusing what was computed before.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Request, header};
use futures::future::join_all;
use http_body_util::BodyExt;
use promptweave::db::MIGRATOR;
use serde_json::{Value, json};
use sqlx::PgPool;
use tower::ServiceExt;

use crate::app::{TestApp, TestResponse};
use crate::ensembles::{Worker, furnished, post, request, until_state, url};
use crate::fixtures::{FakeComposer, Script};

async fn stream(app: &TestApp, ensemble: &Value, last: Option<&str>) -> TestResponse {
    let mut request =
        Request::get(url(ensemble, "events")).header(header::ACCEPT, "text/event-stream");
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    app.send(request.body(Body::empty()).unwrap()).await
}

fn field(event: &str, name: &str) -> Option<String> {
    let mut lines = event.lines();
    lines.find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()))
}

/// Id and kind of each event of a stream, without `progress`.
fn events(answer: &TestResponse) -> Vec<(i32, String)> {
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("content-type"), "text/event-stream");
    let text = std::str::from_utf8(&answer.body).unwrap();
    let events = text.split("\n\n").filter_map(|event| {
        let id = field(event, "id:")?.parse().unwrap();
        let data: Value = serde_json::from_str(&field(event, "data:")?).unwrap();
        let kind = field(event, "event:")?;
        assert_eq!((&data["seq"], &data["kind"]), (&json!(id), &json!(kind)));
        Some((id, kind))
    });
    events.collect()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_stream_has_every_event_and_ends_with_the_ensemble(pool: PgPool) {
    let app = furnished(pool).await;
    let ensemble = post(&app, &request()).await.ok(202);
    let fake = FakeComposer::playing([Script::UntilOpened]);
    let worker = Worker::start(&app, &fake);
    until_state(&app, &ensemble, "running").await;
    let request =
        Request::get(url(&ensemble, "events")).header(header::ACCEPT, "text/event-stream");
    let request = app.keyed(request.body(Body::empty()).unwrap()).await;
    let response = app.router.clone().oneshot(request).await.unwrap();
    let (parts, mut body) = response.into_parts();
    let mut read = Vec::new();
    while let Some(frame) = body.frame().await {
        read.extend(frame.unwrap().into_data().unwrap());
        // The gate opens only after the stream has shown the job running.
        let text = String::from_utf8_lossy(&read);
        let at_work = text.contains("event: progress");
        fake.gate.fetch_or(at_work, Ordering::SeqCst);
    }
    let answer = TestResponse {
        status: parts.status,
        headers: parts.headers,
        body: read.into(),
    };
    let seen = events(&answer);
    assert!(seen.iter().map(|(id, _)| *id).eq(1..=seen.len() as i32));
    assert_eq!(seen[0].1, "queued");
    assert_eq!(seen.last().unwrap().1, "succeeded");
    let text = std::str::from_utf8(&answer.body).unwrap();
    let is_progress = |event: &&str| field(event, "event:").as_deref() == Some("progress");
    let progress = text.split("\n\n").find(is_progress);
    assert!(progress.unwrap().contains(r#""per_second":"#), "{text}");

    let rest = events(&stream(&app, &ensemble, Some("2")).await);
    assert_eq!(rest, seen[2..]);
    let last = seen.len().to_string();
    assert_eq!(stream(&app, &ensemble, Some(&last)).await.status, 204);
    for wrong in ["-1", "x", "2147483648"] {
        let refused = stream(&app, &ensemble, Some(wrong)).await;
        refused.problem(422, "invalid_query");
        let page = Request::get(url(&ensemble, "events")).header("last-event-id", wrong);
        let refused = app.send(page.body(Body::empty()).unwrap()).await;
        refused.problem(422, "invalid_query");
    }
    let page = app.get(&url(&ensemble, "events")).await.ok(200);
    assert_eq!(page["items"].as_array().unwrap().len(), seen.len());
    worker.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn who_waits_is_answered_with_the_end(pool: PgPool) {
    let app = furnished(pool).await;
    let ensemble = post(&app, &request()).await.ok(202);
    let this = url(&ensemble, "self");
    let begun = Instant::now();
    let waiting = app.get(&format!("{this}?wait=1")).await;
    assert_eq!(waiting.header("retry-after"), "1");
    assert_eq!(waiting.ok(200)["state"], "queued");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let too_long = app.get(&format!("{this}?wait=61")).await;
    too_long.problem(422, "invalid_query");

    let begun = Instant::now();
    let path = format!("{this}?wait=60");
    let (done, worker) = tokio::join!(app.get(&path), async {
        Worker::start(&app, &FakeComposer::default())
    });
    assert_eq!(done.header("retry-after"), "");
    assert_eq!(done.ok(200)["state"], "succeeded");
    assert!(begun.elapsed() < Duration::from_secs(50));
    worker.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_computed_is_not_computed_again(pool: PgPool) {
    let app = furnished(pool).await;
    let request = request();
    // The same request is posted many times at once, and then again.
    let posted = join_all((0..20).map(|_| post(&app, &request))).await;
    let ensemble = posted[0].ok(202);
    for again in &posted {
        assert_eq!(again.ok(202)["id"], ensemble["id"]);
        assert_eq!(again.header("location"), url(&ensemble, "self"));
    }
    let with = |key: &str, value: Value| {
        let mut changed = request.clone();
        changed[key] = value;
        changed
    };
    // A request without an output takes the existing result; one with another output needs it published there.
    let unnamed = post(&app, &with("output", json!({}))).await.ok(202);
    assert_eq!(unnamed["id"], ensemble["id"]);
    let renamed = post(&app, &with("output", json!({"name": "other"}))).await;
    assert_ne!(renamed.ok(202)["id"], ensemble["id"]);
    let forced = post(&app, &with("force", json!(true))).await.ok(202);
    assert_ne!(forced["id"], ensemble["id"]);
    assert_eq!(forced["spec_digest"], ensemble["spec_digest"]);
    let listed = app.get("/v1/ensembles").await.ok(200);
    assert_eq!(listed["items"].as_array().unwrap().len(), 3);

    // An ensemble that was asked to stop is not reused.
    app.post_empty(&url(&ensemble, "cancel")).await.ok(200);
    app.post_empty(&url(&forced, "cancel")).await.ok(200);
    let anew = post(&app, &request).await.ok(202);
    assert_ne!(anew["id"], ensemble["id"]);

    let worker = Worker::start(&app, &FakeComposer::default());
    until_state(&app, &anew, "succeeded").await;
    let found = post(&app, &request).await;
    assert_eq!(found.header("retry-after"), "");
    assert_eq!(found.ok(200)["id"], anew["id"]);
    // An ensemble whose prompt is deleted is not reused either.
    worker.stop().await;
    let prompt = Request::delete("/v1/prompts/pets-composed").header(header::IF_MATCH, "*");
    let deleted = app.send(prompt.body(Body::empty()).unwrap()).await;
    assert_eq!(deleted.status, 204, "{deleted:?}");
    assert_ne!(post(&app, &request).await.ok(202)["id"], anew["id"]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_failed_or_was_cancelled_is_tried_again_when_asked(pool: PgPool) {
    let app = furnished(pool).await;
    let failing = post(&app, &request()).await.ok(202);
    let retry = url(&failing, "retry");
    app.post_empty(&retry)
        .await
        .problem(409, "ensemble_not_over");
    let fake = FakeComposer::playing([Script::Refuse]);
    let worker = Worker::start(&app, &fake);
    let failed = app.get(&format!("{}?wait=60", url(&failing, "self"))).await;
    assert_eq!(failed.ok(200)["state"], "failed");
    let waiting = app.post_empty(&retry).await.ok(202);
    assert_eq!(waiting["max_attempts"], 6);
    let done = until_state(&app, &failing, "succeeded").await;
    assert_eq!(
        (&done["attempt"], &done["error"]),
        (&json!(2), &Value::Null)
    );
    app.post_empty(&retry).await.problem(409, "ensemble_over");
    worker.stop().await;

    let mut other = request();
    other["target"]["seed"] = json!(1);
    let cancelled = post(&app, &other).await.ok(202);
    app.post_empty(&url(&cancelled, "cancel")).await.ok(200);
    let waiting = app.post_empty(&url(&cancelled, "retry")).await.ok(202);
    assert_eq!(waiting["cancel_requested"], false);
    assert_eq!(waiting["finished_at"], Value::Null);
    let kinds = events(&{
        app.post_empty(&url(&cancelled, "cancel")).await.ok(200);
        stream(&app, &cancelled, None).await
    });
    let kinds: Vec<_> = kinds.iter().map(|(_, kind)| kind.as_str()).collect();
    assert_eq!(
        kinds,
        ["queued", "cancelled", "retry_requested", "cancelled"]
    );
    let nobody = "/v1/ensembles/01890a5d-ac96-774b-bcce-b302099a8057/retry";
    app.post_empty(nobody)
        .await
        .problem(404, "ensemble_not_found");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_replay_says_how_much_the_weights_differ(pool: PgPool) {
    let app = furnished(pool).await;
    let ensemble = post(&app, &request()).await.ok(202);
    let worker = Worker::start(&app, &FakeComposer::default());
    let ensemble = until_state(&app, &ensemble, "succeeded").await;
    let again = app.post_empty(&url(&ensemble, "replay")).await.ok(202);
    assert_ne!(again["id"], ensemble["id"]);
    assert_eq!(again["spec_digest"], ensemble["spec_digest"]);
    assert_eq!(again["replay"]["original_id"], ensemble["id"]);
    let done = until_state(&app, &again, "succeeded").await;
    assert_eq!(done["replay"]["max_weight_difference"], 0.0);
    let result = app.get(&url(&again, "result")).await.ok(200);
    // A replay publishes under its own name, so no production prompt gets a version.
    assert_ne!(result["composed_prompt"]["prompt"], "pets-composed");
    // A solved ensemble can be replayed too.
    let solved = app.post_empty(&url(&ensemble, "solve")).await.ok(202);
    let solved = until_state(&app, &solved, "succeeded").await;
    let again = app.post_empty(&url(&solved, "replay")).await.ok(202);
    let done = until_state(&app, &again, "succeeded").await;
    assert_eq!(done["replay"]["max_weight_difference"], 0.0);
    worker.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_full_queue_refuses_and_a_dry_run_queues_nothing(pool: PgPool) {
    let mut app = furnished(pool).await;
    app.set(|settings| settings.max_queued = 1);
    let asked = app.post("/v1/ensembles/validate", &request()).await.ok(200);
    assert_eq!(asked["same_as"], Value::Null);
    let cost = json!({"images": 3, "sources": 2, "image_passes": 6, "seconds": null, "queued": 0});
    assert_eq!(asked["cost"], cost);
    let ensemble = post(&app, &request()).await.ok(202);
    assert_eq!(asked["spec_digest"], ensemble["spec_digest"]);
    assert_eq!(asked["spec"], ensemble["spec"]);

    let mut other = request();
    other["target"]["seed"] = json!(1);
    let full = post(&app, &other).await;
    full.problem(429, "queue_full");
    assert_eq!(full.header("retry-after"), "10");
    // A request that is answered by a waiting job needs no place in the queue.
    post(&app, &request()).await.ok(202);

    let worker = Worker::start(&app, &FakeComposer::default());
    until_state(&app, &ensemble, "succeeded").await;
    let asked = app.post("/v1/ensembles/validate", &request()).await.ok(200);
    assert_eq!(asked["same_as"], ensemble["id"]);
    assert_eq!(asked["cost"]["queued"], 0);
    assert!(asked["cost"]["seconds"].as_f64().unwrap() > 0.0, "{asked}");
    other["sources"] = json!([]);
    let refused = app.post("/v1/ensembles/validate", &other).await;
    refused.problem(422, "no_sources");
    worker.stop().await;
}

//! `/v1/webhooks`: which receivers are sent which events, and that a message is written together with its event, or not
//! at all.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request, header};
use promptweave::db::MIGRATOR;
use promptweave::jobs::queue;
use promptweave::jobs::queue::{Claimed, QueueError};
use promptweave::jobs::requests;
use promptweave::registry::{DEFAULT_PROJECT, projects};
use promptweave_domain::api_key::Scope;
use promptweave_domain::job::JobError;
use promptweave_domain::webhook::EventType;
use promptweave_domain::words::JobErrorCode;
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};

use crate::app::{TestApp, TestResponse};
use crate::fixtures::{enqueue, spec, worker};
use crate::remote::network;

/// An app that may send webhooks to loopback.
pub fn opened(pool: PgPool) -> TestApp {
    TestApp::with_settings(pool, |settings| {
        settings.network = network(&["127.0.0.0/8"]);
    })
}

pub async fn register(app: &TestApp, url: &str) -> Value {
    app.post("/v1/webhooks", &json!({"url": url})).await.ok(201)
}

/// A path below a webhook.
pub fn below(webhook: &Value, rest: &str) -> String {
    format!("/v1/webhooks/{}{rest}", webhook["id"].as_str().unwrap())
}

pub async fn patch(app: &TestApp, webhook: &Value, change: &Value) -> TestResponse {
    let request = Request::patch(below(webhook, ""))
        .header(header::CONTENT_TYPE, "application/merge-patch+json");
    app.send(request.body(Body::from(change.to_string())).unwrap())
        .await
}

pub async fn deliveries(app: &TestApp, webhook: &Value) -> Vec<Value> {
    let page = app.get(&below(webhook, "/deliveries")).await.ok(200);
    page["items"].as_array().unwrap().clone()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_webhook_is_registered_changed_and_deleted(pool: PgPool) {
    let app = TestApp::new(pool);
    let made = app
        .post(
            "/v1/webhooks",
            &json!({"url": "https://Receiver.example/hook?key=1", "event_types": ["ensemble.failed"]}),
        )
        .await;
    let webhook = made.ok(201);
    assert_eq!(made.header("location"), below(&webhook, ""));
    assert_eq!(made.header("cache-control"), "no-store");
    assert_eq!(webhook["url"], "https://receiver.example/hook?key=1");
    let secret = webhook["secret"].as_str().unwrap();
    assert!(
        secret.starts_with("whsec_") && secret.len() == 50,
        "{secret}"
    );

    let other =
        json!({"url": "http://8.8.8.8/", "secret": "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"});
    let second = app.post("/v1/webhooks", &other).await.ok(201);
    assert_eq!(second["secret"], other["secret"]);
    let all: Vec<_> = EventType::ALL.iter().map(|event| event.name()).collect();
    assert_eq!(second["event_types"], json!(all));

    let page = app.get("/v1/webhooks?page_size=1").await.ok(200);
    assert_eq!(page["items"][0]["id"], second["id"]);
    let token = page["next_page_token"].as_str().unwrap();
    let page = app.get(&format!("/v1/webhooks?page_token={token}")).await;
    let seen = app.get(&below(&webhook, "")).await.ok(200);
    assert_eq!(page.ok(200)["items"], json!([seen]));
    assert_eq!(seen["secret"], Value::Null);

    let change = json!({"description": "nightly", "disabled": true});
    let changed = patch(&app, &webhook, &change).await.ok(200);
    assert_eq!(changed["description"], "nightly");
    assert_eq!(changed["event_types"], json!(["ensemble.failed"]));
    assert!(changed["disabled_at"].is_string());
    let test = below(&webhook, "/test");
    app.post_empty(&test).await.problem(409, "webhook_disabled");
    let changed = patch(&app, &webhook, &json!({"disabled": false})).await;
    assert_eq!(changed.ok(200)["disabled_at"], Value::Null);

    let queued = app.post_empty(&test).await;
    let delivery = queued.ok(202);
    assert_eq!(delivery["event_type"], "webhook.test");
    assert_eq!(app.get(queued.header("location")).await.ok(200), delivery);
    let delete = || Request::delete(below(&webhook, "")).body(Body::empty());
    assert_eq!(app.send(delete().unwrap()).await.status, 204);
    let again = app.send(delete().unwrap()).await;
    again.problem(404, "webhook_not_found");
    let gone = app.get(queued.header("location")).await;
    gone.problem(404, "webhook_not_found");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_can_never_be_delivered_is_refused_with_its_place(pool: PgPool) {
    let app = TestApp::with_settings(pool, |settings| {
        settings.network = network(&["10.1.0.0/16", "hooks.test:9000"]);
    });
    let url = |url: &str| json!({"url": url});
    let mut refused = vec![];
    for literal in [
        "http://127.0.0.1/",
        "http://2130706433/",
        "https://[::1]:8443/",
        "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.2.0.1/",
        "http://0/",
    ] {
        refused.push((url(literal), "address_not_public", "/url"));
    }
    for wrong in [
        "ftp://8.8.8.8/",
        "file:///etc/passwd",
        "8.8.8.8",
        "https://me:hunter2@8.8.8.8/",
    ] {
        refused.push((url(wrong), "invalid_body", "/url"));
    }
    let with = |key: &str, value: Value| json!({"url": "https://8.8.8.8/", key: value});
    let secret = with("secret", json!("whsec_c2hvcnQ="));
    refused.extend([
        (secret, "invalid_body", "/secret"),
        (
            with("event_types", json!([])),
            "invalid_body",
            "/event_types",
        ),
        (
            with("event_types", json!(["webhook.test"])),
            "invalid_body",
            "/event_types/0",
        ),
        (
            with("description", json!("x".repeat(513))),
            "invalid_body",
            "/description",
        ),
    ]);
    let good = register(&app, "http://10.1.2.3:81/").await;
    for (body, code, pointer) in refused {
        let answer = app.post("/v1/webhooks", &body).await;
        let problem = answer.problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{body} {problem}");
        assert!(!problem.to_string().contains("hunter2"), "{problem}");
        if pointer != "/secret" {
            patch(&app, &good, &body).await.problem(422, code);
        }
    }
    patch(&app, &good, &json!({"url": null}))
        .await
        .problem(422, "invalid_body");
    assert_eq!(
        app.get(&below(&good, "")).await.ok(200)["url"],
        "http://10.1.2.3:81/"
    );
    // This address is opened, or it is a name, which is looked up when a message is sent.
    register(&app, "http://hooks.test:9000/").await;
    register(&app, "http://localhost/").await;

    for _ in 3..100 {
        register(&app, "https://8.8.8.8/").await;
    }
    let full = app.post("/v1/webhooks", &url("https://8.8.8.8/")).await;
    full.problem(409, "too_many_webhooks");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_project_neither_sees_nor_is_told_of_anothers(pool: PgPool) {
    let app = TestApp::new(pool);
    let mut db = app.state.pool.acquire().await.unwrap();
    let other = projects::create(&mut db, &"other".parse().unwrap())
        .await
        .unwrap();
    let key = format!("Bearer {}", app.make_key(other.id, &Scope::ALL).await);
    let ask = async |method: Method, path: &str, body: Value| {
        let request = Request::builder().method(method).uri(path);
        let request = request
            .header(header::AUTHORIZATION, &key)
            .header(header::CONTENT_TYPE, "application/json");
        app.send(request.body(Body::from(body.to_string())).unwrap())
            .await
    };
    let mine = register(&app, "https://8.8.8.8/").await;
    let delivery = app.post_empty(&below(&mine, "/test")).await.ok(202);
    let delivery = delivery["id"].as_str().unwrap();
    for (method, rest) in [
        (Method::GET, String::new()),
        (Method::PATCH, String::new()),
        (Method::DELETE, String::new()),
        (Method::POST, "/test".to_owned()),
        (Method::GET, "/deliveries".to_owned()),
        (Method::GET, format!("/deliveries/{delivery}")),
        (Method::POST, format!("/deliveries/{delivery}/redeliver")),
    ] {
        let answer = ask(method, &below(&mine, &rest), json!({})).await;
        answer.problem(404, "webhook_not_found");
    }
    assert_eq!(
        ask(Method::GET, "/v1/webhooks", json!({})).await.ok(200)["items"],
        json!([])
    );
    let theirs = ask(
        Method::POST,
        "/v1/webhooks",
        json!({"url": "https://8.8.8.8/"}),
    )
    .await
    .ok(201);
    // Another webhook's delivery is not found below one's own.
    let path = below(&theirs, &format!("/deliveries/{delivery}/redeliver"));
    ask(Method::POST, &path, json!({}))
        .await
        .problem(404, "delivery_not_found");

    let spec = spec(&mut db).await;
    let id = enqueue(&mut db, &spec).await;
    requests::cancel(&mut db, DEFAULT_PROJECT, id)
        .await
        .unwrap();
    assert_eq!(deliveries(&app, &mine).await.len(), 2);
    let path = below(&theirs, "/deliveries");
    assert_eq!(
        ask(Method::GET, &path, json!({})).await.ok(200)["items"],
        json!([])
    );
}

// ---- The outbox ----------------------------------------------------------------------------

async fn claim(db: &mut PgConnection) -> Claimed {
    let id = worker(db).await;
    queue::claim(db, id, Duration::from_secs(30))
        .await
        .unwrap()
        .expect("a job waits")
}

async fn sql(db: &mut PgConnection, statement: &'static str) {
    sqlx::query(statement).execute(db).await.unwrap();
}

/// Types of a webhook's messages, in order.
async fn told(app: &TestApp, webhook: &Value) -> Vec<Value> {
    let mut told = deliveries(app, webhook).await;
    told.reverse();
    told.iter().map(|it| it["event_type"].clone()).collect()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn every_end_writes_one_message_and_nothing_else_does(pool: PgPool) {
    let app = TestApp::new(pool);
    let mut db = app.state.pool.acquire().await.unwrap();
    let all = register(&app, "https://8.8.8.8/").await;
    let failures = json!({"url": "https://8.8.4.4/", "event_types": ["ensemble.failed"]});
    let failures = app.post("/v1/webhooks", &failures).await.ok(201);
    let off = register(&app, "https://1.1.1.1/").await;
    patch(&app, &off, &json!({"disabled": true})).await.ok(200);
    let spec = spec(&mut db).await;
    let error = || JobError::new(JobErrorCode::NotFinite, "sample 3 has NaN");

    // A pause, a loss and a transient error are not ends.
    let id = enqueue(&mut db, &spec).await;
    let released = claim(&mut db).await;
    queue::release(&mut db, released.lease).await.unwrap();
    let retried = claim(&mut db).await;
    let pause = Some(Duration::ZERO);
    queue::fail(&mut db, retried.lease, error(), pause)
        .await
        .unwrap();
    let lost = claim(&mut db).await;
    sql(
        &mut db,
        "UPDATE job SET lease_until = now() - interval '1 s'",
    )
    .await;
    queue::reap(&mut db).await.unwrap();
    assert!(told(&app, &all).await.is_empty());
    // A worker that lost the job cannot report its end.
    let late = queue::fail(&mut db, lost.lease, error(), None).await;
    assert!(matches!(late, Err(QueueError::LeaseLost(_))), "{late:?}");
    assert!(told(&app, &all).await.is_empty());

    let claimed = claim(&mut db).await;
    queue::fail(&mut db, claimed.lease, error(), None)
        .await
        .unwrap();
    let mut expected = vec![json!("ensemble.failed")];
    assert_eq!(told(&app, &all).await, expected);
    assert_eq!(told(&app, &failures).await, expected);
    let payload = &deliveries(&app, &failures).await[0]["payload"];
    assert_eq!(payload["type"], "ensemble.failed");
    assert_eq!(payload["timestamp"], payload["data"]["finished_at"]);
    let data = &payload["data"];
    assert_eq!(
        (&data["id"], &data["state"]),
        (&json!(id), &json!("failed"))
    );
    assert_eq!(data["error"]["code"], "not_finite");
    assert_eq!(data["urls"]["self"], format!("/v1/ensembles/{id}"));

    // The job is retried, and ends again, which is another event.
    requests::retry(&mut db, DEFAULT_PROJECT, id).await.unwrap();
    requests::cancel(&mut db, DEFAULT_PROJECT, id)
        .await
        .unwrap();
    expected.push(json!("ensemble.cancelled"));
    // The end of a cancelled job is reported by its worker, or by the reaper if its worker is gone.
    for noticed in [true, false] {
        let id = enqueue(&mut db, &spec).await;
        let claimed = claim(&mut db).await;
        requests::cancel(&mut db, DEFAULT_PROJECT, id)
            .await
            .unwrap();
        assert_eq!(told(&app, &all).await, expected);
        if noticed {
            queue::finish_cancelled(&mut db, claimed.lease)
                .await
                .unwrap();
        } else {
            sql(
                &mut db,
                "UPDATE job SET lease_until = now() - interval '1 s' WHERE state = 'running'",
            )
            .await;
            queue::reap(&mut db).await.unwrap();
        }
        expected.push(json!("ensemble.cancelled"));
        // A second request to cancel changes nothing.
        requests::cancel(&mut db, DEFAULT_PROJECT, id)
            .await
            .unwrap();
        assert_eq!(told(&app, &all).await, expected);
    }
    assert_eq!(told(&app, &failures).await.len(), 1);
    assert!(told(&app, &off).await.is_empty());
}

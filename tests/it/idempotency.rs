//! `Idempotency-Key`: one effect and one answer, however often and by whichever client a request is sent.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use futures::future::join_all;
use promptweave::db::MIGRATOR;
use promptweave::registry::idempotency;
use promptweave::registry::idempotency::Claimed;
use promptweave::registry::{DEFAULT_PROJECT, projects};
use promptweave_domain::api_key::Scope;
use serde_json::json;
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse, prompt_file};
use crate::ensembles::{furnished, request};

fn keyed(path: &str, key: &str, kind: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path)
        .header("idempotency-key", key)
        .header(header::CONTENT_TYPE, kind)
        .body(body.into())
        .unwrap()
}

async fn post(app: &TestApp, path: &str, key: &str, body: &serde_json::Value) -> TestResponse {
    let request = keyed(path, key, "application/json", body.to_string());
    app.send(request).await
}

async fn count(app: &TestApp, table: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM {table}");
    sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
        .fetch_one(&app.state.pool)
        .await
        .unwrap()
}

/// Sends a request again until no other one is at work under the key.
async fn patiently(send: impl AsyncFn() -> TestResponse) -> TestResponse {
    let answered = async {
        loop {
            let answer = send().await;
            if answer.status != 409 {
                return answer;
            }
            answer.problem(409, "idempotency_key_in_flight");
            assert_eq!(answer.header("retry-after"), "1");
            tokio::task::yield_now().await;
        }
    };
    let answer = tokio::time::timeout(Duration::from_secs(20), answered).await;
    answer.expect("an answer")
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn fifty_at_once_are_one_ensemble_and_one_answer(pool: PgPool) {
    let app = furnished(pool).await;
    let body = request();
    let send = || post(&app, "/v1/ensembles", "one-of-fifty", &body);
    let answers = join_all((0..50).map(|_| patiently(send))).await;
    let first = answers[0].ok(202);
    for answer in &answers {
        assert_eq!(answer.ok(202), first);
        assert_eq!(answer.header("location"), answers[0].header("location"));
        assert_eq!(answer.header("retry-after"), "1");
    }
    let replayed = |answer: &&TestResponse| answer.header("idempotency-replayed") == "true";
    assert_eq!(answers.iter().filter(replayed).count(), 49);
    assert_eq!(count(&app, "job").await, 1);
    // Actions are covered too, although they have no body.
    let cancel = format!("{}/cancel", answers[0].header("location"));
    let send = || app.send(keyed(&cancel, "stop", "application/json", "{}"));
    let cancelled = send().await.ok(200);
    assert_eq!(send().await.ok(200), cancelled);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_key_is_for_one_request(pool: PgPool) {
    let app = TestApp::new(pool);
    let path = "/v1/prompts";
    let first = post(&app, path, "k", &json!({"name": "dtd"})).await;
    first.ok(201);
    assert_eq!(first.header("idempotency-replayed"), "");
    let again = post(&app, path, "k", &json!({"name": "dtd"})).await;
    assert_eq!(again.ok(201), first.json());
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.header("content-type"), "application/json");
    for other in [json!({"name": "dtf"}), json!({"name": "dtd", "tags": {}})] {
        let answer = post(&app, path, "k", &other).await;
        answer.problem(422, "idempotency_key_reused");
    }
    let elsewhere = "/v1/prompts/dtd/versions/1/deprecate";
    let answer = post(&app, elsewhere, "k", &json!({"name": "dtd"})).await;
    answer.problem(422, "idempotency_key_reused");

    // A file is compared as a body, and so is the query.
    let upload = |query: &str, seed| {
        let path = format!("/v1/prompts/dtd/versions{query}");
        let kind = "application/octet-stream";
        app.send(keyed(&path, "file", kind, prompt_file(seed).to_bytes()))
    };
    let version = upload("", 1).await;
    version.ok(201);
    let again = upload("", 1).await;
    assert_eq!(again.ok(201), version.json());
    assert_eq!(again.header("etag"), version.header("etag"));
    upload("", 2).await.problem(422, "idempotency_key_reused");
    let answer = upload("?task=digits", 1).await;
    answer.problem(422, "idempotency_key_reused");
    assert_eq!(count(&app, "prompt_version").await, 1);

    for unfit in ["", "two words", &"x".repeat(256)] {
        let answer = post(&app, path, unfit, &json!({"name": "dtd"})).await;
        answer.problem(400, "invalid_idempotency_key");
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_error_is_not_kept(pool: PgPool) {
    let app = TestApp::new(pool);
    let path = "/v1/prompts/dtd/versions";
    let kind = "application/octet-stream";
    let upload = || app.send(keyed(path, "k", kind, prompt_file(1).to_bytes()));
    upload().await.problem(404, "prompt_not_found");
    assert_eq!(count(&app, "idempotency").await, 0);
    app.post("/v1/prompts", &json!({"name": "dtd"}))
        .await
        .ok(201);
    upload().await.ok(201);
    assert_eq!(count(&app, "idempotency").await, 1);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_project_has_its_own_keys(pool: PgPool) {
    let app = TestApp::new(pool);
    let body = json!({"name": "dtd"});
    post(&app, "/v1/prompts", "k", &body).await.ok(201);
    let mut conn = app.state.pool.acquire().await.unwrap();
    let other = projects::create(&mut conn, &"other".parse().unwrap()).await;
    let key = app.make_key(other.unwrap().id, &Scope::ALL).await;
    let mut request = keyed("/v1/prompts", "k", "application/json", body.to_string());
    let value = format!("Bearer {key}").parse().unwrap();
    request.headers_mut().insert(header::AUTHORIZATION, value);
    let answer = app.send(request).await;
    answer.ok(201);
    assert_eq!(answer.header("idempotency-replayed"), "");
    assert_eq!(count(&app, "prompt").await, 2);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn the_work_ends_and_is_kept_when_its_client_has_gone(pool: PgPool) {
    let app = TestApp::new(pool);
    let body = json!({"name": "dtd"});
    let send = || post(&app, "/v1/prompts", "k", &body);
    app.get("/v1/prompts").await.ok(200);
    // A lock on the table makes the request wait in the middle of its work.
    let mut lock = app.state.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE prompt")
        .execute(&mut *lock)
        .await
        .unwrap();
    tokio::select! {
        biased;
        answer = send() => panic!("not yet: {answer:?}"),
        () = async {
            while count(&app, "idempotency").await == 0 {
                tokio::task::yield_now().await;
            }
        } => {}
    }
    // The first request's connection is gone, but it is still at work.
    send().await.problem(409, "idempotency_key_in_flight");
    lock.rollback().await.unwrap();
    let answer = patiently(send).await;
    answer.ok(201);
    assert_eq!(answer.header("idempotency-replayed"), "true");
    assert_eq!(count(&app, "prompt").await, 1);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_claim_whose_server_died_runs_out_and_an_answer_after_a_day(pool: PgPool) {
    let app = TestApp::new(pool);
    let mut conn = app.state.pool.acquire().await.unwrap();
    let body = json!({"name": "dtd"});
    let send = || post(&app, "/v1/prompts", "k", &body);
    let Claimed::First(dead) = idempotency::claim(&mut conn, DEFAULT_PROJECT, "k")
        .await
        .unwrap()
    else {
        panic!("nobody else asked");
    };
    send().await.problem(409, "idempotency_key_in_flight");
    let age = "UPDATE idempotency SET lease_until = now() - interval '1 second'";
    sqlx::query(age).execute(&mut *conn).await.unwrap();
    assert!(dead.renew(&mut conn).await.unwrap());
    send().await.problem(409, "idempotency_key_in_flight");
    sqlx::query(age).execute(&mut *conn).await.unwrap();
    send().await.ok(201);
    // If it should wake up, it changes nothing.
    assert!(!dead.renew(&mut conn).await.unwrap());
    dead.release(&mut conn).await.unwrap();
    assert_eq!(send().await.header("idempotency-replayed"), "true");

    assert_eq!(idempotency::reap(&mut conn).await.unwrap(), 0);
    let age = "UPDATE idempotency SET expires_at = now() - interval '1 second'";
    sqlx::query(age).execute(&mut *conn).await.unwrap();
    send().await.problem(409, "name_taken");
    post(&app, "/v1/prompts", "other", &json!({"name": "dtf"}))
        .await
        .ok(201);
    sqlx::query(age).execute(&mut *conn).await.unwrap();
    assert_eq!(idempotency::reap(&mut conn).await.unwrap(), 1);
    assert_eq!(count(&app, "idempotency").await, 0);
}

//! A worker's life in `/v1/workers`: registered, tested, drained, ended, and why.

use std::future::Future;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use promptweave::db::MIGRATOR;
use promptweave::jobs::workers;
use promptweave::jobs::workers::{End, NewWorker};
use promptweave::registry::projects;
use promptweave::shutdown::Shutdown;
use promptweave::worker::{SEEN_EVERY, WorkerError, WorkerSettings, run};
use promptweave_domain::api_key::Scope;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::app::TestApp;
use crate::ensembles::{Worker, furnished, post, request, until_state, url};
use crate::fixtures::{FakeComposer, Script};

type Ended = Result<(), WorkerError>;

/// Starts a worker, which may test its device all the time.
fn start(app: &TestApp, fake: &FakeComposer, seen_every: Duration) -> JoinHandle<Ended> {
    let settings = WorkerSettings {
        id: Uuid::now_v7(),
        device: "auto".to_owned(),
        seen_every,
        lease: Duration::from_secs(30),
        stall: Duration::from_secs(600),
        cache_dir: app.dir.path().join("cache"),
        min_shard_pairs: 0,
        cache_bytes: 1 << 30,
    };
    let (pool, blobs) = (app.state.pool.clone(), app.state.blobs.clone());
    tokio::spawn(run(
        settings,
        pool,
        blobs,
        fake.factory(),
        Shutdown::default(),
    ))
}

/// Waits for something, for much longer than anything here takes.
async fn within<T>(what: &str, patience: impl Future<Output = T>) -> T {
    let outcome = tokio::time::timeout(Duration::from_secs(60), patience).await;
    outcome.unwrap_or_else(|_| panic!("{what}"))
}

/// Waits until the newest worker is as expected.
async fn until(app: &TestApp, what: &str, mut is: impl FnMut(&Value) -> bool) -> Value {
    let patience = async {
        loop {
            let worker = newest(app).await;
            if is(&worker) {
                return worker;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(what, patience).await
}

async fn newest(app: &TestApp) -> Value {
    app.get("/v1/workers").await.ok(200)["items"][0].clone()
}

fn drain(worker: &Value) -> String {
    format!("/v1/workers/{}/drain", worker["id"].as_str().unwrap())
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_worker_registers_with_what_it_computes_with(pool: PgPool) {
    let app = furnished(pool).await;
    let worker = Worker::start(&app, &FakeComposer::default());
    let listed = until(&app, "the worker", Value::is_object).await;
    for (field, value) in [
        ("device", json!("fake")),
        ("driver", json!("580.65.06")),
        ("memory_bytes", json!(80_u64 << 30)),
        ("libtorch", Value::Null),
        ("version", json!(env!("CARGO_PKG_VERSION"))),
        ("pid", json!(std::process::id())),
        ("state", json!("idle")),
        ("reason", Value::Null),
        ("live", json!(true)),
    ] {
        assert_eq!(listed[field], value, "{field}");
    }
    worker.stop().await;
    let listed = newest(&app).await;
    assert_eq!(
        (&listed["state"], &listed["reason"], &listed["live"]),
        (&json!("stopped"), &Value::Null, &json!(false))
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_worker_that_computes_wrongly_does_not_start_and_says_why(pool: PgPool) {
    let app = furnished(pool).await;
    let ensemble = post(&app, &request()).await.ok(202);
    let fake = FakeComposer::default();
    fake.broken.store(true, Ordering::SeqCst);
    let ended = start(&app, &fake, SEEN_EVERY).await.unwrap();
    let error = ended.unwrap_err();
    assert!(matches!(error, WorkerError::Engine(_)), "{error:?}");
    assert_eq!(error.exit_status(), 1);

    let listed = newest(&app).await;
    assert_eq!(listed["state"], "stopped");
    assert_eq!(listed["device"], "auto");
    let reason = listed["reason"].as_str().unwrap();
    assert!(reason.contains("fake computes wrongly"), "{reason}");
    app.get("/readyz/workers").await.problem(503, "no_worker");
    let waiting = app.get(&url(&ensemble, "self")).await.ok(200);
    assert_eq!(waiting["state"], "queued");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_idle_worker_tests_its_device_and_ends_when_it_fails(pool: PgPool) {
    let app = furnished(pool).await;
    let fake = FakeComposer::default();
    let worker = start(&app, &fake, Duration::from_millis(5));
    let first = until(&app, "the worker", Value::is_object).await;
    // Passing self-tests keeps it ready.
    until(&app, "a self-test", |listed| {
        listed["selftest_at"].as_str() > first["selftest_at"].as_str()
    })
    .await;
    assert!(fake.tested.load(Ordering::SeqCst) >= 2);
    app.get("/readyz/workers").await.ok(200);

    fake.broken.store(true, Ordering::SeqCst);
    let error = within("the worker's end", worker)
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, WorkerError::SelfTest(_)), "{error:?}");
    assert_eq!(error.exit_status(), 70);
    let listed = newest(&app).await;
    assert_eq!(listed["state"], "stopped");
    assert_eq!(listed["device"], "fake");
    let reason = listed["reason"].as_str().unwrap();
    assert!(reason.contains("fake computes wrongly"), "{reason}");
    app.get("/readyz/workers").await.problem(503, "no_worker");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_device_that_fails_in_a_job_ends_the_worker_and_not_the_job(pool: PgPool) {
    let app = furnished(pool).await;
    let ensemble = post(&app, &request()).await.ok(202);
    let fake = FakeComposer::playing([Script::DeviceFailed]);
    let worker = start(&app, &fake, SEEN_EVERY);
    let error = within("the worker's end", worker)
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, WorkerError::Stuck(_)), "{error:?}");
    assert_eq!(error.exit_status(), 70);
    let listed = newest(&app).await;
    assert_eq!(listed["state"], "stopped");
    let reason = listed["reason"].as_str().unwrap();
    assert!(reason.contains("device has failed"), "{reason}");

    // The attempt counts, and its lease is released.
    let waiting = app.get(&url(&ensemble, "self")).await.ok(200);
    assert_eq!(
        (&waiting["state"], &waiting["attempt"]),
        (&json!("queued"), &json!(1))
    );
    let events = app.get(&url(&ensemble, "events")).await.ok(200);
    let last = events["items"].as_array().unwrap().last().unwrap();
    assert_eq!(last["kind"], "retried");
    assert_eq!(last["data"]["error"]["code"], "device_failed", "{last}");
    sqlx::query("UPDATE job SET run_at = now() WHERE state = 'queued'")
        .execute(&app.state.pool)
        .await
        .unwrap();
    let other = Worker::start(&app, &fake);
    until_state(&app, &ensemble, "succeeded").await;
    other.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_worker_that_drains_finishes_its_job_and_takes_no_other(pool: PgPool) {
    let app = furnished(pool).await;
    let mut other = request();
    other["output"]["name"] = json!("another");
    other["objective"] = json!({"trade_off": 0.25});
    let first = post(&app, &request()).await.ok(202);
    let fake = FakeComposer::playing([Script::UntilOpened]);
    let worker = start(&app, &fake, Duration::from_millis(5));
    until_state(&app, &first, "running").await;
    let second = post(&app, &other).await.ok(202);
    let busy = until(&app, "its job", |listed| listed["state"] == "busy").await;
    app.get("/readyz/workers").await.ok(200);

    for _ in 0..2 {
        assert_eq!(app.post_empty(&drain(&busy)).await.status, 202);
    }
    // Its signs of life do not end the draining.
    let seen = busy["last_seen"].as_str().unwrap().to_owned();
    let draining = until(&app, "a sign of life", |listed| {
        listed["last_seen"].as_str() > Some(seen.as_str())
    })
    .await;
    assert_eq!(draining["state"], "draining");
    assert_eq!(draining["job_id"], first["id"]);
    // A job that is posted now waits for another worker.
    app.get("/readyz/workers").await.problem(503, "no_worker");

    fake.gate.store(true, Ordering::SeqCst);
    within("the worker's end", worker).await.unwrap().unwrap();
    let done = app.get(&url(&first, "self")).await.ok(200);
    assert_eq!(done["state"], "succeeded");
    let waiting = app.get(&url(&second, "self")).await.ok(200);
    assert_eq!(waiting["state"], "queued");
    let listed = newest(&app).await;
    assert_eq!(
        (&listed["state"], &listed["reason"]),
        (&json!("stopped"), &Value::Null)
    );
    let problem = app
        .post_empty(&drain(&listed))
        .await
        .problem(409, "worker_ended");
    assert!(problem["detail"].as_str().unwrap().contains("is stopped"));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_idle_worker_drains_at_once_and_only_for_the_operator(pool: PgPool) {
    let app = furnished(pool).await;
    let worker = start(&app, &FakeComposer::default(), SEEN_EVERY);
    let idle = until(&app, "the worker", Value::is_object).await;

    let mut conn = app.state.pool.acquire().await.unwrap();
    let project = projects::create(&mut conn, &"other".parse().unwrap())
        .await
        .unwrap();
    drop(conn);
    let key = app.make_key(project.id, &Scope::ALL).await;
    let foreign = Request::post(drain(&idle))
        .header(header::AUTHORIZATION, format!("Bearer {key}"))
        .body(Body::empty())
        .unwrap();
    app.send(foreign)
        .await
        .problem(403, "not_the_default_project");
    app.post_empty(&format!("/v1/workers/{}/drain", Uuid::nil()))
        .await
        .problem(404, "worker_not_found");
    assert_eq!(newest(&app).await["state"], "idle");

    assert_eq!(app.post_empty(&drain(&idle)).await.status, 202);
    within("the worker's end", worker).await.unwrap().unwrap();
    assert_eq!(newest(&app).await["state"], "stopped");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_defunct_worker_stays_so_until_one_registers_in_its_place(pool: PgPool) {
    let mut db = pool.acquire().await.unwrap();
    let new = NewWorker {
        id: Uuid::now_v7(),
        host: "here",
        pid: 7,
        device: "cuda:0",
        ..NewWorker::default()
    };
    let end = |defunct, reason, unless_said| End {
        defunct,
        reason,
        unless_said,
    };
    for (end, state, reason) in [
        (end(false, "no driver", false), "stopped", "no driver"),
        // A reason that the worker stored itself stays, unless it had no time to store one.
        (end(false, "status 1", true), "stopped", "no driver"),
        (end(true, "signal 9", false), "defunct", "signal 9"),
        // These are what a worker that fails again says of itself.
        (end(false, "still none", false), "defunct", "still none"),
    ] {
        workers::ended(&mut db, &new, end).await.unwrap();
        let listed = workers::list(&mut db).await.unwrap();
        assert_eq!(listed.len(), 1);
        let told = (listed[0].state.as_str(), listed[0].reason.as_deref());
        assert_eq!(told, (state, Some(reason)));
        assert!(!listed[0].live);
    }
    assert!(!workers::any_ready(&mut db).await.unwrap());
    assert_eq!(
        workers::drain(&mut db, new.id).await.unwrap(),
        Some(workers::Drain::Ended("defunct".to_owned()))
    );
    workers::register(&mut db, &new).await.unwrap();
    let listed = workers::list(&mut db).await.unwrap();
    assert_eq!(
        (listed[0].state.as_str(), &listed[0].reason),
        ("idle", &None)
    );
    assert!(listed[0].live && workers::any_ready(&mut db).await.unwrap());
}

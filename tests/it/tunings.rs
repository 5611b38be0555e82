//! `/v1/tunings`: refused requests, and a tuning from POST to a published prompt, killed in between.

use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use promptweave::db::MIGRATOR;
use promptweave::gc::{Retention, collect};
use promptweave::jobs::queue;
use promptweave::registry::projects;
use promptweave_domain::api_key::Scope;
use promptweave_domain::tensor::Tensor;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::app::{TestApp, TestResponse, WIDTH, png, tiny_backbone, write_files};
use crate::ensembles::{Worker, fitting, furnished, until_state, upload, url};
use crate::fixtures::{FakeComposer, Script};
use crate::gc::age;
use crate::webhooks::{deliveries, register};
use crate::worker::until;

fn request() -> Value {
    json!({
        "target": {"dataset": "pets"},
        "backbone": "tiny",
        "options": {"epochs": 2},
        "output": {"name": "pets-tuned"},
    })
}

fn with(pointer: &str, value: Value) -> Value {
    let mut request = request();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    request.pointer_mut(parent).unwrap()[name] = value;
    request
}

async fn post(app: &TestApp, request: &Value) -> TestResponse {
    app.post("/v1/tunings", request).await
}

async fn events(app: &TestApp, tuning: &Value) -> Vec<Value> {
    let page = app.get(&url(tuning, "events")).await.ok(200);
    page["items"].as_array().unwrap().clone()
}

/// The data of the `epoch` events.
async fn epochs(app: &TestApp, tuning: &Value) -> Vec<Value> {
    let events = events(app, tuning).await.into_iter();
    let epochs = events.filter(|event| event["kind"] == "epoch");
    epochs.map(|event| event["data"].clone()).collect()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_tuning_publishes_a_prompt_with_its_start_as_lineage_and_tells_of_every_epoch(
    pool: PgPool,
) {
    let app = furnished(pool).await;
    let request = with("/start", json!({"prompt": "digits"}));
    let answer = post(&app, &request).await;
    let tuning = answer.ok(202);
    assert_eq!(answer.header("location"), url(&tuning, "self"));
    assert_eq!(tuning["state"], "queued");
    // These are the start's, whatever the request says.
    assert_eq!(tuning["spec"]["options"]["num_tokens"], 2);
    assert_eq!(tuning["spec"]["start"]["prompt"], "digits");
    let unfinished = app.get(&url(&tuning, "result")).await;
    unfinished.problem(409, "tuning_not_finished");

    let worker = Worker::start(&app, &FakeComposer::default());
    let done = until_state(&app, &tuning, "succeeded").await;
    worker.stop().await;
    let curve = [
        json!({"epoch": 1, "cross_entropy": 1.0}),
        json!({"epoch": 2, "cross_entropy": 0.5}),
    ];
    assert_eq!(epochs(&app, &tuning).await, curve);
    let result = app.get(&url(&tuning, "result")).await.ok(200);
    assert_eq!(result["curves"]["cross_entropy"], json!([1.0, 0.5]));
    assert_eq!(result["tuned"]["prompt"], "pets-tuned");
    assert_eq!(result["tuned"]["version"], 1);

    let version = app.get("/v1/prompts/pets-tuned/versions/1").await.ok(200);
    assert_eq!(version["origin"], "tuned");
    assert_eq!(version["produced_by_job"], tuning["id"]);
    assert_eq!(version["digest"], result["tuned"]["digest"]);
    assert_eq!(app.get(&url(&done, "tuned")).await.status.as_u16(), 200);
    let prompt = app.get("/v1/prompts/pets-tuned").await.ok(200);
    let description = prompt["description"].as_str().unwrap();
    assert!(
        description.starts_with("tuned on pets:1 by tuning") && description.ends_with("digits:1"),
        "{description}"
    );
    let lineage = app
        .get("/v1/prompts/pets-tuned/versions/1/lineage")
        .await
        .ok(200);
    let edge =
        json!({"child": "pets-tuned:1", "parent": "digits:1", "weight": 1.0, "role": "start"});
    assert_eq!(lineage["edges"], json!([edge]));
    assert_eq!(lineage["nodes"][0]["produced_by"]["tuning"], tuning["id"]);
    assert_eq!(lineage["nodes"][0]["produced_by"].get("ensemble"), None);
    // The start cannot be deleted while the tuning needs it.
    let delete = Request::delete("/v1/prompts/digits").header(header::IF_MATCH, "*");
    let kept = app.send(delete.body(Body::empty()).unwrap()).await;
    let problem = kept.problem(409, "prompt_in_use");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("was tuned from it"), "{detail}");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn whoever_asked_is_told_of_a_tunings_end_with_its_prompt(pool: PgPool) {
    let app = furnished(pool).await;
    let webhook = register(&app, "https://8.8.4.4/").await;
    let tuning = post(&app, &request()).await.ok(202);
    let worker = Worker::start(&app, &FakeComposer::default());
    until_state(&app, &tuning, "succeeded").await;
    worker.stop().await;
    let told = deliveries(&app, &webhook).await;
    assert_eq!(told.len(), 1);
    assert_eq!(told[0]["event_type"], "tuning.succeeded");
    assert_eq!(told[0]["job"], tuning["id"]);
    let data = &told[0]["payload"]["data"];
    assert_eq!(data["tuned"], json!({"prompt": "pets-tuned", "version": 1}));
    assert_eq!(data["composed_prompt"], Value::Null);
    assert_eq!(data["urls"]["self"], url(&tuning, "self"));
    assert_eq!(data["urls"]["result"], url(&tuning, "result"));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_attempt_after_a_kill_goes_on_from_the_checkpoint_on_another_worker(pool: PgPool) {
    let app = furnished(pool).await;
    let tuning = post(&app, &request()).await.ok(202);
    // The worker is lost in the second epoch.
    let fake = FakeComposer::playing([Script::UntilStopped]);
    let first = Worker::start(&app, &fake);
    until("an epoch", || async {
        epochs(&app, &tuning).await.len() == 1
    })
    .await;
    let second = Worker::start(&app, &fake);
    let id: Uuid = tuning["id"].as_str().unwrap().parse().unwrap();
    let mut db = app.state.pool.acquire().await.unwrap();
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM job_checkpoint WHERE job_id = $1")
        .bind(id)
        .fetch_one(&mut *db)
        .await
        .unwrap();
    assert_eq!(kept, 1);
    until("the lease runs out", || async {
        let mut db = app.state.pool.acquire().await.unwrap();
        sqlx::query(
            "UPDATE job SET lease_until = now() - interval '1 second' WHERE state = 'running'",
        )
        .execute(&mut *db)
        .await
        .unwrap();
        !queue::reap(&mut db).await.unwrap().is_empty()
    })
    .await;
    until_state(&app, &tuning, "succeeded").await;
    assert_eq!(*fake.epochs.lock().unwrap(), [1, 2], "none twice");
    let told = epochs(&app, &tuning).await;
    assert_eq!(told.len(), 2, "{told:?}");
    let kinds: Vec<_> = events(&app, &tuning).await;
    let lost = kinds.iter().filter(|event| event["kind"] == "lost").count();
    assert_eq!(lost, 1);
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM job_checkpoint")
        .fetch_one(&mut *db)
        .await
        .unwrap();
    assert_eq!(kept, 0, "of a job that is over");
    first.stop().await;
    second.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_checkpoint_is_garbage_when_its_tuning_is_over_and_no_sooner(pool: PgPool) {
    let app = furnished(pool).await;
    let tuning = post(&app, &request()).await.ok(202);
    let fake = FakeComposer::playing([Script::UntilOpened]);
    let worker = Worker::start(&app, &fake);
    until("an epoch", || async {
        epochs(&app, &tuning).await.len() == 1
    })
    .await;
    let retention = Retention {
        grace: Duration::from_secs(3600),
        statistics: None,
    };
    let collected = async || {
        age(&app).await;
        let collected = collect(&app.state.pool, &app.state.blobs, retention, false).await;
        collected.unwrap().files
    };
    assert_eq!(collected().await, 0);
    fake.gate.store(true, Ordering::SeqCst);
    until_state(&app, &tuning, "succeeded").await;
    assert_eq!(collected().await, 2, "one an epoch");
    worker.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_equal_tuning_is_the_one_that_is_there_until_its_prompt_is_deleted(pool: PgPool) {
    let app = furnished(pool).await;
    let tuning = post(&app, &request()).await.ok(202);
    assert_eq!(post(&app, &request()).await.ok(202)["id"], tuning["id"]);
    let other = with("/options/epochs", json!(3));
    let other = post(&app, &other).await.ok(202);
    assert_ne!(other["id"], tuning["id"]);
    let worker = Worker::start(&app, &FakeComposer::default());
    until_state(&app, &tuning, "succeeded").await;
    until_state(&app, &other, "succeeded").await;
    worker.stop().await;
    let again = post(&app, &request()).await;
    assert_eq!(again.ok(200)["id"], tuning["id"]);
    assert_eq!(again.header("location"), url(&tuning, "self"));
    let mut unnamed = request();
    unnamed["output"] = json!({});
    assert_eq!(post(&app, &unnamed).await.ok(200)["id"], tuning["id"]);
    // A deleted prompt is no answer any more.
    let delete = Request::delete("/v1/prompts/pets-tuned").header(header::IF_MATCH, "*");
    let deleted = app.send(delete.body(Body::empty()).unwrap()).await;
    assert_eq!(deleted.status.as_u16(), 204, "{deleted:?}");
    assert_ne!(post(&app, &request()).await.ok(202)["id"], tuning["id"]);
    // It is not published under the other name.
    let renamed = with("/output/name", json!("other"));
    assert_ne!(post(&app, &renamed).await.ok(202)["id"], tuning["id"]);
    let forced = with("/force", json!(true));
    assert_ne!(post(&app, &forced).await.ok(202)["id"], tuning["id"]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_tuning_is_listed_cancelled_and_tried_again_and_no_ensemble(pool: PgPool) {
    let app = furnished(pool).await;
    let tuning = post(&app, &request()).await.ok(202);
    let listed = app.get("/v1/tunings").await.ok(200);
    assert_eq!(listed["items"][0]["id"], tuning["id"]);
    assert_eq!(app.get("/v1/ensembles").await.ok(200)["items"], json!([]));
    let id = tuning["id"].as_str().unwrap();
    for (path, code) in [
        (format!("/v1/ensembles/{id}"), "ensemble_not_found"),
        (format!("/v1/ensembles/{id}/events"), "ensemble_not_found"),
        (format!("/v1/rankings/{id}"), "ranking_not_found"),
        (format!("/v1/tunings/{}", Uuid::nil()), "tuning_not_found"),
    ] {
        app.get(&path).await.problem(404, code);
    }
    let foreign = app.post_empty(&format!("/v1/ensembles/{id}/cancel")).await;
    foreign.problem(404, "ensemble_not_found");
    assert_eq!(
        app.get(&url(&tuning, "self")).await.ok(200)["state"],
        "queued"
    );

    let cancelled = app.post_empty(&url(&tuning, "cancel")).await.ok(200);
    assert_eq!(cancelled["state"], "cancelled");
    let none = app.get(&url(&tuning, "result")).await;
    none.problem(409, "tuning_cancelled");
    assert_eq!(
        app.post_empty(&url(&tuning, "retry")).await.ok(202)["state"],
        "queued"
    );

    let fake = FakeComposer::playing([Script::UntilStopped]);
    let worker = Worker::start(&app, &fake);
    until("an epoch", || async {
        epochs(&app, &tuning).await.len() == 1
    })
    .await;
    app.post_empty(&url(&tuning, "cancel")).await.ok(202);
    let over = until_state(&app, &tuning, "cancelled").await;
    assert_eq!(fake.stopped.load(Ordering::SeqCst), 1);
    app.get(&format!("{}?wait=1", url(&over, "self")))
        .await
        .ok(200);
    worker.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn another_project_sees_no_tuning_of_this_one(pool: PgPool) {
    let app = furnished(pool).await;
    let tuning = post(&app, &request()).await.ok(202);
    let mut db = app.state.pool.acquire().await.unwrap();
    let other = projects::create(&mut db, &"other".parse().unwrap())
        .await
        .unwrap();
    let key = app.make_key(other.id, &Scope::ALL).await;
    for (method, path) in [
        ("GET", url(&tuning, "self")),
        ("GET", url(&tuning, "events")),
        ("GET", url(&tuning, "result")),
        ("POST", url(&tuning, "cancel")),
        ("POST", url(&tuning, "retry")),
    ] {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("authorization", format!("Bearer {key}"))
            .body(Body::empty())
            .unwrap();
        app.send(request).await.problem(404, "tuning_not_found");
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_cannot_be_tuned_is_refused_at_the_door(pool: PgPool) {
    let app = furnished(pool).await;
    write_files(
        &app.root("cats"),
        &[("train/cat/1.png", &png(1)), ("train/cat/2.png", &png(2))],
    );
    let one_class = json!({"name": "cats", "directory": "cats"});
    app.post("/v1/datasets", &one_class).await.ok(201);
    write_files(
        &app.root("few"),
        &[("train/cat/1.png", &png(1)), ("train/dog/2.png", &png(2))],
    );
    let few = json!({"name": "few", "directory": "few"});
    app.post("/v1/datasets", &few).await.ok(201);
    tiny_backbone(&app.root("strange"), 2, 4);
    let strange = json!({"name": "strange", "directory": "strange"});
    app.post("/v1/backbones", &strange).await.ok(201);
    let mut wide = fitting(&app, 3);
    wide.prompt_embeddings = Tensor::new([2, 2 * WIDTH], vec![0.5; 4 * WIDTH]);
    wide.metadata.as_mut().unwrap().backbone_digest = None;
    upload(&app, "wide", &wide).await;
    let mut deep = fitting(&app, 4);
    deep.metadata.as_mut().unwrap().backbone_digest = None;
    deep.deep_prompt_embeddings = Some(Tensor::new([1, 2, WIDTH], vec![0.5; 2 * WIDTH]));
    upload(&app, "deep", &deep).await;

    let start = |name: &str| with("/start", json!({"prompt": name}));
    let mut of_strange = start("digits");
    of_strange["backbone"] = json!("strange");
    let mut unplaced = request();
    unplaced.as_object_mut().unwrap().remove("backbone");
    let mut held_out = with("/target/dataset", json!("few"));
    held_out["grid"] = json!({"weight_decays": [0.1, 0.2]});
    let mut biased = with("/options/patience", json!(2));
    biased["target"]["eval_split"] = json!("val");
    for (request, code, pointer) in [
        (
            with("/target/dataset", json!("none")),
            "unknown_dataset",
            "/target/dataset",
        ),
        (
            with("/target/dataset", json!("cats")),
            "one_class",
            "/target/split",
        ),
        (
            with("/target/split", json!("val")),
            "one_class",
            "/target/split",
        ),
        (
            with("/target/eval_split", json!("train")),
            "same_split",
            "/target/eval_split",
        ),
        (biased, "same_split", "/target/eval_split"),
        (held_out, "too_few_images", "/target/max_samples"),
        (
            with("/backbone", json!("none")),
            "unknown_backbone",
            "/backbone",
        ),
        (unplaced, "backbone_required", "/backbone"),
        (start("none"), "unknown_prompt", "/start/prompt"),
        (start("wide"), "width_mismatch", "/start/prompt"),
        (start("deep"), "deep_start", "/start/prompt"),
        (of_strange, "backbone_mismatch", "/start/prompt"),
        (
            with("/options/epochs", json!(0)),
            "invalid_options",
            "/options/epochs",
        ),
        (
            with("/options/warmup_epochs", json!(3)),
            "invalid_options",
            "/options/warmup_epochs",
        ),
        (
            with("/options/method", json!("full")),
            "invalid_options",
            "/options/method",
        ),
        // The backbone of these tests has one block.
        (
            with("/options/method", json!("vpt-deep")),
            "invalid_options",
            "/options/method",
        ),
        (
            with("/options/distillation_weight", json!(0.1)),
            "invalid_options",
            "/options/distillation_weight",
        ),
        (
            with("/options/prompt_learning_rate", json!(-1)),
            "invalid_options",
            "/options/prompt_learning_rate",
        ),
        (
            with("/grid", json!({"prompt_learning_rates": [0.1, -0.1]})),
            "invalid_options",
            "/grid/prompt_learning_rates",
        ),
        (
            with("/output/name", json!("compose")),
            "reserved_name",
            "/output/name",
        ),
        (
            with("/priority", json!(1001)),
            "invalid_priority",
            "/priority",
        ),
        (
            with("/options/optimizer", json!("adam")),
            "invalid_body",
            "/options/optimizer",
        ),
        (
            with("/options/epoch", json!(1)),
            "invalid_body",
            "/options/epoch",
        ),
    ] {
        let problem = post(&app, &request).await.problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    assert_eq!(app.get("/v1/tunings").await.ok(200)["items"], json!([]));
}

/// The real engine, on a backbone of one block.
#[cfg(feature = "torch")]
#[sqlx::test(migrator = "MIGRATOR")]
async fn the_engine_tunes_what_was_posted_and_goes_on_from_what_it_made(pool: PgPool) {
    use promptweave_engine::Engine;

    let app = furnished(pool).await;
    let worker = Worker::start_with(
        &app,
        Box::new(|| Ok(Box::new(Engine::new(tch::Device::Cpu)))),
    );
    let mut first = with("/target/eval_split", json!("test"));
    first["options"] = json!({"epochs": 3, "num_tokens": 2, "patience": 2, "sketch_samples": 2});
    first["grid"] = json!({"prompt_learning_rates": [0.001, 0.1]});
    let tuning = post(&app, &first).await.ok(202);
    until_state(&app, &tuning, "succeeded").await;
    let result = app.get(&url(&tuning, "result")).await.ok(200);
    assert_eq!(result["candidates"].as_array().unwrap().len(), 2);
    assert_eq!(result["num_held_out"], 1);
    let losses = result["curves"]["cross_entropy"].as_array().unwrap();
    let told = epochs(&app, &tuning).await;
    assert_eq!(told.len(), losses.len());
    for (epoch, loss) in told.iter().zip(losses) {
        assert_eq!(epoch["cross_entropy"], *loss);
        assert!(epoch["held_out"]["accuracy"].is_f64(), "{epoch}");
    }
    assert!(result["evaluation"]["accuracy"].is_f64(), "{result}");
    let version = app.get("/v1/prompts/pets-tuned/versions/1").await.ok(200);
    assert_eq!(version["task"], "pets");
    assert_eq!(version["classes"], json!(["cat", "dog"]));

    let mut second = request();
    second["start"] = json!({"prompt": "pets-tuned"});
    second["output"] = json!({"name": "pets-further"});
    let further = post(&app, &second).await.ok(202);
    until_state(&app, &further, "succeeded").await;
    let result = app.get(&url(&further, "result")).await.ok(200);
    assert_eq!(result["options"]["num_tokens"], 2);
    assert_eq!(result["num_samples"], 3);
    worker.stop().await;
}

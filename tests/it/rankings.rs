//! `/v1/rankings`: refused requests, and a table from POST to result.

use promptweave::db::MIGRATOR;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse};
use crate::ensembles::{Worker, furnished, until_state, url};
use crate::fixtures::{FakeComposer, Script};

fn request() -> Value {
    json!({
        "target": {"dataset": "pets"},
        "sources": [{"prompt": "digits"}, {"prompt": "flowers:1"}],
    })
}

async fn post(app: &TestApp, request: &Value) -> TestResponse {
    app.post("/v1/rankings", request).await
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_ranking_is_a_row_of_metrics_a_source_and_publishes_nothing(pool: PgPool) {
    let app = furnished(pool).await;
    let answer = post(&app, &request()).await;
    let ranking = answer.ok(202);
    assert_eq!(answer.header("location"), url(&ranking, "self"));
    let worker = Worker::start(&app, &FakeComposer::default());
    until_state(&app, &ranking, "succeeded").await;
    worker.stop().await;
    let result = app.get(&url(&ranking, "result")).await.ok(200);
    let rows = result["sources"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(
        (&rows[0]["prompt"], &rows[1]["prompt"]),
        (&json!("digits"), &json!("flowers"))
    );
    for metric in promptweave_domain::ranking::RankedSource::METRICS {
        assert!(rows[0].get(metric).is_some(), "{metric}");
    }
    // A ranking that succeeded is the answer, whatever happened to its prompts since.
    assert_eq!(post(&app, &request()).await.ok(200)["id"], ranking["id"]);
    let mut fewer = request();
    fewer["sources"].as_array_mut().unwrap().pop();
    assert_ne!(post(&app, &fewer).await.ok(202)["id"], ranking["id"]);
    let prompts = app.get("/v1/prompts").await.ok(200);
    assert_eq!(prompts["items"].as_array().unwrap().len(), 2);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_ranking_that_cannot_be_says_so_and_can_be_tried_again(pool: PgPool) {
    let app = furnished(pool).await;
    let ranking = post(&app, &request()).await.ok(202);
    let worker = Worker::start(&app, &FakeComposer::playing([Script::Refuse]));
    let over = app
        .get(&format!("{}?wait=60", url(&ranking, "self")))
        .await
        .ok(200);
    assert_eq!(over["state"], "failed");
    assert_eq!(over["error"]["code"], "not_finite");
    let failed = app.get(&url(&ranking, "result")).await;
    failed.problem(409, "ranking_failed");
    app.post_empty(&url(&ranking, "retry")).await.ok(202);
    until_state(&app, &ranking, "succeeded").await;
    let again = app.post_empty(&url(&ranking, "retry")).await;
    again.problem(409, "ranking_over");
    let cancelled = app.post_empty(&url(&ranking, "cancel")).await;
    cancelled.problem(409, "ranking_over");
    let listed = app.get("/v1/rankings").await.ok(200);
    assert_eq!(listed["items"][0]["id"], ranking["id"]);
    let events = app.get(&url(&ranking, "events")).await.ok(200);
    let kinds: Vec<_> = events["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| &it["kind"])
        .collect();
    assert_eq!(kinds.last().unwrap().as_str(), Some("succeeded"));
    worker.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_cannot_be_ranked_is_refused_at_the_door(pool: PgPool) {
    let app = furnished(pool).await;
    let with = |pointer: &str, value: Value| {
        let mut request = request();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        request.pointer_mut(parent).unwrap()[name] = value;
        request
    };
    for (request, code, pointer) in [
        (
            with("/target/dataset", json!("none")),
            "unknown_dataset",
            "/target/dataset",
        ),
        (
            with("/target/eval_split", json!("test")),
            "nothing_to_evaluate",
            "/target/eval_split",
        ),
        (with("/sources", json!([])), "no_sources", "/sources"),
        (
            with("/sources", json!([{"prompt": "none"}])),
            "unknown_prompt",
            "/sources/0/prompt",
        ),
        (
            with("/objective", json!({"h_score": {"shrinkage": 2.0}})),
            "invalid_objective",
            "/objective/h_score/shrinkage",
        ),
        (
            with("/objective", json!({"target_epochs": 0})),
            "invalid_objective",
            "/objective/target_epochs",
        ),
        (
            with("/objective", json!({"method": "spot"})),
            "invalid_body",
            "/objective/method",
        ),
        (
            with("/backbone", json!("none")),
            "unknown_backbone",
            "/backbone",
        ),
        (
            with("/priority", json!(-1)),
            "invalid_priority",
            "/priority",
        ),
    ] {
        let problem = post(&app, &request).await.problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
}

/// The real engine, on a backbone of one block.
#[cfg(feature = "torch")]
#[sqlx::test(migrator = "MIGRATOR")]
async fn the_engine_ranks_what_was_posted(pool: PgPool) {
    use promptweave_engine::Engine;

    let app = furnished(pool).await;
    let worker = Worker::start_with(
        &app,
        Box::new(|| Ok(Box::new(Engine::new(tch::Device::Cpu)))),
    );
    let mut request = request();
    request["objective"] = json!({"target_epochs": 1});
    let ranking = post(&app, &request).await.ok(202);
    until_state(&app, &ranking, "succeeded").await;
    worker.stop().await;
    let result = app.get(&url(&ranking, "result")).await.ok(200);
    assert_eq!(result["num_samples"], 3);
    for row in result["sources"].as_array().unwrap() {
        for metric in [
            "h_score",
            "h_score_adjusted",
            "h_score_cross_validated",
            "logme",
            "spot_token_mean",
            "spot_all_pairs",
            "panda",
        ] {
            assert!(row[metric].is_f64(), "{metric}: {row}");
        }
        // These prompts have no head and no sketch.
        assert_eq!((&row["leep"], &row["otce"]), (&Value::Null, &Value::Null));
    }
}

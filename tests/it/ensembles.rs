//! `/v1/ensembles` and `/v1/workers`: refused requests, and a job from POST to result.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::Duration;

use promptweave::db::MIGRATOR;
use promptweave::shutdown::Shutdown;
use promptweave::worker::composer_thread::NewComposer;
use promptweave::worker::{SEEN_EVERY, WorkerError, WorkerSettings, run};
use promptweave_domain::digest::Digest;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::tensor::Tensor;
use promptweave_formats::backbone::Backbone;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::app::{TestApp, TestResponse, WIDTH, png, prompt_file, tiny_backbone, write_files};
use crate::fixtures::{FakeComposer, Script};

/// An app with backbone `tiny`, dataset `pets` and prompts `digits` and `flowers`.
pub async fn furnished(pool: PgPool) -> TestApp {
    let app = TestApp::new(pool);
    tiny_backbone(&app.root("tiny"), 1, 4);
    let made = app
        .post(
            "/v1/backbones",
            &json!({"name": "tiny", "directory": "tiny"}),
        )
        .await;
    made.ok(201);
    let image = |red| png(red);
    write_files(
        &app.root("pets"),
        &[
            ("train/cat/1.png", &image(1)),
            ("train/dog/1.png", &image(2)),
            ("train/dog/2.png", &image(3)),
            ("val/cat/1.png", &image(4)),
            ("test/cat/1.png", &image(5)),
            ("test/dog/1.png", &image(6)),
        ],
    );
    let made = app
        .post(
            "/v1/datasets",
            &json!({"name": "pets", "directory": "pets"}),
        )
        .await;
    made.ok(201);
    for (seed, name) in [(1, "digits"), (2, "flowers")] {
        upload(&app, name, &fitting(&app, seed)).await;
    }
    app
}

/// A prompt made for backbone `tiny`.
pub fn fitting(app: &TestApp, seed: u64) -> PromptFile {
    let backbone = Backbone::open(&app.root("tiny")).unwrap();
    let mut file = prompt_file(seed);
    let metadata = file.metadata.as_mut().unwrap();
    metadata.backbone_digest = Some(backbone.digest);
    metadata.preprocessing_id = Some(backbone.config.preprocessing.id());
    file
}

pub async fn upload(app: &TestApp, name: &str, file: &PromptFile) {
    app.post("/v1/prompts", &json!({"name": name}))
        .await
        .ok(201);
    app.upload(&format!("/v1/prompts/{name}/versions"), file.to_bytes())
        .await
        .ok(201);
}

pub fn request() -> Value {
    json!({
        "target": {"dataset": "pets", "eval_split": "test"},
        "sources": [{"prompt": "digits"}, {"prompt": "flowers:1"}],
        "output": {"name": "pets-composed"},
    })
}

pub async fn post(app: &TestApp, request: &Value) -> TestResponse {
    app.post("/v1/ensembles", request).await
}

pub fn url(ensemble: &Value, name: &str) -> String {
    ensemble["urls"][name].as_str().unwrap().to_owned()
}

pub struct Worker(Shutdown, JoinHandle<Result<(), WorkerError>>);

impl Worker {
    pub fn start(app: &TestApp, fake: &FakeComposer) -> Self {
        Self::start_with(app, fake.factory())
    }

    pub fn start_with(app: &TestApp, composer: NewComposer) -> Self {
        let settings = WorkerSettings {
            id: Uuid::now_v7(),
            device: "auto".to_owned(),
            seen_every: SEEN_EVERY,
            lease: Duration::from_secs(30),
            stall: Duration::from_secs(600),
            cache_dir: app.dir.path().join("cache"),
            min_shard_pairs: 0,
            cache_bytes: 1 << 30,
        };
        let shutdown = Shutdown::default();
        let (pool, blobs) = (app.state.pool.clone(), app.state.blobs.clone());
        let task = tokio::spawn(run(settings, pool, blobs, composer, shutdown.clone()));
        Self(shutdown, task)
    }

    pub async fn stop(self) {
        self.0.soft.cancel();
        self.1.await.unwrap().unwrap();
    }
}

pub async fn until_state(app: &TestApp, ensemble: &Value, state: &str) -> Value {
    let patience = async {
        loop {
            let seen = app.get(&url(ensemble, "self")).await.ok(200);
            if seen["state"] == state {
                return seen;
            }
            assert_ne!(seen["state"], "failed", "{seen}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), patience)
        .await
        .expect(state)
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_ensemble_from_post_to_result(pool: PgPool) {
    let app = furnished(pool).await;
    app.get("/readyz/workers").await.problem(503, "no_worker");
    let accepted = post(&app, &request()).await;
    let ensemble = accepted.ok(202);
    assert_eq!(accepted.header("location"), url(&ensemble, "self"));
    assert_eq!(accepted.header("retry-after"), "1");
    // Everything was resolved and recorded when the ensemble was posted.
    let spec = &ensemble["spec"];
    assert_eq!(ensemble["state"], "queued");
    assert_eq!(spec["backbone"]["name"], "tiny");
    assert_eq!(spec["target"]["version"], 1);
    assert_eq!(spec["target"]["max_samples"], 2000);
    assert_eq!(spec["sources"][0]["version"], 1);
    for name in ["result", "statistics"] {
        let early = app.get(&url(&ensemble, name)).await;
        early.problem(409, "ensemble_not_finished");
    }
    // A later version changes nothing about this job.
    let newer = fitting(&app, 9).to_bytes();
    app.upload("/v1/prompts/digits/versions", newer)
        .await
        .ok(201);

    let worker = Worker::start(&app, &FakeComposer::default());
    let done = until_state(&app, &ensemble, "succeeded").await;
    let result = app.get(&url(&ensemble, "result")).await.ok(200);
    assert_eq!(result["source_weights"][0]["prompt"], "digits");
    assert_eq!(result["source_weights"][0]["version"], 1);
    assert_eq!(result["source_weights"][1]["weight"], 0.75);
    assert_eq!(result["composed_prompt"]["prompt"], "pets-composed");
    let composed = app.get(&url(&done, "composed_prompt")).await;
    assert_eq!(composed.status, 200);
    PromptFile::parse(&composed.body).unwrap();
    let statistics = app.get(&url(&ensemble, "statistics")).await;
    assert_eq!(statistics.body, "statistics");
    assert_eq!(statistics.header("content-length"), "10");
    let digest = Digest::of(b"statistics");
    assert_eq!(statistics.header("etag"), format!("\"{digest}\""));

    let events = app.get(&url(&ensemble, "events")).await.ok(200);
    let kinds: Vec<_> = events["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["kind"])
        .collect();
    assert_eq!(kinds.first().unwrap(), &"queued");
    assert_eq!(kinds.last().unwrap(), &"succeeded");
    let before_all = format!("{}?after=-1", url(&ensemble, "events"));
    app.get(&before_all).await.problem(422, "invalid_query");
    let after = format!("{}?after={}", url(&ensemble, "events"), events["last_seq"]);
    assert_eq!(app.get(&after).await.ok(200)["items"], json!([]));

    app.post_empty(&url(&ensemble, "cancel"))
        .await
        .problem(409, "ensemble_over");
    app.get("/readyz/workers").await.ok(200);
    let workers = app.get("/v1/workers").await.ok(200);
    assert_eq!(workers["items"][0]["device"], "fake");
    worker.stop().await;
    app.get("/readyz/workers").await.problem(503, "no_worker");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_cannot_be_composed_is_refused_with_its_place(pool: PgPool) {
    let app = furnished(pool).await;
    let narrow = {
        let mut file = fitting(&app, 3);
        file.prompt_embeddings = Tensor::new([2, WIDTH / 2], vec![0.5; WIDTH]);
        // The registry refuses a prompt that does not fit a backbone it knows; here and below it does not know the
        // backbone.
        file.metadata.as_mut().unwrap().backbone_digest = Some(Digest::of(b"unknown"));
        file
    };
    upload(&app, "narrow", &narrow).await;
    let long = {
        let mut file = fitting(&app, 3);
        file.prompt_embeddings = Tensor::new([3, WIDTH], vec![0.5; 3 * WIDTH]);
        file
    };
    upload(&app, "long", &long).await;
    let deep = {
        let mut file = fitting(&app, 4);
        let layers = Tensor::new([1, 2, WIDTH], vec![0.5; 2 * WIDTH]);
        file.deep_prompt_embeddings = Some(layers);
        file.metadata.as_mut().unwrap().backbone_digest = None;
        file
    };
    upload(&app, "deep", &deep).await;
    upload(&app, "other-backbone", &prompt_file(5)).await;
    let other_size = {
        let mut file = fitting(&app, 6);
        let metadata = file.metadata.as_mut().unwrap();
        metadata.backbone_digest = None;
        metadata.preprocessing_id = Some("8-bicubic-imagenet".into());
        file
    };
    upload(&app, "other-size", &other_size).await;
    upload(&app, "copy", &fitting(&app, 1)).await;
    let unseeded = {
        let mut file = fitting(&app, 7);
        file.metadata.as_mut().unwrap().init_seed = None;
        file
    };
    upload(&app, "unseeded", &unseeded).await;

    let with_source = |name: &str| {
        let mut request = request();
        request["backbone"] = json!("tiny");
        request["sources"][1]["prompt"] = json!(name);
        request
    };
    let with = |pointer: &str, value: Value| {
        let mut request = request();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        request.pointer_mut(parent).unwrap()[key] = value;
        request
    };
    let mut without_gradients = with("/objective", json!({"method": "average"}));
    without_gradients["early_stopping"] = json!({"max_standard_error": 0.1});
    let mut chosen_at_the_end = with(
        "/objective",
        json!({"experimental": {"uniform_mix": "auto"}}),
    );
    chosen_at_the_end["early_stopping"] = json!({"max_standard_error": 0.1});
    let mut falls_back = with("/objective", json!({"fallback": "single_best"}));
    falls_back["early_stopping"] = json!({"max_standard_error": 0.1});
    let mut without_anchor = with_source("unseeded");
    without_anchor["objective"] = json!({"experimental": {"scale": "auto"}});
    let second = "/sources/1/prompt";
    for (request, code, pointer) in [
        (with_source("nobody"), "unknown_prompt", second),
        (with_source("digits"), "same_source", second),
        (with_source("copy"), "same_source", second),
        (with_source("narrow"), "width_mismatch", second),
        (with_source("long"), "length_mismatch", second),
        (with_source("deep"), "deep_prompt_not_composable", second),
        (with_source("other-backbone"), "backbone_mismatch", second),
        (with_source("other-size"), "preprocessing_mismatch", second),
        (with("/sources", json!([])), "no_sources", "/sources"),
        (
            with("/backbone", json!("huge")),
            "unknown_backbone",
            "/backbone",
        ),
        (
            with("/target/dataset", json!("pets:2")),
            "unknown_dataset",
            "/target/dataset",
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
        (
            with("/target/max_samples", json!(1)),
            "invalid_max_samples",
            "/target/max_samples",
        ),
        (
            with("/objective", json!({"trade_off": 2})),
            "invalid_objective",
            "/objective/trade_off",
        ),
        (
            // There are 3 images in 8 dimensions.
            with("/objective", json!({"h_score": {"shrinkage": 0.0}})),
            "invalid_objective",
            "/objective/h_score/shrinkage",
        ),
        (
            with("/objective", json!({"method": "average", "trade_off": 0.5})),
            "invalid_body",
            "/objective/trade_off",
        ),
        (
            without_anchor,
            "invalid_objective",
            "/objective/experimental/scale",
        ),
        (
            without_gradients,
            "invalid_early_stopping",
            "/early_stopping",
        ),
        (
            chosen_at_the_end,
            "invalid_early_stopping",
            "/early_stopping",
        ),
        (falls_back, "invalid_early_stopping", "/early_stopping"),
        (
            with("/priority", json!(-1)),
            "invalid_priority",
            "/priority",
        ),
        (
            with("/sources/0/prompt", json!("digits:0")),
            "invalid_body",
            "/sources/0/prompt",
        ),
        (
            with("/target/samples", json!(1)),
            "invalid_body",
            "/target/samples",
        ),
    ] {
        let problem = post(&app, &request).await.problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }

    // A dataset without `val`, and with nothing readable in `test`.
    write_files(
        &app.root("gaps"),
        &[
            ("train/cat/1.png", &png(1)),
            ("train/dog/1.png", &png(2)),
            ("test/cat/1.png", b"not an image"),
        ],
    );
    let gaps = json!({"name": "gaps", "directory": "gaps", "skip_unreadable": true});
    app.post("/v1/datasets", &gaps).await.ok(201);
    for (split, value, code) in [
        ("split", "val", "unknown_split"),
        ("split", "test", "empty_target"),
        ("eval_split", "val", "unknown_split"),
        ("eval_split", "test", "empty_split"),
    ] {
        let target = json!({"dataset": "gaps", split: value});
        let problem = post(&app, &with("/target", target))
            .await
            .problem(422, code);
        let pointer = format!("/target/{split}");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    let list = app.get("/v1/ensembles").await.ok(200);
    assert_eq!(list["items"], json!([]), "nothing was queued");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn features_that_no_memory_is_meant_to_hold_are_refused(pool: PgPool) {
    let app = furnished(pool).await;
    // The backbone is so wide that only two of the three images fit.
    let wide = r#"UPDATE backbone SET config = jsonb_set(config, '{embed_dim}', '250000000')"#;
    sqlx::query(wide).execute(&app.state.pool).await.unwrap();
    let problem = post(&app, &request()).await.problem(422, "too_large");
    assert_eq!(problem["errors"][0]["pointer"], "/target/max_samples");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("set it to 2 or less"), "{detail}");
    let mut fewer = request();
    fewer["target"]["max_samples"] = json!(2);
    post(&app, &fewer).await.ok(202);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn ensembles_are_listed_and_cancelled(pool: PgPool) {
    let app = furnished(pool).await;
    let mut posted = Vec::new();
    let mut anew = request();
    anew["force"] = json!(true);
    for _ in 0..3 {
        posted.push(post(&app, &anew).await.ok(202));
    }
    let page = app.get("/v1/ensembles?page_size=2").await.ok(200);
    let ids = |page: &Value| -> Vec<Value> {
        page["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["id"].clone())
            .collect()
    };
    assert_eq!(
        ids(&page),
        [posted[2]["id"].clone(), posted[1]["id"].clone()]
    );
    let token = page["next_page_token"].as_str().unwrap();
    let rest = app
        .get(&format!("/v1/ensembles?page_size=2&page_token={token}"))
        .await
        .ok(200);
    assert_eq!(ids(&rest), [posted[0]["id"].clone()]);
    assert_eq!(rest.get("next_page_token"), None);

    for waiting in &posted[..2] {
        let cancelled = app.post_empty(&url(waiting, "cancel")).await.ok(200);
        assert_eq!(cancelled["state"], "cancelled");
        app.post_empty(&url(waiting, "cancel")).await.ok(200);
        app.get(&url(waiting, "result"))
            .await
            .problem(409, "ensemble_cancelled");
    }
    let fake = FakeComposer::playing([Script::UntilStopped]);
    let worker = Worker::start(&app, &fake);
    let running = until_state(&app, &posted[2], "running").await;
    let asked = app.post_empty(&url(&running, "cancel")).await;
    // The ensemble was cancelled while it ran; the worker may have noticed already.
    assert!([200, 202].contains(&asked.status.as_u16()), "{asked:?}");
    until_state(&app, &running, "cancelled").await;
    worker.stop().await;
    assert_eq!(
        fake.begun.load(Ordering::SeqCst),
        fake.stopped.load(Ordering::SeqCst)
    );

    let nobody = "/v1/ensembles/01890a5d-ac96-774b-bcce-b302099a8057";
    app.get(nobody).await.problem(404, "ensemble_not_found");
    app.post_empty(&format!("{nobody}/cancel"))
        .await
        .problem(404, "ensemble_not_found");
    app.get("/v1/ensembles/7")
        .await
        .problem(422, "invalid_path");
    assert!(fs::exists(app.dir.path().join("cache")).unwrap());
}

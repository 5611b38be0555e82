//! `/v1/predictions`, and ensembles as versions in the registry.

use promptweave::db::MIGRATOR;
use promptweave_domain::prompt_file::PromptFile;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse, head};
use crate::ensembles::{Worker, fitting, furnished, until_state, upload, url};
use crate::fixtures::{FakeComposer, Script};

/// A prompt with a head for the classes `cat` and `dog`.
fn with_head(app: &TestApp, seed: u64) -> PromptFile {
    let mut file = fitting(app, seed);
    file.head = Some(head(seed));
    let metadata = file.metadata.as_mut().unwrap();
    metadata.classes = Some(["cat", "dog"].map(str::to_owned).to_vec());
    file
}

async fn post(app: &TestApp, request: &Value) -> TestResponse {
    app.post("/v1/predictions", request).await
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_prediction_leaves_a_file_and_is_computed_once(pool: PgPool) {
    let app = furnished(pool).await;
    upload(&app, "pets-1", &with_head(&app, 3)).await;
    let request = json!({"model": "pets-1", "dataset": "pets", "split": "test"});
    let prediction = post(&app, &request).await.ok(202);
    assert_eq!(prediction["urls"]["file"], Value::Null);
    let file = format!("{}/file", url(&prediction, "self"));
    app.get(&file).await.problem(409, "prediction_not_finished");
    // The first attempt fails, and nothing is left of it.
    let worker = Worker::start(&app, &FakeComposer::playing([Script::Refuse]));
    until_state(&app, &prediction, "failed").await;
    app.get(&file).await.problem(409, "prediction_failed");
    app.post_empty(&url(&prediction, "retry")).await.ok(202);
    let done = until_state(&app, &prediction, "succeeded").await;
    worker.stop().await;
    assert_eq!(url(&done, "file"), file);
    let table = app.get(&file).await;
    assert_eq!(table.status, 200);
    assert_eq!(table.header("content-type"), "text/csv; charset=utf-8");
    let result = app.get(&url(&done, "result")).await.ok(200);
    assert_eq!(
        table.header("etag"),
        format!("\"{}\"", result["file"]["digest"].as_str().unwrap())
    );
    assert_eq!(post(&app, &request).await.ok(200)["id"], prediction["id"]);
    let mut more = request.clone();
    more["top_k"] = json!(2);
    assert_ne!(post(&app, &more).await.ok(202)["id"], prediction["id"]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_cannot_be_predicted_is_refused_at_the_door(pool: PgPool) {
    let app = furnished(pool).await;
    upload(&app, "pets-1", &with_head(&app, 3)).await;
    let mut elsewhere = with_head(&app, 5);
    elsewhere.metadata.as_mut().unwrap().preprocessing_id = None;
    elsewhere.metadata.as_mut().unwrap().backbone_digest = None;
    upload(&app, "anywhere", &elsewhere).await;
    let base = json!({"model": "pets-1", "dataset": "pets"});
    for (field, value, code, pointer) in [
        ("model", json!("none"), "unknown_prompt", "/model"),
        ("model", json!("digits"), "no_head", "/model"),
        ("model", json!("anywhere"), "backbone_required", "/backbone"),
        ("dataset", json!("none"), "unknown_dataset", "/dataset"),
        ("split", json!("nope"), "invalid_body", "/split"),
        ("top_k", json!(0), "invalid_top_k", "/top_k"),
        ("backbone", json!("none"), "unknown_backbone", "/backbone"),
        ("format", json!("xlsx"), "invalid_body", "/format"),
        ("priority", json!(-1), "invalid_priority", "/priority"),
        ("max_samples", json!(5), "invalid_body", "/max_samples"),
    ] {
        let mut request = base.clone();
        request[field] = value;
        let problem = post(&app, &request).await.problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    // All mistakes of a request come together.
    let wrong = json!({"model": "digits", "dataset": "none", "top_k": 0});
    let problem = post(&app, &wrong).await.problem(422, "invalid_request");
    assert_eq!(problem["errors"].as_array().unwrap().len(), 3, "{problem}");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_ensemble_does_not_take_over_the_name_of_a_prompt(pool: PgPool) {
    let app = furnished(pool).await;
    upload(&app, "pets-ensemble", &with_head(&app, 3)).await;
    let mut request = json!({
        "target": {"dataset": "pets"},
        "sources": ["digits", "flowers"],
        "objective": {"method": "pool"},
        "output": {"name": "pets"},
    });
    let problem = app.post("/v1/ensembles", &request).await;
    let problem = problem.problem(422, "name_taken");
    assert_eq!(problem["errors"][0]["pointer"], "/output/name", "{problem}");
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .contains("`pets-ensemble`"),
        "{problem}"
    );
    request["output"] = json!({"name": "p".repeat(120)});
    let problem = app.post("/v1/ensembles", &request).await;
    problem.problem(422, "output_too_long");
    // Another method publishes no ensemble, and a name of its own is free.
    request["output"] = json!({"name": "other"});
    app.post("/v1/ensembles", &request).await.ok(202);
    request["output"] = json!({"name": "pets"});
    request["objective"] = json!({"method": "average"});
    app.post("/v1/ensembles", &request).await.ok(202);
}

/// The real engine, on a backbone of one block.
#[cfg(feature = "torch")]
mod by_the_engine {
    use promptweave_domain::digest::Digest;
    use promptweave_domain::ensemble_file::EnsembleFile;
    use promptweave_engine::Engine;

    use super::*;
    use crate::app::{png, write_files};

    fn engine(app: &TestApp) -> Worker {
        let new = Box::new(|| Ok(Box::new(Engine::new(tch::Device::Cpu)) as _));
        Worker::start_with(app, new)
    }

    /// Twelve images a split: the cats are dark, and the dogs bright.
    async fn furnished_with_birds(pool: PgPool) -> TestApp {
        let app = furnished(pool).await;
        let mut files = Vec::new();
        for (i, split) in ["train", "test"].into_iter().enumerate() {
            for n in 0..6u8 {
                let red = 10 * n + i as u8;
                files.push((format!("{split}/cat/{n}.png"), png(red)));
                files.push((format!("{split}/dog/{n}.png"), png(150 + red)));
            }
        }
        let files: Vec<(&str, &[u8])> = (files.iter())
            .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
            .collect();
        write_files(&app.root("birds"), &files);
        let made = json!({"name": "birds", "directory": "birds"});
        app.post("/v1/datasets", &made).await.ok(201);
        app
    }

    /// A pool for `birds`, computed: the job, and its result.
    async fn pooled(app: &TestApp) -> (Value, Value) {
        let request = json!({
            "target": {"dataset": "birds", "eval_split": "test"},
            "sources": ["digits", "flowers"],
            "objective": {"method": "pool"},
            "output": {"name": "birds-pool"},
        });
        let ensemble = app.post("/v1/ensembles", &request).await.ok(202);
        let done = until_state(app, &ensemble, "succeeded").await;
        let result = app.get(&url(&done, "result")).await.ok(200);
        (done, result)
    }

    #[sqlx::test(migrator = "MIGRATOR")]
    async fn a_pool_publishes_its_ensemble_with_lineage(pool: PgPool) {
        let app = furnished_with_birds(pool).await;
        let worker = engine(&app);
        let (done, result) = pooled(&app).await;
        worker.stop().await;
        let reported = &result["pool"]["ensemble"];
        assert_eq!(reported["prompt"], "birds-pool-ensemble");
        assert_eq!(
            url(&done, "ensemble"),
            "/v1/prompts/birds-pool-ensemble/versions/1/content"
        );
        let at = "/v1/prompts/birds-pool-ensemble/versions/1";
        let version = app.get(at).await.ok(200);
        assert_eq!(version["kind"], "ensemble");
        assert_eq!(version["digest"], reported["digest"]);
        assert_eq!(version["num_members"], reported["num_members"]);
        assert_eq!(version["classes"], json!(["cat", "dog"]));
        for of_prompts in ["num_tokens", "depth", "dtype", "init_seed"] {
            assert_eq!(version[of_prompts], Value::Null, "{of_prompts}");
        }
        let composed = app.get("/v1/prompts/birds-pool/versions/1").await.ok(200);
        assert_eq!(
            (&composed["kind"], &composed["num_members"]),
            (&json!("prompt"), &Value::Null)
        );
        assert_eq!(composed["produced_by_job"], version["produced_by_job"]);

        // The file is what it says, and has the weights of the answer; so has the lineage.
        let bytes = app.get(&url(&done, "ensemble")).await.body;
        assert_eq!(json!(Digest::of(&bytes).to_string()), version["digest"]);
        let file = EnsembleFile::parse(&bytes).unwrap();
        let members = &file.metadata.members;
        let weights = result["pool"]["weights"].as_array().unwrap();
        let graph = app.get(&format!("{at}/lineage")).await.ok(200);
        let edges = graph["edges"].as_array().unwrap();
        let kept = weights
            .iter()
            .filter(|it| it["weight"].as_f64() > Some(0.0));
        assert_eq!(edges.len(), kept.clone().count());
        for weight in kept {
            let name = weight["prompt"].as_str().unwrap();
            let alpha = weight["weight"].as_f64().unwrap();
            let member = members
                .iter()
                .find(|it| it.prompt.as_deref() == Some(name))
                .unwrap();
            assert!((member.weight - alpha).abs() < 1e-9, "{name}");
            assert_eq!(member.version, Some(1));
            let parent = json!(format!("{name}:1"));
            let edge = edges.iter().find(|it| it["parent"] == parent).unwrap();
            assert_eq!(edge["weight"], weight["weight"]);
        }

        // The same bytes can be published by a client, and are the same kind of version.
        app.post("/v1/prompts", &json!({"name": "copy"}))
            .await
            .ok(201);
        let copy = "/v1/prompts/copy/versions";
        let uploaded = app.upload(copy, bytes.clone()).await.ok(201);
        assert_eq!(
            (&uploaded["kind"], &uploaded["origin"]),
            (&json!("ensemble"), &json!("composed"))
        );
        app.upload(copy, bytes.clone()).await.ok(200);
        let with_task = format!("{copy}?task=birds");
        let refused = app.upload(&with_task, bytes.clone()).await;
        refused.problem(422, "metadata_conflict");
        let mut broken = file.clone();
        broken.metadata.sharpness = -1.0;
        let refused = app.upload(copy, broken.to_bytes()).await;
        let problem = refused.problem(422, "invalid_metadata");
        assert!(
            problem["detail"].as_str().unwrap().contains("sharpness"),
            "{problem}"
        );

        // It is no prompt: not for PEFT, not as a source, not as a start.
        let problem = app
            .get(&format!("{at}/peft"))
            .await
            .problem(422, "not_a_prompt");
        assert!(
            problem["detail"].as_str().unwrap().contains("ensemble"),
            "{problem}"
        );
        let ensemble =
            json!({"target": {"dataset": "birds"}, "sources": ["digits", "birds-pool-ensemble"]});
        let ranking = json!({"target": {"dataset": "birds"}, "sources": ["birds-pool-ensemble"]});
        let tuning = json!({"target": {"dataset": "birds"}, "start": "birds-pool-ensemble"});
        let sum = json!({
            "sources": [{"prompt": "birds-pool-ensemble", "weight": 1.0}],
            "output": {"name": "sum"},
        });
        for (path, request) in [
            ("/v1/ensembles", ensemble),
            ("/v1/rankings", ranking),
            ("/v1/tunings", tuning),
            ("/v1/prompts/compose", sum),
        ] {
            app.post(path, &request).await.problem(422, "not_a_prompt");
        }
    }

    #[sqlx::test(migrator = "MIGRATOR")]
    async fn a_published_ensemble_predicts_what_its_job_reported(pool: PgPool) {
        let app = furnished_with_birds(pool).await;
        let worker = engine(&app);
        let (_, result) = pooled(&app).await;
        for (model, prediction) in [
            ("birds-pool-ensemble", "pool"),
            ("birds-pool", "composed_prompt"),
        ] {
            let request = json!({
                "model": model, "dataset": "birds", "split": "test", "top_k": 2, "format": "jsonl",
            });
            let job = post(&app, &request).await.ok(202);
            let done = until_state(&app, &job, "succeeded").await;
            let predicted = app.get(&url(&done, "result")).await.ok(200);
            let compared = result["comparison"].as_array().unwrap();
            let compared = compared
                .iter()
                .find(|it| it["prediction"] == prediction)
                .unwrap();
            let score = &predicted["score"];
            assert_eq!(score["accuracy"], compared["accuracy"], "{model}");
            assert_eq!(
                predicted["forward_passes"], compared["forward_passes"],
                "{model}"
            );
            assert_eq!(score["accuracy_interval"], compared["accuracy_interval"]);
            if prediction == "pool" {
                let (own, theirs) = (score["loss"].as_f64(), compared["loss"].as_f64());
                assert!(
                    (own.unwrap() - theirs.unwrap()).abs() < 1e-5,
                    "{own:?} {theirs:?}"
                );
            }
            // The file agrees with the confusion matrix.
            let table = app.get(&url(&done, "file")).await;
            assert_eq!(table.header("content-type"), "application/jsonl");
            let rows: Vec<Value> = std::str::from_utf8(&table.body)
                .unwrap()
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
            assert_eq!(rows.len(), 12);
            let counted = |label: &str, class: &str| {
                let found = rows
                    .iter()
                    .filter(|it| it["label"] == label && it["class"] == class);
                found.count() as u64
            };
            let classes = ["cat", "dog"];
            let confusion = classes.map(|label| classes.map(|class| counted(label, class)));
            assert_eq!(score["confusion"], json!(confusion));
            for row in &rows {
                let image = row["image"].as_str().unwrap();
                assert!(
                    image.ends_with(".png") && image.contains("test/"),
                    "{image}"
                );
                let sum =
                    row["probability"].as_f64().unwrap() + row["probability_2"].as_f64().unwrap();
                assert!((sum - 1.0).abs() < 1e-9, "{row}");
            }
        }
        worker.stop().await;
    }

    #[sqlx::test(migrator = "MIGRATOR")]
    async fn labels_that_the_model_does_not_know_give_no_score(pool: PgPool) {
        let app = furnished_with_birds(pool).await;
        let mut model = with_head(&app, 3);
        let classes = ["cat", "horse"].map(str::to_owned).to_vec();
        model.metadata.as_mut().unwrap().classes = Some(classes);
        upload(&app, "horses", &model).await;
        let worker = engine(&app);
        let request = json!({"model": "horses", "dataset": "birds"});
        let job = post(&app, &request).await.ok(202);
        let done = until_state(&app, &job, "succeeded").await;
        worker.stop().await;
        let result = app.get(&url(&done, "result")).await.ok(200);
        assert_eq!(result["score"], Value::Null);
        let why = result["no_score"].as_str().unwrap();
        assert_eq!(
            why,
            "6 images are labelled `dog`, which is no class of the model"
        );
        let table = app.get(&url(&done, "file")).await;
        let text = String::from_utf8(table.body.to_vec()).unwrap();
        assert_eq!(text.lines().count(), 13, "{text}");
        assert!(
            text.starts_with("image,label,class,probability\n"),
            "{text}"
        );
    }
}

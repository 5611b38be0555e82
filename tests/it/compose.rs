//! `POST /v1/prompts/compose`: sums with the user's own weights.

use promptweave::db::MIGRATOR;
use promptweave_domain::digest::Digest;
use promptweave_domain::mixture::mix;
use promptweave_domain::prompt_file::{Origin, PromptFile};
use promptweave_domain::tensor::Tensor;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse, prompt_file};

async fn publish(app: &TestApp, name: &str, file: &PromptFile) {
    app.post("/v1/prompts", &json!({"name": name}))
        .await
        .ok(201);
    let path = format!("/v1/prompts/{name}/versions");
    app.upload(&path, file.to_bytes()).await.ok(201);
}

async fn compose(app: &TestApp, sources: &[(&str, f64)], output: &str) -> TestResponse {
    let sources: Vec<_> = sources
        .iter()
        .map(|(prompt, weight)| json!({"prompt": prompt, "weight": weight}))
        .collect();
    let body = json!({"sources": sources, "output": {"name": output}});
    app.post("/v1/prompts/compose", &body).await
}

async fn content(app: &TestApp, version: &Value) -> PromptFile {
    let path = version["urls"]["content"].as_str().unwrap();
    PromptFile::parse(&app.get(path).await.body).unwrap()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_sum_is_published_with_its_lineage_and_once(pool: PgPool) {
    let app = TestApp::new(pool);
    let files = [1, 2, 3].map(prompt_file);
    for (name, file) in ["a", "b", "c"].iter().zip(&files) {
        publish(&app, name, file).await;
    }
    let by_digest = format!("c@{}", Digest::of(&files[2].to_bytes()));
    let sources = [("a", 0.2), ("b:1", 0.5), (by_digest.as_str(), 0.3)];
    let made = compose(&app, &sources, "abc").await;
    let version = made.ok(201);
    assert_eq!(made.header("location"), "/v1/prompts/abc/versions/1");
    assert_eq!(version["origin"], "composed");
    assert_eq!(version["produced_by_job"], Value::Null);
    let file = content(&app, &version).await;
    let prompts: Vec<Tensor<f32>> = files.iter().map(|f| f.prompt_embeddings.clone()).collect();
    assert_eq!(file.prompt_embeddings, mix(&prompts, &[0.2, 0.5, 0.3]));
    let (said, of_source) = (file.metadata.unwrap(), files[0].metadata.clone().unwrap());
    assert_eq!(said.origin, Origin::Composed);
    assert_eq!(said.backbone_digest, of_source.backbone_digest);
    assert_eq!(said.preprocessing_id, of_source.preprocessing_id);
    assert_eq!(said.init_seed, of_source.init_seed);
    assert_eq!((said.task, said.classes), (None, None));

    let lineage = app.get("/v1/prompts/abc/versions/1/lineage").await.ok(200);
    let mut weights: Vec<f64> = lineage["edges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|edge| edge["weight"].as_f64().unwrap())
        .collect();
    weights.sort_by(f64::total_cmp);
    assert_eq!(weights, [0.2, 0.3, 0.5]);

    // The same sum in another order is the same version.
    let sources = [sources[2], sources[0], sources[1]];
    let again = compose(&app, &sources, "abc").await;
    assert_eq!(again.ok(200)["digest"], version["digest"]);
    // Other weights make the next version.
    let other = compose(&app, &[("a", 0.5), ("b", 0.5)], "abc").await;
    assert_eq!(other.ok(201)["version"], 2);
    // A composed prompt can be a source.
    let of_composed = compose(&app, &[("abc:1", 0.5), ("a", 0.5)], "more").await;
    of_composed.ok(201);
    // A source at weight 1 is itself, bit by bit.
    let alone = compose(&app, &[("a", 0.0), ("b", 1.0)], "alone")
        .await
        .ok(201);
    let alone = content(&app, &alone).await;
    assert_eq!(alone.prompt_embeddings, files[1].prompt_embeddings);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_cannot_be_summed_is_refused_by_place(pool: PgPool) {
    let app = TestApp::new(pool);
    publish(&app, "a", &prompt_file(1)).await;
    publish(&app, "b", &prompt_file(2)).await;
    publish(&app, "same", &prompt_file(1)).await;
    let mut long = prompt_file(3);
    let width = long.prompt_embeddings.shape[1];
    long.prompt_embeddings = Tensor::new([3, width], vec![0.5; 3 * width]);
    publish(&app, "long", &long).await;
    let mut wide = prompt_file(3);
    wide.prompt_embeddings = Tensor::new([2, 3], vec![0.5; 6]);
    publish(&app, "wide", &wide).await;
    let mut deep = prompt_file(4);
    deep.deep_prompt_embeddings = Some(Tensor::new([1, 2, width], vec![0.5; 2 * width]));
    publish(&app, "deep", &deep).await;
    let mut elsewhere = prompt_file(5);
    elsewhere.metadata.as_mut().unwrap().backbone_digest = Some(Digest::of(b"another"));
    publish(&app, "elsewhere", &elsewhere).await;
    let mut resized = prompt_file(6);
    resized.metadata.as_mut().unwrap().preprocessing_id = Some("8-bicubic-imagenet".into());
    publish(&app, "resized", &resized).await;

    let second = "/sources/1/prompt";
    type Sources<'a> = &'a [(&'a str, f64)];
    let refusals: [(Sources<'_>, &str, &str); 13] = [
        (&[], "no_sources", "/sources"),
        (&[("a", 0.5), ("b", 0.4)], "invalid_weights", "/sources"),
        (&[("a", 0.5), ("b", 0.50001)], "invalid_weights", "/sources"),
        (
            &[("a", -0.5), ("b", 1.5)],
            "invalid_weights",
            "/sources/0/weight",
        ),
        (
            &[("a", 0.5), ("b", 1.5)],
            "invalid_weights",
            "/sources/1/weight",
        ),
        (&[("a", 0.5), ("missing", 0.5)], "unknown_prompt", second),
        (&[("a", 0.5), ("b:2", 0.5)], "unknown_prompt", second),
        (&[("a", 0.5), ("same", 0.5)], "same_source", second),
        (&[("a", 0.5), ("long", 0.5)], "length_mismatch", second),
        (&[("a", 0.5), ("wide", 0.5)], "width_mismatch", second),
        (
            &[("a", 0.5), ("deep", 0.5)],
            "deep_prompt_not_composable",
            second,
        ),
        (
            &[("a", 0.5), ("elsewhere", 0.5)],
            "backbone_mismatch",
            second,
        ),
        (
            &[("a", 0.5), ("resized", 0.5)],
            "preprocessing_mismatch",
            second,
        ),
    ];
    for (sources, code, pointer) in refusals {
        let problem = compose(&app, sources, "out").await.problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    let halves = [("a", 0.5), ("b", 0.5)];
    for name in ["compose", "import-peft"] {
        let problem = compose(&app, &halves, name).await;
        let problem = problem.problem(422, "reserved_name");
        assert_eq!(problem["errors"][0]["pointer"], "/output/name");
    }
    // None of these created a prompt.
    app.get("/v1/prompts/out")
        .await
        .problem(404, "prompt_not_found");
    // Weights that are rounded in the sixth place still sum to 1.
    let thirds = [("a", 0.333_333_3), ("b", 0.666_666_6)];
    compose(&app, &thirds, "out").await.ok(201);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn many_at_once_are_one_version(pool: PgPool) {
    let app = TestApp::new(pool);
    publish(&app, "a", &prompt_file(1)).await;
    publish(&app, "b", &prompt_file(2)).await;
    let halves = [("a", 0.5), ("b", 0.5)];
    let send = || compose(&app, &halves, "out");
    let answers = futures::future::join_all((0..8).map(|_| send())).await;
    let made = answers.iter().filter(|answer| answer.status == 201);
    assert_eq!(made.count(), 1);
    for answer in &answers {
        assert_eq!(answer.json()["version"], 1, "{answer:?}");
    }
}

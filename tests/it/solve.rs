//! `/v1/ensembles/{id}/solve`: some sources of a finished ensemble, weighed again.

use promptweave::db::MIGRATOR;
use promptweave_domain::digest::Digest;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse};
use crate::ensembles::{Worker, fitting, furnished, post, request, until_state, upload, url};
use crate::fixtures::FakeComposer;

/// A finished ensemble of `digits`, `flowers` and `textures`, and the worker that made it.
async fn solved(app: &TestApp, objective: Value) -> (Value, Worker) {
    upload(app, "textures", &fitting(app, 3)).await;
    let mut request = request();
    let sources = ["digits", "flowers:1", "textures"].map(|name| json!({"prompt": name}));
    request["sources"] = json!(sources);
    request["objective"] = objective;
    let ensemble = post(app, &request).await.ok(202);
    assert_eq!(ensemble["urls"]["solve"], Value::Null);
    let worker = Worker::start(app, &FakeComposer::default());
    (until_state(app, &ensemble, "succeeded").await, worker)
}

async fn resolve(app: &TestApp, ensemble: &Value, body: &Value) -> TestResponse {
    app.post(&url(ensemble, "solve"), body).await
}

async fn lineage(app: &TestApp, ensemble: &Value) -> Value {
    let content = url(ensemble, "composed_prompt");
    let version = content.strip_suffix("/content").unwrap();
    app.get(&format!("{version}/lineage")).await.ok(200)
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_subset_is_solved_again_published_and_told_apart(pool: PgPool) {
    let app = furnished(pool).await;
    let (ensemble, worker) = solved(&app, json!({"trade_off": 0.25})).await;
    // Later versions do not belong to the ensemble.
    let newer = fitting(&app, 9).to_bytes();
    app.upload("/v1/prompts/digits/versions", newer)
        .await
        .ok(201);

    let subset = json!({"sources": [{"prompt": "textures:1"}, {"prompt": "digits"}]});
    let accepted = resolve(&app, &ensemble, &subset).await;
    let again = accepted.ok(202);
    assert_eq!(accepted.header("location"), url(&again, "self"));
    assert_eq!(accepted.header("retry-after"), "1");
    assert_ne!(again["spec_digest"], ensemble["spec_digest"]);
    let spec = &again["spec"];
    let statistics = Digest::of(b"statistics").to_string();
    let from = json!({"ensemble": ensemble["id"], "statistics": statistics});
    assert_eq!(spec["solved_from"], from);
    let mut objective = ensemble["spec"]["objective"].clone();
    assert_eq!(objective["fallback"], "single_best");
    objective["fallback"] = json!("none");
    assert_eq!(spec["objective"], objective);
    assert_eq!(spec["backbone"], ensemble["spec"]["backbone"]);
    assert_eq!(spec["target"]["dataset"], "pets");
    assert_eq!(spec["target"]["eval_split"], Value::Null);
    let short_id = &again["id"].as_str().unwrap()[28..];
    assert_eq!(spec["output"], format!("pets-{short_id}"));

    let done = until_state(&app, &again, "succeeded").await;
    let result = app.get(&url(&done, "result")).await.ok(200);
    let weights = result["source_weights"].as_array().unwrap();
    let named: Vec<_> = weights
        .iter()
        .map(|w| (&w["prompt"], &w["version"]))
        .collect();
    assert_eq!(
        named,
        [
            (&json!("textures"), &json!(1)),
            (&json!("digits"), &json!(1))
        ]
    );

    let made = lineage(&app, &done).await;
    let by = json!({"ensemble": again["id"], "solved_from": ensemble["id"]});
    assert_eq!(made["nodes"][0]["produced_by"], by);
    let edges = made["edges"].as_array().unwrap();
    let mut names: Vec<_> = edges
        .iter()
        .map(|edge| edge["parent"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["digits:1", "textures:1"]);
    let sum: f64 = edges
        .iter()
        .map(|edge| edge["weight"].as_f64().unwrap())
        .sum();
    assert!((sum - 1.0).abs() < 1e-6, "{made}");
    let whole = lineage(&app, &ensemble).await;
    let by = json!({"ensemble": ensemble["id"], "solved_from": null});
    assert_eq!(whole["nodes"][0]["produced_by"], by);
    let source = app
        .get("/v1/prompts/digits/versions/1/lineage")
        .await
        .ok(200);
    assert_eq!(source["nodes"][0]["produced_by"], Value::Null);

    // A solved ensemble can be solved again, from its remaining sources.
    let digits = json!({"sources": [{"prompt": "digits:1"}], "output": {"name": "alone"}});
    let alone = resolve(&app, &done, &digits).await.ok(202);
    assert_eq!(alone["spec"]["solved_from"]["ensemble"], done["id"]);
    assert_eq!(alone["spec"]["output"], "alone");
    until_state(&app, &alone, "succeeded").await;
    let flowers = json!({"sources": [{"prompt": "flowers"}]});
    resolve(&app, &done, &flowers)
        .await
        .problem(422, "unknown_source");
    worker.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_left_out_stays_but_for_what_needs_the_backbone(pool: PgPool) {
    let app = furnished(pool).await;
    let objective = json!({
        "trade_off": "validation", "experimental": {"refine": 3}, "head": {"shrinkage": 0.5},
        "alignment": {"variant": "mixture_uniform"},
    });
    let (ensemble, worker) = solved(&app, objective).await;
    let again = app.post_empty(&url(&ensemble, "solve")).await.ok(202);
    assert_eq!(again["spec"]["sources"], ensemble["spec"]["sources"]);
    let mut expected = ensemble["spec"]["objective"].clone();
    expected.as_object_mut().unwrap().remove("experimental");
    // The fake says that `validation` chose this.
    expected["trade_off"] = json!(0.5);
    assert_eq!(again["spec"]["objective"], expected);

    // The same request again is answered with this ensemble, which is over by then.
    until_state(&app, &again, "succeeded").await;
    let null = resolve(&app, &ensemble, &Value::Null).await.ok(200);
    assert_eq!(null["id"], again["id"]);

    // A given objective replaces the whole one.
    let body = json!({"objective": {"trade_off": "knee", "head": {"shrinkage": 0.5}}});
    let other = resolve(&app, &ensemble, &body).await.ok(202);
    assert_eq!(other["spec"]["objective"]["trade_off"], "knee");
    assert_eq!(
        other["spec"]["objective"]["alignment"]["variant"],
        "mixture_weighted"
    );
    until_state(&app, &other, "succeeded").await;
    worker.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_share_of_equal_weights_that_was_chosen_stays(pool: PgPool) {
    let app = furnished(pool).await;
    let (ensemble, worker) = solved(&app, json!({"experimental": {"uniform_mix": "auto"}})).await;
    let again = app.post_empty(&url(&ensemble, "solve")).await.ok(202);
    // The fake says that `auto` chose this.
    assert_eq!(
        again["spec"]["objective"]["experimental"],
        json!({"uniform_mix": 0.25})
    );
    let anew = json!({"objective": {"experimental": {"uniform_mix": "auto"}}});
    let refused = resolve(&app, &ensemble, &anew).await;
    refused.problem(422, "invalid_objective");
    worker.stop().await;
}

/// Notes in every result that the composed prompt fell back to a source.
async fn note_fallback(pool: &PgPool) {
    let fallback = json!({
        "prompt": "flowers",
        "validation_loss": 1.0,
        "composed_validation_loss": 1.5,
        "taken": true,
    });
    sqlx::query("UPDATE job SET result = jsonb_set(result, '{method,fallback}', $1)")
        .bind(fallback)
        .execute(pool)
        .await
        .unwrap();
}

/// Without the backbone nothing can be compared again, so a fallback to the single best source is repeated.
#[sqlx::test(migrator = "MIGRATOR")]
async fn what_fell_back_is_the_single_best_again(pool: PgPool) {
    let app = furnished(pool.clone()).await;
    let (ensemble, worker) = solved(&app, json!({"trade_off": 0.25})).await;
    note_fallback(&pool).await;
    let again = app.post_empty(&url(&ensemble, "solve")).await.ok(202);
    let objective = &again["spec"]["objective"];
    assert_eq!(objective["method"], "single_best", "{objective}");
    assert_eq!(objective["by"], "validation");
    // A request for the mixture gets it.
    let mixture = json!({"objective": {"trade_off": 0.25}, "output": {"name": "mixture"}});
    let mixture = resolve(&app, &ensemble, &mixture).await.ok(202);
    assert_eq!(mixture["spec"]["objective"]["trade_off"], 0.25);
    worker.stop().await;
}

/// The fallback of a pool is about its composed prompt, and the pool is solved again.
#[sqlx::test(migrator = "MIGRATOR")]
async fn a_pool_whose_prompt_fell_back_is_a_pool_again(pool: PgPool) {
    let app = furnished(pool.clone()).await;
    let (ensemble, worker) = solved(&app, json!({"method": "pool", "beta": 3})).await;
    assert_eq!(ensemble["spec"]["objective"]["fallback"], "single_best");
    note_fallback(&pool).await;
    let again = app.post_empty(&url(&ensemble, "solve")).await.ok(202);
    let objective = &again["spec"]["objective"];
    assert_eq!(objective["method"], "pool", "{objective}");
    assert_eq!(
        (&objective["beta"], &objective["fallback"]),
        (&json!(3.0), &json!("none"))
    );
    worker.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_cannot_be_solved_again_is_refused_with_its_place(pool: PgPool) {
    let app = furnished(pool).await;
    let waiting = post(&app, &request()).await.ok(202);
    let path = format!("{}/solve", url(&waiting, "self"));
    let early = app.post(&path, &json!({})).await;
    early.problem(409, "ensemble_not_finished");
    app.post_empty(&url(&waiting, "cancel")).await.ok(200);
    let late = app.post(&path, &json!({})).await;
    late.problem(409, "ensemble_cancelled");
    let nobody = "/v1/ensembles/01890a5d-ac96-774b-bcce-b302099a8057/solve";
    app.post_empty(nobody)
        .await
        .problem(404, "ensemble_not_found");

    let (ensemble, worker) = solved(&app, json!({"head": {"shrinkage": 0.5}})).await;
    worker.stop().await;
    // The registry has this version, but the ensemble does not.
    let newer = fitting(&app, 9).to_bytes();
    let newer = app
        .upload("/v1/prompts/digits/versions", newer)
        .await
        .ok(201);
    let by_digest = format!("digits@{}", newer["digest"].as_str().unwrap());
    let first = "/sources/0/prompt";
    let sources = |names: &[&str]| {
        let sources: Vec<_> = names.iter().map(|name| json!({"prompt": name})).collect();
        json!({"sources": sources})
    };
    let objective = |objective: Value| json!({"objective": objective});
    for (body, code, pointer) in [
        (sources(&[]), "no_sources", "/sources"),
        (sources(&["nobody"]), "unknown_source", first),
        (sources(&["digits:2"]), "unknown_source", first),
        (sources(&[&by_digest]), "unknown_source", first),
        (
            sources(&["digits", "flowers", "digits:1"]),
            "same_source",
            "/sources/2/prompt",
        ),
        (
            objective(json!({"trade_off": 2})),
            "invalid_objective",
            "/objective/trade_off",
        ),
        // The ensemble's own value is 0.5.
        (
            objective(json!({"trade_off": 0.5})),
            "invalid_objective",
            "/objective/head/shrinkage",
        ),
        (
            objective(json!({"head": {"shrinkage": 0.5}, "experimental": {"refine": 1}})),
            "invalid_objective",
            "/objective/experimental/refine",
        ),
        // There are 4 samples in 8 dimensions.
        (
            objective(json!({"head": {"shrinkage": 0.5}, "h_score": {"shrinkage": 0.0}})),
            "invalid_objective",
            "/objective/h_score/shrinkage",
        ),
        (json!({"priority": 1001}), "invalid_priority", "/priority"),
        (json!({"target": {}}), "invalid_body", "/target"),
    ] {
        let problem = resolve(&app, &ensemble, &body).await.problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
        if code == "unknown_source" {
            let detail = problem["detail"].as_str().unwrap();
            let theirs = "`digits:1`, `flowers:1`, `textures:1`";
            assert!(detail.ends_with(theirs), "{detail}");
        }
    }
    let list = app.get("/v1/ensembles").await.ok(200);
    let items = list["items"].as_array().unwrap();
    assert_eq!(items.len(), 2, "nothing more was queued");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn two_versions_of_one_prompt_are_told_apart(pool: PgPool) {
    let app = furnished(pool).await;
    let second = fitting(&app, 9).to_bytes();
    app.upload("/v1/prompts/digits/versions", second)
        .await
        .ok(201);
    let mut request = request();
    request["sources"] = json!([{"prompt": "digits:1"}, {"prompt": "digits:2"}]);
    let ensemble = post(&app, &request).await.ok(202);
    let worker = Worker::start(&app, &FakeComposer::default());
    let done = until_state(&app, &ensemble, "succeeded").await;
    worker.stop().await;
    let bare = json!({"sources": [{"prompt": "digits"}]});
    let problem = resolve(&app, &done, &bare).await;
    let problem = problem.problem(422, "ambiguous_source");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.ends_with("`digits:1`, `digits:2`"), "{detail}");
    let exact = json!({"sources": [{"prompt": "digits:2"}]});
    let again = resolve(&app, &done, &exact).await.ok(202);
    assert_eq!(again["spec"]["sources"][0]["version"], 2);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_body_is_json_or_not_there(pool: PgPool) {
    let app = TestApp::new(pool);
    let path = "/v1/ensembles/01890a5d-ac96-774b-bcce-b302099a8057/solve";
    let untyped = axum::http::Request::post(path).body("{}".into()).unwrap();
    app.send(untyped)
        .await
        .problem(415, "unsupported_media_type");
    app.post_text(path, "{")
        .await
        .problem(400, "malformed_json");
    app.post_text(path, "").await.problem(400, "malformed_json");
}

//! A request's mistakes are all reported at once, each with its place and in terms of JSON. References may be plain
//! names if there is nothing more to say.

use promptweave::db::MIGRATOR;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::ensembles::{Worker, furnished, until_state, url};
use crate::fixtures::FakeComposer;

/// Code and pointer of every mistake, in order.
fn mistakes(problem: &Value) -> Vec<(&str, &str)> {
    let errors = problem["errors"].as_array().unwrap().iter();
    errors
        .map(|error| (text(&error["code"]), text(&error["pointer"])))
        .collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn details(problem: &Value) -> String {
    let errors = problem["errors"].as_array().unwrap().iter();
    let details = errors.map(|error| text(&error["detail"]));
    details.collect::<Vec<_>>().join("\n")
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn no_mistake_hides_another(pool: PgPool) {
    let app = furnished(pool).await;
    let request = json!({
        "target": {"dataset": "nothing", "seed": -1},
        "sources": ["nobody", 5, {"prompt": "digits"}, {"prompt": "no-one:2"}, "digits:1"],
        "backbone": "huge",
        "objective": {
            "method": "spot", "top_k": 0, "trade_off": 0.5, "target_epochs": "five",
            "experimental": {"entropy": 0.1},
        },
        "output": {"name": "compose"},
        "priority": 5000,
        "colour": "red",
    });
    for path in ["/v1/ensembles", "/v1/ensembles/validate"] {
        let problem = app
            .post(path, &request)
            .await
            .problem(422, "invalid_request");
        let expected = [
            ("invalid_body", "/colour"),
            ("invalid_body", "/objective/trade_off"),
            ("invalid_body", "/objective/target_epochs"),
            ("invalid_body", "/sources/1"),
            ("invalid_body", "/target/seed"),
            ("invalid_priority", "/priority"),
            ("invalid_objective", "/objective/top_k"),
            ("invalid_objective", "/objective/experimental/entropy"),
            ("reserved_name", "/output/name"),
            ("unknown_dataset", "/target/dataset"),
            ("unknown_prompt", "/sources/0"),
            ("unknown_prompt", "/sources/3/prompt"),
            ("same_source", "/sources/4"),
            ("unknown_backbone", "/backbone"),
        ];
        assert_eq!(mistakes(&problem), expected, "{problem}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(
            detail.starts_with("14 mistakes; the first, at `/colour`: unknown field `colour`"),
            "{detail}"
        );
        let details = details(&problem);
        for part in [
            "unknown field `trade_off`: the method `spot` has `similarity`,",
            "`trade_off` is of `hgprompt_cv`, `hgprompt`",
            "expected a string or an object, found the number 5",
            "expected a whole number from 0, found the number -1",
        ] {
            assert!(details.contains(part), "{details}");
        }
        for rusts in ["struct", "map", "u64", "f64", "integer", "invalid type"] {
            assert!(!details.contains(rusts), "{details}");
        }
    }
    let list = app.get("/v1/ensembles").await.ok(200);
    assert_eq!(list["items"], json!([]), "nothing was queued");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn mistakes_of_one_kind_keep_its_code(pool: PgPool) {
    let app = furnished(pool).await;
    let request = json!({"target": "pets", "sources": ["nobody", "digits", "no-one"]});
    let answer = app.post("/v1/ensembles", &request).await;
    let problem = answer.problem(422, "unknown_prompt");
    let expected = [
        ("unknown_prompt", "/sources/0"),
        ("unknown_prompt", "/sources/2"),
    ];
    assert_eq!(mistakes(&problem), expected);
    // If a body cannot be read, everything of the wrong shape is reported.
    let answer = app
        .post(
            "/v1/ensembles",
            &json!({"target": 3, "sources": {}, "objective": []}),
        )
        .await;
    let problem = answer.problem(422, "invalid_body");
    let expected = [
        ("invalid_body", "/objective"),
        ("invalid_body", "/sources"),
        ("invalid_body", "/target"),
    ];
    assert_eq!(mistakes(&problem), expected);
    assert_eq!(
        details(&problem),
        "expected an object, found an array\nexpected an array, found an object\n\
         expected a string or an object, found the number 3"
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn tunings_and_rankings_tell_of_all_mistakes_too(pool: PgPool) {
    let app = furnished(pool).await;
    let tuning = json!({
        "target": "nothing", "start": "nobody", "backbone": "huge",
        "options": {"epochs": 0, "batch_size": 0, "method": "linear"},
        "output": {"name": "compose"}, "priority": -1,
    });
    let answer = app.post("/v1/tunings", &tuning).await;
    let problem = answer.problem(422, "invalid_request");
    let expected = [
        ("invalid_priority", "/priority"),
        ("invalid_options", "/options/epochs"),
        ("invalid_options", "/options/batch_size"),
        ("invalid_options", "/options/warmup_epochs"),
        ("invalid_options", "/options/method"),
        ("reserved_name", "/output/name"),
        ("unknown_dataset", "/target"),
        ("unknown_prompt", "/start"),
        ("unknown_backbone", "/backbone"),
    ];
    assert_eq!(mistakes(&problem), expected, "{problem}");
    let ranking = json!({
        "target": {"dataset": "pets", "split": "val", "eval_split": "test"},
        "sources": ["nobody", "digits"],
        "objective": {"target_epochs": 0, "method": "spot"},
    });
    let answer = app.post("/v1/rankings", &ranking).await;
    let problem = answer.problem(422, "invalid_request");
    let expected = [
        ("invalid_body", "/objective/method"),
        ("nothing_to_evaluate", "/target/eval_split"),
        ("one_class", "/target/split"),
        ("unknown_prompt", "/sources/0"),
    ];
    assert_eq!(mistakes(&problem), expected, "{problem}");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_name_alone_is_enough(pool: PgPool) {
    let app = furnished(pool).await;
    let full = json!({
        "target": {"dataset": "pets:1"},
        "sources": [{"prompt": "digits:1"}, {"prompt": "flowers"}],
    });
    let short = json!({"target": "pets:1", "sources": ["digits:1", "flowers"]});
    for path in ["/v1/ensembles", "/v1/rankings"] {
        let job = app.post(path, &full).await.ok(202);
        assert_eq!(app.post(path, &short).await.ok(202)["id"], job["id"]);
    }
    let mixed = json!({"target": "pets", "sources": ["digits:1", {"prompt": "flowers"}]});
    let plan = app.post("/v1/ensembles/validate", &mixed).await.ok(200);
    assert_eq!(plan["spec"]["sources"][1]["prompt"], "flowers");
    let start = json!({"target": "pets", "start": "digits"});
    let tuning = app.post("/v1/tunings", &start).await.ok(202);
    assert_eq!(tuning["spec"]["start"]["prompt"], "digits");

    let ensemble = app.post("/v1/ensembles", &short).await.ok(202);
    let worker = Worker::start(&app, &FakeComposer::default());
    let done = until_state(&app, &ensemble, "succeeded").await;
    worker.stop().await;
    let solve = url(&done, "solve");
    let some = app.post(&solve, &json!({"sources": ["flowers"]})).await;
    let solved = some.ok(202);
    assert_eq!(solved["spec"]["sources"].as_array().unwrap().len(), 1);
    let wrong = json!({
        "sources": ["nobody", {"prompt": "no-one"}],
        "objective": {"trade_off": 2, "fallback": "single_best", "head": {"kind": "ridge"}},
        "priority": -1,
    });
    let problem = app
        .post(&solve, &wrong)
        .await
        .problem(422, "invalid_request");
    let expected = [
        ("invalid_priority", "/priority"),
        ("unknown_source", "/sources/0"),
        ("unknown_source", "/sources/1/prompt"),
        ("invalid_objective", "/objective/trade_off"),
        ("invalid_objective", "/objective/fallback"),
        ("invalid_objective", "/objective/head/kind"),
    ];
    assert_eq!(mistakes(&problem), expected, "{problem}");
}

//! `/v1/prompts/{name}/aliases`: aliases are created, moved, protected, and used wherever a prompt is named.

use axum::body::Body;
use axum::http::{Method, Request, header};
use promptweave::db::MIGRATOR;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse, prompt_file};

const PRODUCTION: &str = "/v1/prompts/dtd/aliases/production";

/// Prompt `dtd` with versions 1 to 3.
async fn with_versions(pool: PgPool) -> TestApp {
    let app = TestApp::new(pool);
    app.post("/v1/prompts", &json!({"name": "dtd"}))
        .await
        .ok(201);
    for seed in 1..=3 {
        let file = prompt_file(seed).to_bytes();
        app.upload("/v1/prompts/dtd/versions", file).await.ok(201);
    }
    app
}

async fn send(
    app: &TestApp,
    method: Method,
    condition: &[(&str, &str)],
    body: Value,
) -> TestResponse {
    let mut request = Request::builder()
        .method(method)
        .uri(PRODUCTION)
        .header(header::CONTENT_TYPE, "application/json")
        .header("x-request-id", format!("asks-{}", body["version"]));
    for (name, value) in condition {
        request = request.header(*name, *value);
    }
    app.send(request.body(Body::from(body.to_string())).unwrap())
        .await
}

async fn put(app: &TestApp, condition: &[(&str, &str)], body: Value) -> TestResponse {
    send(app, Method::PUT, condition, body).await
}

async fn delete(app: &TestApp, condition: &[(&str, &str)]) -> TestResponse {
    send(app, Method::DELETE, condition, Value::Null).await
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_alias_moves_under_its_etag_and_keeps_its_history(pool: PgPool) {
    let app = with_versions(pool).await;
    let made = put(&app, &[("if-none-match", "*")], json!({"version": 1})).await;
    assert_eq!(made.ok(201)["version"], 1);
    assert_eq!(made.header("location"), PRODUCTION);
    let first = made.header("etag").to_owned();
    let twice = put(&app, &[("if-none-match", "*")], json!({"version": 2})).await;
    twice.problem(412, "precondition_failed");
    let unsaid = put(&app, &[], json!({"version": 2})).await;
    unsaid.problem(428, "precondition_required");

    let moved = put(&app, &[("if-match", &first)], json!({"version": 2})).await;
    assert_eq!(moved.ok(200)["version"], 2);
    let stale = put(&app, &[("if-match", &first)], json!({"version": 3})).await;
    stale.problem(412, "precondition_failed");
    let unknown = put(&app, &[("if-match", "*")], json!({"version": 9})).await;
    unknown.problem(422, "unknown_version");

    // An alias works wherever a version is named.
    let by_alias = app.get("/v1/prompts/dtd/versions/production").await.ok(200);
    assert_eq!(by_alias["version"], 2);
    let content = app.get("/v1/prompts/dtd/versions/production/content").await;
    assert_eq!(content.body, prompt_file(2).to_bytes());
    let prompt = app.get("/v1/prompts/dtd").await.ok(200);
    assert_eq!(prompt["aliases"], json!({"production": 2}));
    let listed = app.get("/v1/prompts/dtd/aliases").await.ok(200);
    assert_eq!(listed["items"][0]["alias"], "production");

    let known = Request::get(PRODUCTION).header(header::IF_NONE_MATCH, moved.header("etag"));
    let answer = app.send(known.body(Body::empty()).unwrap()).await;
    assert_eq!(answer.status, 304);

    delete(&app, &[])
        .await
        .problem(428, "precondition_required");
    let deleted = delete(&app, &[("if-match", moved.header("etag"))]).await;
    assert_eq!(deleted.status, 204);
    app.get(PRODUCTION).await.problem(404, "alias_not_found");
    let gone = app.get("/v1/prompts/dtd/versions/production").await;
    gone.problem(404, "version_not_found");
    // Created again, an alias never has an ETag that it had before it was deleted.
    let again = put(&app, &[], json!({"version": 1})).await;
    again.ok(201);
    assert_ne!(again.header("etag"), first);

    let history = app.get(&format!("{PRODUCTION}/history")).await.ok(200);
    let events: Vec<_> = history["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            (
                e["kind"].clone(),
                e["from_version"].clone(),
                e["to_version"].clone(),
            )
        })
        .collect();
    let expected = [
        (json!("created"), Value::Null, json!(1)),
        (json!("deleted"), json!(2), Value::Null),
        (json!("moved"), json!(1), json!(2)),
        (json!("created"), Value::Null, json!(1)),
    ];
    assert_eq!(events, expected);
    assert_eq!(history["items"][2]["request_id"], "asks-2");
    let never = app.get("/v1/prompts/dtd/aliases/other/history").await;
    never.problem(404, "alias_not_found");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_protected_alias_stays_where_it_is(pool: PgPool) {
    let app = with_versions(pool).await;
    let body = json!({"version": 1, "protected": true});
    put(&app, &[], body).await.ok(201);
    let any = [("if-match", "*")];
    for body in [
        json!({"version": 2}),
        // Unprotecting and moving in one step is refused too.
        json!({"version": 2, "protected": false}),
    ] {
        put(&app, &any, body).await.problem(409, "alias_protected");
    }
    delete(&app, &any).await.problem(409, "alias_protected");
    let body = json!({"version": 1, "protected": false});
    put(&app, &any, body).await.ok(200);
    assert_eq!(
        put(&app, &any, json!({"version": 2})).await.ok(200)["version"],
        2
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn of_twenty_moves_at_once_one_wins(pool: PgPool) {
    let app = with_versions(pool).await;
    let made = put(&app, &[], json!({"version": 1})).await;
    let etag = made.header("etag");
    let condition = [("if-match", etag)];
    let moves = (0..20).map(|i| put(&app, &condition, json!({"version": 2 + i % 2})));
    let answers = futures::future::join_all(moves).await;
    let won: Vec<_> = answers.iter().filter(|a| a.status == 200).collect();
    assert_eq!(won.len(), 1, "{answers:?}");
    for lost in answers.iter().filter(|a| a.status != 200) {
        lost.problem(412, "precondition_failed");
    }
    assert_eq!(app.get(PRODUCTION).await.ok(200), won[0].json());
    let history = app.get(&format!("{PRODUCTION}/history")).await.ok(200);
    assert_eq!(history["items"].as_array().unwrap().len(), 2);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn names_that_read_otherwise_are_no_aliases(pool: PgPool) {
    let app = with_versions(pool).await;
    for alias in ["3", "007", "sha256", "sha256-x", "Prod", "..%2fetc"] {
        let path = format!("/v1/prompts/dtd/aliases/{alias}");
        let request = Request::put(&path).header(header::CONTENT_TYPE, "application/json");
        let answer = app
            .send(request.body(Body::from(r#"{"version": 1}"#)).unwrap())
            .await;
        answer.problem(422, "invalid_path");
    }
}

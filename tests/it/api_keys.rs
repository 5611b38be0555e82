//! Keys and projects over HTTP: what is shown once, what is never shown, and whose keys a client sees.

use axum::body::Body;
use axum::http::{Method, Request, header};
use promptweave::db::MIGRATOR;
use promptweave::registry::DEFAULT_PROJECT;
use promptweave_domain::api_key::{ApiKey, Scope};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::app::{TestApp, TestResponse};

/// Sends a request with a key, and with a body if there is one.
async fn ask(
    app: &TestApp,
    key: &str,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> TestResponse {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::AUTHORIZATION, format!("Bearer {key}"));
    let request = match body {
        Some(json) => request
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(json.to_string())),
        None => request.body(Body::empty()),
    };
    app.send_as_is(request.unwrap()).await
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_key_is_shown_once_works_and_is_revoked(pool: PgPool) {
    let app = TestApp::new(pool);
    let body = json!({"name": "the nightly run", "scopes": ["read", "write"]});
    let made = app.post("/v1/api-keys", &body).await;
    let shown = made.ok(201);
    assert_eq!(made.header("cache-control"), "no-store");
    let (key, id) = (text(&shown["key"]), text(&shown["id"]));
    assert_eq!(key.parse::<ApiKey>().unwrap().id().to_string(), id);
    assert!(key.starts_with(text(&shown["prefix"])));
    assert_eq!(made.header("location"), format!("/v1/api-keys/{id}"));
    assert_eq!(shown["scopes"], json!(["read", "write"]));
    assert_eq!(shown["project"], "default");
    assert_eq!(shown["last_used_at"], Value::Null);

    // The key allows what its scopes say, and nothing else.
    let prompt = || Some(json!({"name": "dtd"}));
    let path = "/v1/prompts";
    ask(&app, key, Method::POST, path, prompt()).await.ok(201);
    let keys = ask(&app, key, Method::GET, "/v1/api-keys", None).await;
    keys.problem(403, "scope_missing");

    // The secret is never shown again.
    let secret = key.rsplit_once('_').unwrap().1;
    for path in ["/v1/api-keys".to_owned(), format!("/v1/api-keys/{id}")] {
        let answer = app.get(&path).await;
        answer.ok(200);
        assert!(!String::from_utf8_lossy(&answer.body).contains(secret));
    }
    let stored = app.get(&format!("/v1/api-keys/{id}")).await.ok(200);
    assert!(stored["last_used_at"].is_string());
    assert!(stored.get("key").is_none());

    let revoke = || {
        let request = Request::delete(format!("/v1/api-keys/{id}"));
        app.send(request.body(Body::empty()).unwrap())
    };
    for _ in 0..2 {
        let answer = revoke().await;
        assert_eq!((answer.status.as_u16(), answer.body.len()), (204, 0));
    }
    let late = ask(&app, key, Method::GET, path, None).await;
    late.problem(401, "unauthenticated");
    let stored = app.get(&format!("/v1/api-keys/{id}")).await.ok(200);
    assert!(stored["revoked_at"].is_string());
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_no_key_to_make_is_refused_by_field(pool: PgPool) {
    let app = TestApp::new(pool);
    let refusals = [
        (json!({"name": "a", "scopes": []}), "/scopes"),
        (json!({"name": "a", "scopes": ["root"]}), "/scopes/0"),
        (json!({"name": "", "scopes": ["read"]}), "/name"),
        (
            json!({"name": "x".repeat(129), "scopes": ["read"]}),
            "/name",
        ),
        (
            json!({"name": "a", "scopes": ["read"], "project": "b"}),
            "/project",
        ),
    ];
    for (body, pointer) in refusals {
        let problem = app.post("/v1/api-keys", &body).await;
        let problem = problem.problem(422, "invalid_body");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{body}");
    }
    let unknown = format!("/v1/api-keys/{}", Uuid::nil());
    app.get(&unknown).await.problem(404, "api_key_not_found");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn keys_come_in_pages_the_newest_first(pool: PgPool) {
    let app = TestApp::new(pool);
    for number in 0..5 {
        let body = json!({"name": format!("key {number}"), "scopes": ["read"]});
        app.post("/v1/api-keys", &body).await.ok(201);
    }
    let (mut names, mut token) = (Vec::new(), String::new());
    loop {
        let path = format!("/v1/api-keys?page_size=2{token}");
        let page = app.get(&path).await.ok(200);
        let items = page["items"].as_array().unwrap();
        names.extend(items.iter().map(|key| text(&key["name"]).to_owned()));
        match page["next_page_token"].as_str() {
            Some(next) => token = format!("&page_token={next}"),
            None => break,
        }
    }
    // The key that asks is listed too.
    assert_eq!(names.len(), 6);
    let made: Vec<_> = names.iter().filter(|n| n.starts_with("key ")).collect();
    assert_eq!(made, ["key 4", "key 3", "key 2", "key 1", "key 0"]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_project_comes_with_its_first_key_and_keeps_to_itself(pool: PgPool) {
    let app = TestApp::new(pool);
    let made = app.post("/v1/projects", &json!({"name": "vision"})).await;
    let shown = made.ok(201);
    assert_eq!(made.header("location"), "/v1/projects/vision");
    assert_eq!(made.header("cache-control"), "no-store");
    assert_eq!(shown["api_key"]["project"], "vision");
    let first = text(&shown["api_key"]["key"]);
    let again = app.post("/v1/projects", &json!({"name": "vision"})).await;
    again.problem(409, "name_taken");

    // The key opens its project, where the same name means another prompt.
    let prompt = json!({"name": "dtd"});
    app.post("/v1/prompts", &prompt).await.ok(201);
    let path = "/v1/prompts";
    let theirs = ask(&app, first, Method::POST, path, Some(prompt)).await;
    theirs.ok(201);

    // A project has its own keys, and `default` does too.
    let body = json!({"name": "theirs", "scopes": ["admin"]});
    let second = ask(&app, first, Method::POST, "/v1/api-keys", Some(body)).await;
    let second = second.ok(201);
    assert_eq!(second["project"], "vision");
    let of_default = app.make_key(DEFAULT_PROJECT, &[Scope::Admin]).await;
    let id = of_default.parse::<ApiKey>().unwrap().id();
    let theirs = text(&second["key"]);
    for method in [Method::GET, Method::DELETE] {
        let path = format!("/v1/api-keys/{id}");
        let answer = ask(&app, theirs, method.clone(), &path, None).await;
        answer.problem(404, "api_key_not_found");
        let path = format!("/v1/api-keys/{}", text(&second["id"]));
        let answer = ask(&app, &of_default, method, &path, None).await;
        answer.problem(404, "api_key_not_found");
    }

    // The operator sees all projects; a project sees itself.
    let names = |answer: &TestResponse| -> Vec<String> {
        let json = answer.ok(200);
        let items = json["items"].as_array().unwrap().iter();
        items.map(|it| text(&it["name"]).to_owned()).collect()
    };
    let path = "/v1/projects";
    assert_eq!(names(&app.get(path).await), ["default", "vision"]);
    let listed = ask(&app, theirs, Method::GET, path, None).await;
    assert_eq!(names(&listed), ["vision"]);
    let own = "/v1/projects/vision";
    ask(&app, theirs, Method::GET, own, None).await.ok(200);
    let other = ask(&app, theirs, Method::GET, "/v1/projects/default", None).await;
    other.problem(404, "project_not_found");
    let body = Some(json!({"name": "more"}));
    let refused = ask(&app, theirs, Method::POST, path, body).await;
    refused.problem(403, "not_the_default_project");
}

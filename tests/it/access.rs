//! Every operation × every scope × invalid keys, from the API's own document, so that a new route cannot be forgotten.

use axum::body::Body;
use axum::http::{Method, Request, header};
use promptweave::db::MIGRATOR;
use promptweave::registry::{DEFAULT_PROJECT, api_keys, projects};
use promptweave_domain::api_key::{ApiKey, Scope};
use secrecy::ExposeSecret;
use serde_json::json;
use sqlx::{PgPool, Row};
use uuid::Uuid;

use crate::app::{TestApp, TestResponse, prompt_file};

struct Operation {
    method: Method,
    /// The path with a value for every parameter.
    path: String,
    scope: String,
}

/// All operations below `/v1`.
fn operations() -> Vec<Operation> {
    let document = serde_json::to_value(promptweave::http::openapi::openapi()).unwrap();
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if !path.starts_with("/v1/") {
                assert_eq!(
                    operation["security"],
                    serde_json::json!([]),
                    "{path} is open"
                );
                continue;
            }
            for status in ["401", "403"] {
                assert!(
                    operation["responses"][status].is_object(),
                    "{method} {path}"
                );
            }
            let scope = operation["security"][0]["api_key"][0].as_str().unwrap();
            found.push(Operation {
                method: method.to_uppercase().parse().unwrap(),
                path: path
                    .replace("{id}", &Uuid::nil().to_string())
                    .replace("{delivery_id}", &Uuid::nil().to_string())
                    .replace("{name}", "missing")
                    .replace("{ref}", "1")
                    .replace("{alias}", "production"),
                scope: scope.to_owned(),
            });
        }
    }
    assert!(found.len() > 20);
    found
}

async fn ask(app: &TestApp, operation: &Operation, authorization: Option<&str>) -> TestResponse {
    let mut request = Request::builder()
        .method(operation.method.clone())
        .uri(&operation.path);
    if let Some(value) = authorization {
        request = request.header(header::AUTHORIZATION, value);
    }
    app.send_as_is(request.body(Body::empty()).unwrap()).await
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_key_opens_what_its_scope_says_and_nothing_else(pool: PgPool) {
    let app = TestApp::new(pool);
    for scope in Scope::ALL {
        let key = format!("Bearer {}", app.make_key(DEFAULT_PROJECT, &[scope]).await);
        for operation in operations() {
            let answer = ask(&app, &operation, Some(&key)).await;
            let what = format!("{} {} with {scope}", operation.method, operation.path);
            if operation.scope == scope.name() {
                assert!(
                    ![401, 403].contains(&answer.status.as_u16()),
                    "{what}: {answer:?}"
                );
                assert!(!answer.status.is_server_error(), "{what}: {answer:?}");
            } else {
                let problem = answer.problem(403, "scope_missing");
                let detail = problem["detail"].as_str().unwrap();
                assert!(
                    detail.contains(&format!("`{}`", operation.scope)),
                    "{what}: {detail}"
                );
                assert!(
                    answer
                        .header("www-authenticate")
                        .contains("insufficient_scope")
                );
            }
        }
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_not_a_key_of_ours_opens_nothing(pool: PgPool) {
    let app = TestApp::new(pool);
    let stranger = ApiKey::generate(Uuid::now_v7()).unwrap().text();
    let good = app.make_key(DEFAULT_PROJECT, &Scope::ALL).await;
    let revoked = app.make_key(DEFAULT_PROJECT, &Scope::ALL).await;
    let id = revoked.parse::<ApiKey>().unwrap().id();
    let mut conn = app.state.pool.acquire().await.unwrap();
    assert!(
        api_keys::revoke(&mut conn, DEFAULT_PROJECT, id)
            .await
            .unwrap()
    );
    // The id of a valid key with another key's secret: the prefix alone must not suffice.
    let (mine, theirs) = (
        good.rsplit_once('_').unwrap(),
        revoked.rsplit_once('_').unwrap(),
    );
    let mixed = format!("{}_{}", mine.0, theirs.1);
    let refused = [
        None,
        Some("Bearer".to_owned()),
        Some(format!("Basic {good}")),
        Some("Bearer pr_1_2".to_owned()),
        Some(format!("Bearer {}", stranger.expose_secret())),
        Some(format!("Bearer {revoked}")),
        Some(format!("Bearer {mixed}")),
        Some(format!("Bearer {}x", &good[..good.len() - 1])),
    ];
    for operation in operations() {
        for authorization in &refused {
            let answer = ask(&app, &operation, authorization.as_deref()).await;
            answer.problem(401, "unauthenticated");
            assert!(answer.header("www-authenticate").starts_with("Bearer"));
        }
    }
    for open in ["/livez", "/readyz", "/openapi.json", "/docs/"] {
        let request = Request::get(open).body(Body::empty()).unwrap();
        assert_eq!(app.send_as_is(request).await.status, 200, "{open}");
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_project_sees_nothing_of_another(pool: PgPool) {
    let app = TestApp::new(pool);
    app.post("/v1/prompts", &json!({"name": "dtd"}))
        .await
        .ok(201);
    let bytes = prompt_file(1).to_bytes();
    app.upload("/v1/prompts/dtd/versions", bytes.clone())
        .await
        .ok(201);

    let mut conn = app.state.pool.acquire().await.unwrap();
    let other = projects::create(&mut conn, &"other".parse().unwrap())
        .await
        .unwrap();
    let key = app.make_key(other.id, &Scope::ALL).await;
    let get = |path: &str| {
        let request = Request::get(path).header(header::AUTHORIZATION, format!("Bearer {key}"));
        app.send(request.body(Body::empty()).unwrap())
    };
    let digest = promptweave_domain::digest::Digest::of(&bytes);
    for path in [
        "/v1/prompts/dtd".to_owned(),
        "/v1/prompts/dtd/versions".to_owned(),
        "/v1/prompts/dtd/versions/1/content".to_owned(),
        format!("/v1/prompts/dtd/versions/{digest}/content"),
        "/v1/prompts/dtd/versions/1/lineage".to_owned(),
        "/v1/prompts/dtd/versions/1/peft".to_owned(),
        "/v1/prompts/dtd/aliases".to_owned(),
        "/v1/prompts/dtd/aliases/production".to_owned(),
        "/v1/prompts/dtd/aliases/production/history".to_owned(),
    ] {
        get(&path).await.problem(404, "prompt_not_found");
    }
    assert_eq!(get("/v1/prompts").await.ok(200)["items"], json!([]));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn the_table_of_keys_opens_nothing(pool: PgPool) {
    let app = TestApp::new(pool);
    let key = app.make_key(DEFAULT_PROJECT, &Scope::ALL).await;
    let dump: String = sqlx::query("SELECT string_agg(api_key::text, ' ') AS dump FROM api_key")
        .fetch_one(&app.state.pool)
        .await
        .unwrap()
        .get("dump");
    let secret = key.rsplit_once('_').unwrap().1;
    assert!(!dump.contains(secret) && !dump.contains(&secret[..secret.len() - 8]));
    // Every word of the database dump, sent as a key, must be refused.
    for word in dump.split(|c: char| !c.is_ascii_alphanumeric()) {
        let request =
            Request::get("/v1/prompts").header(header::AUTHORIZATION, format!("Bearer {word}"));
        let answer = app.send_as_is(request.body(Body::empty()).unwrap()).await;
        answer.problem(401, "unauthenticated");
    }
}

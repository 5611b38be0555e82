//! What all requests have in common: ids, limits, problem documents, and a database that comes and goes.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use promptweave::db;
use promptweave::db::{MIGRATOR, PoolSettings};
use serde_json::json;
use sqlx::PgPool;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::app::TestApp;

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_request_id_is_kept_or_made(pool: PgPool) {
    let app = TestApp::new(pool);
    let ask = async |id: &str| {
        let request = Request::get("/livez").header("x-request-id", id);
        let answer = app.send(request.body(Body::empty()).unwrap()).await;
        answer.header("x-request-id").to_owned()
    };
    assert_eq!(ask("client-7.a_B").await, "client-7.a_B");
    for unfit in ["", "two words", "\"quoted\"", &"x".repeat(129)] {
        let made = ask(unfit).await;
        assert!(made.parse::<uuid::Uuid>().is_ok(), "{unfit}: {made}");
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn errors_of_the_framework_are_problems_too(pool: PgPool) {
    let app = TestApp::new(pool);
    let problem = app.get("/v1/nothing").await.problem(404, "route_not_found");
    assert_eq!(problem["instance"], "/v1/nothing");
    let answer = app.post_empty("/v1/backbones/x").await;
    answer.problem(405, "method_not_allowed");
    assert!(answer.header("allow").contains("GET"));

    let answer = app.post_text("/v1/prompts", "{\"name\": ").await;
    answer.problem(400, "malformed_json");
    let answer = app.post_text("/v1/prompts", "{\"name\": \"a\"} x").await;
    answer.problem(400, "malformed_json");
    let answer = app
        .post("/v1/prompts", &json!({"name": "a", "tags": {"k": 1}}))
        .await;
    let problem = answer.problem(422, "invalid_body");
    assert_eq!(problem["errors"][0]["pointer"], "/tags/k");
    let answer = app
        .post("/v1/prompts", &json!({"name": "a", "nmae": 1}))
        .await;
    let problem = answer.problem(422, "invalid_body");
    assert_eq!(problem["errors"][0]["pointer"], "/nmae");
    // An array longer than its field is still valid JSON.
    let config = json!({"preprocessing": {"size": 98, "filter": "bicubic", "antialias": true, "mean": [0, 0, 0, 0]}});
    let body = json!({"name": "a", "directory": "vits", "config": config});
    let problem = app
        .post("/v1/backbones", &body)
        .await
        .problem(422, "invalid_body");
    assert_eq!(
        problem["errors"][0]["pointer"],
        "/config/preprocessing/mean"
    );
    app.post_empty("/v1/prompts")
        .await
        .problem(415, "unsupported_media_type");
    let request = Request::post("/v1/prompts/x/versions").header(header::CONTENT_TYPE, "image/png");
    let answer = app.send(request.body(Body::empty()).unwrap()).await;
    answer.problem(415, "unsupported_media_type");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn bodies_have_limits(pool: PgPool) {
    let app = TestApp::with_settings(pool, |settings| settings.max_upload_bytes = 1000);
    let answer = app.upload("/v1/prompts/x/versions", vec![0; 1001]).await;
    answer.problem(413, "body_too_large");
    let body = json!({"name": "a", "description": "x".repeat(2 << 20)});
    app.post("/v1/prompts", &body)
        .await
        .problem(413, "body_too_large");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_request_ends_in_time(pool: PgPool) {
    let app = TestApp::with_settings(pool, |settings| {
        settings.request_timeout = Duration::from_millis(50);
    });
    // A lock on the table blocks the request.
    let mut lock = app.state.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE prompt")
        .execute(&mut *lock)
        .await
        .unwrap();
    app.get("/v1/prompts").await.problem(503, "request_timeout");
    lock.rollback().await.unwrap();
    app.get("/livez").await.ok(200);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_went_wrong_inside_stays_inside(pool: PgPool) {
    let app = TestApp::new(pool);
    sqlx::query("ALTER TABLE prompt RENAME description TO secret_column")
        .execute(&app.state.pool)
        .await
        .unwrap();
    let problem = app.get("/v1/prompts").await.problem(500, "internal_error");
    let text = problem.to_string();
    assert!(
        !text.contains("secret_column") && !text.contains("description"),
        "{text}"
    );
}

#[sqlx::test(migrations = false)]
async fn a_database_without_the_schema_is_not_ready(pool: PgPool) {
    let app = TestApp::new(pool);
    app.get("/livez").await.ok(200);
    app.get("/readyz").await.problem(503, "not_migrated");
    MIGRATOR.run(&app.state.pool).await.unwrap();
    app.get("/readyz").await.ok(200);
}

/// A proxy to Postgres that can be cut: while `open` is false, connections are closed.
async fn proxy(host: String, port: u16, open: watch::Receiver<bool>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut open = open.clone();
            let host = host.clone();
            tokio::spawn(async move {
                if *open.borrow() {
                    let mut server = TcpStream::connect((host.as_str(), port)).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        _ = open.wait_for(|open| !open) => {}
                    }
                }
            });
        }
    });
    address.port()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_database_that_comes_back_is_used_again(pool: PgPool) {
    let (switch, open) = watch::channel(true);
    let options = pool.connect_options();
    let port = proxy(options.get_host().to_owned(), options.get_port(), open).await;
    let options = (*options).clone().host("127.0.0.1").port(port);
    let settings = PoolSettings {
        acquire_timeout: Duration::from_millis(300),
        ..PoolSettings::default()
    };
    let app = TestApp::new(db::pool(options, &settings));
    app.post("/v1/prompts", &json!({"name": "kept"}))
        .await
        .ok(201);

    switch.send(false).unwrap();
    for path in ["/v1/prompts", "/v1/prompts/kept", "/readyz"] {
        let answer = app.get(path).await;
        answer.problem(503, "database_unavailable");
        assert_eq!(answer.header("retry-after"), "5");
    }
    app.get("/livez").await.ok(200);

    switch.send(true).unwrap();
    app.get("/readyz").await.ok(200);
    app.get("/v1/prompts/kept").await.ok(200);
}

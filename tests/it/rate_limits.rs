//! Rate limits of clients.

use std::num::NonZeroU32;

use axum::body::Body;
use axum::http::{Request, header};
use promptweave::db::MIGRATOR;
use promptweave::http::rate_limit::RateLimit;
use promptweave::registry::DEFAULT_PROJECT;
use promptweave_domain::api_key::Scope;
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse};

/// Three requests at once, then one in a quarter of an hour, which no test lives to see.
fn limited(pool: PgPool) -> TestApp {
    TestApp::with_settings(pool, |settings| {
        settings.rate_limit = Some(RateLimit {
            per_second: 0.001,
            burst: NonZeroU32::new(3).unwrap(),
        });
    })
}

async fn get(app: &TestApp, path: &str, key: Option<&str>) -> TestResponse {
    let mut request = Request::get(path);
    if let Some(key) = key {
        request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    }
    app.send_as_is(request.body(Body::empty()).unwrap()).await
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn each_key_has_its_own_limit(pool: PgPool) {
    let app = limited(pool);
    let one = app.make_key(DEFAULT_PROJECT, &[Scope::Read]).await;
    let two = app.make_key(DEFAULT_PROJECT, &[Scope::Read]).await;
    for left in [2, 1, 0] {
        // Every answer counts: this last one is 403, for want of a scope.
        let path = ["/v1/api-keys", "/v1/prompts/x", "/v1/prompts"][left];
        let answer = get(&app, path, Some(&one)).await;
        assert_eq!(answer.status, [403, 404, 200][left], "{answer:?}");
        let limit = answer.header("ratelimit");
        assert!(
            limit.starts_with(&format!("\"default\";r={left};t=")),
            "{limit}"
        );
        assert_eq!(answer.header("ratelimit-policy"), "\"default\";q=3;w=3000");
    }
    let refused = get(&app, "/v1/prompts", Some(&one)).await;
    refused.problem(429, "rate_limited");
    let seconds: u32 = refused.header("retry-after").parse().unwrap();
    assert!((900..=1000).contains(&seconds), "{seconds}");
    assert!(refused.header("ratelimit").starts_with("\"default\";r=0;"));
    get(&app, "/v1/prompts", Some(&two)).await.ok(200);
    // Health checks are not counted.
    for _ in 0..5 {
        assert_eq!(get(&app, "/livez", None).await.status, 200);
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn who_has_no_key_is_limited_by_address(pool: PgPool) {
    let app = limited(pool);
    let key = app.make_key(DEFAULT_PROJECT, &[Scope::Read]).await;
    for key in [None, Some("nonsense"), None] {
        let answer = get(&app, "/v1/prompts", key).await;
        answer.problem(401, "unauthenticated");
        assert!(answer.header("ratelimit").starts_with("\"default\";r="));
    }
    for key in [None, Some("nonsense")] {
        let answer = get(&app, "/v1/prompts", key).await;
        answer.problem(429, "rate_limited");
    }
    // A client with a key does not wait for those without.
    get(&app, "/v1/prompts", Some(&key)).await.ok(200);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn without_a_limit_nothing_is_counted(pool: PgPool) {
    let app = TestApp::new(pool);
    let answer = app.get("/v1/prompts").await;
    answer.ok(200);
    assert_eq!(answer.header("ratelimit"), "");
}

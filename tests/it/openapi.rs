//! The API's document: the checked-in copy is current, and it is served with its viewer.

use promptweave::db::MIGRATOR;
use sqlx::PgPool;

use crate::app::TestApp;

#[test]
fn the_checked_in_document_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi/openapi.json");
    let checked_in = std::fs::read_to_string(path).unwrap();
    let current = promptweave::http::openapi::openapi()
        .to_pretty_json()
        .unwrap();
    assert!(
        checked_in.trim_end() == current,
        "openapi/openapi.json is out of date: run `make openapi` and commit it"
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn the_document_and_its_viewer_are_served(pool: PgPool) {
    let app = TestApp::new(pool);
    let served = app.get("/openapi.json").await.ok(200);
    assert_eq!(
        served,
        serde_json::to_value(promptweave::http::openapi::openapi()).unwrap()
    );
    let page = app.get("/docs/").await;
    assert_eq!(page.status, 200);
    assert!(String::from_utf8_lossy(&page.body).contains("swagger-ui"));
}

#[test]
fn every_operation_documents_its_errors_and_has_a_tag() {
    let document = serde_json::to_value(promptweave::http::openapi::openapi()).unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.contains_key("/v1/prompts/{name}/versions/{ref}/content"));
    for (path, item) in paths {
        for (method, operation) in item.as_object().unwrap() {
            let responses = operation["responses"].as_object().unwrap();
            // It would make every status a documented one.
            assert!(!responses.contains_key("default"), "{method} {path}");
            for (status, response) in responses {
                let problem = &response["content"]["application/problem+json"];
                let is_error = status.starts_with(['4', '5']);
                assert_eq!(problem.is_object(), is_error, "{method} {path} {status}");
            }
            assert!(responses.contains_key("500"), "{method} {path}");
            assert!(operation["tags"][0].is_string(), "{method} {path}");
            assert!(operation["summary"].is_string(), "{method} {path}");
        }
    }
}

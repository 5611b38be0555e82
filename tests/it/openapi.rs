//! The API's document: the checked-in copy is current, it is served with its viewer, and tools accept it.

use std::collections::BTreeSet;

use promptweave::db::MIGRATOR;
use promptweave_domain::specification::KINDS;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::TestApp;
use crate::contract::DOCUMENT;

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
            // A `default` would make every status a documented one.
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

/// Every operation with its method and path.
pub fn operations(document: &Value) -> impl Iterator<Item = (&str, &str, &Value)> {
    let paths = document["paths"].as_object().unwrap();
    paths.iter().flat_map(|(path, item)| {
        let operations = item.as_object().unwrap().iter();
        operations.map(move |(method, operation)| (method.as_str(), path.as_str(), operation))
    })
}

/// Visits every value of the document with its JSON pointer, but not inside examples.
fn each(value: &Value, pointer: &str, see: &mut dyn FnMut(&str, &Value)) {
    see(pointer, value);
    match value {
        Value::Object(fields) => {
            for (name, field) in fields.iter().filter(|(name, _)| *name != "example") {
                each(field, &format!("{pointer}/{name}"), see);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                each(item, &format!("{pointer}/{index}"), see);
            }
        }
        _ => {}
    }
}

#[test]
fn the_document_is_valid_openapi() {
    let schema = include_str!("../fixtures/openapi/schema-3.1.json");
    let schema: Value = serde_json::from_str(schema).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    let document = &*DOCUMENT;
    let errors: Vec<_> = validator
        .iter_errors(document)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
    // OpenAPI's own schema does not check these, because their keywords are JSON Schema's.
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        let valid = jsonschema::draft202012::meta::validate(schema);
        assert!(valid.is_ok(), "{name}: {valid:?}");
    }
}

#[test]
fn every_reference_leads_somewhere() {
    let document = &*DOCUMENT;
    each(document, "", &mut |pointer, value| {
        if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
            let target = document.pointer(reference.strip_prefix('#').unwrap());
            assert!(target.is_some(), "{pointer}: {reference}");
        }
    });
}

#[test]
fn every_response_is_described() {
    let document = &*DOCUMENT;
    for (method, path, operation) in operations(document) {
        for (status, response) in operation["responses"].as_object().unwrap() {
            let description = response["description"].as_str();
            assert!(
                description.is_some_and(|it| !it.is_empty()),
                "{method} {path} {status}"
            );
        }
    }
}

#[test]
fn formats_are_those_of_the_registry() {
    let known = BTreeSet::from(["int32", "int64", "double", "uuid", "date-time", "binary"]);
    each(&DOCUMENT, "", &mut |pointer, value| {
        if let Some(format) = value.get("format").and_then(Value::as_str) {
            assert!(known.contains(format), "{pointer}: {format}");
        }
    });
}

#[test]
fn no_parameter_may_be_null() {
    let document = &*DOCUMENT;
    for (method, path, operation) in operations(document) {
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let text = parameter["schema"].to_string();
            assert!(!text.contains("\"null\""), "{method} {path}: {parameter}");
        }
    }
}

#[test]
fn pages_name_the_schema_of_their_items() {
    let document = &*DOCUMENT;
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let pages = schemas
        .iter()
        .filter_map(|(name, schema)| Some((name.strip_prefix("Page_")?, schema)));
    let mut count = 0;
    for (item, page) in pages {
        let named = json!({"$ref": format!("#/components/schemas/{item}")});
        assert_eq!(page["properties"]["items"]["items"], named);
        count += 1;
    }
    assert!(count > 10, "{count}");
}

/// Generators know this form: a client then has bytes, not a list of numbers.
#[test]
fn files_are_binary_both_ways() {
    let document = &*DOCUMENT;
    let mut files = 0;
    for (method, path, operation) in operations(document) {
        let answers = operation["responses"].as_object().unwrap().values();
        for body in answers.chain([&operation["requestBody"]]) {
            for (kind, content) in body["content"].as_object().into_iter().flatten() {
                if kind.ends_with("json") || kind.starts_with("text/") {
                    continue;
                }
                let name = content["schema"]["$ref"].as_str().unwrap_or_default();
                let schema = document.pointer(name.trim_start_matches('#'));
                let schema = schema.unwrap_or(&content["schema"]);
                assert_eq!(schema["type"], "string", "{method} {path} {kind}");
                assert_eq!(schema["format"], "binary", "{method} {path} {kind}");
                files += 1;
            }
        }
        let takes = operation["requestBody"]["content"].as_object();
        if takes.is_some_and(|takes| !takes.keys().any(|kind| kind.ends_with("json"))) {
            let plain = takes.unwrap().contains_key("application/octet-stream");
            assert!(plain, "{method} {path}: a client that has bytes alone");
        }
    }
    assert!(files > 10, "{files}");
}

#[test]
fn it_says_where_the_api_is_and_what_needs_no_key() {
    let document = &*DOCUMENT;
    assert_eq!(document["servers"], json!([{"url": "/"}]));
    for (method, path, operation) in operations(document) {
        let keys = operation["security"].as_array().unwrap();
        assert_eq!(
            keys.is_empty(),
            !path.starts_with("/v1/"),
            "{method} {path}"
        );
    }
}

#[test]
fn streams_have_a_schema_of_their_own() {
    let document = &*DOCUMENT;
    let mut streams = 0;
    for (_, path, operation) in operations(document) {
        let content = &operation["responses"]["200"]["content"];
        if path.ends_with("/events") {
            let schema = "#/components/schemas/JobStreamEvent";
            assert_eq!(
                content["text/event-stream"]["schema"]["$ref"], schema,
                "{path}"
            );
            assert_eq!(
                content["application/json"]["schema"]["$ref"],
                "#/components/schemas/Events"
            );
            streams += 1;
        }
    }
    assert_eq!(streams, KINDS.len());
}

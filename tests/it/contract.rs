//! The API answers as its document says: every answer that a test gets is checked against the document.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::app::TestResponse;

/// The document that the server serves.
pub static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::to_value(promptweave::http::openapi::openapi()).unwrap());

/// Validators by the schema's reference; making one takes longer than using it.
static VALIDATORS: LazyLock<Mutex<HashMap<String, Arc<Validator>>>> = LazyLock::new(Mutex::default);

/// Panics if the answer's status, media type or body is not in the document. Paths and methods that the document does
/// not have are not checked.
#[track_caller]
pub fn check(method: &str, path: &str, answer: &TestResponse) {
    let method = method.to_lowercase();
    let Some(operation) = operation(&method, path) else {
        return;
    };
    let request = format!("{method} {path}: {answer:?}");
    let response = &operation["responses"][answer.status.as_str()];
    assert!(
        response.is_object(),
        "the status is not in the document: {request}"
    );
    let kind = answer.header("content-type").split(';').next().unwrap();
    if kind.is_empty() {
        assert_eq!(response["content"], Value::Null, "{request}");
        return;
    }
    let content = &response["content"][kind];
    assert!(
        content.is_object(),
        "{kind} is not in the document: {request}"
    );
    if !kind.ends_with("json") {
        return;
    }
    let validator = validator(&content["schema"]);
    let body = answer.json();
    let errors: Vec<_> = validator
        .iter_errors(&body)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?} of {request}");
}

/// The operation that answers; a path without variables goes before one with them.
fn operation(method: &str, path: &str) -> Option<&'static Value> {
    let path: Vec<_> = path.split('?').next()?.split('/').collect();
    let fits = |template: &str| {
        let template: Vec<_> = template.split('/').collect();
        let same = |(part, given): (&&str, &&str)| part.starts_with('{') || part == given;
        template.len() == path.len() && template.iter().zip(&path).all(same)
    };
    let paths = DOCUMENT["paths"].as_object().unwrap();
    let (_, item) = paths
        .iter()
        .filter(|(template, _)| fits(template))
        .min_by_key(|(template, _)| template.matches('{').count())?;
    item.get(method)
}

fn validator(schema: &Value) -> Arc<Validator> {
    let mut validators = VALIDATORS.lock().unwrap();
    let make = || {
        let mut schema = schema.clone();
        schema["components"] = json!(DOCUMENT["components"]);
        Arc::new(jsonschema::draft202012::new(&schema).unwrap())
    };
    validators
        .entry(schema.to_string())
        .or_insert_with(make)
        .clone()
}

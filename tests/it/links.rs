//! OpenAPI links lead somewhere: checked by the document, and by following them.

use axum::body::Body;
use axum::http::{Method, Request};
use promptweave::db::MIGRATOR;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse, prompt_file};
use crate::ensembles::{furnished, post, request};

fn document() -> Value {
    serde_json::to_value(promptweave::http::openapi::openapi()).unwrap()
}

struct Operation<'a> {
    method: &'a str,
    path: &'a str,
    body: &'a Value,
}

impl Operation<'_> {
    fn id(&self) -> &str {
        self.body["operationId"].as_str().unwrap()
    }

    fn parameter(&self, name: &str) -> Option<&Value> {
        let parameters = self.body["parameters"].as_array()?;
        parameters.iter().find(|it| it["name"] == name)
    }
}

fn operations(document: &Value) -> Vec<Operation<'_>> {
    let paths = document["paths"].as_object().unwrap().iter();
    let operations = paths.flat_map(|(path, item)| {
        let item = item.as_object().unwrap().iter();
        item.map(move |(method, body)| Operation { method, path, body })
    });
    operations.collect()
}

/// Whether a value of this schema may have something at `pointer`.
fn has(document: &Value, schema: &Value, pointer: &[&str]) -> bool {
    if let Some(reference) = schema["$ref"].as_str() {
        let place = reference.strip_prefix('#').unwrap();
        return has(document, document.pointer(place).unwrap(), pointer);
    }
    let [first, rest @ ..] = pointer else {
        return true;
    };
    let variants = ["allOf", "oneOf", "anyOf"].into_iter();
    let mut variants = variants.flat_map(|of| schema[of].as_array().into_iter().flatten());
    let inside = match first.parse::<usize>() {
        Ok(_) => schema.get("items"),
        Err(_) => schema["properties"].get(first),
    };
    inside.is_some_and(|inside| has(document, inside, rest))
        || variants.any(|variant| has(document, variant, pointer))
}

#[test]
fn every_link_fits_both_ends() {
    let document = document();
    let operations = operations(&document);
    let mut followed = 0;
    for from in &operations {
        for (status, response) in from.body["responses"].as_object().unwrap() {
            let Some(links) = response["links"].as_object() else {
                continue;
            };
            let schema = &response["content"]["application/json"]["schema"];
            for (name, link) in links {
                followed += 1;
                let what = format!("{} {status} → {name}", from.id());
                let target = link["operationId"].as_str().unwrap();
                let target = operations.iter().find(|it| it.id() == target);
                let target = target.unwrap_or_else(|| panic!("{what}: no such operation"));
                let parameters = link["parameters"].as_object().unwrap();
                for (parameter, expression) in parameters {
                    assert!(target.parameter(parameter).is_some(), "{what}: {parameter}");
                    let expression = expression.as_str().unwrap();
                    let pointer = expression.strip_prefix("$response.body#/").unwrap();
                    let pointer: Vec<_> = pointer.split('/').collect();
                    assert!(has(&document, schema, &pointer), "{what}: {expression}");
                }
                for needed in target.body["parameters"].as_array().into_iter().flatten() {
                    let name = needed["name"].as_str().unwrap();
                    let given = parameters.contains_key(name);
                    assert!(given || needed["required"] != true, "{what}: no {name}");
                }
            }
        }
    }
    assert!(followed > 50, "{followed}");
}

#[test]
fn what_is_made_is_led_to() {
    let document = document();
    for operation in operations(&document) {
        let responses = operation.body["responses"].as_object().unwrap();
        let scope = operation.body["security"][0]["api_key"][0].as_str();
        if operation.method != "post" || !matches!(scope, Some("write" | "run")) {
            continue;
        }
        for (status, response) in responses {
            let made = ["201", "202"].contains(&status.as_str());
            let led = response["links"].is_object();
            assert!(
                led || !made,
                "{} {status}: add it to src/http/links.rs",
                operation.id()
            );
        }
    }
}

/// Follows the read-only links of an answer; returns each link's name and the status it got.
async fn follow(app: &TestApp, from: &str, answer: &TestResponse) -> Vec<(String, u16)> {
    let document = document();
    let operations = operations(&document);
    let found = |id: &str| operations.iter().find(|it| it.id() == id).unwrap();
    let status = answer.status.as_u16().to_string();
    let links = &found(from).body["responses"][status]["links"];
    let mut answers = Vec::new();
    for (name, link) in links.as_object().unwrap() {
        let target = found(link["operationId"].as_str().unwrap());
        if target.method != "get" {
            continue;
        }
        let mut path = target.path.to_owned();
        for (parameter, expression) in link["parameters"].as_object().unwrap() {
            let pointer = expression.as_str().unwrap().split_once('#').unwrap().1;
            let value = match answer.json().pointer(pointer).unwrap() {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            path = path.replace(&format!("{{{parameter}}}"), &value);
        }
        let request = Request::builder().method(Method::GET).uri(path);
        let answer = app.send(request.body(Body::empty()).unwrap()).await;
        answers.push((name.clone(), answer.status.as_u16()));
    }
    answers
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn links_of_what_was_made_can_be_followed(pool: PgPool) {
    let app = furnished(pool).await;
    let named = |answers: &[(&str, u16)]| -> Vec<(String, u16)> {
        let owned = answers
            .iter()
            .map(|(name, status)| ((*name).to_owned(), *status));
        owned.collect()
    };
    let prompt = app.post("/v1/prompts", &json!({"name": "dtd"})).await;
    let expected = named(&[
        ("get_prompt", 200),
        ("list_aliases", 200),
        ("list_versions", 200),
    ]);
    assert_eq!(follow(&app, "create_prompt", &prompt).await, expected);

    let path = "/v1/prompts/dtd/versions";
    for status in [201, 200] {
        let version = app.upload(path, prompt_file(1).to_bytes()).await;
        version.ok(status);
        let expected = named(&[
            ("export_peft", 200),
            ("get_content", 200),
            ("get_lineage", 200),
            ("get_prompt", 200),
            ("get_version", 200),
            ("list_versions", 200),
        ]);
        assert_eq!(follow(&app, "publish_version", &version).await, expected);
    }

    let ensemble = post(&app, &request()).await;
    ensemble.ok(202);
    let expected = named(&[
        ("get_ensemble", 200),
        ("get_ensemble_result", 409),
        ("get_ensemble_statistics", 409),
        ("list_ensemble_events", 200),
    ]);
    assert_eq!(follow(&app, "create_ensemble", &ensemble).await, expected);
}

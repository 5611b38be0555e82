//! An example for every JSON body, which "Try it out" of `/docs` fills in.
//!
//! Each example is accepted unchanged if the resources that it names exist: backbone `vit-s14`, dataset `food` with
//! images in `train` and `test`, prompts `dtd` and `svhn`. `tests/it/examples.rs` sends them all.

use serde_json::{Value, json};
use utoipa::openapi::{OpenApi, RefOr};

use crate::http::openapi::operations;

/// Gives every JSON body its example.
pub(super) fn add(document: &mut OpenApi) {
    for (_, _, operation) in operations(document) {
        let example = operation.operation_id.as_deref().and_then(example);
        let Some(RefOr::T(body)) = &mut operation.request_body else {
            continue;
        };
        for (media_type, content) in &mut body.content {
            if let RefOr::T(content) = content
                && media_type.ends_with("json")
            {
                content.example.clone_from(&example);
            }
        }
    }
}

fn example(operation: &str) -> Option<Value> {
    let sources = json!([{"prompt": "dtd"}, {"prompt": "svhn"}]);
    Some(match operation {
        "create_api_key" => json!({"name": "continuous integration", "scopes": ["read", "run"]}),
        "create_project" => json!({"name": "vision"}),
        "register_backbone" => json!({"name": "vit-s14", "directory": "vit_s14_focus"}),
        "register_dataset" => json!({"name": "food", "directory": "target"}),
        "create_prompt" => json!({
            "name": "dtd",
            "description": "tells textures apart",
            "tags": {"domain": "texture"},
        }),
        "change_prompt" => json!({"description": "tells textures apart", "tags": {"old": null}}),
        "set_alias" => json!({"version": 1, "protected": false}),
        "compose_prompt" => json!({
            "sources": [{"prompt": "dtd", "weight": 0.75}, {"prompt": "svhn", "weight": 0.25}],
            "output": {"name": "dtd-and-svhn"},
        }),
        "create_ensemble" | "validate_ensemble" => json!({
            "backbone": "vit-s14",
            "target": {"dataset": "food", "split": "train", "eval_split": "test"},
            "sources": sources,
            "output": {"name": "food-composed"},
        }),
        "solve_ensemble" => json!({
            "sources": [{"prompt": "dtd"}],
            "output": {"name": "food-of-dtd"},
        }),
        "create_tuning" => json!({
            "backbone": "vit-s14",
            "target": {"dataset": "food", "split": "train", "eval_split": "test"},
            "start": {"prompt": "dtd"},
            "options": {"epochs": 10},
            "output": {"name": "food-tuned"},
        }),
        "create_ranking" => json!({
            "backbone": "vit-s14",
            "target": {"dataset": "food", "split": "train"},
            "sources": sources,
        }),
        "create_prediction" => json!({
            "model": "dtd",
            "dataset": "food",
            "split": "test",
            "top_k": 3,
            "format": "csv",
        }),
        "create_webhook" => json!({
            "url": "https://receiver.example/promptweave",
            "event_types": ["ensemble.succeeded", "ensemble.failed"],
            "description": "tells the nightly build",
        }),
        "change_webhook" => json!({"disabled": true}),
        _ => return None,
    })
}

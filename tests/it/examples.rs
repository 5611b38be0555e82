//! The document's examples, which "Try it out" fills in: each is accepted if what it names exists.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::{Request, header};
use promptweave::db::MIGRATOR;
use promptweave_formats::backbone::Backbone;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse, head, png, prompt_file, tiny_backbone, write_files};
use crate::contract::DOCUMENT;
use crate::ensembles::{Worker, until_state};
use crate::fixtures::FakeComposer;
use crate::openapi::operations;

/// Sends the examples, and records which were sent.
struct Examples {
    app: TestApp,
    sent: BTreeSet<&'static str>,
}

impl Examples {
    /// Sends the example of an operation to a path with its variables filled in.
    async fn send(
        &mut self,
        operation_id: &'static str,
        variables: &[(&str, &str)],
    ) -> TestResponse {
        let found = operations(&DOCUMENT).find(|(_, _, it)| it["operationId"] == operation_id);
        let (method, path, operation) = found.unwrap();
        let content = operation["requestBody"]["content"].as_object().unwrap();
        let (media_type, content) = content.iter().next().unwrap();
        let mut path = path.to_owned();
        for (name, value) in variables {
            path = path.replace(&format!("{{{name}}}"), value);
        }
        let request = Request::builder()
            .method(method.to_uppercase().as_str())
            .uri(path)
            .header(header::IF_MATCH, "*")
            .header(header::CONTENT_TYPE, media_type);
        self.sent.insert(operation_id);
        let body = Body::from(content["example"].to_string());
        self.app.send(request.body(body).unwrap()).await
    }

    /// Uploads a prompt's first version, made for the backbone.
    async fn upload(&self, name: &str, seed: u64) {
        let backbone = Backbone::open(&self.app.root("vit_s14_focus")).unwrap();
        let mut file = prompt_file(seed);
        file.head = Some(head(seed));
        let metadata = file.metadata.as_mut().unwrap();
        metadata.backbone_digest = Some(backbone.digest);
        metadata.preprocessing_id = Some(backbone.config.preprocessing.id());
        let path = format!("/v1/prompts/{name}/versions");
        self.app.upload(&path, file.to_bytes()).await.ok(201);
    }
}

fn id(made: &Value) -> &str {
    made["id"].as_str().unwrap()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn every_example_is_accepted(pool: PgPool) {
    let app = TestApp::new(pool);
    tiny_backbone(&app.root("vit_s14_focus"), 1, 4);
    let images: Vec<_> = (0..4).map(png).collect();
    let files = [
        "train/cat/1.png",
        "train/dog/2.png",
        "test/cat/3.png",
        "test/dog/4.png",
    ];
    let files: Vec<_> = files
        .into_iter()
        .zip(images.iter().map(Vec::as_slice))
        .collect();
    write_files(&app.root("target"), &files);
    let mut examples = Examples {
        app,
        sent: BTreeSet::new(),
    };

    examples.send("register_backbone", &[]).await.ok(201);
    examples.send("register_dataset", &[]).await.ok(201);
    examples.send("create_prompt", &[]).await.ok(201);
    let other = json!({"name": "svhn"});
    examples.app.post("/v1/prompts", &other).await.ok(201);
    examples.upload("dtd", 1).await;
    examples.upload("svhn", 2).await;
    examples
        .send("change_prompt", &[("name", "dtd")])
        .await
        .ok(200);
    let alias = [("name", "dtd"), ("alias", "production")];
    // This alias is new, so there is nothing that it could match.
    let request = Request::put("/v1/prompts/dtd/aliases/production")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(json!({"version": 1}).to_string()));
    examples.app.send(request.unwrap()).await.ok(201);
    examples.send("set_alias", &alias).await.ok(200);
    examples.send("compose_prompt", &[]).await.ok(201);

    examples.send("validate_ensemble", &[]).await.ok(200);
    let ensemble = examples.send("create_ensemble", &[]).await.ok(202);
    examples.send("create_tuning", &[]).await.ok(202);
    examples.send("create_ranking", &[]).await.ok(202);
    examples.send("create_prediction", &[]).await.ok(202);
    let worker = Worker::start(&examples.app, &FakeComposer::default());
    until_state(&examples.app, &ensemble, "succeeded").await;
    let of_it = [("id", id(&ensemble))];
    examples.send("solve_ensemble", &of_it).await.ok(202);
    worker.stop().await;

    examples.send("create_project", &[]).await.ok(201);
    examples.send("create_api_key", &[]).await.ok(201);
    let webhook = examples.send("create_webhook", &[]).await.ok(201);
    let of_it = [("id", id(&webhook))];
    examples.send("change_webhook", &of_it).await.ok(200);

    for (method, path, operation) in operations(&DOCUMENT) {
        let content = operation["requestBody"]["content"].as_object();
        for (media_type, content) in content.into_iter().flatten() {
            if media_type.ends_with("json") {
                assert!(
                    content["example"].is_object(),
                    "{method} {path} has no example"
                );
                let operation_id = operation["operationId"].as_str().unwrap();
                assert!(
                    examples.sent.contains(operation_id),
                    "{operation_id} was not sent"
                );
            }
        }
    }
}

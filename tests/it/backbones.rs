//! `/v1/backbones`: registering a folder, and getting it back from the blob store.

use promptweave::db::MIGRATOR;
use promptweave::domain::backbone::{Backbone, CONFIG_FILE, MODEL_FILE};
use promptweave::registry::{DEFAULT_PROJECT, backbones};
use serde_json::json;
use sqlx::PgPool;

use crate::app::{TestApp, WIDTH, tiny_backbone, write_files};

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_registered_backbone_needs_its_folder_no_more(pool: PgPool) {
    let app = TestApp::new(pool);
    let dir = app.root("tiny");
    tiny_backbone(&dir, 1, 4);
    let opened = Backbone::open(&dir).unwrap();
    let body = json!({"name": "vit-tiny", "directory": "tiny"});
    let answer = app.post("/v1/backbones", &body).await;
    let backbone = answer.ok(201);
    assert_eq!(answer.header("location"), "/v1/backbones/vit-tiny");
    assert_eq!(backbone["digest"], opened.digest.to_string());
    assert_eq!(backbone["embed_dim"], WIDTH);
    assert_eq!(backbone["preprocessing_id"], "4-bicubic-imagenet");
    assert_eq!(backbone["config"]["architecture"], "vit_tiny_test");
    assert_eq!(app.get("/v1/backbones/vit-tiny").await.ok(200), backbone);
    assert_eq!(
        app.get("/v1/backbones").await.ok(200)["items"],
        json!([backbone])
    );
    // The same folder once more.
    assert_eq!(app.post("/v1/backbones", &body).await.ok(200), backbone);

    std::fs::remove_dir_all(&dir).unwrap();
    let mut conn = app.state.pool.acquire().await.unwrap();
    let name = "vit-tiny".parse().unwrap();
    let found = backbones::find(&mut conn, DEFAULT_PROJECT, &name).await;
    let copy = app.root("copy");
    backbones::unpack(&app.state.blobs, &found.unwrap().unwrap(), &copy)
        .await
        .unwrap();
    let copy = Backbone::open(&copy).unwrap();
    assert_eq!((copy.digest, copy.config), (opened.digest, opened.config));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn one_backbone_has_one_name_per_preprocessing(pool: PgPool) {
    let app = TestApp::new(pool);
    tiny_backbone(&app.root("tiny"), 1, 4);
    tiny_backbone(&app.root("larger"), 1, 6);
    tiny_backbone(&app.root("other"), 2, 4);
    let register = async |name: &str, directory: &str| {
        let body = json!({"name": name, "directory": directory});
        app.post("/v1/backbones", &body).await
    };
    register("tiny", "tiny").await.ok(201);
    let problem = register("again", "tiny")
        .await
        .problem(409, "backbone_exists");
    assert!(problem["detail"].as_str().unwrap().contains("`tiny`"));
    register("tiny", "other").await.problem(409, "name_taken");
    register("larger", "larger").await.ok(201);
    register("other", "other").await.ok(201);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn bad_folders_are_refused_without_the_servers_paths(pool: PgPool) {
    let app = TestApp::new(pool);
    write_files(&app.root("empty"), &[]);
    tiny_backbone(&app.root("broken"), 1, 4);
    write_files(
        &app.root("broken"),
        &[(MODEL_FILE, b"not safetensors, but long enough")],
    );
    tiny_backbone(&app.root("odd"), 1, 4);
    let config = std::fs::read_to_string(app.root("odd").join(CONFIG_FILE)).unwrap();
    let config = config.replace("\"depth\":1", "\"depth\":2");
    write_files(&app.root("odd"), &[(CONFIG_FILE, config.as_bytes())]);
    for (directory, code, detail) in [
        (
            "empty",
            "invalid_backbone",
            "cannot read `empty/config.json`",
        ),
        (
            "broken",
            "invalid_backbone",
            "`broken/model.safetensors` is not a safetensors file",
        ),
        (
            "odd",
            "invalid_backbone",
            "tensor `blocks.1.attn.proj.bias` is missing",
        ),
        (
            "nowhere",
            "unknown_directory",
            "there is no directory `nowhere`",
        ),
        (
            "../..",
            "unknown_directory",
            "there is no directory `../..`",
        ),
    ] {
        let body = json!({"name": "bad", "directory": directory});
        let problem = app.post("/v1/backbones", &body).await.problem(422, code);
        assert!(
            problem["detail"].as_str().unwrap().starts_with(detail),
            "{problem}"
        );
        assert!(
            !problem
                .to_string()
                .contains(app.dir.path().to_str().unwrap()),
            "{problem}"
        );
        assert_eq!(problem["errors"][0]["pointer"], "/directory");
    }
    app.get("/v1/backbones/bad")
        .await
        .problem(404, "backbone_not_found");
}

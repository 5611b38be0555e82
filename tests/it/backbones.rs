//! `/v1/backbones`: registering a folder, and getting it back from the blob store.

use std::path::Path;

use axum::body::Body;
use axum::http::Request;
use promptweave::db::MIGRATOR;
use promptweave::registry::{DEFAULT_PROJECT, backbones};
use promptweave_formats::backbone::{Backbone, CONFIG_FILE, MODEL_FILE};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, WIDTH, tiny_backbone, write_files};
use crate::archives::{tar, zip};

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
    // Registering the same folder again answers with the existing backbone.
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
            "`empty` has neither `model.safetensors`",
        ),
        (
            "broken",
            "invalid_backbone",
            "cannot take tensors from `broken/model.safetensors`: the file is of an unknown kind",
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

/// Checkpoints of the same weights, written by timm, transformers, DINOv2 and vision_transformer
/// (scripts/reference/checkpoints.py).
#[sqlx::test(migrator = "MIGRATOR")]
async fn a_checkpoint_of_any_library_is_the_same_backbone(pool: PgPool) {
    let app = TestApp::new(pool);
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints");
    let place = |name: &str| {
        let files: Vec<_> = (std::fs::read_dir(fixtures.join(name)).unwrap())
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
            .collect();
        for (path, bytes) in files {
            let name_of_file = path.file_name().unwrap().to_str().unwrap();
            write_files(&app.root(name), &[(name_of_file, &bytes)]);
        }
    };
    let register = async |name: &str, config: Value| {
        place(name);
        let resource = name.replace('_', "-");
        let body = json!({"name": resource, "directory": name, "config": config});
        app.post("/v1/backbones", &body).await
    };
    let preprocessing = json!({
        "size": 8, "filter": "bicubic", "antialias": true,
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    });
    let given = json!({"num_heads": 2, "preprocessing": preprocessing});

    // transformers' files have all settings.
    let first = register("hf_vit", json!(null)).await;
    let first = first.ok(201);
    assert_eq!(first["config"]["num_heads"], 2);
    assert_eq!(first["config"]["preprocessing"], preprocessing);
    for name in ["timm", "google"] {
        let same = register(name, given.clone())
            .await
            .problem(409, "backbone_exists");
        assert!(
            same["detail"].as_str().unwrap().contains("`hf-vit`"),
            "{same}"
        );
    }
    let scaled = register("dinov2", given.clone()).await;
    assert_ne!(scaled.ok(201)["digest"], first["digest"]);
    let same = register("hf_dinov2", given.clone())
        .await
        .problem(409, "backbone_exists");
    assert!(
        same["detail"].as_str().unwrap().contains("`dinov2`"),
        "{same}"
    );

    // A setting that no file has must be given.
    let unsaid = register("timm", json!(null))
        .await
        .problem(422, "missing_setting");
    assert_eq!(unsaid["errors"][0]["pointer"], "/config/num_heads");
    let pickle = std::fs::read(fixtures.join("pickled.pth")).unwrap();
    write_files(&app.root("pickled"), &[(MODEL_FILE, &pickle)]);
    let body = json!({"name": "pickled", "directory": "pickled"});
    let refused = app
        .post("/v1/backbones", &body)
        .await
        .problem(422, "invalid_backbone");
    assert!(
        refused["detail"]
            .as_str()
            .unwrap()
            .contains("a zip of pickles"),
        "{refused}"
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_uploaded_folder_is_the_backbone_that_its_directory_is(pool: PgPool) {
    let app = TestApp::new(pool);
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints");
    let files = |name: &str| -> Vec<(String, Vec<u8>)> {
        (std::fs::read_dir(fixtures.join(name)).unwrap())
            .map(|entry| entry.unwrap().path())
            .map(|path| {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, std::fs::read(path).unwrap())
            })
            .collect()
    };
    let put = async |name: &str, query: &str, archive: Vec<u8>| {
        let request = Request::put(format!("/v1/backbones/{name}{query}"));
        app.send(request.body(Body::from(archive)).unwrap()).await
    };
    let borrowed = |files: &'_ [(String, Vec<u8>)], folder: &str| -> Vec<(String, Vec<u8>)> {
        let named = files
            .iter()
            .map(|(name, bytes)| (format!("{folder}{name}"), bytes.clone()));
        named.collect()
    };
    type Pack = fn(&[(&str, &[u8])]) -> Vec<u8>;
    let packed = |files: &[(String, Vec<u8>)], pack: Pack| {
        let files: Vec<_> = files
            .iter()
            .map(|(name, bytes)| (name.as_str(), &bytes[..]))
            .collect();
        pack(&files)
    };

    let hf = files("hf_vit");
    let mut with_more = borrowed(&hf, "vit/");
    with_more.push((
        "vit/pytorch_model.bin".to_owned(),
        b"not looked at".to_vec(),
    ));
    let made = put("hf-vit", "", packed(&with_more, tar)).await;
    let backbone = made.ok(201);
    assert_eq!(made.header("location"), "/v1/backbones/hf-vit");
    // The backbone is the same however it is packed, and whatever its tensors are called.
    assert_eq!(put("hf-vit", "", packed(&hf, zip)).await.ok(200), backbone);
    let config = "?config=%7B%22num_heads%22%3A2%2C%22preprocessing%22%3A%7B%22size%22%3A8%2C%22filter%22%3A%22bicubic\
        %22%2C%22antialias%22%3Atrue%2C%22mean%22%3A%5B0.5%2C0.5%2C0.5%5D%2C%22std%22%3A%5B0.5%2C0.5%2C0.5%5D%7D%7D";
    let google = packed(&files("google"), tar);
    let same = put("google", config, google.clone()).await;
    let same = same.problem(409, "backbone_exists");
    assert!(
        same["detail"].as_str().unwrap().contains("`hf-vit`"),
        "{same}"
    );
    let unsaid = put("google", "", google)
        .await
        .problem(422, "missing_setting");
    assert_eq!(unsaid["errors"][0]["pointer"], "/config/preprocessing");

    // Nothing of these is kept, and no answer names a path of the server's.
    let pickle = std::fs::read(fixtures.join("pickled.pth")).unwrap();
    for (archive, status, code) in [
        (
            tar(&[("pytorch_model.bin", &pickle)]),
            415,
            "unsupported_format",
        ),
        (b"safetensors".to_vec(), 415, "unsupported_format"),
        (
            tar(&[("model.safetensors", &pickle)]),
            422,
            "invalid_backbone",
        ),
        (tar(&[("config.json", b"{}")]), 422, "invalid_backbone"),
        (
            tar(&[("a.safetensors", b""), ("b.safetensors", b"")]),
            422,
            "invalid_backbone",
        ),
        (
            tar(&[("../model.safetensors", b"")]),
            422,
            "invalid_archive",
        ),
    ] {
        let problem = put("bad", "", archive).await.problem(status, code);
        let detail = problem["detail"].as_str().unwrap();
        assert!(
            !detail.contains("/folder") && !detail.contains("promptweave"),
            "{detail}"
        );
    }
    put("bad", "?config=x", tar(&[]))
        .await
        .problem(422, "invalid_query");
    app.get("/v1/backbones/bad")
        .await
        .problem(404, "backbone_not_found");
}

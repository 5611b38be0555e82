//! Prompts as other programs write them: what is accepted, and what is refused by its first bytes.

use std::fs;
use std::path::{Path, PathBuf};

use promptweave::db::MIGRATOR;
use promptweave::domain::digest::Digest;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, tiny_backbone};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats")
}

async fn with_prompt(pool: PgPool, name: &str) -> TestApp {
    let app = TestApp::new(pool);
    app.post("/v1/prompts", &json!({"name": name}))
        .await
        .ok(201);
    app
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_not_safetensors_is_named_and_how_to_convert_it(pool: PgPool) {
    let app = with_prompt(pool, "foreign").await;
    let expected = |file: &str| match file {
        "torch.pt" | "torchscript.pt" | "vpt_prompt_ep1.pth" => ("zip of pickles", "torch.load"),
        "torch_legacy.pt" => ("before PyTorch 1.6", "torch.load"),
        "array.npy" => ("a NumPy array,", "numpy.load"),
        "objects.npy" => ("Python objects", "runs code"),
        "arrays.npz" | "arrays_compressed.npz" => (".npz", "numpy.load"),
        "array.h5" => ("HDF5", "h5py"),
        "prompt.safetensors.gz" => ("gzip", "unpack"),
        "prompt.safetensors.bz2" => ("bzip2", "unpack"),
        "prompt.safetensors.xz" => ("xz", "unpack"),
        "prompt.zip" => ("a zip archive", "unpack"),
        "prompt.tar" => ("a tar archive", "import-peft"),
        pickle if pickle.ends_with(".pkl") => ("a pickle (protocol", "runs code"),
        other => panic!("no expectation for `{other}`"),
    };
    let mut seen = 0;
    for entry in fs::read_dir(fixtures().join("foreign")).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        let upload = app.upload("/v1/prompts/foreign/versions", fs::read(&path).unwrap());
        let problem = upload.await.problem(415, "unsupported_format");
        let detail = problem["detail"].as_str().unwrap();
        let (name, advice) = expected(file);
        assert!(
            detail.contains(name) && detail.contains(advice),
            "{file}: {detail}"
        );
        seen += 1;
    }
    assert!(seen >= 30, "{seen} files");
    let versions = app.get("/v1/prompts/foreign/versions").await.ok(200);
    assert_eq!(versions["items"], json!([]));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn vpt_prompts_are_taken_as_they_are(pool: PgPool) {
    let app = with_prompt(pool, "vpt").await;
    let digest = Digest::of(b"weights");
    let path = format!("/v1/prompts/vpt/versions?backbone_digest={digest}&task=pets");
    for (file, depth) in [("shallow", "shallow"), ("deep", "deep")] {
        let bytes = fs::read(fixtures().join(format!("vpt/{file}.safetensors"))).unwrap();
        let version = app.upload(&path, bytes.clone()).await.ok(201);
        assert_eq!(version["depth"], depth);
        assert_eq!(
            (&version["num_tokens"], &version["embed_dim"]),
            (&json!(3), &json!(8))
        );
        assert_eq!(version["backbone_digest"], digest.to_string());
        assert_eq!(version["training"], Value::Null);
        let content = format!("/v1/prompts/vpt/versions/{}/content", version["version"]);
        assert_eq!(app.get(&content).await.body, bytes);
    }
    let bytes = fs::read(fixtures().join("vpt/state_dict_names.safetensors")).unwrap();
    let problem = app
        .upload(&path, bytes)
        .await
        .problem(422, "unknown_tensor");
    let detail = problem["detail"].as_str().unwrap();
    assert!(
        detail.contains("name it `deep_prompt_embeddings`"),
        "{detail}"
    );
    let pointer = "/enc.transformer.deep_prompt_embeddings";
    assert_eq!(problem["errors"][0]["pointer"], pointer);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_prompt_fits_its_backbones_blocks_and_preprocessing(pool: PgPool) {
    let app = with_prompt(pool, "vpt").await;
    // One block: there is none after it that takes a deep prompt.
    tiny_backbone(&app.root("tiny"), 1, 4);
    let body = json!({"name": "tiny", "directory": "tiny"});
    let backbone = app.post("/v1/backbones", &body).await.ok(201);
    let read = |name: &str| fs::read(fixtures().join("vpt").join(name)).unwrap();
    let path = format!(
        "/v1/prompts/vpt/versions?backbone_digest={}&preprocessing_id=",
        backbone["digest"].as_str().unwrap()
    );
    let right = format!("{path}{}", backbone["preprocessing_id"].as_str().unwrap());

    let deep = app.upload(&right, read("deep.safetensors")).await;
    let problem = deep.problem(422, "depth_mismatch");
    assert_eq!(problem["errors"][0]["pointer"], "/deep_prompt_embeddings");
    let wrong = format!("{path}224-bicubic-imagenet");
    let answer = app.upload(&wrong, read("shallow.safetensors")).await;
    let problem = answer.problem(422, "preprocessing_mismatch");
    assert_eq!(problem["errors"][0]["pointer"], "/preprocessing_id");
    let detail = problem["detail"].as_str().unwrap();
    assert!(
        detail.contains("`4-bicubic-imagenet` of `tiny`"),
        "{detail}"
    );
    app.upload(&right, read("shallow.safetensors"))
        .await
        .ok(201);
}

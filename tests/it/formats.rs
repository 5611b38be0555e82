//! Prompts in other programs' formats: which are accepted, and which are refused by their first bytes.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::http::{Request, header};
use promptweave::db::MIGRATOR;
use promptweave_domain::digest::Digest;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse, prompt_file, tiny_backbone};

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
    // The backbone has one block, so no later block could take a deep prompt.
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
        detail.contains("backbone `tiny` has `4-bicubic-imagenet`"),
        "{detail}"
    );
    app.upload(&right, read("shallow.safetensors"))
        .await
        .ok(201);
}

// ---- PEFT ----------------------------------------------------------------------------------

/// The folder that the real `peft` wrote, packed as by `tar -c -C DIR .`.
fn adapter(name: &str) -> Vec<u8> {
    let dir = fixtures().join("adapters").join(name);
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all(".", dir).unwrap();
    tar.into_inner().unwrap()
}

fn weights(name: &str) -> Vec<u8> {
    let dir = fixtures().join("adapters").join(name);
    fs::read(dir.join("adapter_model.safetensors")).unwrap()
}

async fn import(app: &TestApp, query: &str, tar: Vec<u8>) -> TestResponse {
    let request = Request::post(format!("/v1/prompts/import-peft?{query}"))
        .header(header::CONTENT_TYPE, "application/x-tar");
    app.send(request.body(Body::from(tar)).unwrap()).await
}

/// The files of an exported adapter.
fn unpacked(tar: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(tar);
    let files = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (entry.path().unwrap().to_str().unwrap().to_owned(), bytes)
    });
    files.collect()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_adapter_of_peft_comes_in_and_goes_out_bit_by_bit(pool: PgPool) {
    let app = TestApp::new(pool);
    let digest = Digest::of(b"weights");
    for (name, dtype) in [
        ("prompt_tuning", "f32"),
        ("prompt_tuning_f16", "f16"),
        ("prompt_tuning_bf16", "bf16"),
    ] {
        let query = format!("name=peft.{dtype}&backbone_digest={digest}&init_seed=3&task=pets");
        let answer = import(&app, &query, adapter(name)).await;
        let version = answer.ok(201);
        // The stored file is the one that peft wrote.
        let bytes = weights(name);
        let path = format!("/v1/prompts/peft.{dtype}/versions/1");
        assert_eq!(answer.header("location"), path);
        assert_eq!(version["digest"], Digest::of(&bytes).to_string());
        assert_eq!(app.get(&format!("{path}/content")).await.body, bytes);
        assert_eq!(version["dtype"], dtype);
        assert_eq!(version["backbone_digest"], digest.to_string());
        assert_eq!(
            (&version["init_seed"], &version["task"]),
            (&json!(3), &json!("pets"))
        );
        let recorded = &version["training"]["adapter_config"];
        assert_eq!(recorded["num_virtual_tokens"], 3);
        // Importing again gives the same version.
        assert_eq!(import(&app, &query, adapter(name)).await.ok(200), version);

        let answer = app.get(&format!("{path}/peft")).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-type"), "application/x-tar");
        let files = unpacked(&answer.body);
        let config: Value = serde_json::from_slice(&files["adapter_config.json"]).unwrap();
        assert_eq!(config, *recorded);
        let tensor = |bytes: &[u8]| {
            let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
            let view = file.tensor("prompt_embeddings").unwrap();
            (view.dtype(), view.shape().to_vec(), view.data().to_vec())
        };
        assert_eq!(tensor(&files["adapter_model.safetensors"]), tensor(&bytes));
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_no_prompt_tuning_adapter_is_refused(pool: PgPool) {
    let app = TestApp::new(pool);
    for (name, code, pointer) in [
        (
            "lora",
            "unsupported_adapter",
            "/adapter_config.json/peft_type",
        ),
        (
            "prefix_tuning",
            "unsupported_adapter",
            "/adapter_config.json/peft_type",
        ),
    ] {
        let problem = import(&app, "name=x", adapter(name))
            .await
            .problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer);
    }
    let tar = |entries: &[(&str, &[u8])]| {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, bytes) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, path, *bytes).unwrap();
        }
        tar.into_inner().unwrap()
    };
    const CONFIG: &str = "adapter_config.json";
    const MODEL: &str = "adapter_model.safetensors";
    let kind = br#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}"#;
    let model = weights("prompt_tuning");
    let pickle = b"\x80\x02}q\x00.";
    for (body, status, code) in [
        (
            tar(&[(CONFIG, kind), (MODEL, &model)]),
            422,
            "invalid_adapter",
        ),
        (
            tar(&[(CONFIG, b"{"), (MODEL, &model)]),
            422,
            "invalid_adapter",
        ),
        (
            tar(&[(CONFIG, kind), (MODEL, b"nothing of use")]),
            422,
            "not_safetensors",
        ),
        (tar(&[(CONFIG, kind)]), 422, "invalid_archive"),
        (tar(&[(MODEL, &model)]), 422, "invalid_archive"),
        (Vec::new(), 422, "invalid_archive"),
        (
            tar(&[(CONFIG, kind), (MODEL, pickle)]),
            415,
            "unsupported_format",
        ),
        (
            tar(&[(CONFIG, kind), ("adapter_model.bin", pickle)]),
            415,
            "unsupported_format",
        ),
        (b"\x1f\x8b\x08\x00".to_vec(), 415, "unsupported_format"),
        (b"PK\x03\x04....".to_vec(), 415, "unsupported_format"),
    ] {
        import(&app, "name=x", body).await.problem(status, code);
    }
    let good = || adapter("prompt_tuning");
    import(&app, "name=../x", good())
        .await
        .problem(422, "invalid_query");
    import(&app, "task=x", good())
        .await
        .problem(422, "invalid_query");
    let problem = import(&app, "name=compose", good())
        .await
        .problem(422, "reserved_name");
    assert_eq!(problem["errors"][0]["pointer"], "/name");
    // None of these left a prompt behind.
    assert_eq!(app.get("/v1/prompts").await.ok(200)["items"], json!([]));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_export_says_the_sizes_and_has_no_deep_prompts(pool: PgPool) {
    let app = with_prompt(pool, "own").await;
    tiny_backbone(&app.root("tiny"), 1, 4);
    let body = json!({"name": "tiny", "directory": "tiny"});
    let backbone = app.post("/v1/backbones", &body).await.ok(201);
    let mut file = prompt_file(1);
    let metadata = file.metadata.as_mut().unwrap();
    metadata.backbone_digest = Some(backbone["digest"].as_str().unwrap().parse().unwrap());
    let path = "/v1/prompts/own/versions";
    app.upload(path, file.to_bytes()).await.ok(201);
    let tar = app.get("/v1/prompts/own/versions/1/peft").await.body;
    let files = unpacked(&tar);
    let config: Value = serde_json::from_slice(&files["adapter_config.json"]).unwrap();
    for (field, value) in [
        ("peft_type", json!("PROMPT_TUNING")),
        ("num_virtual_tokens", json!(2)),
        ("token_dim", json!(8)),
        ("num_layers", json!(1)),
        ("num_attention_heads", json!(2)),
        ("task_type", Value::Null),
    ] {
        assert_eq!(config[field], value, "{field}");
    }
    // The import is another file with the same numbers.
    let again = import(&app, "name=again", tar.to_vec()).await.ok(201);
    assert_eq!(again["num_tokens"], 2);

    let deep = fs::read(fixtures().join("vpt/deep.safetensors")).unwrap();
    app.upload(path, deep).await.ok(201);
    let answer = app.get("/v1/prompts/own/versions/2/peft").await;
    answer.problem(422, "deep_prompt_not_exportable");
    app.get("/v1/prompts/own/versions/3/peft")
        .await
        .problem(404, "version_not_found");
}

//! `/v1/prompts`: publishing, reading back, and refusals.

use axum::body::Body;
use axum::http::{Request, header};
use promptweave::db::MIGRATOR;
use promptweave::registry::lineage::Role;
use promptweave::registry::prompt_versions;
use promptweave::registry::prompt_versions::{NewVersion, Parent, VersionFile};
use promptweave::registry::{DEFAULT_PROJECT, RegistryError, prompts};
use promptweave_domain::digest::Digest;
use promptweave_domain::prompt_file::Origin;
use promptweave_domain::tensor::{Stored, Tensor};
use safetensors::serialize;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, WIDTH, prompt_file, tiny_backbone};
use crate::fixtures;

async fn with_prompt(pool: PgPool, name: &str) -> TestApp {
    let app = TestApp::new(pool);
    app.post("/v1/prompts", &json!({"name": name}))
        .await
        .ok(201);
    app
}

fn file_of(tensors: Vec<(&str, Stored)>) -> Vec<u8> {
    serialize(tensors, None).unwrap()
}

fn zeros(shape: &[usize]) -> Stored {
    Stored::from(&Tensor::new(shape, vec![0f32; shape.iter().product()]))
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_published_version_reads_back_to_the_byte(pool: PgPool) {
    let app = TestApp::new(pool);
    let body = json!({"name": "dtd", "description": "textures", "tags": {"group": "natural"}});
    let answer = app.post("/v1/prompts", &body).await;
    let prompt = answer.ok(201);
    assert_eq!(answer.header("location"), "/v1/prompts/dtd");
    assert_eq!(prompt["tags"]["group"], "natural");
    assert_eq!(prompt["newest_version"], Value::Null);

    let bytes = prompt_file(1).to_bytes();
    let digest = Digest::of(&bytes).to_string();
    let answer = app.upload("/v1/prompts/dtd/versions", bytes.clone()).await;
    let version = answer.ok(201);
    assert_eq!(answer.header("location"), "/v1/prompts/dtd/versions/1");
    assert_eq!(answer.header("etag"), format!("\"{digest}\""));
    let expected = json!({
        "prompt": "dtd", "version": 1, "digest": digest, "size": bytes.len(), "origin": "tuned",
        "kind": "prompt", "num_members": null, "num_tokens": 2, "embed_dim": WIDTH, "depth": "shallow", "dtype": "f32",
        "backbone_digest": Digest::of(b"some backbone"), "preprocessing_id": "4-bicubic-imagenet",
        "init_seed": u64::MAX, "task": "digits", "classes": ["zero", "one"],
        "training": {"epochs": 3}, "produced_by_job": null, "deprecated_at": null,
        "created_at": version["created_at"],
        "urls": {
            "self": "/v1/prompts/dtd/versions/1",
            "content": "/v1/prompts/dtd/versions/1/content",
            "lineage": "/v1/prompts/dtd/versions/1/lineage",
            "peft": "/v1/prompts/dtd/versions/1/peft",
        },
    });
    assert_eq!(version, expected);

    // The version is found by number and by digest; the newest one shows at the name.
    for reference in ["1", &digest] {
        let path = format!("/v1/prompts/dtd/versions/{reference}");
        assert_eq!(app.get(&path).await.ok(200), expected);
        let content = app.get(&format!("{path}/content")).await;
        assert_eq!(content.body, bytes);
        assert_eq!(content.header("etag"), format!("\"{digest}\""));
        assert_eq!(
            content.header("content-type"),
            "application/vnd.prompt+safetensors"
        );
        assert!(content.header("cache-control").contains("immutable"));
    }
    assert_eq!(
        app.get("/v1/prompts/dtd").await.ok(200)["newest_version"],
        1
    );

    let request = Request::get("/v1/prompts/dtd/versions/1/content")
        .header(header::IF_NONE_MATCH, format!("\"{digest}\""));
    let answer = app.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (304, 0));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn the_same_bytes_are_the_same_version(pool: PgPool) {
    let app = with_prompt(pool, "dtd").await;
    let path = "/v1/prompts/dtd/versions";
    let first = app.upload(path, prompt_file(1).to_bytes()).await.ok(201);
    app.upload(path, prompt_file(2).to_bytes()).await.ok(201);
    assert_eq!(
        app.upload(path, prompt_file(1).to_bytes()).await.ok(200),
        first
    );

    // Under another name, the same bytes are another version, which shares the stored bytes.
    app.post("/v1/prompts", &json!({"name": "copy"}))
        .await
        .ok(201);
    let copy = app
        .upload("/v1/prompts/copy/versions", prompt_file(1).to_bytes())
        .await;
    assert_eq!(copy.ok(201)["version"], 1);
    let blobs: i64 = sqlx::query_scalar("SELECT count(*) FROM blob")
        .fetch_one(&app.state.pool)
        .await
        .unwrap();
    assert_eq!(blobs, 2);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn concurrent_uploads_are_numbered_without_gaps(pool: PgPool) {
    let app = with_prompt(pool, "dtd").await;
    let uploads = (0..12).map(|i| {
        // These are six different files, each sent twice.
        app.upload("/v1/prompts/dtd/versions", prompt_file(i / 2).to_bytes())
    });
    let answers = futures::future::join_all(uploads).await;
    let created = answers.iter().filter(|a| a.status == 201).count();
    let existing = answers.iter().filter(|a| a.status == 200).count();
    assert_eq!((created, existing), (6, 6), "{answers:?}");
    let versions = app.get("/v1/prompts/dtd/versions").await.ok(200);
    let numbers: Vec<i64> = versions["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v["version"].as_i64().unwrap())
        .collect();
    assert_eq!(numbers, [6, 5, 4, 3, 2, 1]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_file_without_metadata_takes_it_from_the_request(pool: PgPool) {
    let app = with_prompt(pool, "vpt").await;
    let file = file_of(vec![("prompt_embeddings", zeros(&[1, 3, WIDTH]))]);
    let digest = Digest::of(b"weights");
    let path = format!(
        "/v1/prompts/vpt/versions?backbone_digest={digest}&preprocessing_id=98-bicubic-imagenet\
         &init_seed=7&task=pets"
    );
    let version = app.upload(&path, file).await.ok(201);
    assert_eq!(version["num_tokens"], 3);
    assert_eq!(version["origin"], "uploaded");
    assert_eq!(version["backbone_digest"], digest.to_string());
    assert_eq!(version["preprocessing_id"], "98-bicubic-imagenet");
    assert_eq!(version["init_seed"], 7);
    assert_eq!(version["task"], "pets");

    // The request must agree with what the file itself says.
    let bytes = prompt_file(1).to_bytes();
    let same = "/v1/prompts/vpt/versions?task=digits";
    app.upload(same, bytes).await.ok(201);
    let other = "/v1/prompts/vpt/versions?task=pets";
    let answer = app.upload(other, prompt_file(2).to_bytes()).await;
    let problem = answer.problem(422, "metadata_conflict");
    assert_eq!(problem["errors"][0]["pointer"], "/task");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn bad_files_are_refused_and_the_tensor_is_named(pool: PgPool) {
    let app = with_prompt(pool, "bad").await;
    let whole = Stored::from(&Tensor::new([1, 2], vec![1i64, 2]));
    let nan = Stored::from(&Tensor::new([1, 2], vec![1.0, f32::NAN]));
    let cases: Vec<(Vec<u8>, u16, &str, &str)> = vec![
        (
            b"\x80\x04\x95pickled".to_vec(),
            415,
            "unsupported_format",
            "",
        ),
        (
            b"PK\x03\x04zipped....".to_vec(),
            415,
            "unsupported_format",
            "",
        ),
        (
            b"\x93NUMPY\x01\x00array".to_vec(),
            415,
            "unsupported_format",
            "",
        ),
        (
            b"plain text, long enough".to_vec(),
            422,
            "not_safetensors",
            "",
        ),
        (Vec::new(), 422, "not_safetensors", ""),
        (
            file_of(vec![("prompt_embeddings", whole)]),
            422,
            "wrong_dtype",
            "/prompt_embeddings",
        ),
        (
            file_of(vec![("prompt_embeddings", zeros(&[8]))]),
            422,
            "wrong_shape",
            "/prompt_embeddings",
        ),
        (
            file_of(vec![("prompt_embeddings", nan)]),
            422,
            "not_finite",
            "/prompt_embeddings",
        ),
        (
            file_of(vec![
                ("prompt_embeddings", zeros(&[1, 8])),
                ("lora/A", zeros(&[1])),
            ]),
            422,
            "unknown_tensor",
            "/lora~1A",
        ),
        (
            file_of(vec![("head.bias", zeros(&[8]))]),
            422,
            "missing_tensor",
            "/prompt_embeddings",
        ),
    ];
    for (file, status, code, pointer) in cases {
        let answer = app.upload("/v1/prompts/bad/versions", file).await;
        let problem = answer.problem(status, code);
        if !pointer.is_empty() {
            assert_eq!(problem["errors"][0]["pointer"], pointer);
        }
    }
    let versions = app.get("/v1/prompts/bad/versions").await.ok(200);
    assert_eq!(versions["items"], json!([]));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_prompt_is_as_wide_as_its_backbone(pool: PgPool) {
    let app = with_prompt(pool, "wide").await;
    tiny_backbone(&app.root("tiny"), 1, 4);
    let body = json!({"name": "tiny", "directory": "tiny"});
    let backbone = app.post("/v1/backbones", &body).await.ok(201);
    let path = format!(
        "/v1/prompts/wide/versions?backbone_digest={}",
        backbone["digest"].as_str().unwrap()
    );
    let narrow = file_of(vec![("prompt_embeddings", zeros(&[2, WIDTH - 1]))]);
    let problem = app
        .upload(&path, narrow)
        .await
        .problem(422, "width_mismatch");
    assert_eq!(problem["errors"][0]["pointer"], "/prompt_embeddings");
    assert!(problem["detail"].as_str().unwrap().contains("`tiny`"));
    let fitting = file_of(vec![("prompt_embeddings", zeros(&[2, WIDTH]))]);
    app.upload(&path, fitting).await.ok(201);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn names_are_unique_and_follow_their_rule(pool: PgPool) {
    let app = with_prompt(pool, "dtd").await;
    let create = async |name: &str| app.post("/v1/prompts", &json!({"name": name})).await;
    create("dtd").await.problem(409, "name_taken");
    for name in ["", "Dtd", "../etc/passwd", "a/b", "%2e%2e", "a:b"] {
        let problem = create(name).await.problem(422, "invalid_body");
        assert_eq!(problem["errors"][0]["pointer"], "/name");
    }
    let body = json!({"name": "long", "description": "x".repeat(5000)});
    let problem = app
        .post("/v1/prompts", &body)
        .await
        .problem(422, "invalid_body");
    assert_eq!(problem["errors"][0]["pointer"], "/description");
    let body = json!({"name": "nul", "description": "a\0b"});
    app.post("/v1/prompts", &body)
        .await
        .problem(422, "nul_character");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_not_there_is_said(pool: PgPool) {
    let app = with_prompt(pool, "dtd").await;
    let missing = Digest::of(b"missing");
    for (path, status, code) in [
        ("/v1/prompts/none".to_owned(), 404, "prompt_not_found"),
        (
            "/v1/prompts/none/versions".to_owned(),
            404,
            "prompt_not_found",
        ),
        (
            "/v1/prompts/none/versions/1".to_owned(),
            404,
            "prompt_not_found",
        ),
        (
            "/v1/prompts/dtd/versions/1".to_owned(),
            404,
            "version_not_found",
        ),
        (
            format!("/v1/prompts/dtd/versions/{missing}/content"),
            404,
            "version_not_found",
        ),
        (
            "/v1/prompts/dtd/versions/0".to_owned(),
            422,
            "invalid_reference",
        ),
        (
            "/v1/prompts/dtd/versions/sha256:12".to_owned(),
            422,
            "invalid_reference",
        ),
        (
            "/v1/prompts/dtd/versions/production".to_owned(),
            404,
            "version_not_found",
        ),
        ("/v1/prompts/DTD".to_owned(), 422, "invalid_path"),
        ("/v1/prompts/..%2f..%2fetc".to_owned(), 422, "invalid_path"),
    ] {
        app.get(&path).await.problem(status, code);
    }
    let upload = app
        .upload("/v1/prompts/none/versions", prompt_file(1).to_bytes())
        .await;
    upload.problem(404, "prompt_not_found");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn lists_come_in_pages(pool: PgPool) {
    let app = TestApp::new(pool);
    for name in ["b", "a", "c.1", "c-2", "d"] {
        app.post("/v1/prompts", &json!({"name": name}))
            .await
            .ok(201);
    }
    let mut names = Vec::new();
    let mut path = "/v1/prompts?page_size=2".to_owned();
    loop {
        let page = app.get(&path).await.ok(200);
        let items = page["items"].as_array().unwrap();
        assert!(items.len() <= 2);
        names.extend(items.iter().map(|p| p["name"].as_str().unwrap().to_owned()));
        match page.get("next_page_token") {
            Some(token) => {
                let token = token.as_str().unwrap();
                path = format!("/v1/prompts?page_size=2&page_token={token}");
            }
            None => break,
        }
    }
    assert_eq!(names, ["a", "b", "c-2", "c.1", "d"]);
    for (query, code) in [
        ("page_size=201", "invalid_page_size"),
        ("page_size=0", "invalid_page_size"),
        ("page_size=many", "invalid_query"),
        ("page_size=", "invalid_query"),
        ("page_token", "invalid_query"),
        ("page_token=%21", "invalid_page_token"),
        ("size=2", "invalid_query"),
    ] {
        let answer = app.get(&format!("/v1/prompts?{query}")).await;
        answer.problem(422, code);
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_deprecated_version_is_hidden_from_its_bare_name_alone(pool: PgPool) {
    let app = with_prompt(pool, "dtd").await;
    for seed in [1, 2] {
        let file = prompt_file(seed).to_bytes();
        app.upload("/v1/prompts/dtd/versions", file).await.ok(201);
    }
    let path = "/v1/prompts/dtd/versions/2/deprecate";
    let deprecated = app.post_empty(path).await.ok(200);
    assert_ne!(deprecated["deprecated_at"], Value::Null);
    // Doing it again changes nothing.
    assert_eq!(app.post_empty(path).await.ok(200), deprecated);
    assert_eq!(
        app.get("/v1/prompts/dtd").await.ok(200)["newest_version"],
        1
    );
    app.get("/v1/prompts/dtd/versions/2").await.ok(200);

    let mut conn = app.state.pool.acquire().await.unwrap();
    let newest =
        prompt_versions::resolve(&mut conn, DEFAULT_PROJECT, &"dtd".parse().unwrap()).await;
    assert_eq!(newest.unwrap().unwrap().version, 1);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_composed_version_has_its_lineage_and_one_job_publishes_once(pool: PgPool) {
    let app = TestApp::new(pool);
    let mut conn = app.state.pool.acquire().await.unwrap();
    let spec = fixtures::spec(&mut conn).await;
    let job = fixtures::enqueue(&mut conn, &spec).await;
    let parents = [0.25, 0.75].map(|weight| Parent {
        role: Role::Source,
        version_id: spec.sources[usize::from(weight > 0.5)].id,
        weight,
    });
    let publish = async |seed: u64| {
        let mut file = prompt_file(seed);
        let mut metadata = file.metadata.clone().unwrap();
        metadata.origin = Origin::Composed;
        file.metadata = Some(metadata.clone());
        let bytes = file.to_bytes();
        let name = "mix".parse().unwrap();
        // The weights are summed when the transaction ends.
        let mut db = app.state.pool.begin().await?;
        let prompt = prompts::find_or_create(&mut db, DEFAULT_PROJECT, &name, "").await?;
        let new = NewVersion {
            prompt_id: prompt.id,
            bytes: &bytes,
            file: VersionFile::Prompt {
                file: &file,
                metadata: &metadata,
            },
            produced_by_job: Some(job),
            parents: &parents,
        };
        let published = prompt_versions::insert(&mut db, DEFAULT_PROJECT, new).await?;
        db.commit().await?;
        Ok::<_, RegistryError>(published)
    };
    let (version, created) = publish(3).await.unwrap();
    assert_eq!((version.produced_by_job, created), (Some(job), true));
    let error = publish(4).await.unwrap_err();
    assert!(
        matches!(error, RegistryError::AlreadyProduced(j) if j == job),
        "{error}"
    );

    let lineage = app.get("/v1/prompts/mix/versions/1/lineage").await.ok(200);
    let edges = lineage["edges"].as_array().unwrap();
    let edge = |at: usize| (&edges[at]["parent"], &edges[at]["weight"]);
    assert_eq!(edge(0), (&json!("flowers:1"), &json!(0.75)));
    assert_eq!(edge(1), (&json!("digits:1"), &json!(0.25)));
    let source = "/v1/prompts/digits/versions/1/lineage";
    let lineage = app.get(&format!("{source}?direction=down")).await.ok(200);
    assert_eq!(lineage["edges"][0]["child"], "mix:1");
    assert_eq!(app.get(source).await.ok(200)["edges"], json!([]));
}

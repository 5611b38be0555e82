//! `POST /v1/datasets/{name}/versions`: archives as bodies, and which are refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Request, header};
use futures::StreamExt as _;
use promptweave::db::MIGRATOR;
use promptweave_formats::error::{MAX_ENTRIES, MAX_NAME};
use serde_json::json;
use sqlx::PgPool;
use tar::EntryType::{self, Regular};

use crate::app::{TestApp, TestResponse, png, write_files};
use crate::archives::{
    entry, gzip, huge_png, replaced, tar, tar_of, tar_of_many, zip, zip_that_declares,
};

/// An app with its own scratch directory, which must be empty in the end.
fn app(pool: PgPool) -> TestApp {
    let scratch = tempfile::tempdir().unwrap().keep();
    TestApp::with_settings(pool, |settings| {
        settings.scratch_dir = scratch;
        settings.max_dataset_bytes = 1 << 30;
    })
}

async fn upload(app: &TestApp, query: &str, body: impl Into<Body>) -> TestResponse {
    let path = format!("/v1/datasets/food/versions{query}");
    app.send(Request::post(path).body(body.into()).unwrap())
        .await
}

/// Checks that neither an upload's files nor a dataset is left.
async fn assert_nothing_kept(app: &TestApp) {
    let scratch = &app.state.settings.scratch_dir;
    assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
    let list = app.get("/v1/datasets").await.ok(200);
    assert_eq!(list["items"], json!([]));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn every_archive_is_the_version_that_its_directory_is(pool: PgPool) {
    let app = app(pool);
    let (one, two, three) = (png(1), png(2), png(3));
    let files: &[(&str, &[u8])] = &[
        ("train/apple-pie/1.png", &one),
        ("train/apple/b c.png", &two),
        ("train/apple/é.png", &three),
        ("test/apple/1.png", &one),
        ("README.md", b"words"),
    ];
    let dir = app.root("food");
    write_files(&dir, files);
    let body = json!({"name": "food", "directory": "food"});
    let dataset = app.post("/v1/datasets", &body).await.ok(201);
    assert_eq!(dataset["class_counts"]["train"], json!([2, 1]));

    let plain = tar(files);
    let inside: Vec<_> = files
        .iter()
        .map(|(name, bytes)| (format!("./food//{name}"), *bytes))
        .collect();
    let mut inside: Vec<_> = inside.iter().map(|(name, b)| (name.as_str(), *b)).collect();
    inside.push(("__MACOSX/food/train/apple/._1.png", b"resource fork"));
    for bytes in [
        plain.clone(),
        gzip(&plain),
        zip(files),
        tar(&inside),
        zip(&inside),
    ] {
        let answer = upload(&app, "", bytes).await;
        assert_eq!(answer.ok(200), dataset);
        assert_eq!(answer.header("location"), "/v1/datasets/food");
    }
    // List files, with an image in two of them.
    let lists: &[(&str, &[u8])] = &[
        ("vtab/meta.json", br#"{"classes": ["pie", "bread"]}"#),
        (
            "vtab/train800val200.txt",
            b"images/1.png 1\nimages/2.png 0\n",
        ),
        ("vtab/val200.txt", b"images/1.png 1\n"),
        ("vtab/images/1.png", &one),
        ("vtab/images/2.png", &two),
    ];
    let dataset = upload(&app, "", zip(lists)).await.ok(201);
    assert_eq!(dataset["version"], 2);
    assert_eq!(dataset["split_counts"], json!({"train": 2, "val": 1}));
    assert_eq!(upload(&app, "", tar(lists)).await.ok(200), dataset);
    assert_eq!(app.get("/v1/datasets/food").await.ok(200)["version"], 2);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn names_of_every_kind_of_tar_are_read(pool: PgPool) {
    let app = app(pool);
    let long = format!("cat/{}.png", "n".repeat(200));
    // Long names are stored in GNU's way, and in that of pax.
    let mut gnu = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(png(1).len() as u64);
    gnu.append_data(&mut header, &long, &png(1)[..]).unwrap();
    let record = format!(" path={long}\n");
    let record = format!("{}{record}", record.len() + 3);
    let pax = tar_of(&[
        entry(b"global", EntryType::XGlobalHeader, b"14 comment=git\n"),
        entry(b"attributes", EntryType::XHeader, record.as_bytes()),
        entry(b"short", Regular, &png(1)),
    ]);
    let first = upload(&app, "", gnu.into_inner().unwrap()).await.ok(201);
    assert_eq!(upload(&app, "", pax).await.ok(200), first);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_bad_image_is_named_or_left_out(pool: PgPool) {
    let app = app(pool);
    let (good, huge) = (png(1), huge_png(60_000));
    let files: &[(&str, &[u8])] = &[
        ("cat/1.png", &good),
        ("cat/2.png", b"no image"),
        ("dog/3.png", &huge),
    ];
    for bytes in [tar(files), zip(files)] {
        let problem = upload(&app, "", bytes)
            .await
            .problem(422, "unreadable_image");
        assert_eq!(problem["errors"][0]["pointer"], "/cat~12.png");
    }
    assert_nothing_kept(&app).await;
    let dataset = upload(&app, "?skip_unreadable=true", tar(files))
        .await
        .ok(201);
    assert_eq!(dataset["skipped_images"], json!(["cat/2.png", "dog/3.png"]));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_client_that_hangs_up_leaves_nothing(pool: PgPool) {
    let app = app(pool);
    let good = png(1);
    let whole = tar(&[("cat/1.png", &good)]);
    // The body breaks off, or the request is given up while it waits for more.
    let broken = Body::from_stream(futures::stream::iter([
        Ok(whole[..700].to_vec()),
        Err(std::io::Error::other("gone")),
    ]));
    upload(&app, "", broken)
        .await
        .problem(400, "body_interrupted");
    let start = futures::stream::iter([Ok::<_, std::io::Error>(whole[..700].to_vec())]);
    let waiting = Body::from_stream(start.chain(futures::stream::pending()));
    let given_up = tokio::time::timeout(Duration::from_millis(50), upload(&app, "", waiting));
    assert!(given_up.await.is_err());
    assert_nothing_kept(&app).await;
    // The body was damaged on the way, as its digest shows.
    let request = Request::post("/v1/datasets/food/versions")
        .header("content-digest", format!("sha-256=:{}=:", "A".repeat(43)))
        .body(Body::from(whole.clone()));
    let answer = app.send(request.unwrap()).await;
    answer.problem(400, "content_digest_mismatch");
    assert_nothing_kept(&app).await;
    // The archive ends early, but only in the eyes of its reader.
    upload(&app, "", whole[..700].to_vec()).await.ok(201);
    let cut = whole[..540].to_vec();
    upload(&app, "", cut).await.problem(422, "invalid_archive");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_too_large_or_no_archive_is_said_so(pool: PgPool) {
    let app = TestApp::with_settings(pool, |settings| settings.max_dataset_bytes = 10_000);
    let random: Vec<u8> = (0..20_000u32).map(|i| ((i * i) >> 7) as u8).collect();
    upload(&app, "", random.clone())
        .await
        .problem(413, "body_too_large");
    // Without a length, the limit is noticed on the way.
    let pieces: Vec<_> = random
        .chunks(1000)
        .map(|c| Ok::<_, std::io::Error>(c.to_vec()))
        .collect();
    let stream = Body::from_stream(futures::stream::iter(pieces));
    upload(&app, "", stream)
        .await
        .problem(413, "body_too_large");
    let zeros = tar(&[("cat/1.png", &[0; 20_000])]);
    for bytes in [gzip(&zeros), zip(&[("cat/1.png", &[0; 20_000])])] {
        upload(&app, "", bytes)
            .await
            .problem(413, "archive_too_large");
    }
    for bytes in [&b""[..], b"{}", b"\x80\x04pickle", &gzip(b"no tar")] {
        let answer = upload(&app, "", bytes.to_vec()).await;
        answer.problem(415, "unsupported_format");
    }
    let request = Request::post("/v1/datasets/food/versions")
        .header(header::CONTENT_TYPE, "image/png")
        .body(Body::from(png(1)));
    let answer = app.send(request.unwrap()).await;
    answer.problem(415, "unsupported_media_type");
    upload(&app, "?skip=1", tar(&[]))
        .await
        .problem(422, "invalid_query");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn hostile_archives_are_refused_by_entry_and_rule(pool: PgPool) {
    let app = app(pool);
    let image = png(1);
    let one = |name: &[u8], kind| {
        tar_of(&[entry(
            name,
            kind,
            if kind == Regular { &image } else { b"" },
        )])
    };
    let twice: &[(&str, &[u8])] = &[("cat/1.png", &image), ("cat/2.png", &image)];
    let zeros = vec![0; 80 << 20];
    let inner = zip(&[("0.png", &zeros[..1 << 20])]);
    let nested: &[(&str, &[u8])] = &[("lib/0.zip", &inner)];
    let long = format!("{MAX_NAME}{}", "n".repeat(MAX_NAME));
    let mut cut = one(b"cat/1.png", Regular);
    cut.truncate(520);
    let pax = |record: &str| {
        tar_of(&[
            entry(b"attributes", EntryType::XHeader, record.as_bytes()),
            entry(b"cat/1.png", Regular, &image),
        ])
    };
    let mut encrypted = zip(&twice[..1]);
    let central = encrypted
        .windows(4)
        .position(|w| w == b"PK\x01\x02")
        .unwrap();
    encrypted[central + 8] |= 1;
    let mut linked = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    linked
        .add_symlink("cat/link.png", "/etc/passwd", options)
        .unwrap();
    let linked = linked.finish().unwrap().into_inner();
    let corpus: Vec<(Vec<u8>, &str, &str)> = vec![
        (one(b"../evil.png", Regular), "../evil.png", "no `..`"),
        (
            one(b"cat/../../evil.png", Regular),
            "cat/../../evil.png",
            "no `..`",
        ),
        (
            one(b"/etc/evil.png", Regular),
            "/etc/evil.png",
            "is relative",
        ),
        (one(b"..", EntryType::Directory), "..", "no `..`"),
        (one(b"cat\\1.png", Regular), "cat\\\\1.png", "no `..`, `\\`"),
        (
            one(b"cat/\x1b[1m.png", Regular),
            "cat/\\u{1b}[1m.png",
            "control character",
        ),
        (one(b"cat/\xff.png", Regular), "cat/\u{fffd}.png", "UTF-8"),
        (
            one(b"cat/1.png", EntryType::Symlink),
            "cat/1.png",
            "a symbolic link",
        ),
        (
            one(b"cat/1.png", EntryType::Link),
            "cat/1.png",
            "a hard link",
        ),
        (one(b"cat/1.png", EntryType::Char), "cat/1.png", "a device"),
        (one(b"cat/1.png", EntryType::Block), "cat/1.png", "a device"),
        (one(b"cat/1.png", EntryType::Fifo), "cat/1.png", "a pipe"),
        (
            one(b"cat/1.png", EntryType::GNUSparse),
            "cat/1.png",
            "a sparse file",
        ),
        (tar(&[twice[0], twice[0]]), "cat/1.png", "more than once"),
        (
            tar(&[twice[0], ("./cat//1.png", &image)]),
            "cat/1.png",
            "more than once",
        ),
        (tar(nested), "lib/0.zip", "an archive in the archive"),
        (cut, "cat/1.png", "more than the archive has"),
        (pax("13 size=1000\n"), "attributes", "change its size"),
        (
            pax("22 GNU.sparse.major=1\n"),
            "attributes",
            "change its size",
        ),
        (
            tar_of(&[entry(b"L", EntryType::GNULongName, &vec![b'n'; 100_000])]),
            "L",
            "change its size",
        ),
        (
            tar_of(&[entry(b"L", EntryType::GNULongName, long.as_bytes())]),
            "nnn",
            "at most 1024 bytes",
        ),
        (tar_of_many(MAX_ENTRIES + 1), "", "more than 250000 entries"),
        (
            gzip(&tar(&[("cat/1.png", &zeros)])),
            "",
            "100 times its size",
        ),
        (zip(&[("cat/1.png", &zeros)]), "", "100 times its size"),
        (
            replaced(zip(&[("aa/evil.png", &image)]), b"aa/evil", b"../evil"),
            "../evil.png",
            "no `..`",
        ),
        (
            replaced(zip(twice), b"cat/2", b"cat/1"),
            "cat/1.png",
            "more than once",
        ),
        (
            replaced(zip(twice), b"cat/2", b"cat/\xff"),
            "cat/\u{fffd}.png",
            "UTF-8",
        ),
        (zip(nested), "lib/0.zip", "an archive in the archive"),
        (linked, "cat/link.png", "a symbolic link"),
        (encrypted, "cat/1.png", "encrypted"),
        (
            zip_that_declares(&[("cat/1.png", &zeros[..1 << 20])], 100),
            "cat/1.png",
            "holds other than the 100 bytes",
        ),
    ];
    for (bytes, name, rule) in corpus {
        let started = Instant::now();
        let answer = upload(&app, "?skip_unreadable=true", bytes).await;
        let taken = started.elapsed();
        let problem = answer.problem(422, "invalid_archive");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(name) && detail.contains(rule), "{detail}");
        // Each takes well below a second, but a machine that also runs other tests may need longer.
        assert!(taken < Duration::from_secs(3), "{detail} after {taken:?}");
    }
    let huge = tar(&[("cat/1.png", &huge_png(60_000))]);
    let problem = upload(&app, "", huge)
        .await
        .problem(422, "unreadable_image");
    let detail = problem["detail"].as_str().unwrap();
    assert!(
        detail.contains("`cat/1.png`") && detail.contains("60000×60000"),
        "{detail}"
    );
    // Each edge alone may be this long, but not both.
    let large = tar(&[("cat/1.png", &huge_png(6_000))]);
    let problem = upload(&app, "", large).await;
    let problem = problem.problem(422, "unreadable_image");
    assert!(problem.to_string().contains("32 million"), "{problem}");
    assert_nothing_kept(&app).await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_shard_of_a_webdataset_is_a_data_set(pool: PgPool) {
    let app = app(pool);
    let (one, two) = (png(1), png(2));
    let shard: &[(&str, &[u8])] = &[
        ("000000.png", &one),
        ("000000.cls", b"1"),
        ("000000.json", br#"{"width": 1}"#),
        ("000001.png", &two),
        ("000001.cls", b"0\n"),
    ];
    let dataset = upload(&app, "", tar(shard)).await.ok(201);
    assert_eq!(dataset["classes"], json!(["0", "1"]));
    assert_eq!(dataset["class_counts"], json!({"train": [1, 1]}));
    let without = &shard[..4];
    let refused = upload(&app, "", gzip(&tar(without))).await;
    let problem = refused.problem(422, "invalid_dataset");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("sample `000001` has no label"), "{detail}");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn parquet_files_are_data_sets_from_a_directory_and_one_of_them_as_a_body(pool: PgPool) {
    let app = app(pool);
    let fixture = |name: &str| {
        let path = ["tests/fixtures/parquet", name].iter().collect::<PathBuf>();
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
    };
    let names = [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "test-00000-of-00001.parquet",
    ];
    let bytes = names.map(fixture);
    let paths = names.map(|name| format!("data/{name}"));
    let files: Vec<(&str, &[u8])> = (0..3).map(|i| (paths[i].as_str(), &bytes[i][..])).collect();
    write_files(&app.root("pets"), &files);
    let body = json!({"name": "pets", "directory": "pets"});
    let dataset = app.post("/v1/datasets", &body).await.ok(201);
    assert_eq!(dataset["classes"], json!(["cat", "dog", "owl"]));
    assert_eq!(dataset["class_counts"]["train"], json!([2, 2, 2]));
    assert_eq!(dataset["class_counts"]["test"], json!([1, 1, 1]));

    let dataset = upload(&app, "", bytes[0].clone()).await.ok(201);
    assert_eq!(dataset["class_counts"], json!({"train": [2, 1, 1]}));
    // The first image's bytes are not compressed.
    let at = bytes[0].windows(4).position(|it| it == b"\x89PNG").unwrap();
    let mut broken = bytes[0].clone();
    broken[at + 1] = b'X';
    let refused = upload(&app, "", broken.clone()).await;
    let refused = refused.problem(422, "unreadable_image");
    let detail = refused["errors"][0]["detail"].to_string();
    assert!(detail.contains("row 0 of the file"), "{detail}");
    let dataset = upload(&app, "?skip_unreadable=true", broken).await.ok(201);
    assert_eq!(dataset["skipped_images"], json!(["row 0 of the file"]));
    let cut = bytes[0][..bytes[0].len() - 4].to_vec();
    let refused = upload(&app, "", cut).await.problem(422, "invalid_dataset");
    assert!(refused.to_string().contains("cut off"), "{refused}");
}

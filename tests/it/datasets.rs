//! `/v1/datasets`: registering a directory of images, and getting it back from the blob store.

use promptweave::db::MIGRATOR;
use promptweave::registry::{DEFAULT_PROJECT, datasets};
use promptweave_domain::split::Split;
use promptweave_formats::dataset::LabelledImages;
use serde_json::json;
use sqlx::PgPool;

use crate::app::{TestApp, png, write_files};

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_registered_data_set_needs_its_directory_no_more(pool: PgPool) {
    let app = TestApp::new(pool);
    let dir = app.root("food");
    write_files(
        &dir,
        &[
            ("train/apple/1.png", &png(1)),
            ("train/apple/2.png", &png(2)),
            ("train/bread/1.png", &png(3)),
            ("test/bread/2.png", &png(4)),
        ],
    );
    let body = json!({"name": "food", "directory": "food"});
    let answer = app.post("/v1/datasets", &body).await;
    let mut dataset = answer.ok(201);
    assert_eq!(answer.header("location"), "/v1/datasets/food");
    assert_eq!(dataset["version"], 1);
    assert_eq!(dataset["classes"], json!(["apple", "bread"]));
    assert_eq!(dataset["split_counts"], json!({"train": 3, "test": 1}));
    assert_eq!(
        dataset["class_counts"],
        json!({"train": [2, 1], "test": [0, 1]})
    );
    assert_eq!(
        (&dataset["skipped"], &dataset["skipped_images"]),
        (&json!(0), &json!([]))
    );
    // The same images are the same version; another image makes the next one.
    assert_eq!(app.post("/v1/datasets", &body).await.ok(200), dataset);
    dataset.as_object_mut().unwrap().remove("skipped_images");
    assert_eq!(app.get("/v1/datasets/food").await.ok(200), dataset);
    write_files(&dir, &[("train/bread/3.png", &png(5))]);
    assert_eq!(app.post("/v1/datasets", &body).await.ok(201)["version"], 2);
    let list = app.get("/v1/datasets").await.ok(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    assert_eq!(list["items"][0]["version"], 2);

    let original = LabelledImages::read(&dir).unwrap();
    let mut conn = app.state.pool.acquire().await.unwrap();
    let reference = "food:2".parse().unwrap();
    let found = datasets::resolve(&mut conn, DEFAULT_PROJECT, &reference).await;
    let digest = found.unwrap().unwrap().digest;
    let (tar, out) = (app.dir.path().join("pack.tar"), app.root("unpacked"));
    app.state.blobs.get_to_file(&digest, &tar).await.unwrap();
    datasets::unpack(&tar, &out).unwrap();
    let unpacked = LabelledImages::read(&out).unwrap();
    assert_eq!(unpacked.classes, original.classes);
    let (train, expected) = (unpacked.split(Split::Train), original.split(Split::Train));
    for (image, expected) in train.unwrap().iter().zip(expected.unwrap()) {
        assert_eq!(image.label, expected.label);
        let bytes = std::fs::read(unpacked.image_path(image)).unwrap();
        assert_eq!(bytes, std::fs::read(original.image_path(expected)).unwrap());
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_unreadable_image_is_named_or_left_out_and_counted(pool: PgPool) {
    let app = TestApp::new(pool);
    let files: &[(&str, &[u8])] = &[
        ("cat/1.png", &png(1)),
        ("cat/2.png", &png(2)[..20]),
        ("dog/1.png", &png(3)),
    ];
    write_files(&app.root("pets"), files);
    let body = json!({"name": "pets", "directory": "pets"});
    let problem = app
        .post("/v1/datasets", &body)
        .await
        .problem(422, "unreadable_image");
    let detail = problem["detail"].as_str().unwrap();
    assert!(
        detail.contains("`cat/2.png`") && detail.contains("skip_unreadable"),
        "{detail}"
    );
    app.get("/v1/datasets/pets")
        .await
        .problem(404, "dataset_not_found");

    let body = json!({"name": "pets", "directory": "pets", "skip_unreadable": true});
    let dataset = app.post("/v1/datasets", &body).await.ok(201);
    assert_eq!(dataset["skipped"], 1);
    assert_eq!(dataset["skipped_images"], json!(["cat/2.png"]));
    assert_eq!(dataset["split_counts"], json!({"train": 2}));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn bad_directories_are_refused_without_the_servers_paths(pool: PgPool) {
    let app = TestApp::new(pool);
    let classes: (&str, &[u8]) = ("meta.json", br#"{"classes": ["cat", "dog"]}"#);
    write_files(&app.root("nothing"), &[]);
    write_files(
        &app.root("label"),
        &[classes, ("train.txt", b"a.png 0\nb.png 2\n")],
    );
    write_files(&app.root("line"), &[classes, ("train.txt", b"a.png\n")]);
    write_files(
        &app.root("outside"),
        &[classes, ("train.txt", b"../label/meta.json 0\n")],
    );
    write_files(
        &app.root("missing"),
        &[classes, ("train.txt", b"a.png 0\n")],
    );
    write_files(&app.root("unread"), &[("cat/1.png", b"no image")]);
    for (directory, skip_unreadable, code, detail) in [
        (
            "nothing",
            false,
            "empty_dataset",
            "`nothing` holds no training images",
        ),
        (
            "label",
            false,
            "label_out_of_range",
            "train.txt:2: label 2 is outside the 2 classes",
        ),
        (
            "line",
            false,
            "invalid_dataset",
            "train.txt:1: expected `path label`",
        ),
        (
            "outside",
            false,
            "invalid_dataset",
            "train.txt:1: path `../label/meta.json` leaves",
        ),
        (
            "missing",
            false,
            "unreadable_image",
            "image `a.png` cannot be opened",
        ),
        (
            "unread",
            true,
            "empty_dataset",
            "no training image is left: 1 cannot be read",
        ),
        (
            "none",
            false,
            "unknown_directory",
            "there is no directory `none`",
        ),
        (
            "/etc",
            false,
            "unknown_directory",
            "there is no directory `/etc`",
        ),
        (
            "label/../../roots/label",
            false,
            "unknown_directory",
            "there is no directory",
        ),
    ] {
        let body =
            json!({"name": "bad", "directory": directory, "skip_unreadable": skip_unreadable});
        let problem = app.post("/v1/datasets", &body).await.problem(422, code);
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
    }
}

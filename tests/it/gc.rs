//! Garbage is collected, and only garbage.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use promptweave::db::MIGRATOR;
use promptweave::gc::{Collected, GcError, Retention, collect};
use promptweave::registry::{RegistryError, references};
use promptweave_domain::digest::Digest;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse};
use crate::ensembles::{Worker, furnished, post, request, until_state, url};
use crate::fixtures::FakeComposer;

const HOUR: Duration = Duration::from_secs(3600);
const GRACE: Retention = Retention {
    grace: HOUR,
    statistics: None,
};

fn files(app: &TestApp) -> Vec<PathBuf> {
    let root = app.dir.path().join("blobs/sha256");
    let folders = fs::read_dir(root).into_iter().flatten();
    let files = folders.flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap());
    files.map(|file| file.unwrap().path()).collect()
}

/// Makes everything that is stored two hours older.
pub async fn age(app: &TestApp) {
    for path in files(app) {
        let file = File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - 2 * HOUR).unwrap();
    }
    sqlx::query("UPDATE blob SET created_at = created_at - interval '2 hours'")
        .execute(&app.state.pool)
        .await
        .unwrap();
}

async fn gc(app: &TestApp, dry_run: bool) -> Collected {
    let collected = collect(&app.state.pool, &app.state.blobs, GRACE, dry_run).await;
    collected.unwrap()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn old_files_without_a_reference_go_and_nothing_else(pool: PgPool) {
    let app = furnished(pool).await;
    let ensemble = post(&app, &request()).await.ok(202);
    let _worker = Worker::start(&app, &FakeComposer::default());
    until_state(&app, &ensemble, "succeeded").await;
    let lost = app.state.blobs.put_bytes("lost").await.unwrap();
    let row = "INSERT INTO blob (sha256, bytes) VALUES (sha256('row'), 'row')";
    sqlx::query(row).execute(&app.state.pool).await.unwrap();
    age(&app).await;
    let young = app.state.blobs.put_bytes("young").await.unwrap();
    // These are the files of a backbone, a dataset and statistics, and the two garbage files.
    assert_eq!(files(&app).len(), 5);

    let expected = Collected {
        ensembles: 0,
        files: 2,
        bytes: 4 + 3,
    };
    assert_eq!(gc(&app, true).await, expected);
    assert!(app.state.blobs.exists(&lost.digest).await.unwrap());
    assert_eq!(gc(&app, false).await, expected);
    assert!(!app.state.blobs.exists(&lost.digest).await.unwrap());
    assert!(app.state.blobs.exists(&young.digest).await.unwrap());
    assert_eq!(files(&app).len(), 4);
    assert_eq!(gc(&app, false).await, Collected::default());

    assert_eq!(app.get(&url(&ensemble, "statistics")).await.status, 200);
    let composed = app.get(&url(&ensemble, "self")).await.ok(200);
    assert_eq!(
        app.get(&url(&composed, "composed_prompt")).await.status,
        200
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_about_to_be_referred_to_stays(pool: PgPool) {
    let app = furnished(pool).await;
    let (pool, blobs) = (app.state.pool.clone(), app.state.blobs.clone());
    let found = blobs.put_bytes("found there").await.unwrap();
    age(&app).await;
    let mut registering = pool.begin().await.unwrap();
    references::hold(&mut registering, &blobs, &found.digest)
        .await
        .unwrap();
    let collecting = {
        let (pool, blobs) = (pool.clone(), blobs.clone());
        tokio::spawn(async move { collect(&pool, &blobs, GRACE, false).await })
    };
    let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
    while !sqlx::query_scalar::<_, bool>(waits)
        .fetch_one(&pool)
        .await
        .unwrap()
    {
        tokio::task::yield_now().await;
    }
    sqlx::query(
        "WITH made AS (INSERT INTO dataset (id, project_id, name) SELECT gen_random_uuid(), id, 'other' FROM project
                       RETURNING id, project_id)
         INSERT INTO dataset_version (id, project_id, dataset_id, version, digest, size, classes, class_counts, skipped)
         SELECT gen_random_uuid(), project_id, id, 1, $1, 11, '[]', '{}', 0 FROM made",
    )
    .bind(found.digest.as_bytes())
    .execute(&mut *registering)
    .await
    .unwrap();
    registering.commit().await.unwrap();
    assert_eq!(collecting.await.unwrap().unwrap(), Collected::default());
    assert!(blobs.exists(&found.digest).await.unwrap());

    // The later of the two gets an error.
    let mut late = pool.begin().await.unwrap();
    let gone = references::hold(&mut late, &blobs, &Digest::of(b"gone")).await;
    let error = gone.unwrap_err();
    assert!(matches!(error, RegistryError::BlobGone(_)), "{error}");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn statistics_go_after_their_time_and_say_so(pool: PgPool) {
    let app = furnished(pool).await;
    let ensemble = post(&app, &request()).await.ok(202);
    let worker = Worker::start(&app, &FakeComposer::default());
    let done = until_state(&app, &ensemble, "succeeded").await;
    assert_ne!(done["urls"]["solve"], Value::Null);
    worker.stop().await;
    let resolve = format!("{}/solve", url(&ensemble, "self"));
    let again = app.post(&resolve, &json!({})).await.ok(202);
    let cancel = format!("{}/cancel", url(&again, "self"));
    app.post(&cancel, &json!({})).await.ok(200);
    age(&app).await;
    let retention = Retention {
        grace: HOUR,
        statistics: Some(HOUR),
    };
    let collect = async || {
        collect(&app.state.pool, &app.state.blobs, retention, false)
            .await
            .unwrap()
    };
    assert_eq!(
        collect().await,
        Collected::default(),
        "it ended a moment ago"
    );
    sqlx::query("UPDATE job SET finished_at = finished_at - interval '2 hours'")
        .execute(&app.state.pool)
        .await
        .unwrap();
    let collected = collect().await;
    assert_eq!((collected.ensembles, collected.files), (1, 1));
    let gone = |answer: TestResponse| {
        let problem = answer.problem(410, "statistics_deleted");
        assert!(
            problem["detail"]
                .as_str()
                .unwrap()
                .contains("--statistics-days")
        );
    };
    gone(app.get(&url(&ensemble, "statistics")).await);
    gone(app.post(&resolve, &json!({})).await);
    // A retry that would fail for want of the statistics is refused.
    let retry = format!("{}/retry", url(&again, "self"));
    gone(app.post(&retry, &json!({})).await);
    let still = app.get(&url(&again, "self")).await.ok(200);
    assert_eq!(still["state"], "cancelled");
    let after = app.get(&url(&ensemble, "self")).await.ok(200);
    assert_eq!(after["urls"]["solve"], Value::Null);
    // The result itself stays.
    app.get(&url(&ensemble, "result")).await.ok(200);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn the_files_of_another_database_are_not_garbage(pool: PgPool) {
    let app = TestApp::new(pool);
    assert_eq!(
        gc(&app, false).await,
        Collected::default(),
        "nothing at all is well"
    );
    app.state.blobs.put_bytes("of another").await.unwrap();
    age(&app).await;
    let refused = collect(&app.state.pool, &app.state.blobs, GRACE, false).await;
    assert!(matches!(refused, Err(GcError::Strangers)), "{refused:?}");
    assert_eq!(files(&app).len(), 1);
}

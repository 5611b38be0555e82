//! The real private cluster of `up`: as root (then it runs as `postgres`) and as any other user.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use promptweave::private_postgres::{PrivatePostgres, PrivatePostgresError};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection, PgConnection};
use tempfile::TempDir;

/// A directory that everybody may enter, whatever the umask.
fn reachable() -> TempDir {
    with_mode(0o755)
}

fn with_mode(mode: u32) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
    dir
}

async fn connect(postgres: &PrivatePostgres) -> PgConnection {
    PgConnection::connect(&postgres.url()).await.unwrap()
}

async fn count(postgres: &PrivatePostgres) -> i64 {
    let mut db = connect(postgres).await;
    sqlx::query_scalar("SELECT count(*) FROM kept")
        .fetch_one(&mut db)
        .await
        .unwrap()
}

#[tokio::test]
async fn what_is_stored_is_there_after_a_stop_and_after_a_kill() {
    let dir = reachable();
    let first = PrivatePostgres::start(dir.path(), None).await.unwrap();
    let mut db = connect(&first).await;
    sqlx::raw_sql("CREATE TABLE kept (x int); INSERT INTO kept VALUES (1)")
        .execute(&mut db)
        .await
        .unwrap();
    drop(db);

    // A second cluster in the same directory is refused, and the error names the owner.
    match PrivatePostgres::start(dir.path(), None).await {
        Err(PrivatePostgresError::Locked { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
        other => panic!("{other:?}"),
    }
    first.stop().await.unwrap();

    let second = PrivatePostgres::start(dir.path(), None).await.unwrap();
    assert_eq!(count(&second).await, 1);
    // To PostgreSQL this looks like a power cut: the pid file stays.
    let pid = second.process_id().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    let mut second = second;
    second.exited().await.unwrap();
    assert!(second.directory().join("postmaster.pid").exists());
    drop(second);

    let third = PrivatePostgres::start(dir.path(), None).await.unwrap();
    assert_eq!(count(&third).await, 1);
    third.stop().await.unwrap();
}

/// Waits until `condition` holds.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let patience = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), patience)
        .await
        .expect(what);
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_no_process_and_no_half_made_cluster() {
    let dir = reachable();
    let base = dir.path().join("postgres");
    let unfinished = || {
        let names = fs::read_dir(&base).into_iter().flatten().flatten();
        let names = names.map(|entry| entry.file_name().into_string().unwrap());
        names
            .filter(|name| name.starts_with("data.unfinished-"))
            .collect::<Vec<_>>()
    };
    // The start is given up while `initdb` works.
    tokio::select! {
        started = PrivatePostgres::start(dir.path(), None) => panic!("{started:?}"),
        () = until("initdb's folder", || !unfinished().is_empty()) => {}
    }
    let left = unfinished();
    assert!(!base.join("data").exists());

    // The start is given up while the postmaster starts, which then stops in order.
    let pid_file = base.join("data/postmaster.pid");
    tokio::select! {
        started = PrivatePostgres::start(dir.path(), None) => panic!("{started:?}"),
        () = until("a postmaster", || pid_file.exists()) => {}
    }
    until("its end", || !pid_file.exists()).await;
    assert!(unfinished().is_empty(), "{left:?} was removed");

    let postgres = PrivatePostgres::start(dir.path(), None).await.unwrap();
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn a_postmaster_left_running_is_stopped_and_a_stranger_with_its_number_is_not() {
    let dir = reachable();
    let up = PrivatePostgres::start(dir.path(), None).await.unwrap();
    let (data, orphan) = (up.directory().to_owned(), up.process_id().unwrap());
    // This is like `kill -9` of `up`: no destructor runs, and only the lock is released.
    std::mem::forget(up);
    fs::remove_file(dir.path().join("up.lock")).unwrap();

    let next = PrivatePostgres::start(dir.path(), None).await.unwrap();
    assert_ne!(next.process_id(), Some(orphan));
    next.stop().await.unwrap();

    // The number in a stale lock file may now belong to any process: here, to this one.
    let lock = format!("{}\n", std::process::id());
    fs::write(data.join("postmaster.pid"), &lock).unwrap();
    let socket_lock = data.with_file_name("run").join(".s.PGSQL.5432.lock");
    fs::write(socket_lock, lock).unwrap();
    let last = PrivatePostgres::start(dir.path(), None).await.unwrap();
    last.stop().await.unwrap();
}

#[tokio::test]
async fn a_long_path_gets_a_short_socket() {
    let dir = reachable();
    let long = dir.path().join("d".repeat(120));
    let postgres = PrivatePostgres::start(&long, None).await.unwrap();
    let mut db = connect(&postgres).await;
    let socket: String = sqlx::query_scalar("SHOW unix_socket_directories")
        .fetch_one(&mut db)
        .await
        .unwrap();
    let tcp: String = sqlx::query_scalar("SHOW listen_addresses")
        .fetch_one(&mut db)
        .await
        .unwrap();
    assert_eq!(tcp, "");
    drop(db);
    postgres.stop().await.unwrap();
    let socket = Path::new(socket.trim_matches('"'));
    assert_eq!(
        fs::metadata(socket).unwrap().permissions().mode() & 0o777,
        0o700
    );
    fs::remove_dir(socket).unwrap();
}

#[tokio::test]
async fn a_data_directory_that_the_clusters_user_cannot_reach_still_works_for_root() {
    if !rustix::process::geteuid().is_root() {
        return; // Everybody reaches their own directories.
    }
    let dir = with_mode(0o700); // root's own
    let data_dir = dir.path().join("data");
    let postgres = PrivatePostgres::start(&data_dir, None).await.unwrap();
    let base = postgres.directory().parent().unwrap().to_owned();
    assert!(
        base.starts_with("/var/lib/promptweave"),
        "{}",
        base.display()
    );
    postgres.stop().await.unwrap();
    // The data directory remembers the other place.
    let again = PrivatePostgres::start(&data_dir, None).await.unwrap();
    assert_eq!(again.directory().parent(), Some(base.as_path()));
    again.stop().await.unwrap();
    fs::remove_dir_all(base).unwrap();
}

#[tokio::test]
async fn missing_programs_are_named_with_the_way_out() {
    let (dir, empty) = (reachable(), reachable());
    let error = PrivatePostgres::start(dir.path(), Some(empty.path()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, PrivatePostgresError::Unsuitable(_)),
        "{error}"
    );
    let started = Instant::now();
    // The lock was released, so the failure does not block the next start.
    let postgres = PrivatePostgres::start(dir.path(), None).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(60));
    postgres.stop().await.unwrap();
}

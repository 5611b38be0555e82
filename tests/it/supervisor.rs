//! `up` and a worker that dies, with stand-ins for the worker program.

use std::fs;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use promptweave::db::MIGRATOR;
use promptweave::jobs::queue;
use promptweave::jobs::workers;
use promptweave::jobs::workers::{NewWorker, Worker};
use promptweave::shutdown::Shutdown;
use promptweave::supervisor::Supervisor;
use rustix::process::{Pid, Signal, kill_process};
use sqlx::PgPool;
use tokio::process::Command;
use uuid::Uuid;

use crate::fixtures;

/// A worker that notes its process and its id, and then runs the script.
fn supervisor(pool: &PgPool, notes: &Path, script: &str) -> Supervisor {
    let script = format!("echo $$ \"$PROMPTWEAVE_WORKER_ID\" >> \"$0\"; {script}");
    let mut program = Command::new("sh");
    program.arg("-c").arg(script).arg(notes);
    Supervisor {
        program,
        pool: pool.clone(),
        device: "cuda:9".to_owned(),
        shutdown: Shutdown::default(),
    }
}

/// Process and id of every start.
fn starts(notes: &Path) -> Vec<(u32, Uuid)> {
    let text = fs::read_to_string(notes).unwrap_or_default();
    let whole_lines = text.split_inclusive('\n').filter(|it| it.ends_with('\n'));
    let read = |line: &str| {
        let (pid, id) = line.trim().split_once(' ').unwrap();
        (pid.parse().unwrap(), id.parse().unwrap())
    };
    whole_lines.map(read).collect()
}

async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let patience = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let answer = tokio::time::timeout(Duration::from_secs(60), patience).await;
    answer.unwrap_or_else(|_| panic!("{what}"))
}

async fn listed(pool: &PgPool) -> Vec<Worker> {
    workers::list(&mut pool.acquire().await.unwrap())
        .await
        .unwrap()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_worker_that_ends_as_it_was_asked_to_stays_down(pool: PgPool) {
    let dir = tempfile::tempdir().unwrap();
    let notes = dir.path().join("notes");
    // It returns, because nothing is left to supervise.
    supervisor(&pool, &notes, "exit 0").run().await;
    assert_eq!(starts(&notes).len(), 1);
    assert!(listed(&pool).await.is_empty());
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn three_failed_starts_in_a_row_make_a_worker_defunct(pool: PgPool) {
    let dir = tempfile::tempdir().unwrap();
    let notes = dir.path().join("notes");
    let supervisor = supervisor(&pool, &notes, "exit 3");
    let shutdown = supervisor.shutdown.clone();
    let supervised = tokio::spawn(supervisor.run());
    let defunct = until("a defunct worker", || async {
        let listed = listed(&pool).await;
        listed.into_iter().find(|worker| worker.state == "defunct")
    })
    .await;
    let starts = starts(&notes);
    assert_eq!(starts.len(), 3);
    // All starts have one row.
    assert!(starts.iter().all(|(_, id)| *id == defunct.id), "{starts:?}");
    assert_eq!(listed(&pool).await.len(), 1);
    assert_eq!(defunct.pid as u32, starts[2].0);
    assert_eq!(defunct.device, "cuda:9");
    assert_eq!(defunct.host, promptweave::worker::hostname());
    assert!(!defunct.live);
    let reason = defunct.reason.unwrap();
    assert!(reason.contains("exit status: 3"), "{reason}");
    // When told to stop, it does not wait for the next try.
    shutdown.soft.cancel();
    supervised.await.unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_worker_that_is_killed_at_work_is_dead_in_the_list_and_replaced(pool: PgPool) {
    let dir = tempfile::tempdir().unwrap();
    let notes = dir.path().join("notes");
    let supervisor = supervisor(&pool, &notes, "cat > /dev/null");
    let shutdown = supervisor.shutdown.clone();
    let supervised = tokio::spawn(supervisor.run());
    let (pid, id) = until("a start", || async { starts(&notes).first().copied() }).await;
    let mut db = pool.acquire().await.unwrap();
    let new = NewWorker {
        id,
        host: "here",
        pid,
        device: "cuda:9",
        driver: Some("580.65.06"),
        ..NewWorker::default()
    };
    workers::register(&mut db, &new).await.unwrap();
    let spec = fixtures::spec(&mut db).await;
    fixtures::enqueue(&mut db, &spec).await;
    queue::claim(&mut db, id, Duration::from_secs(30))
        .await
        .unwrap()
        .unwrap();
    assert!(listed(&pool).await[0].live);

    let process = Pid::from_raw(pid as i32).unwrap();
    kill_process(process, Signal::KILL).unwrap();
    let (_, next) = until("another start", || async { starts(&notes).get(1).copied() }).await;
    // The next start is another worker, because this one had worked; and the reason why the first is gone is stored.
    assert_ne!(next, id);
    let dead = &listed(&pool).await[0];
    assert_eq!(
        (dead.id, dead.state.as_str(), dead.live),
        (id, "stopped", false)
    );
    assert_eq!(dead.driver.as_deref(), Some("580.65.06"));
    let reason = dead.reason.as_deref().unwrap();
    assert!(reason.contains("signal: 9"), "{reason}");
    shutdown.soft.cancel();
    supervised.await.unwrap();
}

//! The queue's statements on a real Postgres. Time is the database's, so a lease is made to run out by moving its end
//! into the past, never by waiting.

use std::time::Duration;

use promptweave::blobs::BlobStore;
use promptweave::db::MIGRATOR;
use promptweave::jobs::events;
use promptweave::jobs::finish::{Finished, NewPrompt, finish};
use promptweave::jobs::lease::RenewOutcome;
use promptweave::jobs::queue;
use promptweave::jobs::queue::{Claimed, QueueError};
use promptweave::jobs::requests;
use promptweave::jobs::requests::Cancellation;
use promptweave::jobs::workers;
use promptweave::jobs::workers::WorkerState;
use promptweave::registry::lineage;
use promptweave::registry::lineage::Direction;
use promptweave::registry::{DEFAULT_PROJECT, prompt_versions};
use promptweave_domain::digest::Digest;
use promptweave_domain::job::{EnsembleSpec, JobError, JobState, MAX_ATTEMPTS, Progress};
use promptweave_domain::phase::Phase;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::specification::JobSpec;
use promptweave_domain::words::JobErrorCode;
use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};
use uuid::Uuid;

use crate::fixtures::{composition, enqueue, enqueue_with_priority, job, sources_of, spec, worker};

const LEASE: Duration = Duration::from_secs(30);

async fn claim(db: &mut PgConnection, worker: Uuid) -> Claimed {
    queue::claim(db, worker, LEASE)
        .await
        .unwrap()
        .expect("a job waits")
}

async fn nothing_to_claim(db: &mut PgConnection, worker: Uuid) {
    assert!(queue::claim(db, worker, LEASE).await.unwrap().is_none());
}

async fn run_out(db: &mut PgConnection, job: Uuid) {
    sqlx::query("UPDATE job SET lease_until = now() - interval '1 second' WHERE id = $1")
        .bind(job)
        .execute(db)
        .await
        .unwrap();
}

async fn finish_with(
    db: &mut PgConnection,
    claimed: &Claimed,
    spec: &EnsembleSpec,
    weights: &[f64],
) -> Result<(), QueueError> {
    let composed = composition(&sources_of(spec), weights);
    let file = PromptFile::parse(&composed.composed).unwrap();
    let finished = Finished::Ensemble {
        spec,
        result: &composed.result,
        composed: NewPrompt {
            bytes: &composed.composed,
            metadata: file.metadata.as_ref().unwrap(),
            file: &file,
            output: &spec.output.parse().unwrap(),
        },
        ensemble: None,
        statistics: Digest::of(&composed.statistics),
    };
    let dir = tempfile::tempdir().unwrap();
    let blobs = BlobStore::directory(dir.path()).unwrap();
    blobs.put_bytes(composed.statistics.clone()).await.unwrap();
    finish(db, &blobs, claimed, finished).await
}

async fn outcomes(db: &mut PgConnection, job: Uuid) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT coalesce(outcome, 'open') FROM job_attempt WHERE job_id = $1 ORDER BY started_at",
    )
    .bind(job)
    .fetch_all(db)
    .await
    .unwrap()
}

async fn count(db: &mut PgConnection, table: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM {table}");
    sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
        .fetch_one(db)
        .await
        .unwrap()
}

async fn kinds(db: &mut PgConnection, job: Uuid) -> Vec<String> {
    let events = events::list(db, DEFAULT_PROJECT, job, 0, 100)
        .await
        .unwrap();
    assert!(events.iter().map(|e| e.seq).eq(1..=events.len() as i32));
    events.into_iter().map(|e| e.kind).collect()
}

/// A claim counts a job's events before it locks the row. A worker that has the job and gives it back in between adds
/// events. Here a statement that does not lock the row adds one, so that the claim comes in between.
#[sqlx::test(migrator = "MIGRATOR")]
async fn an_event_that_a_claim_did_not_see_makes_it_look_again(pool: PgPool) {
    let mut db = pool.acquire().await.unwrap();
    let spec = spec(&mut db).await;
    let id = enqueue(&mut db, &spec).await;
    let worker = worker(&mut db).await;
    let mut other = pool.begin().await.unwrap();
    sqlx::raw_sql("SET LOCAL session_replication_role = replica")
        .execute(&mut *other)
        .await
        .unwrap();
    sqlx::query("INSERT INTO job_event (job_id, seq, kind, data) VALUES ($1, 2, 'released', '{}')")
        .bind(id)
        .execute(&mut *other)
        .await
        .unwrap();
    let waiting = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
                   AND wait_event_type = 'Lock' AND query LIKE '%SKIP LOCKED%')";
    let (claimed, ()) = tokio::join!(claim(&mut db, worker), async {
        let mut looking = pool.acquire().await.unwrap();
        while !sqlx::query_scalar::<_, bool>(waiting)
            .fetch_one(&mut *looking)
            .await
            .unwrap()
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        other.commit().await.unwrap();
    });
    assert_eq!((claimed.lease.job_id, claimed.attempt), (id, 1));
    assert_eq!(kinds(&mut db, id).await, ["queued", "released", "started"]);
    assert_eq!(outcomes(&mut db, id).await, ["open"]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_job_goes_through_its_phases_and_its_result_is_published(
    mut db: PoolConnection<Postgres>,
) {
    let spec = spec(&mut db).await;
    let id = enqueue(&mut db, &spec).await;
    let worker = worker(&mut db).await;
    let claimed = claim(&mut db, worker).await;
    assert_eq!((claimed.lease.job_id, claimed.attempt), (id, 1));
    assert_eq!(claimed.spec, JobSpec::Ensemble(spec.clone()));
    nothing_to_claim(&mut db, worker).await;

    for (phase, done) in [
        (Phase::Features, 1),
        (Phase::Features, 2),
        (Phase::Gradients, 0),
    ] {
        let progress = Progress {
            phase,
            done,
            total: 2,
        };
        let renewal = claimed.lease.progress(&mut db, progress).await.unwrap();
        assert_eq!(renewal, RenewOutcome::Renewed);
        assert_eq!(job(&mut db, id).await.progress, Some(progress));
    }
    finish_with(&mut db, &claimed, &spec, &[0.25, 0.75])
        .await
        .unwrap();

    let done = job(&mut db, id).await;
    assert_eq!(done.state, JobState::Succeeded);
    assert!(done.finished_at.is_some());
    let result = done.result.unwrap();
    assert_eq!(
        result.composed_prompt.prompt.as_deref(),
        Some("emoji-composed")
    );
    assert_eq!(result.composed_prompt.version, Some(1));
    let reference = "emoji-composed:1".parse().unwrap();
    let version = prompt_versions::resolve(&mut db, DEFAULT_PROJECT, &reference)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(version.produced_by_job, Some(id));
    assert_eq!(version.digest, result.composed_prompt.digest);
    let graph = lineage::walk(&mut db, DEFAULT_PROJECT, version.id, Direction::Up, 1)
        .await
        .unwrap();
    let edges: Vec<_> = graph
        .edges
        .iter()
        .map(|edge| (edge.parent.to_string(), edge.weight))
        .collect();
    let expected = [("flowers:1", 0.75), ("digits:1", 0.25)];
    assert_eq!(
        edges,
        expected.map(|(name, weight)| (name.to_owned(), weight))
    );
    assert_eq!(
        kinds(&mut db, id).await,
        ["queued", "started", "phase", "phase", "succeeded"]
    );
    assert_eq!(outcomes(&mut db, id).await, ["succeeded"]);
    assert_eq!(count(&mut db, "job_shard").await, 0);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn weights_that_do_not_sum_to_one_cannot_be_stored(mut db: PoolConnection<Postgres>) {
    let spec = spec(&mut db).await;
    let id = enqueue(&mut db, &spec).await;
    let worker = worker(&mut db).await;
    let claimed = claim(&mut db, worker).await;
    for weights in [[0.5, 0.6], [1.5, -0.5]] {
        let error = finish_with(&mut db, &claimed, &spec, &weights)
            .await
            .unwrap_err();
        let text = promptweave_domain::error_chain::chain(&error);
        assert!(
            text.contains("lineage_weight") || text.contains("sum to 1.1"),
            "{text}"
        );
    }
    // No part of it is stored, and the lease still holds.
    assert_eq!(job(&mut db, id).await.state, JobState::Running);
    assert_eq!(
        count(&mut db, "prompt WHERE name = 'emoji-composed'").await,
        0
    );
    finish_with(&mut db, &claimed, &spec, &[0.5, 0.5])
        .await
        .unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_lost_job_finishes_elsewhere_and_the_first_worker_writes_nothing(
    mut db: PoolConnection<Postgres>,
) {
    let spec = spec(&mut db).await;
    let id = enqueue(&mut db, &spec).await;
    let (slow, quick) = (worker(&mut db).await, worker(&mut db).await);
    let stale = claim(&mut db, slow).await;
    assert!(queue::reap(&mut db).await.unwrap().is_empty());
    run_out(&mut db, id).await;

    // The lease is not reaped yet, but it is already too late to finish.
    let late = finish_with(&mut db, &stale, &spec, &[1.0, 0.0])
        .await
        .unwrap_err();
    assert!(
        matches!(late, QueueError::LeaseLost(lost) if lost == id),
        "{late}"
    );

    let reaped = queue::reap(&mut db).await.unwrap();
    assert_eq!((reaped[0].job_id, reaped[0].state), (id, JobState::Queued));
    let second = claim(&mut db, quick).await;
    assert_eq!(second.attempt, 2);

    let progress = Progress {
        phase: Phase::Solve,
        done: 1,
        total: 1,
    };
    for refusal in [
        stale.lease.renew(&mut db, LEASE).await.map(drop),
        stale.lease.progress(&mut db, progress).await.map(drop),
        queue::fail(
            &mut db,
            stale.lease,
            JobError::new(JobErrorCode::Stalled, "x"),
            None,
        )
        .await
        .map(drop),
        queue::release(&mut db, stale.lease).await,
        queue::finish_cancelled(&mut db, stale.lease).await,
        finish_with(&mut db, &stale, &spec, &[1.0, 0.0]).await,
    ] {
        assert!(
            matches!(refusal, Err(QueueError::LeaseLost(_))),
            "{refusal:?}"
        );
    }
    assert_eq!(
        count(&mut db, "prompt WHERE name = 'emoji-composed'").await,
        0
    );
    assert_eq!(job(&mut db, id).await.progress, None);

    finish_with(&mut db, &second, &spec, &[0.25, 0.75])
        .await
        .unwrap();
    let done = job(&mut db, id).await;
    assert_eq!(done.result.unwrap().source_weights[0].weight, 0.25);
    assert_eq!(
        count(&mut db, "prompt_version WHERE produced_by_job IS NOT NULL").await,
        1
    );
    assert_eq!(outcomes(&mut db, id).await, ["lost", "succeeded"]);
    // A job that is over stays over.
    assert!(
        finish_with(&mut db, &second, &spec, &[0.25, 0.75])
            .await
            .is_err()
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_renewed_lease_is_not_reaped(mut db: PoolConnection<Postgres>) {
    let spec = spec(&mut db).await;
    let id = enqueue(&mut db, &spec).await;
    let worker = worker(&mut db).await;
    let claimed = claim(&mut db, worker).await;
    run_out(&mut db, id).await;
    let renewal = claimed.lease.renew(&mut db, LEASE).await.unwrap();
    assert_eq!(renewal, RenewOutcome::Renewed);
    assert!(queue::reap(&mut db).await.unwrap().is_empty());
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn cancelling(mut db: PoolConnection<Postgres>) {
    let spec = spec(&mut db).await;
    let worker = worker(&mut db).await;
    let none = requests::cancel(&mut db, DEFAULT_PROJECT, Uuid::now_v7())
        .await
        .unwrap();
    assert_eq!(none, None);

    // A waiting job is cancelled immediately and never claimed.
    let id = enqueue(&mut db, &spec).await;
    let mut cancel = async |id| {
        requests::cancel(&mut db, DEFAULT_PROJECT, id)
            .await
            .unwrap()
            .unwrap()
    };
    assert_eq!(cancel(id).await, Cancellation::Cancelled);
    assert_eq!(
        cancel(id).await,
        Cancellation::AlreadyOver(JobState::Cancelled)
    );
    assert_eq!(kinds(&mut db, id).await, ["queued", "cancelled"]);
    nothing_to_claim(&mut db, worker).await;

    // The worker of a running job learns of it at its next write.
    let id = enqueue(&mut db, &spec).await;
    let claimed = claim(&mut db, worker).await;
    let mut cancel = async |id| {
        requests::cancel(&mut db, DEFAULT_PROJECT, id)
            .await
            .unwrap()
            .unwrap()
    };
    assert_eq!(cancel(id).await, Cancellation::Requested);
    assert_eq!(cancel(id).await, Cancellation::Requested);
    let renewal = claimed.lease.renew(&mut db, LEASE).await.unwrap();
    assert_eq!(renewal, RenewOutcome::CancelRequested);
    queue::finish_cancelled(&mut db, claimed.lease)
        .await
        .unwrap();
    assert_eq!(job(&mut db, id).await.state, JobState::Cancelled);
    assert_eq!(
        kinds(&mut db, id).await,
        ["queued", "started", "cancel_requested", "cancelled"]
    );

    // The worker dies first: reaping cancels the job instead of queueing it again.
    let id = enqueue(&mut db, &spec).await;
    claim(&mut db, worker).await;
    requests::cancel(&mut db, DEFAULT_PROJECT, id)
        .await
        .unwrap();
    run_out(&mut db, id).await;
    assert_eq!(
        queue::reap(&mut db).await.unwrap()[0].state,
        JobState::Cancelled
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_retry_waits_and_a_refusal_does_not_come_back(mut db: PoolConnection<Postgres>) {
    let spec = spec(&mut db).await;
    let id = enqueue(&mut db, &spec).await;
    let worker = worker(&mut db).await;
    let claimed = claim(&mut db, worker).await;
    let error = JobError::new(JobErrorCode::Libtorch, "no room");
    let wait = Some(Duration::from_secs(60));
    let state = queue::fail(&mut db, claimed.lease, error.clone(), wait)
        .await
        .unwrap();
    assert_eq!(state, JobState::Queued);
    nothing_to_claim(&mut db, worker).await;
    let waiting = job(&mut db, id).await;
    assert_eq!(waiting.error.as_ref(), Some(&error));
    let delay = waiting.run_at - waiting.started_at.unwrap();
    assert!(delay >= time::Duration::seconds(60), "{delay}");

    sqlx::query("UPDATE job SET run_at = now()")
        .execute(&mut *db)
        .await
        .unwrap();
    let claimed = claim(&mut db, worker).await;
    let refused = JobError::new(JobErrorCode::NotFinite, "sample 3 has NaN");
    let state = queue::fail(&mut db, claimed.lease, refused.clone(), None)
        .await
        .unwrap();
    assert_eq!(state, JobState::Failed);
    assert_eq!(job(&mut db, id).await.error, Some(refused));
    assert_eq!(outcomes(&mut db, id).await, ["retried", "failed"]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_job_that_kills_its_workers_ends_as_exhausted(mut db: PoolConnection<Postgres>) {
    let spec = spec(&mut db).await;
    let id = enqueue(&mut db, &spec).await;
    let worker = worker(&mut db).await;
    for attempt in 1..=MAX_ATTEMPTS {
        assert_eq!(claim(&mut db, worker).await.attempt, attempt);
        run_out(&mut db, id).await;
        queue::reap(&mut db).await.unwrap();
    }
    nothing_to_claim(&mut db, worker).await;
    let failed = job(&mut db, id).await;
    assert_eq!(failed.state, JobState::Failed);
    let error = failed.error.unwrap();
    assert_eq!(error.code, "attempts_exhausted");
    assert!(error.detail.contains("worker_lost"), "{}", error.detail);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_job_given_back_does_not_count_the_attempt(mut db: PoolConnection<Postgres>) {
    let spec = spec(&mut db).await;
    let id = enqueue(&mut db, &spec).await;
    let worker = worker(&mut db).await;
    for _ in 0..MAX_ATTEMPTS + 1 {
        let claimed = claim(&mut db, worker).await;
        assert_eq!(claimed.attempt, 1);
        queue::release(&mut db, claimed.lease).await.unwrap();
    }
    assert_eq!(job(&mut db, id).await.attempt, 0);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn workers_at_once_get_different_jobs_and_the_urgent_ones_first(pool: PgPool) {
    let mut db = pool.acquire().await.unwrap();
    let spec = spec(&mut db).await;
    let mut usual = Vec::new();
    for _ in 0..3 {
        usual.push(enqueue(&mut db, &spec).await);
    }
    let urgent = enqueue_with_priority(&mut db, &spec, 1).await;
    let worker = worker(&mut db).await;
    assert_eq!(claim(&mut db, worker).await.lease.job_id, urgent);

    // A claim that has not committed yet hides its row from other claims, which do not wait for it.
    let mut other = pool.begin().await.unwrap();
    let first = queue::claim(&mut other, worker, LEASE)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first.lease.job_id, usual[0]);
    assert_eq!(claim(&mut db, worker).await.lease.job_id, usual[1]);
    other.rollback().await.unwrap();
    assert_eq!(claim(&mut db, worker).await.lease.job_id, usual[0]);
    assert_eq!(claim(&mut db, worker).await.lease.job_id, usual[2]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_worker_is_ready_while_its_engine_answers(mut db: PoolConnection<Postgres>) {
    assert!(!workers::any_ready(&mut db).await.unwrap());
    let id = worker(&mut db).await;
    assert!(workers::any_ready(&mut db).await.unwrap());
    // The worker is alive, but its engine has been silent for two minutes.
    sqlx::query("UPDATE worker SET selftest_at = now() - interval '2 minutes'")
        .execute(&mut *db)
        .await
        .unwrap();
    workers::seen(&mut db, id, WorkerState::Idle, false)
        .await
        .unwrap();
    assert!(!workers::any_ready(&mut db).await.unwrap());
    // Progress on a job is a sign of life from the engine too.
    let spec = spec(&mut db).await;
    enqueue(&mut db, &spec).await;
    claim(&mut db, id).await;
    assert!(workers::any_ready(&mut db).await.unwrap());
    workers::seen(&mut db, id, WorkerState::Stopped, true)
        .await
        .unwrap();
    assert!(!workers::any_ready(&mut db).await.unwrap());
    let listed = workers::list(&mut db).await.unwrap();
    assert_eq!((listed[0].id, listed[0].live), (id, false));
}

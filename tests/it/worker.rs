//! Workers with a fake engine, on a real queue: what happens to a job whatever goes wrong around it.

use std::fs;
use std::future::Future;
use std::sync::atomic::Ordering;
use std::time::Duration;

use promptweave::blobs::BlobStore;
use promptweave::db::MIGRATOR;
use promptweave::jobs::queue;
use promptweave::jobs::requests;
use promptweave::jobs::requests::Cancellation;
use promptweave::jobs::{Job, events, reaper, workers};
use promptweave::private_postgres::PrivatePostgres;
use promptweave::registry::{DEFAULT_PROJECT, datasets};
use promptweave::shutdown::Shutdown;
use promptweave::worker::{SEEN_EVERY, WorkerError, WorkerSettings, run};
use promptweave_domain::digest::Digest;
use promptweave_domain::job::{EnsembleSpec, JobState, SolvedFrom};
use promptweave_domain::split::Split;
use rustix::process::{Pid, Signal, kill_process};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::fixtures::{self, FakeComposer, Script};

/// Polls until the condition holds, for much longer than anything here takes.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let patience = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), patience)
        .await
        .unwrap_or_else(|_| panic!("{what}"));
}

/// A queue with one spec, whose files are all in the stores.
struct Place {
    pool: PgPool,
    blobs: BlobStore,
    dir: TempDir,
    spec: EnsembleSpec,
}

struct RunningWorker {
    shutdown: Shutdown,
    task: JoinHandle<Result<(), WorkerError>>,
}

impl RunningWorker {
    async fn stop(self) -> Result<(), WorkerError> {
        self.shutdown.soft.cancel();
        self.task.await.unwrap()
    }
}

impl Place {
    async fn new(pool: PgPool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::directory(&dir.path().join("blobs")).unwrap();
        let mut spec = fixtures::spec(&mut pool.acquire().await.unwrap()).await;

        let images = dir.path().join("images");
        fs::create_dir_all(&images).unwrap();
        fs::write(images.join("meta.json"), r#"{"classes": ["cat", "dog"]}"#).unwrap();
        fs::write(images.join("train.txt"), "a.png 0\nb.png 1\n").unwrap();
        for name in ["a.png", "b.png"] {
            image::RgbImage::new(2, 2).save(images.join(name)).unwrap();
        }
        let pack = dir.path().join("pack.tar");
        let packed = datasets::pack(&images, false, &pack).unwrap();
        assert_eq!(packed.class_counts[&Split::Train], [1, 1]);
        spec.target.digest = blobs.put_file(&pack).await.unwrap().digest;
        spec.backbone.model_digest = blobs.put_bytes("model").await.unwrap().digest;
        Self {
            pool,
            blobs,
            dir,
            spec,
        }
    }

    async fn enqueue(&self) -> Uuid {
        fixtures::enqueue(&mut self.pool.acquire().await.unwrap(), &self.spec).await
    }

    async fn job(&self, id: Uuid) -> Job {
        fixtures::job(&mut self.pool.acquire().await.unwrap(), id).await
    }

    async fn until_state(&self, id: Uuid, state: JobState) -> Job {
        until(state.name(), || async { self.job(id).await.state == state }).await;
        self.job(id).await
    }

    /// Waits until the job is in the phase in which the fake blocks.
    async fn until_working(&self, id: Uuid) {
        until("progress", || async {
            self.job(id).await.progress.is_some()
        })
        .await;
    }

    async fn cancel(&self, id: Uuid) -> Cancellation {
        let mut db = self.pool.acquire().await.unwrap();
        requests::cancel(&mut db, DEFAULT_PROJECT, id)
            .await
            .unwrap()
            .unwrap()
    }

    fn worker(&self, fake: &FakeComposer) -> RunningWorker {
        self.worker_with(
            fake,
            Duration::from_secs(30),
            Duration::from_secs(600),
            self.pool.clone(),
        )
    }

    fn worker_with(
        &self,
        fake: &FakeComposer,
        lease: Duration,
        stall: Duration,
        pool: PgPool,
    ) -> RunningWorker {
        let shutdown = Shutdown::default();
        let settings = WorkerSettings {
            id: Uuid::now_v7(),
            device: "auto".to_owned(),
            seen_every: SEEN_EVERY,
            lease,
            stall,
            cache_dir: self.dir.path().join("cache"),
            min_shard_pairs: 0,
            cache_bytes: 1 << 30,
        };
        let task = tokio::spawn(run(
            settings,
            pool,
            self.blobs.clone(),
            fake.factory(),
            shutdown.clone(),
        ));
        RunningWorker { shutdown, task }
    }

    async fn event_kinds(&self, id: Uuid) -> Vec<String> {
        let mut db = self.pool.acquire().await.unwrap();
        let events = events::list(&mut db, DEFAULT_PROJECT, id, 0, 100)
            .await
            .unwrap();
        events.into_iter().map(|event| event.kind).collect()
    }

    async fn composed_prompts(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM prompt_version WHERE produced_by_job IS NOT NULL")
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn jobs_are_run_one_after_the_other_and_their_statistics_kept(pool: PgPool) {
    let place = Place::new(pool).await;
    let early = place.enqueue().await;
    let fake = FakeComposer::default();
    let worker = place.worker(&fake);
    let done = place.until_state(early, JobState::Succeeded).await;
    let statistics = place
        .blobs
        .get_bytes(&done.file_digest.unwrap())
        .await
        .unwrap();
    assert_eq!(statistics, "statistics");
    // This job is posted while the worker waits; the notification wakes it.
    let late = place.enqueue().await;
    place.until_state(late, JobState::Succeeded).await;
    // Equal compositions under one name are one version, which both jobs name.
    assert_eq!(place.composed_prompts().await, 1);
    assert_eq!(
        place
            .job(late)
            .await
            .result
            .unwrap()
            .composed_prompt
            .version,
        Some(1)
    );
    worker.stop().await.unwrap();
    let listed = workers::list(&mut place.pool.acquire().await.unwrap())
        .await
        .unwrap();
    assert_eq!(
        (listed[0].state.as_str(), listed[0].device.as_str()),
        ("stopped", "fake")
    );
    // The cache holds both inputs, and nothing unfinished.
    for kind in ["backbones", "datasets"] {
        let names: Vec<_> = fs::read_dir(place.dir.path().join("cache").join(kind))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names.len(), 1, "{names:?}");
        assert!(!names[0].starts_with('.'));
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn refusals_panics_and_retries_end_as_they_should(pool: PgPool) {
    let place = Place::new(pool).await;
    let fake = FakeComposer::playing([Script::Refuse, Script::Panic, Script::Retry]);
    let worker = place.worker(&fake);
    let refused = place.enqueue().await;
    let error = place
        .until_state(refused, JobState::Failed)
        .await
        .error
        .unwrap();
    assert_eq!(
        (error.code.as_str(), error.detail.as_str()),
        ("not_finite", "sample 3 has NaN")
    );

    let panicked = place.enqueue().await;
    let error = place
        .until_state(panicked, JobState::Failed)
        .await
        .error
        .unwrap();
    assert_eq!(error.code, "engine_panicked");
    assert!(error.detail.contains("a kernel failed"), "{}", error.detail);
    assert_eq!(
        fake.made.load(Ordering::SeqCst),
        2,
        "the composer that panicked is replaced"
    );

    let retried = place.enqueue().await;
    let has_failed = || async { place.job(retried).await.error.is_some() };
    until("an attempt that is to be retried", has_failed).await;
    let waiting = place.job(retried).await;
    assert_eq!((waiting.state, waiting.attempt), (JobState::Queued, 1));
    assert_eq!(waiting.error.unwrap().code, "libtorch");
    // Polling finds the job once its time has come.
    sqlx::query("UPDATE job SET run_at = now() WHERE state = 'queued'")
        .execute(&place.pool)
        .await
        .unwrap();
    assert_eq!(
        place
            .until_state(retried, JobState::Succeeded)
            .await
            .attempt,
        2
    );
    worker.stop().await.unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn missing_bytes_fail_the_job_and_say_what_is_missing(pool: PgPool) {
    let mut place = Place::new(pool).await;
    place.spec.backbone.model_digest = Digest::of(b"never stored");
    let id = place.enqueue().await;
    let fake = FakeComposer::default();
    let worker = place.worker(&fake);
    let error = place.until_state(id, JobState::Failed).await.error.unwrap();
    assert_eq!(error.code, "input_unavailable");
    assert!(
        error.detail.contains(&Digest::of(b"never stored").hex()),
        "{}",
        error.detail
    );
    assert_eq!(fake.begun.load(Ordering::SeqCst), 0);
    worker.stop().await.unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_running_job_is_cancelled_at_its_next_step(pool: PgPool) {
    let place = Place::new(pool).await;
    let id = place.enqueue().await;
    let fake = FakeComposer::playing([Script::UntilStopped]);
    let worker = place.worker(&fake);
    place.until_working(id).await;
    assert_eq!(place.cancel(id).await, Cancellation::Requested);
    place.until_state(id, JobState::Cancelled).await;
    assert_eq!(fake.stopped.load(Ordering::SeqCst), 1);
    assert_eq!(place.composed_prompts().await, 0);
    // The worker is free for the next one.
    let next = place.enqueue().await;
    place.until_state(next, JobState::Succeeded).await;
    worker.stop().await.unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_stopping_worker_gives_its_job_to_the_next(pool: PgPool) {
    let place = Place::new(pool).await;
    let id = place.enqueue().await;
    let fake = FakeComposer::playing([Script::UntilStopped]);
    let worker = place.worker(&fake);
    place.until_working(id).await;
    worker.stop().await.unwrap();
    let waiting = place.job(id).await;
    assert_eq!((waiting.state, waiting.attempt), (JobState::Queued, 0));
    let worker = place.worker(&fake);
    assert_eq!(place.until_state(id, JobState::Succeeded).await.attempt, 1);
    worker.stop().await.unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_worker_that_vanishes_loses_the_job_to_another(pool: PgPool) {
    let place = Place::new(pool).await;
    let id = place.enqueue().await;
    // The job is claimed and then abandoned, as a killed process leaves it.
    let mut db = place.pool.acquire().await.unwrap();
    let ghost = fixtures::worker(&mut db).await;
    queue::claim(&mut db, ghost, Duration::from_millis(300))
        .await
        .unwrap()
        .unwrap();
    drop(db);
    let worker = place.worker(&FakeComposer::default());
    assert_eq!(place.until_state(id, JobState::Succeeded).await.attempt, 2);
    let kinds = place.event_kinds(id).await;
    assert!(kinds.contains(&"lost".to_owned()), "{kinds:?}");
    worker.stop().await.unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_worker_whose_lease_is_taken_stops_and_writes_nothing(pool: PgPool) {
    let place = Place::new(pool).await;
    let id = place.enqueue().await;
    let slow = FakeComposer::playing([Script::UntilOpened]);
    // The lease is short, so the renewal soon notices that it is lost.
    let second = Duration::from_secs(1);
    let worker = place.worker_with(&slow, second, Duration::from_secs(600), place.pool.clone());
    place.until_working(id).await;
    // From here on another worker owns the job.
    let other = Uuid::now_v7();
    let new = workers::NewWorker {
        id: other,
        host: "other",
        pid: 1,
        device: "fake",
        ..workers::NewWorker::default()
    };
    workers::register(&mut place.pool.acquire().await.unwrap(), &new)
        .await
        .unwrap();
    sqlx::query(
        "UPDATE job SET lease_token = $2, worker_id = $3, lease_until = now() + interval '1 hour'
         WHERE id = $1",
    )
    .bind(id)
    .bind(Uuid::new_v4())
    .bind(other)
    .execute(&place.pool)
    .await
    .unwrap();
    until("the engine to be stopped", || async {
        slow.stopped.load(Ordering::SeqCst) == 1
    })
    .await;
    worker.stop().await.unwrap();
    assert_eq!(place.job(id).await.state, JobState::Running);
    assert_eq!(place.composed_prompts().await, 0);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_lease_is_renewed_for_as_long_as_the_work_takes(pool: PgPool) {
    let place = Place::new(pool).await;
    let id = place.enqueue().await;
    let fake = FakeComposer::playing([Script::UntilOpened]);
    let lease = Duration::from_secs(1);
    let worker = place.worker_with(&fake, lease, Duration::from_secs(600), place.pool.clone());
    place.until_working(id).await;
    // After twice the lease, by the database's clock, it is still the first attempt.
    until("two leases to pass", || async {
        sqlx::query_scalar::<_, bool>(
            "SELECT now() > started_at + interval '2 seconds' FROM job WHERE id = $1",
        )
        .bind(id)
        .fetch_one(&place.pool)
        .await
        .unwrap()
    })
    .await;
    fake.gate.store(true, Ordering::SeqCst);
    assert_eq!(place.until_state(id, JobState::Succeeded).await.attempt, 1);
    worker.stop().await.unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_stalled_engine_ends_the_worker_and_not_the_job(pool: PgPool) {
    let place = Place::new(pool).await;
    let id = place.enqueue().await;
    let fake = FakeComposer::playing([Script::UntilStopped]);
    // For this worker, no progress is ever recent enough.
    let worker = place.worker_with(
        &fake,
        Duration::from_secs(30),
        Duration::ZERO,
        place.pool.clone(),
    );
    let ended = worker.task.await.unwrap();
    assert!(matches!(ended, Err(WorkerError::Stuck(_))), "{ended:?}");
    let waiting = place.job(id).await;
    assert_eq!((waiting.state, waiting.attempt), (JobState::Queued, 1));
    assert_eq!(waiting.error.unwrap().code, "stalled");
}

#[tokio::test]
async fn a_job_outlives_a_restart_of_its_database() {
    let dir = tempfile::tempdir().unwrap();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut postgres = PrivatePostgres::start(dir.path(), None).await.unwrap();
    let connect = PgPoolOptions::new().acquire_timeout(Duration::from_secs(2));
    let pool = connect.connect(&postgres.url()).await.unwrap();
    MIGRATOR.run(&pool).await.unwrap();
    let place = Place::new(pool.clone()).await;
    let id = place.enqueue().await;
    let fake = FakeComposer::playing([Script::UntilOpened]);
    let worker = place.worker(&fake);
    place.until_working(id).await;

    let pid = Pid::from_raw(postgres.process_id().unwrap() as i32).unwrap();
    kill_process(pid, Signal::QUIT).unwrap();
    postgres.exited().await.unwrap();
    drop(postgres);
    // The work ends while the database is unreachable.
    fake.gate.store(true, Ordering::SeqCst);
    until("a refused connection", || async {
        pool.acquire().await.is_err()
    })
    .await;
    let postgres = PrivatePostgres::start(dir.path(), None).await.unwrap();
    until("the database to answer", || async {
        pool.acquire().await.is_ok()
    })
    .await;
    let done = place.until_state(id, JobState::Succeeded).await;
    assert_eq!(done.attempt, 1);
    worker.stop().await.unwrap();
    pool.close().await;
    postgres.stop().await.unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn any_process_reaps(pool: PgPool) {
    let place = Place::new(pool).await;
    let id = place.enqueue().await;
    let mut db = place.pool.acquire().await.unwrap();
    let ghost = fixtures::worker(&mut db).await;
    queue::claim(&mut db, ghost, Duration::ZERO)
        .await
        .unwrap()
        .unwrap();
    drop(db);
    let shutdown = Shutdown::default();
    let reaper = tokio::spawn(reaper::run(place.pool.clone(), shutdown.soft.clone()));
    place.until_state(id, JobState::Queued).await;
    shutdown.soft.cancel();
    reaper.await.unwrap();
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn solving_again_needs_statistics_alone_and_is_a_job_like_any(pool: PgPool) {
    let mut place = Place::new(pool).await;
    let statistics = Digest::of(b"statistics");
    place.spec.solved_from = Some(SolvedFrom {
        ensemble: Uuid::now_v7(),
        statistics,
    });
    // Nobody may ask for these files.
    place.spec.backbone.model_digest = Digest::of(b"never stored");
    place.spec.target.digest = Digest::of(b"nor this");
    let fake = FakeComposer::playing([Script::UntilStopped, Script::UntilStopped]);

    let early = place.enqueue().await;
    let worker = place.worker(&fake);
    let failed = place.until_state(early, JobState::Failed).await;
    let error = failed.error.unwrap();
    assert_eq!(error.code, "input_unavailable");
    assert!(error.detail.contains(&statistics.hex()), "{}", error.detail);
    place.blobs.put_bytes("statistics").await.unwrap();

    let cancelled = place.enqueue().await;
    place.until_working(cancelled).await;
    assert_eq!(place.cancel(cancelled).await, Cancellation::Requested);
    place.until_state(cancelled, JobState::Cancelled).await;

    // The job is given back by a worker that stops, then lost by one that vanishes, then done.
    let id = place.enqueue().await;
    place.until_working(id).await;
    worker.stop().await.unwrap();
    assert_eq!(place.job(id).await.state, JobState::Queued);
    let mut db = place.pool.acquire().await.unwrap();
    let ghost = fixtures::worker(&mut db).await;
    queue::claim(&mut db, ghost, Duration::ZERO)
        .await
        .unwrap()
        .unwrap();
    drop(db);
    let worker = place.worker(&fake);
    let done = place.until_state(id, JobState::Succeeded).await;
    worker.stop().await.unwrap();
    assert_eq!(done.attempt, 2);
    let result = done.result.unwrap();
    assert_eq!(result.provenance.solved_from, Some(statistics));
    let phases = "SELECT data->>'phase' FROM job_event WHERE job_id = $1 AND kind = 'phase'";
    let mut phases: Vec<String> = sqlx::query_scalar(phases)
        .bind(id)
        .fetch_all(&place.pool)
        .await
        .unwrap();
    phases.dedup();
    assert_eq!(phases, ["solve"]);
    assert!(!place.dir.path().join("cache").exists());
}

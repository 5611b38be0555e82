//! A worker: wait → claim → run → next. It needs the database and the blob store, nothing else.

pub mod composer_thread;
#[cfg(feature = "torch")]
pub mod engine;
mod inputs;
mod job_checkpoints;
mod job_shards;
mod renewal;
mod runner;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use uuid::Uuid;

use crate::blobs::BlobStore;
use crate::db::DbError;
use crate::jobs::listener::WorkListener;
use crate::jobs::queue;
use crate::jobs::queue::{Claimed, QueueError};
use crate::jobs::reaper;
use crate::jobs::shards;
use crate::jobs::shards::ClaimedShard;
use crate::jobs::workers;
use crate::jobs::workers::{End, NewWorker, WorkerState};
use crate::shutdown::Shutdown;
use composer_thread::{ComposerThread, NewComposer};
use inputs::Inputs;
use promptweave_domain::composer::CompositionError;
use promptweave_domain::error_chain::chain;
use promptweave_formats::directory_cache::DirectoryCache;
use runner::{EngineStuck, Runner};

/// The default time between two signs of life; a worker counts as live for a minute after one.
pub const SEEN_EVERY: Duration = Duration::from_secs(20);
/// How long a worker that cannot start tries to say so in the database.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// The time between two tries while the database is unreachable.
const DATABASE_AGAIN_AFTER: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// The worker's id. A supervisor may choose it, to know which row belongs to the worker.
    pub id: Uuid,
    /// The device that was asked for; the composer reports the actual one.
    pub device: String,
    /// The time between two signs of life; while the worker is idle, each includes a self-test.
    pub seen_every: Duration,
    pub lease: Duration,
    /// An attempt without progress for this long is given up, and the process ends with it.
    pub stall: Duration,
    /// Samples times sources that make a shard worth sharing; 0 shares nothing.
    pub min_shard_pairs: u64,
    pub cache_dir: PathBuf,
    /// The most bytes of backbones and datasets in the cache; those of a running job are never evicted.
    pub cache_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("the engine cannot be started")]
    Engine(#[source] CompositionError),
    #[error("cannot register with the database; is it migrated?")]
    Register(#[source] DbError),
    /// A self-test failed while the worker was idle.
    #[error("the engine cannot work any more")]
    SelfTest(#[source] CompositionError),
    #[error(transparent)]
    Stuck(#[from] EngineStuck),
}

impl WorkerError {
    /// The exit status: 70 (EX_SOFTWARE) if the engine had worked, so a fresh process may work again.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::SelfTest(_) | Self::Stuck(_) => 70,
            Self::Engine(_) | Self::Register(_) => 1,
        }
    }
}

/// Works until `shutdown`, which hands a running job back, or until the worker is drained, which does not.
///
/// # Errors
/// If the engine cannot be made, fails its self-test, is stuck, or its device failed: the process should end and be
/// started again.
pub async fn run(
    settings: WorkerSettings,
    pool: PgPool,
    blobs: BlobStore,
    new_composer: NewComposer,
    shutdown: Shutdown,
) -> Result<(), WorkerError> {
    let host = hostname();
    let asked = NewWorker {
        id: settings.id,
        host: &host,
        pid: std::process::id(),
        device: &settings.device,
        ..NewWorker::default()
    };
    let composer = match ComposerThread::start(new_composer).await {
        Ok(composer) => composer,
        Err(error) => {
            let error = WorkerError::Engine(error);
            say_why(&pool, &asked, &error).await;
            return Err(error);
        }
    };
    let platform = composer.platform().clone();
    let new = NewWorker {
        device: &platform.device,
        driver: platform.driver.as_deref(),
        memory_bytes: platform.memory_bytes,
        libtorch: platform.libtorch.as_deref(),
        ..asked
    };
    if !register(&pool, &new, &shutdown).await? {
        return Ok(());
    }
    let inputs = Inputs {
        pool: pool.clone(),
        blobs,
        files: DirectoryCache::new(settings.cache_dir, settings.cache_bytes),
    };
    let worker = Arc::new(Worker {
        id: settings.id,
        seen_every: settings.seen_every,
        runner: Runner {
            worker_id: settings.id,
            inputs,
            composer,
            lease: settings.lease,
            stall: settings.stall,
            min_shard_pairs: settings.min_shard_pairs,
        },
        pool,
        shutdown,
        busy: AtomicBool::new(false),
    });
    tracing::info!(worker.id = %worker.id, device = platform.device, driver = platform.driver, "worker is ready");
    let reaper = tokio::spawn(reaper::run(
        worker.pool.clone(),
        worker.shutdown.soft.clone(),
    ));
    let life = tokio::spawn(worker.clone().show_life());
    let ended = worker.work().await;
    reaper.abort();
    life.abort();
    let ended = match (ended, life.await) {
        (Err(stuck), _) => Err(WorkerError::Stuck(stuck)),
        // The sign-of-life task was not aborted: it ended first, and made the worker stop.
        (Ok(()), Ok(failed)) => Err(WorkerError::SelfTest(failed)),
        (Ok(()), Err(_)) => Ok(()),
    };
    match &ended {
        Ok(()) => {
            worker.seen(WorkerState::Stopped, false).await;
        }
        Err(error) => say_why(&worker.pool, &new, error).await,
    }
    ended
}

/// The machine's name, according to its kernel.
pub fn hostname() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

/// Registers the worker, as soon as the database can be reached. False if it was told to stop before that.
async fn register(
    pool: &PgPool,
    new: &NewWorker<'_>,
    shutdown: &Shutdown,
) -> Result<bool, WorkerError> {
    loop {
        let registered = async { workers::register(&mut *pool.acquire().await?, new).await };
        match registered.await {
            Ok(()) => return Ok(true),
            Err(error @ DbError::Unavailable(_)) => {
                tracing::warn!(error = chain(&error), "waiting for the database");
            }
            Err(error) => return Err(WorkerError::Register(error)),
        }
        let pause = tokio::time::sleep(DATABASE_AGAIN_AFTER);
        if shutdown.soft.run_until_cancelled(pause).await.is_none() {
            return Ok(false);
        }
    }
}

/// Writes the reason of an end to the worker's row, where people will look for it.
async fn say_why(pool: &PgPool, new: &NewWorker<'_>, error: &WorkerError) {
    let why = chain(error);
    let write = async {
        let end = End {
            defunct: false,
            reason: &why,
            unless_said: false,
        };
        workers::ended(&mut *pool.acquire().await?, new, end).await
    };
    let written = tokio::time::timeout(LAST_WORDS, write).await;
    if let Ok(Err(error)) = written {
        tracing::debug!(error = chain(&error), "the reason was not stored");
    }
}

/// A worker's next task.
enum Task {
    Job(Box<Claimed>),
    Shard(Box<ClaimedShard>),
}

struct Worker {
    id: Uuid,
    seen_every: Duration,
    runner: Runner,
    pool: PgPool,
    shutdown: Shutdown,
    busy: AtomicBool,
}

impl Worker {
    async fn work(&self) -> Result<(), EngineStuck> {
        let mut listener = WorkListener::new(self.pool.clone());
        let mut database_gone = false;
        while !self.shutdown.soft.is_cancelled() {
            let claimed_at = Instant::now();
            match self.claim().await {
                Ok(Some(task)) => {
                    database_gone = false;
                    self.busy.store(true, Ordering::Relaxed);
                    self.seen(WorkerState::Busy, false).await;
                    let ran = self.run(task, claimed_at).await;
                    self.busy.store(false, Ordering::Relaxed);
                    ran?;
                    // A self-test here would delay the next job.
                    self.seen(WorkerState::Idle, true).await;
                    continue;
                }
                Ok(None) if self.is_draining().await => {
                    tracing::info!("drained");
                    return Ok(());
                }
                Ok(None) => database_gone = false,
                Err(error) => {
                    // This is logged once per outage, not once per second.
                    if !std::mem::replace(&mut database_gone, true) {
                        tracing::warn!(error = chain(&error), "cannot ask for work");
                    }
                }
            }
            self.shutdown
                .soft
                .run_until_cancelled(listener.wait())
                .await;
        }
        Ok(())
    }

    /// Claims a waiting job; if there is none, a shard of another worker's job.
    async fn claim(&self) -> Result<Option<Task>, QueueError> {
        let mut conn = self.pool.acquire().await?;
        let length = self.runner.lease;
        if let Some(job) = queue::claim(&mut conn, self.id, length).await? {
            return Ok(Some(Task::Job(Box::new(job))));
        }
        let shard = shards::claim(
            &mut conn,
            self.id,
            &self.runner.composer.platform().arithmetic,
            length,
        )
        .await?;
        Ok(shard.map(|shard| Task::Shard(Box::new(shard))))
    }

    async fn run(&self, task: Task, claimed_at: Instant) -> Result<(), EngineStuck> {
        match task {
            Task::Job(job) => {
                tracing::info!(job.id = %job.lease.job_id, attempt = job.attempt, "working on a job");
                self.runner.run(&job, claimed_at, &self.shutdown).await
            }
            Task::Shard(claimed) => {
                let shard = &claimed.shard;
                tracing::info!(job.id = %claimed.lease.job_id, job.phase = shard.phase.name(),
                    shard.index, shard.count, "helping with a job");
                self.runner.help(&claimed, claimed_at, &self.shutdown).await
            }
        }
    }

    /// Whether the worker should end. This is asked when there is no work, because a draining worker gets none.
    async fn is_draining(&self) -> bool {
        let ask = async { workers::is_draining(&mut *self.pool.acquire().await?, self.id).await };
        ask.await.unwrap_or(false)
    }

    /// Gives signs of life until a self-test fails; then the worker hands back its job, and ends.
    async fn show_life(self: Arc<Self>) -> CompositionError {
        loop {
            tokio::time::sleep(self.seen_every).await;
            if let Err(error) = self.sign_of_life().await {
                self.shutdown.soft.cancel();
                return error;
            }
        }
    }

    /// Records that this worker lives and, if it is idle, that its device computes.
    async fn sign_of_life(&self) -> Result<(), CompositionError> {
        let busy = || self.busy.load(Ordering::Relaxed);
        let passed = !busy() && self.runner.composer.self_test(SEEN_EVERY).await?;
        // A job may have started meanwhile.
        let state = if busy() {
            WorkerState::Busy
        } else {
            WorkerState::Idle
        };
        self.seen(state, passed).await;
        Ok(())
    }

    async fn seen(&self, state: WorkerState, answered: bool) {
        let write = async {
            workers::seen(&mut *self.pool.acquire().await?, self.id, state, answered).await
        };
        if let Err(error) = write.await {
            tracing::debug!(error = chain(&error), "no sign of life was stored");
        }
    }
}

//! A worker: wait → claim → run → next. It needs the database and the blob store, nothing else.

pub mod composer_thread;
#[cfg(feature = "torch")]
pub mod engine;
mod file_cache;
mod inputs;
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
use crate::domain::composition::CompositionError;
use crate::jobs::listener::WorkListener;
use crate::jobs::queue::{self, Claimed, QueueError};
use crate::jobs::reaper;
use crate::jobs::shards::{self, ClaimedShard};
use crate::jobs::workers::{self, NewWorker, WorkerState};
use crate::shutdown::Shutdown;
use crate::telemetry::chain;
use composer_thread::{ComposerThread, NewComposer};
use file_cache::FileCache;
use inputs::Inputs;
use runner::{EngineStuck, Runner};

/// Between two signs of life; a worker counts as live for a minute after one.
const SEEN_EVERY: Duration = Duration::from_secs(15);
/// Between two tries while the database is gone.
const DATABASE_AGAIN_AFTER: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct WorkerSettings {
    pub lease: Duration,
    /// An attempt without progress for this long is given up, and the process with it.
    pub stall: Duration,
    /// Sample × source pairs that make a shard of a job worth sharing; 0: none do.
    pub shard_pairs: u64,
    pub cache_dir: PathBuf,
    /// Of backbones and data sets there; those of a running job do not count as evictable.
    pub cache_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("the engine cannot be started")]
    Engine(#[source] CompositionError),
    #[error("cannot register with the database; is it migrated?")]
    Register(#[source] DbError),
    #[error(transparent)]
    Stuck(#[from] EngineStuck),
}

/// Works until `shutdown`, which hands a running job back.
///
/// # Errors
/// When the engine cannot be made, or is stuck: the process should end and be started again.
pub async fn run(
    settings: WorkerSettings,
    pool: PgPool,
    blobs: BlobStore,
    new_composer: NewComposer,
    shutdown: Shutdown,
) -> Result<(), WorkerError> {
    let composer = ComposerThread::start(new_composer)
        .await
        .map_err(WorkerError::Engine)?;
    let Some(id) = register(&pool, &composer, &shutdown).await? else {
        return Ok(());
    };
    let inputs = Inputs {
        pool: pool.clone(),
        blobs,
        files: FileCache::new(settings.cache_dir, settings.cache_bytes),
    };
    let worker = Arc::new(Worker {
        id,
        runner: Runner {
            worker_id: id,
            inputs,
            composer,
            lease: settings.lease,
            stall: settings.stall,
            shard_pairs: settings.shard_pairs,
        },
        pool,
        shutdown,
        busy: AtomicBool::new(false),
    });
    tracing::info!(worker.id = %id, device = worker.runner.composer.device(), "worker is ready");
    let reaper = tokio::spawn(reaper::run(
        worker.pool.clone(),
        worker.shutdown.soft.clone(),
    ));
    let life = tokio::spawn(worker.clone().show_life());
    let ended = worker.work().await;
    life.abort();
    reaper.abort();
    worker.seen(WorkerState::Stopped, false).await;
    Ok(ended?)
}

/// Makes the worker known, as soon as the database is there. None: told to stop before that.
async fn register(
    pool: &PgPool,
    composer: &ComposerThread,
    shutdown: &Shutdown,
) -> Result<Option<Uuid>, WorkerError> {
    let id = Uuid::now_v7();
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let new = NewWorker {
        id,
        host: &host,
        pid: std::process::id(),
        device: composer.device(),
    };
    loop {
        let registered = async { workers::register(&mut *pool.acquire().await?, &new).await };
        match registered.await {
            Ok(()) => return Ok(Some(id)),
            Err(error @ DbError::Unavailable(_)) => {
                tracing::warn!(error = chain(&error), "waiting for the database");
            }
            Err(error) => return Err(WorkerError::Register(error)),
        }
        let pause = tokio::time::sleep(DATABASE_AGAIN_AFTER);
        if shutdown.soft.run_until_cancelled(pause).await.is_none() {
            return Ok(None);
        }
    }
}

/// What a worker may do next.
enum Task {
    Job(Box<Claimed>),
    Shard(Box<ClaimedShard>),
}

struct Worker {
    id: Uuid,
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
                    self.busy.store(true, Ordering::Relaxed);
                    self.seen(WorkerState::Busy, false).await;
                    let ran = self.run(task, claimed_at).await;
                    self.busy.store(false, Ordering::Relaxed);
                    ran?;
                    self.sign_of_life().await;
                    continue;
                }
                Ok(None) => database_gone = false,
                Err(error) => {
                    // Once an outage, not once a second.
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

    /// A job that waits; where none does, a part of one that somebody else has.
    async fn claim(&self) -> Result<Option<Task>, QueueError> {
        let mut conn = self.pool.acquire().await?;
        let length = self.runner.lease;
        if let Some(job) = queue::claim(&mut conn, self.id, length).await? {
            return Ok(Some(Task::Job(Box::new(job))));
        }
        let shard = shards::claim(&mut conn, self.id, length).await?;
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

    async fn show_life(self: Arc<Self>) {
        loop {
            self.sign_of_life().await;
            tokio::time::sleep(SEEN_EVERY).await;
        }
    }

    /// Says that this worker lives, and while it is idle that its engine does.
    async fn sign_of_life(&self) {
        let busy = || self.busy.load(Ordering::Relaxed);
        let ping = tokio::time::timeout(SEEN_EVERY, self.runner.composer.ping());
        let answered = !busy() && matches!(ping.await, Ok(Ok(())));
        // A job may have come in the meantime.
        let state = if busy() {
            WorkerState::Busy
        } else {
            WorkerState::Idle
        };
        self.seen(state, answered).await;
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

//! Running one job: fetch its files, compose, write the result. Whatever happens, it is written to the job's row,
//! unless the lease is lost: then this worker writes nothing more.

use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::runtime::Handle;
use tokio::time::MissedTickBehavior;
use uuid::Uuid;

use crate::blobs::BlobError;
use crate::db::DbError;
use crate::failpoints;
use crate::jobs::finish::{Finished, NewEnsemble, NewPrompt, finish};
use crate::jobs::lease::{Lease, RenewOutcome};
use crate::jobs::queue;
use crate::jobs::queue::{Claimed, QueueError};
use crate::jobs::shards;
use crate::jobs::shards::{ClaimedShard, GivenBack, Owner};
use crate::registry::RegistryError;
use crate::shutdown::Shutdown;
use crate::worker::composer_thread::{
    AttemptState, ComposerThread, Output, Stop, StopReason, Task,
};
use crate::worker::inputs::{InputError, Inputs};
use crate::worker::job_checkpoints::JobCheckpoints;
use crate::worker::job_shards::JobShards;
use crate::worker::renewal::Renewal;
use promptweave_domain::composer::{Composition, CompositionError};
use promptweave_domain::composition::Warning;
use promptweave_domain::digest::Digest;
use promptweave_domain::ensemble_file::EnsembleFile;
use promptweave_domain::error_chain::chain;
use promptweave_domain::job::{EnsembleSpec, JobError, Progress};
use promptweave_domain::phase::Phase;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::reference::ResourceName;
use promptweave_domain::specification::JobSpec;
use promptweave_domain::words::{JobErrorCode, WarningCode};

/// How often progress is stored, and a request to cancel is read.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// The time between two tries to write an outcome while the database is unreachable.
const WRITE_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// The largest ensemble that is published. It is one value in the database.
const MAX_ENSEMBLE_BYTES: usize = 256 << 20;

/// How long a worker that failed at a shard waits before it helps again.
const AFTER_A_FAILED_SHARD: Duration = Duration::from_secs(5);

/// Why an attempt failed.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    /// The attempt was asked to stop; [`Stop::reason`] says why.
    #[error("stopped")]
    Stopped,
    /// The engine makes no progress; only the end of this process stops it.
    #[error("no progress for {} s", .0.as_secs())]
    Stalled(Duration),
    /// The engine's thread is gone; this is handled like [`Self::Stalled`].
    #[error("the engine's thread has ended")]
    EngineGone,
    #[error(transparent)]
    Input(#[from] InputError),
    #[error(transparent)]
    Composition(CompositionError),
    #[error("the blob store failed")]
    Statistics(#[source] BlobError),
    #[error("the new version cannot be stored: {0}")]
    Unusable(String),
    #[error(transparent)]
    Queue(#[from] QueueError),
}

impl AttemptError {
    /// Whether the worker lost its lease, and so may write nothing more.
    fn is_lost_lease(&self, stop: &Stop) -> bool {
        stop.reason() == Some(StopReason::LeaseLost)
            || matches!(self, Self::Queue(QueueError::LeaseLost(_)))
    }

    /// The error for the job's row, and whether another attempt may help.
    fn verdict(&self) -> (JobError, bool) {
        let (code, transient) = match self {
            Self::Stalled(_) => (JobErrorCode::Stalled, true),
            Self::EngineGone => (JobErrorCode::EngineGone, true),
            Self::Input(error) => (JobErrorCode::InputUnavailable, error.is_transient()),
            Self::Composition(CompositionError::Retry { code, .. }) => (*code, true),
            Self::Composition(CompositionError::Refused { code, .. }) => (*code, false),
            Self::Statistics(_) => (JobErrorCode::BlobStoreFailed, true),
            Self::Unusable(_) => (JobErrorCode::UnusableResult, false),
            Self::Queue(error) => (JobErrorCode::NotStored, !error.is_refused_by_constraint()),
            Self::Stopped | Self::Composition(CompositionError::Stopped) => {
                (JobErrorCode::Stopped, true)
            }
        };
        (JobError::new(code, chain(self)), transient)
    }
}

/// The engine must not be used again; the process ends, and its supervisor starts another.
#[derive(Debug, thiserror::Error)]
#[error("the engine is stuck, or its device has failed")]
pub struct EngineStuck;

#[derive(Debug)]
pub struct Runner {
    pub worker_id: Uuid,
    pub inputs: Inputs,
    pub composer: ComposerThread,
    pub lease: Duration,
    pub stall: Duration,
    /// Samples times sources that make a shard; 0 shares nothing.
    pub min_shard_pairs: u64,
}

impl Runner {
    /// Works on a claimed job until its row says how it ended, or the lease is lost.
    pub async fn run(
        &self,
        claimed: &Claimed,
        claimed_at: Instant,
        shutdown: &Shutdown,
    ) -> Result<(), EngineStuck> {
        let stop = Stop::default();
        let renewal = self.renewal(claimed.lease, claimed_at, &stop);
        let attempt = self.attempt(claimed, &stop, &renewal);
        let outcome = until_shutdown(attempt, &stop, shutdown).await;
        if let Err(error) = &outcome {
            self.write_failure(claimed, &stop, &renewal, error).await;
        }
        stuck(&outcome)
    }

    /// Works on a shard of another worker's job until it is stored or given back, or the lease is lost.
    pub async fn help(
        &self,
        claimed: &ClaimedShard,
        claimed_at: Instant,
        shutdown: &Shutdown,
    ) -> Result<(), EngineStuck> {
        let stop = Stop::default();
        let renewal = self.renewal(claimed.lease, claimed_at, &stop);
        let helping = self.shard(claimed, &stop, &renewal);
        let outcome = until_shutdown(helping, &stop, shutdown).await;
        drop(renewal);
        if let Err(error) = &outcome
            && self.give_back(claimed, &stop, error).await
        {
            // A fault of this machine may hit the next shard too, so let other machines help first.
            let pause = tokio::time::sleep(AFTER_A_FAILED_SHARD);
            shutdown.soft.run_until_cancelled(pause).await;
        }
        stuck(&outcome)
    }

    fn pool(&self) -> &PgPool {
        &self.inputs.pool
    }

    fn renewal(&self, lease: Lease, claimed_at: Instant, stop: &Stop) -> Renewal {
        let options = (*self.pool().connect_options()).clone();
        Renewal::start(options, lease, self.lease, claimed_at, stop.clone())
    }

    async fn attempt(
        &self,
        claimed: &Claimed,
        stop: &Stop,
        renewal: &Renewal,
    ) -> Result<(), AttemptError> {
        failpoints::reach("fetching", claimed.lease.job_id);
        // The directories stay in use until the end of the attempt.
        let (work, _in_use) = tokio::select! {
            fetched = self.inputs.fetch(&claimed.spec) => fetched?,
            () = stop.asked() => return Err(AttemptError::Stopped),
        };
        failpoints::reach("fetched", claimed.lease.job_id);
        let shards = JobShards {
            runtime: Handle::current(),
            pool: self.pool().clone(),
            blobs: self.inputs.blobs.clone(),
            owner: Owner {
                lease: claimed.lease,
                worker_id: self.worker_id,
                arithmetic: self.composer.platform().arithmetic.clone(),
            },
            stop: stop.clone(),
            min_shard_pairs: self.min_shard_pairs,
            merged: (Phase::Features, 0),
            done: 0.0,
        };
        let attempt_state = AttemptState {
            shards: Some(Box::new(shards)),
            checkpoints: Some(Box::new(JobCheckpoints {
                runtime: Handle::current(),
                pool: self.pool().clone(),
                blobs: self.inputs.blobs.clone(),
                lease: claimed.lease,
                stop: stop.clone(),
                name: "tuning".to_owned(),
                untold: Vec::new(),
            })),
        };
        let done = self.drive(work, claimed.lease, attempt_state, stop).await?;
        self.store(claimed, renewal, &done).await
    }

    async fn shard(
        &self,
        claimed: &ClaimedShard,
        stop: &Stop,
        renewal: &Renewal,
    ) -> Result<(), AttemptError> {
        let (work, _in_use) = tokio::select! {
            fetched = self.inputs.fetch_shard(claimed) => fetched?,
            () = stop.asked() => return Err(AttemptError::Stopped),
            // The job's owner waits for this shard.
            () = tokio::time::sleep(self.stall) => return Err(AttemptError::Stalled(self.stall)),
        };
        match self
            .drive(work, claimed.lease, AttemptState::default(), stop)
            .await?
        {
            Output::Shard(file) => {
                let file = self.inputs.blobs.put_bytes(file).await;
                let file = file.map_err(AttemptError::Statistics)?.digest;
                let given = Outcome::Given { claimed, file };
                Ok(self.write(renewal, &given).await?)
            }
            _ => unreachable!("a shard was asked for"),
        }
    }

    /// Lets the composer work, stores its progress, and passes on requests to stop.
    async fn drive(
        &self,
        work: Task,
        lease: Lease,
        attempt_state: AttemptState,
        stop: &Stop,
    ) -> Result<Output, AttemptError> {
        let (watched, mut answer) = self.composer.begin(work, stop.clone(), attempt_state);
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stored = None;
        loop {
            tokio::select! {
                answer = &mut answer => return match answer {
                    Ok(Ok(done)) => Ok(done),
                    Ok(Err(CompositionError::Stopped)) => Err(AttemptError::Stopped),
                    Ok(Err(error)) => Err(AttemptError::Composition(error)),
                    Err(_) => Err(AttemptError::EngineGone),
                },
                _ = tick.tick() => {}
            }
            let (progress, at) = *watched.borrow();
            if at.elapsed() > self.stall {
                stop.because(StopReason::Stalled);
                return Err(AttemptError::Stalled(self.stall));
            }
            let moved = progress.filter(|progress| stored != Some(*progress));
            stored = progress;
            self.report(lease, moved, stop).await;
        }
    }

    /// Stores progress, if there is any, and reads whether the work should continue.
    async fn report(&self, lease: Lease, moved: Option<Progress>, stop: &Stop) {
        let write = async {
            let mut conn = self.pool().acquire().await?;
            match moved {
                Some(progress) => lease.progress(&mut conn, progress).await,
                None => lease.look(&mut conn).await,
            }
        };
        match write.await {
            Ok(RenewOutcome::Renewed) => {}
            Ok(RenewOutcome::CancelRequested) => stop.because(StopReason::Cancelled),
            Err(QueueError::LeaseLost(_)) => stop.because(StopReason::LeaseLost),
            // Progress is for people; the renewal decides whether the job is still this worker's.
            Err(error) => {
                tracing::warn!(job.id = %lease.job_id, error = chain(&error),
                    "progress was not stored");
            }
        }
    }

    async fn store(
        &self,
        claimed: &Claimed,
        renewal: &Renewal,
        done: &Output,
    ) -> Result<(), AttemptError> {
        let job_id = claimed.lease.job_id;
        match (&claimed.spec, done) {
            (JobSpec::Ensemble(spec), Output::Composition(composition)) => {
                let composed = MadePrompt::read(&composition.composed, &spec.output)?;
                let mut result = composition.result.clone();
                let ensemble = MadeEnsemble::of(composition, spec).unwrap_or_else(|reason| {
                    result.warnings.push(Warning {
                        code: WarningCode::EnsembleNotPublished.name().to_owned(),
                        detail: format!("the ensemble was not published: {reason}"),
                    });
                    None
                });
                failpoints::reach("storing", job_id);
                // Statistics come first: they are addressed by content, so without the row they are only garbage.
                let statistics = composition.statistics.clone();
                let statistics = self.inputs.blobs.put_bytes(statistics).await;
                let statistics = statistics.map_err(AttemptError::Statistics)?;
                failpoints::reach("stored", job_id);
                let finished = Finished::Ensemble {
                    spec,
                    result: &result,
                    composed: composed.new_prompt()?,
                    ensemble: ensemble.as_ref().map(MadeEnsemble::new_ensemble),
                    statistics: statistics.digest,
                };
                self.write(renewal, &Outcome::Finished(claimed, finished))
                    .await?;
            }
            (JobSpec::Tuning(spec), Output::Tuned(done)) => {
                let tuned = MadePrompt::read(&done.file, &spec.output)?;
                let finished = Finished::Tuning {
                    spec,
                    result: &done.result,
                    tuned: tuned.new_prompt()?,
                };
                self.write(renewal, &Outcome::Finished(claimed, finished))
                    .await?;
            }
            (JobSpec::Prediction(_), Output::Predicted(predicted)) => {
                let file = self.inputs.blobs.put_bytes(predicted.file.clone()).await;
                file.map_err(AttemptError::Statistics)?;
                let finished = Finished::Prediction(&predicted.result);
                self.write(renewal, &Outcome::Finished(claimed, finished))
                    .await?;
            }
            (JobSpec::Ranking(_), Output::Ranking(ranking)) => {
                let finished = Finished::Ranking(ranking);
                self.write(renewal, &Outcome::Finished(claimed, finished))
                    .await?;
            }
            _ => unreachable!("the work is of the job's kind"),
        }
        failpoints::reach("finished", job_id);
        tracing::info!(job.id = %job_id, "succeeded");
        Ok(())
    }

    /// Writes to the row how the attempt ended, unless the lease is lost.
    async fn write_failure(
        &self,
        claimed: &Claimed,
        stop: &Stop,
        renewal: &Renewal,
        error: &AttemptError,
    ) {
        let job_id = claimed.lease.job_id;
        if error.is_lost_lease(stop) {
            return;
        }
        let outcome = match (error, stop.reason()) {
            (AttemptError::Stopped, Some(StopReason::Cancelled)) => {
                tracing::info!(job.id = %job_id, "cancelled");
                Outcome::Cancelled(claimed.lease)
            }
            (AttemptError::Stopped, _) => {
                tracing::info!(job.id = %job_id, "given back");
                Outcome::Released(claimed.lease)
            }
            (error, _) => {
                let (error, transient) = error.verdict();
                tracing::warn!(job.id = %job_id, error.code = error.code, error = error.detail,
                    retry = transient, "the attempt failed");
                Outcome::Failed {
                    lease: claimed.lease,
                    error,
                    backoff: transient.then(|| queue::backoff(claimed.attempt)),
                }
            }
        };
        if let Err(error) = self.write(renewal, &outcome).await {
            tracing::warn!(job.id = %job_id, error = chain(&error),
                "the outcome was not stored; the job returns with the end of its lease");
        }
    }

    /// Gives a shard back that was not computed. If even that cannot be written, its lease runs out. Returns whether
    /// the shard failed.
    async fn give_back(&self, claimed: &ClaimedShard, stop: &Stop, error: &AttemptError) -> bool {
        let job_id = claimed.lease.job_id;
        if error.is_lost_lease(stop) {
            return false;
        }
        let why = match error {
            AttemptError::Stopped => GivenBack::Released,
            error => {
                let (error, transient) = error.verdict();
                tracing::warn!(job.id = %job_id, error.code = error.code, error = error.detail,
                    retry = transient, "a shard failed");
                match transient {
                    true => GivenBack::Failed,
                    false => GivenBack::Refused,
                }
            }
        };
        let write = async {
            shards::give_back(&mut *self.pool().acquire().await?, claimed.lease, why).await
        };
        if let Err(error) = write.await {
            tracing::warn!(job.id = %job_id, error = chain(&error), "a shard was not given back");
        }
        why != GivenBack::Released
    }

    /// Writes an outcome. If the database is unreachable, it waits as long as the lease holds. If the acknowledgement
    /// of a commit was lost, the second try finds a lost lease, with the outcome in place.
    async fn write(&self, renewal: &Renewal, outcome: &Outcome<'_>) -> Result<(), QueueError> {
        loop {
            let written = self.write_once(outcome).await;
            let gone = match &written {
                Err(QueueError::Db(error) | QueueError::Registry(RegistryError::Db(error))) => {
                    matches!(error, DbError::Unavailable(_))
                }
                _ => false,
            };
            if !gone {
                return written;
            }
            tokio::select! {
                () = renewal.lost() => return written,
                () = tokio::time::sleep(WRITE_AGAIN_AFTER) => {}
            }
        }
    }

    async fn write_once(&self, outcome: &Outcome<'_>) -> Result<(), QueueError> {
        let mut conn = self.pool().acquire().await?;
        let blobs = &self.inputs.blobs;
        match outcome {
            Outcome::Finished(claimed, finished) => {
                finish(&mut conn, blobs, claimed, *finished).await
            }
            Outcome::Cancelled(lease) => queue::finish_cancelled(&mut conn, *lease).await,
            Outcome::Released(lease) => queue::release(&mut conn, *lease).await,
            Outcome::Failed {
                lease,
                error,
                backoff,
            } => queue::fail(&mut conn, *lease, error.clone(), *backoff)
                .await
                .map(drop),
            Outcome::Given { claimed, file } => shards::give(&mut conn, blobs, claimed, file).await,
        }
    }
}

/// A prompt that the engine made, parsed as its users will parse it.
struct MadePrompt<'a> {
    bytes: &'a [u8],
    file: PromptFile,
    output: ResourceName,
}

impl<'a> MadePrompt<'a> {
    fn read(bytes: &'a [u8], output: &str) -> Result<Self, AttemptError> {
        Ok(Self {
            bytes,
            file: PromptFile::parse(bytes)
                .map_err(|error| AttemptError::Unusable(chain(&error)))?,
            output: output
                .parse()
                .map_err(|error| AttemptError::Unusable(chain(&error)))?,
        })
    }

    fn new_prompt(&self) -> Result<NewPrompt<'_>, AttemptError> {
        let metadata = self.file.metadata.as_ref();
        Ok(NewPrompt {
            bytes: self.bytes,
            file: &self.file,
            metadata: metadata
                .ok_or_else(|| AttemptError::Unusable("it has no metadata".to_owned()))?,
            output: &self.output,
        })
    }
}

/// An ensemble that the engine made, parsed as its users will parse it.
struct MadeEnsemble<'a> {
    bytes: &'a [u8],
    file: EnsembleFile,
    output: ResourceName,
}

impl<'a> MadeEnsemble<'a> {
    /// The ensemble of a composition by the method `pool`; other methods publish none. The error says why it cannot be
    /// published, which is no reason to lose the weights and the composed prompt.
    fn of(composition: &'a Composition, spec: &EnsembleSpec) -> Result<Option<Self>, String> {
        let Some((bytes, output)) = composition.ensemble.as_deref().zip(spec.ensemble_output())
        else {
            return Ok(None);
        };
        if bytes.len() > MAX_ENSEMBLE_BYTES {
            return Err(format!(
                "its file has {} MiB, and {} MiB are the most; solve again with a smaller `top_k`",
                bytes.len() >> 20,
                MAX_ENSEMBLE_BYTES >> 20
            ));
        }
        Ok(Some(Self {
            bytes,
            file: EnsembleFile::parse(bytes).map_err(|error| chain(&error))?,
            output: output.parse().map_err(|error| chain(&error))?,
        }))
    }

    fn new_ensemble(&self) -> NewEnsemble<'_> {
        NewEnsemble {
            bytes: self.bytes,
            file: &self.file,
            output: &self.output,
        }
    }
}

/// Awaits an attempt, and asks it to stop when the process should.
async fn until_shutdown(
    attempt: impl Future<Output = Result<(), AttemptError>>,
    stop: &Stop,
    shutdown: &Shutdown,
) -> Result<(), AttemptError> {
    tokio::pin!(attempt);
    tokio::select! {
        outcome = &mut attempt => outcome,
        () = shutdown.soft.cancelled() => {
            stop.because(StopReason::Shutdown);
            tokio::select! {
                outcome = &mut attempt => outcome,
                () = shutdown.hard.cancelled() => Err(AttemptError::Stopped),
            }
        }
    }
}

fn stuck(outcome: &Result<(), AttemptError>) -> Result<(), EngineStuck> {
    match outcome {
        Err(AttemptError::Stalled(_) | AttemptError::EngineGone) => Err(EngineStuck),
        Err(AttemptError::Composition(error)) if error.is_device_failure() => Err(EngineStuck),
        _ => Ok(()),
    }
}

/// The outcome of an attempt, or of a shard, to be written.
enum Outcome<'a> {
    Finished(&'a Claimed, Finished<'a>),
    Cancelled(Lease),
    Released(Lease),
    Failed {
        lease: Lease,
        error: JobError,
        backoff: Option<Duration>,
    },
    Given {
        claimed: &'a ClaimedShard,
        file: Digest,
    },
}

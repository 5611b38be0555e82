//! The one transaction that stores a result: published prompt, lineage, answer and state, under the lease's token. For
//! a worker that lost its lease, all of it is rolled back.

use sqlx::{Connection, PgConnection, PgTransaction};

use crate::blobs::BlobStore;
use crate::db::DbError;
use crate::failpoints;
use crate::jobs::events::tell;
use crate::jobs::queue::{Claimed, QueueError};
use crate::jobs::transition::{LockedJob, Transition};
use crate::registry::lineage::Role;
use crate::registry::prompt_versions;
use crate::registry::prompt_versions::{NewVersion, Parent, Published, VersionFile};
use crate::registry::{prompts, references};
use promptweave_domain::composition::{CompositionResult, PoolReport, PooledEnsemble};
use promptweave_domain::digest::Digest;
use promptweave_domain::ensemble_file::EnsembleFile;
use promptweave_domain::job::EnsembleSpec;
use promptweave_domain::prediction::PredictionResult;
use promptweave_domain::prompt_file::{PromptFile, PromptMetadata};
use promptweave_domain::ranking::Ranking;
use promptweave_domain::reference::ResourceName;
use promptweave_domain::specification::TuningSpec;
use promptweave_domain::tuning::TuningResult;

/// A finished job's outcome, to be stored.
#[derive(Clone, Copy, Debug)]
pub enum Finished<'a> {
    Ensemble {
        spec: &'a EnsembleSpec,
        result: &'a CompositionResult,
        composed: NewPrompt<'a>,
        /// The pool's ensemble, with the method `pool`.
        ensemble: Option<NewEnsemble<'a>>,
        /// The digest of the statistics, which are in the blob store already.
        statistics: Digest,
    },
    Tuning {
        spec: &'a TuningSpec,
        result: &'a TuningResult,
        tuned: NewPrompt<'a>,
    },
    Ranking(&'a Ranking),
    /// Its file is in the blob store already.
    Prediction(&'a PredictionResult),
}

impl Finished<'_> {
    /// The file that the job leaves in the blob store.
    fn file(&self) -> Option<Digest> {
        match self {
            Self::Ensemble { statistics, .. } => Some(*statistics),
            Self::Prediction(result) => Some(result.file.digest),
            Self::Tuning { .. } | Self::Ranking(_) => None,
        }
    }
}

/// A prompt that a job made: the bytes of its file, the parsed file, and its metadata.
#[derive(Clone, Copy, Debug)]
pub struct NewPrompt<'a> {
    pub bytes: &'a [u8],
    pub file: &'a PromptFile,
    pub metadata: &'a PromptMetadata,
    pub output: &'a ResourceName,
}

/// An ensemble that a job made: the bytes of its file, and the parsed file.
#[derive(Clone, Copy, Debug)]
pub struct NewEnsemble<'a> {
    pub bytes: &'a [u8],
    pub file: &'a EnsembleFile,
    pub output: &'a ResourceName,
}

/// Ends the job as succeeded and publishes its prompt.
pub async fn finish(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    claimed: &Claimed,
    finished: Finished<'_>,
) -> Result<(), QueueError> {
    let mut tx = conn.begin().await?;
    let file = finished.file();
    if let Some(file) = &file {
        // This comes before the job's row is locked, because a blob store may be slow and others wait for the row.
        references::hold(&mut tx, blobs, file).await?;
    }
    let held = LockedJob::lock(&mut tx, claimed.lease).await?;
    // A lease that has run out belongs to nobody, even before it is reaped.
    if held.ran_out {
        return Err(claimed.lease.lost());
    }
    let leaving = match finished {
        Finished::Ensemble {
            spec,
            result,
            composed,
            ensemble,
            ..
        } => {
            let published = publish_composed(&mut tx, claimed, spec, result, composed).await?;
            let mut result = result.clone();
            result.composed_prompt.prompt = Some(published.prompt.to_string());
            result.composed_prompt.version = Some(published.version);
            if let Some(pool) = &mut result.pool {
                pool.ensemble = match pool.ensemble.take().zip(ensemble) {
                    Some((reported, new)) => {
                        let published = publish_ensemble(&mut tx, claimed, spec, pool, new).await?;
                        Some(PooledEnsemble {
                            prompt: Some(published.prompt.to_string()),
                            version: Some(published.version),
                            ..reported
                        })
                    }
                    None => None,
                };
            }
            Transition::with_result(&result, file)
        }
        Finished::Tuning {
            spec,
            result,
            tuned,
        } => {
            let published = publish_tuned(&mut tx, claimed, spec, tuned).await?;
            let mut result = result.clone();
            result.tuned.prompt = Some(published.prompt.to_string());
            result.tuned.version = Some(published.version);
            Transition::with_result(&result, None)
        }
        Finished::Ranking(ranking) => Transition::with_result(ranking, None),
        Finished::Prediction(result) => Transition::with_result(result, file),
    };
    held.leave(&mut tx, leaving).await?;
    failpoints::reach("finishing", claimed.lease.job_id);
    // The deferred constraint on the weights is checked here too.
    tx.commit().await.map_err(DbError::from)?;
    tell(conn, claimed.lease.job_id, false).await;
    Ok(())
}

async fn publish_composed(
    tx: &mut PgTransaction<'_>,
    claimed: &Claimed,
    spec: &EnsembleSpec,
    result: &CompositionResult,
    composed: NewPrompt<'_>,
) -> Result<Published, QueueError> {
    let file = VersionFile::Prompt {
        file: composed.file,
        metadata: composed.metadata,
    };
    let made = Made {
        bytes: composed.bytes,
        file,
        output: composed.output,
        description: made_for("composed", spec, claimed),
        parents: parents(spec, result.composed_prompt.weights.iter().copied()),
    };
    publish(tx, claimed, made).await
}

async fn publish_ensemble(
    tx: &mut PgTransaction<'_>,
    claimed: &Claimed,
    spec: &EnsembleSpec,
    pool: &PoolReport,
    ensemble: NewEnsemble<'_>,
) -> Result<Published, QueueError> {
    let mut parents = parents(spec, pool.weights.iter().map(|it| it.weight));
    // Sources that were left out are no members.
    parents.retain(|parent| parent.weight > 0.0);
    let made = Made {
        bytes: ensemble.bytes,
        file: VersionFile::Ensemble(ensemble.file),
        output: ensemble.output,
        description: made_for("pooled", spec, claimed),
        parents,
    };
    publish(tx, claimed, made).await
}

/// The description of a version that was made for an ensemble's target.
fn made_for(made: &str, spec: &EnsembleSpec, claimed: &Claimed) -> String {
    let (target, job) = (&spec.target, claimed.lease.job_id);
    let by = format!(
        "{made} for {}:{} by ensemble {job}",
        target.dataset, target.version
    );
    match &spec.solved_from {
        Some(from) => format!("{by} from the statistics of ensemble {}", from.ensemble),
        None => by,
    }
}

fn parents(spec: &EnsembleSpec, weights: impl Iterator<Item = f64>) -> Vec<Parent> {
    let sources = spec.sources.iter().zip(weights);
    sources
        .map(|(source, weight)| Parent {
            version_id: source.id,
            weight,
            role: Role::Source,
        })
        .collect()
}

async fn publish_tuned(
    tx: &mut PgTransaction<'_>,
    claimed: &Claimed,
    spec: &TuningSpec,
    tuned: NewPrompt<'_>,
) -> Result<Published, QueueError> {
    let (target, job) = (&spec.target, claimed.lease.job_id);
    let mut description = format!(
        "tuned on {}:{} by tuning {job}",
        target.dataset, target.version
    );
    if let Some(start) = &spec.start {
        description += &format!(" from {}:{}", start.prompt, start.version);
    }
    let start = spec.start.as_ref().map(|start| Parent {
        version_id: start.id,
        weight: 1.0,
        role: Role::Start,
    });
    let made = Made {
        bytes: tuned.bytes,
        file: VersionFile::Prompt {
            file: tuned.file,
            metadata: tuned.metadata,
        },
        output: tuned.output,
        description,
        parents: Vec::from_iter(start),
    };
    publish(tx, claimed, made).await
}

/// A version to publish under a name, which is created if it does not exist.
struct Made<'a> {
    bytes: &'a [u8],
    file: VersionFile<'a>,
    output: &'a ResourceName,
    description: String,
    parents: Vec<Parent>,
}

async fn publish(
    tx: &mut PgTransaction<'_>,
    claimed: &Claimed,
    made: Made<'_>,
) -> Result<Published, QueueError> {
    let project_id = claimed.project_id;
    let prompt_id =
        prompts::find_restore_or_create(tx, project_id, made.output, &made.description).await?;
    let new = NewVersion {
        prompt_id,
        bytes: made.bytes,
        file: made.file,
        produced_by_job: Some(claimed.lease.job_id),
        parents: &made.parents,
    };
    // Repeating the same computation under the same name yields the existing version.
    Ok(prompt_versions::publish(tx, project_id, new).await?)
}

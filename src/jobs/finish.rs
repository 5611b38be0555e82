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
use crate::registry::prompt_versions::{NewVersion, Parent, Published};
use crate::registry::{prompts, references};
use promptweave_domain::composition::CompositionResult;
use promptweave_domain::digest::Digest;
use promptweave_domain::job::EnsembleSpec;
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
        /// The digest of the statistics, which are in the blob store already.
        statistics: Digest,
    },
    Tuning {
        spec: &'a TuningSpec,
        result: &'a TuningResult,
        tuned: NewPrompt<'a>,
    },
    Ranking(&'a Ranking),
}

/// A prompt that a job made: the bytes of its file, the parsed file, and its metadata.
#[derive(Clone, Copy, Debug)]
pub struct NewPrompt<'a> {
    pub bytes: &'a [u8],
    pub file: &'a PromptFile,
    pub metadata: &'a PromptMetadata,
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
    if let Finished::Ensemble { statistics, .. } = &finished {
        // This comes before the job's row is locked, because a blob store may be slow and others wait for the row.
        references::hold(&mut tx, blobs, statistics).await?;
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
            statistics,
        } => {
            let published = publish_composed(&mut tx, claimed, spec, result, composed).await?;
            let mut result = result.clone();
            result.composed_prompt.prompt = Some(published.prompt.to_string());
            result.composed_prompt.version = Some(published.version);
            // The ensemble file is not stored; `solve` makes it from the statistics.
            if let Some(pool) = &mut result.pool {
                pool.ensemble_digest = None;
            }
            Transition::with_result(&result, Some(statistics))
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
    let target = &spec.target;
    let mut description = format!(
        "composed for {}:{} by ensemble {}",
        target.dataset, target.version, claimed.lease.job_id
    );
    if let Some(from) = &spec.solved_from {
        description += &format!(" from the statistics of ensemble {}", from.ensemble);
    }
    let parents: Vec<Parent> = (spec.sources.iter().zip(&result.composed_prompt.weights))
        .map(|(source, weight)| Parent {
            version_id: source.id,
            weight: *weight,
            role: Role::Source,
        })
        .collect();
    publish(tx, claimed, composed, &description, &parents).await
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
    publish(tx, claimed, tuned, &description, start.as_slice()).await
}

async fn publish(
    tx: &mut PgTransaction<'_>,
    claimed: &Claimed,
    prompt: NewPrompt<'_>,
    description: &str,
    parents: &[Parent],
) -> Result<Published, QueueError> {
    let project_id = claimed.project_id;
    let prompt_id =
        prompts::find_restore_or_create(tx, project_id, prompt.output, description).await?;
    let new = NewVersion {
        prompt_id,
        bytes: prompt.bytes,
        file: prompt.file,
        metadata: prompt.metadata,
        produced_by_job: Some(claimed.lease.job_id),
        parents,
    };
    // Repeating the same computation under the same name yields the existing version.
    Ok(prompt_versions::publish(tx, project_id, new).await?)
}

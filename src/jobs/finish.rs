//! The one transaction that makes a result: composed prompt, lineage, answer and state, under the
//! lease's token. A worker that lost its lease rolls all of it back.

use sqlx::{Connection, PgConnection};

use super::events::tell;
use super::leaving::{Held, Leaving};
use super::queue::{Claimed, QueueError};
use crate::blobs::BlobStore;
use crate::db::DbError;
use crate::domain::composition::CompositionResult;
use crate::domain::digest::Digest;
use crate::domain::prompt_file::{PromptFile, PromptMetadata};
use crate::domain::reference::ResourceName;
use crate::failpoints;
use crate::registry::prompt_versions::{self, NewVersion, Parent};
use crate::registry::{prompts, references};

/// What a composition left to be stored; the statistics are in the blob store already.
#[derive(Clone, Copy, Debug)]
pub struct Finished<'a> {
    pub result: &'a CompositionResult,
    /// The composed prompt's file: its bytes, the same read, and what it says about itself.
    pub composed: &'a [u8],
    pub file: &'a PromptFile,
    pub metadata: &'a PromptMetadata,
    pub output: &'a ResourceName,
    pub statistics: Digest,
}

/// Ends the job as succeeded and publishes its prompt.
pub async fn finish(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    claimed: &Claimed,
    finished: Finished<'_>,
) -> Result<(), QueueError> {
    let mut tx = conn.begin().await?;
    // Before the job's row is held, which others wait for: a blob store may take its time.
    references::hold(&mut tx, blobs, &finished.statistics).await?;
    let held = Held::lock(&mut tx, claimed.lease).await?;
    // A lease that has run out is nobody's, even before it is reaped.
    if held.ran_out {
        return Err(QueueError::LeaseLost(claimed.lease.job_id));
    }
    let target = &claimed.spec.target;
    let mut description = format!(
        "composed for {}:{} by ensemble {}",
        target.dataset, target.version, claimed.lease.job_id
    );
    if let Some(from) = &claimed.spec.resolved_from {
        description += &format!(" from the statistics of ensemble {}", from.ensemble);
    }
    let project_id = claimed.project_id;
    let prompt_id =
        prompts::find_restore_or_create(&mut tx, project_id, finished.output, &description).await?;
    let parents: Vec<Parent> = claimed
        .spec
        .sources
        .iter()
        .zip(&finished.result.source_weights)
        .map(|(source, weighed)| Parent {
            version_id: source.id,
            weight: weighed.weight,
        })
        .collect();
    let new = NewVersion {
        prompt_id,
        bytes: finished.composed,
        file: finished.file,
        metadata: finished.metadata,
        produced_by_job: Some(claimed.lease.job_id),
        parents: &parents,
    };
    // The same composition once more under the same name is the version that is there.
    let published = prompt_versions::publish(&mut tx, project_id, new).await?;
    let mut result = finished.result.clone();
    result.composed.prompt = Some(published.prompt.to_string());
    result.composed.version = Some(published.version);
    held.leave(&mut tx, Leaving::with_result(&result, finished.statistics))
        .await?;
    failpoints::reach("finishing", claimed.lease.job_id);
    // Also where the deferred constraint on the weights speaks up.
    tx.commit().await.map_err(DbError::from)?;
    tell(conn, claimed.lease.job_id, false).await;
    Ok(())
}

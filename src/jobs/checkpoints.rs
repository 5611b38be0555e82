//! Checkpoints: each tuning of a job keeps its state in a blob. A row under the job's lease names the blob, so that the
//! next attempt finds it on any machine.

use serde_json::json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::blobs::BlobStore;
use crate::db::DbError;
use crate::jobs::events::{record, tell};
use crate::jobs::lease::Lease;
use crate::jobs::queue::QueueError;
use crate::jobs::read_digest;
use crate::jobs::transition::LockedJob;
use crate::registry::references;
use promptweave_domain::digest::Digest;
use promptweave_domain::tuning::Epoch;
use promptweave_domain::words::EventKind;

/// The last checkpoint's file.
pub async fn last(
    conn: &mut PgConnection,
    job_id: Uuid,
    name: &str,
) -> Result<Option<Digest>, DbError> {
    let digest = sqlx::query_scalar!(
        "SELECT digest FROM job_checkpoint WHERE job_id = $1 AND name = $2",
        job_id,
        name,
    )
    .fetch_optional(conn)
    .await?;
    digest
        .map(|bytes| read_digest("digest", &bytes))
        .transpose()
}

/// Replaces the last checkpoint by `file`, if there is one, and records events for `epochs`, those not yet reported.
/// Both are one transaction, so an epoch with a stored checkpoint has been reported exactly once.
pub async fn keep(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    lease: Lease,
    name: &str,
    file: Option<&Digest>,
    epochs: &[Epoch],
) -> Result<(), QueueError> {
    let mut tx = conn.begin().await?;
    if let Some(file) = file {
        // This comes before the job's row is locked, because a blob store may be slow and others wait for the row.
        references::hold(&mut tx, blobs, file).await?;
    }
    LockedJob::lock(&mut tx, lease).await?;
    if let Some(file) = file {
        sqlx::query!(
            r#"
            INSERT INTO job_checkpoint (job_id, name, digest) VALUES ($1, $2, $3)
            ON CONFLICT ON CONSTRAINT job_checkpoint_pkey DO UPDATE SET digest = excluded.digest
            "#,
            lease.job_id,
            name,
            file.as_bytes(),
        )
        .execute(&mut *tx)
        .await?;
    }
    for epoch in epochs {
        record(&mut tx, lease.job_id, EventKind::Epoch, json!(epoch)).await?;
    }
    tx.commit().await?;
    tell(conn, lease.job_id, false).await;
    Ok(())
}

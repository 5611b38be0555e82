//! What is done with its shards by who has the job, under the job's own lease.

use serde_json::json;
use sqlx::{Connection, PgConnection, PgTransaction};
use uuid::Uuid;

use crate::blobs::BlobStore;
use crate::db::DbError;
use crate::failpoints;
use crate::jobs::events::{record, tell};
use crate::jobs::queue::{Lease, QueueError};
use crate::jobs::shards::{MAX_HELPERS, record_shard};
use crate::jobs::transition::LockedJob;
use crate::registry::references;
use promptweave_domain::digest::Digest;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::{Estimate, Shard};
use promptweave_domain::words::EventKind;

/// Who has the job, as far as its shards are concerned.
#[derive(Clone, Debug)]
pub struct Owner {
    pub lease: Lease,
    pub worker_id: Uuid,
    /// Of all its shards.
    pub arithmetic: String,
}

/// Deals a phase out in `count` shards, if it is not yet and `count` is above 1. Returns how many there are. What an
/// earlier attempt left in another arithmetic is let go.
pub async fn lay_out(
    conn: &mut PgConnection,
    owner: &Owner,
    phase: Phase,
    count: usize,
) -> Result<usize, QueueError> {
    let lease = owner.lease;
    let mut tx = conn.begin().await?;
    LockedJob::lock(&mut tx, lease).await?;
    sqlx::query!(
        "DELETE FROM job_shard WHERE job_id = $1 AND arithmetic <> $2",
        lease.job_id,
        owner.arithmetic,
    )
    .execute(&mut *tx)
    .await?;
    let before = sqlx::query_scalar!(
        "SELECT count FROM job_shard WHERE job_id = $1 AND phase = $2 LIMIT 1",
        lease.job_id,
        phase.name(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    let count = before.map_or(count, |before| before as usize);
    let mut new_shards = false;
    if before.is_some() || count > 1 {
        let new = sqlx::query!(
            r#"
            INSERT INTO job_shard (job_id, phase, index, count, arithmetic)
            SELECT $1, $2, index, $3, $4 FROM generate_series(0, $3 - 1) index
            -- Some may be there, and some may have been ended.
            ON CONFLICT ON CONSTRAINT job_shard_pkey DO NOTHING
            "#,
            lease.job_id,
            phase.name(),
            count as i32,
            owner.arithmetic,
        )
        .execute(&mut *tx)
        .await?;
        new_shards = new.rows_affected() > 0;
    }
    tx.commit().await?;
    if new_shards {
        tell(conn, lease.job_id, true).await;
    }
    Ok(count)
}

/// What there is of a phase.
#[derive(Clone, Debug, PartialEq)]
pub struct There {
    /// The shards' files, `None` where one is not there yet.
    pub files: Vec<Option<Digest>>,
    /// How much of the whole phase is done, counted in shards.
    pub done: f64,
}

pub async fn there(
    conn: &mut PgConnection,
    job_id: Uuid,
    phase: Phase,
) -> Result<There, QueueError> {
    let rows = sqlx::query!(
        "SELECT digest, done FROM job_shard WHERE job_id = $1 AND phase = $2 ORDER BY index",
        job_id,
        phase.name(),
    )
    .fetch_all(conn)
    .await?;
    let done = rows.iter().map(|row| row.done).sum();
    let digest = |bytes: Vec<u8>| match bytes.as_slice().try_into() {
        Ok(bytes) => Ok(Digest::from_bytes(bytes)),
        Err(_) => Err(DbError::unreadable("job_shard", "digest", &bytes)),
    };
    let files = rows
        .into_iter()
        .map(|row| row.digest.map(digest).transpose());
    let files = files.collect::<Result<_, _>>()?;
    Ok(There { files, done })
}

/// Takes a shard that nobody has; it is held by the job's own lease. One that is held so already is in nobody's hands
/// either, since a shard is asked for by one who has none: the answer was lost, or the attempt that took it.
pub async fn take(
    conn: &mut PgConnection,
    owner: &Owner,
    phase: Phase,
) -> Result<Option<usize>, QueueError> {
    let lease = owner.lease;
    let index = sqlx::query_scalar!(
        r#"
        WITH next AS (
            SELECT s.index
            FROM job_shard s
            JOIN job j ON j.id = s.job_id AND j.lease_token = $2 AND j.state = 'running'
            WHERE s.job_id = $1 AND s.phase = $4
              AND (s.state = 'queued' OR s.state = 'running' AND s.lease_until IS NULL)
            ORDER BY s.index
            LIMIT 1
            FOR UPDATE OF s SKIP LOCKED
        )
        UPDATE job_shard
        SET state       = 'running',
            lease_token = $2,
            worker_id   = $3,
            done        = 0,
            started_at  = now(),
            progress_at = now()
        FROM next
        WHERE job_id = $1 AND phase = $4 AND job_shard.index = next.index
        RETURNING job_shard.index
        "#,
        lease.job_id,
        lease.token,
        owner.worker_id,
        phase.name(),
    )
    .fetch_optional(conn)
    .await?;
    Ok(index.map(|index| index as usize))
}

/// A transaction that may name a file, under the lease.
async fn begin_with<'a>(
    conn: &'a mut PgConnection,
    blobs: &BlobStore,
    lease: Lease,
    file: &Digest,
) -> Result<PgTransaction<'a>, QueueError> {
    let mut tx = conn.begin().await?;
    // Before the job's row is held, which others wait for: a blob store may take its time.
    references::hold(&mut tx, blobs, file).await?;
    LockedJob::lock(&mut tx, lease).await?;
    Ok(tx)
}

/// Stores the file of a shard that who has the job computed.
pub async fn put(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    owner: &Owner,
    shard: Shard,
    file: &Digest,
) -> Result<(), QueueError> {
    let lease = owner.lease;
    let mut tx = begin_with(conn, blobs, lease, file).await?;
    let changed = sqlx::query!(
        r#"
        UPDATE job_shard
        SET state = 'succeeded', lease_token = NULL, done = 1, digest = $4, finished_at = now()
        WHERE job_id = $1 AND phase = $2 AND index = $3 AND lease_token = $5
        "#,
        lease.job_id,
        shard.phase.name(),
        shard.index as i32,
        file.as_bytes(),
        lease.token,
    )
    .execute(&mut *tx)
    .await?;
    // Else it was there already: the same one, sent again after a commit whose answer was lost.
    if changed.rows_affected() == 1 {
        record_shard(
            &mut tx,
            lease.job_id,
            EventKind::Shard,
            shard,
            owner.worker_id,
        )
        .await?;
    }
    failpoints::reach("shard_putting", lease.job_id);
    tx.commit().await?;
    tell(conn, lease.job_id, false).await;
    Ok(())
}

/// Stores a phase that was not computed by shards as one, in place of all that there are of it.
pub async fn put_whole(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    owner: &Owner,
    phase: Phase,
    file: &Digest,
) -> Result<(), QueueError> {
    let lease = owner.lease;
    let mut tx = begin_with(conn, blobs, lease, file).await?;
    sqlx::query!(
        "DELETE FROM job_shard WHERE job_id = $1 AND phase = $2",
        lease.job_id,
        phase.name(),
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        r#"
        INSERT INTO job_shard (
            job_id, phase, index, count, arithmetic, state, worker_id, done, digest, started_at, finished_at
        )
        VALUES ($1, $2, 0, 1, $3, 'succeeded', $4, 1, $5, now(), now())
        "#,
        lease.job_id,
        phase.name(),
        owner.arithmetic,
        owner.worker_id,
        file.as_bytes(),
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    // Gradients that were dealt out may be helped with now.
    tell(conn, lease.job_id, true).await;
    Ok(())
}

/// Gives up the file of a shard that cannot be read: it is computed again, by who has the job.
pub async fn discard(
    conn: &mut PgConnection,
    owner: &Owner,
    phase: Phase,
    index: usize,
) -> Result<(), QueueError> {
    let lease = owner.lease;
    let mut tx = conn.begin().await?;
    LockedJob::lock(&mut tx, lease).await?;
    sqlx::query!(
        r#"
        UPDATE job_shard
        SET state = 'queued', done = 0, digest = NULL, attempt = $4, started_at = NULL, finished_at = NULL
        WHERE job_id = $1 AND phase = $2 AND index = $3 AND state = 'succeeded'
        "#,
        lease.job_id,
        phase.name(),
        index as i32,
        MAX_HELPERS,
    )
    .execute(&mut *tx)
    .await?;
    Ok(tx.commit().await?)
}

/// What is not there of a phase is not needed; who works on it loses it.
pub async fn end(conn: &mut PgConnection, lease: Lease, phase: Phase) -> Result<(), QueueError> {
    let mut tx = conn.begin().await?;
    LockedJob::lock(&mut tx, lease).await?;
    sqlx::query!(
        "DELETE FROM job_shard WHERE job_id = $1 AND phase = $2 AND state <> 'succeeded'",
        lease.job_id,
        phase.name(),
    )
    .execute(&mut *tx)
    .await?;
    Ok(tx.commit().await?)
}

/// Tells what α is by the shards that were merged.
pub async fn estimate(
    conn: &mut PgConnection,
    lease: Lease,
    estimate: &Estimate,
) -> Result<(), QueueError> {
    let mut tx = conn.begin().await?;
    LockedJob::lock(&mut tx, lease).await?;
    record(&mut tx, lease.job_id, EventKind::Estimate, json!(estimate)).await?;
    tx.commit().await?;
    tell(conn, lease.job_id, false).await;
    Ok(())
}

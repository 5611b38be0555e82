//! What a job's owner does with its shards, under the job's own lease.

use serde_json::json;
use sqlx::{Connection, PgConnection, PgTransaction};
use uuid::Uuid;

use crate::blobs::BlobStore;
use crate::db::DbError;
use crate::failpoints;
use crate::jobs::events::{record, tell};
use crate::jobs::lease::Lease;
use crate::jobs::queue::QueueError;
use crate::jobs::shards::{MAX_HELPERS, record_shard};
use crate::jobs::transition::LockedJob;
use crate::registry::references;
use promptweave_domain::digest::Digest;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::{Estimate, Shard};
use promptweave_domain::words::EventKind;

/// The worker that owns the job, for its shards.
#[derive(Clone, Debug)]
pub struct Owner {
    pub lease: Lease,
    pub worker_id: Uuid,
    /// The arithmetic in which all its shards are computed.
    pub arithmetic: String,
}

/// Divides a phase into `count` shards, unless it is divided already or `count` is 1. Returns the number of shards.
/// Shards that an earlier attempt left in another arithmetic are deleted.
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

/// The state of a phase's shards.
#[derive(Clone, Debug, PartialEq)]
pub struct There {
    /// The shards' files; `None` for a shard that is not finished.
    pub files: Vec<Option<Digest>>,
    /// How much of the whole phase is done, in shards.
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

/// Takes a free shard, under the job's own lease. A shard that this lease holds already is free too: the owner asks
/// only when it has none, so the earlier answer was lost, or the attempt that took it ended.
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

/// Begins a transaction that may refer to a file, under the lease.
async fn begin_with<'a>(
    conn: &'a mut PgConnection,
    blobs: &BlobStore,
    lease: Lease,
    file: &Digest,
) -> Result<PgTransaction<'a>, QueueError> {
    let mut tx = conn.begin().await?;
    // This comes before the job's row is locked, because a blob store may be slow and others wait for the row.
    references::hold(&mut tx, blobs, file).await?;
    LockedJob::lock(&mut tx, lease).await?;
    Ok(tx)
}

/// Stores the file of a shard that the owner computed.
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
    // Otherwise the same file was there already: it was sent again after a commit whose answer was lost.
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

/// Stores a phase that was computed without shards as one shard, in place of all its shards.
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
    // With the features stored, helpers may now take shards of gradients that were laid out before.
    tell(conn, lease.job_id, true).await;
    Ok(())
}

/// Discards the file of a shard that cannot be read. The owner computes it again.
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

/// Deletes the unfinished shards of a phase, which are not needed; a helper that works on one loses it.
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

/// Records an event with the estimate of α from the shards merged so far.
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

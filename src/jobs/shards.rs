//! Shards of a job: parts of its work that idle workers take beside the one that has the job.
//!
//! ```text
//!           take (who has the job), claim (who helps)          give
//!   queued ───────────────────────────────────────► running ─────────► succeeded, with its file
//!     ▲                                                │
//!     └──── lease ran out, given back, job lost ───────┘
//! ```
//!
//! Shards that succeeded outlast the attempt that they were computed in: a crash costs the shard that was in work. When
//! the job is over they are gone. Whoever changes shards of a job and tells of it holds the job's row first.

use std::time::Duration;

use serde_json::json;
use sqlx::types::Json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::events::{record, tell};
use super::leaving::Held;
use super::queue::{Lease, QueueError, Renewal, renewal};
use crate::blobs::BlobStore;
use crate::db::DbError;
use crate::domain::composition::Phase;
use crate::domain::digest::Digest;
use crate::domain::job::EnsembleSpec;
use crate::domain::sharing::{Estimate, Shard};
use crate::failpoints;
use crate::registry::references;

/// A shard that so many helpers lost or failed at is left to who has the job, whose attempts are counted.
const MAX_HELPERS: i32 = 3;

// ---- Who has the job -------------------------------------------------------------------------

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
    Held::lock(&mut tx, lease).await?;
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

/// Stores the file of a shard that who has the job computed.
pub async fn put(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    owner: &Owner,
    shard: Shard,
    file: &Digest,
) -> Result<(), QueueError> {
    let lease = owner.lease;
    let mut tx = conn.begin().await?;
    // Before the job's row is held, which others wait for: a blob store may take its time.
    references::hold(&mut tx, blobs, file).await?;
    Held::lock(&mut tx, lease).await?;
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
        record_shard(&mut tx, lease.job_id, "shard", shard, owner.worker_id).await?;
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
    let mut tx = conn.begin().await?;
    references::hold(&mut tx, blobs, file).await?;
    Held::lock(&mut tx, lease).await?;
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
    Held::lock(&mut tx, lease).await?;
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
    Held::lock(&mut tx, lease).await?;
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
    Held::lock(&mut tx, lease).await?;
    record(&mut tx, lease.job_id, "estimate", json!(estimate)).await?;
    tx.commit().await?;
    tell(conn, lease.job_id, false).await;
    Ok(())
}

// ---- Who helps -------------------------------------------------------------------------------

/// A shard of somebody's job, with all that it is computed from.
#[derive(Clone, Debug)]
pub struct ClaimedShard {
    /// Of the shard, with a token of its own.
    pub lease: Lease,
    pub spec: EnsembleSpec,
    pub shard: Shard,
    /// For gradients: the files of the shards of features, in order.
    pub features: Vec<Digest>,
}

/// Takes a shard of a running job: of the most urgent and oldest that has one of this arithmetic.
pub async fn claim(
    conn: &mut PgConnection,
    worker_id: Uuid,
    arithmetic: &str,
    length: Duration,
) -> Result<Option<ClaimedShard>, QueueError> {
    let token = Uuid::new_v4();
    let mut tx = conn.begin().await?;
    let row = sqlx::query!(
        r#"
        WITH next AS (
            SELECT s.job_id, s.phase, s.index, j.spec
            FROM job_shard s
            JOIN job j ON j.id = s.job_id
            WHERE s.state = 'queued' AND s.attempt < $4 AND s.arithmetic = $5
              AND j.state = 'running' AND j.cancel_requested_at IS NULL
              -- Gradients are computed from all features.
              AND (s.phase = 'features' OR (
                  SELECT bool_and(f.state = 'succeeded') FROM job_shard f
                  WHERE f.job_id = s.job_id AND f.phase = 'features'
              ))
              AND NOT EXISTS (SELECT FROM worker WHERE id = $3 AND state = 'draining')
            ORDER BY j.priority, j.id, s.index
            LIMIT 1
            FOR UPDATE OF s SKIP LOCKED
        )
        UPDATE job_shard s
        SET state       = 'running',
            attempt     = attempt + 1,
            lease_token = $1,
            lease_until = now() + make_interval(secs => $2),
            worker_id   = $3,
            done        = 0,
            started_at  = now(),
            progress_at = now()
        FROM next
        WHERE s.job_id = next.job_id AND s.phase = next.phase AND s.index = next.index
        RETURNING s.job_id, s.phase, s.index, s.count, next.spec AS "spec: Json<EnsembleSpec>"
        "#,
        token,
        length.as_secs_f64(),
        worker_id,
        MAX_HELPERS,
        arithmetic,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let phase = phase(&row.phase)?;
    let features = match phase {
        Phase::Features => Vec::new(),
        _ => there(&mut tx, row.job_id, Phase::Features).await?.files,
    };
    tx.commit().await?;
    failpoints::reach("shard_claimed", row.job_id);
    Ok(Some(ClaimedShard {
        lease: Lease {
            job_id: row.job_id,
            token,
        },
        spec: row.spec.0,
        shard: Shard {
            phase,
            index: row.index as usize,
            count: row.count as usize,
        },
        // All of them, or it would not have been claimed.
        features: features.into_iter().flatten().collect(),
    }))
}

/// Moves the end of a shard's lease. It holds while the job runs, or waits for somebody to have it again.
pub async fn renew(
    conn: &mut PgConnection,
    lease: Lease,
    length: Duration,
) -> Result<Renewal, QueueError> {
    let cancel = sqlx::query_scalar!(
        r#"
        UPDATE job_shard s
        SET lease_until = now() + make_interval(secs => $3)
        FROM job j
        WHERE s.job_id = $1 AND s.lease_token = $2 AND s.state = 'running' AND j.id = s.job_id
        RETURNING j.cancel_requested_at IS NOT NULL AS "cancel!"
        "#,
        lease.job_id,
        lease.token,
        length.as_secs_f64(),
    )
    .fetch_optional(conn)
    .await?;
    renewal(lease, cancel)
}

/// Whether a shard's lease holds and its job is to stop; changes nothing.
pub async fn look(conn: &mut PgConnection, lease: Lease) -> Result<Renewal, QueueError> {
    let cancel = sqlx::query_scalar!(
        r#"
        SELECT j.cancel_requested_at IS NOT NULL AS "cancel!"
        FROM job_shard s JOIN job j ON j.id = s.job_id
        WHERE s.job_id = $1 AND s.lease_token = $2 AND s.state = 'running'
        "#,
        lease.job_id,
        lease.token,
    )
    .fetch_optional(conn)
    .await?;
    renewal(lease, cancel)
}

/// Stores how much of a shard is done, from 0 to 1.
pub async fn progress(
    conn: &mut PgConnection,
    lease: Lease,
    done: f64,
) -> Result<Renewal, QueueError> {
    let cancel = sqlx::query_scalar!(
        r#"
        UPDATE job_shard s
        SET done = $3, progress_at = now()
        FROM job j
        WHERE s.job_id = $1 AND s.lease_token = $2 AND s.state = 'running' AND j.id = s.job_id
        RETURNING j.cancel_requested_at IS NOT NULL AS "cancel!"
        "#,
        lease.job_id,
        lease.token,
        done.clamp(0.0, 1.0),
    )
    .fetch_optional(conn)
    .await?;
    renewal(lease, cancel)
}

/// Stores the file of a shard that a helper computed, unless its lease is lost or has run out.
pub async fn give(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    claimed: &ClaimedShard,
    file: &Digest,
) -> Result<(), QueueError> {
    let Lease { job_id, token } = claimed.lease;
    let mut tx = conn.begin().await?;
    references::hold(&mut tx, blobs, file).await?;
    lock_job(&mut tx, job_id).await?;
    let worker_id = sqlx::query_scalar!(
        r#"
        UPDATE job_shard
        SET state = 'succeeded', lease_token = NULL, lease_until = NULL, done = 1, digest = $3,
            finished_at = now()
        WHERE job_id = $1 AND lease_token = $2 AND state = 'running' AND lease_until > clock_timestamp()
        RETURNING worker_id AS "worker_id!"
        "#,
        job_id,
        token,
        file.as_bytes(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    let worker_id = worker_id.ok_or(QueueError::LeaseLost(job_id))?;
    record_shard(&mut tx, job_id, "shard", claimed.shard, worker_id).await?;
    failpoints::reach("shard_giving", job_id);
    tx.commit().await?;
    tell(conn, job_id, false).await;
    Ok(())
}

/// How a helper gives a shard back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenBack {
    /// It stops; that does not count.
    Released,
    /// It failed, and another helper may not.
    Failed,
    /// No helper will do better; who has the job finds out why, and its row says so.
    Refused,
}

/// Puts a helper's shard back.
pub async fn give_back(
    conn: &mut PgConnection,
    lease: Lease,
    why: GivenBack,
) -> Result<(), QueueError> {
    let attempt = match why {
        GivenBack::Released => -1,
        GivenBack::Failed => 0,
        GivenBack::Refused => MAX_HELPERS,
    };
    let changed = sqlx::query!(
        r#"
        UPDATE job_shard
        SET state = 'queued', lease_token = NULL, lease_until = NULL, done = 0,
            attempt = attempt + $3, started_at = NULL
        WHERE job_id = $1 AND lease_token = $2 AND state = 'running'
        "#,
        lease.job_id,
        lease.token,
        attempt,
    )
    .execute(&mut *conn)
    .await?;
    if changed.rows_affected() == 0 {
        return Err(QueueError::LeaseLost(lease.job_id));
    }
    tell(conn, lease.job_id, true).await;
    Ok(())
}

/// Puts shards back whose helpers were not heard of in time; answers how many.
pub async fn reap(conn: &mut PgConnection) -> Result<usize, QueueError> {
    let lost = sqlx::query!(
        "SELECT job_id, lease_token AS \"token!\" FROM job_shard
         WHERE state = 'running' AND lease_until < now() ORDER BY lease_until LIMIT 100",
    )
    .fetch_all(&mut *conn)
    .await?;
    let mut reaped = 0;
    for row in lost {
        let mut tx = conn.begin().await?;
        let held = sqlx::query!(
            "SELECT id FROM job WHERE id = $1 FOR UPDATE SKIP LOCKED",
            row.job_id
        );
        // Whoever has it may be frozen; the others are not to wait for that.
        if held.fetch_optional(&mut *tx).await?.is_none() {
            continue;
        }
        let shard = sqlx::query!(
            r#"
            UPDATE job_shard
            SET state = 'queued', lease_token = NULL, lease_until = NULL, done = 0, started_at = NULL
            -- Somebody else may have been faster, or its helper back.
            WHERE job_id = $1 AND lease_token = $2 AND state = 'running' AND lease_until < now()
            RETURNING phase, index, count, worker_id AS "worker_id!"
            "#,
            row.job_id,
            row.token,
        )
        .fetch_optional(&mut *tx)
        .await?;
        if let Some(row_of_shard) = shard {
            let shard = Shard {
                phase: phase(&row_of_shard.phase)?,
                index: row_of_shard.index as usize,
                count: row_of_shard.count as usize,
            };
            let worker_id = row_of_shard.worker_id;
            record_shard(&mut tx, row.job_id, "shard_lost", shard, worker_id).await?;
            reaped += 1;
        }
        tx.commit().await?;
        tell(conn, row.job_id, true).await;
    }
    Ok(reaped)
}

/// As everybody who tells of a shard does first.
async fn lock_job(conn: &mut PgConnection, job_id: Uuid) -> Result<(), QueueError> {
    sqlx::query!("SELECT id FROM job WHERE id = $1 FOR UPDATE", job_id)
        .fetch_one(conn)
        .await?;
    Ok(())
}

async fn record_shard(
    conn: &mut PgConnection,
    job_id: Uuid,
    kind: &str,
    shard: Shard,
    worker_id: Uuid,
) -> Result<(), DbError> {
    let Shard {
        phase,
        index,
        count,
    } = shard;
    let data = json!({"phase": phase, "index": index, "count": count, "worker": worker_id});
    record(conn, job_id, kind, data).await
}

fn phase(name: &str) -> Result<Phase, DbError> {
    let found = Phase::ALL.into_iter().find(|phase| phase.name() == name);
    found.ok_or_else(|| DbError::unreadable("job_shard", "phase", name))
}

//! What a helper does with a shard, under the shard's own lease.

use std::time::Duration;

use sqlx::types::Json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::blobs::BlobStore;
use crate::failpoints;
use crate::jobs::events::tell;
use crate::jobs::lease::{Lease, LeaseKind};
use crate::jobs::queue::QueueError;
use crate::jobs::shards::owner::there;
use crate::jobs::shards::{MAX_HELPERS, phase, record_shard};
use crate::registry::references;
use promptweave_domain::clock::new_token;
use promptweave_domain::digest::Digest;
use promptweave_domain::job::EnsembleSpec;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::Shard;
use promptweave_domain::words::EventKind;

/// A claimed shard of another worker's job, with everything it is computed from.
#[derive(Clone, Debug)]
pub struct ClaimedShard {
    /// The shard's lease, with its own token.
    pub lease: Lease,
    pub spec: EnsembleSpec,
    pub shard: Shard,
    /// The files of the shards of features, in order; only for gradients.
    pub features: Vec<Digest>,
}

/// Claims a shard of a running job in this arithmetic; the most urgent job first, then the oldest.
pub async fn claim(
    conn: &mut PgConnection,
    worker_id: Uuid,
    arithmetic: &str,
    length: Duration,
) -> Result<Option<ClaimedShard>, QueueError> {
    let token = new_token();
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
            kind: LeaseKind::Shard,
            job_id: row.job_id,
            token,
        },
        spec: row.spec.0,
        shard: Shard {
            phase,
            index: row.index as usize,
            count: row.count as usize,
        },
        // All of them exist, or the shard would not have been claimed.
        features: features.into_iter().flatten().collect(),
    }))
}

/// Stores the file of a shard that a helper computed, unless its lease is lost or has run out.
pub async fn give(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    claimed: &ClaimedShard,
    file: &Digest,
) -> Result<(), QueueError> {
    let Lease { job_id, token, .. } = claimed.lease;
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
    let worker_id = worker_id.ok_or_else(|| claimed.lease.lost())?;
    record_shard(&mut tx, job_id, EventKind::Shard, claimed.shard, worker_id).await?;
    failpoints::reach("shard_giving", job_id);
    tx.commit().await?;
    tell(conn, job_id, false).await;
    Ok(())
}

/// Why a helper gives a shard back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenBack {
    /// The helper stops; this does not count as a failure.
    Released,
    /// The helper failed, and another helper may succeed.
    Failed,
    /// No helper would succeed. The owner will hit the same error and store it in the job's row.
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
        return Err(lease.lost());
    }
    tell(conn, lease.job_id, true).await;
    Ok(())
}

/// Puts back shards whose lease ran out; returns how many.
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
        // The process that locked the row may be frozen; the other shards must not wait for it.
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
            record_shard(&mut tx, row.job_id, EventKind::ShardLost, shard, worker_id).await?;
            reaped += 1;
        }
        tx.commit().await?;
        tell(conn, row.job_id, true).await;
    }
    Ok(reaped)
}

/// Locks the job's row. Whoever records an event of a shard does this first.
async fn lock_job(conn: &mut PgConnection, job_id: Uuid) -> Result<(), QueueError> {
    sqlx::query!("SELECT id FROM job WHERE id = $1 FOR UPDATE", job_id)
        .fetch_one(conn)
        .await?;
    Ok(())
}

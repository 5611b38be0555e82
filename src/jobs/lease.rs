//! A lease: the right of one worker to work on a job, or on one shard of another worker's job.
//!
//! - A claim grants it for a while, under a new token ([`queue::claim`](crate::jobs::queue::claim),
//!   [`shards::claim`](crate::jobs::shards::claim)). The row of the job, or of the shard, holds the token.
//! - Every write of the worker names the token. Once the row has another one or none, the lease is lost: each write
//!   answers [`QueueError::LeaseLost`] and changes nothing.
//! - The worker renews it. A lease that has run out but was not reaped yet is revived by that.
//! - Neither a job's result nor a helper's shard is stored under a lease that has run out, even before it is reaped.
//! - Any process reaps leases that have run out ([`reaper`](crate::jobs::reaper)), and the work is queued again.
//! - The lease of a shard also holds while its job waits for the next attempt. It is lost when the job is over.
//!
//! Time is always the database's `now()`.

use std::time::Duration;

use serde_json::json;
use sqlx::types::Json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::failpoints;
use crate::jobs::events::{record, tell};
use crate::jobs::queue::QueueError;
use promptweave_domain::job::Progress;
use promptweave_domain::words::EventKind;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    pub kind: LeaseKind,
    pub job_id: Uuid,
    pub token: Uuid,
}

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseKind {
    Job,
    Shard,
}

/// What a worker learns from each look and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenewOutcome {
    Renewed,
    /// A client wants the job to stop; the lease still holds.
    CancelRequested,
}

impl Lease {
    /// Makes the lease last for `length` from now.
    pub async fn renew(
        self,
        conn: &mut PgConnection,
        length: Duration,
    ) -> Result<RenewOutcome, QueueError> {
        let cancel = match self.kind {
            LeaseKind::Job => {
                sqlx::query_scalar!(
                    r#"
                    UPDATE job
                    SET lease_until = now() + make_interval(secs => $3)
                    WHERE id = $1 AND lease_token = $2 AND state = 'running'
                    RETURNING cancel_requested_at IS NOT NULL AS "cancel!"
                    "#,
                    self.job_id,
                    self.token,
                    length.as_secs_f64(),
                )
                .fetch_optional(conn)
                .await?
            }
            LeaseKind::Shard => {
                sqlx::query_scalar!(
                    r#"
                    UPDATE job_shard s
                    SET lease_until = now() + make_interval(secs => $3)
                    FROM job j
                    WHERE s.job_id = $1 AND s.lease_token = $2 AND s.state = 'running' AND j.id = s.job_id
                    RETURNING j.cancel_requested_at IS NOT NULL AS "cancel!"
                    "#,
                    self.job_id,
                    self.token,
                    length.as_secs_f64(),
                )
                .fetch_optional(conn)
                .await?
            }
        };
        self.outcome(cancel)
    }

    /// Reads whether the lease holds and whether the job should stop; changes nothing.
    pub async fn look(self, conn: &mut PgConnection) -> Result<RenewOutcome, QueueError> {
        let cancel = match self.kind {
            LeaseKind::Job => {
                sqlx::query_scalar!(
                    r#"
                    SELECT cancel_requested_at IS NOT NULL AS "cancel!"
                    FROM job WHERE id = $1 AND lease_token = $2 AND state = 'running'
                    "#,
                    self.job_id,
                    self.token,
                )
                .fetch_optional(conn)
                .await?
            }
            LeaseKind::Shard => {
                sqlx::query_scalar!(
                    r#"
                    SELECT j.cancel_requested_at IS NOT NULL AS "cancel!"
                    FROM job_shard s JOIN job j ON j.id = s.job_id
                    WHERE s.job_id = $1 AND s.lease_token = $2 AND s.state = 'running'
                    "#,
                    self.job_id,
                    self.token,
                )
                .fetch_optional(conn)
                .await?
            }
        };
        self.outcome(cancel)
    }

    /// Stores progress: the phase and its numbers in the job's row, or the part that is done in the shard's.
    pub async fn progress(
        self,
        conn: &mut PgConnection,
        progress: Progress,
    ) -> Result<RenewOutcome, QueueError> {
        let cancel = match self.kind {
            LeaseKind::Job => self.progress_of_job(conn, progress).await?,
            LeaseKind::Shard => {
                let done = progress.done as f64 / progress.total.max(1) as f64;
                sqlx::query_scalar!(
                    r#"
                    UPDATE job_shard s
                    SET done = $3, progress_at = now()
                    FROM job j
                    WHERE s.job_id = $1 AND s.lease_token = $2 AND s.state = 'running' AND j.id = s.job_id
                    RETURNING j.cancel_requested_at IS NOT NULL AS "cancel!"
                    "#,
                    self.job_id,
                    self.token,
                    done.clamp(0.0, 1.0),
                )
                .fetch_optional(conn)
                .await?
            }
        };
        self.outcome(cancel)
    }

    /// Stores a job's progress. A new phase records an event.
    async fn progress_of_job(
        self,
        conn: &mut PgConnection,
        progress: Progress,
    ) -> Result<Option<bool>, QueueError> {
        let mut tx = conn.begin().await?;
        let row = sqlx::query!(
            r#"
            UPDATE job
            SET phase = $3, progress = $4, progress_at = now(),
                phase_started_at = CASE WHEN before.phase IS DISTINCT FROM $3 THEN now()
                                        ELSE phase_started_at END
            FROM (SELECT id, phase FROM job WHERE id = $1 FOR UPDATE) before
            WHERE job.id = before.id AND lease_token = $2 AND state = 'running'
            RETURNING
                before.phase IS DISTINCT FROM job.phase AS "new_phase!",
                job.cancel_requested_at IS NOT NULL AS "cancel!"
            "#,
            self.job_id,
            self.token,
            progress.phase.name(),
            Json(progress) as _,
        )
        .fetch_optional(&mut *tx)
        .await?;
        let new_phase = row.as_ref().is_some_and(|row| row.new_phase);
        if new_phase {
            let phase = json!({"phase": progress.phase});
            record(&mut tx, self.job_id, EventKind::Phase, phase).await?;
        }
        failpoints::reach("progressing", self.job_id);
        tx.commit().await?;
        if new_phase {
            tell(conn, self.job_id, false).await;
        }
        Ok(row.map(|row| row.cancel))
    }

    /// The answer to a write: `cancel` is from the row, if there is one with this token.
    fn outcome(self, cancel: Option<bool>) -> Result<RenewOutcome, QueueError> {
        match cancel {
            None => Err(self.lost()),
            Some(true) => Ok(RenewOutcome::CancelRequested),
            Some(false) => Ok(RenewOutcome::Renewed),
        }
    }

    /// The error of a write that found no row with this token.
    pub(super) fn lost(self) -> QueueError {
        QueueError::LeaseLost(self.job_id)
    }
}

//! The state machine's statements for workers; [`requests`](crate::jobs::requests) has those for clients. Long work
//! holds a [`lease`](crate::jobs::lease), never a transaction.
//!
//! Time is always the database's `now()`. Each function that moves a job is one transaction, often of one statement,
//! and locks the job's row before anything else.

use std::time::Duration;

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::db::{DbError, violates};
use crate::failpoints;
use crate::jobs::events::tell;
use crate::jobs::lease::{Lease, LeaseKind};
use crate::jobs::transition::{LockedJob, Transition};
use crate::registry::RegistryError;
use promptweave_domain::clock::{jitter, new_token};
use promptweave_domain::job::{AttemptOutcome, JobError, JobState};
use promptweave_domain::specification::JobSpec;
use promptweave_domain::words::JobErrorCode;

/// The channel that tells workers there may be work. A hint, never the only way.
pub const WORK_CHANNEL: &str = "promptweave_work";

#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error(transparent)]
    Db(#[from] DbError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The job is over, or another attempt owns it; nothing was written.
    #[error("the lease of job {0} is lost")]
    LeaseLost(Uuid),
}

impl QueueError {
    /// Whether the database refused what was to be stored, and will refuse it again.
    pub fn is_refused_by_constraint(&self) -> bool {
        match self {
            Self::Db(error) | Self::Registry(RegistryError::Db(error)) => {
                error.is_refused_by_constraint()
            }
            Self::Registry(RegistryError::Blob(_) | RegistryError::BlobGone(_))
            | Self::LeaseLost(_) => false,
            // These include constraints, by name.
            Self::Registry(_) => true,
        }
    }
}

impl From<sqlx::Error> for QueueError {
    fn from(error: sqlx::Error) -> Self {
        Self::Db(error.into())
    }
}

/// A claimed job.
#[derive(Clone, Debug)]
pub struct Claimed {
    pub lease: Lease,
    pub project_id: Uuid,
    pub attempt: i32,
    pub spec: JobSpec,
}

/// Claims the next job: the smallest priority number first, then the longest waiting.
pub async fn claim(
    conn: &mut PgConnection,
    worker_id: Uuid,
    lease: Duration,
) -> Result<Option<Claimed>, QueueError> {
    let token = new_token();
    let row = loop {
        // This is one statement, and so one transaction that no process can leave half done.
        let claimed = sqlx::query!(
            r#"
            WITH next AS (
                SELECT id
                FROM job
                WHERE state = 'queued' AND run_at <= now()
                  AND NOT EXISTS (SELECT FROM worker WHERE id = $3 AND state = 'draining')
                ORDER BY priority, run_at, id
                LIMIT 1
                -- Two workers never wait for the same row: the second takes the next one.
                FOR UPDATE SKIP LOCKED
            ), claimed AS (
                UPDATE job
                SET state       = 'running',
                    attempt     = attempt + 1,
                    lease_token = $1,
                    lease_until = now() + make_interval(secs => $2),
                    worker_id   = $3,
                    phase       = NULL,
                    progress    = NULL,
                    phase_started_at = NULL,
                    progress_at = now(),
                    started_at  = coalesce(started_at, now())
                FROM next
                WHERE job.id = next.id
                RETURNING job.id, job.project_id, job.attempt, job.kind, job.spec
            ), begun AS (
                INSERT INTO job_attempt (lease_token, job_id, attempt, worker_id)
                SELECT $1, id, attempt, $3 FROM claimed
            ), event AS (
                INSERT INTO job_event (job_id, seq, kind, data)
                SELECT
                    claimed.id,
                    (SELECT coalesce(max(seq), 0) + 1 FROM job_event WHERE job_id = claimed.id),
                    'started',
                    jsonb_build_object('attempt', claimed.attempt, 'worker', $3)
                FROM claimed
            )
            SELECT
                id, project_id, attempt, kind, spec,
                -- The commit does not wait for the disk. A database that crashes right after it has the job queued again,
                -- and knows nothing of this token: whoever holds it can write nothing, as after any lost lease.
                set_config('synchronous_commit', 'off', true) AS not_waited_for
            FROM claimed
            "#,
            token,
            lease.as_secs_f64(),
            worker_id,
        )
        .fetch_optional(&mut *conn)
        .await;
        match claimed {
            // Between the look at the queue and the lock on the row, another worker claimed the job and gave it back,
            // so its new events were not counted. Nothing was written; try again.
            Err(error) if violates(&error, "job_event_pkey") => {}
            other => break other?,
        }
    };
    let Some(row) = row else {
        return Ok(None);
    };
    failpoints::reach("claimed", row.id);
    tell(conn, row.id, false).await;
    Ok(Some(Claimed {
        lease: Lease {
            kind: LeaseKind::Job,
            job_id: row.id,
            token,
        },
        project_id: row.project_id,
        attempt: row.attempt,
        spec: JobSpec::read(&row.kind, row.spec)
            .map_err(|error| DbError::unreadable("job", "spec", &error))?,
    }))
}

/// Ends the attempt with an error. `backoff` means that another attempt may help after that time; after the last
/// attempt the job fails anyway. Returns the job's new state.
pub async fn fail(
    conn: &mut PgConnection,
    lease: Lease,
    error: JobError,
    backoff: Option<Duration>,
) -> Result<JobState, QueueError> {
    let mut tx = conn.begin().await?;
    let held = LockedJob::lock(&mut tx, lease).await?;
    let leaving = match backoff {
        None => Transition::to(JobState::Failed, AttemptOutcome::Failed).because(error),
        Some(_) if held.cancel_requested => {
            Transition::to(JobState::Cancelled, AttemptOutcome::Cancelled)
        }
        Some(_) if held.is_last() => {
            Transition::to(JobState::Failed, AttemptOutcome::Failed).because(held.exhausted(&error))
        }
        Some(delay) => Transition::to(JobState::Queued, AttemptOutcome::Retried)
            .because(error)
            .after(delay),
    };
    let state = leaving.state;
    held.leave(&mut tx, leaving).await?;
    failpoints::reach("failing", lease.job_id);
    tx.commit().await?;
    tell(conn, lease.job_id, state == JobState::Queued).await;
    Ok(state)
}

/// Gives the job back from a worker that stops; the attempt does not count.
pub async fn release(conn: &mut PgConnection, lease: Lease) -> Result<(), QueueError> {
    let mut tx = conn.begin().await?;
    let held = LockedJob::lock(&mut tx, lease).await?;
    let leaving = if held.cancel_requested {
        Transition::to(JobState::Cancelled, AttemptOutcome::Cancelled)
    } else {
        Transition::to(JobState::Queued, AttemptOutcome::Released).uncounted()
    };
    let state = leaving.state;
    held.leave(&mut tx, leaving).await?;
    failpoints::reach("releasing", lease.job_id);
    tx.commit().await?;
    tell(conn, lease.job_id, state == JobState::Queued).await;
    Ok(())
}

/// Ends a job whose cancellation the worker has noticed.
pub async fn finish_cancelled(conn: &mut PgConnection, lease: Lease) -> Result<(), QueueError> {
    let mut tx = conn.begin().await?;
    let held = LockedJob::lock(&mut tx, lease).await?;
    held.leave(
        &mut tx,
        Transition::to(JobState::Cancelled, AttemptOutcome::Cancelled),
    )
    .await?;
    failpoints::reach("cancelling", lease.job_id);
    tx.commit().await?;
    tell(conn, lease.job_id, false).await;
    Ok(())
}

/// A job whose worker's lease ran out, and its new state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reaped {
    pub job_id: Uuid,
    pub state: JobState,
}

/// Puts jobs whose lease has run out back into the queue. Any process may do this at any time; a row that another
/// process is reaping is skipped.
pub async fn reap(conn: &mut PgConnection) -> Result<Vec<Reaped>, QueueError> {
    let mut tx = conn.begin().await?;
    let lost = sqlx::query_as!(
        LockedJob,
        r#"
        SELECT
            id AS job_id,
            lease_token AS "token!",
            attempt,
            max_attempts,
            cancel_requested_at IS NOT NULL AS "cancel_requested!",
            true AS "ran_out!"
        FROM job
        WHERE state = 'running' AND lease_until < now()
        ORDER BY lease_until
        LIMIT 100
        FOR UPDATE SKIP LOCKED
        "#,
    )
    .fetch_all(&mut *tx)
    .await?;
    let mut reaped = Vec::with_capacity(lost.len());
    for held in lost {
        let error = JobError::new(
            JobErrorCode::WorkerLost,
            "the worker was not heard of within its lease",
        );
        let to = |state| Transition::to(state, AttemptOutcome::Lost);
        let leaving = if held.cancel_requested {
            to(JobState::Cancelled)
        } else if held.is_last() {
            to(JobState::Failed).because(held.exhausted(&error))
        } else {
            to(JobState::Queued).because(error)
        };
        failpoints::reach("reaping", held.job_id);
        reaped.push(Reaped {
            job_id: held.job_id,
            state: leaving.state,
        });
        held.leave(&mut tx, leaving).await?;
    }
    tx.commit().await?;
    for reaped in &reaped {
        tell(conn, reaped.job_id, reaped.state == JobState::Queued).await;
    }
    Ok(reaped)
}

/// How long to wait before attempt `attempt` + 1: 2, 4, 8 … seconds up to five minutes, each varied by up to half, so
/// that jobs that failed together do not return together.
pub fn backoff(attempt: i32) -> Duration {
    let exponent = attempt.clamp(1, 9) as u32;
    let seconds = f64::from(2u32.pow(exponent)).min(300.0);
    Duration::from_secs_f64(seconds * jitter(0.5..1.5))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_grows_and_is_bounded() {
        for attempt in 1..50 {
            let seconds = backoff(attempt).as_secs_f64();
            let middle = 2f64.powi(attempt).min(300.0);
            assert!(
                (middle * 0.5..middle * 1.5).contains(&seconds),
                "{attempt}: {seconds}"
            );
        }
    }
}

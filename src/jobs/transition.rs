//! How a job leaves `running`: one statement under the lease's token, with everything that belongs to it.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use sqlx::PgTransaction;
use sqlx::types::Json;
use uuid::Uuid;

use crate::db::DbError;
use crate::jobs::lease::Lease;
use crate::jobs::queue::QueueError;
use crate::webhooks::outbox;
use promptweave_domain::digest::Digest;
use promptweave_domain::job::{AttemptOutcome, JobError, JobState};
use promptweave_domain::words::{EventKind, JobErrorCode};

/// A running job whose row this transaction has locked.
pub(super) struct LockedJob {
    pub job_id: Uuid,
    pub token: Uuid,
    pub attempt: i32,
    pub max_attempts: i32,
    pub cancel_requested: bool,
    /// Whether its lease had run out when the row was locked.
    pub ran_out: bool,
}

/// How a job leaves `running`.
pub(super) struct Transition {
    pub state: JobState,
    outcome: AttemptOutcome,
    error: Option<JobError>,
    /// The time until a queued job may be claimed again.
    delay: Duration,
    /// Whether the attempt does not count.
    uncount: bool,
    /// The answer of a job that succeeded, and the digest of the file that it left, if it left one.
    result: Option<(Value, Option<Digest>)>,
}

impl Transition {
    pub(super) fn to(state: JobState, outcome: AttemptOutcome) -> Self {
        assert!(JobState::Running.may_become(state));
        Self {
            state,
            outcome,
            error: None,
            delay: Duration::ZERO,
            uncount: false,
            result: None,
        }
    }

    pub(super) fn because(self, error: JobError) -> Self {
        Self {
            error: Some(error),
            ..self
        }
    }

    /// Makes the job claimable again only after `delay`.
    pub(super) fn after(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// Makes the attempt not count.
    pub(super) fn uncounted(self) -> Self {
        Self {
            uncount: true,
            ..self
        }
    }

    pub(super) fn with_result(result: &impl Serialize, file: Option<Digest>) -> Self {
        Self {
            result: Some((json!(result), file)),
            ..Self::to(JobState::Succeeded, AttemptOutcome::Succeeded)
        }
    }
}

impl LockedJob {
    /// Locks the row, if it still has the lease's token.
    pub(super) async fn lock(tx: &mut PgTransaction<'_>, lease: Lease) -> Result<Self, QueueError> {
        sqlx::query_as!(
            Self,
            r#"
            SELECT
                id AS job_id,
                lease_token AS "token!",
                attempt,
                max_attempts,
                cancel_requested_at IS NOT NULL AS "cancel_requested!",
                lease_until <= clock_timestamp() AS "ran_out!"
            -- Within, so that the clock is asked when the row is held, not before.
            FROM (SELECT * FROM job WHERE id = $1 AND lease_token = $2 AND state = 'running' FOR UPDATE) held
            "#,
            lease.job_id,
            lease.token,
        )
        .fetch_optional(&mut **tx)
        .await?
        .ok_or_else(|| lease.lost())
    }

    pub(super) fn is_last(&self) -> bool {
        self.attempt >= self.max_attempts
    }

    pub(super) fn exhausted(&self, last: &JobError) -> JobError {
        let detail = format!(
            "{} attempts failed, the last with {}: {}",
            self.attempt, last.code, last.detail
        );
        JobError::new(JobErrorCode::AttemptsExhausted, detail)
    }

    /// Runs the one statement by which a job leaves `running`, with everything that belongs to it.
    pub(super) async fn leave(
        self,
        tx: &mut PgTransaction<'_>,
        leaving: Transition,
    ) -> Result<(), QueueError> {
        let Transition {
            state,
            outcome,
            error,
            delay,
            uncount,
            result,
        } = leaving;
        let mut data = json!({"attempt": self.attempt});
        if let Some(error) = &error {
            data["error"] = json!(error);
        }
        let (result, file) = result.unzip();
        let file = file.flatten();
        let heard = sqlx::query_scalar!(
            r#"
            WITH left_job AS (
                UPDATE job
                SET state             = $3,
                    lease_token       = NULL,
                    lease_until       = NULL,
                    attempt           = attempt - $4,
                    run_at            = CASE $3 WHEN 'queued' THEN now() + make_interval(secs => $5)
                                                ELSE run_at END,
                    finished_at       = CASE $3 WHEN 'queued' THEN NULL ELSE now() END,
                    error             = $6,
                    result            = $7,
                    file_digest = $8
                WHERE id = $1 AND lease_token = $2 AND state = 'running'
                RETURNING project_id
            ), ended_attempt AS (
                UPDATE job_attempt SET ended_at = now(), outcome = $9, error = $6
                WHERE lease_token = $2
                RETURNING lease_token
            ), shards_that_are_over AS (
                DELETE FROM job_shard WHERE job_id = $1 AND $12
            ), checkpoints_that_are_over AS (
                DELETE FROM job_checkpoint WHERE job_id = $1 AND $12
            ), shards_for_the_next AS (
                -- While it waits for another attempt those that are there stay, and helpers go on.
                UPDATE job_shard SET state = 'queued', lease_token = NULL, done = 0, started_at = NULL
                WHERE job_id = $1 AND lease_token = $2 AND state = 'running' AND NOT $12
            ), event AS (
                INSERT INTO job_event (job_id, seq, kind, data)
                SELECT $1, coalesce(max(seq), 0) + 1, $10, $11 FROM job_event WHERE job_id = $1
            )
            SELECT EXISTS (SELECT FROM webhook w WHERE w.project_id = left_job.project_id) AS "heard!"
            -- A row if both were changed.
            FROM left_job, ended_attempt
            "#,
            self.job_id,
            self.token,
            state.name(),
            i32::from(uncount),
            delay.as_secs_f64(),
            error.map(Json) as _,
            result,
            file.as_ref().map(|digest| digest.as_bytes() as &[u8]),
            outcome.name(),
            event(state, outcome).name(),
            data,
            state.is_terminal(),
        )
        .fetch_optional(&mut **tx)
        .await?
        .ok_or(DbError::RowCount(0))?;
        if heard && state.is_terminal() {
            outbox::ended(tx, self.job_id).await?;
        }
        Ok(())
    }
}

/// The event of a transition: the new state, or why the job waits again.
fn event(state: JobState, outcome: AttemptOutcome) -> EventKind {
    match (state, outcome) {
        (JobState::Succeeded, _) => EventKind::Succeeded,
        (JobState::Failed, _) => EventKind::Failed,
        (JobState::Cancelled, _) => EventKind::Cancelled,
        (_, AttemptOutcome::Lost) => EventKind::Lost,
        (_, AttemptOutcome::Released) => EventKind::Released,
        _ => EventKind::Retried,
    }
}

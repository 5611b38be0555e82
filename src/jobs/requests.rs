//! The queue's statements for clients: post a job, cancel it, retry it. Those for workers are in
//! [`queue`](crate::jobs::queue).

use serde_json::json;
use sqlx::types::Json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::db::{DbError, expect_one_row};
use crate::jobs::events::{record, tell};
use crate::jobs::queue::QueueError;
use crate::webhooks::outbox;
use promptweave_domain::job::{JobState, MAX_ATTEMPTS};
use promptweave_domain::specification::Specification;
use promptweave_domain::words::EventKind;

#[derive(Clone, Debug)]
pub struct NewJob<'a, S> {
    pub id: Uuid,
    pub project_id: Uuid,
    pub priority: i32,
    pub spec: &'a S,
    /// The job whose answer this one will be compared with.
    pub replay_of: Option<Uuid>,
}

/// Which existing jobs may answer a request, so that nothing is computed twice.
#[derive(Clone, Copy, Debug)]
pub struct Reuse<'a> {
    /// The name that the result must be published under, if the request gives one.
    pub output: Option<&'a str>,
}

/// The outcome of a request for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnqueueOutcome {
    Queued,
    /// This existing job computes or computed the same.
    Same(Uuid),
    /// The queue is full.
    Full,
}

/// Puts a job into the queue, unless an existing one may be reused or `most` are waiting. Of equal requests at the same
/// time, one creates the job.
pub async fn post<S: Specification>(
    conn: &mut PgConnection,
    new: NewJob<'_, S>,
    reuse: Option<Reuse<'_>>,
    most: u32,
) -> Result<EnqueueOutcome, QueueError> {
    let mut tx = conn.begin().await?;
    if let Some(reuse) = reuse {
        // The lock lasts until the transaction ends, so that no other request looks between this one's look and its
        // insert.
        sqlx::query!(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))",
            format!("{}{}", new.project_id, new.spec.digest()),
        )
        .fetch_one(&mut *tx)
        .await?;
        if let Some(id) = same(&mut tx, &new, reuse).await? {
            return Ok(EnqueueOutcome::Same(id));
        }
    }
    let id = new.id;
    if !insert(&mut tx, new, Some(most)).await? {
        return Ok(EnqueueOutcome::Full);
    }
    tx.commit().await?;
    tell(conn, id, true).await;
    Ok(EnqueueOutcome::Queued)
}

/// The oldest job that computes the same and may be reused. One that is asked to stop, or whose prompt was deleted, may
/// not.
pub async fn same<S: Specification>(
    conn: &mut PgConnection,
    new: &NewJob<'_, S>,
    reuse: Reuse<'_>,
) -> Result<Option<Uuid>, DbError> {
    let spec_digest = new.spec.digest();
    let found = sqlx::query_scalar!(
        r#"
        -- Materialized, so that it goes by the digest: with the order and the limit beside them the planner would rather
        -- walk through all jobs there ever were, as the first that fits might come soon.
        WITH same AS MATERIALIZED (
            SELECT id
            FROM job
            WHERE project_id = $1 AND kind = $2 AND spec_digest = $3
              AND cancel_requested_at IS NULL
              AND ($4::text IS NULL OR spec->>'output' = $4)
              AND (state IN ('queued', 'running') OR state = 'succeeded' AND NOT EXISTS (
                  SELECT FROM prompt p
                  WHERE p.project_id = job.project_id
                    AND p.name = coalesce(job.result->'composed_prompt', job.result->'tuned')->>'prompt'
                    AND p.deleted_at IS NOT NULL
              ))
        )
        SELECT id FROM same ORDER BY id LIMIT 1
        "#,
        new.project_id,
        S::KIND,
        spec_digest.as_bytes(),
        reuse.output,
    )
    .fetch_optional(conn)
    .await?;
    Ok(found)
}

/// Puts a job into the queue.
pub async fn enqueue<S: Specification>(
    conn: &mut PgConnection,
    new: NewJob<'_, S>,
) -> Result<(), QueueError> {
    let id = new.id;
    insert(conn, new, None).await?;
    tell(conn, id, true).await;
    Ok(())
}

/// Inserts the job; false if `most` wait already.
async fn insert<S: Specification>(
    conn: &mut PgConnection,
    new: NewJob<'_, S>,
    most: Option<u32>,
) -> Result<bool, QueueError> {
    let spec_digest = new.spec.digest();
    let inserted = sqlx::query!(
        r#"
        WITH new AS (
            INSERT INTO job (id, project_id, kind, priority, max_attempts, spec, spec_digest, replay_of)
            SELECT $1, $2, $3, $4, $5, $6, $7, $8
            WHERE $9::bigint IS NULL
               OR $9 > (SELECT count(*) FROM (SELECT FROM job WHERE state = 'queued' LIMIT $9) queued)
            RETURNING id
        )
        INSERT INTO job_event (job_id, seq, kind, data) SELECT id, 1, 'queued', '{}' FROM new
        "#,
        new.id,
        new.project_id,
        S::KIND,
        new.priority,
        MAX_ATTEMPTS,
        Json(new.spec) as _,
        spec_digest.as_bytes(),
        new.replay_of,
        most.map(i64::from),
    )
    .execute(conn)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

/// The outcome of asking for a cancellation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancellation {
    /// The job was waiting, and is cancelled now.
    Cancelled,
    /// The job is running, and its worker will notice.
    Requested,
    /// The job had ended before.
    AlreadyOver(JobState),
}

/// Cancels a waiting job, or asks the worker of a running one to stop. None if there is no such job.
pub async fn cancel(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<Option<Cancellation>, QueueError> {
    let mut tx = conn.begin().await?;
    let row = sqlx::query!(
        r#"
        SELECT state, cancel_requested_at IS NOT NULL AS "requested!"
        FROM job WHERE project_id = $1 AND id = $2 FOR UPDATE
        "#,
        project_id,
        id,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let state = JobState::from_name(&row.state)
        .ok_or_else(|| DbError::unreadable("job", "state", &row.state))?;
    let (done, event) = match state {
        JobState::Queued => (Cancellation::Cancelled, EventKind::Cancelled),
        JobState::Running if row.requested => return Ok(Some(Cancellation::Requested)),
        JobState::Running => (Cancellation::Requested, EventKind::CancelRequested),
        over => return Ok(Some(Cancellation::AlreadyOver(over))),
    };
    let changed = sqlx::query!(
        r#"
        UPDATE job
        SET cancel_requested_at = now(),
            state       = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END,
            finished_at = CASE state WHEN 'queued' THEN now() END,
            -- Of an earlier attempt.
            error       = CASE state WHEN 'queued' THEN NULL ELSE error END
        WHERE id = $1
        "#,
        id,
    )
    .execute(&mut *tx)
    .await?;
    expect_one_row(changed)?;
    if done == Cancellation::Cancelled {
        // These shards were left by an earlier attempt.
        sqlx::query!("DELETE FROM job_shard WHERE job_id = $1", id)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("DELETE FROM job_checkpoint WHERE job_id = $1", id)
            .execute(&mut *tx)
            .await?;
    }
    record(&mut tx, id, event, json!({})).await?;
    if done == Cancellation::Cancelled {
        outbox::ended(&mut tx, id).await?;
    }
    tx.commit().await?;
    tell(conn, id, false).await;
    Ok(Some(done))
}

/// Puts a failed or cancelled job back into the queue, with as many attempts as a new one. The error is the state that
/// forbids it. None if there is no such job.
pub async fn retry(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<Option<Result<(), JobState>>, QueueError> {
    let mut tx = conn.begin().await?;
    let state = sqlx::query_scalar!(
        "SELECT state FROM job WHERE project_id = $1 AND id = $2 FOR UPDATE",
        project_id,
        id,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(state) = state else {
        return Ok(None);
    };
    let state =
        JobState::from_name(&state).ok_or_else(|| DbError::unreadable("job", "state", &state))?;
    if !(state.is_terminal() && state.may_become(JobState::Queued)) {
        return Ok(Some(Err(state)));
    }
    let changed = sqlx::query!(
        r#"
        UPDATE job
        SET state               = 'queued',
            run_at              = now(),
            max_attempts        = attempt + $2,
            cancel_requested_at = NULL,
            finished_at         = NULL
        WHERE id = $1
        "#,
        id,
        MAX_ATTEMPTS,
    )
    .execute(&mut *tx)
    .await?;
    expect_one_row(changed)?;
    record(&mut tx, id, EventKind::RetryRequested, json!({})).await?;
    tx.commit().await?;
    tell(conn, id, true).await;
    Ok(Some(Ok(())))
}

//! The events of a job, in order, numbered from 1 without gaps.

use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::DbError;
use crate::jobs::queue::WORK_CHANNEL;
use promptweave_domain::words::EventKind;

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobEvent {
    /// Counted from 1 within the job.
    pub seq: i32,
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    #[schema(value_type = EventKind)]
    pub kind: String,
    /// Data of this kind of event: the attempt, the phase or the error; for `estimate`, α from the shards so far; for
    /// `epoch`, its number and losses.
    pub data: Value,
}

/// The channel that names jobs with new events. A hint only, like [`crate::jobs::queue::WORK_CHANNEL`].
pub const EVENT_CHANNEL: &str = "promptweave_event";

/// Records an event in the transaction that makes it true. The caller has locked the job's row, and calls [`tell`]
/// after the commit.
pub(super) async fn record(
    conn: &mut PgConnection,
    job_id: Uuid,
    kind: EventKind,
    data: Value,
) -> Result<(), DbError> {
    sqlx::query!(
        r#"
        INSERT INTO job_event (job_id, seq, kind, data)
        SELECT $1, coalesce(max(seq), 0) + 1, $2, $3 FROM job_event WHERE job_id = $1
        "#,
        job_id,
        kind.name(),
        data,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Wakes those who wait for this job, and workers too if there may be `work`. Call it after the commit, not within the
/// transaction: a transaction that notifies holds a lock until its commit is on disk, and no other notifying
/// transaction can commit meanwhile. A lost hint only delays those who wait until they next poll.
pub(super) async fn tell(conn: &mut PgConnection, job_id: Uuid, work: bool) {
    let told = sqlx::query!(
        "SELECT pg_notify($1, $2), CASE WHEN $3 THEN pg_notify($4, '') END",
        EVENT_CHANNEL,
        job_id.to_string(),
        work,
        WORK_CHANNEL,
    );
    said(told.fetch_one(conn).await);
}

/// Wakes all workers that wait.
pub(super) async fn tell_workers(conn: &mut PgConnection) {
    let told = sqlx::query!("SELECT pg_notify($1, '')", WORK_CHANNEL);
    said(told.fetch_one(conn).await);
}

fn said<T>(told: Result<T, sqlx::Error>) {
    if let Err(error) = told {
        tracing::debug!(%error, "nobody was told");
    }
}

/// The events of a job after number `after`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    job_id: Uuid,
    after: i32,
    limit: i64,
) -> Result<Vec<JobEvent>, DbError> {
    let events = sqlx::query_as!(
        JobEvent,
        r#"
        SELECT e.seq, e.at, e.kind, e.data
        FROM job_event e
        JOIN job j ON j.id = e.job_id
        WHERE j.project_id = $1 AND e.job_id = $2 AND e.seq > $3
        ORDER BY e.seq
        LIMIT $4
        "#,
        project_id,
        job_id,
        after,
        limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(events)
}

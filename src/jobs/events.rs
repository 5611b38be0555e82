//! What happened to a job, in order: numbered from 1 without gaps.

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
    /// What belongs to that kind: the attempt, the phase, the error; of `estimate` what α is by the shards so far;
    /// of `epoch` its number and losses.
    pub data: Value,
}

/// Where jobs are named that something happened to; a hint, as [`crate::jobs::queue::WORK_CHANNEL`].
pub const EVENT_CHANNEL: &str = "promptweave_event";

/// Adds an event within the transaction that makes it true; the caller holds the job's row, and
/// [tells](tell) of it after the commit.
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

/// Wakes who waits for this job, and workers too where there may be `work`. After the commit, not within it: a
/// transaction that notifies holds a lock while its commit waits for the disk, and no other that notifies can
/// commit meanwhile. A hint that is lost here costs those who wait the time until they look again.
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

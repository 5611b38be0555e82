//! Which workers there are, and whether any of them can work.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::{DbError, expect_one_row};

#[derive(Clone, Debug)]
pub struct NewWorker<'a> {
    pub id: Uuid,
    pub host: &'a str,
    pub pid: u32,
    pub device: &'a str,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Worker {
    pub id: Uuid,
    pub host: String,
    pub pid: i32,
    #[schema(example = "cpu")]
    pub device: String,
    /// promptweave's own.
    pub version: String,
    /// `idle`, `busy` or `stopped`.
    #[schema(example = "idle")]
    pub state: String,
    /// The job it has.
    pub job_id: Option<Uuid>,
    #[serde(with = "time::serde::rfc3339")]
    pub started_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub last_seen: OffsetDateTime,
    /// When its engine last answered.
    #[serde(with = "time::serde::rfc3339")]
    pub selftest_at: OffsetDateTime,
    /// Seen within the last minute, by the database's clock, and not stopped.
    pub live: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerState {
    Idle,
    Busy,
    Stopped,
}

impl WorkerState {
    fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Busy => "busy",
            Self::Stopped => "stopped",
        }
    }
}

/// Makes a worker known, its engine having answered.
pub async fn register(conn: &mut PgConnection, new: &NewWorker<'_>) -> Result<(), DbError> {
    sqlx::query!(
        r#"
        INSERT INTO worker (id, host, pid, device, version, state)
        VALUES ($1, $2, $3, $4, $5, 'idle')
        "#,
        new.id,
        new.host,
        new.pid as i32,
        new.device,
        env!("CARGO_PKG_VERSION"),
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A sign of life; `answered` says that the engine gave one too.
pub async fn seen(
    conn: &mut PgConnection,
    id: Uuid,
    state: WorkerState,
    answered: bool,
) -> Result<(), DbError> {
    let changed = sqlx::query!(
        r#"
        UPDATE worker
        SET state = $2,
            last_seen = now(),
            selftest_at = CASE WHEN $3 THEN now() ELSE selftest_at END
        WHERE id = $1
        "#,
        id,
        state.name(),
        answered,
    )
    .execute(conn)
    .await?;
    expect_one_row(changed)
}

/// Workers seen within a day, the newest first.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<Worker>, DbError> {
    let workers = sqlx::query_as!(
        Worker,
        r#"
        SELECT
            w.id, w.host, w.pid, w.device, w.version, w.state, w.started_at, w.last_seen,
            w.selftest_at,
            j.id AS "job_id?",
            w.state <> 'stopped' AND w.last_seen > now() - interval '1 minute' AS "live!"
        FROM worker w
        LEFT JOIN job j ON j.worker_id = w.id AND j.state = 'running'
        WHERE w.last_seen > now() - interval '1 day'
        ORDER BY w.id DESC
        LIMIT 200
        "#,
    )
    .fetch_all(conn)
    .await?;
    Ok(workers)
}

/// Whether some worker's engine answered, or made progress on a job, within the last minute.
pub async fn any_ready(conn: &mut PgConnection) -> Result<bool, DbError> {
    let ready = sqlx::query_scalar!(
        r#"
        SELECT EXISTS (
            SELECT FROM worker w
            LEFT JOIN job j ON j.worker_id = w.id AND j.state = 'running'
            WHERE w.state <> 'stopped'
              AND w.last_seen > now() - interval '1 minute'
              AND greatest(w.selftest_at, j.progress_at) > now() - interval '1 minute'
        ) AS "ready!"
        "#,
    )
    .fetch_one(conn)
    .await?;
    Ok(ready)
}

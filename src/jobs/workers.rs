//! The known workers, and whether any of them can work.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::{DbError, expect_one_row};
use crate::jobs::events::tell_workers;
pub use promptweave_domain::words::WorkerState;

#[derive(Clone, Copy, Debug, Default)]
pub struct NewWorker<'a> {
    pub id: Uuid,
    pub host: &'a str,
    pub pid: u32,
    pub device: &'a str,
    pub driver: Option<&'a str>,
    pub memory_bytes: Option<u64>,
    pub libtorch: Option<&'a str>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Worker {
    pub id: Uuid,
    pub host: String,
    pub pid: i32,
    #[schema(example = "cuda:0")]
    pub device: String,
    /// Version of NVIDIA's driver; null without one.
    #[schema(example = "580.65.06")]
    pub driver: Option<String>,
    /// Memory of all its devices together; the machine's memory for a CPU.
    pub memory_bytes: Option<i64>,
    /// Version of libtorch.
    #[schema(example = "2.11.0")]
    pub libtorch: Option<String>,
    /// Version of promptweave.
    pub version: String,
    /// `draining`: it claims nothing more, and ends after its current job. `defunct`: several starts in a row have
    /// failed.
    #[schema(value_type = WorkerState)]
    pub state: String,
    /// Why the worker ended; null if it was asked to.
    pub reason: Option<String>,
    /// The job that the worker runs, or helps with.
    pub job_id: Option<Uuid>,
    #[serde(with = "time::serde::rfc3339")]
    pub started_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub last_seen: OffsetDateTime,
    /// When its engine last passed its self-test, or finished an attempt.
    #[serde(with = "time::serde::rfc3339")]
    pub selftest_at: OffsetDateTime,
    /// Whether the worker was seen within the last minute, by the database's clock, and is neither stopped nor defunct.
    pub live: bool,
}

/// Registers a worker that is ready, or that is ready again after failed starts under the same id.
pub async fn register(conn: &mut PgConnection, new: &NewWorker<'_>) -> Result<(), DbError> {
    sqlx::query!(
        r#"
        INSERT INTO worker (id, host, pid, device, driver, memory_bytes, libtorch, version, state)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 'idle')
        ON CONFLICT (id) DO UPDATE
        SET host = excluded.host, pid = excluded.pid, device = excluded.device,
            driver = excluded.driver, memory_bytes = excluded.memory_bytes,
            libtorch = excluded.libtorch, version = excluded.version,
            state = 'idle', reason = NULL,
            started_at = now(), last_seen = now(), selftest_at = now()
        "#,
        new.id,
        new.host,
        new.pid as i32,
        new.device,
        new.driver,
        new.memory_bytes.map(|bytes| bytes as i64),
        new.libtorch,
        env!("CARGO_PKG_VERSION"),
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Records a sign of life; `answered` means that the engine gave one too. A draining worker stays so until it stops.
pub async fn seen(
    conn: &mut PgConnection,
    id: Uuid,
    state: WorkerState,
    answered: bool,
) -> Result<(), DbError> {
    let changed = sqlx::query!(
        r#"
        UPDATE worker
        SET state = CASE WHEN state = 'draining' AND $2 <> 'stopped' THEN state ELSE $2 END,
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

/// The outcome of asking a worker to drain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drain {
    /// The worker will claim nothing more.
    Requested,
    /// The worker has ended in this state.
    Ended(String),
}

/// Asks a worker to finish its job and end; an idle one is woken for it. None if there is no such worker.
pub async fn drain(conn: &mut PgConnection, id: Uuid) -> Result<Option<Drain>, DbError> {
    let state = sqlx::query_scalar!(
        r#"
        UPDATE worker
        SET state = CASE WHEN state IN ('idle', 'busy') THEN 'draining' ELSE state END
        WHERE id = $1
        RETURNING state
        "#,
        id,
    )
    .fetch_optional(&mut *conn)
    .await?;
    // The worker may be waiting for work.
    tell_workers(conn).await;
    Ok(state.map(|state| match state.as_str() {
        "draining" => Drain::Requested,
        _ => Drain::Ended(state),
    }))
}

pub async fn is_draining(conn: &mut PgConnection, id: Uuid) -> Result<bool, DbError> {
    let draining = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM worker WHERE id = $1 AND state = 'draining') AS "draining!""#,
        id,
    )
    .fetch_one(conn)
    .await?;
    Ok(draining)
}

/// How a worker ended without being asked to.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Whether several starts in a row have failed. Only a worker that registers leaves this state.
    pub defunct: bool,
    pub reason: &'a str,
    /// Whether a reason that the worker stored itself stays in place of this one.
    pub unless_said: bool,
}

/// Stores how a worker ended, whether or not it had registered.
pub async fn ended(
    conn: &mut PgConnection,
    worker: &NewWorker<'_>,
    end: End<'_>,
) -> Result<(), DbError> {
    sqlx::query!(
        r#"
        INSERT INTO worker (id, host, pid, device, version, state, reason)
        VALUES ($1, $2, $3, $4, $5, CASE WHEN $6 THEN 'defunct' ELSE 'stopped' END, $7)
        ON CONFLICT (id) DO UPDATE
        SET state = CASE worker.state WHEN 'defunct' THEN 'defunct' ELSE excluded.state END,
            pid = excluded.pid,
            last_seen = now(),
            reason = CASE WHEN $8 THEN coalesce(worker.reason, excluded.reason)
                          ELSE excluded.reason END
        "#,
        worker.id,
        worker.host,
        worker.pid as i32,
        worker.device,
        env!("CARGO_PKG_VERSION"),
        end.defunct,
        end.reason,
        end.unless_said,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Whether the worker ever claimed a job.
pub async fn has_worked(conn: &mut PgConnection, id: Uuid) -> Result<bool, DbError> {
    let worked = sqlx::query_scalar!(
        r#"
        SELECT EXISTS (SELECT FROM job_attempt WHERE worker_id = $1)
            OR EXISTS (SELECT FROM job_shard WHERE worker_id = $1) AS "worked!"
        "#,
        id,
    )
    .fetch_one(conn)
    .await?;
    Ok(worked)
}

/// Workers seen within a day, newest first.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<Worker>, DbError> {
    let workers = sqlx::query_as!(
        Worker,
        r#"
        SELECT
            w.id, w.host, w.pid, w.device, w.driver, w.memory_bytes, w.libtorch, w.version, w.state,
            w.reason, w.started_at, w.last_seen, w.selftest_at,
            coalesce(j.id, (
                SELECT s.job_id FROM job_shard s WHERE s.worker_id = w.id AND s.state = 'running' LIMIT 1
            )) AS job_id,
            w.state NOT IN ('stopped', 'defunct') AND w.last_seen > now() - interval '1 minute' AS "live!"
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

/// Whether a worker that takes jobs passed its self-test, or made progress on a job, within the last minute.
pub async fn any_ready(conn: &mut PgConnection) -> Result<bool, DbError> {
    let ready = sqlx::query_scalar!(
        r#"
        SELECT EXISTS (
            SELECT FROM worker w
            LEFT JOIN job j ON j.worker_id = w.id AND j.state = 'running'
            LEFT JOIN job_shard s ON s.worker_id = w.id AND s.state = 'running'
            WHERE w.state IN ('idle', 'busy')
              AND w.last_seen > now() - interval '1 minute'
              AND greatest(w.selftest_at, j.progress_at, s.progress_at) > now() - interval '1 minute'
        ) AS "ready!"
        "#,
    )
    .fetch_one(conn)
    .await?;
    Ok(ready)
}

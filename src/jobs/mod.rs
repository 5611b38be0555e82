//! The queue, directly on Postgres: a job's row is both the public resource and the lock.
//!
//! - [`queue`]: the state machine's statements for workers ([`promptweave_domain::job`] draws it)
//! - [`requests`]: its statements for clients
//! - [`lease`]: a worker's right to a job or a shard
//! - [`shards`]: how several workers share one job
//! - `transition`: the statement by which a job leaves `running`
//! - [`plan`]: from a request to a specification
//! - [`checkpoints`]: the state of an unfinished tuning
//! - [`finish`]: the one transaction that stores a result
//! - [`events`] and [`watch`]: what happened to a job, and waiting for it
//! - [`workers`]: the known workers
//! - [`listener`]: waking idle workers

pub mod checkpoints;
pub mod cost;
pub mod events;
pub mod finish;
pub mod lease;
pub mod listener;
pub mod plan;
pub mod queue;
pub mod reaper;
mod refusals;
pub mod requests;
pub mod retention;
pub mod shards;
mod transition;
pub mod watch;
pub mod workers;

use serde::de::DeserializeOwned;
use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::db::DbError;
use promptweave_domain::composition::SourceWeight;
use promptweave_domain::digest::Digest;
use promptweave_domain::job::{EnsembleSpec, JobError, JobState, Progress};
use promptweave_domain::specification::Specification;

/// A job of one kind, as stored in its row.
#[derive(Clone, Debug)]
pub struct Job<S: Specification = EnsembleSpec> {
    pub id: Uuid,
    pub state: JobState,
    pub priority: i32,
    /// Attempts begun, of `max_attempts`.
    pub attempt: i32,
    pub max_attempts: i32,
    pub cancel_requested: bool,
    pub progress: Option<Progress>,
    /// Seconds from the start of the current phase until its numbers last changed.
    pub phase_seconds: Option<f64>,
    pub spec: S,
    pub spec_digest: Digest,
    /// The job that this one repeats, and that job's weights.
    pub replay_of: Option<Uuid>,
    pub original_weights: Option<Vec<SourceWeight>>,
    /// The result of a job that succeeded.
    pub result: Option<S::Result>,
    /// The file that the job left: an ensemble's statistics, a prediction's table.
    pub file_digest: Option<Digest>,
    /// When the file was deleted.
    pub file_deleted_at: Option<OffsetDateTime>,
    /// The error of a failed job, or of the last attempt if the job waits for another attempt.
    pub error: Option<JobError>,
    /// The earliest time at which a queued job may be claimed.
    pub run_at: OffsetDateTime,
    pub created_at: OffsetDateTime,
    pub started_at: Option<OffsetDateTime>,
    pub finished_at: Option<OffsetDateTime>,
}

pub async fn find<S: Specification>(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<Option<Job<S>>, DbError> {
    Ok(select(conn, project_id, Some(id), None, None, 1)
        .await?
        .into_iter()
        .next())
}

/// Jobs of a kind, newest first: those before `before`, in `state` if one is given.
pub async fn list<S: Specification>(
    conn: &mut PgConnection,
    project_id: Uuid,
    state: Option<JobState>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Job<S>>, DbError> {
    select(conn, project_id, None, state, before, limit).await
}

async fn select<S: Specification>(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Option<Uuid>,
    state: Option<JobState>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Job<S>>, DbError> {
    let rows = sqlx::query!(
        r#"
        SELECT
            id, state, priority, attempt, max_attempts, run_at, created_at, started_at, finished_at,
            cancel_requested_at IS NOT NULL AS "cancel_requested!",
            progress AS "progress: Json<Progress>",
            extract(epoch FROM progress_at - phase_started_at)::float8 AS phase_seconds,
            replay_of,
            (SELECT o.result->'source_weights' FROM job o WHERE o.id = job.replay_of)
                AS "original_weights: Json<Vec<SourceWeight>>",
            spec,
            spec_digest,
            result,
            file_digest, file_deleted_at,
            error AS "error: Json<JobError>"
        FROM job
        WHERE project_id = $1
          AND kind = $2
          AND ($3::uuid IS NULL OR id = $3)
          AND ($4::text IS NULL OR state = $4)
          AND ($5::uuid IS NULL OR id < $5)
        -- Ids are made in the order of time.
        ORDER BY id DESC
        LIMIT $6
        "#,
        project_id,
        S::KIND,
        id,
        state.map(JobState::name),
        before,
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Job {
                id: row.id,
                state: JobState::from_name(&row.state)
                    .ok_or_else(|| DbError::unreadable("job", "state", &row.state))?,
                priority: row.priority,
                attempt: row.attempt,
                max_attempts: row.max_attempts,
                cancel_requested: row.cancel_requested,
                progress: row.progress.map(|json| json.0),
                phase_seconds: row.phase_seconds,
                replay_of: row.replay_of,
                original_weights: row.original_weights.map(|json| json.0),
                spec: read("spec", row.spec)?,
                spec_digest: read_digest("spec_digest", &row.spec_digest)?,
                result: row.result.map(|json| read("result", json)).transpose()?,
                file_digest: row
                    .file_digest
                    .map(|bytes| read_digest("file_digest", &bytes))
                    .transpose()?,
                file_deleted_at: row.file_deleted_at,
                error: row.error.map(|json| json.0),
                run_at: row.run_at,
                created_at: row.created_at,
                started_at: row.started_at,
                finished_at: row.finished_at,
            })
        })
        .collect()
}

/// Parses the JSON of a column.
fn read<T: DeserializeOwned>(column: &'static str, json: Value) -> Result<T, DbError> {
    serde_json::from_value(json).map_err(|error| DbError::unreadable("job", column, &error))
}

fn read_digest(column: &'static str, bytes: &[u8]) -> Result<Digest, DbError> {
    match bytes.try_into() {
        Ok(bytes) => Ok(Digest::from_bytes(bytes)),
        Err(_) => Err(DbError::unreadable("job", column, bytes)),
    }
}

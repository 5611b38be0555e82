//! Messages as their webhook's owner sees them, and sending one again.

use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::DbError;
use promptweave_domain::words::DeliveryState;

/// A message to one webhook.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Delivery {
    /// The message's id, which the receiver sees as `webhook-id`, the same in every try.
    pub id: Uuid,
    pub webhook_id: Uuid,
    /// The ensemble, tuning, ranking or prediction that ended; null for a test.
    pub job: Option<Uuid>,
    /// An event type, or `webhook.test`.
    #[schema(example = "ensemble.succeeded")]
    pub event_type: String,
    #[schema(value_type = DeliveryState)]
    pub state: String,
    /// Tries begun since the message was written, or since it was last asked to be sent again.
    pub attempt: i32,
    /// When the next try is due; it has no meaning once the delivery is over.
    #[serde(with = "time::serde::rfc3339")]
    pub next_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_attempt_at: Option<OffsetDateTime>,
    /// HTTP status of the receiver's answer to the last try; null if there was no answer.
    pub last_status: Option<i32>,
    pub last_error: Option<String>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
    /// The body that is sent.
    pub payload: Value,
}

pub async fn find(
    conn: &mut PgConnection,
    project_id: Uuid,
    webhook_id: Uuid,
    id: Uuid,
) -> Result<Option<Delivery>, DbError> {
    let found = select(conn, project_id, webhook_id, Some(id), None, 1).await?;
    Ok(found.into_iter().next())
}

/// A webhook's messages, newest first: those before `before`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    webhook_id: Uuid,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Delivery>, DbError> {
    select(conn, project_id, webhook_id, None, before, limit).await
}

/// Makes a message due now, with all its tries. One that is being sent stays as it is.
pub async fn redeliver(
    conn: &mut PgConnection,
    project_id: Uuid,
    webhook_id: Uuid,
    id: Uuid,
) -> Result<(), DbError> {
    sqlx::query!(
        r#"
        UPDATE webhook_delivery
        SET state       = 'pending',
            attempt     = 0,
            next_at     = now(),
            finished_at = NULL,
            lease_token = NULL,
            lease_until = NULL
        WHERE project_id = $1 AND webhook_id = $2 AND id = $3
          AND (lease_until IS NULL OR lease_until <= now())
        "#,
        project_id,
        webhook_id,
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

async fn select(
    conn: &mut PgConnection,
    project_id: Uuid,
    webhook_id: Uuid,
    id: Option<Uuid>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Delivery>, DbError> {
    let deliveries = sqlx::query_as!(
        Delivery,
        r#"
        SELECT
            id, webhook_id, job_id AS job, event_type, state, attempt, next_at, last_attempt_at,
            last_status, last_error, created_at, finished_at, payload AS "payload: Value"
        FROM webhook_delivery
        WHERE project_id = $1
          AND webhook_id = $2
          AND ($3::uuid IS NULL OR id = $3)
          AND ($4::uuid IS NULL OR id < $4)
        ORDER BY id DESC
        LIMIT $5
        "#,
        project_id,
        webhook_id,
        id,
        before,
        limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(deliveries)
}

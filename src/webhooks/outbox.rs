//! The outbox: messages are written in the transaction that makes them true, claimed by a lease, and settled under its
//! token. Time is always the database's `now()`.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::db::DbError;
use promptweave_domain::clock::{Clock as _, SystemClock, new_token};
use promptweave_domain::job::{JobError, JobState};
use promptweave_domain::specification::{Specification as _, TuningSpec};
use promptweave_domain::webhook::{TEST_EVENT, pause};
use promptweave_domain::words::DeliveryState;

/// How long a deliverer owns a message; longer than a try takes. If the deliverer dies, another gets the message.
const LEASE: Duration = Duration::from_secs(60);
/// The most messages being sent at a time to a receiver that answers.
const IN_FLIGHT: i64 = 4;
/// The most messages being sent at a time to a receiver that failed last time; the others wait until it answers.
const IN_FLIGHT_FAILING: i64 = 1;
/// How long a delivered or failed message can be read and sent again.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

// ---- Writing -------------------------------------------------------------------------------

/// A message's body: what happened to which job. The API has the rest.
#[derive(Serialize)]
struct Payload<'a, T> {
    r#type: &'a str,
    #[serde(with = "time::serde::rfc3339")]
    timestamp: OffsetDateTime,
    data: T,
}

impl<T: Serialize> Payload<'_, T> {
    fn text(&self) -> String {
        serde_json::to_string(self).expect("no map with keys that are not strings")
    }
}

#[derive(Serialize)]
struct JobEnded {
    id: Uuid,
    state: String,
    error: Option<JobError>,
    /// The composed prompt of an ensemble that succeeded.
    composed_prompt: Option<Published>,
    /// The tuned prompt of a tuning that succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    tuned: Option<Published>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    started_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    finished_at: OffsetDateTime,
    urls: Urls,
}

#[derive(Serialize)]
struct Published {
    prompt: String,
    version: i32,
}

/// Paths below the API's address, which only its clients know.
#[derive(Serialize)]
struct Urls {
    #[serde(rename = "self")]
    this: String,
    result: Option<String>,
}

/// Writes a message to each webhook that is sent this event. It is called in the transaction in which the job ends, so
/// that both happen or neither.
pub async fn ended(conn: &mut PgConnection, job_id: Uuid) -> Result<(), DbError> {
    let mut told = sqlx::query!(
        r#"
        SELECT
            w.id AS webhook_id,
            j.project_id,
            j.kind || '.' || j.state AS "event_type!",
            j.kind,
            j.state,
            j.error AS "error: Json<JobError>",
            coalesce(j.result -> 'composed_prompt', j.result -> 'tuned') ->> 'prompt' AS prompt,
            (coalesce(j.result -> 'composed_prompt', j.result -> 'tuned') ->> 'version')::integer AS version,
            j.created_at,
            j.started_at,
            j.finished_at AS "finished_at!"
        FROM job j
        JOIN webhook w
          ON w.project_id = j.project_id
         AND w.disabled_at IS NULL
         AND j.kind || '.' || j.state = ANY (w.event_types)
        WHERE j.id = $1 AND j.finished_at IS NOT NULL
        ORDER BY w.id
        -- None of them is deleted before the message is there.
        FOR KEY SHARE OF w
        "#,
        job_id,
    )
    .fetch_all(&mut *conn)
    .await?;
    let webhooks: Vec<Uuid> = told.iter().map(|row| row.webhook_id).collect();
    let Some(ended) = told.pop() else {
        return Ok(());
    };
    let this = format!("/v1/{}s/{job_id}", ended.kind);
    let published = ended.prompt.zip(ended.version);
    let published = published.map(|(prompt, version)| Published { prompt, version });
    let (composed_prompt, tuned) = match ended.kind.as_str() {
        TuningSpec::KIND => (None, published),
        _ => (published, None),
    };
    let succeeded = ended.state == JobState::Succeeded.name();
    let data = JobEnded {
        id: job_id,
        state: ended.state,
        error: ended.error.map(|json| json.0),
        urls: Urls {
            result: succeeded.then(|| format!("{this}/result")),
            this,
        },
        composed_prompt,
        tuned,
        created_at: ended.created_at,
        started_at: ended.started_at,
        finished_at: ended.finished_at,
    };
    let payload = Payload {
        r#type: &ended.event_type,
        timestamp: ended.finished_at,
        data,
    };
    let ids: Vec<Uuid> = webhooks.iter().map(|_| SystemClock.new_id()).collect();
    sqlx::query!(
        r#"
        INSERT INTO webhook_delivery (id, webhook_id, project_id, job_id, event_type, payload)
        SELECT id, webhook_id, $3, $4, $5, $6::text::json
        FROM unnest($1::uuid[], $2::uuid[]) AS told (id, webhook_id)
        "#,
        &ids,
        &webhooks,
        ended.project_id,
        job_id,
        ended.event_type,
        payload.text(),
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Writes a test message; false if there is no such webhook.
pub async fn test(
    conn: &mut PgConnection,
    project_id: Uuid,
    webhook_id: Uuid,
    id: Uuid,
) -> Result<bool, DbError> {
    let now = sqlx::query_scalar!(r#"SELECT now() AS "now!""#)
        .fetch_one(&mut *conn)
        .await?;
    let payload = Payload {
        r#type: TEST_EVENT,
        timestamp: now,
        data: json!({"webhook": webhook_id}),
    };
    let written = sqlx::query!(
        r#"
        INSERT INTO webhook_delivery (id, webhook_id, project_id, event_type, payload)
        SELECT $1, id, project_id, $4, $5::text::json
        FROM webhook WHERE project_id = $2 AND id = $3
        FOR KEY SHARE
        "#,
        id,
        project_id,
        webhook_id,
        TEST_EVENT,
        payload.text(),
    )
    .execute(conn)
    .await?;
    Ok(written.rows_affected() == 1)
}

// ---- Sending -------------------------------------------------------------------------------

/// Kinds of receivers. Those that failed last time are served apart, so that they delay only one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receivers {
    Answering,
    Failing,
}

/// A message to send now, claimed under a token.
#[derive(Clone, Debug)]
pub struct Claimed {
    pub id: Uuid,
    pub token: Uuid,
    /// The number of this try.
    pub attempt: i32,
    pub webhook_id: Uuid,
    pub url: String,
    pub secret: String,
    pub payload: String,
    /// The current time, in seconds since 1970.
    pub timestamp: i64,
}

/// Claims messages that are due: at most `limit`, and from each webhook no more than may be sent at a time.
pub async fn claim(
    conn: &mut PgConnection,
    receivers: Receivers,
    limit: usize,
) -> Result<Vec<Claimed>, DbError> {
    let failing = receivers == Receivers::Failing;
    let token = new_token();
    let claimed = sqlx::query_as!(
        Claimed,
        r#"
        WITH due AS (
            SELECT d.id, w.url, w.secret
            FROM webhook w
            CROSS JOIN LATERAL (
                SELECT id, next_at
                FROM webhook_delivery
                WHERE webhook_id = w.id
                  AND state = 'pending'
                  AND next_at <= now()
                  AND (lease_until IS NULL OR lease_until <= now())
                ORDER BY next_at, id
                LIMIT greatest(0, $4 - (
                    SELECT count(*)
                    FROM webhook_delivery
                    WHERE webhook_id = w.id AND state = 'pending' AND lease_until > now()
                ))
                FOR UPDATE SKIP LOCKED
            ) d
            WHERE w.disabled_at IS NULL AND (w.failing_since IS NOT NULL) = $2
            ORDER BY d.next_at, d.id
            LIMIT $3
        )
        UPDATE webhook_delivery
        SET attempt         = attempt + 1,
            lease_token     = $1,
            lease_until     = now() + make_interval(secs => $5),
            last_attempt_at = now()
        FROM due
        WHERE webhook_delivery.id = due.id
        RETURNING
            webhook_delivery.id,
            lease_token AS "token!",
            attempt,
            webhook_id,
            due.url,
            due.secret,
            payload::text AS "payload!",
            extract(epoch FROM now())::bigint AS "timestamp!"
        "#,
        token,
        failing,
        limit as i64,
        if failing {
            IN_FLIGHT_FAILING
        } else {
            IN_FLIGHT
        },
        LEASE.as_secs_f64(),
    )
    .fetch_all(conn)
    .await?;
    Ok(claimed)
}

/// How a try ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Delivered {
        status: u16,
    },
    Failed {
        status: Option<u16>,
        error: String,
        /// Whether the receiver wants no more messages, ever.
        gone: bool,
    },
    /// The try was interrupted, which is not the receiver's fault and does not count.
    BrokenOff,
}

/// Records how a try ended, and returns whether there will be another. None if another process owns the message by now,
/// or it was deleted.
pub async fn settle(
    conn: &mut PgConnection,
    claimed: &Claimed,
    outcome: &Outcome,
) -> Result<Option<bool>, DbError> {
    let (state, after, status, error) = match outcome {
        Outcome::Delivered { status } => (DeliveryState::Delivered, None, Some(*status), None),
        Outcome::Failed {
            status,
            error,
            gone,
        } => {
            let after = pause(claimed.attempt).filter(|_| !gone);
            let state = match after {
                Some(_) => DeliveryState::Pending,
                None => DeliveryState::Failed,
            };
            (state, after, *status, Some(error))
        }
        Outcome::BrokenOff => (DeliveryState::Pending, None, None, None),
    };
    let broken_off = *outcome == Outcome::BrokenOff;
    let changed = sqlx::query!(
        r#"
        UPDATE webhook_delivery
        SET state       = $3,
            next_at     = CASE WHEN $4::float8 IS NULL THEN next_at ELSE now() + make_interval(secs => $4) END,
            finished_at = CASE WHEN $3 = 'pending' THEN NULL ELSE now() END,
            attempt     = attempt - $5,
            last_status = CASE WHEN $5 = 1 THEN last_status ELSE $6 END,
            last_error  = CASE WHEN $5 = 1 THEN last_error ELSE $7 END,
            lease_token = NULL,
            lease_until = NULL
        WHERE id = $1 AND lease_token = $2
        "#,
        claimed.id,
        claimed.token,
        state.name(),
        after.map(|pause| pause.as_secs_f64()),
        i32::from(broken_off),
        status.map(i32::from),
        error,
    )
    .execute(&mut *conn)
    .await?;
    if changed.rows_affected() == 0 {
        return Ok(None);
    }
    if !broken_off {
        // This is a separate statement, because deleting a webhook takes these locks in the other order.
        let delivered = matches!(outcome, Outcome::Delivered { .. });
        let gone = matches!(outcome, Outcome::Failed { gone: true, .. });
        sqlx::query!(
            r#"
            UPDATE webhook
            SET failing_since = CASE WHEN $2 THEN NULL ELSE coalesce(failing_since, now()) END,
                disabled_at   = CASE WHEN $3 THEN coalesce(disabled_at, now()) ELSE disabled_at END
            WHERE id = $1 AND ((failing_since IS NOT NULL) = $2 OR $3)
            "#,
            claimed.webhook_id,
            delivered,
            gone,
        )
        .execute(conn)
        .await?;
    }
    Ok(Some(state == DeliveryState::Pending))
}

/// Deletes messages that were delivered or failed long ago; returns how many.
pub async fn forget(conn: &mut PgConnection) -> Result<u64, DbError> {
    let forgotten = sqlx::query!(
        r#"
        DELETE FROM webhook_delivery
        WHERE state <> 'pending' AND finished_at < now() - make_interval(secs => $1)
        "#,
        KEPT.as_secs_f64(),
    )
    .execute(conn)
    .await?;
    Ok(forgotten.rows_affected())
}

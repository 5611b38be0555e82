//! The receivers: a project's webhooks.

use std::collections::BTreeSet;

use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::{DbError, expect_one_row};
use promptweave_domain::webhook::{EventType, EventTypes, WebhookSecret, WebhookUrl};

/// The most webhooks of a project. Each job's end writes a row for every one.
pub const MOST: i64 = 100;

/// The settings that a webhook's owner decides, and may change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub url: WebhookUrl,
    #[serde(default)]
    pub description: String,
    #[serde(default)]
    pub event_types: EventTypes,
    /// Whether the webhook is disabled: no message is written for it or sent to it.
    #[serde(default)]
    pub disabled: bool,
}

/// A webhook without its secret, which is shown only once.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Webhook {
    pub id: Uuid,
    #[schema(value_type = String, example = "https://receiver.example/promptweave")]
    pub url: WebhookUrl,
    pub description: String,
    #[schema(value_type = Vec<EventType>)]
    pub event_types: EventTypes,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// Since when every message has failed; null if the last one arrived, or none was sent.
    #[serde(with = "time::serde::rfc3339::option")]
    pub failing_since: Option<OffsetDateTime>,
    /// Since when nothing is sent, because somebody disabled the webhook or its receiver answered 410.
    #[serde(with = "time::serde::rfc3339::option")]
    pub disabled_at: Option<OffsetDateTime>,
}

impl From<Webhook> for Settings {
    fn from(webhook: Webhook) -> Self {
        Self {
            url: webhook.url,
            description: webhook.description,
            event_types: webhook.event_types,
            disabled: webhook.disabled_at.is_some(),
        }
    }
}

/// Registers a webhook; false if the project has as many as it may.
pub async fn insert(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
    settings: &Settings,
    secret: &WebhookSecret,
) -> Result<bool, DbError> {
    let secret = secret.text();
    let inserted = sqlx::query!(
        r#"
        INSERT INTO webhook (id, project_id, url, description, event_types, secret)
        SELECT $1, $2, $3, $4, $5, $6
        WHERE (SELECT count(*) FROM webhook WHERE project_id = $2) < $7
        "#,
        id,
        project_id,
        settings.url.url().as_str(),
        settings.description,
        &settings.event_types.names(),
        secret.expose_secret(),
        MOST,
    )
    .execute(conn)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

pub async fn find(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<Option<Webhook>, DbError> {
    let found = select(conn, project_id, Some(id), None, 1).await?;
    Ok(found.into_iter().next())
}

/// A project's webhooks, newest first: those before `before`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Webhook>, DbError> {
    select(conn, project_id, None, before, limit).await
}

/// Locks a webhook against changes until the transaction ends; writing to its outbox is still possible.
pub async fn lock(conn: &mut PgConnection, project_id: Uuid, id: Uuid) -> Result<(), DbError> {
    sqlx::query!(
        r#"SELECT id FROM webhook WHERE project_id = $1 AND id = $2 FOR NO KEY UPDATE"#,
        project_id,
        id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(())
}

/// Changes a webhook, which the caller has locked ([`lock`]). Enabling it means that its receiver works again.
pub async fn change(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
    settings: &Settings,
) -> Result<(), DbError> {
    let changed = sqlx::query!(
        r#"
        UPDATE webhook
        SET url           = $3,
            description   = $4,
            event_types   = $5,
            disabled_at   = CASE WHEN $6 THEN coalesce(disabled_at, now()) END,
            failing_since = CASE WHEN disabled_at IS NOT NULL AND NOT $6 THEN NULL ELSE failing_since END
        WHERE project_id = $1 AND id = $2
        "#,
        project_id,
        id,
        settings.url.url().as_str(),
        settings.description,
        &settings.event_types.names(),
        settings.disabled,
    )
    .execute(conn)
    .await?;
    expect_one_row(changed)
}

/// Deletes a webhook with its deliveries; false if there is none.
pub async fn delete(conn: &mut PgConnection, project_id: Uuid, id: Uuid) -> Result<bool, DbError> {
    let deleted = sqlx::query!(
        "DELETE FROM webhook WHERE project_id = $1 AND id = $2",
        project_id,
        id,
    )
    .execute(conn)
    .await?;
    Ok(deleted.rows_affected() == 1)
}

async fn select(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Option<Uuid>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Webhook>, DbError> {
    let rows = sqlx::query!(
        r#"
        SELECT id, url, description, event_types, created_at, failing_since, disabled_at
        FROM webhook
        WHERE project_id = $1
          AND ($2::uuid IS NULL OR id = $2)
          AND ($3::uuid IS NULL OR id < $3)
        ORDER BY id DESC
        LIMIT $4
        "#,
        project_id,
        id,
        before,
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            let url = row.url.parse();
            Ok(Webhook {
                id: row.id,
                // The webhook is named by its id, because a URL may be a secret.
                url: url.map_err(|_| DbError::unreadable("webhook", "url", row.id))?,
                description: row.description,
                event_types: read_events(&row.event_types)?,
                created_at: row.created_at,
                failing_since: row.failing_since,
                disabled_at: row.disabled_at,
            })
        })
        .collect()
}

fn read_events(names: &[String]) -> Result<EventTypes, DbError> {
    let events = names.iter().map(|name| EventType::from_name(name));
    let events = events.collect::<Option<BTreeSet<_>>>();
    events
        .and_then(|events| events.try_into().ok())
        .ok_or_else(|| DbError::unreadable("webhook", "event_types", names))
}

//! Clients' API keys: the project and the scopes of each.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::DbError;
use crate::registry::{RegistryError, read_name};
use promptweave_domain::api_key::{ApiKey, KeyName, Scope, Scopes};
use promptweave_domain::reference::ResourceName;

/// A key without its secret, which only its owner has.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StoredKey {
    pub id: Uuid,
    /// The beginning of the key, by which its owner recognises it.
    #[schema(example = "pr_019305d6c1a07c3a8f5e2b7d94c60a11")]
    pub prefix: String,
    /// What the key is for.
    #[schema(example = "continuous integration")]
    pub name: String,
    #[schema(value_type = String, example = "default")]
    pub project: ResourceName,
    #[schema(value_type = Vec<Scope>)]
    pub scopes: Scopes,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When the key was last used, to the minute; null if never.
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_used_at: Option<OffsetDateTime>,
    /// When the key was revoked.
    #[serde(with = "time::serde::rfc3339::option")]
    pub revoked_at: Option<OffsetDateTime>,
}

/// The rights of an accepted key.
#[derive(Clone, Debug)]
pub struct Grant {
    pub key_id: Uuid,
    pub project_id: Uuid,
    pub scopes: Scopes,
}

/// Stores what is needed to recognise `key`, and nothing that would open anything.
pub async fn insert(
    conn: &mut PgConnection,
    project_id: Uuid,
    key: &ApiKey,
    name: &KeyName,
    scopes: &Scopes,
) -> Result<(), RegistryError> {
    let secret_sha256 = key.secret_sha256();
    let names: Vec<String> = scopes.iter().map(ToString::to_string).collect();
    sqlx::query!(
        r#"
        INSERT INTO api_key (id, project_id, name, secret_sha256, scopes)
        VALUES ($1, $2, $3, $4, $5)
        "#,
        key.id(),
        project_id,
        name.as_str(),
        &secret_sha256[..],
        &names,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The rights of `key`, unless it is unknown or revoked. Records the use, at most once a minute.
pub async fn authenticate(
    conn: &mut PgConnection,
    key: &ApiKey,
) -> Result<Option<Grant>, RegistryError> {
    let row = sqlx::query!(
        r#"
        SELECT
            project_id,
            secret_sha256,
            scopes,
            (last_used_at IS NULL OR last_used_at < now() - interval '1 minute') AS "note_use!"
        FROM api_key
        WHERE id = $1 AND revoked_at IS NULL
        "#,
        key.id(),
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row.filter(|row| key.matches(&row.secret_sha256)) else {
        return Ok(None);
    };
    if row.note_use {
        // Of many requests at once, only one writes this.
        sqlx::query!(
            r#"
            UPDATE api_key
            SET last_used_at = now()
            WHERE id = $1
              AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')
            "#,
            key.id(),
        )
        .execute(conn)
        .await?;
    }
    Ok(Some(Grant {
        key_id: key.id(),
        project_id: row.project_id,
        scopes: read_scopes(&row.scopes)?,
    }))
}

pub async fn find(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<Option<StoredKey>, RegistryError> {
    let found = select_keys(conn, project_id, Some(id), None, 1).await?;
    Ok(found.into_iter().next())
}

/// A project's keys, newest first: those before `before`, with revoked ones.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<StoredKey>, RegistryError> {
    select_keys(conn, project_id, None, before, limit).await
}

/// Revokes a key permanently; false if there is no such key.
pub async fn revoke(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<bool, RegistryError> {
    let revoked = sqlx::query!(
        r#"
        UPDATE api_key
        SET revoked_at = coalesce(revoked_at, now())
        WHERE project_id = $1 AND id = $2
        "#,
        project_id,
        id,
    )
    .execute(conn)
    .await?;
    Ok(revoked.rows_affected() == 1)
}

async fn select_keys(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Option<Uuid>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<StoredKey>, RegistryError> {
    let rows = sqlx::query!(
        r#"
        SELECT
            k.id,
            k.name,
            p.name AS project,
            k.scopes,
            k.created_at,
            k.last_used_at,
            k.revoked_at
        FROM api_key k
        JOIN project p ON p.id = k.project_id
        WHERE k.project_id = $1
          AND ($2::uuid IS NULL OR k.id = $2)
          AND ($3::uuid IS NULL OR k.id < $3)
        ORDER BY k.id DESC
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
            Ok(StoredKey {
                id: row.id,
                prefix: ApiKey::prefix(row.id),
                name: row.name,
                project: read_name("project", row.project)?,
                scopes: read_scopes(&row.scopes)?,
                created_at: row.created_at,
                last_used_at: row.last_used_at,
                revoked_at: row.revoked_at,
            })
        })
        .collect()
}

fn read_scopes(names: &[String]) -> Result<Scopes, DbError> {
    names
        .iter()
        .map(|name| name.parse())
        .collect::<Result<_, _>>()
        .map_err(|_| DbError::unreadable("api_key", "scopes", names))
}

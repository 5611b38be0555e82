//! Aliases: movable names of a prompt's versions, and the history of who moved them.
//!
//! A change of an alias locks its prompt's row first ([`prompts::lock`]), so that what was read before the change is
//! still true when it is made.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::{DbError, OnConstraint, expect_one_row};
use crate::registry::prompts;
use crate::registry::prompts::Prompt;
use crate::registry::{RegistryError, read_digest};
use promptweave_domain::digest::Digest;
use promptweave_domain::reference::{AliasName, ResourceName};
use promptweave_domain::words::AliasEventKind;

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Alias {
    #[schema(value_type = String, example = "dtd")]
    pub prompt: ResourceName,
    #[schema(value_type = String, example = "production")]
    pub alias: AliasName,
    /// The version that the alias points to.
    pub version: i32,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// While this is true, the alias is neither moved nor deleted.
    pub protected: bool,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
    /// Number of the alias's last event.
    #[serde(skip)]
    pub seq: i32,
}

/// A change of an alias, and the request that made it.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct AliasEvent {
    /// Counted from 1, and on across a deletion.
    pub seq: i32,
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    #[schema(value_type = AliasEventKind)]
    pub kind: String,
    /// The version before; null when the alias was created.
    pub from_version: Option<i32>,
    /// The version after; null when the alias was deleted.
    pub to_version: Option<i32>,
    /// `x-request-id` of the request that made the change; it is also in the server's log.
    pub request_id: String,
    /// The API key of that request; null if the server requires none.
    pub key_id: Option<Uuid>,
}

/// The client that asks for a change.
#[derive(Clone, Debug)]
pub struct ChangedBy {
    pub request_id: String,
    pub key_id: Option<Uuid>,
}

/// The new state of an alias.
#[derive(Clone, Copy, Debug)]
pub struct NewAlias {
    pub version: i32,
    /// None leaves the protection as it is; a new alias is not protected.
    pub protected: Option<bool>,
}

/// Creates an alias, or changes `current`, and records the change. If nothing would change, nothing is written.
pub async fn set(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    alias: &AliasName,
    current: Option<&Alias>,
    new: NewAlias,
    by: &ChangedBy,
) -> Result<(), RegistryError> {
    if let Some(current) = current
        && current.protected
        && current.version != new.version
    {
        return Err(protected(prompt, current));
    }
    let was_protected = current.is_some_and(|current| current.protected);
    let mut from = current.map(|current| current.version);
    let protect = new.protected.unwrap_or(was_protected);
    let mut kinds = Vec::new();
    match from {
        None => kinds.push(AliasEventKind::Created),
        Some(from) if from != new.version => kinds.push(AliasEventKind::Moved),
        Some(_) => {}
    }
    match (was_protected, protect) {
        (false, true) => kinds.push(AliasEventKind::Protected),
        (true, false) => kinds.push(AliasEventKind::Unprotected),
        _ => {}
    }
    if kinds.is_empty() {
        return Ok(());
    }
    let mut seq = match current {
        Some(current) => current.seq,
        // A deleted alias of this name may have had events.
        None => last_seq(conn, project_id, prompt, alias).await?,
    };
    for kind in kinds {
        seq += 1;
        let event = (seq, kind, from, Some(new.version));
        record(conn, project_id, prompt, alias, event, by).await?;
        from = Some(new.version);
    }
    sqlx::query!(
        r#"
        INSERT INTO alias (project_id, prompt_id, name, version, protected, seq)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT ON CONSTRAINT alias_pkey DO UPDATE
        SET version = $4, protected = $5, seq = $6, updated_at = now()
        "#,
        project_id,
        prompt.id,
        alias.as_str(),
        new.version,
        protect,
        seq,
    )
    .execute(&mut *conn)
    .await
    .on_constraint("alias_version_fkey", || RegistryError::UnknownVersion {
        prompt: prompt.name.clone(),
        version: new.version,
    })?;
    prompts::touch(conn, project_id, prompt.id).await
}

/// Deletes an alias; its history stays.
pub async fn delete(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    current: &Alias,
    by: &ChangedBy,
) -> Result<(), RegistryError> {
    let alias = &current.alias;
    if current.protected {
        return Err(protected(prompt, current));
    }
    let deleted = sqlx::query!(
        "DELETE FROM alias WHERE project_id = $1 AND prompt_id = $2 AND name = $3",
        project_id,
        prompt.id,
        alias.as_str(),
    )
    .execute(&mut *conn)
    .await?;
    expect_one_row(deleted)?;
    let event = (
        current.seq + 1,
        AliasEventKind::Deleted,
        Some(current.version),
        None,
    );
    record(conn, project_id, prompt, alias, event, by).await?;
    prompts::touch(conn, project_id, prompt.id).await
}

fn protected(prompt: &Prompt, alias: &Alias) -> RegistryError {
    RegistryError::AliasProtected {
        prompt: prompt.name.clone(),
        alias: alias.alias.clone(),
        version: alias.version,
    }
}

async fn last_seq(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    alias: &AliasName,
) -> Result<i32, RegistryError> {
    Ok(sqlx::query_scalar!(
        r#"
        SELECT coalesce(max(seq), 0) AS "seq!"
        FROM alias_event
        WHERE project_id = $1 AND prompt_id = $2 AND alias = $3
        "#,
        project_id,
        prompt.id,
        alias.as_str(),
    )
    .fetch_one(conn)
    .await?)
}

async fn record(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    alias: &AliasName,
    (seq, kind, from, to): (i32, AliasEventKind, Option<i32>, Option<i32>),
    by: &ChangedBy,
) -> Result<(), RegistryError> {
    sqlx::query!(
        r#"
        INSERT INTO alias_event (
            project_id, prompt_id, alias, seq, kind, from_version, to_version, request_id, key_id
        )
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        "#,
        project_id,
        prompt.id,
        alias.as_str(),
        seq,
        kind.name(),
        from,
        to,
        by.request_id,
        by.key_id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub async fn find(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    alias: &AliasName,
) -> Result<Option<Alias>, RegistryError> {
    let found = select(conn, project_id, prompt, Some(alias), None, 1).await?;
    Ok(found.into_iter().next())
}

/// A prompt's aliases by name: those after `after`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    after: Option<&AliasName>,
    limit: i64,
) -> Result<Vec<Alias>, RegistryError> {
    select(conn, project_id, prompt, None, after, limit).await
}

async fn select(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    alias: Option<&AliasName>,
    after: Option<&AliasName>,
    limit: i64,
) -> Result<Vec<Alias>, RegistryError> {
    sqlx::query!(
        r#"
        SELECT a.name, a.version, v.sha256, a.protected, a.created_at, a.updated_at, a.seq
        FROM alias a
        JOIN prompt_version v USING (project_id, prompt_id, version)
        WHERE a.project_id = $1
          AND a.prompt_id = $2
          AND ($3::text IS NULL OR a.name = $3)
          AND ($4::text IS NULL OR a.name COLLATE "C" > $4)
        ORDER BY a.name COLLATE "C"
        LIMIT $5
        "#,
        project_id,
        prompt.id,
        alias.map(AliasName::as_str),
        after.map(AliasName::as_str),
        limit,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(|row| {
        Ok(Alias {
            prompt: prompt.name.clone(),
            alias: read_alias(row.name)?,
            version: row.version,
            digest: read_digest("prompt_version", "sha256", &row.sha256)?,
            protected: row.protected,
            created_at: row.created_at,
            updated_at: row.updated_at,
            seq: row.seq,
        })
    })
    .collect()
}

/// An alias's events, newest first: those before `before`.
pub async fn history(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    alias: &AliasName,
    before: Option<i32>,
    limit: i64,
) -> Result<Vec<AliasEvent>, RegistryError> {
    let events = sqlx::query_as!(
        AliasEvent,
        r#"
        SELECT seq, at, kind, from_version, to_version, request_id, key_id
        FROM alias_event
        WHERE project_id = $1
          AND prompt_id = $2
          AND alias = $3
          AND ($4::int IS NULL OR seq < $4)
        ORDER BY seq DESC
        LIMIT $5
        "#,
        project_id,
        prompt.id,
        alias.as_str(),
        before,
        limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(events)
}

fn read_alias(name: String) -> Result<AliasName, DbError> {
    name.parse()
        .map_err(|_| DbError::unreadable("alias", "name", name))
}

//! Prompt names, which versions are published under.

use std::collections::BTreeMap;

use serde::Serialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{RegistryError, read_name};
use crate::db::{DbError, OnConstraint, expect_one_row};
use crate::domain::reference::{AliasName, ResourceName};

/// A name that versions are published under.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Prompt {
    #[serde(skip)]
    pub id: Uuid,
    #[schema(value_type = String, example = "dtd")]
    pub name: ResourceName,
    pub description: String,
    pub tags: BTreeMap<String, String>,
    /// What the bare name refers to; null while there is no version that is not deprecated.
    pub newest_version: Option<i32>,
    /// The versions its aliases point to.
    #[schema(value_type = BTreeMap<String, i32>, example = json!({"production": 3}))]
    pub aliases: BTreeMap<AliasName, i32>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// Names that are paths of the API, so that no prompt hides behind them.
const RESERVED: [&str; 2] = ["compose", "import-peft"];

/// Whether a prompt may have this name.
pub fn check_name(name: &ResourceName) -> Result<(), RegistryError> {
    if RESERVED.contains(&name.as_str()) {
        return Err(RegistryError::ReservedName(name.clone()));
    }
    Ok(())
}

pub async fn create(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    description: &str,
    tags: &BTreeMap<String, String>,
) -> Result<Prompt, RegistryError> {
    check_name(name)?;
    let id = Uuid::now_v7();
    let created_at = sqlx::query_scalar!(
        r#"
        INSERT INTO prompt (id, project_id, name, description, tags)
        VALUES ($1, $2, $3, $4, $5)
        RETURNING created_at
        "#,
        id,
        project_id,
        name.as_str(),
        description,
        Json(tags) as _,
    )
    .fetch_one(conn)
    .await
    .on_constraint("prompt_name_key", || RegistryError::NameTaken {
        kind: "prompt",
        name: name.clone(),
    })?;
    Ok(Prompt {
        id,
        name: name.clone(),
        description: description.to_owned(),
        tags: tags.clone(),
        newest_version: None,
        aliases: BTreeMap::new(),
        created_at,
    })
}

/// The prompt of that name, made where there is none; for results that are published under a name
/// chosen when the job was posted.
pub async fn find_or_create(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    description: &str,
) -> Result<Prompt, RegistryError> {
    check_name(name)?;
    // Inserting first settles the race: whoever comes second waits for the first one's commit.
    sqlx::query!(
        r#"
        INSERT INTO prompt (id, project_id, name, description)
        VALUES ($1, $2, $3, $4)
        ON CONFLICT ON CONSTRAINT prompt_name_key DO NOTHING
        "#,
        Uuid::now_v7(),
        project_id,
        name.as_str(),
        description,
    )
    .execute(&mut *conn)
    .await?;
    find(conn, project_id, name)
        .await?
        .ok_or_else(|| DbError::RowCount(0).into())
}

pub async fn find(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Option<Prompt>, RegistryError> {
    let found = select_prompts(conn, project_id, Some(name), None, 1).await?;
    Ok(found.into_iter().next())
}

/// Like [`find`], and holds the prompt's row until the transaction ends: changes of one prompt are made
/// one after the other, and what was read stays true.
pub async fn lock(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Option<Prompt>, RegistryError> {
    sqlx::query!(
        "SELECT id FROM prompt WHERE project_id = $1 AND name = $2 FOR NO KEY UPDATE",
        project_id,
        name.as_str(),
    )
    .fetch_optional(&mut *conn)
    .await?;
    // Read when the row is held, not before.
    find(conn, project_id, name).await
}

/// Counts a change of what the prompt shows: its versions and aliases belong to that.
pub(super) async fn touch(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt_id: Uuid,
) -> Result<(), RegistryError> {
    let touched = sqlx::query!(
        "UPDATE prompt SET revision = revision + 1 WHERE project_id = $1 AND id = $2",
        project_id,
        prompt_id,
    )
    .execute(conn)
    .await?;
    Ok(expect_one_row(touched)?)
}

/// Prompts by name, those after `after`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    after: Option<&ResourceName>,
    limit: i64,
) -> Result<Vec<Prompt>, RegistryError> {
    select_prompts(conn, project_id, None, after, limit).await
}

async fn select_prompts(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: Option<&ResourceName>,
    after: Option<&ResourceName>,
    limit: i64,
) -> Result<Vec<Prompt>, RegistryError> {
    let rows = sqlx::query!(
        r#"
        SELECT
            p.id,
            p.name,
            p.description,
            p.tags AS "tags: Json<BTreeMap<String, String>>",
            p.created_at,
            (SELECT max(v.version)
               FROM prompt_version v
              WHERE v.project_id = p.project_id
                AND v.prompt_id = p.id
                AND v.deprecated_at IS NULL) AS newest_version,
            (SELECT coalesce(jsonb_object_agg(a.name, a.version), '{}')
               FROM alias a
              WHERE a.project_id = p.project_id
                AND a.prompt_id = p.id) AS "aliases!: Json<BTreeMap<AliasName, i32>>"
        FROM prompt p
        WHERE p.project_id = $1
          AND ($2::text IS NULL OR p.name = $2)
          AND ($3::text IS NULL OR p.name COLLATE "C" > $3)
        ORDER BY p.name COLLATE "C"
        LIMIT $4
        "#,
        project_id,
        name.map(ResourceName::as_str),
        after.map(ResourceName::as_str),
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Prompt {
                id: row.id,
                name: read_name("prompt", row.name)?,
                description: row.description,
                tags: row.tags.0,
                newest_version: row.newest_version,
                aliases: row.aliases.0,
                created_at: row.created_at,
            })
        })
        .collect()
}

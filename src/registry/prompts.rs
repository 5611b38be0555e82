//! Prompt names, which versions are published under.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::expect_one_row;
use crate::registry::{RegistryError, read_name};
use promptweave_domain::clock::new_id;
use promptweave_domain::digest::Digest;
use promptweave_domain::prompt_description::PromptDescription;
use promptweave_domain::reference::{AliasName, ResourceName};

/// A name that versions are published under.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Prompt {
    #[serde(skip)]
    pub id: Uuid,
    #[schema(value_type = String, example = "dtd")]
    pub name: ResourceName,
    pub description: String,
    pub tags: BTreeMap<String, String>,
    /// The version that the bare name means; null if every version is deprecated or there is none.
    pub newest_version: Option<i32>,
    /// The prompt's aliases and the versions that they point to.
    #[schema(value_type = BTreeMap<String, i32>, example = json!({"production": 3}))]
    pub aliases: BTreeMap<AliasName, i32>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// Counts the changes of anything that the prompt shows.
    #[serde(skip)]
    pub revision: i64,
}

/// Names that are paths of the API. A prompt with such a name could not be reached.
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
    description: &PromptDescription,
) -> Result<Prompt, RegistryError> {
    if insert(conn, project_id, name, description).await? {
        return existing(conn, project_id, name).await;
    }
    // A deleted prompt of that name is a different error.
    existing(conn, project_id, name).await?;
    Err(RegistryError::NameTaken {
        kind: "prompt",
        name: name.clone(),
    })
}

/// The prompt of that name, created if it does not exist.
pub async fn find_or_create(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    description: &str,
) -> Result<Prompt, RegistryError> {
    let description = PromptDescription {
        description: description.to_owned(),
        ..PromptDescription::default()
    };
    // Inserting first settles the race: the later request waits for the earlier one's commit.
    insert(conn, project_id, name, &description).await?;
    existing(conn, project_id, name).await
}

/// The id of the prompt of that name, created if it does not exist, and restored if it is deleted. A job uses it: its
/// result is published long after the name was chosen, and must not be lost.
pub async fn find_restore_or_create(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    description: &str,
) -> Result<Uuid, RegistryError> {
    check_name(name)?;
    let found = sqlx::query_scalar!(
        r#"
        WITH restored AS (
            UPDATE prompt SET deleted_at = NULL, revision = revision + 1
            WHERE project_id = $2 AND name = $3 AND deleted_at IS NOT NULL
        ), made AS (
            INSERT INTO prompt (id, project_id, name, description)
            VALUES ($1, $2, $3, $4)
            ON CONFLICT ON CONSTRAINT prompt_name_key DO NOTHING
            RETURNING id
        )
        SELECT id AS "id!" FROM prompt WHERE project_id = $2 AND name = $3
        UNION ALL
        SELECT id FROM made
        "#,
        new_id(),
        project_id,
        name.as_str(),
        description,
    )
    .fetch_optional(&mut *conn)
    .await?;
    match found {
        Some(id) => Ok(id),
        // Another request created it after this statement had looked.
        None => Ok(existing(conn, project_id, name).await?.id),
    }
}

/// Inserts a prompt; false if the name is taken.
async fn insert(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    description: &PromptDescription,
) -> Result<bool, RegistryError> {
    check_name(name)?;
    let inserted = sqlx::query!(
        r#"
        INSERT INTO prompt (id, project_id, name, description, tags, metadata, card)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        ON CONFLICT ON CONSTRAINT prompt_name_key DO NOTHING
        "#,
        new_id(),
        project_id,
        name.as_str(),
        description.description,
        Json(&description.tags) as _,
        Json(&description.metadata) as _,
        description.card,
    )
    .execute(conn)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

/// The prompt whose name is taken, or an error if it is deleted.
async fn existing(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Prompt, RegistryError> {
    find(conn, project_id, name)
        .await?
        .ok_or_else(|| RegistryError::PromptDeleted(name.clone()))
}

/// None if the prompt does not exist or is deleted.
pub async fn find(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Option<Prompt>, RegistryError> {
    let names = [name.to_string()];
    let found = select(conn, project_id, &names).await?;
    Ok(found.into_iter().next())
}

/// Like [`find`], if only the id is needed.
pub async fn find_id(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Option<Uuid>, RegistryError> {
    Ok(sqlx::query_scalar!(
        "SELECT id FROM prompt WHERE project_id = $1 AND name = $2 AND deleted_at IS NULL",
        project_id,
        name.as_str(),
    )
    .fetch_optional(conn)
    .await?)
}

/// Like [`find`], and locks the prompt's row until the transaction ends. Changes of one prompt are made one after the
/// other, and what was read stays true.
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
    // The prompt is read only after its row is locked.
    find(conn, project_id, name).await
}

/// Counts a change of what the prompt shows, which includes its versions and aliases.
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

/// A prompt's description, tags, metadata and model card.
pub async fn description(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
) -> Result<PromptDescription, RegistryError> {
    let row = sqlx::query!(
        r#"
        SELECT metadata AS "metadata: Json<Map<String, Value>>", card
        FROM prompt
        WHERE project_id = $1 AND id = $2
        "#,
        project_id,
        prompt.id,
    )
    .fetch_one(conn)
    .await?;
    Ok(PromptDescription {
        description: prompt.description.clone(),
        tags: prompt.tags.clone(),
        metadata: row.metadata.0,
        card: row.card,
    })
}

/// Replaces a prompt's description, tags, metadata and model card.
pub async fn describe(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
    description: &PromptDescription,
) -> Result<(), RegistryError> {
    let changed = sqlx::query!(
        r#"
        UPDATE prompt
        SET description = $3, tags = $4, metadata = $5, card = $6, revision = revision + 1
        WHERE project_id = $1 AND id = $2
        "#,
        project_id,
        prompt.id,
        description.description,
        Json(&description.tags) as _,
        Json(&description.metadata) as _,
        description.card,
    )
    .execute(conn)
    .await?;
    Ok(expect_one_row(changed)?)
}

// ---- Lists ---------------------------------------------------------------------------------

/// A filter of a list of prompts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Facet {
    /// `key` or `key=value`.
    Tag(String),
    Alias(AliasName),
    /// Prompts with a version for this backbone that is not deprecated.
    Backbone(Digest),
    /// Prompts with a version tuned on this task that is not deprecated.
    Task(String),
}

impl Facet {
    /// The facet's text, as the triggers write it.
    fn text(&self) -> String {
        match self {
            Self::Tag(tag) => format!("tag:{tag}"),
            Self::Alias(alias) => format!("alias:{alias}"),
            Self::Backbone(digest) => format!("backbone:{}", hex::encode(digest.as_bytes())),
            Self::Task(task) => format!("task:{}", task.chars().take(512).collect::<String>()),
        }
    }
}

/// Prompts with all of these facets, by name: those after `after`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    facets: &[Facet],
    after: Option<&ResourceName>,
    limit: i64,
) -> Result<Vec<Prompt>, RegistryError> {
    let mut texts: BTreeSet<_> = facets.iter().map(Facet::text).collect();
    if texts.is_empty() {
        // Every prompt has the empty facet.
        texts.insert(String::new());
    }
    let walked = rarest(conn, project_id, &texts).await?;
    texts.remove(&walked);
    let others: Vec<_> = texts.into_iter().collect();
    // One facet is walked in the order of names, and the others are looked up for each prompt.
    let names = sqlx::query_scalar!(
        r#"
        SELECT f.name
        FROM prompt_facet f
        WHERE f.project_id = $1
          AND f.facet = $2
          AND f.name > $3
          AND (cardinality($4::text[]) = 0 OR cardinality($4) = (
              SELECT count(*)
              FROM unnest($4) AS asked (facet)
              JOIN prompt_facet other
                ON other.project_id = $1 AND other.facet = asked.facet AND other.name = f.name
          ))
        ORDER BY f.name
        LIMIT $5
        "#,
        project_id,
        walked,
        after.map_or("", ResourceName::as_str),
        &others,
        limit,
    )
    .fetch_all(&mut *conn)
    .await?;
    select(conn, project_id, &names).await
}

/// The facet that the fewest prompts have; counting ends at 1,000.
async fn rarest(
    conn: &mut PgConnection,
    project_id: Uuid,
    facets: &BTreeSet<String>,
) -> Result<String, RegistryError> {
    let facets: Vec<_> = facets.iter().cloned().collect();
    if let [only] = &facets[..] {
        return Ok(only.clone());
    }
    Ok(sqlx::query_scalar!(
        r#"
        SELECT asked.facet AS "facet!"
        FROM unnest($2::text[]) AS asked (facet)
        ORDER BY (
            SELECT count(*)
            FROM (
                SELECT FROM prompt_facet f WHERE f.project_id = $1 AND f.facet = asked.facet LIMIT 1000
            ) AS some_of_them
        )
        LIMIT 1
        "#,
        project_id,
        &facets,
    )
    .fetch_one(conn)
    .await?)
}

async fn select(
    conn: &mut PgConnection,
    project_id: Uuid,
    names: &[String],
) -> Result<Vec<Prompt>, RegistryError> {
    let rows = sqlx::query!(
        r#"
        SELECT
            p.id,
            p.name,
            p.description,
            p.tags AS "tags: Json<BTreeMap<String, String>>",
            p.created_at,
            p.revision,
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
        WHERE p.project_id = $1 AND p.name = ANY($2) AND p.deleted_at IS NULL
        ORDER BY p.name COLLATE "C"
        "#,
        project_id,
        names,
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
                revision: row.revision,
            })
        })
        .collect()
}

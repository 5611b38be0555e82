//! Prompt versions: immutable, numbered within their prompt, addressed by the sha256 of their file.

use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{RegistryError, prompts, read_digest, read_name};
use crate::db::{DbError, OnConstraint};
use crate::domain::digest::Digest;
use crate::domain::prompt_file::{Origin, PromptFile, PromptMetadata};
use crate::domain::reference::{Reference, ResourceName, VersionSelector};

/// An immutable visual prompt: the facts about a file. The file is [`content`].
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PromptVersion {
    #[serde(skip)]
    pub id: Uuid,
    #[schema(value_type = String, example = "dtd")]
    pub prompt: ResourceName,
    /// Counted from 1 within the prompt.
    pub version: i32,
    /// sha256 of the file.
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// Of the file, in bytes.
    pub size: i64,
    pub origin: Origin,
    /// m, the prompt's length.
    pub num_tokens: i32,
    /// d, the prompt's width.
    pub embed_dim: i32,
    pub depth: Depth,
    /// Of the stored tensor: `f32`, `f16` or `bf16`.
    pub dtype: String,
    #[schema(value_type = Option<String>, example = "sha256:…")]
    pub backbone_digest: Option<Digest>,
    #[schema(example = "98-bicubic-imagenet")]
    pub preprocessing_id: Option<String>,
    /// Seed of the initial prompt; prompts from one seed keep their tokens in a common order.
    pub init_seed: Option<u64>,
    pub task: Option<String>,
    /// Class names of that task, in label order.
    pub classes: Option<Vec<String>>,
    /// The training record; free-form.
    pub training: Option<Value>,
    /// The ensemble that made it.
    pub produced_by_job: Option<Uuid>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// Set on versions that a bare name no longer refers to.
    #[serde(with = "time::serde::rfc3339::option")]
    pub deprecated_at: Option<OffsetDateTime>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Depth {
    /// Tokens at the input alone.
    Shallow,
    /// Tokens at every block.
    Deep,
}

/// A version to be published. What the file says and what `metadata` says agree by then.
#[derive(Clone, Copy, Debug)]
pub struct NewVersion<'a> {
    pub prompt_id: Uuid,
    pub bytes: &'a [u8],
    /// `bytes`, read and checked.
    pub file: &'a PromptFile,
    /// The file's own, or the request's where the file has none.
    pub metadata: &'a PromptMetadata,
    pub produced_by_job: Option<Uuid>,
    /// What it was composed of.
    pub parents: &'a [Parent],
}

#[derive(Clone, Copy, Debug)]
pub struct Parent {
    /// [`PromptVersion::id`].
    pub version_id: Uuid,
    /// α, in 0..=1.
    pub weight: f64,
}

/// Publishes a version. The same bytes in the same prompt are the same version: then the existing
/// one is returned, with `false` for "created", and nothing is written.
pub async fn insert(
    conn: &mut PgConnection,
    project_id: Uuid,
    new: NewVersion<'_>,
) -> Result<(PromptVersion, bool), RegistryError> {
    let digest = Digest::of(new.bytes);
    // The prompt's row is locked until the transaction ends, so versions are numbered one by one.
    let prompt = sqlx::query!(
        "SELECT name, deleted_at FROM prompt WHERE project_id = $1 AND id = $2 FOR NO KEY UPDATE",
        project_id,
        new.prompt_id,
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or(DbError::RowCount(0))?;
    let name = read_name("prompt", prompt.name)?;
    if prompt.deleted_at.is_some() {
        return Err(RegistryError::PromptDeleted(name));
    }
    let reference = Reference {
        name,
        version: VersionSelector::Digest(digest),
    };
    if let Some(existing) = resolve(conn, project_id, &reference).await? {
        return Ok((existing, false));
    }
    sqlx::query!(
        "INSERT INTO blob (sha256, bytes) VALUES ($1, $2) ON CONFLICT (sha256) DO NOTHING",
        digest.as_bytes(),
        new.bytes,
    )
    .execute(&mut *conn)
    .await?;
    let id = Uuid::now_v7();
    let depth = match new.file.deep_prompt_embeddings {
        None => Depth::Shallow,
        Some(_) => Depth::Deep,
    };
    sqlx::query!(
        r#"
        INSERT INTO prompt_version (
            id, project_id, prompt_id, version, sha256, origin, num_tokens, embed_dim, depth,
            dtype, backbone_digest, preprocessing_id, init_seed, task, classes, training,
            produced_by_job
        )
        SELECT $1, $2, $3, coalesce(max(version), 0) + 1, $4, $5, $6, $7, $8,
               $9, $10, $11, $12::text::numeric, $13, $14, $15,
               $16
        FROM prompt_version
        WHERE project_id = $2 AND prompt_id = $3
        "#,
        id,
        project_id,
        new.prompt_id,
        digest.as_bytes(),
        origin_name(new.metadata.origin),
        new.file.num_tokens() as i32,
        new.file.embed_dim() as i32,
        depth.name(),
        new.file.dtype,
        new.metadata
            .backbone_digest
            .as_ref()
            .map(|d| d.as_bytes() as &[u8]),
        new.metadata.preprocessing_id.as_deref(),
        new.metadata.init_seed.map(|seed| seed.to_string()),
        new.metadata.task.as_deref(),
        new.metadata.classes.as_ref().map(Json) as _,
        new.metadata.training.as_ref(),
        new.produced_by_job,
    )
    .execute(&mut *conn)
    .await
    .on_constraint("prompt_version_produced_by_job_key", || {
        RegistryError::AlreadyProduced(new.produced_by_job.unwrap_or_default())
    })?;
    for parent in new.parents {
        sqlx::query!(
            "INSERT INTO lineage (project_id, child, parent, weight, role)
             VALUES ($1, $2, $3, $4, 'source')",
            project_id,
            id,
            parent.version_id,
            parent.weight,
        )
        .execute(&mut *conn)
        .await?;
    }
    prompts::touch(conn, project_id, new.prompt_id).await?;
    let version = resolve(conn, project_id, &reference).await?;
    Ok((version.ok_or(DbError::RowCount(0))?, true))
}

/// The version a reference means.
pub async fn resolve(
    conn: &mut PgConnection,
    project_id: Uuid,
    reference: &Reference,
) -> Result<Option<PromptVersion>, RegistryError> {
    let found = select_versions(
        conn,
        project_id,
        &reference.name,
        Some(&reference.version),
        None,
        1,
    );
    Ok(found.await?.into_iter().next())
}

/// Versions of a prompt, newest first, those before `before`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    before: Option<i32>,
    limit: i64,
) -> Result<Vec<PromptVersion>, RegistryError> {
    select_versions(conn, project_id, name, None, before, limit).await
}

/// The bytes of a prompt file.
pub async fn content(
    conn: &mut PgConnection,
    digest: &Digest,
) -> Result<Option<Vec<u8>>, RegistryError> {
    Ok(sqlx::query_scalar!(
        "SELECT bytes FROM blob WHERE sha256 = $1",
        digest.as_bytes()
    )
    .fetch_optional(conn)
    .await?)
}

/// Hides a version from its bare name, or shows it again; what is so already stays as it was.
pub async fn set_deprecated(
    conn: &mut PgConnection,
    project_id: Uuid,
    version: &PromptVersion,
    deprecated: bool,
) -> Result<(), RegistryError> {
    let prompt_id = sqlx::query_scalar!(
        r#"
        UPDATE prompt_version
        SET deprecated_at = CASE WHEN $3 THEN now() END
        WHERE project_id = $1 AND id = $2 AND (deprecated_at IS NOT NULL) <> $3
        RETURNING prompt_id
        "#,
        project_id,
        version.id,
        deprecated,
    )
    .fetch_optional(&mut *conn)
    .await?;
    match prompt_id {
        Some(prompt_id) => prompts::touch(conn, project_id, prompt_id).await,
        None => Ok(()),
    }
}

/// `selector: None` is every version, deprecated or not.
async fn select_versions(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    selector: Option<&VersionSelector>,
    before: Option<i32>,
    limit: i64,
) -> Result<Vec<PromptVersion>, RegistryError> {
    let (mut number, mut alias, mut digest) = (None, None, None);
    match selector {
        Some(VersionSelector::Number(n)) => number = Some(*n),
        Some(VersionSelector::Alias(name)) => alias = Some(name.as_str()),
        Some(VersionSelector::Digest(d)) => digest = Some(d.as_bytes() as &[u8]),
        Some(VersionSelector::Newest) | None => {}
    }
    let rows = sqlx::query_as!(
        VersionRow,
        r#"
        SELECT
            v.id,
            p.name,
            v.version,
            v.sha256,
            b.size AS "size!",
            v.origin,
            v.num_tokens,
            v.embed_dim,
            v.depth,
            v.dtype,
            v.backbone_digest,
            v.preprocessing_id,
            v.init_seed::text AS init_seed,
            v.task,
            v.classes AS "classes: Json<Vec<String>>",
            v.training,
            v.produced_by_job,
            v.created_at,
            v.deprecated_at
        FROM prompt p
        JOIN prompt_version v ON v.project_id = p.project_id AND v.prompt_id = p.id
        JOIN blob b ON b.sha256 = v.sha256
        WHERE p.project_id = $1
          AND p.name = $2
          AND p.deleted_at IS NULL
          AND ($3::int IS NULL OR v.version = $3)
          AND ($4::bytea IS NULL OR v.sha256 = $4)
          AND ($5::text IS NULL OR v.version = (
              SELECT a.version
              FROM alias a
              WHERE a.project_id = p.project_id AND a.prompt_id = p.id AND a.name = $5
          ))
          AND ($6 OR v.deprecated_at IS NULL)
          AND ($7::int IS NULL OR v.version < $7)
        ORDER BY v.version DESC
        LIMIT $8
        "#,
        project_id,
        name.as_str(),
        number,
        digest,
        alias,
        selector != Some(&VersionSelector::Newest),
        before,
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| Ok(PromptVersion::try_from(row)?))
        .collect()
}

struct VersionRow {
    id: Uuid,
    name: String,
    version: i32,
    sha256: Vec<u8>,
    size: i64,
    origin: String,
    num_tokens: i32,
    embed_dim: i32,
    depth: String,
    dtype: String,
    backbone_digest: Option<Vec<u8>>,
    preprocessing_id: Option<String>,
    init_seed: Option<String>,
    task: Option<String>,
    classes: Option<Json<Vec<String>>>,
    training: Option<Value>,
    produced_by_job: Option<Uuid>,
    created_at: OffsetDateTime,
    deprecated_at: Option<OffsetDateTime>,
}

impl TryFrom<VersionRow> for PromptVersion {
    type Error = DbError;

    fn try_from(row: VersionRow) -> Result<Self, DbError> {
        const TABLE: &str = "prompt_version";
        Ok(Self {
            id: row.id,
            prompt: read_name("prompt", row.name)?,
            version: row.version,
            digest: read_digest(TABLE, "sha256", &row.sha256)?,
            size: row.size,
            origin: match row.origin.as_str() {
                "uploaded" => Origin::Uploaded,
                "tuned" => Origin::Tuned,
                "composed" => Origin::Composed,
                other => return Err(DbError::unreadable(TABLE, "origin", other)),
            },
            num_tokens: row.num_tokens,
            embed_dim: row.embed_dim,
            depth: match row.depth.as_str() {
                "shallow" => Depth::Shallow,
                "deep" => Depth::Deep,
                other => return Err(DbError::unreadable(TABLE, "depth", other)),
            },
            dtype: row.dtype,
            backbone_digest: row
                .backbone_digest
                .map(|bytes| read_digest(TABLE, "backbone_digest", &bytes))
                .transpose()?,
            preprocessing_id: row.preprocessing_id,
            init_seed: match row.init_seed {
                None => None,
                Some(text) => match text.parse() {
                    Ok(seed) => Some(seed),
                    Err(_) => return Err(DbError::unreadable(TABLE, "init_seed", text)),
                },
            },
            task: row.task,
            classes: row.classes.map(|json| json.0),
            training: row.training,
            produced_by_job: row.produced_by_job,
            created_at: row.created_at,
            deprecated_at: row.deprecated_at,
        })
    }
}

impl Depth {
    fn name(self) -> &'static str {
        match self {
            Self::Shallow => "shallow",
            Self::Deep => "deep",
        }
    }
}

fn origin_name(origin: Origin) -> &'static str {
    match origin {
        Origin::Uploaded => "uploaded",
        Origin::Tuned => "tuned",
        Origin::Composed => "composed",
    }
}

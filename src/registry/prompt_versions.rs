//! Prompt versions: immutable, numbered within their prompt, addressed by the sha256 of their file.

use std::ops::RangeInclusive;

use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::{DbError, OnConstraint};
use crate::registry::lineage::Role;
use crate::registry::{RegistryError, prompts, read_digest, read_name};
use promptweave_domain::clock::new_id;
use promptweave_domain::compatibility::PromptFacts;
use promptweave_domain::digest::Digest;
use promptweave_domain::ensemble_file::EnsembleFile;
use promptweave_domain::prompt_file::{Origin, PromptFile, PromptMetadata};
use promptweave_domain::reference::{AliasName, Reference, ResourceName, VersionSelector};
use promptweave_domain::words::PromptDtype;

/// An immutable visual prompt or ensemble of prompts: the facts about a file. The file is [`content`].
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
    /// Size of the file in bytes.
    pub size: i64,
    pub origin: Origin,
    pub kind: VersionKind,
    /// m, the prompt's length; null for an ensemble.
    pub num_tokens: Option<i32>,
    /// d, the width of the prompt, or of all an ensemble's prompts.
    pub embed_dim: i32,
    /// Null for an ensemble.
    pub depth: Option<Depth>,
    /// Data type of the stored tensor; null for an ensemble.
    #[schema(value_type = Option<PromptDtype>)]
    pub dtype: Option<String>,
    /// Forward passes of the backbone that an ensemble takes for each image; null for a prompt.
    #[schema(minimum = 1)]
    pub num_members: Option<i32>,
    #[schema(value_type = Option<String>, example = "sha256:…")]
    pub backbone_digest: Option<Digest>,
    #[schema(example = "98-bicubic-imagenet")]
    pub preprocessing_id: Option<String>,
    /// Seed of the initial prompt. Prompts from the same seed keep their tokens in a common order.
    pub init_seed: Option<u64>,
    pub task: Option<String>,
    /// Class names of the task, in label order.
    pub classes: Option<Vec<String>>,
    /// The training record, any JSON.
    pub training: Option<Value>,
    /// The ensemble or tuning that made the version.
    pub produced_by_job: Option<Uuid>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When the version was deprecated: a bare name no longer means it.
    #[serde(with = "time::serde::rfc3339::option")]
    pub deprecated_at: Option<OffsetDateTime>,
}

impl PromptVersion {
    /// The facts that decide what the prompt goes together with. An ensemble has no tokens of its own.
    pub fn facts(&self) -> PromptFacts<'_> {
        PromptFacts {
            name: format!("{}:{}", self.prompt, self.version),
            digest: self.digest,
            num_tokens: self.num_tokens.unwrap_or(0) as usize,
            embed_dim: self.embed_dim as usize,
            deep: self.depth == Some(Depth::Deep),
            backbone_digest: self.backbone_digest,
            preprocessing_id: self.preprocessing_id.as_deref(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VersionKind {
    /// One prompt, which may have a head.
    Prompt,
    /// Several prompts with heads, which predict together.
    Ensemble,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Depth {
    /// The prompt has tokens at the input only.
    Shallow,
    /// The prompt has tokens at every block.
    Deep,
}

/// A version to publish. The file and `metadata` were checked to agree.
#[derive(Clone, Copy, Debug)]
pub struct NewVersion<'a> {
    pub prompt_id: Uuid,
    pub bytes: &'a [u8],
    /// The parsed `bytes`.
    pub file: VersionFile<'a>,
    pub produced_by_job: Option<Uuid>,
    /// The versions that this one was made of.
    pub parents: &'a [Parent],
}

#[derive(Clone, Copy, Debug)]
pub enum VersionFile<'a> {
    Prompt {
        file: &'a PromptFile,
        /// The file's own metadata, or the request's if the file has none.
        metadata: &'a PromptMetadata,
    },
    Ensemble(&'a EnsembleFile),
}

#[derive(Clone, Copy, Debug)]
pub struct Parent {
    /// [`PromptVersion::id`].
    pub version_id: Uuid,
    /// α, from 0 to 1; 1 for a `start`.
    pub weight: f64,
    pub role: Role,
}

/// The outcome of a publication.
#[derive(Clone, Debug)]
pub struct Published {
    pub prompt: ResourceName,
    pub version: i32,
    /// False if the same bytes were already a version.
    pub created: bool,
}

/// Like [`publish`], but returns the whole version, and whether it was created.
pub async fn insert(
    conn: &mut PgConnection,
    project_id: Uuid,
    new: NewVersion<'_>,
) -> Result<(PromptVersion, bool), RegistryError> {
    let Published {
        prompt,
        version,
        created,
    } = publish(conn, project_id, new).await?;
    let found = select(conn, project_id, &prompt, version..=version, true, 1).await?;
    match found.into_iter().next() {
        Some(version) => Ok((version, created)),
        None => Err(RegistryError::PromptDeleted(prompt)),
    }
}

/// Publishes a version. If the prompt has a version with the same bytes, that one is returned and nothing is written.
pub async fn publish(
    conn: &mut PgConnection,
    project_id: Uuid,
    new: NewVersion<'_>,
) -> Result<Published, RegistryError> {
    let digest = Digest::of(new.bytes);
    // From here on the prompt's row is locked, so that versions are numbered one by one. By then the bytes are on their
    // way to the disk.
    let row = sqlx::query!(
        r#"
        WITH known AS (
            SELECT version FROM prompt_version WHERE project_id = $1 AND prompt_id = $2 AND sha256 = $3
        ), stored AS (
            INSERT INTO blob (sha256, bytes)
            SELECT $3, $4 WHERE NOT EXISTS (SELECT FROM known)
            -- Held, and young again, so that it is not collected before the version refers to it.
            ON CONFLICT (sha256) DO UPDATE SET created_at = now()
            RETURNING sha256
        ), held AS (
            UPDATE prompt SET revision = revision + 1
            FROM stored
            WHERE project_id = $1 AND id = $2 AND deleted_at IS NULL
            RETURNING id
        )
        SELECT
            name,
            deleted_at IS NOT NULL AS "deleted!",
            (SELECT version FROM known) AS "known?",
            EXISTS (SELECT FROM held) AS "held!"
        FROM prompt
        WHERE project_id = $1 AND id = $2
        "#,
        project_id,
        new.prompt_id,
        digest.as_bytes(),
        new.bytes,
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or(DbError::RowCount(0))?;
    let prompt = read_name("prompt", row.name)?;
    // The prompt was deleted before the statement, or while it waited for the row.
    if row.deleted || row.known.is_none() && !row.held {
        return Err(RegistryError::PromptDeleted(prompt));
    }
    if let Some(version) = row.known {
        return Ok(Published {
            prompt,
            version,
            created: false,
        });
    }
    let columns = new.file.columns();
    let parents: Vec<Uuid> = new.parents.iter().map(|it| it.version_id).collect();
    let weights: Vec<f64> = new.parents.iter().map(|it| it.weight).collect();
    let roles: Vec<String> = (new.parents.iter())
        .map(|it| it.role.name().to_owned())
        .collect();
    let version = sqlx::query_scalar!(
        r#"
        WITH made AS (
            INSERT INTO prompt_version (
                id, project_id, prompt_id, version, sha256, origin, num_tokens, embed_dim, depth,
                dtype, backbone_digest, preprocessing_id, init_seed, task, classes, training,
                produced_by_job, kind, num_members
            )
            SELECT $1, $2, $3, coalesce(max(version), 0) + 1, $4, $5, $6, $7, $8,
                   $9, $10, $11, $12::text::numeric, $13, $14, $15,
                   $16, $20, $21
            FROM prompt_version
            WHERE project_id = $2 AND prompt_id = $3
            ON CONFLICT ON CONSTRAINT prompt_version_sha256_key DO NOTHING
            RETURNING version
        ), composed_of AS (
            INSERT INTO lineage (project_id, child, parent, weight, role)
            SELECT $2, $1, parent, weight, role
            FROM made, unnest($17::uuid[], $18::double precision[], $19::text[]) AS made_of (parent, weight, role)
        )
        SELECT version FROM made
        "#,
        new_id(),
        project_id,
        new.prompt_id,
        digest.as_bytes(),
        origin_name(columns.origin),
        columns.num_tokens,
        columns.embed_dim,
        columns.depth.map(Depth::name),
        columns.dtype,
        columns.backbone_digest.map(|d| d.as_bytes() as &[u8]),
        columns.preprocessing_id,
        columns.init_seed.map(|seed| seed.to_string()),
        columns.task,
        columns.classes.map(Json) as _,
        columns.training,
        new.produced_by_job,
        &parents,
        &weights,
        &roles,
        columns.kind.name(),
        columns.num_members,
    )
    .fetch_optional(&mut *conn)
    .await
    .on_constraint("prompt_version_produced_by_job_key", || {
        RegistryError::AlreadyProduced(new.produced_by_job.unwrap_or_default())
    })?;
    if let Some(version) = version {
        return Ok(Published {
            prompt,
            version,
            created: true,
        });
    }
    // Another request published the same bytes meanwhile.
    let version = with_digest(conn, project_id, &prompt, &digest).await?;
    Ok(Published {
        prompt,
        version: version.ok_or(DbError::RowCount(0))?,
        created: false,
    })
}

/// What a file says for the columns of its version.
struct Columns<'a> {
    kind: VersionKind,
    origin: Origin,
    num_tokens: Option<i32>,
    embed_dim: i32,
    depth: Option<Depth>,
    dtype: Option<&'static str>,
    num_members: Option<i32>,
    backbone_digest: Option<&'a Digest>,
    preprocessing_id: Option<&'a str>,
    init_seed: Option<u64>,
    task: Option<&'a str>,
    classes: Option<&'a Vec<String>>,
    training: Option<&'a Value>,
}

impl<'a> VersionFile<'a> {
    fn columns(self) -> Columns<'a> {
        match self {
            Self::Prompt { file, metadata } => Columns {
                kind: VersionKind::Prompt,
                origin: metadata.origin,
                num_tokens: Some(file.num_tokens() as i32),
                embed_dim: file.embed_dim() as i32,
                depth: Some(match file.deep_prompt_embeddings {
                    None => Depth::Shallow,
                    Some(_) => Depth::Deep,
                }),
                dtype: Some(file.dtype),
                num_members: None,
                backbone_digest: metadata.backbone_digest.as_ref(),
                preprocessing_id: metadata.preprocessing_id.as_deref(),
                init_seed: metadata.init_seed,
                task: metadata.task.as_deref(),
                classes: metadata.classes.as_ref(),
                training: metadata.training.as_ref(),
            },
            Self::Ensemble(file) => Columns {
                kind: VersionKind::Ensemble,
                origin: Origin::Composed,
                num_tokens: None,
                embed_dim: file.embed_dim() as i32,
                depth: None,
                dtype: None,
                num_members: Some(file.members.len() as i32),
                backbone_digest: Some(&file.metadata.backbone_digest),
                preprocessing_id: Some(&file.metadata.preprocessing_id),
                init_seed: None,
                task: None,
                classes: Some(&file.metadata.classes),
                training: None,
            },
        }
    }
}

/// The version that a reference means.
pub async fn resolve(
    conn: &mut PgConnection,
    project_id: Uuid,
    reference: &Reference,
) -> Result<Option<PromptVersion>, RegistryError> {
    let name = &reference.name;
    let number = match &reference.version {
        VersionSelector::Newest => None,
        VersionSelector::Number(number) => Some(*number),
        VersionSelector::Alias(alias) => {
            let Some(number) = aliased(conn, project_id, name, alias).await? else {
                return Ok(None);
            };
            Some(number)
        }
        VersionSelector::Digest(digest) => {
            let Some(number) = with_digest(conn, project_id, name, digest).await? else {
                return Ok(None);
            };
            Some(number)
        }
    };
    let found = match number {
        Some(number) => select(conn, project_id, name, number..=number, true, 1).await?,
        None => select(conn, project_id, name, 1..=i32::MAX, false, 1).await?,
    };
    Ok(found.into_iter().next())
}

async fn aliased(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    alias: &AliasName,
) -> Result<Option<i32>, RegistryError> {
    Ok(sqlx::query_scalar!(
        r#"
        SELECT a.version
        FROM prompt p
        JOIN alias a ON a.project_id = p.project_id AND a.prompt_id = p.id
        WHERE p.project_id = $1 AND p.name = $2 AND a.name = $3
        "#,
        project_id,
        name.as_str(),
        alias.as_str(),
    )
    .fetch_optional(conn)
    .await?)
}

async fn with_digest(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    digest: &Digest,
) -> Result<Option<i32>, RegistryError> {
    Ok(sqlx::query_scalar!(
        r#"
        SELECT v.version
        FROM prompt p
        JOIN prompt_version v ON v.project_id = p.project_id AND v.prompt_id = p.id
        WHERE p.project_id = $1 AND p.name = $2 AND v.sha256 = $3
        "#,
        project_id,
        name.as_str(),
        digest.as_bytes(),
    )
    .fetch_optional(conn)
    .await?)
}

/// Versions of a prompt, newest first: those before `before`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    before: Option<i32>,
    limit: i64,
) -> Result<Vec<PromptVersion>, RegistryError> {
    let last = before.map_or(i32::MAX, |before| before.saturating_sub(1));
    select(conn, project_id, name, 1..=last, true, limit).await
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

/// Deprecates a version or undoes that; does nothing if the version is in that state already.
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

/// Versions with these numbers, newest first. It takes a range so that one query plan serves both a version and a list:
/// planning each time would cost more than running it.
async fn select(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    versions: RangeInclusive<i32>,
    deprecated_too: bool,
    limit: i64,
) -> Result<Vec<PromptVersion>, RegistryError> {
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
            v.kind,
            v.num_members,
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
          AND v.version BETWEEN $3 AND $4
          AND ($5 OR v.deprecated_at IS NULL)
        ORDER BY v.version DESC
        LIMIT $6
        "#,
        project_id,
        name.as_str(),
        versions.start(),
        versions.end(),
        deprecated_too,
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
    num_tokens: Option<i32>,
    embed_dim: i32,
    depth: Option<String>,
    dtype: Option<String>,
    kind: String,
    num_members: Option<i32>,
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
            kind: match row.kind.as_str() {
                "prompt" => VersionKind::Prompt,
                "ensemble" => VersionKind::Ensemble,
                other => return Err(DbError::unreadable(TABLE, "kind", other)),
            },
            num_tokens: row.num_tokens,
            embed_dim: row.embed_dim,
            depth: match row.depth.as_deref() {
                None => None,
                Some("shallow") => Some(Depth::Shallow),
                Some("deep") => Some(Depth::Deep),
                Some(other) => return Err(DbError::unreadable(TABLE, "depth", other)),
            },
            dtype: row.dtype,
            num_members: row.num_members,
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

impl VersionKind {
    fn name(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Ensemble => "ensemble",
        }
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

//! Backbones: registered from one of the operator's folders, kept in the blob store.

use std::path::Path;

use serde::Serialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::blobs::{BlobError, BlobStore, StoredBlob};
use crate::db::DbError;
use crate::registry::{RegistryError, read_digest, read_name};
use promptweave_domain::backbone::BackboneConfig;
use promptweave_domain::clock::new_id;
use promptweave_domain::compatibility::BackboneFacts;
use promptweave_domain::digest::Digest;
use promptweave_domain::reference::ResourceName;
use promptweave_formats::backbone::{Backbone, CONFIG_FILE, MODEL_FILE};

/// A frozen ViT that prompts are made for.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RegisteredBackbone {
    #[serde(skip)]
    pub id: Uuid,
    #[schema(value_type = String, example = "vit-s14")]
    pub name: ResourceName,
    /// Digest over names, shapes and f32 values of the weights, without the head.
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    #[schema(example = "98-bicubic-imagenet")]
    pub preprocessing_id: String,
    /// d, the width of the backbone's tokens and features.
    pub embed_dim: i32,
    pub config: BackboneConfig,
    /// sha256 of the registered `model.safetensors`.
    #[schema(value_type = String, example = "sha256:…")]
    pub model_digest: Digest,
    /// Size of that file in bytes.
    pub model_size: i64,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

impl RegisteredBackbone {
    /// The facts that decide which prompts fit.
    pub fn facts(&self) -> BackboneFacts<'_> {
        BackboneFacts {
            name: Some(self.name.as_str()),
            digest: self.digest,
            embed_dim: self.embed_dim as usize,
            preprocessing_id: self.preprocessing_id.clone(),
        }
    }
}

/// Registers a backbone whose model file is in the blob store. If the same backbone has this name already, it is
/// returned, with `false` for "created".
pub async fn insert(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    backbone: &Backbone,
    model: StoredBlob,
) -> Result<(RegisteredBackbone, bool), RegistryError> {
    let preprocessing_id = backbone.config.preprocessing.id();
    let inserted = sqlx::query!(
        r#"
        INSERT INTO backbone (
            id, project_id, name, digest, preprocessing_id, embed_dim, config, model_sha256,
            model_size
        )
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        ON CONFLICT DO NOTHING
        "#,
        new_id(),
        project_id,
        name.as_str(),
        backbone.digest.as_bytes(),
        preprocessing_id,
        backbone.config.embed_dim as i32,
        Json(&backbone.config) as _,
        model.digest.as_bytes(),
        model.size as i64,
    )
    .execute(&mut *conn)
    .await?
    .rows_affected();
    if let Some(found) = find(conn, project_id, name).await? {
        let same = found.digest == backbone.digest && found.config == backbone.config;
        return if same {
            Ok((found, inserted == 1))
        } else {
            Err(RegistryError::NameTaken {
                kind: "backbone",
                name: name.clone(),
            })
        };
    }
    let other = find_by_digest(conn, project_id, &backbone.digest).await?;
    let other = other
        .into_iter()
        .find(|b| b.preprocessing_id == preprocessing_id)
        .ok_or(DbError::RowCount(0))?;
    Err(RegistryError::BackboneExists(other.name))
}

pub async fn find(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Option<RegisteredBackbone>, RegistryError> {
    let found = select(conn, project_id, Some(name), None, None, 1).await?;
    Ok(found.into_iter().next())
}

/// The backbones with these weights: one per preprocessing, all of one width.
pub async fn find_by_digest(
    conn: &mut PgConnection,
    project_id: Uuid,
    digest: &Digest,
) -> Result<Vec<RegisteredBackbone>, RegistryError> {
    select(conn, project_id, None, Some(digest), None, i64::MAX).await
}

/// Backbones by name: those after `after`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    after: Option<&ResourceName>,
    limit: i64,
) -> Result<Vec<RegisteredBackbone>, RegistryError> {
    select(conn, project_id, None, None, after, limit).await
}

/// Writes the two files of a backbone folder, which [`Backbone::open`] reads, into `dir`.
pub async fn unpack(
    blobs: &BlobStore,
    backbone: &RegisteredBackbone,
    dir: &Path,
) -> Result<(), BlobError> {
    let path = dir.join(CONFIG_FILE);
    let json = serde_json::to_vec_pretty(&backbone.config).expect("plain data");
    tokio::fs::write(&path, json)
        .await
        .map_err(|source| BlobError::File { path, source })?;
    blobs
        .get_to_file(&backbone.model_digest, &dir.join(MODEL_FILE))
        .await
}

async fn select(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: Option<&ResourceName>,
    digest: Option<&Digest>,
    after: Option<&ResourceName>,
    limit: i64,
) -> Result<Vec<RegisteredBackbone>, RegistryError> {
    let rows = sqlx::query!(
        r#"
        SELECT
            id, name, digest, preprocessing_id, embed_dim,
            config AS "config: Json<BackboneConfig>",
            model_sha256, model_size, created_at
        FROM backbone
        WHERE project_id = $1
          AND ($2::text IS NULL OR name = $2)
          AND ($3::bytea IS NULL OR digest = $3)
          AND ($4::text IS NULL OR name COLLATE "C" > $4)
        ORDER BY name COLLATE "C"
        LIMIT $5
        "#,
        project_id,
        name.map(ResourceName::as_str),
        digest.map(|d| d.as_bytes() as &[u8]),
        after.map(ResourceName::as_str),
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(RegisteredBackbone {
                id: row.id,
                name: read_name("backbone", row.name)?,
                digest: read_digest("backbone", "digest", &row.digest)?,
                preprocessing_id: row.preprocessing_id,
                embed_dim: row.embed_dim,
                config: row.config.0,
                model_digest: read_digest("backbone", "model_sha256", &row.model_sha256)?,
                model_size: row.model_size,
                created_at: row.created_at,
            })
        })
        .collect()
}

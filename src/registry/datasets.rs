//! Datasets: labelled images, packed into the blob store, as numbered versions under a name.

use std::collections::BTreeMap;

use serde::Serialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::blobs::StoredBlob;
use crate::db::DbError;
pub use crate::registry::pack::{PackError, Packed, pack, pack_files, pack_parquet, unpack};
use crate::registry::{RegistryError, read_digest, read_name};
use promptweave_domain::clock::new_id;
use promptweave_domain::digest::Digest;
use promptweave_domain::reference::{Reference, ResourceName, VersionSelector};
use promptweave_domain::split::Split;

/// An immutable set of labelled images.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DatasetVersion {
    #[serde(skip)]
    pub id: Uuid,
    #[schema(value_type = String, example = "food")]
    pub name: ResourceName,
    /// Counted from 1 within the name.
    pub version: i32,
    /// sha256 of the packed images.
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// Size of the pack in bytes.
    pub size: i64,
    /// Class names in label order.
    pub classes: Vec<String>,
    /// Images of each split.
    #[schema(value_type = BTreeMap<String, u64>, example = json!({"train": 400}))]
    pub split_counts: BTreeMap<Split, u64>,
    /// Images of each split by class, in label order.
    #[schema(value_type = BTreeMap<String, Vec<u64>>, example = json!({"train": [210, 190]}))]
    pub class_counts: BTreeMap<Split, Vec<u64>>,
    /// Unreadable images that were left out (`skip_unreadable`).
    pub skipped: i32,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// A version to publish, whose pack is in the blob store.
#[derive(Clone, Debug)]
pub struct NewDatasetVersion<'a> {
    pub pack: StoredBlob,
    pub classes: &'a [String],
    pub class_counts: &'a BTreeMap<Split, Vec<u64>>,
    pub skipped: usize,
}

/// Publishes a version under a name, which is created if it does not exist. If this name has a version with the same
/// pack, that one is returned, with `false` for "created".
pub async fn insert_version(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
    new: NewDatasetVersion<'_>,
) -> Result<(DatasetVersion, bool), RegistryError> {
    sqlx::query!(
        r#"
        INSERT INTO dataset (id, project_id, name)
        VALUES ($1, $2, $3)
        ON CONFLICT ON CONSTRAINT dataset_name_key DO NOTHING
        "#,
        new_id(),
        project_id,
        name.as_str(),
    )
    .execute(&mut *conn)
    .await?;
    // Locked until the transaction ends, so versions are numbered one by one.
    let dataset_id = sqlx::query_scalar!(
        "SELECT id FROM dataset WHERE project_id = $1 AND name = $2 FOR UPDATE",
        project_id,
        name.as_str(),
    )
    .fetch_one(&mut *conn)
    .await?;
    let reference = Reference {
        name: name.clone(),
        version: VersionSelector::Digest(new.pack.digest),
    };
    if let Some(existing) = resolve(conn, project_id, &reference).await? {
        return Ok((existing, false));
    }
    sqlx::query!(
        r#"
        INSERT INTO dataset_version (
            id, project_id, dataset_id, version, digest, size, classes, class_counts, skipped
        )
        SELECT $1, $2, $3, coalesce(max(version), 0) + 1, $4, $5, $6, $7, $8
        FROM dataset_version
        WHERE project_id = $2 AND dataset_id = $3
        "#,
        new_id(),
        project_id,
        dataset_id,
        new.pack.digest.as_bytes(),
        new.pack.size as i64,
        Json(new.classes) as _,
        Json(new.class_counts) as _,
        new.skipped as i32,
    )
    .execute(&mut *conn)
    .await?;
    let version = resolve(conn, project_id, &reference).await?;
    Ok((version.ok_or(DbError::RowCount(0))?, true))
}

/// The version that a reference (`name`, `name:2`, `name@sha256:…`) means.
pub async fn resolve(
    conn: &mut PgConnection,
    project_id: Uuid,
    reference: &Reference,
) -> Result<Option<DatasetVersion>, RegistryError> {
    let found = select(conn, project_id, Some(reference), None, 1).await?;
    Ok(found.into_iter().next())
}

/// The newest version of each dataset, by name: those after `after`.
pub async fn list(
    conn: &mut PgConnection,
    project_id: Uuid,
    after: Option<&ResourceName>,
    limit: i64,
) -> Result<Vec<DatasetVersion>, RegistryError> {
    select(conn, project_id, None, after, limit).await
}

/// One version of each dataset: the newest one that `reference` matches.
async fn select(
    conn: &mut PgConnection,
    project_id: Uuid,
    reference: Option<&Reference>,
    after: Option<&ResourceName>,
    limit: i64,
) -> Result<Vec<DatasetVersion>, RegistryError> {
    let (number, digest) = match reference.map(|r| &r.version) {
        Some(VersionSelector::Number(number)) => (Some(*number), None),
        Some(VersionSelector::Digest(digest)) => (None, Some(digest)),
        // Datasets have no aliases.
        Some(VersionSelector::Alias(_)) => return Ok(Vec::new()),
        Some(VersionSelector::Newest) | None => (None, None),
    };
    let rows = sqlx::query!(
        r#"
        SELECT DISTINCT ON (d.name COLLATE "C")
            v.id,
            d.name,
            v.version,
            v.digest,
            v.size,
            v.classes AS "classes: Json<Vec<String>>",
            v.class_counts AS "class_counts: Json<BTreeMap<Split, Vec<u64>>>",
            v.skipped,
            v.created_at
        FROM dataset d
        JOIN dataset_version v ON v.project_id = d.project_id AND v.dataset_id = d.id
        WHERE d.project_id = $1
          AND ($2::text IS NULL OR d.name = $2)
          AND ($3::int IS NULL OR v.version = $3)
          AND ($4::bytea IS NULL OR v.digest = $4)
          AND ($5::text IS NULL OR d.name COLLATE "C" > $5)
        ORDER BY d.name COLLATE "C", v.version DESC
        LIMIT $6
        "#,
        project_id,
        reference.map(|r| r.name.as_str()),
        number,
        digest.map(|d| d.as_bytes() as &[u8]),
        after.map(ResourceName::as_str),
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            let class_counts = row.class_counts.0;
            Ok(DatasetVersion {
                id: row.id,
                name: read_name("dataset", row.name)?,
                version: row.version,
                digest: read_digest("dataset_version", "digest", &row.digest)?,
                size: row.size,
                classes: row.classes.0,
                split_counts: class_counts
                    .iter()
                    .map(|(split, counts)| (*split, counts.iter().sum()))
                    .collect(),
                class_counts,
                skipped: row.skipped,
                created_at: row.created_at,
            })
        })
        .collect()
}

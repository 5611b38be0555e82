//! Which versions a composed prompt was made of, and how much of each.

use serde::Serialize;
use sqlx::PgConnection;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{RegistryError, read_digest, read_name};
use crate::domain::digest::Digest;
use crate::domain::reference::ResourceName;

/// An edge of the lineage, seen from one of its ends: the version at the other end.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct LineageEdge {
    #[schema(value_type = String, example = "dtd")]
    pub prompt: ResourceName,
    pub version: i32,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// α of the parent in the child.
    #[schema(minimum = 0, maximum = 1)]
    pub weight: f64,
}

/// What a version was composed of, the largest weight first.
pub async fn parents(
    conn: &mut PgConnection,
    project_id: Uuid,
    version_id: Uuid,
) -> Result<Vec<LineageEdge>, RegistryError> {
    sqlx::query!(
        r#"
        SELECT p.name, v.version, v.sha256, l.weight
        FROM lineage l
        JOIN prompt_version v ON v.project_id = l.project_id AND v.id = l.parent
        JOIN prompt p ON p.project_id = v.project_id AND p.id = v.prompt_id
        WHERE l.project_id = $1 AND l.child = $2
        ORDER BY l.weight DESC, p.name, v.version
        "#,
        project_id,
        version_id,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(|row| edge(row.name, row.version, &row.sha256, row.weight))
    .collect()
}

/// What was composed with a version, the newest first.
pub async fn children(
    conn: &mut PgConnection,
    project_id: Uuid,
    version_id: Uuid,
) -> Result<Vec<LineageEdge>, RegistryError> {
    sqlx::query!(
        r#"
        SELECT p.name, v.version, v.sha256, l.weight
        FROM lineage l
        JOIN prompt_version v ON v.project_id = l.project_id AND v.id = l.child
        JOIN prompt p ON p.project_id = v.project_id AND p.id = v.prompt_id
        WHERE l.project_id = $1 AND l.parent = $2
        ORDER BY v.created_at DESC, v.id DESC
        "#,
        project_id,
        version_id,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(|row| edge(row.name, row.version, &row.sha256, row.weight))
    .collect()
}

fn edge(
    name: String,
    version: i32,
    sha256: &[u8],
    weight: f64,
) -> Result<LineageEdge, RegistryError> {
    Ok(LineageEdge {
        prompt: read_name("prompt", name)?,
        version,
        digest: read_digest("prompt_version", "sha256", sha256)?,
        weight,
    })
}

//! Which versions a composed prompt was made of, how much of each, and by which ensemble.

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

/// The ensemble that made a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ProducedBy {
    pub ensemble: Uuid,
    /// The ensemble from whose statistics the weights were solved for again; null where they come
    /// from backbone and images.
    pub resolved_from: Option<Uuid>,
}

/// What made a version; None where it was uploaded.
pub async fn produced_by(
    conn: &mut PgConnection,
    project_id: Uuid,
    version_id: Uuid,
) -> Result<Option<ProducedBy>, RegistryError> {
    let found = sqlx::query_as!(
        ProducedBy,
        r#"
        SELECT
            j.id AS ensemble,
            (j.spec #>> '{resolved_from,ensemble}')::uuid AS resolved_from
        FROM prompt_version v
        JOIN job j ON j.project_id = v.project_id AND j.id = v.produced_by_job
        WHERE v.project_id = $1 AND v.id = $2
        "#,
        project_id,
        version_id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(found)
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

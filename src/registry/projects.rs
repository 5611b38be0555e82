//! Projects: each has its own prompts, backbones, datasets, jobs and keys.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::OnConstraint;
use crate::registry::{RegistryError, read_name};
use promptweave_domain::clock::new_id;
use promptweave_domain::reference::ResourceName;

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Project {
    #[serde(skip)]
    pub id: Uuid,
    #[schema(value_type = String, example = "default")]
    pub name: ResourceName,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

pub async fn create(
    conn: &mut PgConnection,
    name: &ResourceName,
) -> Result<Project, RegistryError> {
    let id = new_id();
    let created_at = sqlx::query_scalar!(
        "INSERT INTO project (id, name) VALUES ($1, $2) RETURNING created_at",
        id,
        name.as_str(),
    )
    .fetch_one(conn)
    .await
    .on_constraint("project_name_key", || RegistryError::NameTaken {
        kind: "project",
        name: name.clone(),
    })?;
    Ok(Project {
        id,
        name: name.clone(),
        created_at,
    })
}

pub async fn find(
    conn: &mut PgConnection,
    name: &ResourceName,
) -> Result<Option<Project>, RegistryError> {
    let found = select_projects(conn, None, Some(name), None, 1).await?;
    Ok(found.into_iter().next())
}

/// Projects by name: those after `after`, or only the project `only`.
pub async fn list(
    conn: &mut PgConnection,
    only: Option<Uuid>,
    after: Option<&ResourceName>,
    limit: i64,
) -> Result<Vec<Project>, RegistryError> {
    select_projects(conn, only, None, after, limit).await
}

async fn select_projects(
    conn: &mut PgConnection,
    id: Option<Uuid>,
    name: Option<&ResourceName>,
    after: Option<&ResourceName>,
    limit: i64,
) -> Result<Vec<Project>, RegistryError> {
    let rows = sqlx::query!(
        r#"
        SELECT id, name, created_at
        FROM project
        WHERE ($1::uuid IS NULL OR id = $1)
          AND ($2::text IS NULL OR name = $2)
          AND ($3::text IS NULL OR name COLLATE "C" > $3)
        ORDER BY name COLLATE "C"
        LIMIT $4
        "#,
        id,
        name.map(ResourceName::as_str),
        after.map(ResourceName::as_str),
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Project {
                id: row.id,
                name: read_name("project", row.name)?,
                created_at: row.created_at,
            })
        })
        .collect()
}

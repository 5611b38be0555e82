//! Lineage: the versions that a composed prompt was made of, and how much of each. It is a graph that is walked up to
//! the sources or down to what was made with them.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::DbError;
use crate::registry::{RegistryError, read_digest, read_name};
use promptweave_domain::digest::Digest;
use promptweave_domain::reference::{Reference, VersionSelector};
use promptweave_domain::specification::{Specification as _, TuningSpec};

/// The most versions in a graph.
pub const MAX_NODES: usize = 500;

/// Which way a walk goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Up to what a version was made of.
    #[default]
    Up,
    /// Down to what was made with a version.
    Down,
}

/// The result of a walk from one version.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Graph {
    /// The version that was asked for, then those one edge away, two, …; at the same distance the newest first.
    pub nodes: Vec<Node>,
    /// Edges in the order of the nodes that they were followed from, the largest weight first.
    pub edges: Vec<Edge>,
    /// Why the graph is incomplete; null if it is complete.
    pub truncated: Option<Truncation>,
}

/// A version in the graph.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Node {
    /// A reference that names the version in `edges`, and wherever a prompt is named.
    #[serde(rename = "ref")]
    #[schema(value_type = String, example = "dtd:1")]
    pub reference: Reference,
    #[schema(value_type = String, example = "dtd")]
    pub prompt: String,
    pub version: i32,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// The smallest number of edges between this version and the one asked for.
    #[schema(minimum = 0)]
    pub distance: u32,
    /// The weights multiplied along a path, summed over all paths that are shown. It is the share of this version in
    /// the one asked for (`up`), or of that one in this (`down`).
    #[schema(minimum = 0)]
    pub effective_weight: f64,
    /// The job that made the version; null if it was uploaded.
    pub produced_by: Option<ProducedBy>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// `child` was made with `weight` of `parent`.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Edge {
    #[schema(value_type = String, example = "food-composed:1")]
    pub child: Reference,
    #[schema(value_type = String, example = "dtd:1")]
    pub parent: Reference,
    /// The weight α of the parent in the child.
    #[schema(minimum = 0, maximum = 1)]
    pub weight: f64,
    pub role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The parent is one of the prompts that a composed prompt sums.
    Source,
    /// The parent is the prompt that a tuning started from; its weight is 1.
    Start,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Start => "start",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// There are edges beyond `depth`: ask for a greater depth, or walk on from a node at that distance.
    Depth,
    /// There are more than 500 versions: walk on from one of these.
    Nodes,
}

/// The job that made a version: an ensemble or a tuning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ProducedBy {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ensemble: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuning: Option<Uuid>,
    /// The ensemble whose statistics the weights were solved from; null if they come from backbone and images.
    pub solved_from: Option<Uuid>,
}

/// The graph around a version: everything that at most `depth` edges lead to.
pub async fn walk(
    conn: &mut PgConnection,
    project_id: Uuid,
    start: Uuid,
    direction: Direction,
    depth: u32,
) -> Result<Graph, RegistryError> {
    let mut found = nodes(conn, project_id, start, direction, depth).await?;
    let too_many = found.len() > MAX_NODES;
    found.truncate(MAX_NODES);
    let ids: Vec<Uuid> = found.iter().map(|(id, _)| *id).collect();
    let mut nodes: Vec<Node> = found.into_iter().map(|(_, node)| node).collect();
    // Nodes are sorted by distance, and edges are followed from the first of them.
    let inner = nodes.partition_point(|node| node.distance < depth);
    let too_deep = goes_on(conn, project_id, &ids[inner..], direction).await?;
    let links = links(conn, project_id, &ids, inner, direction).await?;
    weigh(&mut nodes, &links, depth);
    let reference = |at: usize| nodes[at].reference.clone();
    let edges = links.iter().map(|link| {
        let (near, far) = (reference(link.near), reference(link.far));
        let (child, parent) = match direction {
            Direction::Up => (near, far),
            Direction::Down => (far, near),
        };
        Edge {
            child,
            parent,
            weight: link.weight,
            role: link.role,
        }
    });
    Ok(Graph {
        edges: edges.collect(),
        truncated: match (too_many, too_deep) {
            (true, _) => Some(Truncation::Nodes),
            (false, true) => Some(Truncation::Depth),
            (false, false) => None,
        },
        nodes,
    })
}

/// Versions by distance, then newest first. If there are more than [`MAX_NODES`], one more than that is returned.
///
/// The recursion has one row per distance, which holds everything seen so far. So a version is found once, however many
/// paths lead to it, and the walk would end even if the edges formed a circle.
async fn nodes(
    conn: &mut PgConnection,
    project_id: Uuid,
    start: Uuid,
    direction: Direction,
    depth: u32,
) -> Result<Vec<(Uuid, Node)>, RegistryError> {
    let rows = sqlx::query!(
        r#"
        WITH RECURSIVE walk AS (
            SELECT 0 AS distance, ARRAY[$2::uuid] AS found, ARRAY[$2::uuid] AS seen
            UNION ALL
            SELECT walk.distance + 1, next.found, walk.seen || next.found
            FROM walk
            CROSS JOIN LATERAL (
                SELECT array_agg(fresh.id ORDER BY fresh.id DESC) AS found
                FROM (
                    SELECT DISTINCT far.id
                    FROM unnest(walk.found) AS near (id)
                    CROSS JOIN LATERAL (
                        (SELECT l.parent AS id
                         FROM lineage l
                         WHERE $3 AND l.project_id = $1 AND l.child = near.id
                         ORDER BY l.parent DESC
                         LIMIT $5)
                        UNION ALL
                        (SELECT l.child AS id
                         FROM lineage l
                         WHERE NOT $3 AND l.project_id = $1 AND l.parent = near.id
                         ORDER BY l.child DESC
                         LIMIT $5)
                    ) far
                    WHERE far.id <> ALL (walk.seen)
                    ORDER BY far.id DESC
                    LIMIT $5
                ) fresh
            ) next
            WHERE walk.distance < $4
              AND cardinality(walk.seen) < $5
              AND next.found IS NOT NULL
        )
        SELECT
            v.id, p.name, v.version, v.sha256, v.created_at,
            walk.distance AS "distance!",
            j.id AS "job?",
            j.kind AS "kind?",
            (j.spec #>> '{solved_from,ensemble}')::uuid AS solved_from
        FROM walk
        CROSS JOIN LATERAL unnest(walk.found) AS found (id)
        JOIN prompt_version v ON v.project_id = $1 AND v.id = found.id
        JOIN prompt p ON p.project_id = v.project_id AND p.id = v.prompt_id
        LEFT JOIN job j ON j.project_id = v.project_id AND j.id = v.produced_by_job
        -- Ids are made in the order of time.
        ORDER BY walk.distance, v.id DESC
        LIMIT $5
        "#,
        project_id,
        start,
        direction == Direction::Up,
        depth as i32,
        MAX_NODES as i64 + 1,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            let name = read_name("prompt", row.name)?;
            let node = Node {
                prompt: name.to_string(),
                reference: Reference {
                    name,
                    version: VersionSelector::Number(row.version),
                },
                version: row.version,
                digest: read_digest("prompt_version", "sha256", &row.sha256)?,
                distance: row.distance as u32,
                effective_weight: 0.0,
                produced_by: row.job.map(|job| {
                    let is_tuning = row.kind.as_deref() == Some(TuningSpec::KIND);
                    ProducedBy {
                        ensemble: (!is_tuning).then_some(job),
                        tuning: is_tuning.then_some(job),
                        solved_from: row.solved_from,
                    }
                }),
                created_at: row.created_at,
            };
            Ok((row.id, node))
        })
        .collect()
}

/// An edge as the positions of its two nodes; it was followed from `near` to `far`.
struct Link {
    near: usize,
    far: usize,
    weight: f64,
    role: Role,
}

/// The edges from the first `inner` nodes to any of them.
async fn links(
    conn: &mut PgConnection,
    project_id: Uuid,
    ids: &[Uuid],
    inner: usize,
    direction: Direction,
) -> Result<Vec<Link>, RegistryError> {
    let (children, parents) = match direction {
        Direction::Up => (&ids[..inner], ids),
        Direction::Down => (ids, &ids[..inner]),
    };
    let rows = sqlx::query!(
        r#"
        SELECT child, parent, weight, role
        FROM lineage
        WHERE project_id = $1 AND child = ANY ($2) AND parent = ANY ($3)
        "#,
        project_id,
        children,
        parents,
    )
    .fetch_all(conn)
    .await?;
    let places: HashMap<Uuid, usize> = ids.iter().zip(0..).map(|(id, at)| (*id, at)).collect();
    let mut links = Vec::with_capacity(rows.len());
    for row in rows {
        let (near, far) = match direction {
            Direction::Up => (row.child, row.parent),
            Direction::Down => (row.parent, row.child),
        };
        links.push(Link {
            near: places[&near],
            far: places[&far],
            weight: row.weight,
            role: match row.role.as_str() {
                "source" => Role::Source,
                "start" => Role::Start,
                other => return Err(DbError::unreadable("lineage", "role", other).into()),
            },
        });
    }
    links.sort_by(|a, b| {
        let by_weight = b.weight.total_cmp(&a.weight);
        a.near.cmp(&b.near).then(by_weight).then(a.far.cmp(&b.far))
    });
    Ok(links)
}

/// Whether edges lead on from one of these versions.
async fn goes_on(
    conn: &mut PgConnection,
    project_id: Uuid,
    ids: &[Uuid],
    direction: Direction,
) -> Result<bool, RegistryError> {
    let up = direction == Direction::Up;
    Ok(sqlx::query_scalar!(
        r#"
        SELECT
            EXISTS (SELECT FROM lineage WHERE $3 AND project_id = $1 AND child = ANY ($2))
            OR EXISTS (SELECT FROM lineage WHERE NOT $3 AND project_id = $1 AND parent = ANY ($2))
            AS "goes_on!"
        "#,
        project_id,
        ids,
        up,
    )
    .fetch_one(conn)
    .await?)
}

/// Computes products along paths, summed over paths: what reaches each node after one edge, after two, and so on. Paths
/// are not walked one by one, because there may be very many.
fn weigh(nodes: &mut [Node], links: &[Link], depth: u32) {
    let mut arriving = vec![0.0; nodes.len()];
    arriving[0] = 1.0;
    for _ in 0..=depth {
        let mut next = vec![0.0; nodes.len()];
        for (node, weight) in nodes.iter_mut().zip(&arriving) {
            node.effective_weight += weight;
        }
        for link in links {
            next[link.far] += arriving[link.near] * link.weight;
        }
        arriving = next;
    }
}

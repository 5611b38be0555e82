//! `…/lineage`: the graph above and below a version, and where a walk ends.

use promptweave::db::MIGRATOR;
use promptweave::registry::lineage::{MAX_NODES, Role};
use promptweave::registry::prompt_versions;
use promptweave::registry::prompt_versions::{NewVersion, Parent, VersionFile};
use promptweave::registry::{DEFAULT_PROJECT, projects, prompts};
use promptweave_domain::api_key::Scope;
use promptweave_domain::prompt_file::Origin;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::app::TestApp;
use crate::fixtures::prompt_file;

/// Publishes version 1 of a prompt, composed of `parents` if there are any.
pub async fn publish(app: &TestApp, name: &str, parents: &[(Uuid, f64)]) -> Uuid {
    let mut db = app.state.pool.begin().await.unwrap();
    let file = prompt_file(Origin::Composed, 1.0);
    let name = name.parse().unwrap();
    let prompt = prompts::find_or_create(&mut db, DEFAULT_PROJECT, &name, "").await;
    let prompt_id = prompt.unwrap().id;
    let parents: Vec<Parent> = parents
        .iter()
        .map(|&(version_id, weight)| Parent {
            version_id,
            weight,
            role: Role::Source,
        })
        .collect();
    let new = NewVersion {
        prompt_id,
        bytes: &file.to_bytes(),
        file: VersionFile::Prompt {
            file: &file,
            metadata: file.metadata.as_ref().unwrap(),
        },
        produced_by_job: None,
        parents: &parents,
    };
    let (version, _) = prompt_versions::insert(&mut db, DEFAULT_PROJECT, new)
        .await
        .unwrap();
    db.commit().await.unwrap();
    version.id
}

async fn walk(app: &TestApp, name: &str, query: &str) -> Value {
    let path = format!("/v1/prompts/{name}/versions/1/lineage{query}");
    app.get(&path).await.ok(200)
}

/// `(ref, distance, effective_weight)` for every node.
fn nodes(graph: &Value) -> Vec<(&str, u64, f64)> {
    let read = |node: &'_ Value| (node["distance"].as_u64(), node["effective_weight"].as_f64());
    let nodes = graph["nodes"].as_array().unwrap().iter();
    nodes
        .map(|node| {
            let (distance, weight) = read(node);
            (
                node["ref"].as_str().unwrap(),
                distance.unwrap(),
                weight.unwrap(),
            )
        })
        .collect()
}

/// `(child, parent, weight)` for every edge.
fn edges(graph: &Value) -> Vec<(&str, &str, f64)> {
    let edges = graph["edges"].as_array().unwrap().iter();
    edges
        .map(|edge| {
            assert_eq!(edge["role"], "source");
            let name = |end: &str| edge[end].as_str().unwrap();
            (
                name("child"),
                name("parent"),
                edge["weight"].as_f64().unwrap(),
            )
        })
        .collect()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_diamond_is_walked_both_ways_and_its_paths_add_up(pool: PgPool) {
    let app = TestApp::new(pool);
    let base = publish(&app, "base", &[]).await;
    let other = publish(&app, "other", &[]).await;
    let left = publish(&app, "left", &[(base, 1.0)]).await;
    let right = publish(&app, "right", &[(base, 0.5), (other, 0.5)]).await;
    // It is also made straight from the bottom: there are paths of one and of two edges.
    publish(&app, "top", &[(left, 0.25), (right, 0.5), (base, 0.25)]).await;

    let up = walk(&app, "top", "").await;
    let above = [
        ("top:1", 0, 1.0),
        ("right:1", 1, 0.5),
        ("left:1", 1, 0.25),
        ("base:1", 1, 0.25 + 0.25 + 0.25),
        ("other:1", 2, 0.25),
    ];
    assert_eq!(nodes(&up), above);
    let expected = [
        ("top:1", "right:1", 0.5),
        ("top:1", "left:1", 0.25),
        ("top:1", "base:1", 0.25),
        ("right:1", "base:1", 0.5),
        ("right:1", "other:1", 0.5),
        ("left:1", "base:1", 1.0),
    ];
    assert_eq!(edges(&up), expected);
    assert_eq!(up["truncated"], Value::Null);
    assert_eq!(up["nodes"][0]["produced_by"], Value::Null);

    let down = walk(&app, "base", "?direction=down").await;
    let below = [
        ("base:1", 0, 1.0),
        ("top:1", 1, 0.75),
        ("right:1", 1, 0.5),
        ("left:1", 1, 1.0),
    ];
    assert_eq!(nodes(&down), below);
    assert_eq!(edges(&down).len(), 5);
    assert_eq!(walk(&app, "base", "").await["edges"], json!([]));

    // With a depth of one edge, only paths of one edge are followed, and the answer says so.
    let near = walk(&app, "top", "?depth=1").await;
    assert_eq!(near["truncated"], "depth");
    assert_eq!(edges(&near), expected[..3]);
    assert_eq!(nodes(&near)[3], ("base:1", 1, 0.25));
    assert_eq!(walk(&app, "top", "?depth=2").await, up);
    for query in ["depth=0", "depth=65", "depth=-1", "direction=left"] {
        let path = format!("/v1/prompts/top/versions/1/lineage?{query}");
        assert_eq!(app.get(&path).await.status, 422, "{query}");
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_deep_chain_ends_at_the_depth_and_goes_on_from_there(pool: PgPool) {
    let app = TestApp::new(pool);
    let other = publish(&app, "other", &[]).await;
    let mut last = publish(&app, "p0", &[]).await;
    for i in 1..=70 {
        last = publish(&app, &format!("p{i}"), &[(last, 0.5), (other, 0.5)]).await;
    }
    let graph = walk(&app, "p70", "?depth=64").await;
    assert_eq!(graph["truncated"], "depth");
    let found = nodes(&graph);
    assert_eq!(*found.last().unwrap(), ("p6:1", 64, 0.5f64.powi(64)));
    // A prompt that is found at every distance is one node, which sums all its paths.
    let (_, distance, weight) = found.iter().find(|node| node.0 == "other:1").unwrap();
    assert_eq!((*distance, *weight), (1, 1.0 - 0.5f64.powi(64)));
    let rest = walk(&app, "p6", "").await;
    assert_eq!(rest["truncated"], Value::Null);
    assert_eq!(nodes(&rest).last().unwrap().0, "p0:1");
    assert_eq!(
        walk(&app, "p70", "").await["nodes"]
            .as_array()
            .unwrap()
            .len(),
        18
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn more_than_fits_is_cut_off_the_newest_first(pool: PgPool) {
    let app = TestApp::new(pool);
    let base = publish(&app, "base", &[]).await;
    let child = publish(&app, "child", &[(base, 1.0)]).await;
    // As many copies as needed replace the child.
    let copies = "INSERT INTO prompt_version (id, project_id, prompt_id, version, sha256, origin, \
                  num_tokens, embed_dim, depth, dtype, kind) \
                  SELECT gen_random_uuid(), project_id, prompt_id, 1 + n, sha256, origin, num_tokens, \
                  embed_dim, depth, dtype, kind FROM prompt_version, generate_series(1, $2) n WHERE id = $1";
    sqlx::query("ALTER TABLE prompt_version DROP CONSTRAINT prompt_version_sha256_key")
        .execute(&app.state.pool)
        .await
        .unwrap();
    sqlx::query(copies)
        .bind(child)
        .bind(MAX_NODES as i32)
        .execute(&app.state.pool)
        .await
        .unwrap();
    let edges = "INSERT INTO lineage SELECT project_id, id, $1, 1, 'source' FROM prompt_version \
                 WHERE version > 1";
    sqlx::query(edges)
        .bind(base)
        .execute(&app.state.pool)
        .await
        .unwrap();
    let graph = walk(&app, "base", "?direction=down").await;
    assert_eq!(graph["truncated"], "nodes");
    assert_eq!(graph["nodes"].as_array().unwrap().len(), MAX_NODES);
    assert_eq!(graph["edges"].as_array().unwrap().len(), MAX_NODES - 1);
    // The answer is the same every time.
    assert_eq!(walk(&app, "base", "?direction=down").await, graph);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_circle_ends_and_another_project_sees_nothing(pool: PgPool) {
    let app = TestApp::new(pool);
    let a = publish(&app, "a", &[]).await;
    let b = publish(&app, "b", &[(a, 1.0)]).await;
    // The API cannot make such a circle, because a parent exists before its child.
    sqlx::query("INSERT INTO lineage VALUES ($1, $2, $3, 1, 'source')")
        .bind(DEFAULT_PROJECT)
        .bind(a)
        .bind(b)
        .execute(&app.state.pool)
        .await
        .unwrap();
    let graph = walk(&app, "a", "").await;
    let refs: Vec<_> = nodes(&graph).into_iter().map(|node| node.0).collect();
    assert_eq!(refs, ["a:1", "b:1"]);
    assert_eq!(edges(&graph).len(), 2);

    let mut conn = app.state.pool.acquire().await.unwrap();
    let other = projects::create(&mut conn, &"other".parse().unwrap()).await;
    let key = app.make_key(other.unwrap().id, &[Scope::Read]).await;
    let request = axum::http::Request::get("/v1/prompts/a/versions/1/lineage?direction=down")
        .header("authorization", format!("Bearer {key}"));
    let answer = app.send(request.body(axum::body::Body::empty()).unwrap());
    answer.await.problem(404, "prompt_not_found");
}

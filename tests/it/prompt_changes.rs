//! Changes of a prompt: its description, tags, metadata and card; deletion; and the filters that find it.

use axum::body::Body;
use axum::http::{Method, Request, header};
use promptweave::db::MIGRATOR;
use promptweave::registry::DEFAULT_PROJECT;
use promptweave::registry::prompts;
use promptweave::registry::prompts::Facet;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::app::{TestApp, TestResponse, prompt_file};
use crate::ensembles::{furnished, post, request};
use crate::lineage;

const DTD: &str = "/v1/prompts/dtd";

async fn send(
    app: &TestApp,
    method: Method,
    path: &str,
    if_match: &str,
    body: Value,
) -> TestResponse {
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::CONTENT_TYPE, "application/merge-patch+json");
    if !if_match.is_empty() {
        request = request.header(header::IF_MATCH, if_match);
    }
    app.send(request.body(Body::from(body.to_string())).unwrap())
        .await
}

async fn patch(app: &TestApp, if_match: &str, body: Value) -> TestResponse {
    send(app, Method::PATCH, DTD, if_match, body).await
}

async fn delete(app: &TestApp, path: &str, if_match: &str) -> TestResponse {
    send(app, Method::DELETE, path, if_match, Value::Null).await
}

async fn create(app: &TestApp, body: Value) -> TestResponse {
    let answer = app.post("/v1/prompts", &body).await;
    answer.ok(201);
    answer
}

async fn publish(app: &TestApp, name: &str, seed: u64) -> TestResponse {
    let bytes = prompt_file(seed).to_bytes();
    let answer = app
        .upload(&format!("/v1/prompts/{name}/versions"), bytes)
        .await;
    answer.ok(201);
    answer
}

async fn alias(app: &TestApp, prompt: &str, body: Value) {
    let path = format!("{prompt}/aliases/production");
    send(app, Method::PUT, &path, "", body).await.ok(201);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_description_changes_by_merge_patch_under_its_etag(pool: PgPool) {
    let app = TestApp::new(pool);
    let body = json!({
        "name": "dtd", "description": "textures", "tags": {"domain": "texture", "old": "yes"},
        "metadata": {"owner": {"team": "vision", "mail": "v@example.org"}}, "card": "# DTD",
    });
    let made = create(&app, body).await;
    let first = made.header("etag").to_owned();
    patch(&app, "", json!({"card": "x"}))
        .await
        .problem(428, "precondition_required");

    let change = json!({
        "description": null, "tags": {"old": null, "new": "1"},
        "metadata": {"owner": {"mail": null}, "size": 47}, "card": "# DTD\n\nMore.",
    });
    let changed = patch(&app, &first, change).await;
    let body = changed.ok(200);
    assert_eq!(body["description"], "");
    assert_eq!(body["tags"], json!({"domain": "texture", "new": "1"}));
    assert_eq!(
        body["metadata"],
        json!({"owner": {"team": "vision"}, "size": 47})
    );
    assert_eq!(body["card"], "# DTD\n\nMore.");
    let read = app.get(DTD).await;
    assert_eq!(read.ok(200), body);
    assert_eq!(read.header("etag"), changed.header("etag"));
    // A client that knows only the former state does not overwrite this one.
    patch(&app, &first, json!({"card": "x"}))
        .await
        .problem(412, "precondition_failed");

    // A patch that changes nothing leaves the ETag as it is.
    let same = patch(&app, "*", json!({"tags": {"new": "1"}, "metadata": {}})).await;
    same.ok(200);
    assert_eq!(same.header("etag"), changed.header("etag"));
    let known = Request::get(DTD).header(header::IF_NONE_MATCH, same.header("etag"));
    let answer = app.send(known.body(Body::empty()).unwrap()).await;
    assert_eq!(answer.status, 304);
    // A new version is a change.
    publish(&app, "dtd", 1).await;
    assert_ne!(app.get(DTD).await.header("etag"), same.header("etag"));
    // Lists leave out the long fields.
    let listed = app.get("/v1/prompts").await.ok(200);
    assert!(
        listed["items"][0].get("card").is_none() && listed["items"][0].get("metadata").is_none()
    );
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_breaks_a_rule_is_named_and_nothing_is_changed(pool: PgPool) {
    let app = TestApp::new(pool);
    create(&app, json!({"name": "dtd", "tags": {"a": "1"}})).await;
    let before = app.get(DTD).await.ok(200);
    let many: Value = (0..64)
        .map(|i| (format!("t{i}"), json!("x")))
        .collect::<serde_json::Map<_, _>>()
        .into();
    for (body, pointer) in [
        (json!({"name": "x"}), "/name"),
        (json!({"tags": {"a": 1}}), "/tags/a"),
        (json!({"tags": {"": "x"}}), "/tags/"),
        (json!({"tags": {"a=b": "x"}}), "/tags/a=b"),
        (json!({"tags": {"a/b": "x".repeat(257)}}), "/tags/a~1b"),
        (json!({"tags": many}), "/tags"),
        (json!({"description": "x".repeat(4097)}), "/description"),
        (json!({"card": "x".repeat(65_537)}), "/card"),
        (json!({"metadata": "x"}), "/metadata"),
        (
            json!({"metadata": {"x": "y".repeat(16 << 10)}}),
            "/metadata",
        ),
    ] {
        let refused = patch(&app, "*", body).await;
        let problem = refused.problem(422, "invalid_body");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    patch(&app, "*", json!([1]))
        .await
        .problem(422, "invalid_body");
    let nul = patch(&app, "*", json!({"card": "a\0b"})).await;
    assert_eq!(nul.status, 422);
    assert_eq!(app.get(DTD).await.ok(200), before);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn of_twenty_changes_at_once_one_wins(pool: PgPool) {
    let app = TestApp::new(pool);
    let made = create(&app, json!({"name": "dtd"})).await;
    let etag = made.header("etag");
    let changes = (0..20).map(|i| patch(&app, etag, json!({"card": format!("card {i}")})));
    let answers = futures::future::join_all(changes).await;
    let won: Vec<_> = answers.iter().filter(|a| a.status == 200).collect();
    assert_eq!(won.len(), 1);
    for lost in answers.iter().filter(|a| a.status != 200) {
        lost.problem(412, "precondition_failed");
    }
    assert_eq!(app.get(DTD).await.ok(200), won[0].json());
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_deleted_prompt_is_hidden_keeps_its_name_and_comes_back(pool: PgPool) {
    let app = TestApp::new(pool);
    create(&app, json!({"name": "dtd", "tags": {"a": "1"}})).await;
    publish(&app, "dtd", 1).await;
    alias(&app, DTD, json!({"version": 1})).await;
    let before = app.get(DTD).await.ok(200);

    delete(&app, DTD, "")
        .await
        .problem(428, "precondition_required");
    delete(&app, DTD, "\"0\"")
        .await
        .problem(412, "precondition_failed");
    let etag = app.get(DTD).await.header("etag").to_owned();
    assert_eq!(delete(&app, DTD, &etag).await.status, 204);
    for path in [
        DTD,
        "/v1/prompts/dtd/versions",
        "/v1/prompts/dtd/versions/1",
        "/v1/prompts/dtd/versions/1/content",
        "/v1/prompts/dtd/versions/1/lineage",
        "/v1/prompts/dtd/aliases/production",
    ] {
        app.get(path).await.problem(404, "prompt_not_found");
    }
    let upload = app
        .upload("/v1/prompts/dtd/versions", prompt_file(2).to_bytes())
        .await;
    upload.problem(404, "prompt_not_found");
    delete(&app, DTD, "*")
        .await
        .problem(404, "prompt_not_found");
    for list in [
        "/v1/prompts",
        "/v1/prompts?tag=a",
        "/v1/prompts?alias=production",
        "/v1/prompts?task=digits",
    ] {
        assert_eq!(app.get(list).await.ok(200)["items"], json!([]), "{list}");
    }
    let again = app.post("/v1/prompts", &json!({"name": "dtd"})).await;
    let problem = again.problem(409, "prompt_deleted");
    assert!(problem["detail"].as_str().unwrap().contains("/restore"));

    let restored = app.post_empty("/v1/prompts/dtd/restore").await;
    assert_eq!(restored.ok(200), before);
    assert_ne!(restored.header("etag"), etag);
    assert_eq!(
        app.post_empty("/v1/prompts/dtd/restore").await.ok(200),
        before
    );
    app.post_empty("/v1/prompts/never/restore")
        .await
        .problem(404, "prompt_not_found");
    for list in [
        "/v1/prompts",
        "/v1/prompts?tag=a",
        "/v1/prompts?alias=production",
        "/v1/prompts?task=digits",
    ] {
        assert_eq!(
            app.get(list).await.ok(200)["items"][0]["name"],
            "dtd",
            "{list}"
        );
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_referred_to_is_not_deleted(pool: PgPool) {
    let app = furnished(pool).await;
    let refused = async |path: &str, user: &str| {
        let answer = delete(&app, path, "*").await;
        let problem = answer.problem(409, "prompt_in_use");
        assert!(
            problem["detail"].as_str().unwrap().contains(user),
            "{problem}"
        );
    };
    // A waiting ensemble refers to it, as a source and as its output.
    create(&app, json!({"name": "out"})).await;
    let mut body = request();
    body["output"] = json!({"name": "out"});
    let ensemble = post(&app, &body).await.ok(202);
    let source = body["sources"][0]["prompt"]
        .as_str()
        .unwrap()
        .split(':')
        .next()
        .unwrap()
        .to_owned();
    let source = format!("/v1/prompts/{source}");
    refused(&source, "queued").await;
    refused("/v1/prompts/out", "queued").await;
    let cancel = format!("/v1/ensembles/{}/cancel", ensemble["id"].as_str().unwrap());
    app.post_empty(&cancel).await.ok(200);
    assert_eq!(delete(&app, "/v1/prompts/out", "*").await.status, 204);

    // A protected alias refers to it.
    alias(&app, &source, json!({"version": 1, "protected": true})).await;
    refused(&source, "production").await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_a_prompt_was_composed_of_outlives_it(pool: PgPool) {
    let app = TestApp::new(pool);
    let digits = lineage::publish(&app, "digits", &[]).await;
    let flowers = lineage::publish(&app, "flowers", &[]).await;
    lineage::publish(&app, "mix", &[(digits, 0.25), (flowers, 0.75)]).await;
    let answer = delete(&app, "/v1/prompts/digits", "*").await;
    let problem = answer.problem(409, "prompt_in_use");
    assert!(
        problem["detail"].as_str().unwrap().contains("`mix:1`"),
        "{problem}"
    );
    assert_eq!(delete(&app, "/v1/prompts/mix", "*").await.status, 204);
    assert_eq!(delete(&app, "/v1/prompts/digits", "*").await.status, 204);
    // Restored, the prompt still has its lineage.
    app.post_empty("/v1/prompts/mix/restore").await.ok(200);
    let lineage = app.get("/v1/prompts/mix/versions/1/lineage").await.ok(200);
    assert_eq!(lineage["edges"].as_array().unwrap().len(), 2);
}

// ---- Filters -------------------------------------------------------------------------------

async fn names(app: &TestApp, query: &str) -> Vec<String> {
    let (mut found, mut token) = (Vec::new(), String::new());
    loop {
        let page = app
            .get(&format!("/v1/prompts?page_size=2&{query}{token}"))
            .await
            .ok(200);
        let items = page["items"].as_array().unwrap();
        found.extend(
            items
                .iter()
                .map(|item| item["name"].as_str().unwrap().to_owned()),
        );
        match page["next_page_token"].as_str() {
            Some(next) => token = format!("&page_token={next}"),
            None => return found,
        }
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn prompts_are_found_by_tag_alias_backbone_and_task(pool: PgPool) {
    let app = TestApp::new(pool);
    for i in 0..7 {
        let parity = if i % 2 == 0 { "even" } else { "odd" };
        let mut tags = json!({"parity": parity});
        if i % 3 == 0 {
            tags["three"] = json!("");
        }
        create(&app, json!({"name": format!("p{i}"), "tags": tags})).await;
    }
    publish(&app, "p2", 1).await;
    publish(&app, "p4", 2).await;
    alias(&app, "/v1/prompts/p4", json!({"version": 1})).await;
    let backbone = promptweave_domain::digest::Digest::of(b"some backbone");

    assert_eq!(names(&app, "").await.len(), 7);
    assert_eq!(names(&app, "tag=parity").await.len(), 7);
    assert_eq!(
        names(&app, "tag=parity=even").await,
        ["p0", "p2", "p4", "p6"]
    );
    assert_eq!(names(&app, "tag=parity=even&tag=three").await, ["p0", "p6"]);
    assert_eq!(names(&app, "tag=three&tag=parity%3Dodd").await, ["p3"]);
    assert_eq!(names(&app, "tag=parity=").await, [""; 0]);
    assert_eq!(names(&app, "task=digits").await, ["p2", "p4"]);
    assert_eq!(
        names(&app, &format!("backbone={backbone}")).await,
        ["p2", "p4"]
    );
    assert_eq!(names(&app, "alias=production").await, ["p4"]);
    assert_eq!(
        names(&app, "alias=production&task=digits&tag=parity=odd").await,
        [""; 0]
    );
    let unknown = app.get("/v1/prompts?backbone=nowhere").await;
    unknown.problem(422, "unknown_backbone");
    app.get("/v1/prompts?alias=3")
        .await
        .problem(422, "invalid_query");

    // A deprecated version does not count for a filter; another one like it still does.
    app.post_empty("/v1/prompts/p2/versions/1/deprecate")
        .await
        .ok(200);
    assert_eq!(names(&app, "task=digits").await, ["p4"]);
    publish(&app, "p4", 3).await;
    app.post_empty("/v1/prompts/p4/versions/1/deprecate")
        .await
        .ok(200);
    assert_eq!(names(&app, "task=digits").await, ["p4"]);
    app.post_empty("/v1/prompts/p2/versions/1/undeprecate")
        .await
        .ok(200);
    assert_eq!(names(&app, "task=digits").await, ["p2", "p4"]);
    delete(&app, "/v1/prompts/p4/aliases/production", "*").await;
    assert_eq!(names(&app, "alias=production").await, [""; 0]);
    let change = json!({"tags": {"parity": null, "three": "3"}});
    send(&app, Method::PATCH, "/v1/prompts/p6", "*", change)
        .await
        .ok(200);
    assert_eq!(names(&app, "tag=parity=even").await, ["p0", "p2", "p4"]);
    assert_eq!(names(&app, "tag=three").await, ["p0", "p3", "p6"]);
}

/// The triggers and the definition they follow never differ.
#[sqlx::test(migrator = "MIGRATOR")]
async fn facets_are_what_their_definition_says(pool: PgPool) {
    let app = TestApp::new(pool);
    for i in 0..4 {
        let name = format!("p{i}");
        create(&app, json!({"name": name, "tags": {"i": i.to_string()}})).await;
        publish(&app, &name, i).await;
    }
    app.post_empty("/v1/prompts/p1/versions/1/deprecate")
        .await
        .ok(200);
    delete(&app, "/v1/prompts/p2", "*").await;
    let differ: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT $1, f.facet, p.name FROM prompt p, prompt_facets(p) AS f (facet)) AS defined
         FULL JOIN prompt_facet kept ON kept.facet = defined.facet AND kept.name = defined.name
         WHERE kept.facet IS NULL OR defined.facet IS NULL",
    )
    .bind(DEFAULT_PROJECT)
    .fetch_one(&app.state.pool)
    .await
    .unwrap();
    assert_eq!(differ, 0);
}

/// A page of a filter is read from its index, however many prompts there are.
#[sqlx::test(migrator = "MIGRATOR")]
async fn a_filter_reads_a_page_and_not_the_registry(pool: PgPool) {
    let mut conn = pool.acquire().await.unwrap();
    sqlx::query(
        "INSERT INTO prompt (id, project_id, name, tags)
         SELECT gen_random_uuid(), $1, 'p' || i, jsonb_build_object('kind', CASE WHEN i % 2000 = 0 THEN 'rare' ELSE 'common' END)
         FROM generate_series(1, 20000) AS i",
    )
    .bind(DEFAULT_PROJECT)
    .execute(&mut *conn)
    .await
    .unwrap();
    sqlx::query("ANALYZE").execute(&mut *conn).await.unwrap();
    drop(conn);
    // Inside a transaction, the rows that its statements have read are counted.
    let mut tx = pool.begin().await.unwrap();
    let facets = ["kind=common", "kind"].map(|tag| Facet::Tag(tag.to_owned()));
    let after = "p3".parse().unwrap();
    let page = prompts::list(&mut tx, DEFAULT_PROJECT, &facets, Some(&after), 50).await;
    assert_eq!(page.unwrap().len(), 50);
    let read: Vec<(String, i64, i64)> = sqlx::query_as(
        "SELECT relname::text, seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables
         WHERE relname IN ('prompt', 'prompt_facet', 'prompt_version', 'alias') ORDER BY relname",
    )
    .fetch_all(&mut *tx)
    .await
    .unwrap();
    for (table, sequentially, by_index) in &read {
        // Two facets are counted, up to 1,000 each; a sequential read passes others between those.
        assert!(sequentially + by_index < 10_000, "{table}: {read:?}");
    }
    drop(tx);
    let app = TestApp::new(pool);
    let rare = names(&app, "tag=kind=rare&tag=kind").await;
    assert_eq!(rare.len(), 10);
}

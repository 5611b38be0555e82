//! Sending messages: they are signed, sent at least once, tried again, and delay nobody. Time is the database's, so a
//! pause is ended by moving `next_at`, never by waiting.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::future::join_all;
use promptweave::db::MIGRATOR;
use promptweave::remote::client::Client;
use promptweave::webhooks::deliverer;
use promptweave::webhooks::outbox;
use promptweave::webhooks::outbox::{Claimed, Outcome, Receivers};
use serde_json::{Value, json};
use sqlx::PgPool;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::app::TestApp;
use crate::ensembles::{Worker, furnished, post, request, until_state, url};
use crate::fixtures::{FakeComposer, Script};
use crate::remote::{Names, network, serve};
use crate::webhooks::{below, deliveries, opened, patch, register};

/// A receiver on loopback.
#[derive(Clone, Default)]
struct Receiver {
    got: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
    /// The statuses to answer with, one by one, then 204; 0 gives no answer at all.
    answers: Arc<Mutex<VecDeque<u16>>>,
    /// Location header of every answer.
    location: Option<String>,
}

async fn receive(State(receiver): State<Receiver>, headers: HeaderMap, body: Bytes) -> Response {
    receiver.got.lock().unwrap().push((headers, body));
    let answer = receiver.answers.lock().unwrap().pop_front().unwrap_or(204);
    if answer == 0 {
        std::future::pending::<()>().await;
    }
    let location = receiver.location.unwrap_or_default();
    let status = StatusCode::from_u16(answer).unwrap();
    (status, [(header::LOCATION, location)]).into_response()
}

impl Receiver {
    fn answering(answers: impl IntoIterator<Item = u16>) -> Self {
        let answers = Arc::new(Mutex::new(answers.into_iter().collect()));
        Self {
            answers,
            ..Self::default()
        }
    }

    fn router(&self) -> Router {
        Router::new().fallback(receive).with_state(self.clone())
    }

    async fn listen(&self) -> SocketAddr {
        serve("127.0.0.1:0", self.router()).await
    }

    fn got(&self) -> Vec<(HeaderMap, Bytes)> {
        self.got.lock().unwrap().clone()
    }

    /// `webhook-id` of each message.
    fn ids(&self) -> Vec<String> {
        let id = |headers: &HeaderMap| headers["webhook-id"].to_str().unwrap().to_owned();
        self.got().iter().map(|(headers, _)| id(headers)).collect()
    }
}

struct Deliverer(CancellationToken, JoinHandle<()>);

impl Deliverer {
    fn start(app: &TestApp) -> Self {
        Self::with(app, Client::new(network(&["127.0.0.0/8"])).unwrap())
    }

    fn with(app: &TestApp, client: Client) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(deliverer::run(app.state.pool.clone(), client, stop.clone()));
        Self(stop, task)
    }

    async fn stop(self) {
        self.0.cancel();
        self.1.await.unwrap();
    }
}

async fn send_test(app: &TestApp, webhook: &Value) -> Value {
    app.post_empty(&below(webhook, "/test")).await.ok(202)
}

/// Waits until a delivery is as expected.
async fn until(app: &TestApp, delivery: &Value, is: impl Fn(&Value) -> bool) -> Value {
    let [webhook, id] = ["webhook_id", "id"].map(|name| delivery[name].as_str().unwrap());
    let path = format!("/v1/webhooks/{webhook}/deliveries/{id}");
    let patience = async {
        loop {
            let seen = app.get(&path).await.ok(200);
            if is(&seen) {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(30), patience).await {
        Ok(seen) => seen,
        Err(_) => panic!("{}", app.get(&path).await.json()),
    }
}

fn delivered(delivery: &Value) -> bool {
    delivery["state"] == "delivered"
}

/// Whether a try failed and another will come.
fn tried(delivery: &Value) -> bool {
    delivery["state"] == "pending" && delivery["last_error"].is_string()
}

async fn sql(app: &TestApp, statement: &'static str) {
    let statement = sqlx::query(statement);
    statement.execute(&app.state.pool).await.unwrap();
}

async fn make_due(app: &TestApp) {
    sql(
        app,
        "UPDATE webhook_delivery SET next_at = now() WHERE state = 'pending'",
    )
    .await;
}

fn at(delivery: &Value, name: &str) -> OffsetDateTime {
    OffsetDateTime::parse(delivery[name].as_str().unwrap(), &Rfc3339).unwrap()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_end_is_told_with_a_signature_that_others_verify(pool: PgPool) {
    let mut app = furnished(pool).await;
    app.set(|settings| settings.network = network(&["127.0.0.0/8"]));
    let receiver = Receiver::default();
    let address = receiver.listen().await;
    let webhook = register(&app, &format!("http://{address}/hook?key=1")).await;
    let deliverer = Deliverer::start(&app);
    let worker = Worker::start(
        &app,
        &FakeComposer::playing([Script::Succeed, Script::Refuse]),
    );
    let ensemble = post(&app, &request()).await.ok(202);
    until_state(&app, &ensemble, "succeeded").await;
    let mut other = request();
    other["target"]["seed"] = json!(1);
    let failing = post(&app, &other).await.ok(202);
    let failed = app.get(&format!("{}?wait=60", url(&failing, "self"))).await;
    assert_eq!(failed.ok(200)["state"], "failed");

    for delivery in deliveries(&app, &webhook).await {
        let delivery = until(&app, &delivery, delivered).await;
        assert_eq!(
            (&delivery["attempt"], &delivery["last_status"]),
            (&json!(1), &json!(204))
        );
        let got = receiver.got();
        let this = |(headers, _): &&(HeaderMap, Bytes)| {
            headers["webhook-id"] == delivery["id"].as_str().unwrap()
        };
        let (headers, body) = got.iter().find(this).unwrap();
        let theirs = standardwebhooks::Webhook::new(webhook["secret"].as_str().unwrap()).unwrap();
        theirs.verify(body, headers).unwrap();
        let mut forged = body.to_vec();
        forged.push(b' ');
        assert!(theirs.verify(&forged, headers).is_err());
        assert_eq!(headers["content-type"], "application/json");
        let body: Value = serde_json::from_slice(body).unwrap();
        assert_eq!(body, delivery["payload"]);
        assert_eq!(body["type"], delivery["event_type"]);
        let told = &body["data"];
        if body["type"] == "ensemble.succeeded" {
            assert_eq!(told["id"], ensemble["id"]);
            assert_eq!(
                told["composed_prompt"],
                json!({"prompt": "pets-composed", "version": 1})
            );
            assert_eq!(told["urls"]["result"], url(&ensemble, "result"));
            app.get(&url(&ensemble, "result")).await.ok(200);
        } else {
            assert_eq!(
                (&told["id"], &told["error"]["code"]),
                (&failing["id"], &json!("not_finite"))
            );
        }
    }
    assert_eq!(receiver.got().len(), 2);
    worker.stop().await;
    deliverer.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_message_is_tried_again_until_it_is_taken(pool: PgPool) {
    let app = opened(pool);
    let deliverer = Deliverer::start(&app);
    let receiver = Receiver::answering([500, 429]);
    let webhook = register(&app, &format!("http://{}/", receiver.listen().await)).await;
    let delivery = send_test(&app, &webhook).await;
    for (attempt, status, pause) in [(1, 500, 4.0..6.0), (2, 429, 12.0..18.0)] {
        let failed = until(&app, &delivery, |it| it["last_status"] == status).await;
        assert!(tried(&failed), "{failed}");
        assert_eq!(failed["attempt"], attempt);
        // The wait counts from the answer, which came a moment after the try began.
        let waits = (at(&failed, "next_at") - at(&failed, "last_attempt_at")).as_seconds_f64();
        assert!(
            (pause.start..pause.end + 1.0).contains(&waits),
            "{attempt}: {waits}"
        );
        let seen = app.get(&below(&webhook, "")).await.ok(200);
        assert!(seen["failing_since"].is_string(), "{seen}");
        make_due(&app).await;
    }
    let done = until(&app, &delivery, delivered).await;
    assert_eq!(
        (&done["attempt"], &done["last_error"]),
        (&json!(3), &Value::Null)
    );
    let id = delivery["id"].as_str().unwrap();
    assert_eq!(receiver.ids(), [id; 3]);

    // First nobody listens, and then somebody does.
    let place = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = place.local_addr().unwrap();
    drop(place);
    let webhook = register(&app, &format!("http://{address}/")).await;
    let delivery = send_test(&app, &webhook).await;
    let failed = until(&app, &delivery, tried).await;
    assert_eq!(failed["last_status"], Value::Null);
    assert!(at(&failed, "next_at") > at(&failed, "last_attempt_at"));
    serve(&address.to_string(), receiver.router()).await;
    make_due(&app).await;
    until(&app, &delivery, delivered).await;
    let seen = app.get(&below(&webhook, "")).await.ok(200);
    assert_eq!(seen["failing_since"], Value::Null);
    deliverer.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_dead_receiver_holds_up_neither_jobs_nor_others(pool: PgPool) {
    let mut app = furnished(pool).await;
    app.set(|settings| settings.network = network(&["127.0.0.0/8"]));
    let dead = Receiver::answering([0; 100]);
    let alive = Receiver::default();
    let to_dead = register(&app, &format!("http://{}/", dead.listen().await)).await;
    for _ in 0..20 {
        send_test(&app, &to_dead).await;
    }
    let deliverer = Deliverer::start(&app);
    let begun = Instant::now();
    while dead.got().len() < 4 {
        assert!(begun.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let to_alive = register(&app, &format!("http://{}/", alive.listen().await)).await;
    let begun = Instant::now();
    let worker = Worker::start(&app, &FakeComposer::default());
    let ensemble = post(&app, &request()).await.ok(202);
    until_state(&app, &ensemble, "succeeded").await;
    for _ in 0..20 {
        send_test(&app, &to_alive).await;
    }
    for delivery in deliveries(&app, &to_alive).await {
        until(&app, &delivery, delivered).await;
    }
    // This is less than it takes to give up on one message to the dead receiver.
    assert!(
        begun.elapsed() < Duration::from_secs(12),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(alive.got().len(), 21);
    // The dead receiver's other messages wait for these.
    assert_eq!(dead.got().len(), 4);
    worker.stop().await;

    // An interrupted message does not count as tried, and any process may take it.
    deliverer.stop().await;
    for delivery in deliveries(&app, &to_dead).await {
        assert_eq!(
            (&delivery["state"], &delivery["attempt"]),
            (&json!("pending"), &json!(0))
        );
    }
    let held = "SELECT count(*) FROM webhook_delivery WHERE lease_token IS NOT NULL";
    let held: i64 = sqlx::query_scalar(held)
        .fetch_one(&app.state.pool)
        .await
        .unwrap();
    assert_eq!(held, 0);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn receivers_that_fail_are_served_apart_and_one_at_a_time(pool: PgPool) {
    let app = opened(pool);
    let webhook = register(&app, "http://127.0.0.1:9/").await;
    for _ in 0..3 {
        send_test(&app, &webhook).await;
    }
    let mut db = app.state.pool.acquire().await.unwrap();
    let mut claim = async |receivers| {
        make_due(&app).await;
        outbox::claim(&mut db, receivers, 10).await.unwrap()
    };
    let mut settling = app.state.pool.acquire().await.unwrap();
    let mut settle = async |claimed: &Claimed, outcome: Outcome| {
        let settled = outbox::settle(&mut settling, claimed, &outcome).await;
        assert!(settled.unwrap().is_some(), "{outcome:?}");
    };
    assert!(claim(Receivers::Failing).await.is_empty());
    let claimed = claim(Receivers::Answering).await;
    assert_eq!(claimed.len(), 3);
    let failed = || Outcome::Failed {
        status: None,
        error: "no answer".to_owned(),
        gone: false,
    };
    settle(&claimed[0], failed()).await;
    for other in &claimed[1..] {
        settle(other, Outcome::BrokenOff).await;
    }
    assert!(claim(Receivers::Answering).await.is_empty());
    let claimed = claim(Receivers::Failing).await;
    assert_eq!(claimed.len(), 1);
    assert!(claim(Receivers::Failing).await.is_empty());
    // Once one message arrives, the others may be sent too.
    settle(&claimed[0], Outcome::Delivered { status: 200 }).await;
    assert!(claim(Receivers::Failing).await.is_empty());
    assert_eq!(claim(Receivers::Answering).await.len(), 2);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn of_those_that_claim_at_once_each_has_its_own(pool: PgPool) {
    let app = opened(pool);
    for _ in 0..5 {
        let webhook = register(&app, "http://127.0.0.1:9/").await;
        for _ in 0..4 {
            send_test(&app, &webhook).await;
        }
    }
    let claims = (0..8).map(|_| async {
        let mut db = app.state.pool.acquire().await.unwrap();
        outbox::claim(&mut db, Receivers::Answering, 3)
            .await
            .unwrap()
    });
    let claimed: Vec<_> = join_all(claims).await.into_iter().flatten().collect();
    let ids: BTreeSet<_> = claimed.iter().map(|message| message.id).collect();
    assert!(ids.len() == claimed.len() && !ids.is_empty(), "{claimed:?}");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_a_dead_deliverer_had_is_delivered_by_another(pool: PgPool) {
    let app = opened(pool);
    let receiver = Receiver::default();
    let webhook = register(&app, &format!("http://{}/", receiver.listen().await)).await;
    let delivery = send_test(&app, &webhook).await;
    let mut db = app.state.pool.acquire().await.unwrap();
    // Then its process dies.
    let claimed = outbox::claim(&mut db, Receivers::Answering, 10)
        .await
        .unwrap();
    assert_eq!(claimed.len(), 1);
    let none = outbox::claim(&mut db, Receivers::Answering, 10)
        .await
        .unwrap();
    assert!(none.is_empty(), "{none:?}");

    let deliverer = Deliverer::start(&app);
    let next = send_test(&app, &webhook).await;
    until(&app, &next, delivered).await;
    assert_eq!(receiver.ids(), [next["id"].as_str().unwrap()]);
    sql(
        &app,
        "UPDATE webhook_delivery SET lease_until = now() WHERE lease_until IS NOT NULL",
    )
    .await;
    let done = until(&app, &delivery, delivered).await;
    assert_eq!(done["attempt"], 2);
    // The process was not dead after all, but it is too late.
    let error = "the receiver answered 500".to_owned();
    let late = Outcome::Failed {
        status: Some(500),
        error,
        gone: true,
    };
    assert_eq!(
        outbox::settle(&mut db, &claimed[0], &late).await.unwrap(),
        None
    );
    assert_eq!(until(&app, &delivery, delivered).await, done);
    let seen = app.get(&below(&webhook, "")).await.ok(200);
    assert_eq!(
        (&seen["failing_since"], &seen["disabled_at"]),
        (&Value::Null, &Value::Null)
    );
    deliverer.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_was_given_up_or_delivered_is_sent_once_more_when_asked(pool: PgPool) {
    let app = opened(pool);
    let deliverer = Deliverer::start(&app);
    let receiver = Receiver::answering([503]);
    let webhook = register(&app, &format!("http://{}/", receiver.listen().await)).await;
    let delivery = send_test(&app, &webhook).await;
    until(&app, &delivery, tried).await;
    // This is the last of its tries.
    receiver.answers.lock().unwrap().push_back(503);
    sql(
        &app,
        "UPDATE webhook_delivery SET attempt = 16, next_at = now()",
    )
    .await;
    let failed = until(&app, &delivery, |it| it["state"] == "failed").await;
    assert_eq!(
        (&failed["attempt"], &failed["last_status"]),
        (&json!(17), &json!(503))
    );
    assert!(failed["finished_at"].is_string());

    let again = format!("/deliveries/{}/redeliver", delivery["id"].as_str().unwrap());
    let again = below(&webhook, &again);
    let asked = app.post_empty(&again).await.ok(202);
    assert_eq!(
        (&asked["state"], &asked["attempt"]),
        (&json!("pending"), &json!(0))
    );
    until(&app, &delivery, delivered).await;
    app.post_empty(&again).await.ok(202);
    let done = until(&app, &delivery, |it| {
        delivered(it) && receiver.got().len() == 4
    })
    .await;
    assert_eq!(done["attempt"], 1);
    let id = delivery["id"].as_str().unwrap();
    assert_eq!(receiver.ids(), [id; 4]);

    // The delivery was long ago.
    let mut db = app.state.pool.acquire().await.unwrap();
    assert_eq!(outbox::forget(&mut db).await.unwrap(), 0);
    sql(
        &app,
        "UPDATE webhook_delivery SET finished_at = now() - interval '31 days'",
    )
    .await;
    assert_eq!(outbox::forget(&mut db).await.unwrap(), 1);
    app.post_empty(&again)
        .await
        .problem(404, "delivery_not_found");
    deliverer.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_receiver_that_is_gone_is_told_nothing_until_it_is_enabled(pool: PgPool) {
    let app = opened(pool);
    let receiver = Receiver::answering([410]);
    let webhook = register(&app, &format!("http://{}/", receiver.listen().await)).await;
    let delivery = send_test(&app, &webhook).await;
    let deliverer = Deliverer::start(&app);
    let failed = until(&app, &delivery, |it| it["state"] == "failed").await;
    assert_eq!(
        (&failed["attempt"], &failed["last_status"]),
        (&json!(1), &json!(410))
    );
    let disabled = async {
        loop {
            let seen = app.get(&below(&webhook, "")).await.ok(200);
            if seen["disabled_at"].is_string() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), disabled)
        .await
        .unwrap();
    app.post_empty(&below(&webhook, "/test"))
        .await
        .problem(409, "webhook_disabled");
    let again = format!("/deliveries/{}/redeliver", delivery["id"].as_str().unwrap());
    let again = below(&webhook, &again);
    app.post_empty(&again)
        .await
        .problem(409, "webhook_disabled");
    let enabled = patch(&app, &webhook, &json!({"disabled": false}))
        .await
        .ok(200);
    assert_eq!(enabled["failing_since"], Value::Null);
    app.post_empty(&again).await.ok(202);
    until(&app, &delivery, delivered).await;
    deliverer.stop().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn names_of_private_addresses_and_redirects_lead_nowhere(pool: PgPool) {
    let app = opened(pool);
    let secret = Receiver::default();
    let inside = secret.listen().await;
    let outside = Receiver {
        location: Some(format!("http://{inside}/")),
        ..Receiver::answering([301, 302, 303, 307, 308])
    };
    let outside_at = outside.listen().await;
    // Loopback is not opened to this app, except for one port of one name.
    let names = Names::new(&[&["127.0.0.1", "::1", "::ffff:127.0.0.1"]]);
    let opening = format!("public.test:{}", outside_at.port());
    let client = Client::with_names(network(&[&opening]), names).unwrap();
    let deliverer = Deliverer::with(&app, client);

    let rebinding = register(&app, &format!("http://rebinding.test:{}/", inside.port())).await;
    let delivery = send_test(&app, &rebinding).await;
    let failed = until(&app, &delivery, tried).await;
    assert_eq!(
        failed["last_error"],
        "`rebinding.test` has no public address"
    );
    assert_eq!(failed["last_status"], Value::Null);
    // The address was opened when the webhook was registered, and no longer is.
    let literal = register(&app, &format!("http://{inside}/")).await;
    let delivery = send_test(&app, &literal).await;
    let failed = until(&app, &delivery, tried).await;
    assert_eq!(failed["last_error"], "`127.0.0.1` has no public address");

    let redirecting = register(&app, &format!("http://{opening}/")).await;
    let delivery = send_test(&app, &redirecting).await;
    for status in [301, 302, 303, 307, 308] {
        let failed = until(&app, &delivery, |it| it["last_status"] == status).await;
        assert!(tried(&failed), "{failed}");
        make_due(&app).await;
    }
    until(&app, &delivery, delivered).await;
    assert!(secret.got().is_empty());
    deliverer.stop().await;
}

//! One job shared by several workers: its shards are claimed, lost and stored one by one, and outlast an attempt.

use std::sync::atomic::Ordering;
use std::time::Duration;

use promptweave::blobs::BlobStore;
use promptweave::db::MIGRATOR;
use promptweave::jobs::lease::RenewOutcome;
use promptweave::jobs::queue;
use promptweave::jobs::queue::{Claimed, QueueError};
use promptweave::jobs::shards;
use promptweave::jobs::shards::{ClaimedShard, GivenBack, Owner};
use promptweave_domain::digest::Digest;
use promptweave_domain::job::{JobState, Progress};
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::{Estimate, Shard};
use serde_json::json;
use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};
use tempfile::TempDir;
use uuid::Uuid;

use crate::ensembles::{Worker, furnished, post, request, until_state, url};
use crate::fixtures::{FakeComposer, Script, enqueue, job, spec, worker};
use crate::worker::until;

/// The arithmetic of the owner and its helpers.
const ARITHMETIC: &str = "cpu, f32";
const LEASE: Duration = Duration::from_secs(3600);

async fn run_out(db: &mut PgConnection, table: &str, token: Uuid) {
    let over = format!(
        "UPDATE {table} SET lease_until = now() - interval '1 second' WHERE lease_token = $1"
    );
    let over = sqlx::query(sqlx::AssertSqlSafe(over)).bind(token);
    assert_eq!(over.execute(db).await.unwrap().rows_affected(), 1);
}

fn lost<T: std::fmt::Debug>(answer: Result<T, QueueError>) -> bool {
    matches!(answer, Err(QueueError::LeaseLost(_)))
}

/// A job with an owner, whose features have `count` shards.
struct Shared {
    db: PoolConnection<Postgres>,
    blobs: BlobStore,
    file: Digest,
    owner: Owner,
    claimed: Claimed,
    _dir: TempDir,
}

impl Shared {
    async fn new(mut db: PoolConnection<Postgres>, count: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::directory(dir.path()).unwrap();
        let spec = spec(&mut db).await;
        enqueue(&mut db, &spec).await;
        let worker_id = worker(&mut db).await;
        let claimed = queue::claim(&mut db, worker_id, LEASE).await;
        let claimed = claimed.unwrap().unwrap();
        let owner = Owner {
            lease: claimed.lease,
            worker_id,
            arithmetic: ARITHMETIC.to_owned(),
        };
        let laid_out = shards::lay_out(&mut db, &owner, Phase::Features, count);
        assert_eq!(laid_out.await.unwrap(), count);
        Self {
            file: blobs.put_bytes("a shard").await.unwrap().digest,
            db,
            blobs,
            owner,
            claimed,
            _dir: dir,
        }
    }

    async fn helps(&mut self) -> Option<ClaimedShard> {
        let helper = worker(&mut self.db).await;
        shards::claim(&mut self.db, helper, ARITHMETIC, LEASE)
            .await
            .unwrap()
    }

    async fn take(&mut self) -> Option<usize> {
        let taken = shards::take(&mut self.db, &self.owner, Phase::Features);
        taken.await.unwrap()
    }

    async fn give(&mut self, claimed: &ClaimedShard) -> Result<(), QueueError> {
        shards::give(&mut self.db, &self.blobs, claimed, &self.file).await
    }

    async fn put(&mut self, index: usize, count: usize) -> Result<(), QueueError> {
        let shard = Shard {
            phase: Phase::Features,
            index,
            count,
        };
        shards::put(&mut self.db, &self.blobs, &self.owner, shard, &self.file).await
    }

    async fn there(&mut self) -> Vec<bool> {
        let there = shards::there(&mut self.db, self.claimed.lease.job_id, Phase::Features);
        let files = there.await.unwrap().files;
        files.iter().map(Option::is_some).collect()
    }

    async fn count(&mut self, kind: &str) -> i64 {
        let query = "SELECT count(*) FROM job_event WHERE job_id = $1 AND kind = $2";
        let query = sqlx::query_scalar(query).bind(self.claimed.lease.job_id);
        query.bind(kind).fetch_one(&mut *self.db).await.unwrap()
    }
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn every_shard_is_somebodys_once_and_is_stored_once(db: PoolConnection<Postgres>) {
    let mut shared = Shared::new(db, 3).await;
    assert_eq!(shared.take().await, Some(0));
    let (first, second) = (shared.helps().await.unwrap(), shared.helps().await.unwrap());
    assert_eq!((first.shard.index, second.shard.index), (1, 2));
    assert_eq!(first.shard.count, 3);
    assert!(shared.helps().await.is_none());

    shared.give(&second).await.unwrap();
    assert!(lost(shared.give(&second).await), "it has been given");
    shared.put(0, 3).await.unwrap();
    // This is what happens after a commit whose answer was lost.
    shared.put(0, 3).await.unwrap();
    assert_eq!(shared.there().await, [true, false, true]);
    assert_eq!(shared.count("shard").await, 2);
    let (lease, blobs) = (shared.claimed.lease, shared.blobs.clone());
    let missing = Digest::of(b"nowhere");
    let refused = shards::give(&mut shared.db, &blobs, &first, &missing).await;
    assert!(
        matches!(refused, Err(QueueError::Registry(_))),
        "{refused:?}"
    );

    // A phase is laid out once, whatever is asked for later. A shard that is not needed is taken from its helper.
    let again = shards::lay_out(&mut shared.db, &shared.owner, Phase::Features, 7);
    assert_eq!(again.await.unwrap(), 3);
    let end = shards::end(&mut shared.db, lease, Phase::Features);
    end.await.unwrap();
    assert!(lost(shared.give(&first).await));
    assert!(lost(first.lease.renew(&mut shared.db, LEASE).await));
    assert_eq!(shared.there().await, [true, true]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_lost_helper_costs_its_shard_and_writes_nothing(db: PoolConnection<Postgres>) {
    let mut shared = Shared::new(db, 2).await;
    let half = Progress {
        phase: Phase::Features,
        done: 1,
        total: 2,
    };
    for attempt in 1..=3 {
        let claimed = shared.helps().await.unwrap();
        assert_eq!(claimed.shard.index, 0);
        run_out(&mut shared.db, "job_shard", claimed.lease.token).await;
        // It is too late, even before anybody notices.
        assert!(lost(shared.give(&claimed).await));
        assert_eq!(shards::reap(&mut shared.db).await.unwrap(), 1);
        assert_eq!(shards::reap(&mut shared.db).await.unwrap(), 0);
        assert!(lost(claimed.lease.progress(&mut shared.db, half).await));
        assert_eq!(shared.count("shard_lost").await, attempt);
    }
    // After helpers have died of a shard, it is left to the owner.
    assert_eq!(shared.helps().await.unwrap().shard.index, 1);
    assert!(shared.helps().await.is_none());
    assert_eq!(shared.take().await, Some(0));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_a_helper_gives_back_is_somebody_elses(db: PoolConnection<Postgres>) {
    let mut shared = Shared::new(db, 2).await;
    for _ in 0..5 {
        let claimed = shared.helps().await.unwrap();
        let back = shards::give_back(&mut shared.db, claimed.lease, GivenBack::Released);
        back.await.unwrap();
        let again = shards::give_back(&mut shared.db, claimed.lease, GivenBack::Failed);
        assert!(lost(again.await));
    }
    let claimed = shared.helps().await.unwrap();
    assert_eq!(claimed.shard.index, 0);
    let back = shards::give_back(&mut shared.db, claimed.lease, GivenBack::Refused);
    back.await.unwrap();
    assert_eq!(shared.helps().await.unwrap().shard.index, 1);
    assert_eq!(shared.take().await, Some(0));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn shards_outlast_the_attempt_and_end_with_the_job(db: PoolConnection<Postgres>) {
    let mut shared = Shared::new(db, 4).await;
    let id = shared.claimed.lease.job_id;
    assert_eq!(shared.take().await, Some(0));
    shared.put(0, 4).await.unwrap();
    assert_eq!(shared.take().await, Some(1));
    let helper = shared.helps().await.unwrap();
    assert_eq!(helper.shard.index, 2);

    // The owner is lost: its shard waits again, finished ones stay, and the helper continues.
    let stale = shared.claimed.lease;
    run_out(&mut shared.db, "job", stale.token).await;
    queue::reap(&mut shared.db).await.unwrap();
    assert!(lost(shared.put(1, 4).await));
    let estimate = Estimate {
        shards_done: 1,
        shards: 4,
        samples: 50,
        source_weights: vec![],
        h_score: 1.0,
        gradient_alignment: 0.0,
    };
    assert!(lost(
        shards::estimate(&mut shared.db, stale, &estimate).await
    ));
    assert!(shared.helps().await.is_none(), "nobody merges just now");
    let renewed = helper.lease.renew(&mut shared.db, LEASE).await;
    assert_eq!(renewed.unwrap(), RenewOutcome::Renewed);
    shared.give(&helper).await.unwrap();

    shared.owner.worker_id = worker(&mut shared.db).await;
    let next = queue::claim(&mut shared.db, shared.owner.worker_id, LEASE).await;
    shared.claimed = next.unwrap().unwrap();
    shared.owner.lease = shared.claimed.lease;
    let again = shards::lay_out(&mut shared.db, &shared.owner, Phase::Features, 9);
    assert_eq!(again.await.unwrap(), 4);
    assert_eq!(shared.there().await, [true, false, true, false]);
    assert_eq!(shared.take().await, Some(1));
    let helper = shared.helps().await.unwrap();
    let lease = shared.claimed.lease;
    shards::estimate(&mut shared.db, lease, &estimate)
        .await
        .unwrap();
    assert_eq!(shared.count("estimate").await, 1);

    queue::finish_cancelled(&mut shared.db, lease)
        .await
        .unwrap();
    assert_eq!(job(&mut shared.db, id).await.state, JobState::Cancelled);
    assert!(lost(shared.give(&helper).await));
    assert_eq!(shared.there().await, [false; 0]);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn only_equal_numbers_go_together_and_gradients_need_all_features(
    db: PoolConnection<Postgres>,
) {
    let mut shared = Shared::new(db, 2).await;
    let other = worker(&mut shared.db).await;
    let claimed = shards::claim(&mut shared.db, other, "cuda, bf16", LEASE).await;
    assert!(claimed.unwrap().is_none());
    assert_eq!(shared.take().await, Some(0));
    shared.put(0, 2).await.unwrap();

    // They are laid out while features are missing, so nobody may begin.
    let gradients = shards::lay_out(&mut shared.db, &shared.owner, Phase::Gradients, 3);
    assert_eq!(gradients.await.unwrap(), 3);
    let helping = shared.helps().await.unwrap();
    assert_eq!(
        (helping.shard.phase, helping.shard.index),
        (Phase::Features, 1)
    );
    assert!(shared.helps().await.is_none());
    // If the features were stored whole, nobody needs to compute their shards.
    let (owner, blobs, file) = (shared.owner.clone(), shared.blobs.clone(), shared.file);
    let whole = shards::put_whole(&mut shared.db, &blobs, &owner, Phase::Features, &file);
    whole.await.unwrap();
    assert!(lost(shared.give(&helping).await));
    let helping = shared.helps().await.unwrap();
    assert_eq!(
        (helping.shard.phase, helping.shard.index),
        (Phase::Gradients, 0)
    );
    assert_eq!(helping.features, [file]);

    // A missing file is computed again, by the owner.
    let discard = shards::discard(&mut shared.db, &owner, Phase::Features, 0);
    discard.await.unwrap();
    assert_eq!(shared.take().await, Some(0));
    // An owner that lost the answer asks again, and gets the same shard.
    assert_eq!(shared.take().await, Some(0));

    // A worker with another arithmetic starts from the beginning.
    shared.owner.arithmetic = "cuda, bf16".to_owned();
    let anew = shards::lay_out(&mut shared.db, &shared.owner, Phase::Features, 2);
    assert_eq!(anew.await.unwrap(), 2);
    assert_eq!(shared.there().await, [false, false]);
    assert!(lost(shared.give(&helping).await));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_idle_worker_helps_with_the_job_of_another(pool: PgPool) {
    let app = furnished(pool).await;
    let sharing = |scripts: Vec<Script>| FakeComposer {
        shards: 6,
        ..FakeComposer::playing(scripts)
    };
    // The owner stays at its first shard until the others are finished.
    let (owner, helper) = (sharing(vec![Script::UntilOpened]), sharing(vec![]));
    let ensemble = post(&app, &request()).await.ok(202);
    let first = Worker::start(&app, &owner);
    until_state(&app, &ensemble, "running").await;
    let second = Worker::start(&app, &helper);
    until("five shards", || async {
        helper.computed.lock().unwrap().len() == 5
    })
    .await;
    owner.gate.store(true, Ordering::SeqCst);
    until_state(&app, &ensemble, "succeeded").await;
    // Each shard was computed by whichever worker was first.
    let mut computed = owner.computed.lock().unwrap().clone();
    assert_eq!(computed.len(), 1);
    computed.extend(helper.computed.lock().unwrap().iter());
    computed.sort_unstable();
    assert_eq!(computed, [0, 1, 2, 3, 4, 5]);
    let events = app.get(&url(&ensemble, "events")).await.ok(200);
    let events = events["items"].as_array().unwrap();
    let shards = events.iter().filter(|event| event["kind"] == "shard");
    assert_eq!(shards.count(), 6);

    // The helper stops with the owner.
    let mut other = request();
    other["target"]["seed"] = json!(1);
    for fake in [&owner, &helper] {
        fake.scripts.lock().unwrap().push_back(Script::UntilStopped);
    }
    let ensemble = post(&app, &other).await.ok(202);
    let working = async || {
        let helping = "SELECT count(*) FROM job_shard WHERE lease_until IS NOT NULL AND done > 0";
        let helping = sqlx::query_scalar(helping).fetch_one(&app.state.pool).await;
        helping.unwrap_or(0i64) == 1
    };
    until("both at work", working).await;
    app.post_empty(&url(&ensemble, "cancel")).await.ok(202);
    until_state(&app, &ensemble, "cancelled").await;
    let busy = async || {
        let busy = "SELECT count(*) FROM worker WHERE state = 'busy'";
        sqlx::query_scalar(busy)
            .fetch_one(&app.state.pool)
            .await
            .unwrap_or(1i64)
            == 0
    };
    until("both idle", busy).await;
    first.stop().await;
    second.stop().await;
}

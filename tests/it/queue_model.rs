//! The queue's statements in any order, compared with a small model: what a lease allows, and that a worker which lost
//! it changes nothing.
//!
//! Each statement is a transaction that locks the job's row first, so concurrent statements run one after the other.
//! Any order of several workers' statements is therefore any interleaving. `PROPTEST_CASES=10000` runs that many; `make
//! test` runs a few hundred.

use std::time::Duration;

use promptweave::blobs::BlobStore;
use promptweave::db::MIGRATOR;
use promptweave::jobs::finish::{Finished, NewPrompt, finish};
use promptweave::jobs::lease::RenewOutcome;
use promptweave::jobs::queue;
use promptweave::jobs::queue::{Claimed, QueueError};
use promptweave::jobs::requests;
use promptweave::jobs::requests::Cancellation;
use promptweave::registry::DEFAULT_PROJECT;
use promptweave_domain::job::{EnsembleSpec, JobError, JobState, MAX_ATTEMPTS, Progress};
use promptweave_domain::phase::Phase;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::words::JobErrorCode;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::fixtures::{composition, enqueue, job, sources_of, spec, worker};

const JOBS: usize = 2;
const CASES: u32 = 300;
/// The lease is longer than a case takes.
const LEASE: Duration = Duration::from_secs(3600);

#[derive(Clone, Copy, Debug)]
enum Step {
    Claim,
    /// The lease that was given out as the n-th, counted back from the last.
    Renew(usize),
    Progress(usize),
    Finish(usize),
    Fail(usize, bool),
    Release(usize),
    FinishCancelled(usize),
    /// A job's lease runs out.
    RunOut(usize),
    Reap,
    Cancel(usize),
    Retry(usize),
}

fn step() -> impl Strategy<Value = Step> {
    // Old leases are chosen as often as the newest, because zombies have old ones.
    let lease = 0..4usize;
    let job = 0..JOBS;
    prop_oneof![
        5 => Just(Step::Claim),
        2 => lease.clone().prop_map(Step::Renew),
        2 => lease.clone().prop_map(Step::Progress),
        3 => lease.clone().prop_map(Step::Finish),
        2 => (lease.clone(), any::<bool>()).prop_map(|(lease, again)| Step::Fail(lease, again)),
        1 => lease.clone().prop_map(Step::Release),
        1 => lease.prop_map(Step::FinishCancelled),
        3 => job.clone().prop_map(Step::RunOut),
        3 => Just(Step::Reap),
        1 => job.clone().prop_map(Step::Cancel),
        1 => job.prop_map(Step::Retry),
    ]
}

/// The expected state of a job.
#[derive(Clone, Debug, PartialEq)]
struct Model {
    state: JobState,
    attempt: i32,
    max_attempts: i32,
    cancel_requested: bool,
    /// The lease that holds the job, and whether it has run out.
    held: Option<(usize, bool)>,
    /// The lease whose result the job has.
    result: Option<usize>,
}

impl Model {
    fn new() -> Self {
        Self {
            state: JobState::Queued,
            attempt: 0,
            max_attempts: MAX_ATTEMPTS,
            cancel_requested: false,
            held: None,
            result: None,
        }
    }

    fn holds(&self, lease: usize) -> bool {
        self.held.is_some_and(|(held, _)| held == lease)
    }

    fn leave(&mut self, state: JobState) {
        self.held = None;
        self.state = state;
    }

    /// Ends an attempt that another one may follow.
    fn again(&mut self) {
        self.leave(match () {
            () if self.cancel_requested => JobState::Cancelled,
            () if self.attempt >= self.max_attempts => JobState::Failed,
            () => JobState::Queued,
        });
    }
}

struct Run<'a> {
    db: &'a mut PgConnection,
    blobs: &'a BlobStore,
    spec: &'a EnsembleSpec,
    worker: Uuid,
    ids: Vec<Uuid>,
    models: Vec<Model>,
    /// All leases that were given out, and the job of each.
    leases: Vec<(Claimed, usize)>,
}

/// The weight that distinguishes the n-th lease's answer from every other's.
fn weight(lease: usize) -> f64 {
    (lease + 1) as f64 / 1024.0
}

impl Run<'_> {
    async fn step(&mut self, step: Step) {
        match step {
            Step::Claim => self.claim().await,
            Step::Renew(back) => {
                if let Some((n, claimed, model)) = lease(&self.leases, &mut self.models, back) {
                    let answer = claimed.lease.renew(self.db, LEASE).await;
                    check(model, n, answer.map(Some));
                    if model.holds(n) {
                        model.held = Some((n, false));
                    }
                }
            }
            Step::Progress(back) => {
                if let Some((n, claimed, model)) = lease(&self.leases, &mut self.models, back) {
                    let progress = Progress {
                        phase: Phase::Gradients,
                        done: 1,
                        total: 2,
                    };
                    let answer = claimed.lease.progress(self.db, progress).await;
                    check(model, n, answer.map(Some));
                }
            }
            Step::Finish(back) => self.finish(back).await,
            Step::Fail(back, again) => {
                if let Some((n, claimed, model)) = lease(&self.leases, &mut self.models, back) {
                    let error = JobError::new(JobErrorCode::Libtorch, "no room");
                    let backoff = again.then_some(Duration::ZERO);
                    let answer = queue::fail(self.db, claimed.lease, error, backoff).await;
                    let state = answer.as_ref().ok().copied();
                    if check(model, n, answer.map(|_| None)) {
                        match again {
                            true => model.again(),
                            false => model.leave(JobState::Failed),
                        }
                        assert_eq!(state, Some(model.state));
                    }
                }
            }
            Step::Release(back) => {
                if let Some((n, claimed, model)) = lease(&self.leases, &mut self.models, back) {
                    let answer = queue::release(self.db, claimed.lease).await;
                    if check(model, n, answer.map(|()| None)) {
                        match model.cancel_requested {
                            true => model.leave(JobState::Cancelled),
                            false => {
                                model.attempt -= 1;
                                model.leave(JobState::Queued);
                            }
                        }
                    }
                }
            }
            Step::FinishCancelled(back) => {
                if let Some((n, claimed, model)) = lease(&self.leases, &mut self.models, back) {
                    let answer = queue::finish_cancelled(self.db, claimed.lease).await;
                    if check(model, n, answer.map(|()| None)) {
                        model.leave(JobState::Cancelled);
                    }
                }
            }
            Step::RunOut(at) => {
                let over = "UPDATE job SET lease_until = now() - interval '1 second'
                            WHERE id = $1 AND state = 'running'";
                let query = sqlx::query(over).bind(self.ids[at]);
                query.execute(&mut *self.db).await.unwrap();
                if let Some((_, over)) = &mut self.models[at].held {
                    *over = true;
                }
            }
            Step::Reap => {
                let reaped = queue::reap(self.db).await.unwrap();
                let mut expected = 0;
                for (id, model) in self.ids.iter().zip(&mut self.models) {
                    if model.held.is_some_and(|(_, over)| over) {
                        model.again();
                        let said = reaped.iter().find(|it| it.job_id == *id);
                        assert_eq!(said.unwrap().state, model.state);
                        expected += 1;
                    }
                }
                assert_eq!(reaped.len(), expected);
            }
            Step::Cancel(at) => self.cancel(at).await,
            Step::Retry(at) => {
                let model = &mut self.models[at];
                let answer = requests::retry(self.db, DEFAULT_PROJECT, self.ids[at]).await;
                match answer.unwrap().unwrap() {
                    Ok(()) => {
                        assert!([JobState::Failed, JobState::Cancelled].contains(&model.state));
                        model.leave(JobState::Queued);
                        model.cancel_requested = false;
                        model.max_attempts = model.attempt + MAX_ATTEMPTS;
                    }
                    Err(state) => {
                        assert_eq!(state, model.state);
                        assert!(![JobState::Failed, JobState::Cancelled].contains(&state));
                    }
                }
            }
        }
    }

    async fn claim(&mut self) {
        let claimed = queue::claim(self.db, self.worker, LEASE).await.unwrap();
        let Some(claimed) = claimed else {
            let waits = |model: &Model| model.state == JobState::Queued;
            assert!(!self.models.iter().any(waits), "a job waits");
            return;
        };
        let ids = &mut self.ids.iter();
        let at = ids.position(|id| *id == claimed.lease.job_id).unwrap();
        let model = &mut self.models[at];
        assert_eq!(model.state, JobState::Queued);
        model.state = JobState::Running;
        model.attempt += 1;
        assert_eq!(claimed.attempt, model.attempt);
        model.held = Some((self.leases.len(), false));
        self.leases.push((claimed, at));
    }

    async fn finish(&mut self, back: usize) {
        let Some((n, claimed, model)) = lease(&self.leases, &mut self.models, back) else {
            return;
        };
        let weights = [weight(n), 1.0 - weight(n)];
        let composed = composition(&sources_of(self.spec), &weights);
        let file = PromptFile::parse(&composed.composed).unwrap();
        let finished = Finished::Ensemble {
            spec: self.spec,
            result: &composed.result,
            composed: NewPrompt {
                bytes: &composed.composed,
                metadata: file.metadata.as_ref().unwrap(),
                file: &file,
                output: &self.spec.output.parse().unwrap(),
            },
            ensemble: None,
            statistics: self.blobs.put_bytes("statistics").await.unwrap().digest,
        };
        let answer = finish(self.db, self.blobs, claimed, finished).await;
        // The lease has run out, even if it is not reaped yet.
        if model.held == Some((n, true)) {
            assert!(matches!(answer, Err(QueueError::LeaseLost(_))));
        } else if check(model, n, answer.map(|()| None)) {
            assert_eq!(model.result, None, "a second result");
            model.leave(JobState::Succeeded);
            model.result = Some(n);
        }
    }

    async fn cancel(&mut self, at: usize) {
        let model = &mut self.models[at];
        let answer = requests::cancel(self.db, DEFAULT_PROJECT, self.ids[at]).await;
        let expected = match model.state {
            JobState::Queued => {
                model.leave(JobState::Cancelled);
                model.cancel_requested = true;
                Cancellation::Cancelled
            }
            JobState::Running => {
                model.cancel_requested = true;
                Cancellation::Requested
            }
            over => Cancellation::AlreadyOver(over),
        };
        assert_eq!(answer.unwrap().unwrap(), expected);
    }

    /// Checks that every job is as in its model, with the one result that it may have.
    async fn compare(&mut self) {
        for (id, model) in self.ids.iter().zip(&self.models) {
            let found = job(self.db, *id).await;
            let held = sqlx::query_scalar("SELECT lease_token FROM job WHERE id = $1").bind(id);
            let token: Option<Uuid> = held.fetch_one(&mut *self.db).await.unwrap();
            let seen = (found.state, found.attempt, found.max_attempts, token);
            let holder = model.held.map(|(n, _)| self.leases[n].0.lease.token);
            assert_eq!(
                seen,
                (model.state, model.attempt, model.max_attempts, holder)
            );
            assert_eq!(found.cancel_requested, model.cancel_requested);
            let answer = found.result.map(|it| it.source_weights[0].weight);
            assert_eq!(answer, model.result.map(weight));
        }
    }

    /// Checks the records: one attempt per claim, open while it runs, and events without a gap.
    async fn check_records(&mut self) {
        let records = "SELECT
                (SELECT count(*) FROM job_attempt WHERE job_id = $1),
                (SELECT count(*) FROM job_attempt WHERE job_id = $1 AND ended_at IS NULL),
                (SELECT count(*) - max(seq) FROM job_event WHERE job_id = $1),
                (SELECT count(*) FROM prompt_version WHERE produced_by_job = $1)";
        for (at, (id, model)) in self.ids.iter().zip(&self.models).enumerate() {
            let query = sqlx::query_as(records).bind(id);
            let found: (i64, i64, i64, i64) = query.fetch_one(&mut *self.db).await.unwrap();
            let claims = self.leases.iter().filter(|(_, job)| *job == at).count();
            let running = i64::from(model.state == JobState::Running);
            assert_eq!((found.0, found.1, found.2), (claims as i64, running, 0));
            // Equal bytes under one name are one version, which another case may have published.
            assert!(found.3 <= i64::from(model.result.is_some()));
        }
    }
}

/// The lease that was given out `back` before the last, and the model of its job.
fn lease<'a>(
    leases: &'a [(Claimed, usize)],
    models: &'a mut [Model],
    back: usize,
) -> Option<(usize, &'a Claimed, &'a mut Model)> {
    let n = leases.len().checked_sub(back + 1)?;
    let (claimed, at) = &leases[n];
    Some((n, claimed, &mut models[*at]))
}

/// Checks an answer, which must say whether the lease held.
fn check(model: &Model, lease: usize, answer: Result<Option<RenewOutcome>, QueueError>) -> bool {
    match answer {
        Ok(renewal) => {
            assert!(model.holds(lease), "a lost lease wrote");
            if let Some(renewal) = renewal {
                let asked = renewal == RenewOutcome::CancelRequested;
                assert_eq!(asked, model.cancel_requested);
            }
            true
        }
        Err(QueueError::LeaseLost(_)) => {
            assert!(!model.holds(lease), "a lease that holds was refused");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

async fn case(db: &mut PgConnection, blobs: &BlobStore, spec: &EnsembleSpec, steps: Vec<Step>) {
    let worker = worker(db).await;
    let mut ids = Vec::new();
    for _ in 0..JOBS {
        ids.push(enqueue(db, spec).await);
    }
    let mut run = Run {
        db,
        blobs,
        spec,
        worker,
        models: vec![Model::new(); JOBS],
        ids,
        leases: Vec::new(),
    };
    for step in steps {
        run.step(step).await;
        run.compare().await;
    }
    run.check_records().await;
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn any_order_of_the_statements_is_as_the_model(pool: PgPool) {
    let handle = tokio::runtime::Handle::current();
    let run = move || {
        let cases = std::env::var("PROPTEST_CASES").ok();
        let config = Config {
            cases: cases.map_or(CASES, |cases| cases.parse().expect("a number")),
            failure_persistence: None,
            ..Config::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::directory(dir.path()).unwrap();
        let mut db = handle.block_on(pool.acquire()).unwrap();
        let spec = handle.block_on(spec(&mut db));
        let db = std::cell::RefCell::new(db);
        let steps = prop::collection::vec(step(), 1..30);
        let ran = TestRunner::new(config).run(&steps, |steps| {
            let mut db = db.borrow_mut();
            handle.block_on(async {
                // This removes what the previous case left, which may have failed in the middle.
                let left = "UPDATE job SET state = 'cancelled', finished_at = now(),
                                lease_token = NULL, lease_until = NULL
                            WHERE state IN ('queued', 'running')";
                sqlx::query(left).execute(&mut **db).await.unwrap();
                case(&mut db, &blobs, &spec, steps).await;
            });
            Ok(())
        });
        ran.unwrap_or_else(|failed| panic!("{failed}"));
    };
    tokio::task::spawn_blocking(run).await.unwrap();
}

//! The one OS thread that owns the composer. An engine's tensors may not be shared between threads, and its calls block
//! for seconds, which an async task must not do.

use std::any::Any;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use promptweave_domain::composer::{
    Composer, Composition, CompositionError, Observer, Platform, blames_the_device,
};
use promptweave_domain::composition::{CompositionInput, SolveInput};
use promptweave_domain::job::Progress;
use promptweave_domain::phase::Phase;
use promptweave_domain::prediction::{Predicted, PredictionInput};
use promptweave_domain::ranking::Ranking;
use promptweave_domain::sharding::{ShardInput, Shards};
use promptweave_domain::tuning::{Checkpoints, NoCheckpoints, Tuned, TuningInput};
use promptweave_domain::words::JobErrorCode;

/// The longest start: CUDA's libraries may come from a slow disk, but a device that hangs never starts.
const STARTS_WITHIN: Duration = Duration::from_secs(300);

/// Makes a composer on the thread that will own it; called again after a panic.
pub type NewComposer =
    Box<dyn Fn() -> Result<Box<dyn Composer>, CompositionError> + Send + Sync + 'static>;

/// Why a composition should stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    Cancelled,
    LeaseLost,
    Shutdown,
    Stalled,
}

/// A request to stop a composition; the first reason given stays.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    reason: Arc<OnceLock<StopReason>>,
    asked: CancellationToken,
}

impl Stop {
    pub fn because(&self, reason: StopReason) {
        if self.reason.set(reason).is_ok() {
            self.asked.cancel();
        }
    }

    pub fn reason(&self) -> Option<StopReason> {
        self.reason.get().copied()
    }

    pub async fn asked(&self) {
        self.asked.cancelled().await;
    }
}

/// The latest progress, and the time it was reported.
pub type Watched = (Option<Progress>, Instant);

/// The observer on the composer's thread: reports progress, and says when to stop.
struct Watcher {
    stop: Stop,
    progress: watch::Sender<Watched>,
    attempt_state: AttemptState,
}

/// The state of a job that outlasts an attempt; each kind of work has its own.
#[derive(Default)]
pub struct AttemptState {
    pub shards: Option<Box<dyn Shards + Send>>,
    pub checkpoints: Option<Box<dyn Checkpoints + Send>>,
}

impl Observer for Watcher {
    fn progress(&mut self, phase: Phase, done: u64, total: u64) -> ControlFlow<()> {
        let progress = Progress { phase, done, total };
        self.progress.send_replace((Some(progress), Instant::now()));
        match self.stop.reason() {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    }

    fn shards(&mut self) -> Option<&mut dyn Shards> {
        match &mut self.attempt_state.shards {
            Some(shards) => Some(shards.as_mut()),
            None => None,
        }
    }
}

/// Work for a composer, with all its files at hand.
#[derive(Debug)]
pub enum Task {
    Compose(CompositionInput),
    Solve(SolveInput),
    Shard(ShardInput),
    Tune(Box<TuningInput>),
    Rank(CompositionInput),
    Predict(Box<PredictionInput>),
}

/// The result of work.
#[derive(Debug)]
pub enum Output {
    Composition(Box<Composition>),
    /// The file of a shard.
    Shard(Vec<u8>),
    Tuned(Box<Tuned>),
    Ranking(Ranking),
    Predicted(Box<Predicted>),
}

impl From<Composition> for Output {
    fn from(composition: Composition) -> Self {
        Self::Composition(Box::new(composition))
    }
}

impl Task {
    fn done_by(
        &self,
        composer: &mut dyn Composer,
        observer: &mut Watcher,
    ) -> Result<Output, CompositionError> {
        match self {
            Self::Compose(input) => composer.compose(input, observer).map(Output::from),
            Self::Solve(input) => composer.solve(input, observer).map(Output::from),
            Self::Shard(input) => composer.shard(input, observer).map(Output::Shard),
            Self::Tune(input) => {
                let mut kept = observer.attempt_state.checkpoints.take();
                let mut none = NoCheckpoints;
                let checkpoints: &mut dyn Checkpoints = match &mut kept {
                    Some(kept) => kept.as_mut(),
                    None => &mut none,
                };
                let tuned = composer.tune(input, checkpoints, observer)?;
                Ok(Output::Tuned(Box::new(tuned)))
            }
            Self::Rank(input) => composer.rank(input, observer).map(Output::Ranking),
            Self::Predict(input) => {
                let predicted = composer.predict(input, observer)?;
                Ok(Output::Predicted(Box::new(predicted)))
            }
        }
    }
}

enum Request {
    Task {
        work: Box<Task>,
        watcher: Watcher,
        answer: oneshot::Sender<Result<Output, CompositionError>>,
    },
    SelfTest {
        begun: oneshot::Sender<()>,
        answer: oneshot::Sender<Result<(), CompositionError>>,
    },
}

#[derive(Debug)]
pub struct ComposerThread {
    requests: mpsc::Sender<Request>,
    platform: Platform,
}

impl ComposerThread {
    /// Starts the thread and waits until its composer is made and has passed its self-test.
    pub async fn start(new: NewComposer) -> Result<Self, CompositionError> {
        let (requests, queue) = mpsc::channel();
        let (made, platform) = oneshot::channel();
        thread::Builder::new()
            .name("composer".to_owned())
            .spawn(move || own(&new, made, &queue))
            .expect("the system lets a process start one thread");
        let ended = |_| Err(panicked(&"the engine's constructor panicked"));
        let late = |_| {
            let seconds = STARTS_WITHIN.as_secs();
            CompositionError::device_failed(format!("the engine is not ready after {seconds} s"))
        };
        let platform = tokio::time::timeout(STARTS_WITHIN, platform).await;
        let platform = platform.map_err(late)?.unwrap_or_else(ended)?;
        Ok(Self { requests, platform })
    }

    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Hands work over, with the state that outlasts attempts. Progress and answer come through the returned channels.
    pub fn begin(
        &self,
        work: Task,
        stop: Stop,
        attempt_state: AttemptState,
    ) -> (
        watch::Receiver<Watched>,
        oneshot::Receiver<Result<Output, CompositionError>>,
    ) {
        let (progress, watched) = watch::channel((None, Instant::now()));
        let (answer, answered) = oneshot::channel();
        let watcher = Watcher {
            stop,
            progress,
            attempt_state,
        };
        // If the thread is gone, the request is dropped, and the receiver of the answer notices.
        let _ = self.requests.send(Request::Task {
            work: Box::new(work),
            watcher,
            answer,
        });
        (watched, answered)
    }

    /// Tests the device again. False if the thread was busy all the while, so that nothing is known.
    pub async fn self_test(&self, patience: Duration) -> Result<bool, CompositionError> {
        let (begun, beginning) = oneshot::channel();
        let (answer, answered) = oneshot::channel();
        // If the thread is gone, the request is dropped, and the receivers notice.
        let _ = self.requests.send(Request::SelfTest { begun, answer });
        let gone = || CompositionError::device_failed("the engine's thread has ended".to_owned());
        match tokio::time::timeout(patience, beginning).await {
            Err(_) => return Ok(false),
            Ok(begun) => begun.map_err(|_| gone())?,
        }
        match tokio::time::timeout(patience, answered).await {
            Ok(answer) => answer.map_err(|_| gone())?.map(|()| true),
            Err(_) => Err(CompositionError::device_failed(format!(
                "the self-test has not ended within {} s",
                patience.as_secs()
            ))),
        }
    }
}

/// The main loop of the thread.
fn own(
    new: &NewComposer,
    made: oneshot::Sender<Result<Platform, CompositionError>>,
    queue: &mpsc::Receiver<Request>,
) {
    let mut composer = match tested(new) {
        Ok(composer) => composer,
        Err(error) => {
            let _ = made.send(Err(error));
            return;
        }
    };
    let _ = made.send(Ok(composer.platform()));
    while let Ok(request) = queue.recv() {
        match request {
            Request::SelfTest { begun, answer } => {
                // If the request waited too long in the queue, nobody waits for its answer any more.
                if begun.send(()).is_ok() {
                    let _ = answer.send(self_test(composer.as_mut()));
                }
            }
            Request::Task {
                work,
                mut watcher,
                answer,
            } => {
                let composed = catch_unwind(AssertUnwindSafe(|| {
                    work.done_by(composer.as_mut(), &mut watcher)
                }));
                let panic = composed.is_err();
                let outcome = composed.unwrap_or_else(|payload| Err(panicked(payload.as_ref())));
                // If the receiver has given up, nobody wants the answer.
                let _ = answer.send(outcome);
                if panic {
                    // A composer cannot be trusted after a panic.
                    match tested(new) {
                        Ok(fresh) => composer = fresh,
                        Err(error) => {
                            let error = promptweave_domain::error_chain::chain(&error);
                            tracing::error!(error, "the engine cannot be started again");
                            return;
                        }
                    }
                }
            }
        }
    }
}

/// Makes a composer and tests it.
fn tested(new: &NewComposer) -> Result<Box<dyn Composer>, CompositionError> {
    let mut composer = new()?;
    self_test(composer.as_mut())?;
    Ok(composer)
}

fn self_test(composer: &mut dyn Composer) -> Result<(), CompositionError> {
    catch_unwind(AssertUnwindSafe(|| composer.self_test()))
        .unwrap_or_else(|payload| Err(panicked(payload.as_ref())))
}

fn panicked(payload: &(dyn Any + Send)) -> CompositionError {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    let detail = format!("the engine failed: {text}");
    // libtorch's errors arrive as panics.
    if blames_the_device(text) {
        return CompositionError::device_failed(detail);
    }
    CompositionError::Refused {
        code: JobErrorCode::EnginePanicked,
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_the_devices_fault_or_the_inputs() {
        let of = |text: &str| panicked(&text.to_owned());
        for text in [
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
            "CUDA error: unspecified launch failure",
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ] {
            assert!(of(text).is_device_failure(), "{text}");
        }
        assert!(matches!(
            of("index out of bounds"),
            CompositionError::Refused { .. }
        ));
    }
}

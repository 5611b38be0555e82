//! The one OS thread that owns the composer. An engine's tensors may not be shared between threads,
//! and its calls block for seconds, which no async task may do.

use std::any::Any;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::thread;

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::domain::composition::{
    Composer, Composition, CompositionError, CompositionInput, Observer, Phase, ResolveInput,
};
use crate::domain::job::Progress;
use crate::domain::sharing::{ShardInput, Shards};

/// Makes a composer on the thread that will own it; called again after a panic.
pub type NewComposer =
    Box<dyn Fn() -> Result<Box<dyn Composer>, CompositionError> + Send + Sync + 'static>;

/// Why a composition is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    Cancelled,
    LeaseLost,
    Shutdown,
    Stalled,
}

/// Asks a composition to stop; the first reason given stays.
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

/// The latest progress and when it was made.
pub type Watched = (Option<Progress>, Instant);

/// The observer on the composer's thread: tells how far it is, and when to stop.
struct Watcher {
    stop: Stop,
    progress: watch::Sender<Watched>,
    shards: Option<Box<dyn Shards + Send>>,
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
        match &mut self.shards {
            Some(shards) => Some(shards.as_mut()),
            None => None,
        }
    }
}

/// What a composer is given to do, with all its files at hand.
#[derive(Debug)]
pub enum Work {
    Compose(CompositionInput),
    Resolve(ResolveInput),
    Shard(ShardInput),
}

/// What came of it.
#[derive(Debug)]
pub enum Done {
    Composition(Box<Composition>),
    /// The file of a shard.
    Shard(Vec<u8>),
}

impl From<Composition> for Done {
    fn from(composition: Composition) -> Self {
        Self::Composition(Box::new(composition))
    }
}

impl Work {
    fn done_by(
        &self,
        composer: &mut dyn Composer,
        observer: &mut dyn Observer,
    ) -> Result<Done, CompositionError> {
        match self {
            Self::Compose(input) => composer.compose(input, observer).map(Done::from),
            Self::Resolve(input) => composer.resolve(input, observer).map(Done::from),
            Self::Shard(input) => composer.shard(input, observer).map(Done::Shard),
        }
    }
}

enum Request {
    Work {
        work: Box<Work>,
        watcher: Watcher,
        answer: oneshot::Sender<Result<Done, CompositionError>>,
    },
    /// Does the thread take requests at all?
    Ping { answer: oneshot::Sender<()> },
}

/// The thread is gone: its composer could not be made anew after a panic.
#[derive(Debug, thiserror::Error)]
#[error("the engine's thread has ended")]
pub struct ThreadEnded;

#[derive(Debug)]
pub struct ComposerThread {
    requests: mpsc::Sender<Request>,
    device: String,
}

impl ComposerThread {
    /// Starts the thread and waits until its composer is made.
    pub async fn start(new: NewComposer) -> Result<Self, CompositionError> {
        let (requests, queue) = mpsc::channel();
        let (made, device) = oneshot::channel();
        thread::Builder::new()
            .name("composer".to_owned())
            .spawn(move || own(&new, made, &queue))
            .expect("the system lets a process start one thread");
        let ended = |_| Err(panicked(&"the engine's constructor panicked"));
        let device = device.await.unwrap_or_else(ended)?;
        Ok(Self { requests, device })
    }

    /// e.g. `cpu`.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Hands work over, which others may share in. Progress and answer come through the channels that are returned.
    pub fn begin(
        &self,
        work: Work,
        stop: Stop,
        shards: Option<Box<dyn Shards + Send>>,
    ) -> (
        watch::Receiver<Watched>,
        oneshot::Receiver<Result<Done, CompositionError>>,
    ) {
        let (progress, watched) = watch::channel((None, Instant::now()));
        let (answer, answered) = oneshot::channel();
        let watcher = Watcher {
            stop,
            progress,
            shards,
        };
        // A thread that is gone drops the request, which the receiver of the answer notices.
        let _ = self.requests.send(Request::Work {
            work: Box::new(work),
            watcher,
            answer,
        });
        (watched, answered)
    }

    /// Waits until the thread answers.
    pub async fn ping(&self) -> Result<(), ThreadEnded> {
        let (answer, answered) = oneshot::channel();
        self.requests
            .send(Request::Ping { answer })
            .map_err(|_| ThreadEnded)?;
        answered.await.map_err(|_| ThreadEnded)
    }
}

/// The thread's life.
fn own(
    new: &NewComposer,
    made: oneshot::Sender<Result<String, CompositionError>>,
    queue: &mpsc::Receiver<Request>,
) {
    let mut composer = match new() {
        Ok(composer) => composer,
        Err(error) => {
            let _ = made.send(Err(error));
            return;
        }
    };
    let _ = made.send(Ok(composer.device()));
    while let Ok(request) = queue.recv() {
        match request {
            Request::Ping { answer } => {
                let _ = answer.send(());
            }
            Request::Work {
                work,
                mut watcher,
                answer,
            } => {
                let composed = catch_unwind(AssertUnwindSafe(|| {
                    work.done_by(composer.as_mut(), &mut watcher)
                }));
                let panic = composed.is_err();
                let outcome = composed.unwrap_or_else(|payload| Err(panicked(payload.as_ref())));
                // The receiver may have given up waiting; then nobody wants the answer.
                let _ = answer.send(outcome);
                if panic {
                    // What it left behind is not to be trusted.
                    match new() {
                        Ok(fresh) => composer = fresh,
                        Err(error) => {
                            let error = crate::telemetry::chain(&error);
                            tracing::error!(error, "the engine cannot be started again");
                            return;
                        }
                    }
                }
            }
        }
    }
}

fn panicked(payload: &(dyn Any + Send)) -> CompositionError {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    let detail = format!("the engine failed: {text}");
    // libtorch's errors arrive as panics; those of memory and device are not the input's fault.
    let passing = [
        "out of memory",
        "can't allocate memory",
        "CUDA error",
        "cuDNN error",
    ];
    if passing.iter().any(|words| text.contains(words)) {
        return CompositionError::Retry {
            code: "device_failed",
            detail,
        };
    }
    CompositionError::Refused {
        code: "engine_panicked",
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_the_devices_fault_or_the_inputs() {
        let of = |text: &str| panicked(&text.to_owned());
        assert!(matches!(
            of("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            CompositionError::Retry { .. }
        ));
        assert!(matches!(
            of("CUDA error: unspecified launch failure"),
            CompositionError::Retry { .. }
        ));
        assert!(matches!(
            of("index out of bounds"),
            CompositionError::Refused { .. }
        ));
    }
}

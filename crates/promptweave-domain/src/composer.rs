//! The seam between worker and engine: who composes, and who watches.

use crate::composition::{CompositionInput, CompositionResult, SolveInput};
use crate::phase::Phase;
use crate::ranking::Ranking;
use crate::sharding::{ShardInput, Shards};
use crate::tuning::{CheckpointUnavailable, Checkpoints, Tuned, TuningInput};
use crate::words::JobErrorCode;

/// Watches a composition; asked after about every second of work.
pub trait Observer {
    /// `done` of `total` units of `phase` are finished. `Break` stops the composition.
    fn progress(&mut self, phase: Phase, done: u64, total: u64) -> std::ops::ControlFlow<()>;

    /// Others that may share the work. None: there are none.
    fn shards(&mut self) -> Option<&mut dyn Shards> {
        None
    }
}

/// Watches nothing, and lets everything go on.
pub struct Unwatched;

impl Observer for Unwatched {
    fn progress(&mut self, _: Phase, _: u64, _: u64) -> std::ops::ControlFlow<()> {
        std::ops::ControlFlow::Continue(())
    }
}

/// Composes prompts. The engine is one; tests of queue and API have a fake without libtorch.
pub trait Composer: Send {
    fn compose(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError>;

    /// Solves for α again from the statistics of an earlier composition; phases are `solve` alone.
    fn solve(
        &mut self,
        input: &SolveInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError>;

    /// Computes a shard of a composition that somebody else has, for them to merge.
    fn shard(
        &mut self,
        input: &ShardInput,
        observer: &mut dyn Observer,
    ) -> Result<Vec<u8>, CompositionError>;

    /// Trains a prompt, from the last checkpoint if there is one; phases are `select` and `tune`, then `verify` where it is
    /// evaluated.
    fn tune(
        &mut self,
        input: &TuningInput,
        checkpoints: &mut dyn Checkpoints,
        observer: &mut dyn Observer,
    ) -> Result<Tuned, CompositionError>;

    /// Scores every source for the target, without weighing them; phases are `features` and `solve`.
    fn rank(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Ranking, CompositionError>;

    /// Composes a known tiny job, which must give its known α: whether the device computes at all, and
    /// rightly. Takes well below a second.
    fn self_test(&mut self) -> Result<(), CompositionError>;

    fn platform(&self) -> Platform;
}

/// What a composer computes on, and with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// e.g. `cpu`, `cuda:0` or `cuda:0,cuda:1`.
    pub device: String,
    /// NVIDIA's, e.g. `580.65.06`.
    pub driver: Option<String>,
    /// Of the devices together; the machine's for a CPU.
    pub memory_bytes: Option<u64>,
    /// Its version.
    pub libtorch: Option<String>,
    /// Version, kind of device, precision: where equal, numbers of two composers belong together.
    pub arithmetic: String,
}

/// A finished composition: the answer and the two files that belong to it.
#[derive(Clone, Debug)]
pub struct Composition {
    /// `result.composed_prompt` names the digest of `composed`; name and version are the caller's to add.
    pub result: CompositionResult,
    /// A prompt file.
    pub composed: Vec<u8>,
    /// `statistics.safetensors`; of a [`SolveInput`] the part of it that was used.
    pub statistics: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum CompositionError {
    /// The observer broke off: cancelled, or the lease is lost.
    #[error("stopped")]
    Stopped,
    /// The input cannot be composed; another try would not help.
    #[error("{detail}")]
    Refused { code: JobErrorCode, detail: String },
    /// The machine failed (memory, device); another try may help.
    #[error("{detail}")]
    Retry { code: JobErrorCode, detail: String },
}

impl CompositionError {
    /// After this the process that owns the device is not to be trusted.
    pub fn device_failed(detail: String) -> Self {
        Self::Retry {
            code: JobErrorCode::DeviceFailed,
            detail,
        }
    }

    pub fn is_device_failure(&self) -> bool {
        matches!(
            self,
            Self::Retry {
                code: JobErrorCode::DeviceFailed,
                ..
            }
        )
    }
}

/// Whether what libtorch says is about memory or device, and so not the input's fault.
pub fn blames_the_device(text: &str) -> bool {
    let words = [
        "CUDA",
        "cuDNN error",
        "cusolver error",
        "out of memory",
        "can't allocate memory",
    ];
    words.iter().any(|words| text.contains(words))
}

impl From<CheckpointUnavailable> for CompositionError {
    fn from(error: CheckpointUnavailable) -> Self {
        Self::Retry {
            code: JobErrorCode::CheckpointUnavailable,
            detail: error.to_string(),
        }
    }
}

//! The interface between worker and engine: the traits for composing and for watching a
//! composition.

use crate::composition::{CompositionInput, CompositionResult, SolveInput};
use crate::phase::Phase;
use crate::prediction::{Predicted, PredictionInput};
use crate::ranking::Ranking;
use crate::sharding::{ShardInput, Shards};
use crate::tuning::{CheckpointUnavailable, Checkpoints, Tuned, TuningInput};
use crate::words::JobErrorCode;

/// Watches a composition. It is called about every second of work.
pub trait Observer {
    /// Reports that `done` of `total` units of `phase` are finished. `Break` stops the composition.
    fn progress(&mut self, phase: Phase, done: u64, total: u64) -> std::ops::ControlFlow<()>;

    /// The other workers that may share the work; `None` if there are none.
    fn shards(&mut self) -> Option<&mut dyn Shards> {
        None
    }
}

/// An observer that ignores progress and never stops the work.
pub struct Unwatched;

impl Observer for Unwatched {
    fn progress(&mut self, _: Phase, _: u64, _: u64) -> std::ops::ControlFlow<()> {
        std::ops::ControlFlow::Continue(())
    }
}

/// Composes prompts. The engine implements it; tests of queue and API use a fake without libtorch.
pub trait Composer: Send {
    fn compose(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError>;

    /// Solves for α again from the statistics of an earlier composition. The only phase is `solve`.
    fn solve(
        &mut self,
        input: &SolveInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError>;

    /// Computes one shard of a composition that another worker owns. The owner merges the result.
    fn shard(
        &mut self,
        input: &ShardInput,
        observer: &mut dyn Observer,
    ) -> Result<Vec<u8>, CompositionError>;

    /// Trains a prompt, from the last checkpoint if there is one. The phases are `select` and
    /// `tune`, and `verify` if the prompt is evaluated.
    fn tune(
        &mut self,
        input: &TuningInput,
        checkpoints: &mut dyn Checkpoints,
        observer: &mut dyn Observer,
    ) -> Result<Tuned, CompositionError>;

    /// Scores every source for the target, without weighing them. The phases are `features` and
    /// `solve`.
    fn rank(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Ranking, CompositionError>;

    /// Predicts the images of a dataset. The only phase is `features`.
    fn predict(
        &mut self,
        input: &PredictionInput,
        observer: &mut dyn Observer,
    ) -> Result<Predicted, CompositionError>;

    /// Composes a known tiny job and compares its α with the known one. It tells whether the device
    /// computes at all, and correctly. It takes well below a second.
    fn self_test(&mut self) -> Result<(), CompositionError>;

    fn platform(&self) -> Platform;
}

/// The hardware and software that a composer runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// The devices, e.g. `cpu`, `cuda:0` or `cuda:0,cuda:1`.
    pub device: String,
    /// The version of NVIDIA's driver, e.g. `580.65.06`.
    pub driver: Option<String>,
    /// The memory of all devices together; on a CPU, the machine's memory.
    pub memory_bytes: Option<u64>,
    /// The version of libtorch.
    pub libtorch: Option<String>,
    /// Engine version, kind of device and precision. Results of two composers may be mixed only
    /// where this is equal.
    pub arithmetic: String,
}

/// A finished composition: the answer and its two files.
#[derive(Clone, Debug)]
pub struct Composition {
    /// The answer. `result.composed_prompt` holds the digest of `composed`; the caller adds name
    /// and version.
    pub result: CompositionResult,
    /// The composed prompt, as the bytes of a prompt file.
    pub composed: Vec<u8>,
    /// The pool of the sources' predictions, as the bytes of an ensemble file; `None` without the predictions.
    pub ensemble: Option<Vec<u8>>,
    /// The bytes of `statistics.safetensors`; for a [`SolveInput`], the part of its statistics that
    /// was used.
    pub statistics: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum CompositionError {
    /// The observer stopped the work: the job was cancelled, or its lease was lost.
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
    /// A device failure. After it the process that owns the device cannot be trusted.
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

/// Whether libtorch's message is about memory or the device, so that the input is not at fault.
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

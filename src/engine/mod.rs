//! The engine: HGPrompt (arXiv 2504.12311) on files at hand.
//!
//! [`Engine::compose`] reads as the method's pseudo-code; each step is a module:
//!
//! ```text
//! samples ─► features f_{Pᵢ} ─► heads ─► per-sample gradients ─► Γ ─┐
//!                   └──────────► H(α) ────────────────────────────┴─► solve α ─► P_T = Σ αᵢ Pᵢ ─► verify
//! ```
//!
//! It knows files and tensors; nothing of databases, HTTP or jobs (only [`crate::domain`]).

pub mod alignment;
pub mod assignment;
pub mod backbones;
pub mod cache;
pub mod checkpoint;
pub mod device;
pub mod estimates;
pub mod evaluate;
pub mod features;
pub mod gradients;
pub mod h_score;
pub mod head;
pub mod images;
pub mod memory;
pub mod methods;
pub mod mkl;
pub mod nvidia;
pub mod optimizer;
pub mod pixels;
pub mod samples;
pub mod shard_file;
pub mod sharding;
pub mod solve;
pub mod solver;
pub mod sources;
pub mod statistics;
mod steps;
pub mod streams;
pub mod term_weights;
pub mod transferability;
pub mod tuning;
pub mod vit;

mod classes;
mod compose;
mod jackknife;
mod platform;
mod refine;
mod report;
mod row_file;
mod self_test;
mod shard_worker;
mod solve_again;
#[cfg(test)]
pub(crate) mod testing;
mod threads;
mod tiny;
mod token_alignment;
mod tune;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tch::{Device, Kind, TchError, Tensor};

use self::backbones::Backbones;
use self::cache::ResultCache;
use self::compose::TargetPrompt;
use self::shard_worker::Prepared;
use self::statistics::StatisticsError;
use self::vit::{Compute, Vit};
use crate::domain::backbone::{Backbone, BackboneError};
use crate::domain::composition::{
    Composer, Composition, CompositionError, CompositionInput, Observer, Platform, SolveInput,
    blames_the_device,
};
use crate::domain::dataset::DatasetError;
use crate::domain::precision::Precision;
use crate::domain::ranking::Ranking;
use crate::domain::sharding::{ShardInput, ShardingError};
use crate::domain::tensor::Tensor as PlainTensor;
use crate::domain::tuning::{CheckpointUnavailable, Checkpoints, Tuned, TuningInput};
use crate::domain::tuning_method::TuningMethod;
use crate::domain::words::JobErrorCode;

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("stopped")]
    Stopped,
    #[error("the backbone cannot be used")]
    Backbone(#[from] BackboneError),
    #[error("the dataset cannot be used")]
    Dataset(#[from] DatasetError),
    #[error(
        "{count} of the images cannot be read, the first is `{first}`; leave them out with \
         --skip-unreadable (`skip_unreadable` in a request), or repair them"
    )]
    UnreadableImages { first: PathBuf, count: usize },
    #[error(
        "decoded images ({mib} MiB) cannot be kept in `{}`; free space there, or name another \
         directory in TMPDIR", .dir.display()
    )]
    PixelFile {
        dir: PathBuf,
        mib: u64,
        source: Arc<io::Error>,
    },
    #[error("no thread can be started to {0}")]
    NoThread(&'static str, #[source] io::Error),
    #[error("the split `{0}` has no readable images")]
    NoSamples(&'static str),
    #[error("the target's samples are all of class `{0}`; at least two classes are needed")]
    OneClass(String),
    #[error("one image is too few to hold any out; give more, or choose nothing by them")]
    NoneToHoldOut,
    #[error("`{0}` makes no prompt; tune by `vpt-shallow` or `vpt-deep`")]
    MakesNoPrompt(TuningMethod),
    #[error(
        "the backbone has one block, and `vpt-deep` prompts those after the first; tune by `vpt-shallow`"
    )]
    OneBlock,
    #[error("no source prompts were given")]
    NoSources,
    #[error("sources `{first}` and `{second}` are the same prompt ({digest})")]
    SameSource {
        first: String,
        second: String,
        digest: String,
    },
    #[error("source `{prompt}` is not in the statistics; they are of {known}")]
    UnknownSource { prompt: String, known: String },
    #[error("the statistics cannot be used")]
    Statistics(#[from] StatisticsError),
    #[error("source `{prompt}` is {what}, but {expected}")]
    Incompatible {
        prompt: String,
        what: String,
        expected: String,
    },
    #[error(transparent)]
    Objective(#[from] crate::domain::objective::InvalidObjective),
    #[error("{0} are not finite")]
    NotFinite(&'static str),
    #[error("a file of the cache cannot be read")]
    Cache(#[source] std::io::Error),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointUnavailable),
    #[error(transparent)]
    Sharing(#[from] ShardingError),
    #[error("libtorch failed")]
    Torch(#[from] TchError),
}

impl EngineError {
    /// What clients branch on.
    pub fn code(&self) -> JobErrorCode {
        match self {
            Self::Stopped => JobErrorCode::Stopped,
            Self::Backbone(_) => JobErrorCode::BackboneUnusable,
            Self::Dataset(_) => JobErrorCode::DatasetUnusable,
            Self::UnreadableImages { .. } => JobErrorCode::UnreadableImage,
            Self::PixelFile { .. } => JobErrorCode::PixelFile,
            Self::NoThread(..) => JobErrorCode::NoThread,
            Self::NoSamples(_) => JobErrorCode::EmptySplit,
            Self::OneClass(_) => JobErrorCode::OneClass,
            Self::NoneToHoldOut => JobErrorCode::TooFewImages,
            Self::MakesNoPrompt(_) => JobErrorCode::MakesNoPrompt,
            Self::OneBlock => JobErrorCode::OneBlock,
            Self::NoSources => JobErrorCode::NoSources,
            Self::SameSource { .. } => JobErrorCode::SameSource,
            Self::UnknownSource { .. } => JobErrorCode::UnknownSource,
            Self::Statistics(_) => JobErrorCode::StatisticsUnusable,
            Self::Incompatible { .. } => JobErrorCode::IncompatibleSource,
            Self::Objective(_) => JobErrorCode::InvalidObjective,
            Self::NotFinite(_) => JobErrorCode::NotFinite,
            Self::Cache(_) => JobErrorCode::CacheUnreadable,
            Self::Checkpoint(_) => JobErrorCode::CheckpointUnavailable,
            Self::Sharing(_) => JobErrorCode::SharingFailed,
            Self::Torch(_) => JobErrorCode::Libtorch,
        }
    }
}

impl From<EngineError> for CompositionError {
    fn from(error: EngineError) -> Self {
        let (code, detail) = (error.code(), chain(&error));
        match error {
            EngineError::Stopped => Self::Stopped,
            EngineError::Checkpoint(unavailable) => unavailable.into(),
            EngineError::Torch(_) if blames_the_device(&detail) => Self::device_failed(detail),
            // Out of memory or disk, or a device that failed: the next attempt may meet a better machine.
            EngineError::Torch(_)
            | EngineError::Cache(_)
            | EngineError::Sharing(_)
            | EngineError::PixelFile { .. }
            | EngineError::NoThread(..) => Self::Retry { code, detail },
            _ => Self::Refused { code, detail },
        }
    }
}

/// An error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// What stays between compositions: backbones that are loaded, results of single sources.
pub struct Engine {
    backbones: Backbones,
    cache: Option<ResultCache>,
    /// For the next shard of the job that was last helped with.
    prepared: Option<Prepared>,
    target_prompt: Option<TargetPrompt>,
}

impl Engine {
    /// On one device, in f32.
    pub fn new(device: Device) -> Self {
        Self::with(Compute::on(device, Precision::F32))
    }

    pub fn with(compute: Compute) -> Self {
        Self {
            backbones: Backbones::new(compute),
            cache: None,
            prepared: None,
            target_prompt: None,
        }
    }

    /// Backbones of up to `max_bytes` stay loaded, and the one in use.
    pub fn with_backbone_bytes(mut self, max_bytes: u64) -> Self {
        self.backbones.max_bytes = max_bytes;
        self
    }

    /// Keeps results of single sources between compositions.
    pub fn with_cache(self, cache: ResultCache) -> Self {
        Self {
            cache: Some(cache),
            ..self
        }
    }

    /// Every metric of every source for a target, without weighing them.
    pub fn rank(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Ranking, EngineError> {
        let (backbone, vit) = self.backbones.open(&input.backbone_dir)?;
        let (cache, target_prompt) = (self.cache.as_mut(), &mut self.target_prompt);
        compose::rank(backbone, vit, cache, target_prompt, input, observer)
    }

    /// The backbone of a folder; read again only when the folder's content changed.
    pub fn backbone(&mut self, dir: &Path) -> Result<(&Backbone, &Vit), EngineError> {
        self.backbones.open(dir)
    }
}

impl Composer for Engine {
    fn compose(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError> {
        let (backbone, vit) = self.backbones.open(&input.backbone_dir)?;
        let cache = self.cache.as_mut();
        self.prepared = None;
        let target_prompt = &mut self.target_prompt;
        Ok(compose::compose(
            backbone,
            vit,
            cache,
            target_prompt,
            input,
            observer,
        )?)
    }

    fn solve(
        &mut self,
        input: &SolveInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError> {
        let device = device::names_of(&self.backbones.compute.devices);
        Ok(solve_again::solve_again(input, device, observer)?)
    }

    fn shard(
        &mut self,
        input: &ShardInput,
        observer: &mut dyn Observer,
    ) -> Result<Vec<u8>, CompositionError> {
        let (backbone, vit) = self.backbones.open(&input.composition.backbone_dir)?;
        let prepared = &mut self.prepared;
        Ok(shard_worker::shard(
            backbone, vit, prepared, input, observer,
        )?)
    }

    fn tune(
        &mut self,
        input: &TuningInput,
        checkpoints: &mut dyn Checkpoints,
        observer: &mut dyn Observer,
    ) -> Result<Tuned, CompositionError> {
        let (backbone, vit) = self.backbones.open(&input.backbone_dir)?;
        Ok(tune::tune(backbone, vit, input, checkpoints, observer)?)
    }

    fn rank(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Ranking, CompositionError> {
        Ok(Engine::rank(self, input, observer)?)
    }

    fn self_test(&mut self) -> Result<(), CompositionError> {
        self_test::run(&self.backbones.compute)
    }

    fn platform(&self) -> Platform {
        platform::of(&self.backbones.compute)
    }
}

/// L of a positive definite matrix [d, d] = L Lᵀ; `what` is to blame where it is not.
fn cholesky(matrix: &Tensor, what: &'static str) -> Result<Tensor, EngineError> {
    let (factor, failed_at) = matrix.f_linalg_cholesky_ex(false, false)?;
    match i64::try_from(failed_at)? {
        0 => Ok(factor),
        _ => Err(EngineError::NotFinite(what)),
    }
}

/// A tensor's values in row-major order, as files store them.
fn plain(tensor: &Tensor) -> Result<Vec<f32>, EngineError> {
    let flat = tensor
        .detach()
        .to_device(Device::Cpu)
        .to_kind(Kind::Float)
        .flatten(0, -1);
    Ok(Vec::try_from(flat)?)
}

/// A prompt [m, d] where the model is.
pub fn prompt_tensor(prompt: &PlainTensor<f32>, vit: &Vit) -> Tensor {
    let shape: Vec<i64> = prompt.shape.iter().map(|s| *s as i64).collect();
    Tensor::from_slice(&prompt.values)
        .view(shape.as_slice())
        .to_device(vit.device)
        .to_kind(vit.kind)
}

#[cfg(test)]
mod reference_tests;
#[cfg(test)]
mod tests;

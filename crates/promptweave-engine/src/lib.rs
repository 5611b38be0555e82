//! The engine: HGPrompt (arXiv 2504.12311) on files at hand.
//!
//! [`Engine::compose`] reads like the method's pseudo-code, and each step is a module:
//!
//! ```text
//! samples ─► features f_{Pᵢ} ─► heads ─► per-sample gradients ─► Γ ─┐
//!                   └──────────► H(α) ────────────────────────────┴─► solve α ─► P_T = Σ αᵢ Pᵢ ─► verify
//! ```
//!
//! The engine knows files and tensors, and nothing of databases, HTTP or jobs beyond
//! [`promptweave_domain`].

pub mod baselines;
pub mod cache;
pub mod compose;
pub mod device;
pub mod error;
pub mod pool;
pub mod predict;
pub mod samples;
pub mod score;
pub mod sharding;
pub mod solve;
pub mod statistics;
pub mod tensors;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod tune;
pub mod vit;

use std::path::Path;

use promptweave_domain::composer::{Composer, Composition, CompositionError, Observer, Platform};
use promptweave_domain::composition::{CompositionInput, SolveInput};
use promptweave_domain::precision::Precision;
use promptweave_domain::prediction::{Predicted, PredictionInput};
use promptweave_domain::ranking::Ranking;
use promptweave_domain::sharding::ShardInput;
use promptweave_domain::tuning::{Checkpoints, Tuned, TuningInput};
use promptweave_formats::backbone::Backbone;
use tch::Device;

use crate::cache::ResultCache;
use crate::compose::{TargetPrompt, self_test, solve_again};
use crate::device::platform;
use crate::error::EngineError;
use crate::sharding::shard_worker::{self, Prepared};
use crate::vit::backbones::Backbones;
use crate::vit::{Compute, Vit};

/// The engine with the state it keeps between compositions: loaded backbones, and results of single
/// sources.
pub struct Engine {
    backbones: Backbones,
    cache: Option<ResultCache>,
    /// Inputs prepared for the next shard of the last job that it helped with.
    prepared: Option<Prepared>,
    target_prompt: Option<TargetPrompt>,
}

impl Engine {
    /// An engine on one device, in f32.
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

    /// Sets how many bytes of backbones stay loaded. The one in use always does.
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

    /// Scores every source for a target by every metric, without weighing them.
    pub fn rank(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Ranking, EngineError> {
        let (backbone, vit) = self.backbones.open(&input.backbone_dir)?;
        let (cache, target_prompt) = (self.cache.as_mut(), &mut self.target_prompt);
        compose::rank(backbone, vit, cache, target_prompt, input, observer)
    }

    /// The backbone of a folder. It is read again only if the folder's content changed.
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
        Ok(tune::job::tune(
            backbone,
            vit,
            input,
            checkpoints,
            observer,
        )?)
    }

    fn rank(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Ranking, CompositionError> {
        Ok(Engine::rank(self, input, observer)?)
    }

    fn predict(
        &mut self,
        input: &PredictionInput,
        observer: &mut dyn Observer,
    ) -> Result<Predicted, CompositionError> {
        let device = device::names_of(&self.backbones.compute.devices);
        let (backbone, vit) = self.backbones.open(&input.backbone_dir)?;
        Ok(predict::predict(backbone, vit, device, input, observer)?)
    }

    fn self_test(&mut self) -> Result<(), CompositionError> {
        self_test::run(&self.backbones.compute)
    }

    fn platform(&self) -> Platform {
        platform::of(&self.backbones.compute)
    }
}

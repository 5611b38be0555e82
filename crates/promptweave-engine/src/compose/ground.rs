//! Everything that α is computed from: features, heads and gradients. They are computed here or by
//! helpers that share the work.

use std::ops::ControlFlow;

use tch::Tensor;

use crate::cache::{CachedGradients, CachedSources};
use crate::compose::Workspace;
use crate::compose::steps::{Steps, stop_on};
use crate::error::EngineError;
use crate::pool::unseen::UnseenPredictions;
use crate::samples::Samples;
use crate::score::gradients;
use crate::score::gradients::{GradientStatistics, GradientSummary, accumulate, sample_folds};
use crate::score::head::{SourceHead, fit_heads, folds};
use crate::sharding::shard_file;
use crate::sharding::{Shared, by_shards};
use crate::solve::estimates::Estimates;
use crate::statistics::{HeadStatistics, Statistics};
use crate::vit::features::extract;
use promptweave_domain::early_stopping::EarlyStop;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::{Shards, most_shards, num_shards};

/// The most bytes that all shards' gradient sums may take together. If each takes much, there are
/// fewer shards.
const MAX_GRADIENT_BYTES: usize = 4 << 30;

impl Workspace<'_> {
    /// Computes features, heads and gradients. The second value tells that not all gradients were
    /// taken, since fewer were enough.
    pub(super) fn statistics(
        &self,
        mut cached: CachedSources<'_>,
        without_prompt: Tensor,
        steps: &mut Steps<'_>,
    ) -> Result<(Statistics, Option<EarlyStop>), EngineError> {
        let Self { vit, samples, .. } = self;
        let labels = &samples.labels;
        let (features, by_shards) = self.all_features(&mut cached, steps)?;

        steps.begin(Phase::Heads)?;
        let folds = folds(labels, vit.config.embed_dim);
        let mut count = steps.counter(2 * self.tensors.len() as u64 + 1);
        let heads = fit_heads(
            &features,
            labels,
            &folds,
            self.classes.len(),
            &self.objective.head,
            &mut || stop_on(count(1)),
        )?;
        let predictions = UnseenPredictions::new(
            &features,
            without_prompt,
            labels,
            self.classes.len(),
            &self.objective.head,
            &mut || stop_on(count(1)),
        )?;
        drop(count);

        let (gradients, early_stop) = match self.objective.method().takes_gradients() {
            true => {
                let (gradients, early_stop) =
                    self.all_gradients(&mut cached, (&features, by_shards), &heads, &folds, steps)?;
                (Some(gradients), early_stop)
            }
            false => (None, None),
        };
        let of_heads = |of: fn(&SourceHead) -> f64| heads.iter().map(of).collect();
        let statistics = Statistics {
            features,
            prompts: self.prompts.to_vec(),
            labels: labels.clone(),
            sample_indices: samples.indices.clone(),
            folds,
            heads: HeadStatistics {
                temperature: of_heads(|head| head.temperature),
                loss: of_heads(|head| head.loss),
                saturation: of_heads(|head| head.saturation),
            },
            predictions: Some(predictions),
            gradients,
        };
        Ok((statistics, early_stop))
    }

    /// Features [N, d] of the backbone without a prompt.
    pub(super) fn without_prompt(
        &self,
        mut cached: CachedSources<'_>,
        steps: &mut Steps<'_>,
    ) -> Result<Tensor, EngineError> {
        let features = cached.features(&[self.no_prompt()], |unknown| {
            let pairs = self.vit.pairs(self.samples, unknown);
            extract(self.vit, &pairs, |_| steps.tick(Phase::Features))
        })?;
        Ok(features.get(0))
    }

    /// Features [M, N, d], and whether they were computed by shards.
    pub(super) fn all_features(
        &self,
        cached: &mut CachedSources<'_>,
        steps: &mut Steps<'_>,
    ) -> Result<(Tensor, bool), EngineError> {
        let mut by_shards = false;
        let features = cached.features(&self.tensors, |unknown| {
            let (features, shared) = self.features(unknown, steps)?;
            by_shards = shared;
            Ok(features)
        })?;
        self.eval.map_or(Ok(()), Samples::wait)?;
        Ok((features, by_shards))
    }

    /// All gradients: the cached ones are read, the others are computed, in shards if helpers are
    /// free. `features` come with whether they were computed by shards.
    fn all_gradients(
        &self,
        cached: &mut CachedSources<'_>,
        features: (&Tensor, bool),
        heads: &[SourceHead],
        folds: &[usize],
        steps: &mut Steps<'_>,
    ) -> Result<(GradientSummary, Option<EarlyStop>), EngineError> {
        steps.begin(Phase::Gradients)?;
        let known = cached.gradients(
            self.prompts[0].shape[0],
            &self.objective.head,
            folds,
            self.classes.len(),
        );
        let nothing_known = known.unknown().len() == self.tensors.len();
        let in_shards = match nothing_known {
            true => self.gradients_in_shards(features, heads, steps)?,
            false => None,
        };
        let (gradients, early_stop) = match in_shards {
            Some(merged) => merged,
            None => (self.gradients(heads, folds, &known, steps)?, None),
        };
        let gradients = gradients.finish(
            self.objective
                .alignment()
                .unwrap_or_default()
                .gradient_normalization,
        )?;
        cached.keep(&known);
        Ok((gradients, early_stop))
    }

    /// Features of these prompts, computed in shards if helpers are free. If only some of the
    /// sources' prompts are asked for, the work is small and done here. The second value tells
    /// whether shards were used.
    fn features(
        &self,
        prompts: &[Tensor],
        steps: &mut Steps<'_>,
    ) -> Result<(Tensor, bool), EngineError> {
        let shared = self.shared();
        let all = prompts.len() == self.tensors.len();
        let count = match steps.shards().filter(|_| all) {
            Some(shards) => shards.lay_out(Phase::Features, self.num_shards(shards))?,
            None => 1,
        };
        if count == 1 {
            let pairs = self.vit.pairs(self.samples, prompts);
            let features = extract(self.vit, &pairs, steps.counter(pairs.num_pairs()))?;
            return Ok((features, false));
        }
        let mut merged = shared.merge_features();
        by_shards(
            steps,
            Phase::Features,
            count,
            shared.pairs(),
            |shard, progress| shared.features_of(shard, progress),
            |bytes, _| Ok(ControlFlow::Continue(merged.add(&bytes, count)?)),
        )?;
        Ok((merged.whole(), true))
    }

    /// Computes all gradients here, except the known ones.
    fn gradients(
        &self,
        heads: &[SourceHead],
        folds: &[usize],
        known: &CachedGradients,
        steps: &mut Steps<'_>,
    ) -> Result<GradientStatistics, EngineError> {
        let pairs = self.vit.pairs(self.samples, &self.tensors);
        let sample_folds = sample_folds(&self.samples.labels);
        let mut accumulated = |known: &CachedGradients| {
            let sources = gradients::Sources { heads, known };
            let counter = steps.counter((self.samples.len() * known.unknown().len()) as u64);
            accumulate(self.vit, &pairs, &sources, folds, &sample_folds, counter)
        };
        match accumulated(known) {
            // The disk failed under an open file. Computing again takes longer, but gives the same.
            Err(EngineError::Cache(error)) => {
                tracing::warn!(%error, "gradients that were kept are computed again");
                accumulated(&CachedGradients::none(heads.len()))
            }
            accumulated => accumulated,
        }
    }

    /// Gradients computed in shards and merged until enough is known; `None` if shards are not
    /// worth it.
    fn gradients_in_shards(
        &self,
        (features, by_shards_already): (&Tensor, bool),
        heads: &[SourceHead],
        steps: &mut Steps<'_>,
    ) -> Result<Option<(GradientStatistics, Option<EarlyStop>)>, EngineError> {
        let shared = self.shared();
        let Some(shards) = steps.shards() else {
            return Ok(None);
        };
        let planned = match self.early_stopping {
            Some(_) => most_shards(self.samples.len()),
            None => self.num_shards(shards),
        };
        let largest = MAX_GRADIENT_BYTES / shared.gradient_bytes().max(1);
        let count = shards.lay_out(Phase::Gradients, planned.min(largest.max(1)))?;
        if count == 1 {
            return Ok(None);
        }
        if !by_shards_already {
            shards.give_whole(Phase::Features, shard_file::of_features(features)?)?;
        }
        let mut merged = shared.no_gradients();
        let mut estimates = Estimates::new(
            self.sources,
            self.objective,
            self.early_stopping,
            features,
            &self.samples.labels,
            count,
        );
        let mut early_stop = None;
        by_shards(
            steps,
            Phase::Gradients,
            count,
            shared.pairs(),
            |shard, progress| shared.gradients_of(shard, heads, progress),
            |bytes, steps| {
                shard_file::add_gradients(&mut merged, &bytes)?;
                early_stop = estimates.after(&merged, steps)?;
                Ok(match early_stop {
                    Some(_) => ControlFlow::Break(()),
                    None => ControlFlow::Continue(()),
                })
            },
        )?;
        Ok(Some((merged, early_stop)))
    }

    fn num_shards(&self, shards: &dyn Shards) -> usize {
        num_shards(
            self.samples.len(),
            self.tensors.len(),
            shards.min_shard_pairs(),
        )
    }

    fn shared(&self) -> Shared<'_> {
        Shared {
            vit: self.vit,
            samples: self.samples,
            prompts: &self.tensors,
        }
    }
}

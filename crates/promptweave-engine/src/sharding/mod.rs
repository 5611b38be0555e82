//! The engine's side of [shared](promptweave_domain::sharding) work: which samples a shard has, how
//! it is computed, and how shards are merged.

pub mod shard_file;
pub(crate) mod shard_worker;

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use crate::cache::CachedGradients;
use crate::compose::steps::{Steps, stop_on};
use crate::error::EngineError;
use crate::samples::Samples;
use crate::score::gradients;
use crate::score::gradients::{GradientStatistics, accumulate, by_label, sample_folds};
use crate::score::head::{SourceHead, folds};
use crate::vit::Vit;
use crate::vit::features::extract;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::{Next, Shard};

/// Rows of a shard's samples, in order. The samples of each class and of each jackknife fold are
/// dealt out in turn. So the first shards alone tell something about every class, and how certain
/// it is.
pub fn rows_of(shard: Shard, labels: &[usize]) -> Vec<usize> {
    let folds = gradients::num_folds(labels.len());
    let mut rows: Vec<usize> = (by_label(labels).into_iter().enumerate())
        .filter(|(rank, _)| (rank % folds + rank / folds) % shard.count == shard.index)
        .map(|(_, row)| row)
        .collect();
    rows.sort_unstable();
    rows
}

/// The inputs of every shard, for the owner and helpers alike.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    pub vit: &'a Vit,
    pub samples: &'a Samples,
    /// Prompts of all sources, on the device, [m, d] each.
    pub prompts: &'a [Tensor],
}

impl Shared<'_> {
    /// The sizes M, N, d.
    fn size(&self) -> [usize; 3] {
        let d = self.vit.config.embed_dim;
        [self.prompts.len(), self.samples.len(), d]
    }

    /// Number of sample × source pairs of a whole phase.
    pub fn pairs(&self) -> u64 {
        let [m, n, _] = self.size();
        (m * n) as u64
    }

    /// Computes the file of a shard of features.
    pub fn features_of(
        &self,
        shard: Shard,
        progress: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Vec<u8>, EngineError> {
        let rows = rows_of(shard, &self.samples.labels);
        let pairs = self.vit.pairs_of(&rows, self.samples, self.prompts);
        shard_file::of_features(&extract(self.vit, &pairs, progress)?)
    }

    /// Computes the file of a shard's sums over gradients.
    pub fn gradients_of(
        &self,
        shard: Shard,
        heads: &[SourceHead],
        progress: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Vec<u8>, EngineError> {
        let labels = &self.samples.labels;
        let rows = rows_of(shard, labels);
        let pairs = self.vit.pairs_of(&rows, self.samples, self.prompts);
        let known = CachedGradients::none(self.prompts.len());
        let sources = gradients::Sources {
            heads,
            known: &known,
        };
        let folds = folds(labels, self.vit.config.embed_dim);
        let sample_folds = sample_folds(labels);
        let sums = accumulate(self.vit, &pairs, &sources, &folds, &sample_folds, progress)?;
        shard_file::of_gradients(&sums)
    }

    /// Sums over no samples, to which shards are added.
    pub fn no_gradients(&self) -> GradientStatistics {
        let [m, n, _] = self.size();
        let folds = gradients::num_folds(n);
        GradientStatistics::new(m, self.num_params() as i64, folds, Device::Cpu)
    }

    /// Size of a shard's sums, in bytes.
    pub fn gradient_bytes(&self) -> usize {
        let [m, n, _] = self.size();
        gradients::sums_bytes(m, self.num_params(), gradients::num_folds(n))
    }

    fn num_params(&self) -> usize {
        self.prompts.first().map_or(0, |prompt| prompt.numel())
    }

    /// Starts to merge shards of features, in order, into the features of all samples [M, N, d].
    pub fn merge_features(&self) -> MergedFeatures<'_> {
        let kind = match self.vit.kind {
            Kind::Double => Kind::Double,
            _ => Kind::Float,
        };
        MergedFeatures {
            shared: self,
            features: Tensor::empty(self.size().map(|size| size as i64), (kind, Device::Cpu)),
            next: 0,
            count: 0,
        }
    }
}

/// Features of all samples, as far as they are merged.
pub struct MergedFeatures<'a> {
    shared: &'a Shared<'a>,
    features: Tensor,
    next: usize,
    count: usize,
}

impl MergedFeatures<'_> {
    /// Adds the next of `count` shards.
    pub fn add(&mut self, bytes: &[u8], count: usize) -> Result<(), EngineError> {
        let shard = Shard {
            phase: Phase::Features,
            index: self.next,
            count,
        };
        let [m, _, d] = self.shared.size();
        let rows = rows_of(shard, &self.shared.samples.labels);
        let of_shard = shard_file::features(bytes, [m, rows.len(), d])?;
        let rows: Vec<i64> = rows.into_iter().map(|row| row as i64).collect();
        let rows = Tensor::from_slice(&rows);
        let _ = self
            .features
            .f_index_copy_(1, &rows, &of_shard.to_kind(self.features.kind()))?;
        self.next += 1;
        self.count = count;
        Ok(())
    }

    /// The features of all samples, [M, N, d].
    ///
    /// # Panics
    /// If a shard is missing.
    pub fn whole(self) -> Tensor {
        assert!(
            self.next > 0 && self.next == self.count,
            "shards are missing"
        );
        self.features
    }
}

/// Runs a phase that was laid out. `compute` makes a shard's file. `merge` gets all files in order,
/// until it breaks off because no more are needed.
pub fn by_shards(
    steps: &mut Steps<'_>,
    phase: Phase,
    count: usize,
    pairs: u64,
    mut compute: impl FnMut(
        Shard,
        &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Vec<u8>, EngineError>,
    mut merge: impl FnMut(Vec<u8>, &mut Steps<'_>) -> Result<ControlFlow<()>, EngineError>,
) -> Result<(), EngineError> {
    let mut merged = 0;
    while merged < count {
        let shards = steps.shards().expect("it was laid out");
        let (next, done) = shards.next(phase)?;
        let done = (pairs as f64 * done / count as f64) as u64;
        let mut progress = steps.counter_from(done, pairs);
        stop_on(progress(0))?;
        match next {
            Next::Compute(shard) => {
                let bytes = compute(shard, &mut progress)?;
                drop(progress);
                let shards = steps.shards().expect("it was laid out");
                shards.give(shard, bytes)?;
            }
            Next::There(bytes) => {
                drop(progress);
                merged += 1;
                if merge(bytes, steps)?.is_break() {
                    let shards = steps.shards().expect("it was laid out");
                    shards.end(phase)?;
                    return Ok(());
                }
            }
            Next::Wait => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards(labels: &[usize], count: usize) -> Vec<Vec<usize>> {
        let of = |index| Shard {
            phase: Phase::Gradients,
            index,
            count,
        };
        (0..count).map(|index| rows_of(of(index), labels)).collect()
    }

    #[test]
    fn shards_have_every_sample_once_and_of_every_class_and_fold_their_share() {
        for (samples, classes) in [(200, 7), (1000, 100), (333, 2)] {
            let labels: Vec<usize> = (0..samples).map(|row| row * classes / samples).collect();
            let folds = sample_folds(&labels);
            for count in [1, 2, 5, 8, 10, 16] {
                let shards = shards(&labels, count);
                let mut all = shards.concat();
                all.sort_unstable();
                assert!(all.into_iter().eq(0..samples), "{samples} {count}");
                for rows in shards {
                    let share = samples as f64 / count as f64;
                    assert!((rows.len() as f64 - share).abs() <= 10.0, "{}", rows.len());
                    for fold in 0..10 {
                        let of_fold = rows.iter().filter(|row| folds[**row] == fold).count();
                        assert!((of_fold as f64 - share / 10.0).abs() <= 1.5, "{of_fold}");
                    }
                    let of_class = |class: usize| {
                        let of_class = rows.iter().filter(|row| labels[**row] == class);
                        of_class.count() as f64
                    };
                    let fair = share / classes as f64;
                    let unfair = (0..classes).find(|class| (of_class(*class) - fair).abs() > 4.0);
                    assert_eq!(unfair, None, "{samples} {classes} {count}");
                }
            }
        }
    }
}

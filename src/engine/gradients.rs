//! Per-sample gradients of the loss by each source prompt, streamed into their statistics.
//!
//! ```text
//! micro-batch of samples ─► patch tokens ─┬─► P₁ expanded to a leaf [B, m, d] ─► f ─► Σ loss ─► g₁ [B, m·d] ─┐
//!                                         ├─► P₂ …                                                          ├─► centred over prompts ─► S += g̃ᵢ∘g̃ⱼ
//!                                         └─► P_M …                                                         ┘
//! ```
//!
//! Backpropagating the *sum* of the samples' losses to a leaf that holds one copy of the prompt a
//! sample gives each copy exactly its own sample's gradient. Nothing of size N × M × m × d is held.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use super::EngineError;
use super::alignment::num_pairs;
use super::head::SourceHead;
use super::samples::Samples;
use super::vit::Vit;

/// Additive over samples: statistics of two shards add up to those of both.
pub struct GradientStatistics {
    /// [T, P] in f64: Σ_n g̃ᵢₙ[p] g̃ⱼₙ[p] for i ≤ j, packed row by row; P = m·d.
    products: Tensor,
    /// Σ_n ‖gᵢₙ‖², one a prompt, of the gradients as they are (not centred).
    squared_norms: Vec<f64>,
    num_samples: usize,
}

impl GradientStatistics {
    fn new(num_sources: usize, num_params: i64, device: Device) -> Self {
        let pairs = num_pairs(num_sources) as i64;
        Self {
            products: Tensor::zeros([pairs, num_params], (Kind::Double, device)),
            squared_norms: vec![0.0; num_sources],
            num_samples: 0,
        }
    }

    /// Adds a micro-batch: `gradients` [M, B, P].
    ///
    /// Subtracting each sample's mean over the prompts changes no variance about the mixed gradient
    /// (Σα = 1) and keeps the products from cancelling.
    fn add(&mut self, gradients: &Tensor) -> Result<(), EngineError> {
        let (m, batch, _) = gradients.size3()?;
        let gradients = gradients.to_kind(Kind::Double);
        let norms = gradients
            .square()
            .sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Double);
        for (sum, norm) in self
            .squared_norms
            .iter_mut()
            .zip(Vec::<f64>::try_from(norms)?)
        {
            *sum += norm;
        }
        let centred = &gradients - gradients.mean_dim(0, true, Kind::Double);
        let mut row = 0;
        for i in 0..m {
            for j in i..m {
                let product =
                    (centred.get(i) * centred.get(j)).sum_dim_intlist(0, false, Kind::Double);
                let _ = self.products.get(row).g_add_(&product);
                row += 1;
            }
        }
        self.num_samples += batch as usize;
        Ok(())
    }

    /// Γ = S Sᵀ [T, T], row-major, with S the products over N-1.
    pub fn gram(&self) -> Result<Vec<f64>, EngineError> {
        let s = &self.products / (self.num_samples.max(2) - 1) as f64;
        let gram = s.matmul(&s.tr()).to_device(Device::Cpu);
        if !bool::try_from(gram.isfinite().all())? {
            return Err(EngineError::NotFinite("the prompts' gradients"));
        }
        Ok(Vec::try_from(gram.flatten(0, -1))?)
    }

    /// Root mean square over samples of ‖∂ℓ/∂Pᵢ‖, one a prompt.
    pub fn rms(&self) -> Vec<f64> {
        let n = self.num_samples.max(1) as f64;
        self.squared_norms
            .iter()
            .map(|sum| (sum / n).sqrt())
            .collect()
    }
}

/// Runs every sample forward and backward through every prompt.
pub fn accumulate(
    vit: &Vit,
    samples: &Samples,
    prompts: &[Tensor],
    heads: &[SourceHead],
    folds: &[usize],
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<GradientStatistics, EngineError> {
    let num_params = prompts.first().map_or(0, |prompt| prompt.numel() as i64);
    let mut statistics = GradientStatistics::new(prompts.len(), num_params, vit.device);
    for rows in samples.micro_batches(vit.micro_batch(prompts)) {
        let patch_tokens = tch::no_grad(|| vit.patch_tokens(&samples.images(&rows, vit)));
        let labels: Vec<usize> = rows.iter().map(|row| samples.labels[*row]).collect();
        let folds: Vec<usize> = rows.iter().map(|row| folds[*row]).collect();
        let mut of_batch = Vec::with_capacity(prompts.len());
        for (prompt, head) in prompts.iter().zip(heads) {
            let gradient = per_sample(vit, &patch_tokens, prompt, head, &labels, &folds);
            of_batch.push(gradient.flatten(1, -1));
            if progress(rows.len() as u64).is_break() {
                return Err(EngineError::Stopped);
            }
        }
        statistics.add(&Tensor::stack(&of_batch, 0))?;
    }
    Ok(statistics)
}

/// ∂ℓ_b/∂P of every sample of a micro-batch, [B, m, d].
pub fn per_sample(
    vit: &Vit,
    patch_tokens: &Tensor,
    prompt: &Tensor,
    head: &SourceHead,
    labels: &[usize],
    folds: &[usize],
) -> Tensor {
    let batch = labels.len() as i64;
    let leaf = prompt
        .expand([batch, -1, -1], false)
        .contiguous()
        .set_requires_grad(true);
    let features = vit.features(patch_tokens, Some(&leaf));
    let loss = head.loss_sum(&features, labels, folds);
    if !loss.requires_grad() {
        // No sample of this micro-batch has a loss.
        return leaf.zeros_like();
    }
    Tensor::run_backward(&[loss], &[&leaf], false, false).swap_remove(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::head::folds;
    use crate::engine::testing::{D, TOKENS, alignment_statistics, noise_tensor, tiny_vit};

    fn close(a: &Tensor, b: &Tensor, tolerance: f64) {
        let difference = f64::try_from((a - b).abs().max()).unwrap();
        assert!(
            difference < tolerance,
            "{difference} is not below {tolerance}"
        );
    }

    fn head(features: &Tensor, labels: &[usize]) -> (SourceHead, Vec<usize>) {
        let folds = folds(labels, D);
        (
            SourceHead::fit(features, labels, &folds, 3, 0.3).unwrap(),
            folds,
        )
    }

    #[test]
    fn the_expanded_leaf_gives_each_samples_own_gradient() {
        let dir = tempfile::tempdir().unwrap();
        let vit = tiny_vit(dir.path(), Kind::Double);
        let tokens = vit.patch_tokens(&noise_tensor(&[12, 3, 16, 16], 1));
        let prompt = noise_tensor(&[TOKENS as i64, D as i64], 2);
        let labels: Vec<usize> = (0..12).map(|i| i % 3).collect();
        let (head, folds) = head(&vit.features(&tokens, Some(&prompt)), &labels);

        let batch = per_sample(&vit, &tokens, &prompt, &head, &labels, &folds);
        for i in 0..12usize {
            let one = tokens.narrow(0, i as i64, 1);
            let gradient =
                per_sample(&vit, &one, &prompt, &head, &labels[i..=i], &folds[i..=i]).get(0);
            close(&batch.get(i as i64), &gradient, 1e-12);
        }

        // And against central differences of that sample's loss, at five entries.
        let at = |prompt: &Tensor| {
            let features = vit.features(&tokens.narrow(0, 4, 1), Some(prompt));
            f64::try_from(head.loss_sum(&features, &labels[4..5], &folds[4..5])).unwrap()
        };
        for entry in [0i64, 17, 40, 63, 95] {
            let step = Tensor::zeros([(TOKENS * D) as i64], (Kind::Double, Device::Cpu));
            let _ = step.get(entry).fill_(1e-5);
            let step = step.view([TOKENS as i64, D as i64]);
            let slope = (at(&(&prompt + &step)) - at(&(&prompt - &step))) / 2e-5;
            let analytic = f64::try_from(batch.get(4).flatten(0, -1).get(entry)).unwrap();
            assert!(
                (slope - analytic).abs() < 1e-6 * (1.0 + analytic.abs()),
                "{slope} {analytic}"
            );
        }
    }

    #[test]
    fn statistics_do_not_depend_on_the_micro_batches() {
        let gradients = noise_tensor(&[3, 20, 7], 5);
        let gram = |sizes: &[i64]| {
            let mut statistics = GradientStatistics::new(3, 7, Device::Cpu);
            let mut start = 0;
            for size in sizes {
                statistics.add(&gradients.narrow(1, start, *size)).unwrap();
                start += size;
            }
            statistics.gram().unwrap()
        };
        let whole = gram(&[20]);
        for other in [gram(&[1; 20]), gram(&[7, 13])] {
            for (a, b) in whole.iter().zip(&other) {
                assert!((a - b).abs() <= 1e-12 * whole[0].abs());
            }
        }
    }

    #[test]
    fn the_streamed_gram_is_that_of_the_gradients() {
        let gradients = noise_tensor(&[4, 15, 6], 6);
        let mut statistics = GradientStatistics::new(4, 6, Device::Cpu);
        statistics.add(&gradients).unwrap();
        let expected = alignment_statistics(&gradients).gram;
        for (a, b) in statistics.gram().unwrap().iter().zip(&expected) {
            assert!((a - b).abs() <= 1e-12 * expected[0]);
        }
    }
}

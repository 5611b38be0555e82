//! Per-sample gradients of the loss by each source prompt, streamed into their statistics.
//!
//! ```text
//! micro-batch ─┬─► P₁, a copy a sample [B, m, d] ─► f ─► ∂ℓ/∂f ─► g₁ [B, m·d] ─┐
//!              ├─► P₂ …                                                        ├─► centred over prompts ─► fold's S += g̃ᵢ∘g̃ⱼ
//!              └─► P_M …                                                       ┘
//! ```
//!
//! Each sample has its own copy of the prompt. Backpropagating the *sum* of the samples' losses to
//! the copies gives each copy exactly its own sample's gradient. Nothing of size N × M × m × d is
//! held.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use crate::cache::CachedGradients;
use crate::compose::steps::stop_on;
use crate::error::EngineError;
use crate::score::alignment::{AlignmentStatistics, num_pairs, packed};
use crate::score::head::SourceHead;
use crate::vit::Vit;
use crate::vit::streams::Pairs;
use promptweave_domain::objective::GradientNormalization;

/// The most sample folds of the delete-one-fold jackknife.
const MAX_SAMPLE_FOLDS: usize = 10;
/// The most bytes of sums that are kept fold by fold. Beyond it there is one sum over all samples.
const MAX_FOLD_BYTES: usize = 2 << 30;

/// The fold of every sample for the jackknife, 0..J with J = min(10, N). The folds are stratified,
/// so that leaving one out removes about the same share of every class.
pub fn sample_folds(labels: &[usize]) -> Vec<usize> {
    let num_folds = num_folds(labels.len());
    let mut folds = vec![0; labels.len()];
    for (rank, row) in by_label(labels).into_iter().enumerate() {
        folds[row] = rank % num_folds;
    }
    folds
}

/// The number of folds J.
pub fn num_folds(num_samples: usize) -> usize {
    num_samples.min(MAX_SAMPLE_FOLDS)
}

/// Rows sorted by class; within a class they keep their order.
pub fn by_label(labels: &[usize]) -> Vec<usize> {
    let mut rows: Vec<usize> = (0..labels.len()).collect();
    rows.sort_by_key(|row| labels[*row]);
    rows
}

/// Summary of the gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientSummary {
    /// Statistics over all samples.
    pub whole: AlignmentStatistics,
    /// Statistics without the samples of fold j, one for each fold. Empty if they would not fit
    /// into memory.
    pub leave_out: Vec<AlignmentStatistics>,
    /// Cosines of the mean gradients ḡᵢ, [M, M] row-major; 0 for a mean that is zero.
    pub mean_cosine: Vec<f64>,
    /// √(mean over samples of ‖∂ℓ/∂Pᵢ‖²) of each prompt, before any normalisation.
    pub rms: Vec<f64>,
}

impl GradientSummary {
    /// The summary of the sources `keep`, in that order.
    pub fn of_sources(&self, keep: &[usize]) -> Self {
        let m = self.rms.len();
        let cosines = keep
            .iter()
            .flat_map(|i| keep.iter().map(move |j| self.mean_cosine[i * m + j]));
        Self {
            whole: self.whole.of_sources(keep),
            leave_out: self.leave_out.iter().map(|s| s.of_sources(keep)).collect(),
            mean_cosine: cosines.collect(),
            rms: keep.iter().map(|i| self.rms[*i]).collect(),
        }
    }

    /// Share of the pairs of prompts whose mean gradients have a negative cosine; `None` with one
    /// prompt.
    pub fn conflict_rate(&self) -> Option<f64> {
        let m = self.rms.len();
        let pairs = (0..m).flat_map(|i| (i + 1..m).map(move |j| i * m + j));
        let conflicts = pairs.filter(|at| self.mean_cosine[*at] < 0.0).count();
        (m > 1).then(|| conflicts as f64 / (num_pairs(m) - m) as f64)
    }
}

/// Sums over samples, fold by fold, in f64. Those of two shards add up to those of both.
///
/// Let ḡₙ be the mean of sample n's gradients over the prompts, and g̃ᵢₙ = gᵢₙ - ḡₙ. The products
/// are those of the M+1 vectors g̃₁ₙ … g̃_Mₙ, ḡₙ. Being centred over the prompts, they do not
/// cancel in variances about the mixed gradient, whatever the prompts share. But a prompt's own
/// scale rᵢ is known only at the end, and gᵢ/rᵢ minus its mean over the prompts is no combination
/// of g̃₁ … g̃_M alone. It is one if ḡ is added. So the products of the normalised gradients are a
/// linear map of these.
pub struct GradientStatistics {
    /// `[J, T', P]`: Σ_n a_n\[p] b_n\[p] over pairs of those vectors, packed; T' = (M+1)(M+2)/2, P = m·d.
    pub(crate) products: Tensor,
    /// `[J, M, P]`: Σ_n gᵢₙ\[p] and Σ_n gᵢₙ\[p]², of the gradients without centring.
    pub(crate) sums: Tensor,
    pub(crate) squares: Tensor,
    /// Number of samples in each fold.
    pub(crate) counts: Vec<usize>,
}

impl GradientStatistics {
    pub fn new(num_sources: usize, num_params: i64, num_folds: usize, device: Device) -> Self {
        let folds = kept_folds(num_sources, num_params as usize, num_folds);
        let zeros = |rows: usize| {
            let shape = [folds as i64, rows as i64, num_params];
            Tensor::zeros(shape, (Kind::Double, device))
        };
        Self {
            products: zeros(num_pairs(num_sources + 1)),
            sums: zeros(num_sources),
            squares: zeros(num_sources),
            counts: vec![0; folds],
        }
    }

    /// Adds a micro-batch: `gradients` [M, B, P] and the sample folds of its B samples.
    pub fn add(&mut self, gradients: &Tensor, sample_folds: &[usize]) -> Result<(), EngineError> {
        let gradients = gradients.to_kind(Kind::Double);
        let over_prompts = gradients.mean_dim(0, true, Kind::Double);
        let vectors = Tensor::cat(&[&(&gradients - &over_prompts), &over_prompts], 0);
        for fold in 0..self.counts.len() {
            let rows: Vec<i64> = (0..sample_folds.len())
                .filter(|row| self.counts.len() == 1 || sample_folds[*row] == fold)
                .map(|row| row as i64)
                .collect();
            if rows.is_empty() {
                continue;
            }
            self.counts[fold] += rows.len();
            let rows = Tensor::from_slice(&rows).to_device(gradients.device());
            let sum = |x: Tensor, dim: i64| x.sum_dim_intlist(dim, false, Kind::Double);
            let own = gradients.index_select(1, &rows);
            let fold = fold as i64;
            let _ = self.sums.get(fold).g_add_(&sum(own.shallow_clone(), 1));
            let _ = self.squares.get(fold).g_add_(&sum(own.square(), 1));
            let own = vectors.index_select(1, &rows);
            let products = self.products.get(fold);
            let mut row = 0;
            for i in 0..own.size()[0] {
                // Vector i with itself and all later vectors at once.
                let length = own.size()[0] - i;
                let product = sum(own.narrow(0, i, length) * own.narrow(0, i, 1), 1);
                let _ = products.narrow(0, row, length).g_add_(&product);
                row += length;
            }
        }
        Ok(())
    }

    /// Number of samples that were added.
    pub fn num_samples(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Adds another shard's sums, of the same prompts and number of folds.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.products.size(), other.products.size());
        let _ = self.products.g_add_(&other.products);
        let _ = self.sums.g_add_(&other.sums);
        let _ = self.squares.g_add_(&other.squares);
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    /// Computes the summary, with everything that is known only when every sample was seen.
    pub fn finish(&self, norm: GradientNormalization) -> Result<GradientSummary, EngineError> {
        let over_folds = |x: &Tensor| x.sum_dim_intlist(0, false, Kind::Double);
        let (products, sums, squares) = (
            over_folds(&self.products),
            over_folds(&self.sums),
            over_folds(&self.squares),
        );
        let count = self.num_samples();
        let per_prompt = squares.sum_dim_intlist(1, false, Kind::Double) / count.max(1) as f64;
        let rms = numbers(&per_prompt.sqrt())?;
        let scales: Vec<f64> = match norm {
            GradientNormalization::None => vec![1.0; rms.len()],
            // Without gradients there is nothing to normalise.
            GradientNormalization::Rms => rms
                .iter()
                .map(|rms| if *rms > 0.0 { 1.0 / rms } else { 1.0 })
                .collect(),
        };
        let map = pair_map(norm, &scales).to_device(products.device());
        let statistics = |products: &Tensor, sums: &Tensor, squares: &Tensor, count: usize| {
            let degrees = count.max(2) as f64 - 1.0;
            let s = map.matmul(products) / degrees;
            let mean_squares = sums.square() / count.max(1) as f64;
            let by_scale = Tensor::from_slice(&scales).square().unsqueeze(1);
            let variances = (squares - mean_squares).clamp_min(0.0) / degrees
                * by_scale.to_device(products.device());
            Ok::<_, EngineError>(AlignmentStatistics {
                num_sources: scales.len(),
                gram: numbers(&s.matmul(&s.tr()))?,
                variance_gram: numbers(&variances.matmul(&variances.tr()))?,
            })
        };
        let folds = 0..self.counts.len() as i64;
        let leave_out = folds
            .filter(|_| self.counts.len() > 1)
            .map(|fold| {
                statistics(
                    &(&products - self.products.get(fold)),
                    &(&sums - self.sums.get(fold)),
                    &(&squares - self.squares.get(fold)),
                    count - self.counts[fold as usize],
                )
            })
            .collect::<Result<_, _>>()?;
        Ok(GradientSummary {
            whole: statistics(&products, &sums, &squares, count)?,
            leave_out,
            mean_cosine: cosines(&numbers(&sums.matmul(&sums.tr()))?, rms.len()),
            rms,
        })
    }
}

/// `num_folds`, or 1 if sums fold by fold would take too much memory.
fn kept_folds(num_sources: usize, num_params: usize, num_folds: usize) -> usize {
    let bytes = num_folds * bytes_a_fold(num_sources, num_params);
    if bytes > MAX_FOLD_BYTES { 1 } else { num_folds }
}

/// Size of the sums of all kept folds, in bytes.
pub fn sums_bytes(num_sources: usize, num_params: usize, num_folds: usize) -> usize {
    kept_folds(num_sources, num_params, num_folds) * bytes_a_fold(num_sources, num_params)
}

fn bytes_a_fold(num_sources: usize, num_params: usize) -> usize {
    let rows = num_pairs(num_sources + 1) + 2 * num_sources;
    rows * num_params * size_of::<f64>()
}

/// The map [T, T'] from the accumulated packed products to those of aᵢ = gᵢcᵢ minus its mean over
/// the prompts, where cᵢ are the `scales`.
fn pair_map(norm: GradientNormalization, scales: &[f64]) -> Tensor {
    let m = scales.len();
    let mean = scales.iter().sum::<f64>() / m as f64;
    // aᵢ = Σ_k A_ik g̃_k + A_iM ḡ. Without normalisation aᵢ = g̃ᵢ. The other branch gives the same,
    // since Σ_k g̃_k = 0, but this one loses no digit.
    let coefficient = |i: usize, k: usize| match norm {
        GradientNormalization::None => f64::from(u8::from(i == k)),
        GradientNormalization::Rms if k == m => scales[i] - mean,
        GradientNormalization::Rms => {
            f64::from(u8::from(i == k)) * scales[i] - scales[k] / m as f64
        }
    };
    let (rows, columns) = (num_pairs(m), num_pairs(m + 1));
    let mut map = vec![0.0; rows * columns];
    for i in 0..m {
        for j in i..m {
            for k in 0..=m {
                for l in 0..=m {
                    let at = packed(i, j, m) * columns + packed(k, l, m + 1);
                    map[at] += coefficient(i, k) * coefficient(j, l);
                }
            }
        }
    }
    Tensor::from_slice(&map).view([rows as i64, columns as i64])
}

/// Cosines of M vectors from their inner products [M, M]; 0 for a zero vector, 1 on the diagonal.
fn cosines(inner: &[f64], m: usize) -> Vec<f64> {
    let norm = |i: usize| inner[i * m + i].sqrt();
    (0..m * m)
        .map(|at| match (at / m, at % m) {
            (i, j) if i == j => 1.0,
            (i, j) if norm(i) == 0.0 || norm(j) == 0.0 => 0.0,
            (i, j) => (inner[at] / (norm(i) * norm(j))).clamp(-1.0, 1.0),
        })
        .collect()
}

/// A tensor's values in row-major order. Values that are not finite are refused.
fn numbers(tensor: &Tensor) -> Result<Vec<f64>, EngineError> {
    if !bool::try_from(tensor.isfinite().all())? {
        return Err(EngineError::NotFinite("the prompts' gradients"));
    }
    Ok(Vec::try_from(tensor.to_device(Device::Cpu).flatten(0, -1))?)
}

/// The sources whose gradients are taken: the heads that define their losses, and the gradients
/// known already.
pub struct Sources<'a> {
    pub heads: &'a [SourceHead],
    pub known: &'a CachedGradients,
}

/// Runs the samples of `pairs` forward and backward through every prompt whose gradients are not
/// known. `folds` are the cross-fit folds of the heads and `sample_folds` those of the jackknife,
/// both for all samples.
pub fn accumulate(
    vit: &Vit,
    pairs: &Pairs<'_>,
    sources: &Sources<'_>,
    folds: &[usize],
    sample_folds: &[usize],
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<GradientStatistics, EngineError> {
    let Pairs {
        samples,
        prompts,
        batches,
    } = pairs;
    let Sources { heads, known } = sources;
    let num_params = prompts.first().map_or(0, |prompt| prompt.numel() as i64);
    let num_folds = sample_folds.iter().max().map_or(1, |last| last + 1);
    let mut statistics = GradientStatistics::new(prompts.len(), num_params, num_folds, vit.device);
    let unknown = known.unknown();
    if unknown.is_empty() {
        for rows in batches {
            stop_on(progress(0))?;
            let gradients = known.complete(rows, Vec::new())?;
            statistics.add(
                &gradients.to_device(vit.device),
                &of_rows(sample_folds, rows),
            )?;
        }
        return Ok(statistics);
    }
    let those = |all: &[Tensor]| -> Vec<Tensor> {
        unknown.iter().map(|i| all[*i].shallow_clone()).collect()
    };
    let pairs = Pairs {
        samples,
        prompts: &those(prompts),
        batches: batches.clone(),
    };
    vit.each_micro_batch(
        &pairs,
        || unknown.iter().map(|i| heads[*i].clone()).collect(),
        |heads: &mut Vec<SourceHead>, batch| {
            let of_rows = |all: &[usize]| of_rows(all, batch.rows);
            let (labels, folds) = (of_rows(&samples.labels), of_rows(folds));
            let slope = |i: usize, f: &Tensor| heads[i].slopes(f, &labels, &folds);
            Ok(batch.gradients(&mut { slope })?.flatten(2, -1))
        },
        |rows, computed| {
            let gradients = known.complete(rows, computed.unbind(0))?;
            statistics.add(
                &gradients.to_device(vit.device),
                &of_rows(sample_folds, rows),
            )
        },
        &mut progress,
    )?;
    Ok(statistics)
}

/// The values at these rows, out of all samples' values.
fn of_rows(all: &[usize], rows: &[usize]) -> Vec<usize> {
    rows.iter().map(|row| all[*row]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::head::folds;
    use crate::testing::{D, TOKENS, alignment_statistics, noise_tensor, tiny_pass};
    use crate::vit::Pass;
    use promptweave_domain::objective::HeadOptions;
    use std::ops::Range;

    fn close(a: &Tensor, b: &Tensor, tolerance: f64) {
        let difference = f64::try_from((a - b).abs().max()).unwrap();
        assert!(
            difference < tolerance,
            "{difference} is not below {tolerance}"
        );
    }

    /// f [B, d].
    fn features(pass: &mut dyn Pass, images: &Tensor, prompt: &Tensor) -> Tensor {
        pass.take_prompts(&[prompt.shallow_clone()]);
        pass.take_images(images);
        pass.features(0..1).get(0)
    }

    fn head(features: &Tensor, labels: &[usize]) -> (SourceHead, Vec<usize>) {
        let folds = folds(labels, D);
        (
            SourceHead::fit(features, labels, &folds, 3, &HeadOptions::default()).unwrap(),
            folds,
        )
    }

    #[test]
    fn the_expanded_leaf_gives_each_samples_own_gradient() {
        let dir = tempfile::tempdir().unwrap();
        let mut pass = tiny_pass(dir.path());
        let images = noise_tensor(&[12, 3, 16, 16], 1);
        let prompt = noise_tensor(&[TOKENS as i64, D as i64], 2);
        let labels: Vec<usize> = (0..12).map(|i| i % 3).collect();
        let features = features(pass.as_mut(), &images, &prompt);
        let (head, folds) = head(&features, &labels);
        let mut per_sample = |prompt: &Tensor, rows: Range<usize>| {
            pass.take_prompts(&[prompt.shallow_clone()]);
            pass.take_images(&images.narrow(0, rows.start as i64, rows.len() as i64));
            let slope = |_, f: &Tensor| head.slopes(f, &labels[rows.clone()], &folds[rows.clone()]);
            pass.gradients(0..1, &mut { slope }).unwrap().get(0)
        };

        let batch = per_sample(&prompt, 0..12);
        for i in 0..12 {
            let gradient = per_sample(&prompt, i..i + 1).get(0);
            close(&batch.get(i as i64), &gradient, 1e-12);
        }
        // Reordering the prompt's tokens reorders the gradients' rows in the same way.
        let order = Tensor::from_slice(&[2i64, 0, 1]);
        let gradients = per_sample(&prompt.index_select(0, &order), 0..12);
        close(&gradients, &batch.index_select(1, &order), 1e-12);

        // Compares with central differences of a sample's loss, at five entries.
        let mut at = |prompt: &Tensor| {
            let features = self::features(pass.as_mut(), &images.narrow(0, 4, 1), prompt);
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

    /// Statistics of gradients [M, N, P] that are added in micro-batches of these sizes.
    fn streamed(gradients: &Tensor, folds: &[usize], sizes: &[usize]) -> GradientStatistics {
        let (m, _, p) = gradients.size3().unwrap();
        let num_folds = folds.iter().max().unwrap() + 1;
        let mut statistics = GradientStatistics::new(m as usize, p, num_folds, Device::Cpu);
        let mut start = 0;
        for size in sizes {
            let batch = gradients.narrow(1, start as i64, *size as i64);
            statistics.add(&batch, &folds[start..start + size]).unwrap();
            start += size;
        }
        statistics
    }

    /// Gradients [3, 20, 7] of different scales, with means and a part common to the prompts.
    fn gradients() -> Tensor {
        noise_tensor(&[3, 20, 7], 5) * Tensor::from_slice(&[1.0, 0.2, 3.0]).view([3, 1, 1])
            + noise_tensor(&[3, 1, 7], 6)
            + noise_tensor(&[1, 20, 7], 7)
    }

    fn folds_of_twenty() -> Vec<usize> {
        sample_folds(&(0..20).map(|i| i % 3).collect::<Vec<_>>())
    }

    fn assert_numbers(found: &[f64], expected: &[f64], tolerance: f64) {
        let scale = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() <= tolerance * scale, "{a} is not {b}");
        }
    }

    fn assert_statistics(found: &AlignmentStatistics, expected: &AlignmentStatistics, by: f64) {
        assert_numbers(&found.gram, &expected.gram, by);
        assert_numbers(&found.variance_gram, &expected.variance_gram, by);
    }

    #[test]
    fn neither_micro_batches_nor_shards_change_the_statistics() {
        let (gradients, folds) = (gradients(), folds_of_twenty());
        let norm = GradientNormalization::None;
        let whole = streamed(&gradients, &folds, &[20]).finish(norm).unwrap();
        for sizes in [&[1; 20][..], &[7, 13]] {
            let other = streamed(&gradients, &folds, sizes).finish(norm).unwrap();
            assert_statistics(&other.whole, &whole.whole, 1e-12);
            assert_statistics(&other.leave_out[3], &whole.leave_out[3], 1e-12);
        }

        let merged = |order: [usize; 3]| {
            let shards = [(0, 8), (8, 4), (12, 8)].map(|(start, length)| {
                let rows = gradients.narrow(1, start as i64, length as i64);
                let mut all = GradientStatistics::new(3, 7, 10, Device::Cpu);
                all.add(&rows, &folds[start..start + length]).unwrap();
                all
            });
            let mut sum = GradientStatistics::new(3, 7, 10, Device::Cpu);
            for shard in order {
                sum.merge(&shards[shard]);
            }
            sum.finish(norm).unwrap()
        };
        assert_eq!(merged([0, 1, 2]), merged([0, 1, 2]));
        assert_statistics(&merged([0, 1, 2]).whole, &whole.whole, 1e-12);
        assert_statistics(&merged([2, 0, 1]).whole, &whole.whole, 1e-12);
    }

    #[test]
    fn the_streamed_statistics_are_those_of_the_gradients_with_and_without_each_fold() {
        let (raw, folds) = (gradients(), folds_of_twenty());
        let squares = raw.square().sum_dim_intlist(2, false, Kind::Double);
        let rms = squares.mean_dim(1, false, Kind::Double).sqrt();
        let normalised = &raw / rms.view([3, 1, 1]);
        for (norm, gradients) in [
            (GradientNormalization::None, &raw),
            (GradientNormalization::Rms, &normalised),
        ] {
            let statistics = streamed(&raw, &folds, &[6, 14]);
            let summary = statistics.finish(norm).unwrap();
            assert_statistics(&summary.whole, &alignment_statistics(gradients), 1e-12);
            assert_eq!(summary.leave_out.len(), 10);
            for (fold, left) in summary.leave_out.iter().enumerate() {
                let kept: Vec<i64> = (0..20).filter(|n| folds[*n as usize] != fold).collect();
                let kept = gradients.index_select(1, &Tensor::from_slice(&kept));
                assert_statistics(left, &alignment_statistics(&kept), 1e-12);
            }
            assert_numbers(&summary.rms, &numbers(&rms).unwrap(), 1e-12);
        }
    }

    #[test]
    fn normalised_gradients_forget_their_scale_and_zero_gradients_stay_zero() {
        let (gradients, folds) = (gradients(), folds_of_twenty());
        let scaled = |second: f64| {
            let factors = Tensor::from_slice(&[1.0, second, 1.0]).view([3, 1, 1]);
            let statistics = streamed(&(&gradients * factors), &folds, &[20]);
            statistics.finish(GradientNormalization::Rms).unwrap()
        };
        let whole = scaled(1.0).whole;
        assert_statistics(&scaled(30.0).whole, &whole, 1e-10);
        let without = scaled(0.0);
        assert_eq!(without.rms[1], 0.0);
        assert_eq!(without.whole.variance_gram[4], 0.0);
        let others = without.whole.variance_gram[8];
        assert_numbers(&[others], &[whole.variance_gram[8]], 1e-12);
        assert!(without.whole.gram.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn mean_gradients_that_oppose_each_other_are_conflicts() {
        // The means are e₁, -e₁ + e₂, 0 and -e₂.
        let rows = [1.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0];
        let means = Tensor::from_slice(&rows).view([4, 1, 2]);
        let apart = Tensor::from_slice(&[0.5, -0.5]).view([1, 2, 1]);
        let statistics = streamed(&(means + apart), &[0, 1], &[2]);
        let summary = statistics.finish(GradientNormalization::None).unwrap();
        let half = -(0.5f64.sqrt());
        let expected = [
            [1.0, half, 0.0, 0.0],
            [half, 1.0, 0.0, half],
            [0.0, 0.0, 1.0, 0.0],
            [0.0, half, 0.0, 1.0],
        ];
        assert_numbers(&summary.mean_cosine, expected.as_flattened(), 1e-12);
        assert_eq!(summary.conflict_rate(), Some(2.0 / 6.0));
    }

    #[test]
    fn sample_folds_take_every_class_in_turn() {
        let labels: Vec<usize> = (0..100).map(|i| (i * 7) % 5).collect();
        let folds = sample_folds(&labels);
        for fold in 0..10 {
            for class in 0..5 {
                let both = (0..100).filter(|n| folds[*n] == fold && labels[*n] == class);
                assert_eq!(both.count(), 2);
            }
        }
        assert_eq!(sample_folds(&[1, 0, 1]), [1, 0, 2]);
    }

    #[test]
    fn sums_that_would_not_fit_into_memory_are_not_kept_by_fold() {
        assert_eq!(kept_folds(11, 50 * 768, 10), 10);
        assert_eq!(kept_folds(40, 50 * 768, 10), 1);
        let mut whole = GradientStatistics::new(2, 3, 1, Device::Cpu);
        whole
            .add(&noise_tensor(&[2, 4, 3], 8), &[0, 1, 2, 3])
            .unwrap();
        let summary = whole.finish(GradientNormalization::None).unwrap();
        assert!(summary.leave_out.is_empty());
        let expected = alignment_statistics(&noise_tensor(&[2, 4, 3], 8));
        assert_statistics(&summary.whole, &expected, 1e-12);
    }
}

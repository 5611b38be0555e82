//! The heads that define the loss: a target task has labels and no head.
//!
//! They are fitted in closed form on the target samples, one for each source or one for all
//! (`shared`). With few samples they are cross-fitted, since the residuals of samples that a head
//! was fitted on are too small, and so are their gradients. The loss is the cross-entropy of
//! softmax(logits / T) with one temperature T. Shrinkage ρ_h = 0.3 and the temperature keep a head
//! from saturating: a sharp head leaves a handful of samples with nearly all of the gradient.

mod closed_form;

use tch::{Kind, Tensor};

pub use self::closed_form::ClosedFormHead;
use crate::error::EngineError;
use promptweave_domain::objective::{HeadKind, HeadOptions};

/// A sample is saturated if the largest probability of a class exceeds this.
const SATURATED: f64 = 0.999;

/// The head of one source prompt on the target samples, with the loss it defines.
#[derive(Clone)]
pub struct SourceHead {
    /// One head fitted on all samples; or two, each used on the fold that it was not fitted on.
    heads: Vec<ClosedFormHead>,
    /// T > 0; the loss is the cross-entropy of softmax(logits / T).
    pub temperature: f64,
    /// Mean loss in nats over the samples it was fitted on (one head) or not fitted on (two heads).
    /// A sample whose class its head never saw has loss 0.
    pub loss: f64,
    /// Share of the samples with a loss to whose largest class the head gives a probability above
    /// 0.999.
    pub saturation: f64,
}

/// Number of heads: two with few samples (N < 3d), otherwise one.
pub fn num_heads(num_samples: usize, embed_dim: usize) -> usize {
    if num_samples < 3 * embed_dim { 2 } else { 1 }
}

/// The fold of every sample. With one head all are 0. With cross-fit (N < 3d) it is the number of
/// earlier samples of the same class, mod 2.
pub fn folds(labels: &[usize], embed_dim: usize) -> Vec<usize> {
    if num_heads(labels.len(), embed_dim) == 1 {
        return vec![0; labels.len()];
    }
    let mut seen = std::collections::HashMap::new();
    labels
        .iter()
        .map(|label| {
            let earlier = seen.entry(label).or_insert(0);
            let fold = *earlier % 2;
            *earlier += 1;
            fold
        })
        .collect()
}

/// Fits the head of every source. `features` is [M, N, d]; `labels` and `folds` (as [`folds`] made
/// them) have N entries. `tick` is called after every source.
pub fn fit_heads(
    features: &Tensor,
    labels: &[usize],
    folds: &[usize],
    num_classes: usize,
    options: &HeadOptions,
    tick: &mut dyn FnMut() -> Result<(), EngineError>,
) -> Result<Vec<SourceHead>, EngineError> {
    let (m, n, d) = features.size3()?;
    let shared = match options.kind {
        HeadKind::Lda | HeadKind::Ridge => None,
        HeadKind::Shared => {
            // Every sample appears once for each source, always with its own fold. So no row of a
            // sample is in the fit of the head that is used on it.
            let rows = features.reshape([m * n, d]);
            let (labels, folds) = (labels.repeat(m as usize), folds.repeat(m as usize));
            let count = num_heads(n as usize, d as usize);
            let heads = fit_by_fold(&rows, &labels, &folds, num_classes, options, count)?;
            Some(SourceHead::with(heads, &rows, &labels, &folds)?)
        }
    };
    (0..m)
        .map(|i| {
            let own = features.get(i);
            let head = match &shared {
                None => SourceHead::fit(&own, labels, folds, num_classes, options)?,
                Some(shared) => shared.on(&own, labels, folds)?,
            };
            tick()?;
            Ok(head)
        })
        .collect()
}

/// Fits one head for each fold. Head k is used on fold k, so with two folds it is fitted on the
/// other one.
fn fit_by_fold(
    features: &Tensor,
    labels: &[usize],
    folds: &[usize],
    num_classes: usize,
    options: &HeadOptions,
    count: usize,
) -> Result<Vec<ClosedFormHead>, EngineError> {
    (0..count)
        .map(|own| {
            let rows: Vec<usize> = (0..labels.len())
                .filter(|row| count == 1 || folds[*row] != own)
                .collect();
            let of_rows: Vec<usize> = rows.iter().map(|row| labels[*row]).collect();
            let selected = features.index_select(0, &row_tensor(&rows));
            ClosedFormHead::fit(&selected, &of_rows, num_classes, options)
        })
        .collect()
}

impl SourceHead {
    /// One given head at T = 1, for comparison with other code.
    pub fn given(head: ClosedFormHead) -> Self {
        Self {
            heads: vec![head],
            temperature: 1.0,
            loss: 0.0,
            saturation: 0.0,
        }
    }

    /// Fits the head of one source. `features` is [N, d]; `folds` as [`folds`] made them.
    pub fn fit(
        features: &Tensor,
        labels: &[usize],
        folds: &[usize],
        num_classes: usize,
        options: &HeadOptions,
    ) -> Result<Self, EngineError> {
        let (n, d) = features.size2()?;
        // The count does not come from the largest fold: with singleton classes only, all samples
        // are in fold 0 of two.
        let count = num_heads(n as usize, d as usize);
        let heads = fit_by_fold(features, labels, folds, num_classes, options, count)?;
        Self::with(heads, features, labels, folds)
    }

    /// These heads with the temperature of least loss on `features` [n, d].
    fn with(
        heads: Vec<ClosedFormHead>,
        features: &Tensor,
        labels: &[usize],
        folds: &[usize],
    ) -> Result<Self, EngineError> {
        let mut head = Self {
            heads,
            temperature: 1.0,
            loss: 0.0,
            saturation: 0.0,
        };
        head.temperature = fit_temperature(&head.logits(features, labels, folds)?);
        head.on(features, labels, folds)
    }

    /// This head, with its loss and saturation on `features` [n, d].
    fn on(
        &self,
        features: &Tensor,
        labels: &[usize],
        folds: &[usize],
    ) -> Result<Self, EngineError> {
        let logits = self.logits(features, labels, folds)?;
        let beta = 1.0 / self.temperature;
        let total: f64 = logits.iter().map(|(z, y)| loss(z, *y, beta)).sum();
        let saturated = logits
            .iter()
            .filter(|(z, _)| largest_probability(z, beta) > SATURATED)
            .count();
        Ok(Self {
            heads: self.heads.clone(),
            temperature: self.temperature,
            loss: total / labels.len().max(1) as f64,
            saturation: saturated as f64 / logits.len().max(1) as f64,
        })
    }

    /// Logits and label of every sample that has a loss, by the head of its fold.
    fn logits(
        &self,
        features: &Tensor,
        labels: &[usize],
        folds: &[usize],
    ) -> Result<Vec<(Vec<f64>, usize)>, EngineError> {
        let of_heads = self
            .heads
            .iter()
            .map(|head| Ok(Vec::try_from(head.logits(features).flatten(0, -1))?))
            .collect::<Result<Vec<Vec<f64>>, EngineError>>()?;
        let num_classes = of_heads[0].len() / labels.len().max(1);
        Ok((0..labels.len())
            .filter(|row| self.heads[folds[*row]].knows(labels[*row]))
            .map(|row| {
                let of_row = &of_heads[folds[row]][row * num_classes..(row + 1) * num_classes];
                (of_row.to_vec(), labels[row])
            })
            .collect())
    }

    /// ∂ℓ/∂f [B, d] of a micro-batch's samples, each by its own loss.
    pub fn slopes(
        &self,
        features: &Tensor,
        labels: &[usize],
        folds: &[usize],
    ) -> Result<Tensor, EngineError> {
        let leaf = features.detach().copy().set_requires_grad(true);
        let loss = self.loss_sum(&leaf, labels, folds);
        if !loss.requires_grad() {
            // No sample of this micro-batch has a loss.
            return Ok(features.zeros_like());
        }
        Ok(Tensor::f_run_backward(&[loss], &[&leaf], false, false)?.swap_remove(0))
    }

    /// Sum of the losses of a micro-batch: `features` [B, d] (its graph is kept), and the labels
    /// and folds of its samples. A sample whose class its head never saw has no loss.
    pub fn loss_sum(&self, features: &Tensor, labels: &[usize], folds: &[usize]) -> Tensor {
        let device = features.device();
        let mut total = Tensor::zeros([], (Kind::Double, device));
        for (fold, head) in self.heads.iter().enumerate() {
            let rows: Vec<usize> = (0..labels.len())
                .filter(|row| folds[*row] == fold && head.knows(labels[*row]))
                .collect();
            if rows.is_empty() {
                continue;
            }
            let of_rows: Vec<usize> = rows.iter().map(|row| labels[*row]).collect();
            let selected = features.index_select(0, &row_tensor(&rows).to_device(device));
            let log_p = (head.logits(&selected) / self.temperature).log_softmax(-1, None);
            let own = row_tensor(&of_rows).to_device(device).unsqueeze(1);
            total -= log_p.gather(1, &own, false).sum(Kind::Double);
        }
        total
    }
}

/// Row numbers as an index tensor.
pub fn row_tensor(rows: &[usize]) -> Tensor {
    Tensor::from_slice(&rows.iter().map(|row| *row as i64).collect::<Vec<_>>())
}

/// Cross-entropy of softmax(β z) at label y, in nats.
fn loss(z: &[f64], y: usize, beta: f64) -> f64 {
    let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = z.iter().map(|v| (beta * (v - largest)).exp()).sum();
    sum.ln() - beta * (z[y] - largest)
}

/// The largest probability of softmax(β z).
fn largest_probability(z: &[f64], beta: f64) -> f64 {
    let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    1.0 / z.iter().map(|v| (beta * (v - largest)).exp()).sum::<f64>()
}

/// The mean cross-entropy of softmax(z/T), in nats.
pub fn mean_loss(logits: &[(Vec<f64>, usize)], temperature: f64) -> f64 {
    let beta = 1.0 / temperature;
    let total: f64 = logits.iter().map(|(z, y)| loss(z, *y, beta)).sum();
    total / logits.len().max(1) as f64
}

/// The T in [1e-3, 1e3] with the least mean loss. The loss is convex in β = 1/T with derivative
/// E_p\[z] - z_y, so its root is bisected, on a logarithmic scale.
pub fn fit_temperature(logits: &[(Vec<f64>, usize)]) -> f64 {
    let slope = |beta: f64| -> f64 {
        logits
            .iter()
            .map(|(z, y)| {
                let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let (mut sum, mut mean) = (0.0, 0.0);
                for v in z {
                    let p = (beta * (v - largest)).exp();
                    sum += p;
                    mean += p * (v - largest);
                }
                mean / sum - (z[*y] - largest)
            })
            .sum()
    };
    let (mut low, mut high) = (1e-3f64.ln(), 1e3f64.ln());
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if slope(middle.exp()) < 0.0 {
            low = middle;
        } else {
            high = middle;
        }
    }
    (-0.5 * (low + high)).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise_tensor;

    const KINDS: [HeadKind; 3] = [HeadKind::Lda, HeadKind::Ridge, HeadKind::Shared];

    fn options(kind: HeadKind) -> HeadOptions {
        HeadOptions {
            kind,
            shrinkage: 0.3,
        }
    }

    /// Three classes in turn, with means of the given size: [2, n, 6].
    fn features(n: usize, signal: f64, seed: u64) -> (Tensor, Vec<usize>) {
        let labels: Vec<usize> = (0..n).map(|i| i % 3).collect();
        let means = noise_tensor(&[2, 3, 6], 100).index_select(1, &row_tensor(&labels));
        (
            noise_tensor(&[2, n as i64, 6], seed) + means * signal,
            labels,
        )
    }

    fn fitted(features: &Tensor, labels: &[usize], kind: HeadKind) -> Vec<SourceHead> {
        let folds = folds(labels, 6);
        fit_heads(features, labels, &folds, 3, &options(kind), &mut || Ok(())).unwrap()
    }

    fn logits(head: &SourceHead, features: &Tensor, labels: &[usize]) -> Vec<f64> {
        let logits = head.logits(features, labels, &folds(labels, 6)).unwrap();
        logits.into_iter().flat_map(|(z, _)| z).collect()
    }

    #[test]
    fn every_kind_beats_chance_on_samples_it_was_not_fitted_on() {
        // 15 < 3·6 samples are cross-fitted, 60 are not; chance is ln 3 nats.
        for n in [15, 60] {
            let (features, labels) = features(n, 2.0, 1);
            for kind in KINDS {
                for head in fitted(&features, &labels, kind) {
                    assert_eq!(head.heads.len(), if n == 15 { 2 } else { 1 });
                    assert!(head.loss < 0.8 * 3f64.ln(), "{kind:?} {n}: {}", head.loss);
                }
            }
        }
    }

    #[test]
    fn the_shared_head_is_one_and_the_others_are_each_their_own() {
        let (features, labels) = features(15, 1.0, 2);
        for kind in KINDS {
            let heads = fitted(&features, &labels, kind);
            let (first, second) = (&heads[0], &heads[1]);
            let on_one = |head| logits(head, &features.get(0), &labels);
            let same = on_one(first) == on_one(second) && first.temperature == second.temperature;
            assert_eq!(same, kind == HeadKind::Shared);
            assert_ne!(first.loss, second.loss, "each on its own source's features");
        }
        // It equals the head of all rows together, and no sample's row is in the fit of its own
        // head.
        let heads = fitted(&features, &labels, HeadKind::Shared);
        let folds = folds(&labels, 6);
        let others: Vec<usize> = (0..15).filter(|row| folds[*row] == 1).collect();
        let rows = features
            .index_select(1, &row_tensor(&others))
            .reshape([-1, 6]);
        let of_rows: Vec<usize> = others.iter().map(|row| labels[*row]).collect();
        let by_hand =
            ClosedFormHead::fit(&rows, &of_rows.repeat(2), 3, &options(HeadKind::Lda)).unwrap();
        let difference =
            by_hand.logits(&features.get(0)) - heads[0].heads[0].logits(&features.get(0));
        assert!(f64::try_from(difference.abs().max()).unwrap() < 1e-12);
    }

    #[test]
    fn a_sharp_head_is_saturated_and_noise_is_not() {
        let (separated, labels) = features(60, 1000.0, 3);
        let (noise, _) = features(60, 0.0, 4);
        for kind in KINDS {
            for head in fitted(&separated, &labels, kind) {
                assert!(head.saturation > 0.95, "{kind:?}: {}", head.saturation);
            }
            for head in fitted(&noise, &labels, kind) {
                assert_eq!(head.saturation, 0.0, "{kind:?}");
            }
        }
        assert!(
            (largest_probability(&[1.0, 3.0], 2.0) - 1.0 / (1.0 + (-4f64).exp())).abs() < 1e-15
        );
    }

    #[test]
    fn a_class_that_the_samples_head_never_saw_has_no_loss() {
        let (features, _) = features(5, 1.0, 5);
        // Cross-fitted with one sample for every class: no head knows the class it is used on.
        let labels = [0, 1, 2, 3, 4];
        let folds = folds(&labels, 6);
        assert_eq!(folds, [0; 5]);
        for kind in KINDS {
            let heads = fit_heads(
                &features,
                &labels,
                &folds,
                5,
                &options(kind),
                &mut || Ok(()),
            );
            for head in heads.unwrap() {
                assert_eq!((head.loss, head.saturation), (0.0, 0.0));
                let sum = head.loss_sum(&features.get(0), &labels, &folds);
                assert_eq!(f64::try_from(sum).unwrap(), 0.0);
            }
        }
        // A single singleton is in fold 0, and the head of fold 0 was fitted on the others.
        let labels = [0, 0, 0, 0, 1];
        let folds = self::folds(&labels, 6);
        let own = features.get(0);
        let head = SourceHead::fit(&own, &labels, &folds, 2, &HeadOptions::default()).unwrap();
        let lost = |row: usize| {
            let of_row = own.narrow(0, row as i64, 1);
            let sum = head.loss_sum(&of_row, &labels[row..=row], &folds[row..=row]);
            f64::try_from(sum).unwrap()
        };
        assert_eq!(lost(4), 0.0);
        assert!(lost(1) > 0.0);
    }

    #[test]
    fn fitting_stops_when_told_to() {
        let (features, labels) = features(15, 1.0, 6);
        let folds = folds(&labels, 6);
        let mut stop = || Err(EngineError::Stopped);
        let stopped = fit_heads(
            &features,
            &labels,
            &folds,
            3,
            &HeadOptions::default(),
            &mut stop,
        );
        assert!(matches!(stopped, Err(EngineError::Stopped)));
    }

    #[test]
    fn the_temperature_minimises_the_loss() {
        let logits = vec![
            (vec![4.0, 0.0, 1.0], 0),
            (vec![3.0, 5.0, 0.0], 0),
            (vec![0.0, 2.0, -1.0], 1),
        ];
        let fitted = fit_temperature(&logits);
        let mean = |t: f64| {
            logits
                .iter()
                .map(|(z, y)| loss(z, *y, 1.0 / t))
                .sum::<f64>()
        };
        assert!(mean(fitted) < mean(fitted * 1.01) && mean(fitted) < mean(fitted / 1.01));
    }

    #[test]
    fn folds_alternate_within_a_class_only_when_samples_are_few() {
        assert_eq!(folds(&[0, 0, 1, 0, 1], 4), [0, 1, 0, 0, 1]);
        assert_eq!(folds(&[0, 0, 1, 0, 1, 1], 2), [0; 6]);
    }
}

//! The closed-form head that defines the loss: shrunken linear discriminant analysis.
//!
//! A target task has labels and no head. With S_w = C - B the within-class covariance of the features
//! (both with 1/(N-1)), S = (1-ρ_h) S_w + ρ_h (tr S_w/d) I, the head is W_c = S⁻¹ μ_c and
//! b_c = log π_c - ½ μ_cᵀ S⁻¹ μ_c. ρ_h = 0.3 and a temperature keep it from saturating: a sharp head
//! leaves a handful of samples with nearly all of the gradient.

use tch::{Device, Kind, Tensor};

use super::{EngineError, cholesky, plain};
use crate::domain::prompt_file::Head;
use crate::domain::tensor::Tensor as PlainTensor;

/// Logit of a class that no sample of the fit shows; finite so that it can be stored and scaled.
const ABSENT: f64 = -1e30;

/// W [K, d] and b [K], in f64 on the CPU. K counts all classes of the data set.
pub struct ClosedFormHead {
    weight: Tensor,
    bias: Tensor,
    present: Vec<bool>,
}

impl ClosedFormHead {
    /// `features` [n, d]; `labels` has n entries below `num_classes`.
    pub fn fit(
        features: &Tensor,
        labels: &[usize],
        num_classes: usize,
        shrinkage: f64,
    ) -> Result<Self, EngineError> {
        let features = features.to_kind(Kind::Double);
        let (n, d) = features.size2()?;
        let mut counts = vec![0u32; num_classes];
        labels.iter().for_each(|label| counts[*label] += 1);
        let classes: Vec<usize> = (0..num_classes).filter(|c| counts[*c] > 0).collect();

        // Centred, which changes no discriminant direction and keeps the numbers small; the bias
        // below puts the shift back.
        let centre = features.mean_dim(0, true, Kind::Double);
        let x = &features - &centre;
        let means = class_means(&x, labels, &classes)?;
        let own_row: Vec<i64> = labels
            .iter()
            .map(|label| classes.binary_search(label).expect("present") as i64)
            .collect();
        let residual = &x - means.index_select(0, &Tensor::from_slice(&own_row));
        let scale = (n - 1).max(1) as f64;
        let within = residual.tr().matmul(&residual) / scale;
        let trace = f64::try_from(within.trace())? / d as f64;
        // With singletons only, S_w is 0: any positive multiple of I then gives the nearest mean.
        let floor = if trace > 0.0 { 0.0 } else { 1.0 };
        let identity = Tensor::eye(d, (Kind::Double, within.device()));
        let shrunk = within * (1.0 - shrinkage) + identity * (shrinkage * trace + floor);
        let solved = means
            .tr()
            .cholesky_solve(&cholesky(&shrunk, "the features")?, false);

        let priors: Vec<f64> = classes
            .iter()
            .map(|c| f64::from(counts[*c]) / n as f64)
            .collect();
        let quadratic = (means.tr() * &solved).sum_dim_intlist(0, false, Kind::Double) * 0.5;
        let shift = centre.matmul(&solved).squeeze_dim(0);
        let fitted_bias = Tensor::from_slice(&priors).log() - quadratic - shift;

        let rows = row_tensor(&classes);
        let (k, on_cpu) = (num_classes as i64, (Kind::Double, Device::Cpu));
        let weight = Tensor::zeros([k, d], on_cpu).index_copy(0, &rows, &solved.tr());
        let bias = Tensor::full([k], ABSENT, on_cpu).index_copy(0, &rows, &fitted_bias);
        if !bool::try_from(weight.isfinite().all())? {
            return Err(EngineError::NotFinite("the closed-form head"));
        }
        Ok(Self {
            weight,
            bias,
            present: counts.iter().map(|c| *c > 0).collect(),
        })
    }

    /// [n, d] → [n, K], in f64.
    pub fn logits(&self, features: &Tensor) -> Tensor {
        let features = features.to_kind(Kind::Double);
        features.linear(
            &self.weight.to_device(features.device()),
            Some(&self.bias.to_device(features.device())),
        )
    }

    /// Samples whose largest logit is their label's.
    pub fn count_correct(&self, features: &Tensor, labels: &[usize]) -> Result<usize, EngineError> {
        let predicted: Vec<i64> = Vec::try_from(self.logits(features).argmax(-1, false))?;
        Ok(predicted
            .iter()
            .zip(labels)
            .filter(|(p, l)| **p == **l as i64)
            .count())
    }

    /// As a prompt file stores it.
    pub fn to_prompt_head(&self) -> Result<Head, EngineError> {
        let (k, d) = self.weight.size2()?;
        Ok(Head {
            weight: PlainTensor::new([k as usize, d as usize], plain(&self.weight)?),
            bias: PlainTensor::new([k as usize], plain(&self.bias)?),
        })
    }
}

/// Means of the rows of `x` [n, d] by class, [classes, d].
pub fn class_means(x: &Tensor, labels: &[usize], classes: &[usize]) -> Result<Tensor, EngineError> {
    let n = labels.len();
    let mut indicator = vec![0f64; classes.len() * n];
    for (row, class) in classes.iter().enumerate() {
        let count = labels.iter().filter(|label| *label == class).count() as f64;
        for (column, _) in labels
            .iter()
            .enumerate()
            .filter(|(_, label)| *label == class)
        {
            indicator[row * n + column] = 1.0 / count;
        }
    }
    Ok(Tensor::from_slice(&indicator)
        .view([classes.len() as i64, n as i64])
        .matmul(x))
}

/// The head of one source prompt on the target samples, with the loss it defines.
pub struct SourceHead {
    /// One head on all samples, or two, each fitted on one fold.
    heads: Vec<ClosedFormHead>,
    /// T > 0; the loss is the cross-entropy of softmax(logits / T).
    pub temperature: f64,
    /// Mean loss in nats over the samples it was fitted on (one head) or not fitted on (two).
    pub loss: f64,
}

/// The fold of every sample: all 0 with one head; with cross-fit (N < 3d) the number of earlier
/// samples of the same class, mod 2.
pub fn folds(labels: &[usize], embed_dim: usize) -> Vec<usize> {
    if labels.len() >= 3 * embed_dim {
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

impl SourceHead {
    /// `features` [N, d] of this source; `folds` as [`folds`] made them.
    pub fn fit(
        features: &Tensor,
        labels: &[usize],
        folds: &[usize],
        num_classes: usize,
        shrinkage: f64,
    ) -> Result<Self, EngineError> {
        let num_folds = folds.iter().max().map_or(1, |last| last + 1);
        let mut heads = Vec::with_capacity(num_folds);
        for other in 0..num_folds {
            // Head k is used on fold k, so with two folds it is fitted on the other one.
            let rows: Vec<usize> = (0..labels.len())
                .filter(|row| num_folds == 1 || folds[*row] != other)
                .collect();
            let of_rows: Vec<usize> = rows.iter().map(|row| labels[*row]).collect();
            let selected = features.index_select(0, &row_tensor(&rows));
            heads.push(ClosedFormHead::fit(
                &selected,
                &of_rows,
                num_classes,
                shrinkage,
            )?);
        }
        let mut head = Self {
            heads,
            temperature: 1.0,
            loss: 0.0,
        };
        let of_head = head
            .heads
            .iter()
            .map(|head| Ok(Vec::try_from(head.logits(features).flatten(0, -1))?))
            .collect::<Result<Vec<Vec<f64>>, EngineError>>()?;
        let logits: Vec<(Vec<f64>, usize)> = (0..labels.len())
            .filter(|row| head.heads[folds[*row]].present[labels[*row]])
            .map(|row| {
                let of_row = &of_head[folds[row]][row * num_classes..(row + 1) * num_classes];
                (of_row.to_vec(), labels[row])
            })
            .collect();
        head.temperature = fit_temperature(&logits);
        let total: f64 = logits
            .iter()
            .map(|(z, y)| loss(z, *y, 1.0 / head.temperature))
            .sum();
        head.loss = total / labels.len().max(1) as f64;
        Ok(head)
    }

    /// Sum of the losses of a micro-batch: `features` [B, d] (its graph is kept), the labels and folds
    /// of its samples. A sample whose class its head never saw has no loss.
    pub fn loss_sum(&self, features: &Tensor, labels: &[usize], folds: &[usize]) -> Tensor {
        let device = features.device();
        let mut total = Tensor::zeros([], (Kind::Double, device));
        for (fold, head) in self.heads.iter().enumerate() {
            let rows: Vec<usize> = (0..labels.len())
                .filter(|row| folds[*row] == fold && head.present[labels[*row]])
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

fn row_tensor(rows: &[usize]) -> Tensor {
    Tensor::from_slice(&rows.iter().map(|row| *row as i64).collect::<Vec<_>>())
}

/// Cross-entropy of softmax(β z) at label y, in nats.
fn loss(z: &[f64], y: usize, beta: f64) -> f64 {
    let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = z.iter().map(|v| (beta * (v - largest)).exp()).sum();
    sum.ln() - beta * (z[y] - largest)
}

/// The T in [1e-3, 1e3] with the least mean loss. The loss is convex in β = 1/T with derivative
/// E_p[z] - z_y, so its root is bisected, on a logarithmic scale.
fn fit_temperature(logits: &[(Vec<f64>, usize)]) -> f64 {
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

    #[test]
    fn the_head_does_not_care_where_the_features_are_centred() {
        tch::manual_seed(3);
        let x = Tensor::randn([40, 5], (Kind::Double, tch::Device::Cpu));
        let labels: Vec<usize> = (0..40).map(|i| i % 3).collect();
        let here = ClosedFormHead::fit(&x, &labels, 3, 0.3).unwrap();
        let shifted = &x + 10.0;
        let there = ClosedFormHead::fit(&shifted, &labels, 3, 0.3).unwrap();
        let difference = here.logits(&x) - there.logits(&shifted);
        // Logits may differ by a constant a sample, which softmax does not see.
        let spread = difference.max_dim(1, false).0 - difference.min_dim(1, false).0;
        assert!(f64::try_from(spread.abs().max()).unwrap() < 1e-9);
    }

    #[test]
    fn an_absent_class_is_never_predicted_and_has_no_loss() {
        tch::manual_seed(4);
        let x = Tensor::randn([12, 4], (Kind::Double, tch::Device::Cpu));
        let labels: Vec<usize> = (0..12).map(|i| if i % 2 == 0 { 0 } else { 2 }).collect();
        let head = ClosedFormHead::fit(&x, &labels, 4, 0.3).unwrap();
        let predicted: Vec<i64> = Vec::try_from(head.logits(&x).argmax(-1, false)).unwrap();
        assert!(predicted.iter().all(|class| [0, 2].contains(class)));
        let source = SourceHead {
            heads: vec![head],
            temperature: 1.0,
            loss: 0.0,
        };
        let lost = source.loss_sum(&x.narrow(0, 0, 2), &[1, 3], &[0, 0]);
        assert_eq!(f64::try_from(lost).unwrap(), 0.0);
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

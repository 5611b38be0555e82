//! Linear heads W f + b fitted in closed form: shrunken linear discriminant analysis, and ridge
//! regression on one-hot labels.
//!
//! Both solve S⁻¹ μ_c for every class. S = (1-ρ_h) A + ρ_h (tr A/d) I is shrunken, and μ_c are the class
//! means minus the overall mean. n_c of N samples are of class c, π_c = n_c/N, and all covariances have
//! 1/(N-1):
//!
//! | kind | A | W_c | b_c (features centred) |
//! |---|---|---|---|
//! | LDA | within-class covariance S_w = C - B | S⁻¹ μ_c | log π_c - ½ μ_cᵀ S⁻¹ μ_c |
//! | ridge | covariance C | (1-ρ_h) n_c/(N-1) S⁻¹ μ_c | π_c |
//!
//! So ridge is argmin Σ_n ‖W f̃_n - (e_{y_n} - π)‖² + (N-1) κ ‖W‖² with κ = ρ_h/(1-ρ_h) tr C/d.

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::samples::classes::{numbered, present};
use crate::score::head::row_tensor;
use crate::tensors::{cholesky, plain};
use promptweave_domain::objective::{HeadKind, HeadOptions};
use promptweave_domain::prompt_file::Head;
use promptweave_domain::tensor::Tensor as PlainTensor;

/// Logit of a class that no sample of the fit shows. It is finite, so that it can be stored and
/// scaled.
const ABSENT: f64 = -1e30;

/// A head with W `[K, d]` and b `[K]`, in f64 on the CPU. K counts all classes of the dataset.
pub struct ClosedFormHead {
    weight: Tensor,
    bias: Tensor,
    present: Vec<bool>,
}

impl Clone for ClosedFormHead {
    /// Shares the values, which never change.
    fn clone(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.shallow_clone(),
            present: self.present.clone(),
        }
    }
}

impl ClosedFormHead {
    /// Fits a head. `features` is [n, d]; `labels` has n entries below `num_classes`. For one
    /// source's features `shared` is the same as LDA.
    pub fn fit(
        features: &Tensor,
        labels: &[usize],
        num_classes: usize,
        options: &HeadOptions,
    ) -> Result<Self, EngineError> {
        let (n, d) = features.size2()?;
        let (k, on_cpu) = (num_classes as i64, (Kind::Double, Device::Cpu));
        let classes = present(labels);
        let mut head = Self {
            weight: Tensor::zeros([k, d], on_cpu),
            bias: Tensor::full([k], ABSENT, on_cpu),
            present: (0..num_classes)
                .map(|class| classes.binary_search(&class).is_ok())
                .collect(),
        };
        if classes.is_empty() {
            return Ok(head);
        }

        // Centring changes no discriminant direction and keeps the numbers small. The bias below
        // puts the shift back.
        let features = features.to_kind(Kind::Double);
        let centre = features.mean_dim(0, true, Kind::Double);
        let x = &features - &centre;
        let (own_rows, of_class) = {
            let (own, num_present) = numbered(labels);
            let mut counts = vec![0.0; num_present];
            own.iter().for_each(|class| counts[*class] += 1.0);
            (row_tensor(&own), Tensor::from_slice(&counts))
        };
        let sums = Tensor::zeros([classes.len() as i64, d], on_cpu).index_add(0, &own_rows, &x);
        let means = sums / of_class.unsqueeze(1);
        let degrees = (n - 1).max(1) as f64;
        let spread = match options.kind {
            HeadKind::Lda | HeadKind::Shared => &x - means.index_select(0, &own_rows),
            HeadKind::Ridge => x,
        };
        let covariance = spread.tr().matmul(&spread) / degrees;
        let solved = means
            .tr()
            .cholesky_solve(&shrunken_factor(covariance, options.shrinkage)?, false);

        let priors = &of_class / n as f64;
        let (weight, bias) = match options.kind {
            HeadKind::Lda | HeadKind::Shared => {
                let quadratic = (means.tr() * &solved).sum_dim_intlist(0, false, Kind::Double);
                (solved, priors.log() - quadratic * 0.5)
            }
            HeadKind::Ridge => (
                solved * of_class * ((1.0 - options.shrinkage) / degrees),
                priors,
            ),
        };
        let bias = bias - centre.matmul(&weight).squeeze_dim(0);
        if !bool::try_from(weight.isfinite().all())? {
            return Err(EngineError::NotFinite("the closed-form head"));
        }
        let rows = row_tensor(&classes);
        head.weight = head.weight.index_copy(0, &rows, &weight.tr());
        head.bias = head.bias.index_copy(0, &rows, &bias);
        Ok(head)
    }

    /// A head of given weights `[K, d]` and bias `[K]`, stored or from other code.
    pub fn given(weight: &Tensor, bias: &Tensor) -> Result<Self, EngineError> {
        let bias = bias.to_kind(Kind::Double);
        let logits = Vec::<f64>::try_from(&bias)?;
        Ok(Self {
            weight: weight.to_kind(Kind::Double),
            // Half of ABSENT, since ABSENT is not the same number in f32.
            present: logits.iter().map(|bias| *bias > 0.5 * ABSENT).collect(),
            bias,
        })
    }

    /// This head with its logits divided by T > 0. A class that it does not know keeps its logit.
    pub fn calibrated(&self, temperature: f64) -> Self {
        let known: Vec<f64> = self
            .present
            .iter()
            .map(|known| if *known { temperature } else { 1.0 })
            .collect();
        let known = Tensor::from_slice(&known);
        Self {
            weight: &self.weight / known.unsqueeze(1),
            bias: &self.bias / known,
            present: self.present.clone(),
        }
    }

    /// Whether the head was fitted on a sample of this class.
    pub fn knows(&self, class: usize) -> bool {
        self.present[class]
    }

    /// Logits of features, [n, d] → [n, K], in f64.
    pub fn logits(&self, features: &Tensor) -> Tensor {
        let features = features.to_kind(Kind::Double);
        features.linear(
            &self.weight.to_device(features.device()),
            Some(&self.bias.to_device(features.device())),
        )
    }

    /// The head as a prompt file stores it.
    pub fn to_prompt_head(&self) -> Result<Head, EngineError> {
        let (k, d) = self.weight.size2()?;
        Ok(Head {
            weight: PlainTensor::new([k as usize, d as usize], plain(&self.weight)?),
            bias: PlainTensor::new([k as usize], plain(&self.bias)?),
        })
    }
}

/// Cholesky factor of (1-ρ) A + ρ (tr A/d) I, for A [d, d].
fn shrunken_factor(covariance: Tensor, shrinkage: f64) -> Result<Tensor, EngineError> {
    let d = covariance.size()[0];
    let trace = f64::try_from(covariance.trace())? / d as f64;
    // With singletons only, S_w is 0: any positive multiple of I then gives the nearest mean.
    let floor = if trace > 0.0 { 0.0 } else { 1.0 };
    let identity = Tensor::eye(d, (Kind::Double, covariance.device()));
    let shrunk = covariance * (1.0 - shrinkage) + identity * (shrinkage * trace + floor);
    cholesky(&shrunk, "the features")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::evaluate::correct;
    use crate::testing::noise_tensor;

    const KINDS: [HeadKind; 2] = [HeadKind::Lda, HeadKind::Ridge];

    fn options(kind: HeadKind) -> HeadOptions {
        HeadOptions {
            kind,
            shrinkage: 0.3,
        }
    }

    /// Three classes in turn, each with its own mean.
    fn task(n: usize, seed: u64) -> (Tensor, Vec<usize>) {
        let labels: Vec<usize> = (0..n).map(|i| i % 3).collect();
        let means = noise_tensor(&[3, 5], 100).index_select(0, &row_tensor(&labels));
        (noise_tensor(&[n as i64, 5], seed) + means, labels)
    }

    #[test]
    fn a_head_predicts_samples_it_has_not_seen_wherever_the_features_are_centred() {
        let ((x, labels), (unseen, of_unseen)) = (task(90, 1), task(60, 2));
        for kind in KINDS {
            let here = ClosedFormHead::fit(&x, &labels, 3, &options(kind)).unwrap();
            let right = correct(&here.logits(&unseen), &of_unseen).unwrap();
            let correct = right.iter().filter(|right| **right).count();
            assert!(
                correct > 35,
                "{kind:?}: {correct} of 60, where chance is 20"
            );

            let there = ClosedFormHead::fit(&(&x + 10.0), &labels, 3, &options(kind)).unwrap();
            let difference = here.logits(&unseen) - there.logits(&(&unseen + 10.0));
            // The logits of a sample may differ by a constant, which softmax does not see.
            let spread = difference.max_dim(1, false).0 - difference.min_dim(1, false).0;
            assert!(f64::try_from(spread.abs().max()).unwrap() < 1e-9);
        }
    }

    #[test]
    fn lda_is_the_posterior_of_gaussians_with_the_shrunken_within_class_covariance() {
        let (x, mut labels) = task(31, 6);
        labels[0] = 1;
        let head = ClosedFormHead::fit(&x, &labels, 3, &options(HeadKind::Lda)).unwrap();
        let own: Vec<Tensor> = (0..3)
            .map(|class| {
                let rows: Vec<usize> = (0..31).filter(|n| labels[*n] == class).collect();
                x.index_select(0, &row_tensor(&rows))
            })
            .collect();
        let scatter = |rows: &Tensor| {
            let apart = rows - rows.mean_dim(0, true, Kind::Double);
            apart.tr().matmul(&apart)
        };
        let within = (scatter(&own[0]) + scatter(&own[1]) + scatter(&own[2])) / 30.0;
        let trace = within.trace() / 5.0;
        let shrunk = within * 0.7 + Tensor::eye(5, (Kind::Double, Device::Cpu)) * trace * 0.3;
        let precision = shrunk.inverse();
        let log_joint: Vec<Tensor> = own
            .iter()
            .map(|rows| {
                let apart = &x - rows.mean_dim(0, true, Kind::Double);
                let squares =
                    (apart.matmul(&precision) * apart).sum_dim_intlist(1, false, Kind::Double);
                squares * -0.5 + (rows.size()[0] as f64 / 31.0).ln()
            })
            .collect();
        let expected = Tensor::stack(&log_joint, 1).log_softmax(-1, None);
        let difference = head.logits(&x).log_softmax(-1, None) - expected;
        assert!(f64::try_from(difference.abs().max()).unwrap() < 1e-10);
    }

    #[test]
    fn ridge_solves_its_normal_equations() {
        let (x, labels) = task(40, 3);
        let head = ClosedFormHead::fit(&x, &labels, 3, &options(HeadKind::Ridge)).unwrap();
        // The gradient of Σ_n ‖W f_n + b - e_{y_n}‖² + (N-1) κ ‖W‖² vanishes, in W and in b.
        let one_hot = Tensor::eye(3, (Kind::Double, Device::Cpu));
        let residual = head.logits(&x) - one_hot.index_select(0, &row_tensor(&labels));
        let variances = x.var_dim([0i64].as_slice(), true, false);
        let kappa = 0.3 / 0.7 * f64::try_from(variances.mean(Kind::Double)).unwrap();
        let by_weight = residual.tr().matmul(&x) + &head.weight * (39.0 * kappa);
        let by_bias = residual.sum_dim_intlist(0, false, Kind::Double);
        for gradient in [by_weight, by_bias] {
            assert!(f64::try_from(gradient.abs().max()).unwrap() < 1e-10);
        }
    }

    #[test]
    fn an_absent_class_is_never_predicted() {
        let (x, labels) = task(12, 4);
        let labels: Vec<usize> = labels.iter().map(|label| label % 2 * 2).collect();
        for kind in KINDS {
            let head = ClosedFormHead::fit(&x, &labels, 4, &options(kind)).unwrap();
            let predicted: Vec<i64> = Vec::try_from(head.logits(&x).argmax(-1, false)).unwrap();
            assert!(predicted.iter().all(|class| [0, 2].contains(class)));
            assert!(head.knows(2) && !head.knows(1) && !head.knows(3));
            let stored = head.to_prompt_head().unwrap();
            assert!(stored.bias.values.iter().all(|b| b.is_finite()));
        }
    }

    #[test]
    fn a_calibrated_head_divides_logits_and_still_never_predicts_an_absent_class() {
        let (x, labels) = task(30, 7);
        let head = ClosedFormHead::fit(&x, &labels, 4, &options(HeadKind::Lda)).unwrap();
        let warm = head.calibrated(8.0);
        let of = |head: &ClosedFormHead| head.logits(&x).narrow(1, 0, 3);
        let difference = of(&warm) * 8.0 - of(&head);
        assert!(f64::try_from(difference.abs().max()).unwrap() < 1e-9);
        let stored = warm.to_prompt_head().unwrap();
        let tensor = |t: &PlainTensor<f32>| crate::score::transferability::matrix(t);
        let read = ClosedFormHead::given(&tensor(&stored.weight), &tensor(&stored.bias)).unwrap();
        assert!(read.knows(2) && !read.knows(3));
        assert_eq!(
            warm.logits(&x)
                .softmax(-1, Kind::Double)
                .max_dim(0, false)
                .0
                .double_value(&[3]),
            0.0
        );
    }

    #[test]
    fn singletons_and_no_samples_at_all_give_finite_heads() {
        let x = noise_tensor(&[3, 5], 5);
        for kind in KINDS {
            let head = ClosedFormHead::fit(&x, &[0, 1, 2], 3, &options(kind)).unwrap();
            let right = correct(&head.logits(&x), &[0, 1, 2]).unwrap();
            assert_eq!(right, [true; 3], "{kind:?}");
            let none = ClosedFormHead::fit(&x.narrow(0, 0, 0), &[], 3, &options(kind)).unwrap();
            assert!((0..3).all(|class| !none.knows(class)));
            assert!(bool::try_from(none.logits(&x).isfinite().all()).unwrap());
        }
    }
}

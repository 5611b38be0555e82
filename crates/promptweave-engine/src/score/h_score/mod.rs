//! Transferability: the H-score of the mixed features F = Σ αᵢ f_{Pᵢ}, as a function of α.
//!
//! `standard` (Bao et al. 2019; Ibrahim et al. 2021 for ρ) uses Σ = cov F and B = cov(E[F|y]), both
//! with
//! 1/(N-1):
//!
//! H_ρ(α) = (1-ρ) tr(Σ_ρ⁻¹ B), Σ_ρ = (1-ρ)Σ + ρ(tr Σ/d)I, 0 ≤ H ≤ min(d, K-1)
//!
//! It is a ratio in α: neither convex nor concave, and H(cα) = H(α). It also is the variance of the
//! classes that a ridge regression explains on the samples that it was fitted on. `cross_validated`
//! is the same on samples that it was not fitted on. B has rank K-1 and is never formed. Below
//! 0.7·d samples an N × N *dual* is cheaper: see `regression`.
//!
//! `trace_ratio` is tr B / tr Σ in [0, 1], a generalised Rayleigh quotient of two M × M matrices.

mod regression;
mod second_moments;
mod shrinkage;
mod sums;

use tch::{Kind, Tensor};

use self::regression::Regression;
pub use self::regression::differentiable as differentiable_regression;
use self::second_moments::SecondMoments;
use self::sums::Centring;
pub use self::sums::Sums;
use crate::error::EngineError;
use crate::samples::classes::numbered;
use crate::score::head::row_tensor;
use promptweave_domain::objective::{HScoreMode, HScoreOptions, Shrinkage, Standardise};

/// The share of the largest source's variance that is added to Σ. It keeps H finite if every Σ αᵢ
/// f_{Pᵢ} is (numerically) constant and Σ is 0. It is far below ρ, so that it changes no
/// significant digit elsewhere.
const FLOOR: f64 = 1e-12;
/// Number of samples for each feature dimension below which the dual form is used.
const DUAL_BELOW: f64 = 0.7;

pub struct HScore {
    centring: Centring,
    sums: Sums,
    /// Σ_n ⟨x_in, x_jn⟩ [M, M], so that tr Σ(α) = αᵀ τ α/(N-1).
    traces: Vec<f64>,
    /// A share of the largest source's variance, which keeps H finite if there is no other
    /// variance.
    floor: f64,
    form: Form,
}

enum Form {
    Regression(Regression),
    /// [M, M]: Σ_c w_c ⟨m_ic, m_jc⟩, so that tr B(α) = αᵀ b α.
    TraceRatio {
        between: Vec<f64>,
    },
}

impl HScore {
    /// H of `features` [M, N, d]; `labels` has N entries. An estimated shrinkage is taken from the
    /// uniform mixture.
    pub fn new(
        features: &Tensor,
        labels: &[usize],
        options: &HScoreOptions,
    ) -> Result<Self, EngineError> {
        let (_, n, d) = features.size3()?;
        options.check_samples(n as usize, d as usize)?;
        let centring = Centring::of(features, options.standardise);
        let (classes, num_classes) = numbered(labels);
        let sums = Sums::of(centring.blocks(features), &classes, num_classes);
        if options.mode() == HScoreMode::TraceRatio {
            return Self::trace_ratio(centring, sums);
        }
        let rho = match options.shrinkage() {
            Shrinkage::Fixed(rho) => rho,
            Shrinkage::Estimated(estimate) => {
                let of_block = |x: Tensor| x.mean_dim(0, false, Kind::Double);
                let uniform: Vec<Tensor> = centring.blocks(features).map(of_block).collect();
                shrinkage::usable(shrinkage::estimate(&Tensor::cat(&uniform, 0), estimate)?)
            }
        };
        let cross_validated = options.mode() == HScoreMode::CrossValidated;
        let dual = (n as f64) < DUAL_BELOW * d as f64 || (cross_validated && n <= d);
        let moments = SecondMoments::of(features, &centring, dual);
        Self::regression(centring, sums, (rho, cross_validated), moments, &classes)
    }

    /// `classes` are those of the samples, for the dual form.
    fn regression(
        centring: Centring,
        sums: Sums,
        (rho, cross_validated): (f64, bool),
        moments: SecondMoments,
        classes: &[usize],
    ) -> Result<Self, EngineError> {
        let indicators = moments.is_dual().then(|| {
            let indicators = indicators(classes, &sums.counts);
            &indicators - indicators.mean_dim(0, true, Kind::Double)
        });
        let form = Form::Regression(Regression {
            rho,
            cross_validated,
            moments,
            indicators,
        });
        Self::of_form(centring, sums, form)
    }

    fn trace_ratio(centring: Centring, sums: Sums) -> Result<Self, EngineError> {
        let rooted = &sums.by_class * sums.class_weights().sqrt().view([-1, 1, 1]);
        let by_source = rooted.transpose(0, 1).flatten(1, -1);
        let between = Vec::try_from(by_source.matmul(&by_source.tr()).flatten(0, -1))?;
        Self::of_form(centring, sums, Form::TraceRatio { between })
    }

    fn of_form(centring: Centring, sums: Sums, form: Form) -> Result<Self, EngineError> {
        let traces = Vec::try_from(sums.products.flatten(0, -1))?;
        Ok(Self {
            floor: floor(&sums, &traces),
            centring,
            sums,
            traces,
            form,
        })
    }

    /// The same function on the samples that are not among `rows` (in order), with ρ and the
    /// standardisation unchanged. `features` and `labels` are those it was made of.
    pub fn without(
        &self,
        features: &Tensor,
        labels: &[usize],
        rows: &[usize],
    ) -> Result<Self, EngineError> {
        let kept: Vec<usize> = (0..labels.len())
            .filter(|row| rows.binary_search(row).is_err())
            .collect();
        let of_rows = |rows: &[usize]| features.index_select(1, &row_tensor(rows));
        let (classes, _) = numbered(labels);
        let their_classes: Vec<usize> = rows.iter().map(|row| classes[*row]).collect();
        let left_out = self.centring.apply(&of_rows(rows));
        let theirs = std::iter::once(left_out.shallow_clone());
        let theirs = Sums::of(theirs, &their_classes, self.sums.counts.len());
        let (sums, mean) = self.sums.without(&theirs);
        let centring = self.centring.moved(&mean);
        if let Some(rho) = self.shrinkage() {
            let d = features.size()[2] as usize;
            Shrinkage::Fixed(rho).check_samples(kept.len(), d)?;
        }
        let kept_labels: Vec<usize> = kept.iter().map(|row| labels[*row]).collect();
        let kept_classes = numbered(&kept_labels).0;
        let regression = match &self.form {
            Form::TraceRatio { .. } => return Self::trace_ratio(centring, sums),
            Form::Regression(regression) => regression,
        };
        let moments = match regression.moments.without(&left_out, &mean, kept.len()) {
            Some(moments) => moments,
            None => SecondMoments::of(&of_rows(&kept), &centring, regression.moments.is_dual()),
        };
        let how = (regression.rho, regression.cross_validated);
        Self::regression(centring, sums, how, moments, &kept_classes)
    }

    /// The number of sources M.
    pub fn num_sources(&self) -> usize {
        self.sums.by_class.size()[1] as usize
    }

    /// ρ as it is used; `None` with `trace_ratio`.
    pub fn shrinkage(&self) -> Option<f64> {
        match &self.form {
            Form::Regression(regression) => Some(regression.rho),
            Form::TraceRatio { .. } => None,
        }
    }

    pub fn value(&self, alpha: &[f64]) -> Result<f64, EngineError> {
        Ok(self.evaluate(alpha, false)?.0)
    }

    pub fn value_and_gradient(&self, alpha: &[f64]) -> Result<(f64, Vec<f64>), EngineError> {
        self.evaluate(alpha, true)
    }

    /// (H - H₀)/(H_max - H₀), where H₀ is the mean of H over permutations of the labels. It is
    /// (K-1)/(N-1)·df with the degrees of freedom df = tr[(1-ρ)Σ Σ_ρ⁻¹], and H_max = K-1. With
    /// `trace_ratio` df and H_max are 1; with `cross_validated` H₀ is below 0.
    pub fn adjusted(&self, alpha: &[f64]) -> Result<f64, EngineError> {
        let (h, null) = (self.value(alpha)?, self.chance(alpha)?);
        let most = match self.form {
            Form::Regression(_) => self.sums.num_classes() - 1.0,
            Form::TraceRatio { .. } => 1.0,
        };
        // If even shuffled labels score the maximum, there is nothing to tell apart.
        Ok(if most - null > 1e-9 {
            (h - null) / (most - null)
        } else {
            0.0
        })
    }

    /// H₀: the mean of H if the labels are shuffled.
    pub fn chance(&self, alpha: &[f64]) -> Result<f64, EngineError> {
        match &self.form {
            Form::Regression(regression) => {
                let delta = self.ridge(alpha, regression.rho).0;
                regression.chance(&self.sums, alpha, delta)
            }
            Form::TraceRatio { .. } => Ok((self.sums.num_classes() - 1.0) / self.sums.degrees()),
        }
    }

    fn evaluate(&self, alpha: &[f64], derive: bool) -> Result<(f64, Vec<f64>), EngineError> {
        let (value, gradient) = match &self.form {
            Form::Regression(regression) => {
                let ridge = self.ridge(alpha, regression.rho);
                regression.evaluate(&self.sums, alpha, &ridge, derive)?
            }
            Form::TraceRatio { between } => {
                let (b, db) = quadratic_form(between, alpha);
                let (t, dt) = quadratic_form(&self.traces, alpha);
                let (scale, d) = (self.sums.degrees(), self.num_dimensions());
                let t = t / scale + self.floor * d;
                let slopes = db.iter().zip(&dt);
                let gradient = slopes.map(|(db, dt)| (db - b / t * dt / scale) / t);
                (b / t, gradient.collect())
            }
        };
        if !value.is_finite() {
            return Err(EngineError::NotFinite("the H-score"));
        }
        Ok((value, gradient))
    }

    /// δ = ρ tr Σ/d at α, which is added to the diagonal beside the data, and its gradient.
    fn ridge(&self, alpha: &[f64], rho: f64) -> (f64, Vec<f64>) {
        let over = rho / (self.sums.degrees() * self.num_dimensions());
        let (value, gradient) = quadratic_form(&self.traces, alpha);
        let slopes = gradient.iter().map(|slope| slope * over).collect();
        (value * over + self.floor, slopes)
    }

    /// The number of dimensions d.
    fn num_dimensions(&self) -> f64 {
        self.sums.by_class.size()[2] as f64
    }
}

/// αᵀ Q α and 2 Q α of a symmetric Q [M, M], row-major.
fn quadratic_form(matrix: &[f64], alpha: &[f64]) -> (f64, Vec<f64>) {
    let product: Vec<f64> = matrix
        .chunks_exact(alpha.len())
        .map(|row| row.iter().zip(alpha).map(|(q, a)| q * a).sum())
        .collect();
    let value = product.iter().zip(alpha).map(|(p, a)| p * a).sum();
    (value, product.iter().map(|p| 2.0 * p).collect())
}

/// Centred features [M, N, d] in f64: each source's mean is subtracted and, if asked, each
/// coordinate is scaled to variance 1. A constant coordinate stays 0. libtorch can differentiate
/// all of it.
pub fn centred(features: &Tensor, standardise: Standardise) -> Tensor {
    Centring::of(features, standardise).apply(features)
}

fn floor(sums: &Sums, traces: &[f64]) -> f64 {
    let (m, d) = (sums.products.size()[0] as usize, sums.by_class.size()[2]);
    let largest = (0..m).map(|i| traces[i * (m + 1)]).fold(0.0, f64::max);
    let variance = largest / sums.degrees() / d as f64;
    if variance > 0.0 {
        FLOOR * variance
    } else {
        1.0
    }
}

/// Z [N, K]: 1/√n_c if the sample is of class c, otherwise 0.
pub fn indicators(classes: &[usize], counts: &[usize]) -> Tensor {
    let mut values = vec![0.0; classes.len() * counts.len()];
    for (row, class) in classes.iter().enumerate() {
        values[row * counts.len() + class] = 1.0 / (counts[*class] as f64).sqrt();
    }
    Tensor::from_slice(&values).view([classes.len() as i64, counts.len() as i64])
}

#[cfg(test)]
mod tests;

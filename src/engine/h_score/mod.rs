//! Transferability: the H-score of the mixed features F = Σ αᵢ f_{Pᵢ}, as a function of α.
//!
//! `inv` (Bao et al. 2019; Ibrahim et al. 2021 for ρ), with Σ = cov F and B = cov(E[F|y]), both with
//! 1/(N-1):
//!
//! H_ρ(α) = (1-ρ) tr(Σ_ρ⁻¹ B), Σ_ρ = (1-ρ)Σ + ρ(tr Σ/d)I, 0 ≤ H ≤ min(d, K-1)
//!
//! It is a ratio in α: neither convex nor concave, and H(cα) = H(α). B has rank K-1 and is never formed:
//! with the class means u_c and weights w_c = n_c/(N-1), H = (1-ρ) Σ_c w_c u_cᵀ Σ_ρ⁻¹ u_c.
//!
//! Below 0.7·d samples the N × N *dual* is cheaper: with the Gram matrix G = F̃F̃ᵀ, A = (1-ρ)/(N-1)·G,
//! δ = ρ tr Σ/d and the orthonormal class indicators Z [N, K],
//!
//! H_ρ(α) = tr[Zᵀ A (δI + A)⁻¹ Z] = K - δ tr[Zᵀ (δI + A)⁻¹ Z]
//!
//! `trace_ratio` is tr B / tr Σ in [0, 1], a generalised Rayleigh quotient of two M × M matrices; `leave_one_out` is in a file of
//! its own.

mod leave_one_out;
mod second_moments;
mod shrinkage;
mod sums;

use tch::{Device, Kind, Tensor};

use self::leave_one_out::LeaveOneOut;
pub use self::leave_one_out::differentiable as differentiable_leave_one_out;
use self::second_moments::SecondMoments;
use self::sums::Centring;
pub use self::sums::Sums;
use super::classes::numbered;
use super::head::row_tensor;
use super::{EngineError, cholesky};
use crate::domain::objective::{HScoreMode, HScoreOptions, Shrinkage, Standardise};

/// Where every Σ αᵢ f_{Pᵢ} is (numerically) constant, Σ is 0: this share of the largest source's
/// variance keeps H finite there. Far below ρ, so it changes no digit that counts elsewhere.
const FLOOR: f64 = 1e-12;
/// The dual form is used below this many samples a feature dimension.
const DUAL_BELOW: f64 = 0.7;

pub struct HScore {
    centring: Centring,
    sums: Sums,
    /// Σ_n ⟨x_in, x_jn⟩ [M, M], so that tr Σ(α) = αᵀ τ α/(N-1).
    traces: Vec<f64>,
    form: Form,
}

enum Form {
    Inv {
        rho: f64,
        floor: f64,
        moments: SecondMoments,
        /// [N, K], Z, in the dual form alone.
        indicators: Option<Tensor>,
    },
    TraceRatio {
        /// [M, M]: Σ_c w_c ⟨m_ic, m_jc⟩, so that tr B(α) = αᵀ b α.
        between: Vec<f64>,
        floor: f64,
    },
    LeaveOneOut {
        regression: LeaveOneOut,
        floor: f64,
    },
}

/// Σ_ρ or δI + A at one α, factored, and what goes with it.
struct Factored {
    /// L [s, s]
    factor: Tensor,
    /// What stands on the diagonal beside the data: ρ tr Σ/d + floor.
    ridge: f64,
}

impl HScore {
    /// `features` [M, N, d]; `labels` has N entries. An estimated shrinkage is taken from the uniform
    /// mixture.
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
        if options.mode == HScoreMode::TraceRatio {
            return Self::trace_ratio(centring, sums);
        }
        let rho = match options.shrinkage {
            Shrinkage::Fixed(rho) => rho,
            Shrinkage::Estimated(estimate) => {
                let of_block = |x: Tensor| x.mean_dim(0, false, Kind::Double);
                let uniform: Vec<Tensor> = centring.blocks(features).map(of_block).collect();
                shrinkage::usable(shrinkage::estimate(&Tensor::cat(&uniform, 0), estimate)?)
            }
        };
        if options.mode == HScoreMode::LeaveOneOut {
            return Self::leave_one_out(centring, sums, rho, features, &classes);
        }
        let dual = (n as f64) < DUAL_BELOW * d as f64;
        let moments = SecondMoments::of(features, &centring, dual);
        Self::inv(centring, sums, rho, moments, &classes)
    }

    /// `classes` are those of the samples, for the dual form.
    fn inv(
        centring: Centring,
        sums: Sums,
        rho: f64,
        moments: SecondMoments,
        classes: &[usize],
    ) -> Result<Self, EngineError> {
        let traces = Vec::try_from(sums.products.flatten(0, -1))?;
        let indicators = moments.is_dual().then(|| indicators(classes, &sums.counts));
        let form = Form::Inv {
            rho,
            floor: floor(&sums, &traces),
            moments,
            indicators,
        };
        Ok(Self {
            centring,
            sums,
            traces,
            form,
        })
    }

    /// Of `features` [M, N, d] as `centring` centres them, and their classes.
    fn leave_one_out(
        centring: Centring,
        sums: Sums,
        rho: f64,
        features: &Tensor,
        classes: &[usize],
    ) -> Result<Self, EngineError> {
        let traces = Vec::try_from(sums.products.flatten(0, -1))?;
        let indicators = indicators(classes, &sums.counts);
        let form = Form::LeaveOneOut {
            regression: LeaveOneOut::new(centring.apply(features), &indicators, rho),
            floor: floor(&sums, &traces),
        };
        Ok(Self {
            centring,
            sums,
            traces,
            form,
        })
    }

    fn trace_ratio(centring: Centring, sums: Sums) -> Result<Self, EngineError> {
        let traces: Vec<f64> = Vec::try_from(sums.products.flatten(0, -1))?;
        let rooted = &sums.by_class * sums.class_weights().sqrt().view([-1, 1, 1]);
        let by_source = rooted.transpose(0, 1).flatten(1, -1);
        let between = Vec::try_from(by_source.matmul(&by_source.tr()).flatten(0, -1))?;
        let d = sums.by_class.size()[2] as f64;
        let floor = floor(&sums, &traces) * d;
        Ok(Self {
            centring,
            sums,
            traces,
            form: Form::TraceRatio { between, floor },
        })
    }

    /// The same function on the samples that are not among `rows` (in order), with ρ and the
    /// standardisation as they are. `features` and `labels` are those it was made of.
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
        match &self.form {
            Form::TraceRatio { .. } => Self::trace_ratio(centring, sums),
            Form::LeaveOneOut { regression, .. } => {
                let rho = regression.rho();
                Self::leave_one_out(centring, sums, rho, &of_rows(&kept), &kept_classes)
            }
            Form::Inv { rho, moments, .. } => {
                let moments = match moments.without(&left_out, &mean, kept.len()) {
                    Some(moments) => moments,
                    None => SecondMoments::of(&of_rows(&kept), &centring, moments.is_dual()),
                };
                Self::inv(centring, sums, *rho, moments, &kept_classes)
            }
        }
    }

    /// M
    pub fn num_sources(&self) -> usize {
        self.sums.by_class.size()[1] as usize
    }

    /// ρ as it is used; `None` with `trace_ratio`.
    pub fn shrinkage(&self) -> Option<f64> {
        match &self.form {
            Form::Inv { rho, .. } => Some(*rho),
            Form::LeaveOneOut { regression, .. } => Some(regression.rho()),
            Form::TraceRatio { .. } => None,
        }
    }

    pub fn value(&self, alpha: &[f64]) -> Result<f64, EngineError> {
        Ok(self.evaluate(alpha, false)?.0)
    }

    pub fn value_and_gradient(&self, alpha: &[f64]) -> Result<(f64, Vec<f64>), EngineError> {
        self.evaluate(alpha, true)
    }

    /// (H - H₀)/(H_max - H₀), H₀ the mean of H over permutations of the labels: (K-1)/(N-1)·df with the
    /// degrees of freedom df = tr[(1-ρ)Σ Σ_ρ⁻¹]; H_max = K-1. With `trace_ratio` df and H_max are 1; with `leave_one_out` H₀ is
    /// below 0.
    pub fn adjusted(&self, alpha: &[f64]) -> Result<f64, EngineError> {
        let (h, null) = (self.value(alpha)?, self.chance(alpha)?);
        let most = match self.form {
            Form::Inv { .. } | Form::LeaveOneOut { .. } => self.num_classes() - 1.0,
            Form::TraceRatio { .. } => 1.0,
        };
        // Where even shuffled labels score the most there is nothing to tell apart.
        Ok(if most - null > 1e-9 {
            (h - null) / (most - null)
        } else {
            0.0
        })
    }

    /// H₀: what H is on average when the labels are shuffled.
    pub fn chance(&self, alpha: &[f64]) -> Result<f64, EngineError> {
        let df = match &self.form {
            Form::TraceRatio { .. } => 1.0,
            Form::LeaveOneOut { regression, floor } => {
                let ridge = self.ridge(alpha, regression.rho(), *floor).0;
                return regression.chance(alpha, ridge);
            }
            Form::Inv { moments, .. } => {
                let Factored { factor, ridge } = self.factored(alpha)?;
                let s = moments.size();
                let identity = Tensor::eye(s, (Kind::Double, Device::Cpu));
                let inverse = identity.cholesky_solve(&factor, false);
                s as f64 - ridge * f64::try_from(inverse.trace())?
            }
        };
        Ok((self.num_classes() - 1.0) / self.scale() * df)
    }

    fn evaluate(&self, alpha: &[f64], derive: bool) -> Result<(f64, Vec<f64>), EngineError> {
        let (value, gradient) = match &self.form {
            Form::TraceRatio { between, floor } => {
                let (b, db) = quadratic_form(between, alpha);
                let (t, dt) = quadratic_form(&self.traces, alpha);
                let (t, scale) = (t / self.scale() + floor, self.scale());
                let gradient = db
                    .iter()
                    .zip(&dt)
                    .map(|(db, dt)| (db - b / t * dt / scale) / t)
                    .collect();
                (b / t, gradient)
            }
            Form::LeaveOneOut { regression, floor } => {
                let ridge = self.ridge(alpha, regression.rho(), *floor);
                regression.evaluate(alpha, &ridge, derive)?
            }
            Form::Inv {
                indicators: Some(z),
                ..
            } => self.evaluate_dual(alpha, z, derive)?,
            Form::Inv { .. } => self.evaluate_primal(alpha, derive)?,
        };
        if !value.is_finite() {
            return Err(EngineError::NotFinite("the H-score"));
        }
        Ok((value, gradient))
    }

    fn evaluate_primal(&self, alpha: &[f64], derive: bool) -> Result<(f64, Vec<f64>), EngineError> {
        let (rho, moments) = self.inv_parts();
        let Factored { factor, .. } = self.factored(alpha)?;
        // n_c u_c and n_c v_c = Σ_ρ⁻¹ n_c u_c, as columns [d, K].
        let by_class = &self.sums.by_class;
        let mixed = (by_class * Tensor::from_slice(alpha).view([1, -1, 1])).sum_dim_intlist(
            1,
            false,
            Kind::Double,
        );
        let solved = mixed.tr().cholesky_solve(&factor, false);
        let weighted = &solved * self.sums.class_weights();
        let value = (1.0 - rho) * f64::try_from((mixed.tr() * &weighted).sum(Kind::Double))?;
        if !derive {
            return Ok((value, vec![]));
        }
        // With W = Σ_c w_c v_c v_cᵀ,
        // ∂H/∂αᵢ = (1-ρ)[2 Σ_c w_c m_icᵀ v_c - (1-ρ) ⟨∂ᵢΣ, W⟩ - ρ ∂ᵢ(tr Σ/d) tr W].
        let w = weighted.matmul(&solved.tr());
        let trace_w = f64::try_from(w.trace())?;
        let through_means: Vec<f64> =
            Vec::try_from((by_class * weighted.tr().unsqueeze(1)).sum_dim_intlist(
                [0i64, 2].as_slice(),
                false,
                Kind::Double,
            ))?;
        let through_moments = moments.contract(alpha, &w)?;
        let through_trace = self.mean_variance(alpha).1;
        let gradient = (0..alpha.len())
            .map(|i| {
                (1.0 - rho)
                    * (2.0 * through_means[i]
                        - (1.0 - rho) / self.scale() * through_moments[i]
                        - rho * through_trace[i] * trace_w)
            })
            .collect();
        Ok((value, gradient))
    }

    fn evaluate_dual(
        &self,
        alpha: &[f64],
        indicators: &Tensor,
        derive: bool,
    ) -> Result<(f64, Vec<f64>), EngineError> {
        let (rho, moments) = self.inv_parts();
        let Factored { factor, ridge } = self.factored(alpha)?;
        // Y = (δI + A)⁻¹ Z
        let y = indicators.cholesky_solve(&factor, false);
        let kept = f64::try_from((indicators * &y).sum(Kind::Double))?;
        let value = self.num_classes() - ridge * kept;
        if !derive {
            return Ok((value, vec![]));
        }
        // ∂H/∂αᵢ = -∂ᵢδ tr(ZᵀY) + δ(∂ᵢδ ‖Y‖² + ⟨∂ᵢA, YYᵀ⟩)
        let outer = y.matmul(&y.tr());
        let squared = f64::try_from(outer.trace())?;
        let through_moments = moments.contract(alpha, &outer)?;
        let through_trace = self.mean_variance(alpha).1;
        let gradient = (0..alpha.len())
            .map(|i| {
                rho * through_trace[i] * (ridge * squared - kept)
                    + ridge * (1.0 - rho) / self.scale() * through_moments[i]
            })
            .collect();
        Ok((value, gradient))
    }

    fn factored(&self, alpha: &[f64]) -> Result<Factored, EngineError> {
        let Form::Inv { rho, floor, .. } = &self.form else {
            unreachable!("only `inv` factors");
        };
        let (_, moments) = self.inv_parts();
        let ridge = self.ridge(alpha, *rho, *floor).0;
        let matrix = moments.at(alpha) * ((1.0 - rho) / self.scale());
        let _ = matrix.diagonal(0, 0, 1).g_add_scalar_(ridge);
        let factor = cholesky(&matrix, "the mixed features")?;
        Ok(Factored { factor, ridge })
    }

    fn inv_parts(&self) -> (f64, &SecondMoments) {
        match &self.form {
            Form::Inv { rho, moments, .. } => (*rho, moments),
            _ => unreachable!("only `inv` has second moments"),
        }
    }

    /// δ, which stands on the diagonal beside the data, at α; and its gradient.
    fn ridge(&self, alpha: &[f64], rho: f64, floor: f64) -> (f64, Vec<f64>) {
        let (variance, slopes) = self.mean_variance(alpha);
        let slopes = slopes.iter().map(|slope| rho * slope).collect();
        (rho * variance + floor, slopes)
    }

    /// tr Σ/d at α and its gradient.
    fn mean_variance(&self, alpha: &[f64]) -> (f64, Vec<f64>) {
        let over = 1.0 / (self.scale() * self.sums.by_class.size()[2] as f64);
        let (value, gradient) = quadratic_form(&self.traces, alpha);
        (value * over, gradient.iter().map(|g| g * over).collect())
    }

    /// N-1
    fn scale(&self) -> f64 {
        self.sums.degrees()
    }

    /// K, of the classes present.
    fn num_classes(&self) -> f64 {
        self.sums.counts.len() as f64
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

/// [M, N, d] in f64, each source's mean taken out and, if asked, each of its coordinates scaled to
/// variance 1; a constant coordinate stays 0 (and libtorch can differentiate all of it).
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

/// Z [N, K]: 1/√n_c where the sample is of class c.
pub fn indicators(classes: &[usize], counts: &[usize]) -> Tensor {
    let mut values = vec![0.0; classes.len() * counts.len()];
    for (row, class) in classes.iter().enumerate() {
        values[row * counts.len() + class] = 1.0 / (counts[*class] as f64).sqrt();
    }
    Tensor::from_slice(&values).view([classes.len() as i64, counts.len() as i64])
}

#[cfg(test)]
mod tests;

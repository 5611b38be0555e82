//! Transferability: the shrunken H-score of the mixed features, as a function of α.
//!
//! H_ρ(α) = (1-ρ) tr(Σ_ρ(α)⁻¹ B(α)) with Σ_ρ = (1-ρ)Σ + ρ(tr Σ/d)I, Σ = cov(Σ αᵢ f_{Pᵢ}) and
//! B = cov(E[Σ αᵢ f_{Pᵢ} | y]), both with 1/(N-1) (Bao et al. 2019; Ibrahim et al. 2021 for ρ).
//! It is a ratio in α: neither convex nor concave, H(cα) = H(α), 0 ≤ H ≤ min(d, K-1).

use tch::{Kind, Tensor};

use super::head::class_means;
use super::{EngineError, cholesky};

/// Where every Σ αᵢ f_{Pᵢ} is (numerically) constant, Σ is 0: this share of the largest source's
/// variance keeps H finite there. Far below ρ, so it changes no digit that counts elsewhere.
const FLOOR: f64 = 1e-12;

pub struct HScore {
    /// [M, N·d] in f64: features centred source by source.
    features: Tensor,
    /// [K', M·d]: class means of the centred features, for the K' classes present.
    class_means: Tensor,
    /// [K']: w_c = n_c/(N-1).
    class_weights: Tensor,
    /// Row of `class_means` of every sample.
    class_rows: Tensor,
    num_samples: i64,
    embed_dim: i64,
    num_sources: i64,
    shrinkage: f64,
    floor: f64,
}

/// H at one α, with what its gradient needs.
struct Evaluation {
    value: f64,
    /// [N, d]: Σ αᵢ f̃ᵢ.
    mixed: Tensor,
    /// [d, K']: Σ_ρ⁻¹ u_c.
    solved: Tensor,
}

impl HScore {
    /// `features` [M, N, d]; `labels` has N entries.
    pub fn new(features: &Tensor, labels: &[usize], shrinkage: f64) -> Result<Self, EngineError> {
        let (m, n, d) = features.size3()?;
        let features = features.to_kind(Kind::Double);
        let centred = &features - features.mean_dim(1, true, Kind::Double);
        let mut classes = labels.to_vec();
        classes.sort_unstable();
        classes.dedup();
        let scale = (n - 1).max(1) as f64;
        let weights: Vec<f64> = classes
            .iter()
            .map(|class| labels.iter().filter(|label| *label == class).count() as f64 / scale)
            .collect();
        let rows: Vec<i64> = labels
            .iter()
            .map(|label| classes.binary_search(label).expect("collected above") as i64)
            .collect();
        let by_sample = centred.permute([1, 0, 2]).reshape([n, m * d]);
        let squares = centred
            .square()
            .sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Double);
        let largest = f64::try_from(squares.max())? / scale / d as f64;
        Ok(Self {
            class_means: class_means(&by_sample, labels, &classes)?,
            features: centred.reshape([m, n * d]),
            class_weights: Tensor::from_slice(&weights),
            class_rows: Tensor::from_slice(&rows),
            num_samples: n,
            embed_dim: d,
            num_sources: m,
            shrinkage,
            floor: if largest > 0.0 { FLOOR * largest } else { 1.0 },
        })
    }

    pub fn value(&self, alpha: &[f64]) -> Result<f64, EngineError> {
        Ok(self.evaluate(alpha)?.value)
    }

    pub fn value_and_gradient(&self, alpha: &[f64]) -> Result<(f64, Vec<f64>), EngineError> {
        let Evaluation {
            value,
            mixed,
            solved,
        } = self.evaluate(alpha)?;
        let (rho, scale, d) = (
            self.shrinkage,
            (self.num_samples - 1).max(1) as f64,
            self.embed_dim,
        );
        // With W = Σ_c w_c V_c V_cᵀ, the derivative by the mixed features of sample n is
        // 2/(N-1)·[V_{y_n} - (1-ρ) W x̃_n - ρ (tr W/d) x̃_n], times (1-ρ); ∂H/∂αᵢ is its inner
        // product with source i's features.
        let weighted = &solved * &self.class_weights;
        let through_w = mixed.matmul(&solved).matmul(&weighted.tr());
        let trace_w = f64::try_from((&solved * &weighted).sum(Kind::Double))? / d as f64;
        let by_mixed = solved.tr().index_select(0, &self.class_rows)
            - through_w * (1.0 - rho)
            - mixed * (rho * trace_w);
        let gradient = self.features.matmul(&by_mixed.flatten(0, -1));
        Ok((
            value,
            Vec::try_from(gradient * (2.0 * (1.0 - rho) / scale))?,
        ))
    }

    fn evaluate(&self, alpha: &[f64]) -> Result<Evaluation, EngineError> {
        let (n, d, m) = (self.num_samples, self.embed_dim, self.num_sources);
        let rho = self.shrinkage;
        let weights = Tensor::from_slice(alpha);
        let mixed = weights.matmul(&self.features).view([n, d]);
        let means = weights.matmul(&self.class_means.view([-1, m, d]));
        let covariance = mixed.tr().matmul(&mixed) / (n - 1).max(1) as f64;
        let mean_variance = f64::try_from(covariance.trace())? / d as f64;
        let shrunk = covariance * (1.0 - rho)
            + Tensor::eye(d, (Kind::Double, tch::Device::Cpu)) * (rho * mean_variance + self.floor);
        let factor = cholesky(&shrunk, "the mixed features")?;
        let solved = means.tr().cholesky_solve(&factor, false);
        let per_class = (means.tr() * &solved).sum_dim_intlist(0, false, Kind::Double);
        let value = (1.0 - rho) * f64::try_from(per_class.dot(&self.class_weights))?;
        if !value.is_finite() {
            return Err(EngineError::NotFinite("the H-score"));
        }
        Ok(Evaluation {
            value,
            mixed,
            solved,
        })
    }
}

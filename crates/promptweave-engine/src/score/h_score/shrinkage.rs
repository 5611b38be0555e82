//! Estimates of how much to shrink a covariance: the ρ in Σ_ρ = (1-ρ)Σ + ρ(tr Σ/d)I with the least
//! expected squared error.

use tch::{Kind, Tensor};

use crate::error::EngineError;
use promptweave_domain::objective::ShrinkageEstimate;

/// ρ for centred features [N, d]. S is the covariance over N (not N-1).
pub fn estimate(centred: &Tensor, by: ShrinkageEstimate) -> Result<f64, EngineError> {
    let (n, d) = centred.size2()?;
    let (n, d) = (n as f64, d as f64);
    // ‖S‖² is the same for the smaller of the two products.
    let product = if n < d {
        centred.matmul(&centred.tr())
    } else {
        centred.tr().matmul(centred)
    };
    let squared_norm = f64::try_from(product.square().sum(Kind::Double))? / (n * n);
    let norms = centred.square().sum_dim_intlist(1, false, Kind::Double);
    let mean = f64::try_from(norms.sum(Kind::Double))? / n / d;
    let rho = match by {
        // Chen, Wiesel, Eldar & Hero 2010, eq. 23, in scikit-learn's form.
        ShrinkageEstimate::Oas => {
            let a = squared_norm / (d * d);
            let denominator = (n + 1.0) * (a - mean * mean / d);
            if denominator > 0.0 {
                ((a + mean * mean) / denominator).min(1.0)
            } else {
                1.0
            }
        }
        // Ledoit & Wolf 2004, Lemmas 3.2 to 3.4: β² over δ².
        ShrinkageEstimate::LedoitWolf => {
            let fourth = f64::try_from(norms.square().sum(Kind::Double))? / n;
            let beta = (fourth - squared_norm) / n;
            let delta = squared_norm - d * mean * mean;
            if delta > 0.0 && beta > 0.0 {
                (beta / delta).min(1.0)
            } else {
                0.0
            }
        }
    };
    if rho.is_finite() {
        Ok(rho)
    } else {
        Err(EngineError::NotFinite("the features"))
    }
}

/// Limits an estimate to the range in which H can tell sources apart and the covariance is
/// invertible.
pub fn usable(rho: f64) -> f64 {
    rho.clamp(1e-6, 0.999)
}

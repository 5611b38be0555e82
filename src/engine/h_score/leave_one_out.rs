//! The H-score of samples that were left out: how much of the classes' variance the mixed features predict.
//!
//! H is what a ridge regression on the features explains of the class indicators Z [N, K], 1/√n_c each: with X the centred
//! mixed features [N, d], c = (1-ρ)/(N-1), the hat matrix A = c X Σ_ρ⁻¹ Xᵀ and Z̃ = Z less its column means,
//!
//! H_ρ = tr(Z̃ᵀ A Z̃)
//!
//! and with N not far above d much of that is chance. A regression without sample n misses it by
//!
//! eₙ = rₙ/(1 - 1/N - hₙ), r = Z̃ - A Z̃, h = diag A
//!
//! (Allen 1974, no regression is done again), ridge and Z̃ as all samples make them. What is left of the variance is
//!
//! H(α) = K - 1 - Σₙ ‖eₙ‖² ≤ K - 1
//!
//! which is below 0 where left-out samples are told worse than by the mean of the others.

use tch::{Kind, Tensor};

use super::super::{EngineError, cholesky};
use super::second_moments::mixed;

pub struct LeaveOneOut {
    /// [M, N, d], centred.
    x: Tensor,
    /// Z̃ [N, K]
    indicators: Tensor,
    rho: f64,
}

/// The regression at one α.
struct Fit {
    /// X [N, d]
    x: Tensor,
    /// L [d, d] of Σ_ρ = L Lᵀ.
    factor: Tensor,
    /// X Σ_ρ⁻¹ [N, d]
    solved: Tensor,
    /// h [N]
    leverage: Tensor,
    /// r [N, K]
    residuals: Tensor,
    /// 1/(1 - 1/N - h) [N]
    growth: Tensor,
}

impl LeaveOneOut {
    /// `indicators` are Z.
    pub fn new(x: Tensor, indicators: &Tensor, rho: f64) -> Self {
        Self {
            x,
            indicators: indicators - indicators.mean_dim(0, true, Kind::Double),
            rho,
        }
    }

    pub fn rho(&self) -> f64 {
        self.rho
    }

    /// H, and its gradient if that is asked for. `ridge` is ρ tr Σ/d at α, and its gradient.
    pub fn evaluate(
        &self,
        alpha: &[f64],
        (ridge, ridge_slopes): &(f64, Vec<f64>),
        derive: bool,
    ) -> Result<(f64, Vec<f64>), EngineError> {
        let fit = self.fit(alpha, *ridge)?;
        let missed = fit.missed();
        let value = self.most() - f64::try_from(missed.sum(Kind::Double))?;
        if !derive {
            return Ok((value, vec![]));
        }
        // Σ‖eₙ‖² moves by ⟨∂A, B⟩, B = -(S²R Z̃ᵀ + Z̃ RᵀS²) + 2 diag(‖rₙ‖² sₙ³), of which only B X [N, d] is needed:
        // ∂A = c(∂X M Xᵀ + X M ∂Xᵀ - X M ∂Σ_ρ M Xᵀ) with M = Σ_ρ⁻¹ and ∂Σ_ρ = c(∂Xᵀ X + Xᵀ ∂X) + ∂δ I.
        let Fit {
            x,
            factor,
            residuals,
            growth,
            ..
        } = &fit;
        let (c, z) = (self.degrees_weight(), &self.indicators);
        let grown = residuals * growth.square().unsqueeze(1);
        let b_x = x * (&missed * growth * 2.0).unsqueeze(1)
            - grown.matmul(&z.tr().matmul(x))
            - z.matmul(&grown.tr().matmul(x));
        let solve = |rows: &Tensor| rows.tr().cholesky_solve(factor, false).tr();
        // W = M Xᵀ B X M
        let w = solve(&solve(&x.tr().matmul(&b_x)).tr());
        let slope_of_x = (solve(&b_x) - x.matmul(&w) * c) * (2.0 * c);
        let through_x = self.x.flatten(1, -1).matmul(&slope_of_x.flatten(0, -1));
        let through_x = Vec::<f64>::try_from(through_x)?;
        let trace = f64::try_from(w.trace())?;
        let slopes = through_x.iter().zip(ridge_slopes);
        Ok((
            value,
            slopes.map(|(x, ridge)| c * trace * ridge - x).collect(),
        ))
    }

    /// What H is on average when the labels are shuffled: E[Z̃Z̃ᵀ] is (K-1)/(N-1) (I - 11ᵀ/N) then.
    pub fn chance(&self, alpha: &[f64], ridge: f64) -> Result<f64, EngineError> {
        let fit = self.fit(alpha, ridge)?;
        let (n, c) = (self.num_samples(), self.degrees_weight());
        // (A²)ₙₙ, as c XᵀX = Σ_ρ - δI.
        let squared = &fit.leverage - squared_rows(&fit.solved) * (ridge * c);
        let of_rows = &fit.leverage * -2.0 + squared + (1.0 - 1.0 / n);
        let missed = f64::try_from((of_rows * fit.growth.square()).sum(Kind::Double))?;
        Ok(self.most() * (1.0 - missed / (n - 1.0)))
    }

    fn fit(&self, alpha: &[f64], ridge: f64) -> Result<Fit, EngineError> {
        let (x, c) = (mixed(&self.x, alpha), self.degrees_weight());
        let matrix = x.tr().matmul(&x) * c;
        let _ = matrix.diagonal(0, 0, 1).g_add_scalar_(ridge);
        let factor = cholesky(&matrix, "the mixed features")?;
        let solved = x.tr().cholesky_solve(&factor, false).tr();
        let leverage = (&solved * &x).sum_dim_intlist(1, false, Kind::Double) * c;
        let fitted = solved.matmul(&x.tr().matmul(&self.indicators)) * c;
        let growth = (&leverage * -1.0 + (1.0 - 1.0 / self.num_samples())).reciprocal();
        Ok(Fit {
            residuals: &self.indicators - fitted,
            x,
            factor,
            solved,
            leverage,
            growth,
        })
    }

    /// c
    fn degrees_weight(&self) -> f64 {
        (1.0 - self.rho) / (self.num_samples() - 1.0)
    }

    /// N
    fn num_samples(&self) -> f64 {
        self.x.size()[1] as f64
    }

    /// K - 1
    fn most(&self) -> f64 {
        self.indicators.size()[1] as f64 - 1.0
    }
}

/// H of one prompt's centred features x [N, d] and Z [N, K] as libtorch differentiates it.
pub fn differentiable(x: &Tensor, indicators: &Tensor, rho: f64) -> Result<Tensor, EngineError> {
    let (n, d) = x.size2()?;
    let (n, k) = (n as f64, indicators.size2()?.1 as f64);
    let covariance = x.tr().matmul(x) / (n - 1.0);
    let ridge = covariance.trace() * (rho / d as f64);
    let identity = Tensor::eye(d, (Kind::Double, x.device()));
    let shrunk = covariance * (1.0 - rho) + identity * ridge;
    let solved = x
        .tr()
        .cholesky_solve(&cholesky(&shrunk, "the features")?, false)
        .tr();
    let z = indicators - indicators.mean_dim(0, true, Kind::Double);
    let c = (1.0 - rho) / (n - 1.0);
    let residuals = &z - solved.matmul(&x.tr().matmul(&z)) * c;
    let leverage = (solved * x).sum_dim_intlist(1, false, Kind::Double) * c;
    let missed = squared_rows(&residuals) / (leverage * -1.0 + (1.0 - 1.0 / n)).square();
    Ok(missed.sum(Kind::Double) * -1.0 + (k - 1.0))
}

impl Fit {
    /// ‖eₙ‖² [N]
    fn missed(&self) -> Tensor {
        squared_rows(&self.residuals) * self.growth.square()
    }
}

fn squared_rows(rows: &Tensor) -> Tensor {
    rows.square().sum_dim_intlist(1, false, Kind::Double)
}

//! H as the variance of the classes that a ridge regression on the mixed features explains, on the samples
//! that it was fitted on or on others.
//!
//! Let X be the centred mixed features [N, d], Z [N, K] the orthonormal class indicators, Z̃ these minus
//! their column means, and c = (1-ρ)/(N-1). The hat matrix is A = c X S⁻¹ Xᵀ with S = Σ_ρ = c XᵀX + δI, and
//!
//! `standard`              H = tr(Z̃ᵀ A Z̃)
//! `cross_validated`  H = K - 1 - E/g²,   E = ‖Z̃ - A Z̃‖²,   g = 1 - (1 + df)/N,   df = tr A
//!
//! The second is generalised cross-validation (Golub, Heath & Wahba 1979): the squared error of leaving
//! out each sample in turn, with the mean leverage in place of each sample's own. It is below 0 if the
//! left-out samples are predicted worse than by the mean. Chance has no larger part in it if N is near d.
//!
//! Both are functions of G = XᵀZ [d, K], S and δ. With V = S⁻¹G and Y = S⁻¹V:
//!
//! ```text
//! primal, S [d, d]               H = c⟨G, V⟩       E = K - 1 - H - cδ‖V‖²    df = d - δ tr S⁻¹
//! dual, S = c XXᵀ + δI [N, N],
//!       V = S⁻¹Z̃, Y = S⁻¹V       H = K - 1 - δ⟨Z̃, V⟩   E = δ²‖V‖²            df = N - δ tr S⁻¹
//! ```
//!
//! If the error is tiny (N ≤ d and a small ρ), the primal's E is a difference of larger numbers and loses
//! digits. The dual's E does not.

use std::cell::OnceCell;

use tch::{Kind, Tensor};

use crate::error::EngineError;
use crate::score::h_score::second_moments::SecondMoments;
use crate::score::h_score::sums::Sums;
use crate::tensors::cholesky;

/// The matrices of one dataset, and the kind of H.
pub struct Regression {
    pub rho: f64,
    pub cross_validated: bool,
    pub moments: SecondMoments,
    /// Z̃ [N, K], in the dual form alone.
    pub indicators: Option<Tensor>,
}

/// The regression at one α.
struct Fit {
    dual: bool,
    c: f64,
    delta: f64,
    /// The maximum K - 1 of H.
    most: f64,
    /// The Cholesky factor L [s, s] of S = L Lᵀ.
    factor: Tensor,
    /// G, or Z̃ in the dual form.
    right: Tensor,
    /// V = S⁻¹G, or S⁻¹Z̃ in the dual form.
    solved: Tensor,
    /// S⁻¹, once something needs it.
    inverse: OnceCell<Tensor>,
}

/// The derivatives of a function of G, S and δ: ⟨`sums`, ∂G⟩ + ⟨`matrix`, ∂S⟩ + `ridge` ∂δ.
struct Slopes {
    /// The derivative by G; `None` if the function does not depend on it.
    sums: Option<Tensor>,
    matrix: Tensor,
    ridge: f64,
}

impl Regression {
    /// H, and its gradient by α if that is requested. `sums` are of the same samples as the
    /// matrices; `ridge` is δ at α and its gradient.
    pub fn evaluate(
        &self,
        sums: &Sums,
        alpha: &[f64],
        (delta, delta_slopes): &(f64, Vec<f64>),
        derive: bool,
    ) -> Result<(f64, Vec<f64>), EngineError> {
        let fit = self.fit(sums, alpha, *delta)?;
        let n = sums.num_samples();
        let value = match self.cross_validated {
            true => fit.predicted(n),
            false => fit.explained(),
        };
        if !derive {
            return Ok((value, vec![]));
        }
        let slopes = match self.cross_validated {
            true => fit.slopes_of_predicted(n),
            false => fit.slopes_of_explained(),
        };
        let through_sums = match &slopes.sums {
            None => vec![0.0; alpha.len()],
            Some(by_class) => {
                let by_class = (by_class * sums.rooted_counts().reciprocal()).tr();
                let products = &sums.by_class * by_class.unsqueeze(1);
                let over = [0i64, 2];
                Vec::<f64>::try_from(products.sum_dim_intlist(
                    over.as_slice(),
                    false,
                    Kind::Double,
                ))?
            }
        };
        let through_moments = self.moments.contract(alpha, &slopes.matrix)?;
        // ∂S = c ∂(XᵀX) + ∂δ I
        let of_delta = slopes.ridge + trace(&slopes.matrix);
        let gradient = (0..alpha.len())
            .map(|i| through_sums[i] + fit.c * through_moments[i] + of_delta * delta_slopes[i]);
        Ok((value, gradient.collect()))
    }

    /// The mean of H if the labels are shuffled; then E[Z̃Z̃ᵀ] is (K-1)/(N-1) (I - 11ᵀ/N).
    pub fn chance(&self, sums: &Sums, alpha: &[f64], delta: f64) -> Result<f64, EngineError> {
        let fit = self.fit(sums, alpha, delta)?;
        let inverse = fit.inverse();
        let (n, most) = (sums.num_samples(), sums.num_classes() - 1.0);
        let shrunk = delta * trace(inverse);
        let freedom = fit.degrees_of_freedom();
        if !self.cross_validated {
            return Ok(most * freedom / sums.degrees());
        }
        // tr A², since A is I - δS⁻¹ on the range of the data.
        let squared = freedom - shrunk + delta * delta * inner(inverse, inverse);
        let missed = (n - 1.0 - 2.0 * freedom + squared) / sums.degrees();
        Ok(most * (1.0 - missed / unspent(freedom, n).powi(2)))
    }

    fn fit(&self, sums: &Sums, alpha: &[f64], delta: f64) -> Result<Fit, EngineError> {
        let c = (1.0 - self.rho) / sums.degrees();
        let matrix = self.moments.at(alpha) * c;
        let _ = matrix.diagonal(0, 0, 1).g_add_scalar_(delta);
        let factor = cholesky(&matrix, "the mixed features")?;
        let right = match &self.indicators {
            Some(indicators) => indicators.shallow_clone(),
            None => {
                let weighted = &sums.by_class * Tensor::from_slice(alpha).view([1, -1, 1]);
                let by_class = weighted.sum_dim_intlist(1, false, Kind::Double);
                by_class.tr() / sums.rooted_counts()
            }
        };
        Ok(Fit {
            dual: self.indicators.is_some(),
            c,
            delta,
            most: sums.num_classes() - 1.0,
            solved: right.cholesky_solve(&factor, false),
            factor,
            right,
            inverse: OnceCell::new(),
        })
    }
}

impl Fit {
    /// H as `standard`.
    fn explained(&self) -> f64 {
        let product = inner(&self.right, &self.solved);
        match self.dual {
            false => self.c * product,
            true => self.most - self.delta * product,
        }
    }

    fn slopes_of_explained(&self) -> Slopes {
        let outer = self.solved.matmul(&self.solved.tr());
        match self.dual {
            false => Slopes {
                sums: Some(&self.solved * (2.0 * self.c)),
                matrix: outer * -self.c,
                ridge: 0.0,
            },
            true => Slopes {
                sums: None,
                matrix: outer * self.delta,
                ridge: -inner(&self.right, &self.solved),
            },
        }
    }

    /// H as `cross_validated`, from N samples.
    fn predicted(&self, n: f64) -> f64 {
        self.most - self.missed() / unspent(self.degrees_of_freedom(), n).powi(2)
    }

    fn slopes_of_predicted(&self, n: f64) -> Slopes {
        let (missed, inverse) = (self.slopes_of_missed(), self.inverse());
        let unspent = unspent(self.degrees_of_freedom(), n);
        let by_missed = -unspent.powi(-2);
        let by_freedom = -2.0 * self.missed() * unspent.powi(-3) / n;
        // ∂df is δ⟨S⁻², ∂S⟩ - tr S⁻¹ ∂δ.
        Slopes {
            sums: missed.sums.map(|sums| sums * by_missed),
            matrix: missed.matrix * by_missed + inverse.matmul(inverse) * (self.delta * by_freedom),
            ridge: missed.ridge * by_missed - trace(inverse) * by_freedom,
        }
    }

    /// The squared error E.
    fn missed(&self) -> f64 {
        let norm = inner(&self.solved, &self.solved);
        match self.dual {
            false => self.most - self.explained() - self.c * self.delta * norm,
            true => self.delta * self.delta * norm,
        }
    }

    fn slopes_of_missed(&self) -> Slopes {
        let (c, delta, v) = (self.c, self.delta, &self.solved);
        let y = v.cholesky_solve(&self.factor, false);
        let crossed = v.matmul(&y.tr());
        let crossed = &crossed + crossed.tr();
        let norm = inner(v, v);
        match self.dual {
            false => Slopes {
                sums: Some((v + y * delta) * (-2.0 * c)),
                matrix: crossed * (c * delta) - self.slopes_of_explained().matrix,
                ridge: -c * norm,
            },
            true => Slopes {
                sums: None,
                matrix: crossed * (-delta * delta),
                ridge: 2.0 * delta * norm,
            },
        }
    }

    /// The degrees of freedom df.
    fn degrees_of_freedom(&self) -> f64 {
        let inverse = self.inverse();
        inverse.size()[0] as f64 - self.delta * trace(inverse)
    }

    /// The inverse S⁻¹.
    fn inverse(&self) -> &Tensor {
        let make = || self.factor.cholesky_inverse(false);
        self.inverse.get_or_init(make)
    }
}

/// g: the share of N samples that remains after a mean and `freedom` more.
fn unspent(freedom: f64, n: f64) -> f64 {
    1.0 - (1.0 + freedom) / n
}

fn trace(matrix: &Tensor) -> f64 {
    matrix.trace().double_value(&[])
}

fn inner(a: &Tensor, b: &Tensor) -> f64 {
    (a * b).sum(Kind::Double).double_value(&[])
}

/// H of one prompt's centred features x [N, d] and Z [N, K] in a form that libtorch can
/// differentiate, by its definition.
pub fn differentiable(
    x: &Tensor,
    indicators: &Tensor,
    rho: f64,
    cross_validated: bool,
) -> Result<Tensor, EngineError> {
    let (n, d) = x.size2()?;
    let c = (1.0 - rho) / (n - 1) as f64;
    let scatter = x.tr().matmul(x) * c;
    let ridge = x.square().sum(Kind::Double) * (rho / ((n - 1) * d) as f64);
    let identity = Tensor::eye(d, (Kind::Double, x.device()));
    let factor = cholesky(&(scatter + identity * ridge), "the features")?;
    // A [N, N] itself is never formed.
    let solved = x.tr().cholesky_solve(&factor, false).tr() * c;
    let z = indicators - indicators.mean_dim(0, true, Kind::Double);
    let fitted = solved.matmul(&x.tr().matmul(&z));
    if !cross_validated {
        return Ok((fitted * z).sum(Kind::Double));
    }
    let missed = (z - fitted).square().sum(Kind::Double);
    let freedom = (solved * x).sum(Kind::Double);
    let unspent = freedom * (-1.0 / n as f64) + (1.0 - 1.0 / n as f64);
    let most = indicators.size2()?.1 as f64 - 1.0;
    Ok(missed / unspent.square() * -1.0 + most)
}

//! The log-linear pool: how much each source's own prediction counts.
//!
//! Every source has a closed-form head on the target samples, and predicts each of them by a head that was not fitted on
//! it. A pool multiplies the sources' probabilities with exponents wᵢ ≥ 0 ([`solver`] finds them). α = w/Σw says how much
//! of each source, and s = Σw how sharp the pool is. Nothing is mixed in prompt space, so that sources may have any shape,
//! and no gradients of the backbone are needed.
//!
//! Stacking by a convex problem is the super learner of van der Laan, Polley & Hubbard (2007), with a geometric mean in
//! place of the arithmetic one.

pub mod solver;
#[cfg(test)]
mod tests;

use tch::{Kind, Tensor};

use crate::baselines::most_similar;
use crate::device::threads::OneThread;
use crate::error::EngineError;
use crate::pool::solver::{Optimum, Predictions, Pull};
use crate::score::evaluate::UnseenLogits;
use crate::score::gradients::sample_folds;
use crate::score::head::fit_temperature;
use crate::solve::jackknife::errors_of;
use promptweave_domain::objective::HeadOptions;

/// ε: the share of equal probabilities in every source's prediction, so that one wrong certainty does not decide.
pub const EPSILON: f64 = 0.01;
/// The least weight of a source in the uniform pool. It stands for none, where all sources are useless.
const LEAST: f64 = 1e-3;
/// The largest weight of a source in the uniform pool. It is that of calibrated sources that know nothing of each other;
/// a larger one would come from samples that happen to be separated.
const MOST: f64 = 1.0;

/// The weights of a pool, and how well it and its parts predict samples that no head was fitted on.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// α, on the simplex.
    pub alpha: Vec<f64>,
    /// s = Σw > 0.
    pub sharpness: f64,
    /// Jackknife standard errors of α, by leaving out one of the folds of the samples at a time while the predictions
    /// are held.
    pub standard_errors: Vec<f64>,
    /// Mean loss in nats of this pool, at its weights. It is fitted on these samples by M numbers, so it is a little low.
    pub loss: f64,
    /// The same of the uniform pool at its best sharpness.
    pub uniform_loss: f64,
    pub uniform_sharpness: f64,
    /// The same of every source alone, at its own temperature.
    pub source_losses: Vec<f64>,
    pub iterations: usize,
    pub converged: bool,
}

/// How the weights are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PoolOptions {
    /// β ≥ 0: how strongly weights are pulled towards equal ones, in samples.
    pub beta: f64,
    /// Only so many of the largest weights are kept and fitted again.
    pub top_k: Option<usize>,
}

/// log pᵢ(k|xₙ) `[N, K]` of one source with features `[N, d]`, and the temperature of its head: (1-ε) softmax(z/T) + ε/K
/// with z by a head that was not fitted on the sample.
pub fn log_predictions(
    features: &Tensor,
    labels: &[usize],
    num_classes: usize,
    head: &HeadOptions,
) -> Result<(Tensor, f64), EngineError> {
    let unseen = UnseenLogits::new(features, labels, num_classes, head)?;
    let temperature = fit_temperature(&unseen.with_loss(labels)?);
    let p = (unseen.logits / temperature).softmax(-1, Kind::Double);
    let log_p = (p * (1.0 - EPSILON) + EPSILON / num_classes as f64).log();
    Ok((log_p.to_kind(Kind::Float), temperature))
}

/// Fits a pool. `tick` is called before every step; its error ends the work.
pub fn fit(
    predictions: &Predictions,
    labels: &[usize],
    options: PoolOptions,
    tick: &mut dyn FnMut() -> Result<(), EngineError>,
) -> Result<Pool, EngineError> {
    let _alone = OneThread::begin();
    let m = predictions.num_sources();
    let all: Vec<usize> = (0..m).collect();
    let mut kept = all.clone();
    let mut fitted = Fitted::of(predictions, options.beta, None, tick)?;
    if let Some(top_k) = options.top_k.filter(|top_k| *top_k < m) {
        kept = most_similar(&fitted.optimum.weights, Some(top_k));
        kept.sort_unstable();
        fitted = Fitted::of(&predictions.of_sources(&kept), options.beta, None, tick)?;
    }
    let spread = |of_kept: &[f64]| {
        let mut of_all = vec![0.0; m];
        kept.iter()
            .zip(of_kept)
            .for_each(|(i, value)| of_all[*i] = *value);
        of_all
    };
    let among = predictions.of_sources(&kept);
    let errors = jackknife(&among, labels, options.beta, &fitted, tick)?;
    let uniform = predictions.mean();
    let uniform_sharpness = m as f64 * uniform_weight(predictions, tick)?;
    let source_losses = all
        .iter()
        .map(|i| predictions.of_sources(&[*i]).loss(&[1.0]));
    Ok(Pool {
        alpha: spread(&fitted.alpha()),
        sharpness: fitted.optimum.weights.iter().sum(),
        standard_errors: spread(&errors),
        loss: among.loss(&fitted.optimum.weights),
        uniform_loss: uniform.loss(&[uniform_sharpness]),
        uniform_sharpness,
        source_losses: source_losses.collect(),
        iterations: fitted.optimum.iterations,
        converged: fitted.optimum.converged,
    })
}

/// u, the weight of every source in the uniform pool of least loss.
fn uniform_weight(
    predictions: &Predictions,
    tick: &mut dyn FnMut() -> Result<(), EngineError>,
) -> Result<f64, EngineError> {
    let free = Pull {
        beta: 0.0,
        centre: 1.0,
    };
    let sharpness = predictions.mean().minimise(free, &[1.0], tick)?.weights[0];
    Ok((sharpness / predictions.num_sources() as f64).clamp(LEAST, MOST))
}

struct Fitted {
    optimum: Optimum,
}

impl Fitted {
    /// Fits from the uniform pool, or from weights that are near.
    fn of(
        predictions: &Predictions,
        beta: f64,
        near: Option<&[f64]>,
        tick: &mut dyn FnMut() -> Result<(), EngineError>,
    ) -> Result<Self, EngineError> {
        let pull = Pull {
            beta,
            centre: uniform_weight(predictions, tick)?,
        };
        let start = match near {
            Some(weights) => weights.to_vec(),
            None => vec![pull.centre; predictions.num_sources()],
        };
        let optimum = predictions.minimise(pull, &start, tick)?;
        Ok(Self { optimum })
    }

    fn alpha(&self) -> Vec<f64> {
        let sum: f64 = self.optimum.weights.iter().sum();
        let share = |w: &f64| match sum > 0.0 {
            true => w / sum,
            // No weight at all predicts best: no source is preferred.
            false => 1.0 / self.optimum.weights.len() as f64,
        };
        self.optimum.weights.iter().map(share).collect()
    }
}

/// The standard errors of α, from fits without one of the folds each.
fn jackknife(
    predictions: &Predictions,
    labels: &[usize],
    beta: f64,
    whole: &Fitted,
    tick: &mut dyn FnMut() -> Result<(), EngineError>,
) -> Result<Vec<f64>, EngineError> {
    let folds = sample_folds(labels);
    let count = folds.iter().max().map_or(0, |last| last + 1);
    let mut without: Vec<Vec<f64>> = Vec::with_capacity(count);
    for fold in 0..count {
        let rows: Vec<usize> = (0..folds.len()).filter(|n| folds[*n] != fold).collect();
        let rest = predictions.of_samples(&rows);
        // At β = 0 a weight of 0 may grow again, but a start of 0 is kept out of the way.
        let near: Vec<f64> = (whole.optimum.weights.iter())
            .map(|w| w.max(1e-6 * whole.optimum.weights.iter().sum::<f64>().max(1e-9)))
            .collect();
        without.push(Fitted::of(&rest, beta, Some(&near), tick)?.alpha());
    }
    Ok(errors_of(&without))
}

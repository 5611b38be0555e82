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

use crate::baselines::{most_similar, uniform};
use crate::device::threads::OneThread;
use crate::error::EngineError;
use crate::pool::solver::{Optimum, Predictions, Pull};
use crate::score::evaluate::UnseenLogits;
use crate::score::gradients::sample_folds;
use crate::score::head::fit_temperature;
use crate::solve::jackknife::errors_of;
use crate::statistics::SolveInputs;
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
    /// Share of the samples that this pool classifies correctly.
    pub accuracy: f64,
    /// The loss of the uniform pool at its best sharpness.
    pub uniform_loss: f64,
    pub uniform_sharpness: f64,
    /// The loss of every source alone, at its own temperature.
    pub source_losses: Vec<f64>,
    /// Whether the solver came to rest.
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

impl Default for PoolOptions {
    /// β = 10 samples, and all sources.
    fn default() -> Self {
        Self {
            beta: 10.0,
            top_k: None,
        }
    }
}

/// log pᵢ(k|xₙ) `[N, K]` of one source with features `[N, d]`: (1-ε) softmax(z/T) + ε/K, with z by a head that was not
/// fitted on the sample, and one temperature T of least loss.
pub fn log_predictions(
    features: &Tensor,
    labels: &[usize],
    num_classes: usize,
    head: &HeadOptions,
) -> Result<Tensor, EngineError> {
    let unseen = UnseenLogits::new(features, labels, num_classes, head)?;
    let temperature = fit_temperature(&unseen.with_loss(labels)?);
    let p = (unseen.logits / temperature).softmax(-1, Kind::Double);
    let log_p = (p * (1.0 - EPSILON) + EPSILON / num_classes as f64).log();
    Ok(log_p.to_kind(Kind::Float))
}

/// The pool of these sources; `None` with one source.
pub fn of_sources(
    ground: SolveInputs<'_>,
    num_classes: usize,
    head: &HeadOptions,
    tick: &mut dyn FnMut() -> Result<(), EngineError>,
) -> Result<Option<Pool>, EngineError> {
    let (m, labels) = (ground.features.size()[0], ground.labels);
    if m == 1 {
        return Ok(None);
    }
    let log_p = (0..m).map(|i| {
        tick()?;
        log_predictions(&ground.features.get(i), labels, num_classes, head)
    });
    let log_p = log_p.collect::<Result<Vec<_>, EngineError>>()?;
    let predictions = Predictions::new(Tensor::stack(&log_p, 0), labels);
    fit(&predictions, labels, PoolOptions::default(), tick).map(Some)
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
    let (mut found, uniform_weight) = solve(predictions, options.beta, tick)?;
    let (mut kept, mut top) = ((0..m).collect(), None);
    if let Some(top_k) = options.top_k.filter(|top_k| *top_k < m) {
        kept = most_similar(&found.weights, Some(top_k));
        kept.sort_unstable();
        let of_kept = top.insert(predictions.of_sources(&kept));
        (found, _) = solve(of_kept, options.beta, tick)?;
    }
    let among = top.as_ref().unwrap_or(predictions);
    let spread = |of_kept: &[f64]| {
        let mut of_all = vec![0.0; m];
        kept.iter()
            .zip(of_kept)
            .for_each(|(i, value)| of_all[*i] = *value);
        of_all
    };
    let errors = jackknife(among, labels, options.beta, &found.weights, tick)?;
    let source_losses = (0..m).map(|i| predictions.of_sources(&[i]).loss(&[1.0]));
    let uniform_sharpness = m as f64 * uniform_weight;
    Ok(Pool {
        alpha: spread(&shares(&found.weights)),
        sharpness: found.weights.iter().sum(),
        standard_errors: spread(&errors),
        loss: among.loss(&found.weights),
        accuracy: among.accuracy(&found.weights),
        uniform_loss: predictions.mean().loss(&[uniform_sharpness]),
        uniform_sharpness,
        source_losses: source_losses.collect(),
        converged: found.converged,
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

/// The weights of a pool with this β, and the weight u that they are pulled towards.
pub fn solve(
    predictions: &Predictions,
    beta: f64,
    tick: &mut dyn FnMut() -> Result<(), EngineError>,
) -> Result<(Optimum, f64), EngineError> {
    let _alone = OneThread::begin();
    let centre = uniform_weight(predictions, tick)?;
    let start = vec![centre; predictions.num_sources()];
    let found = predictions.minimise(Pull { beta, centre }, &start, tick)?;
    Ok((found, centre))
}

/// α = w/Σw. If no weight at all predicts best, no source is preferred.
fn shares(weights: &[f64]) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    match sum > 0.0 {
        true => weights.iter().map(|w| w / sum).collect(),
        false => uniform(weights.len()),
    }
}

/// The standard errors of α, from fits without one of the folds each, which begin at the weights of all samples.
fn jackknife(
    predictions: &Predictions,
    labels: &[usize],
    beta: f64,
    weights: &[f64],
    tick: &mut dyn FnMut() -> Result<(), EngineError>,
) -> Result<Vec<f64>, EngineError> {
    let folds = sample_folds(labels);
    let count = folds.iter().max().map_or(0, |last| last + 1);
    // A weight that is 0 at β = 0 may be more without a fold.
    let least = 1e-6 * weights.iter().sum::<f64>().max(LEAST);
    let start: Vec<f64> = weights.iter().map(|w| w.max(least)).collect();
    let without = (0..count).map(|fold| {
        let rows: Vec<usize> = (0..folds.len()).filter(|n| folds[*n] != fold).collect();
        let rest = predictions.of_samples(&rows);
        let centre = uniform_weight(&rest, tick)?;
        let found = rest.minimise(Pull { beta, centre }, &start, tick)?;
        Ok(shares(&found.weights))
    });
    Ok(errors_of(
        &without.collect::<Result<Vec<_>, EngineError>>()?,
    ))
}

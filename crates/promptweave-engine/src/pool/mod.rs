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
pub mod unseen;

use tch::Kind;

use crate::baselines::{most_similar, uniform};
use crate::device::threads::OneThread;
use crate::error::EngineError;
use crate::pool::solver::{Optimum, Predictions, Pull};
use crate::score::gradients::sample_folds;
use crate::solve::jackknife::errors_of;
use promptweave_domain::objective;

/// ε: the share of equal probabilities in every source's prediction, so that one wrong certainty does not decide.
pub const EPSILON: f64 = 0.01;
/// The least weight of a source in the uniform pool. It stands for none, where all sources are useless.
const LEAST: f64 = 1e-3;
/// The largest weight of a source in the uniform pool. It is that of calibrated sources that know nothing of each other;
/// a larger one would come from samples that happen to be separated.
const MOST: f64 = 1.0;

/// A source with less than this share of an equal weight is left out of the pool, since it costs a forward pass.
const NEGLIGIBLE: f64 = 0.2;

/// The weights of a pool, and how well it and its parts predict samples that no head was fitted on.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// α, on the simplex. A source that is left out has 0.
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
    /// How much lower the pool's loss is than the last source's: the mean over the samples, and its standard error.
    pub gain: (f64, f64),
    /// Whether the solver came to rest.
    pub converged: bool,
}

/// Fits a pool of the sources that count. A source is left out if it predicts no better than the classes' shares do, if
/// its weight is negligible, or beyond `top_k`; the weights of the others are then fitted again. If no source knows
/// anything, the last has all weight. `tick` is called before every step; its error ends the work.
pub fn fit(
    predictions: &Predictions,
    labels: &[usize],
    options: &objective::Pool,
    tick: &mut dyn FnMut() -> Result<(), EngineError>,
) -> Result<Pool, EngineError> {
    let _alone = OneThread::begin();
    let m = predictions.num_sources();
    let source_losses = (0..m).map(|i| predictions.of_sources(&[i]).loss(&[1.0]));
    let source_losses: Vec<f64> = source_losses.collect();
    let informed = informed(&source_losses, labels);
    let (of_informed, _) = solve(&predictions.of_sources(&informed), options.beta, tick)?;
    let kept = kept(&of_informed.weights, options.top_k);
    let kept: Vec<usize> = kept.iter().map(|i| informed[*i]).collect();
    let among = &predictions.of_sources(&kept);
    let found = match kept == informed {
        true => of_informed,
        false => solve(among, options.beta, tick)?.0,
    };
    let uniform_weight = uniform_weight(predictions, tick)?;
    let spread = |of_kept: &[f64]| {
        let mut of_all = vec![0.0; m];
        kept.iter()
            .zip(of_kept)
            .for_each(|(i, value)| of_all[*i] = *value);
        of_all
    };
    let errors = jackknife(among, labels, options.beta, &found.weights, tick)?;
    let last = predictions.of_sources(&[m - 1]).losses(&[1.0]);
    let gains = last - among.losses(&found.weights);
    let uniform_sharpness = m as f64 * uniform_weight;
    Ok(Pool {
        alpha: spread(&shares(&found.weights)),
        sharpness: found.weights.iter().sum(),
        standard_errors: spread(&errors),
        loss: among.loss(&found.weights),
        accuracy: among.accuracy(&found.weights),
        uniform_loss: predictions.mean().loss(&[uniform_sharpness]),
        uniform_sharpness,
        source_losses,
        gain: mean_with_error(&gains),
        converged: found.converged,
    })
}

/// The sources whose loss is below the entropy of the classes' shares by more than a fitted temperature gains by chance,
/// 1/N (Akaike 1974). If there is none, the last.
fn informed(source_losses: &[f64], labels: &[usize]) -> Vec<usize> {
    let n = labels.len() as f64;
    let mut counts = vec![0.0; labels.iter().max().map_or(0, |most| most + 1)];
    labels.iter().for_each(|label| counts[*label] += 1.0);
    let shares = counts.iter().map(|count| count / n);
    let entropy: f64 = shares.filter(|p| *p > 0.0).map(|p: f64| -p * p.ln()).sum();
    let knows = |i: &usize| source_losses[*i] < entropy - 1.0 / n;
    let informed: Vec<usize> = (0..source_losses.len()).filter(knows).collect();
    match informed.is_empty() {
        true => vec![source_losses.len() - 1],
        false => informed,
    }
}

/// The sources to keep, in order: those with the largest weights, at most `top_k`, and none whose weight is negligible.
fn kept(weights: &[f64], top_k: Option<usize>) -> Vec<usize> {
    let equal = weights.iter().sum::<f64>() / weights.len() as f64;
    let mut kept = most_similar(weights, top_k);
    kept.retain(|i| weights[*i] >= NEGLIGIBLE * equal);
    kept.sort_unstable();
    kept
}

/// The mean of some numbers, and its standard error.
fn mean_with_error(numbers: &tch::Tensor) -> (f64, f64) {
    let n = numbers.numel() as f64;
    let mean = numbers.mean(Kind::Double).double_value(&[]);
    let squares = (numbers - mean)
        .square()
        .sum(Kind::Double)
        .double_value(&[]);
    (mean, (squares / (n - 1.0).max(1.0) / n).sqrt())
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

impl Pool {
    /// The weights of the sources' prompts alone, on the simplex, where the last source is the backbone without one.
    /// Without any weight on a prompt they are equal.
    pub fn over_prompts(&self) -> Vec<f64> {
        shares(&self.alpha[..self.alpha.len() - 1])
    }

    /// The sources that are not left out.
    pub fn members(&self) -> Vec<usize> {
        (0..self.alpha.len())
            .filter(|i| self.alpha[*i] > 0.0)
            .collect()
    }
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

//! The choice of learning rate and weight decay on held-out samples, as in VPT. The tuning itself
//! then uses all samples.

use std::ops::ControlFlow;

use crate::error::EngineError;
use crate::samples::Samples;
use crate::tune::{Tuning, TuningProgress};
use promptweave_domain::tuning::{Candidate, Checkpoints, Grid, HeldOut, TuningOptions};

/// Tunes once for each pair on `train` and scores it on `held_out`. Returns the options with the
/// best pair, by accuracy and then by cross-entropy, and all candidates.
pub fn select(
    grid: &Grid,
    tuning: Tuning<'_>,
    (train, held_out): (&Samples, &Samples),
    checkpoints: &mut dyn Checkpoints,
    mut progress: impl FnMut(TuningProgress) -> ControlFlow<()>,
) -> Result<(TuningOptions, Vec<Candidate>), EngineError> {
    let mut candidates = Vec::new();
    let pairs = grid.pairs(tuning.options).into_iter().enumerate();
    for (place, (prompt_learning_rate, weight_decay)) in pairs {
        let options = TuningOptions {
            prompt_learning_rate,
            weight_decay,
            sketch_samples: 0,
            ..tuning.options.clone()
        };
        let trial = Tuning {
            train,
            options: &options,
            ..tuning
        };
        let mut checkpoints = checkpoints.of_pair(place);
        let score = match trial.score_on(held_out, checkpoints.as_mut(), &mut progress) {
            Ok(score) => Some(score),
            // The grid is there to rule out rates that are too high.
            Err(EngineError::NotFinite(_)) => None,
            Err(error) => return Err(error),
        };
        candidates.push(Candidate {
            prompt_learning_rate,
            weight_decay,
            accuracy: score.map(|score| score.accuracy),
            cross_entropy: score.map(|score| score.cross_entropy),
        });
    }
    let loss = |candidate: &Candidate| candidate.cross_entropy.unwrap_or(f64::INFINITY);
    let better = |a: &&Candidate, b: &&Candidate| {
        let by_loss = loss(b).total_cmp(&loss(a));
        let accuracies = a
            .accuracy
            .unwrap_or(-1.0)
            .total_cmp(&b.accuracy.unwrap_or(-1.0));
        accuracies.then(by_loss)
    };
    let best = candidates.iter().max_by(better).expect("there are pairs");
    if best.accuracy.is_none() {
        return Err(EngineError::NotFinite(
            "the losses of every pair of the grid",
        ));
    }
    let options = TuningOptions {
        prompt_learning_rate: best.prompt_learning_rate,
        weight_decay: best.weight_decay,
        ..tuning.options.clone()
    };
    Ok((options, candidates))
}

impl Tuning<'_> {
    fn score_on(
        &self,
        held_out: &Samples,
        checkpoints: &mut dyn Checkpoints,
        progress: &mut dyn FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<HeldOut, EngineError> {
        let trained = self.train(checkpoints, progress)?;
        let epoch = self.options.epochs - 1;
        let cross_entropy = trained
            .curves
            .cross_entropy
            .last()
            .copied()
            .unwrap_or_default();
        trained.score(held_out, &mut || {
            progress(TuningProgress {
                epoch,
                samples: 0,
                cross_entropy,
            })
        })
    }
}

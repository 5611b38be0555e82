//! Learning rate and weight decay, chosen on samples that are held out, as VPT does it; the tuning itself then has all.

use std::ops::ControlFlow;

use serde::Serialize;

use super::{NoCheckpoints, Tuning, TuningOptions, TuningProgress, evaluate};
use crate::engine::EngineError;
use crate::engine::samples::Samples;

/// All pairs of these are tried.
pub struct Grid {
    pub prompt_learning_rates: Vec<f64>,
    pub weight_decays: Vec<f64>,
}

/// One pair, and how it did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Candidate {
    pub prompt_learning_rate: f64,
    pub weight_decay: f64,
    /// On the held-out samples.
    pub accuracy: f64,
    pub cross_entropy: f64,
}

impl Grid {
    pub fn len(&self) -> usize {
        self.prompt_learning_rates.len() * self.weight_decays.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tunes once for each pair on `train` and scores it on `held_out`: the options with the best pair, by accuracy and
    /// then by cross-entropy, and all of them.
    pub fn select(
        &self,
        tuning: Tuning<'_>,
        (train, held_out): (&Samples, &Samples),
        mut progress: impl FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<(TuningOptions, Vec<Candidate>), EngineError> {
        let mut candidates = Vec::with_capacity(self.len());
        for prompt_learning_rate in &self.prompt_learning_rates {
            for weight_decay in &self.weight_decays {
                let options = TuningOptions {
                    prompt_learning_rate: *prompt_learning_rate,
                    weight_decay: *weight_decay,
                    sketch_samples: 0,
                    ..tuning.options.clone()
                };
                let trial = Tuning {
                    train,
                    options: &options,
                    ..tuning
                };
                let file = trial.run(&mut NoCheckpoints, &mut progress)?;
                let score = evaluate(tuning.vit, held_out, &file)?;
                candidates.push(Candidate {
                    prompt_learning_rate: *prompt_learning_rate,
                    weight_decay: *weight_decay,
                    accuracy: score.accuracy,
                    cross_entropy: score.cross_entropy,
                });
            }
        }
        let better = |a: &&Candidate, b: &&Candidate| {
            let by_loss = b.cross_entropy.total_cmp(&a.cross_entropy);
            a.accuracy.total_cmp(&b.accuracy).then(by_loss)
        };
        let best = candidates.iter().max_by(better).expect("there are pairs");
        let options = TuningOptions {
            prompt_learning_rate: best.prompt_learning_rate,
            weight_decay: best.weight_decay,
            ..tuning.options.clone()
        };
        Ok((options, candidates))
    }
}

//! Learning rate and weight decay, chosen on samples that are held out, as VPT does it; the tuning itself then has all.

use std::ops::ControlFlow;

use super::{Tuning, TuningProgress, evaluate};
use crate::domain::tuning::{Candidate, Checkpoints, Grid, TuningOptions};
use crate::engine::EngineError;
use crate::engine::samples::Samples;

impl Grid {
    /// Tunes once for each pair on `train` and scores it on `held_out`: the options with the best pair, by accuracy and
    /// then by cross-entropy, and all of them.
    pub fn select(
        &self,
        tuning: Tuning<'_>,
        (train, held_out): (&Samples, &Samples),
        checkpoints: &mut dyn Checkpoints,
        mut progress: impl FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<(TuningOptions, Vec<Candidate>), EngineError> {
        let mut candidates = Vec::new();
        let pairs = self.pairs(tuning.options).into_iter().enumerate();
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
            let file = trial.run(checkpoints.as_mut(), &mut progress)?;
            let score = evaluate(tuning.vit, held_out, &file)?;
            candidates.push(Candidate {
                prompt_learning_rate,
                weight_decay,
                accuracy: score.accuracy,
                cross_entropy: score.cross_entropy,
            });
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

//! A whole tuning, as command line and worker run it. With a grid, held-out images first choose the
//! options; then the prompt is tuned.

use std::ops::ControlFlow;

use crate::error::EngineError;
use crate::tune::select::select;
use crate::tune::{Images, Trained, Tuning, TuningProgress};
use promptweave_domain::phase::Phase;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::tuning::{Candidate, Checkpoints, Grid, TuningOptions};

pub struct TuningRun<'a> {
    /// The tuning on all images.
    pub tuning: Tuning<'a>,
    pub grid: &'a Grid,
    pub images: &'a Images,
}

pub struct Outcome<T> {
    /// The result of `make` on the trained model.
    pub made: T,
    /// The chosen options.
    pub options: TuningOptions,
    /// The candidates they were chosen from; empty without a grid.
    pub candidates: Vec<Candidate>,
}

impl TuningRun<'_> {
    fn num_pairs(&self) -> usize {
        self.grid.pairs(self.tuning.options).len()
    }

    /// Whether held-out images decide anything.
    pub fn holds_out(&self) -> bool {
        self.num_pairs() > 1 || self.tuning.options.patience.is_some()
    }

    /// The most images that a phase goes through, counting repeats.
    pub fn total(&self, phase: Phase) -> u64 {
        let (part, all) = (self.images.part.len(), self.images.all.len());
        let images = match (phase, self.tuning.options.patience) {
            (Phase::Select, _) => self.num_pairs() * part,
            (_, Some(_)) => part,
            (_, None) => all,
        };
        (images * self.tuning.options.epochs) as u64
    }

    /// Runs [`Self::make`], and returns a prompt file.
    pub fn run(
        &self,
        checkpoints: &mut dyn Checkpoints,
        progress: &mut dyn FnMut(Phase, TuningProgress) -> ControlFlow<()>,
    ) -> Result<Outcome<PromptFile>, EngineError> {
        self.make(checkpoints, progress, &mut |trained| {
            trained.prompt_file(&mut || ControlFlow::Continue(()))
        })
    }

    /// Selects the options on a part of the images if there is a grid. Then tunes on all images,
    /// or, if the rest decides when to stop, on that part.
    pub fn make<T>(
        &self,
        checkpoints: &mut dyn Checkpoints,
        progress: &mut dyn FnMut(Phase, TuningProgress) -> ControlFlow<()>,
        make: &mut dyn FnMut(&Trained<'_>) -> Result<T, EngineError>,
    ) -> Result<Outcome<T>, EngineError> {
        let Images { part, held_out, .. } = self.images;
        if self.holds_out() && part.labels.is_empty() {
            return Err(EngineError::NoneToHoldOut);
        }
        let tuning = Tuning {
            // The head was fitted on images that are now to be held out, and would know them.
            takes_head: self.tuning.takes_head && !self.holds_out(),
            ..self.tuning
        };
        let (options, candidates) = match self.grid.pairs(tuning.options)[..] {
            [(prompt_learning_rate, weight_decay)] => {
                let options = TuningOptions {
                    prompt_learning_rate,
                    weight_decay,
                    ..tuning.options.clone()
                };
                (options, Vec::new())
            }
            _ => select(self.grid, tuning, (part, held_out), checkpoints, |at| {
                progress(Phase::Select, at)
            })?,
        };
        let tuning = Tuning {
            options: &options,
            ..tuning
        };
        // Early stopping needs images that are not trained on.
        let tuning = match options.patience {
            Some(_) => Tuning {
                train: part,
                held_out: Some(held_out),
                ..tuning
            },
            None => tuning,
        };
        let made = make(&tuning.train(checkpoints, &mut |at| progress(Phase::Tune, at))?)?;
        Ok(Outcome {
            made,
            options,
            candidates,
        })
    }
}

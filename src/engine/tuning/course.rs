//! A whole tuning, as command line and worker run it: held-out images choose first, where they are asked; then the prompt.

use std::ops::ControlFlow;

use super::{Images, Tuning, TuningProgress};
use crate::domain::composition::Phase;
use crate::domain::prompt_file::PromptFile;
use crate::domain::tuning::{Candidate, Checkpoints, Grid, TuningOptions};
use crate::engine::EngineError;

pub struct Course<'a> {
    /// On all images.
    pub tuning: Tuning<'a>,
    pub grid: &'a Grid,
    pub images: &'a Images,
}

pub struct Outcome {
    pub file: PromptFile,
    /// As they were chosen.
    pub options: TuningOptions,
    /// What they were chosen of; empty without a grid.
    pub candidates: Vec<Candidate>,
}

impl Course<'_> {
    fn num_pairs(&self) -> usize {
        self.grid.pairs(self.tuning.options).len()
    }

    /// Whether anything is told by images that are held out.
    pub fn holds_out(&self) -> bool {
        self.num_pairs() > 1 || self.tuning.options.patience.is_some()
    }

    /// Images that a phase goes through at the most, as often as it does.
    pub fn total(&self, phase: Phase) -> u64 {
        let (part, all) = (self.images.part.len(), self.images.all.len());
        let images = match (phase, self.tuning.options.patience) {
            (Phase::Select, _) => self.num_pairs() * part,
            (_, Some(_)) => part,
            (_, None) => all,
        };
        (images * self.tuning.options.epochs) as u64
    }

    /// Selects where there is a grid, on a part of the images; then tunes on all of them, or on that part where the rest
    /// says when to stop.
    pub fn run(
        &self,
        checkpoints: &mut dyn Checkpoints,
        progress: &mut dyn FnMut(Phase, TuningProgress) -> ControlFlow<()>,
    ) -> Result<Outcome, EngineError> {
        let Images { part, held_out, .. } = self.images;
        if self.holds_out() && part.labels.is_empty() {
            return Err(EngineError::NoneToHoldOut);
        }
        // It was fitted on images that are to be held out, and would know them.
        let headless = (self.tuning.start.filter(|_| self.holds_out())).map(|file| PromptFile {
            head: None,
            ..file.clone()
        });
        let tuning = Tuning {
            start: headless.as_ref().or(self.tuning.start),
            ..self.tuning
        };
        let (options, candidates) = match self.num_pairs() {
            1 => (tuning.options.clone(), Vec::new()),
            _ => (self.grid).select(tuning, (part, held_out), checkpoints, |at| {
                progress(Phase::Select, at)
            })?,
        };
        let tuning = Tuning {
            options: &options,
            ..tuning
        };
        // Who stops early is told by images that are not trained on.
        let tuning = match options.patience {
            Some(_) => Tuning {
                train: part,
                held_out: Some(held_out),
                ..tuning
            },
            None => tuning,
        };
        let file = tuning.run(checkpoints, |at| progress(Phase::Tune, at))?;
        Ok(Outcome {
            file,
            options,
            candidates,
        })
    }
}

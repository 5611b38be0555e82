//! Estimates of α while gradients are still being taken, from the shards merged so far and the
//! features of all samples.

use std::time::{Duration, Instant};

use tch::Tensor;

use crate::baselines::towards_uniform;
use crate::compose::steps::Steps;
use crate::error::EngineError;
use crate::score::gradients::GradientStatistics;
use crate::solve::{Solved, solve};
use crate::statistics::SolveInputs;
use promptweave_domain::composition::{Source, SourceWeight};
use promptweave_domain::early_stopping::{EarlyStop, EarlyStopping};
use promptweave_domain::objective::{Objective, TradeOffRule, Weighing};
use promptweave_domain::sharding::Estimate;

/// An estimate on which early stopping does not depend may take at most 1/`SHARE` of the time.
const SHARE: u32 = 10;

/// Estimates of one composition, after each shard.
pub struct Estimates<'a> {
    sources: &'a [Source],
    objective: &'a Objective,
    early_stopping: Option<EarlyStopping>,
    /// Features of all samples, [M, N, d].
    features: &'a Tensor,
    labels: &'a [usize],
    shards: usize,
    merged: usize,
    /// The weights α of the last estimate.
    weights: Vec<f64>,
    /// When the last estimate was made, and how long it took.
    last: (Instant, Duration),
}

impl<'a> Estimates<'a> {
    pub fn new(
        sources: &'a [Source],
        objective: &'a Objective,
        early_stopping: Option<EarlyStopping>,
        features: &'a Tensor,
        labels: &'a [usize],
        shards: usize,
    ) -> Self {
        Self {
            sources,
            objective,
            early_stopping,
            features,
            labels,
            shards,
            merged: 0,
            weights: Vec::new(),
            last: (Instant::now(), Duration::ZERO),
        }
    }

    /// Reports the estimate of α after one more shard. A value is returned if the estimate is
    /// certain enough to stop.
    pub fn after(
        &mut self,
        merged: &GradientStatistics,
        steps: &mut Steps<'_>,
    ) -> Result<Option<EarlyStop>, EngineError> {
        self.merged += 1;
        // After the last shard the answer itself follows. A choice by `validation` would need
        // forward passes.
        let by_accuracy = self.objective.weighing() == Weighing::Rule(TradeOffRule::Validation);
        if self.merged == self.shards || by_accuracy {
            return Ok(None);
        }
        let (at, took) = self.last;
        if self.early_stopping.is_none() && took * SHARE > at.elapsed() {
            return Ok(None);
        }
        let begun = Instant::now();
        let gradients = merged.finish(
            self.objective
                .alignment()
                .unwrap_or_default()
                .gradient_normalization,
        )?;
        let ground = SolveInputs {
            features: self.features,
            labels: self.labels,
            gradients: Some(&gradients),
        };
        let solved = steps.aside(|steps| {
            solve(ground, self.objective, steps, &mut |_, _| {
                unreachable!("not by accuracy")
            })
        })?;
        self.last = (Instant::now(), begun.elapsed());
        let source_weights = self.weights(&solved);
        let stop = self.stop(&source_weights, merged.num_samples());
        self.weights = source_weights.iter().map(|source| source.weight).collect();
        let estimate = Estimate {
            shards_done: self.merged,
            shards: self.shards,
            samples: merged.num_samples(),
            source_weights,
            h_score: solved.solution.h_score,
            gradient_alignment: solved.solution.gradient_alignment,
        };
        if let Some(shards) = steps.shards() {
            shards.estimate(&estimate);
        }
        Ok(stop)
    }

    fn weights(&self, solved: &Solved) -> Vec<SourceWeight> {
        let share = self.objective.experimental.uniform_mix.known();
        let errors = solved.standard_errors.as_ref();
        let alpha = towards_uniform(&solved.solution.alpha, share);
        let weights = self.sources.iter().zip(&alpha).enumerate();
        weights
            .map(|(i, (source, weight))| SourceWeight {
                prompt: source.prompt.clone(),
                version: source.version,
                digest: source.digest,
                weight: *weight,
                standard_error: errors.map(|errors| (1.0 - share) * errors[i]),
            })
            .collect()
    }

    /// Stops if the weights are certain enough, and moved by no more than that since the last
    /// estimate. The second condition matters since few samples may agree and be wrong.
    fn stop(&self, weights: &[SourceWeight], samples: usize) -> Option<EarlyStop> {
        let asked = self
            .early_stopping
            .filter(|asked| asked.is_met_by(weights))?;
        let moved = |(source, before): (&SourceWeight, &f64)| {
            (source.weight - before).abs() > asked.max_standard_error
        };
        if self.weights.is_empty() || weights.iter().zip(&self.weights).any(moved) {
            return None;
        }
        let errors = weights.iter().filter_map(|source| source.standard_error);
        Some(EarlyStop {
            samples,
            total_samples: self.labels.len(),
            requested: asked.max_standard_error,
            max_standard_error: errors.fold(0.0, f64::max),
        })
    }
}

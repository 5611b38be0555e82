//! A composition that several workers share: its samples are cut into shards.
//!
//! Features of different samples are independent, and sums over their gradients add up, so these two
//! phases are cut by samples. The job's owner computes shards like any helper. It alone merges them, in
//! their order:
//!
//! ```text
//!               ┌─► a free shard ─► compute ─► give ────────┐
//! lay out ─► next ─► the next in order is done ─► merge ────├─► next …
//!               └─► others compute the rest ─► wait ────────┘
//! ```
//!
//! The result depends on the number of shards, and not on which worker computed which.

use std::error::Error;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::composition::{CompositionInput, SourceWeight};
use crate::phase::Phase;

/// The most shards of a phase. Each leaves a file with sums over its samples; storing more would
/// cost more than they save.
pub const MAX_SHARDS: usize = 16;
/// The smallest shard, in samples: twice the number of folds for standard errors, so that a shard
/// has samples of every fold.
const MIN_SAMPLES: usize = 20;

/// Some of the samples, in one phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// [`Phase::Features`] or [`Phase::Gradients`].
    pub phase: Phase,
    /// The shard's number, in `0..count`.
    pub index: usize,
    pub count: usize,
}

/// The number of shards of a phase that takes every sample through every source; 1 means not cut. A
/// shard pays from `min_shard_pairs` sample × source pairs on (0: never).
pub fn num_shards(num_samples: usize, num_sources: usize, min_shard_pairs: u64) -> usize {
    let wanted = ((num_samples * num_sources) as u64)
        .checked_div(min_shard_pairs)
        .unwrap_or(1);
    (wanted as usize).clamp(1, most_shards(num_samples))
}

/// The most shards that the number of samples allows.
pub fn most_shards(num_samples: usize) -> usize {
    (num_samples / MIN_SAMPLES).clamp(1, MAX_SHARDS)
}

/// The next thing for the job's owner to do.
#[derive(Debug)]
pub enum Next {
    Compute(Shard),
    /// The next shard in order is done, with these bytes.
    There(Vec<u8>),
    /// Other workers compute the remaining shards. Some time has passed; ask again.
    Wait,
}

/// The shards of one job, as its owner sees them.
pub trait Shards {
    /// The number of sample × source pairs that make a shard worthwhile.
    fn min_shard_pairs(&self) -> u64;

    /// Cuts a phase into `count` shards, unless that was done before; an earlier cut stays. Returns
    /// the number of shards.
    fn lay_out(&mut self, phase: Phase, count: usize) -> Result<usize, ShardingError>;

    /// The next thing to do, and how much of the phase is done, counted in shards.
    fn next(&mut self, phase: Phase) -> Result<(Next, f64), ShardingError>;

    /// Stores the result of a phase that was not computed by shards, for the helpers in the next
    /// phase.
    fn give_whole(&mut self, phase: Phase, bytes: Vec<u8>) -> Result<(), ShardingError>;

    /// Stores a shard that was computed here.
    fn give(&mut self, shard: Shard, bytes: Vec<u8>) -> Result<(), ShardingError>;

    /// Ends a phase: shards of it that are not done are no longer needed.
    fn end(&mut self, phase: Phase) -> Result<(), ShardingError>;

    /// Reports the estimate of α from the shards merged so far.
    fn estimate(&mut self, estimate: &Estimate);
}

/// A failure of the database or the blob store. Another try may help.
#[derive(Debug, thiserror::Error)]
#[error("work cannot be shared with other workers")]
pub struct ShardingError(#[source] pub Box<dyn Error + Send + Sync>);

/// A shard and everything it is computed from, for a worker that helps with another's job.
#[derive(Clone, Debug)]
pub struct ShardInput {
    /// The job's id. What is prepared for one shard of a job serves for the next.
    pub job: Uuid,
    pub composition: CompositionInput,
    pub shard: Shard,
    /// For a gradient shard, the feature shards in order.
    pub features: Vec<Vec<u8>>,
}

/// An estimate of α from a part of the samples' gradients and the features of all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    /// Number of merged shards, out of `shards`.
    pub shards_done: usize,
    pub shards: usize,
    /// Number of samples whose gradients are merged.
    pub samples: usize,
    pub source_weights: Vec<SourceWeight>,
    /// H of the mixed features at this α.
    pub h_score: f64,
    pub gradient_alignment: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_phases_stay_whole_and_large_ones_have_limits() {
        assert_eq!(num_shards(200, 6, 2000), 1);
        assert_eq!(num_shards(1000, 4, 2000), 2);
        assert_eq!(num_shards(1000, 40, 2000), 16);
        assert_eq!(num_shards(50, 6, 1), 2);
        assert_eq!(num_shards(1000, 40, 0), 1);
        assert_eq!(num_shards(3, 1, 1), 1);
    }
}

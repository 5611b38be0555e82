//! A composition that several workers share: its samples are dealt out in shards.
//!
//! Features of samples stand side by side, and sums over their gradients add up; so these two phases are cut by
//! samples. Who has the job computes shards as anybody does, and alone puts them together, in their order:
//!
//! ```text
//!               ┌─► one that nobody has ─► compute ─► give ─┐
//! lay out ─► next ─► one that is there, in its turn ─► merge ├─► next …
//!               └─► others have the rest ─► wait ───────────┘
//! ```
//!
//! What comes of it depends on how many shards there are, and not on who computed which.

use std::error::Error;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::composition::{CompositionInput, SourceWeight};
use crate::phase::Phase;

/// Each leaves a file with sums over its samples; more would cost more to store than they save.
pub const MAX_SHARDS: usize = 16;
/// Of a shard; twice the folds that standard errors are made of, so that it has some of each.
const MIN_SAMPLES: usize = 20;

/// Some of the samples in one phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// [`Phase::Features`] or [`Phase::Gradients`].
    pub phase: Phase,
    /// 0..count
    pub index: usize,
    pub count: usize,
}

/// How many shards a phase is cut into that takes every sample through every source, where `min_shard_pairs`
/// sample × source pairs make a shard worth its while (0: never). 1 is not cut.
pub fn num_shards(num_samples: usize, num_sources: usize, min_shard_pairs: u64) -> usize {
    let wanted = ((num_samples * num_sources) as u64)
        .checked_div(min_shard_pairs)
        .unwrap_or(1);
    (wanted as usize).clamp(1, most_shards(num_samples))
}

/// As many as samples allow.
pub fn most_shards(num_samples: usize) -> usize {
    (num_samples / MIN_SAMPLES).clamp(1, MAX_SHARDS)
}

/// What whoever has the job is to do.
#[derive(Debug)]
pub enum Next {
    Compute(Shard),
    /// The next in order, as it was given.
    There(Vec<u8>),
    /// Others work on what is left; some time has passed.
    Wait,
}

/// The shards of one job, in the hands of whoever has it.
pub trait Shards {
    /// How many sample × source pairs make a shard.
    fn min_shard_pairs(&self) -> u64;

    /// Deals a phase out in `count` shards, unless that was done before; then it stays as it was. Returns how many.
    fn lay_out(&mut self, phase: Phase, count: usize) -> Result<usize, ShardingError>;

    /// What to do, and how much of the phase is done, counted in shards.
    fn next(&mut self, phase: Phase) -> Result<(Next, f64), ShardingError>;

    /// Stores a phase that was not computed by shards, for those who help with the next.
    fn give_whole(&mut self, phase: Phase, bytes: Vec<u8>) -> Result<(), ShardingError>;

    /// Stores a shard that was computed here.
    fn give(&mut self, shard: Shard, bytes: Vec<u8>) -> Result<(), ShardingError>;

    /// What is not there of a phase is not needed.
    fn end(&mut self, phase: Phase) -> Result<(), ShardingError>;

    /// Tells what α is by what was merged.
    fn estimate(&mut self, estimate: &Estimate);
}

/// Database or blob store failed. Another try may help.
#[derive(Debug, thiserror::Error)]
#[error("work cannot be shared with other workers")]
pub struct ShardingError(#[source] pub Box<dyn Error + Send + Sync>);

/// A shard, and all that it is computed from: for who helps with somebody else's job.
#[derive(Clone, Debug)]
pub struct ShardInput {
    /// What is prepared for one shard of a job serves for the next.
    pub job: Uuid,
    pub composition: CompositionInput,
    pub shard: Shard,
    /// For gradients: the shards of features, in order.
    pub features: Vec<Vec<u8>>,
}

/// α by a part of the samples' gradients (and the features of all).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    /// Merged, of `shards`.
    pub shards_done: usize,
    pub shards: usize,
    /// Whose gradients these are.
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

//! The phases of a job.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The phases of a job. A composition has the first five, in this order; a ranking has `features` and `solve`, a
/// prediction `features` alone.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Computes the prompt-induced features of every sample and source.
    Features,
    /// Fits the closed-form heads, which need every sample's features.
    Heads,
    /// Takes the per-sample gradients of the prompts.
    Gradients,
    /// Solves for the weights α.
    Solve,
    /// Runs forward passes with the resulting prompt, and evaluates it.
    Verify,
    /// Runs one short tuning for each pair of a tuning's grid.
    Select,
    /// Takes a tuning's gradient steps on prompt and head.
    Tune,
}

impl Phase {
    pub const ALL: [Self; 7] = [
        Self::Features,
        Self::Heads,
        Self::Gradients,
        Self::Solve,
        Self::Verify,
        Self::Select,
        Self::Tune,
    ];
    /// The phases of a composition, in order.
    pub const OF_COMPOSITION: [Self; 5] = [
        Self::Features,
        Self::Heads,
        Self::Gradients,
        Self::Solve,
        Self::Verify,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Features => "features",
            Self::Heads => "heads",
            Self::Gradients => "gradients",
            Self::Solve => "solve",
            Self::Verify => "verify",
            Self::Select => "select",
            Self::Tune => "tune",
        }
    }
}

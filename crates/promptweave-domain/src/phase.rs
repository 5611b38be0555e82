//! The steps of a job.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The steps of a job: of a composition the first five, in order; of a ranking `features` and `solve`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Prompt-induced features of every sample and source.
    Features,
    /// Closed-form heads, which need every sample's features.
    Heads,
    /// Per-sample prompt gradients.
    Gradients,
    /// α.
    Solve,
    /// Forward passes with the prompt that came of it, and evaluation.
    Verify,
    /// Of a tuning: a tuning for each pair of the grid.
    Select,
    /// Of a tuning: gradient steps on prompt and head.
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
    /// The steps of a composition, in order.
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

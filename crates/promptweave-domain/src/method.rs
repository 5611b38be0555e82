//! Transfer methods: the ways from source prompts to weights, and from weights to the composed prompt.
//!
//! Whatever the method, its weights may be pulled towards equal ones, αᵢ = (1-γ) α*ᵢ + γ/M, and the composed prompt towards
//! the initial one, P_T = P₀ + β Σ αᵢ (Pᵢ - P₀). By default γ = 0 and β = 1, and P_T is
//! Σ α*ᵢ Pᵢ, or with `hgprompt_cv` the best single source where that does better ([`Fallback`]).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Scales above this are no interpolation any more.
pub const MAX_SCALE: f64 = 2.0;
/// Longer is a tuning of its own.
pub const MAX_TARGET_EPOCHS: u32 = 100;

/// Why a scale other than 1 is refused.
pub const NO_ANCHOR: &str = "shrinks towards the initial prompt that the sources share, and their init seeds differ or \
                             are unknown; name one by `experimental.anchor_seed`, or leave the scale at 1";

/// The init seed that all prompts say they have: they began as one prompt, with their tokens in one order.
pub fn common_seed(mut seeds: impl Iterator<Item = Option<u64>>) -> Option<u64> {
    let first = seeds.next()??;
    seeds.all(|seed| seed == Some(first)).then_some(first)
}

/// How α is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// HGPrompt with a cross-validated H-score, the default: H of samples that it was not fitted on, and gradient alignment, weighed
    /// by `trade_off`. The best single source takes the place of a composed prompt that does worse.
    #[default]
    HgpromptCv,
    /// HGPrompt as it is published (arXiv 2504.12311): H of the samples that it was fitted on (`h_score.mode` is `standard`), and no
    /// `fallback`.
    Hgprompt,
    /// The H-score alone; takes no gradients.
    HOnly,
    /// Gradient alignment alone.
    AlignmentOnly,
    /// 1/M each.
    Average,
    /// All weight on one source, the best `by` a criterion.
    SingleBest,
    /// By similarity to a prompt that is tuned on the target for a few epochs (SPoT, Vu et al. 2022).
    Spot,
    /// By similarity of what prompts do to the target's features: cosines of mean(f_{Pᵢ} - f_∅) with the same of a
    /// prompt that is tuned on the target for a few epochs (PANDA, Zhong et al. 2022).
    Panda,
    /// Mean attention of the target samples to the frozen sources, which is trained with a new prompt on them for a few
    /// epochs (ATTEMPT, Asai et al. 2022).
    Attempt,
}

impl Method {
    pub const ALL: [Self; 9] = [
        Self::HgpromptCv,
        Self::Hgprompt,
        Self::HOnly,
        Self::AlignmentOnly,
        Self::Average,
        Self::SingleBest,
        Self::Spot,
        Self::Panda,
        Self::Attempt,
    ];

    /// Whether α is the end of a descent on -H + λ L_align.
    pub fn solves(self) -> bool {
        self.weighs() || matches!(self, Self::HOnly | Self::AlignmentOnly)
    }

    /// Whether both terms have a say, so that they are weighed against each other.
    pub fn weighs(self) -> bool {
        matches!(self, Self::Hgprompt | Self::HgpromptCv)
    }

    /// Whether per-sample gradients are needed, which are three quarters of the work.
    pub fn takes_gradients(self) -> bool {
        self.weighs() || self == Self::AlignmentOnly
    }

    /// Whether a prompt is tuned on the target first.
    pub fn tunes(self) -> bool {
        matches!(self, Self::Spot | Self::Panda | Self::Attempt)
    }
}

/// What a single source is chosen by: the highest. No gradients, and no target tuning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    /// H of its features alone.
    #[default]
    HScore,
    Logme,
    /// The cross-fitted loss on the target samples with a closed-form head, over ten folds, negated.
    Validation,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Similarity {
    /// Cosine of the prompts' mean tokens.
    TokenMean,
    /// Mean cosine over all pairs of their tokens; does not depend on the tokens' order either.
    #[default]
    AllPairs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SpotChoice {
    /// αᵢ ∝ max(similarity, 0); uniform where none is above 0.
    #[default]
    WeightedAverage,
    /// The one of the `top_k` with the lowest cross-fitted loss on the target samples.
    BestOf,
}

/// The word in place of a number that is to be chosen: of some candidates the one whose prompt has the lowest cross-fitted loss
/// on the target samples with a closed-form head. A forward pass each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Auto {
    Auto,
}

/// γ in [0, 1], or `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a number or `auto`")]
pub enum UniformMix {
    Value(f64),
    /// The best of 0, 0.25, 0.5, 0.75 and 1; of equals the smallest.
    Chosen(Auto),
}

impl UniformMix {
    /// The one that changes least comes last.
    pub const CANDIDATES: [f64; 5] = [1.0, 0.75, 0.5, 0.25, 0.0];

    /// 0 while it is still to be chosen.
    pub fn known(self) -> f64 {
        match self {
            Self::Value(share) => share,
            Self::Chosen(Auto::Auto) => 0.0,
        }
    }
}

impl Default for UniformMix {
    fn default() -> Self {
        Self::Value(0.0)
    }
}

/// What α gives way to where it does worse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fallback {
    #[default]
    None,
    /// The source with the lowest cross-fitted loss on the target samples, alone, where that is lower than the composed prompt's:
    /// what mixed features promise is not always what mixed prompts do. A forward pass of the composed prompt; at a `scale` other
    /// than 1 one of that source too.
    SingleBest,
}

/// β in [0, 2], or `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a number or `auto`")]
pub enum Scale {
    Value(f64),
    /// The best of 0, 0.25, 0.5, 0.75 and 1; of equals the largest.
    Chosen(Auto),
}

impl Scale {
    /// The one that changes least comes last.
    pub const CANDIDATES: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

    /// 1 while it is still to be chosen.
    pub fn known(self) -> f64 {
        match self {
            Self::Value(scale) => scale,
            Self::Chosen(Auto::Auto) => 1.0,
        }
    }
}

impl Default for Scale {
    fn default() -> Self {
        Self::Value(1.0)
    }
}

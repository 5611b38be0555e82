//! Transfer methods: how source prompts get weights, and how weights give the composed prompt.
//!
//! Any method's weights can be pulled towards equal ones, αᵢ = (1-γ) α*ᵢ + γ/M, and the composed
//! prompt towards the initial one, P_T = P₀ + β Σ αᵢ (Pᵢ - P₀). By default γ = 0, β = 1, and P_T is
//! Σ α*ᵢ Pᵢ. With `hgprompt_cv` P_T is the best single source if that does better ([`Fallback`]).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The largest scale accepted. A larger one would no longer interpolate.
pub const MAX_SCALE: f64 = 2.0;
/// The most epochs of a short tuning on the target. A longer one is a tuning of its own.
pub const MAX_TARGET_EPOCHS: u32 = 100;

/// Why a scale other than 1 is refused.
pub const NO_ANCHOR: &str = "shrinks towards the initial prompt that the sources share, and their init seeds differ or \
                             are unknown; name one by `experimental.anchor_seed`, or leave the scale at 1";

/// The init seed that all prompts state, if it is one and the same. Such prompts began as one
/// prompt, with their tokens in one order.
pub fn common_seed(mut seeds: impl Iterator<Item = Option<u64>>) -> Option<u64> {
    let first = seeds.next()??;
    seeds.all(|seed| seed == Some(first)).then_some(first)
}

/// How α is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// HGPrompt with a cross-validated H-score, the default. It weighs two terms by `trade_off`: H
    /// of samples that it was not fitted on, and gradient alignment. If the composed prompt does
    /// worse than the best single source, that source takes its place.
    #[default]
    HgpromptCv,
    /// HGPrompt as published (arXiv 2504.12311): H of the samples that it was fitted on
    /// (`h_score.mode` is `standard`), and no `fallback`.
    Hgprompt,
    /// The H-score alone. It takes no gradients.
    HOnly,
    /// Gradient alignment alone.
    AlignmentOnly,
    /// The weights of a log-linear pool of the sources' own predictions (`pool`). It takes no gradients, and mixes nothing
    /// in prompt space.
    Pool,
    /// Equal weights, 1/M each.
    Average,
    /// All weight on one source, the best `by` a criterion.
    SingleBest,
    /// Weights by similarity to a prompt that is tuned on the target for a few epochs (SPoT, Vu et
    /// al. 2022).
    Spot,
    /// Weights by similarity of the prompts' effects on the target's features: the cosine of
    /// mean(f_{Pᵢ} - f_∅) with the same mean for a prompt that is tuned on the target for a few
    /// epochs (PANDA, Zhong et al. 2022).
    Panda,
    /// Weights by the mean attention of the target samples to the frozen sources. The attention is
    /// trained together with a new prompt for a few epochs (ATTEMPT, Asai et al. 2022).
    Attempt,
}

impl Method {
    pub const ALL: [Self; 10] = [
        Self::HgpromptCv,
        Self::Hgprompt,
        Self::HOnly,
        Self::AlignmentOnly,
        Self::Pool,
        Self::Average,
        Self::SingleBest,
        Self::Spot,
        Self::Panda,
        Self::Attempt,
    ];

    /// Whether α is found by descent on -H + λ L_align.
    pub fn solves(self) -> bool {
        self.weighs() || matches!(self, Self::HOnly | Self::AlignmentOnly)
    }

    /// Whether the objective has both terms, so that they are weighed against each other.
    pub fn weighs(self) -> bool {
        matches!(self, Self::Hgprompt | Self::HgpromptCv)
    }

    /// Whether the method needs per-sample gradients, which are three quarters of the work.
    pub fn takes_gradients(self) -> bool {
        self.weighs() || self == Self::AlignmentOnly
    }

    /// Whether the method first tunes a prompt on the target.
    pub fn tunes(self) -> bool {
        matches!(self, Self::Spot | Self::Panda | Self::Attempt)
    }
}

/// The score by which a single source is chosen: the highest wins. It needs no gradients and no
/// target tuning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    /// H of the source's features alone.
    #[default]
    HScore,
    Logme,
    /// The negated cross-fitted loss on the target samples with a closed-form head, over ten folds.
    Validation,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Similarity {
    /// Cosine of the prompts' mean tokens.
    TokenMean,
    /// Mean cosine over all pairs of the prompts' tokens. It does not depend on the tokens' order
    /// either.
    #[default]
    AllPairs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SpotChoice {
    /// αᵢ ∝ max(similarity, 0). The weights are uniform if no similarity is above 0.
    #[default]
    WeightedAverage,
    /// The one source among the `top_k` with the lowest cross-fitted loss on the target samples.
    BestOf,
}

/// The word `auto` in place of a number. It chooses the candidate whose prompt has the lowest
/// cross-fitted loss on the target samples with a closed-form head, by one forward pass for each
/// candidate.
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
    /// The candidates of `auto`. The one that changes least comes last.
    pub const CANDIDATES: [f64; 5] = [1.0, 0.75, 0.5, 0.25, 0.0];

    /// The value of γ, or 0 while it is still to be chosen.
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

/// What replaces the composed prompt if that does worse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fallback {
    #[default]
    None,
    /// All weight on the source with the lowest cross-fitted loss on the target samples, if its
    /// loss is below the composed prompt's. It guards against mixed features that promise more than
    /// the mixed prompt does. It takes a forward pass of the composed prompt, and at a `scale`
    /// other than 1 one of that source.
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
    /// The candidates of `auto`. The one that changes least comes last.
    pub const CANDIDATES: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

    /// The value of β, or 1 while it is still to be chosen.
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

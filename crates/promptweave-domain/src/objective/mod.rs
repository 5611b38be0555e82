//! The method's settings and their ranges. They have one shape for the API, the command line, a
//! job's specification and the metadata of `statistics.safetensors`.

mod checks;
mod document;
mod options;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::checks::{InvalidObjective, check_shrinkage};
pub use self::options::{
    AlignmentTerm, BothTerms, Guarded, MethodOptions, Pool, SingleBest, Spot, TARGET_EPOCHS,
    TargetTuned,
};
use crate::method::{Criterion, Fallback, Method, Scale, Similarity, SpotChoice, UniformMix};

/// The most refinement steps accepted; more are not expected to help. Each step is a pass over all
/// samples.
pub const MAX_REFINE: u32 = 100;

/// The settings of a composition: a method with its own options, and the options that all methods
/// have. Everything has a default.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Objective {
    #[serde(flatten)]
    pub options: MethodOptions,
    /// How features are measured. Some methods decide by it, and all report it.
    pub h_score: HScoreOptions,
    /// The closed-form head that defines the loss.
    pub head: HeadOptions,
    pub align_tokens: AlignTokens,
    #[serde(skip_serializing_if = "is_off")]
    pub experimental: Experimental,
}

/// Options without effect, or with harm, where they were measured. Any version may remove them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Experimental {
    /// τ ≥ 0: subtracts τ·S(α)/ln M from the minimised function, which is on a scale of order 1; S
    /// is the entropy. Weights become dense, so that every source has a rank. 0 is off. It needs a
    /// method that takes gradients.
    #[serde(skip_serializing_if = "is_off")]
    #[schema(minimum = 0)]
    pub entropy: f64,
    /// Number of projected-gradient steps after solving, at most 100; 0 is off. The steps are on
    /// the objective with the true H(f of Σ αᵢ Pᵢ), through the backbone, and each is accepted only
    /// if it improves that objective. Excludes `entropy`, `uniform_mix`, `scale`, a `fallback` and
    /// methods that do not solve for α.
    #[serde(skip_serializing_if = "is_off")]
    #[schema(maximum = 100)]
    pub refine: u32,
    /// γ in αᵢ = (1-γ) α*ᵢ + γ/M: how far the method's weights α* are pulled towards equal ones,
    /// which are hard to beat if α* is uncertain. Default 0; excludes `refine`.
    #[serde(skip_serializing_if = "is_off")]
    pub uniform_mix: UniformMix,
    /// β in P_T = P₀ + β Σ αᵢ (Pᵢ - P₀): how far the composed prompt goes from the shared initial
    /// prompt P₀ towards Σ αᵢ Pᵢ. Default 1, the paper's sum; excludes `refine`.
    #[serde(skip_serializing_if = "is_off")]
    pub scale: Scale,
    /// Init seed of P₀, for a `scale` other than 1 [default: the seed that all sources state].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anchor_seed: Option<u64>,
}

/// Whether the option is off, which is also its meaning when omitted.
fn is_off<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// How the two terms are weighed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighing {
    TradeOff(f64),
    Rule(TradeOffRule),
    AlignmentWeight(f64),
}

/// How much gradient alignment counts beside transferability.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a number, `knee`, `validation`, or `{\"alignment_weight\": …}` with a number"
)]
pub enum TradeOff {
    /// t in [0, 1]: 0 weighs transferability alone, 1 gradient alignment alone. The scale of the
    /// terms does not matter: both are normalised by their range between their own optima.
    Value(f64),
    /// The rule that chooses t on the Pareto path.
    Rule(TradeOffRule),
    /// The weight λ itself in place of t.
    Weight(AlignmentWeight),
}

impl Default for TradeOff {
    fn default() -> Self {
        Self::Value(0.5)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AlignmentWeight {
    /// λ ≥ 0 in L(α) = -H(α) + λ L_align(α), used as it is.
    #[schema(minimum = 0)]
    pub alignment_weight: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TradeOffRule {
    /// The point of the path farthest from the chord between its ends, both terms normalised.
    Knee,
    /// The point of the path whose composed prompt has the lowest cross-fitted loss on the target
    /// samples with a closed-form head. It takes one forward pass for each distinct point.
    Validation,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HScoreOptions {
    /// How H is computed. `standard` is the definition, tr(cov(f)⁻¹ cov(E[f|y])). `cross_validated`
    /// is the same measure on samples that it was not fitted on. `trace_ratio` is tr cov(E[f|y]) /
    /// tr cov(f). Default `cross_validated`; with the method `hgprompt` and in a ranking,
    /// `standard`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<HScoreMode>,
    pub standardise: Standardise,
    /// The shrinkage ρ of the covariance. Default 0.3 with `cross_validated`, otherwise 0.01.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shrinkage: Option<Shrinkage>,
}

impl HScoreOptions {
    pub fn mode(&self) -> HScoreMode {
        self.mode.unwrap_or_default()
    }

    /// The given ρ or its estimator, or the default for the mode.
    pub fn shrinkage(&self) -> Shrinkage {
        self.shrinkage
            .unwrap_or(Shrinkage::Fixed(match self.mode() {
                HScoreMode::CrossValidated => 0.3,
                HScoreMode::Standard | HScoreMode::TraceRatio => 0.01,
            }))
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HScoreMode {
    /// K-1 minus the squared error of a ridge regression (shrunken by ρ) of the classes on the
    /// features, on samples that it was not fitted on, by generalised cross-validation (Golub,
    /// Heath & Wahba 1979). Chance does not raise it even if N is not far above d. It is below 0 if
    /// the features predict worse than none.
    #[default]
    CrossValidated,
    /// tr(cov(f)⁻¹ cov(E[f|y])), the definition (Bao et al. 2019): what the same regression
    /// explains of the samples that it was fitted on.
    Standard,
    /// tr cov(E[f|y]) / tr cov(f), as in H-ensemble's code (Wu et al. 2024). It needs no shrinkage.
    TraceRatio,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Standardise {
    /// Features are used as they are.
    #[default]
    None,
    /// Every coordinate of every source's features is divided by its own standard deviation.
    PerSource,
}

/// ρ in Σ_ρ = (1-ρ)Σ + ρ(tr Σ/d)I. It is 0 (with more than d+1 samples), a number in [1e-6, 1), or
/// an estimate from the uniform mixture of the features, which stays fixed while α moves. If ρ is
/// too low, noise directions score near d ≥ N; if it is too high, α collapses to one source.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a number, `oas` or `ledoit_wolf`")]
pub enum Shrinkage {
    Fixed(f64),
    Estimated(ShrinkageEstimate),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ShrinkageEstimate {
    /// Oracle approximating shrinkage (Chen et al. 2010).
    Oas,
    /// The estimator of Ledoit & Wolf (2004).
    LedoitWolf,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AlignmentOptions {
    pub variant: AlignmentVariant,
    pub gradient_normalization: GradientNormalization,
}

/// The variant of the gradient-alignment term. The paper leaves open what the gradients' variances
/// are about, and which mean they are compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlignmentVariant {
    /// Variances about the mixed gradient, against their α-weighted mean (R1).
    #[default]
    MixtureWeighted,
    /// Variances about the mixed gradient, against their plain mean: a convex quadratic (R2).
    MixtureUniform,
    /// Variances about each prompt's own mean, against their α-weighted mean, as in Fishr (Ramé et
    /// al. 2022). Uniform weights always minimise it (R3).
    Fishr,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GradientNormalization {
    /// Gradients are used as they are, so that prompts with large gradients weigh more.
    #[default]
    None,
    /// Each prompt's gradients are divided by the root mean square of their norms over the samples.
    Rms,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HeadOptions {
    pub kind: HeadKind,
    /// ρ_h in [1e-6, 1), the shrinkage of the closed-form head that defines the loss. If it is too
    /// low, the head saturates and a few samples make up all of the gradient.
    #[schema(minimum = 1e-6, exclusive_maximum = 1)]
    pub shrinkage: f64,
}

impl Default for HeadOptions {
    fn default() -> Self {
        Self {
            kind: HeadKind::default(),
            shrinkage: 0.3,
        }
    }
}

/// The head that defines the loss, fitted in closed form on the target samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HeadKind {
    /// Shrunken linear discriminant analysis, one head for each source.
    #[default]
    Lda,
    /// Ridge regression on one-hot labels, one head for each source.
    Ridge,
    /// One shrunken linear discriminant analysis on the features of all sources together.
    Shared,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlignTokens {
    /// Token i of every prompt is summed with token i of the others.
    #[default]
    Off,
    /// The tokens of every prompt are first reordered to match those of the most central prompt
    /// best (assignment on cosine similarity). No feature depends on that order; Σ αᵢ Pᵢ does.
    Hungarian,
}

// ---- Text, for the command line --------------------------------------------------------------

/// Reads a word as JSON would, so that the command line and the API accept the same words.
fn from_word<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, String> {
    let word = match text.parse::<f64>() {
        Ok(number) => serde_json::json!(number),
        Err(_) => serde_json::json!(text),
    };
    serde_json::from_value(word).map_err(|error| error.to_string())
}

macro_rules! words {
    ($($type:ty),*) => {$(
        impl FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                from_word(text)
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let word = serde_json::to_value(self).map_err(|_| fmt::Error)?;
                match word.as_str() {
                    Some(text) => f.write_str(text),
                    None => write!(f, "{word}"),
                }
            }
        }
    )*};
}
words!(
    TradeOff,
    HScoreMode,
    Standardise,
    Shrinkage,
    AlignmentVariant,
    GradientNormalization,
    HeadKind,
    AlignTokens,
    Method,
    Criterion,
    Fallback,
    Similarity,
    SpotChoice,
    Scale,
    UniformMix
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_knows_the_words_of_the_api() {
        assert_eq!("0.25".parse(), Ok(TradeOff::Value(0.25)));
        assert_eq!("knee".parse(), Ok(TradeOff::Rule(TradeOffRule::Knee)));
        assert_eq!(
            "oas".parse(),
            Ok(Shrinkage::Estimated(ShrinkageEstimate::Oas))
        );
        assert_eq!("trace_ratio".parse(), Ok(HScoreMode::TraceRatio));
        assert_eq!(AlignmentVariant::Fishr.to_string(), "fishr");
        assert_eq!(Shrinkage::Fixed(0.01).to_string(), "0.01");
        assert_eq!(
            "shrunk".parse::<Shrinkage>().unwrap_err(),
            "expected a number, `oas` or `ledoit_wolf`"
        );
        assert_eq!(
            "mean".parse::<TradeOff>().unwrap_err(),
            "expected a number, `knee`, `validation`, or `{\"alignment_weight\": …}` with a number"
        );
    }
}

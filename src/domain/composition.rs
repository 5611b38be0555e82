//! What a composition is asked for and what it answers; the seam between worker and engine.
//!
//! The JSON here is one shape for three places: the API's result, `result.json` of
//! `promptweave compose`, and the row the worker stores.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::dataset::Split;
use super::digest::Digest;
use super::prompt_file::PromptFile;

// ---- What is asked -------------------------------------------------------------------------

/// The method's settings. Everything has a default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Objective {
    /// t in [0, 1]: 0 weighs transferability alone, 1 gradient alignment alone. Scale-free: both
    /// terms are normalised by their range between their own optima. Default 0.5; excludes
    /// `alignment_weight`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1)]
    pub trade_off: Option<f64>,
    /// λ ≥ 0 in L(α) = -H(α) + λ L_align(α), taken as it is. Excludes `trade_off`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0)]
    pub alignment_weight: Option<f64>,
    pub h_score: HScoreOptions,
    pub alignment: AlignmentOptions,
    pub head: HeadOptions,
    pub align_tokens: AlignTokens,
}

/// How the two terms are weighed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighing {
    TradeOff(f64),
    AlignmentWeight(f64),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HScoreOptions {
    pub mode: HScoreMode,
    /// ρ in [1e-6, 1): Σ_ρ = (1-ρ)Σ + ρ(tr Σ/d)I. Too low and noise directions score near d ≥ N; too
    /// high and α collapses to one source.
    #[schema(minimum = 1e-6, exclusive_maximum = 1)]
    pub shrinkage: f64,
}

impl Default for HScoreOptions {
    fn default() -> Self {
        Self {
            mode: HScoreMode::Inv,
            shrinkage: 0.01,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HScoreMode {
    /// tr(cov(f)⁻¹ cov(E[f|y])), the definition (Bao et al. 2019).
    #[default]
    Inv,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AlignmentOptions {
    pub reading: AlignmentReading,
    pub gradient_norm: GradientNorm,
}

/// Which reading of the gradient-alignment term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum AlignmentReading {
    /// Variances about the mixed gradient, against their α-weighted mean.
    #[default]
    R1,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GradientNorm {
    /// Gradients enter as they are.
    #[default]
    None,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HeadOptions {
    /// ρ_h in [1e-6, 1), the shrinkage of the closed-form head that defines the loss. Too low and the
    /// head saturates, so that a few samples make up all of the gradient.
    #[schema(minimum = 1e-6, exclusive_maximum = 1)]
    pub shrinkage: f64,
}

impl Default for HeadOptions {
    fn default() -> Self {
        Self { shrinkage: 0.3 }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlignTokens {
    /// Token i of every prompt is summed with token i of the others.
    #[default]
    Off,
}

#[derive(Debug, thiserror::Error, PartialEq)]
#[error("`{field}` {problem}")]
pub struct InvalidObjective {
    /// Dotted, e.g. `h_score.shrinkage`.
    pub field: &'static str,
    pub problem: String,
}

/// Below 1e-6 a covariance of fewer samples than dimensions is singular in floating point.
pub fn check_shrinkage(field: &'static str, rho: f64) -> Result<(), InvalidObjective> {
    if (1e-6..1.0).contains(&rho) {
        return Ok(());
    }
    let problem = format!("is {rho}; it must be at least 1e-6 and below 1");
    Err(InvalidObjective { field, problem })
}

impl Objective {
    /// Checks ranges and says how the terms are weighed.
    pub fn weighing(&self) -> Result<Weighing, InvalidObjective> {
        let refuse = |field, problem: String| Err(InvalidObjective { field, problem });
        for (field, rho) in [
            ("h_score.shrinkage", self.h_score.shrinkage),
            ("head.shrinkage", self.head.shrinkage),
        ] {
            check_shrinkage(field, rho)?;
        }
        match (self.trade_off, self.alignment_weight) {
            (Some(_), Some(_)) => refuse(
                "alignment_weight",
                "excludes `trade_off`: give one of the two".into(),
            ),
            (Some(t), None) if !(0.0..=1.0).contains(&t) => {
                refuse("trade_off", format!("is {t}; it must lie in 0..=1"))
            }
            (None, Some(lambda)) if !(lambda.is_finite() && lambda >= 0.0) => refuse(
                "alignment_weight",
                format!("is {lambda}; it must be finite and ≥ 0"),
            ),
            (None, Some(lambda)) => Ok(Weighing::AlignmentWeight(lambda)),
            (t, None) => Ok(Weighing::TradeOff(t.unwrap_or(0.5))),
        }
    }
}

/// Which of a data set's images are the target samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TargetSamples {
    pub split: Split,
    /// Labelled images the result is evaluated on; never used to choose α.
    pub eval_split: Option<Split>,
    /// At most this many, a seeded stratified choice.
    pub max_samples: usize,
    pub seed: u64,
    /// Leave unreadable images out (and count them) instead of failing.
    pub skip_bad: bool,
}

/// A source prompt by the name its user gave it.
#[derive(Clone, Debug)]
pub struct Source {
    pub prompt: String,
    /// None offline.
    pub version: Option<i32>,
    /// Of the file's bytes.
    pub digest: Digest,
    pub file: PromptFile,
}

/// All an engine needs: files at hand, nothing to look up.
#[derive(Clone, Debug)]
pub struct CompositionInput {
    /// A folder [`super::backbone::Backbone::open`] reads.
    pub backbone_dir: PathBuf,
    /// A folder [`super::dataset::LabelledImages::read`] reads.
    pub target_dir: PathBuf,
    pub target: TargetSamples,
    pub sources: Vec<Source>,
    pub objective: Objective,
}

// ---- The seam ------------------------------------------------------------------------------

/// The steps of a composition, in order.
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
    /// Forward passes with the composed prompt, and evaluation.
    Verify,
}

impl Phase {
    pub const ALL: [Self; 5] = [
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
        }
    }
}

/// Watches a composition; asked after about every second of work.
pub trait Observer {
    /// `done` of `total` units of `phase` are finished. `Break` stops the composition.
    fn progress(&mut self, phase: Phase, done: u64, total: u64) -> std::ops::ControlFlow<()>;
}

/// Composes prompts. The engine is one; tests of queue and API have a fake without libtorch.
pub trait Composer: Send {
    fn compose(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError>;

    /// e.g. `cpu` or `cuda:0`.
    fn device(&self) -> String;
}

/// A finished composition: the answer and the two files that belong to it.
#[derive(Clone, Debug)]
pub struct Composition {
    /// `result.composed` names the digest of `composed`; name and version are the caller's to add.
    pub result: CompositionResult,
    /// A prompt file.
    pub composed: Vec<u8>,
    /// `statistics.safetensors`.
    pub statistics: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum CompositionError {
    /// The observer broke off: cancelled, or the lease is lost.
    #[error("stopped")]
    Stopped,
    /// The input cannot be composed; another try would not help.
    #[error("{detail}")]
    Refused { code: &'static str, detail: String },
    /// The machine failed (memory, device); another try may help.
    #[error("{detail}")]
    Retry { code: &'static str, detail: String },
}

// ---- The answer ----------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompositionResult {
    /// α: every weight ≥ 0, their sum 1. In the order of the request.
    pub source_weights: Vec<SourceWeight>,
    pub objective: ObjectiveValue,
    /// The Pareto path over `trade_off` from 0 to 1.
    pub path: Vec<PathPoint>,
    /// The distinct local optima found at the chosen weighing, best first.
    pub optima: Vec<Optimum>,
    pub solver: SolverReport,
    pub diagnostics: Diagnostics,
    pub composed: ComposedPrompt,
    pub provenance: Provenance,
    pub warnings: Vec<Warning>,
    /// Seconds by phase.
    pub timings: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SourceWeight {
    pub prompt: String,
    /// Null where no registry is involved (offline).
    pub version: Option<i32>,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    #[schema(minimum = 0, maximum = 1)]
    pub weight: f64,
}

/// L(α) = -H(α) + λ L_align(α) and its parts at the returned α.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ObjectiveValue {
    /// H of the mixed features Σ αᵢ f_{Pᵢ}; 0 ≤ H ≤ min(d, K-1).
    pub h_score: f64,
    /// L_align ≥ 0.
    pub gradient_alignment: f64,
    /// The effective λ, whichever way it was asked for. Null where it is infinite: at trade-off 1, or where H does
    /// not depend on α.
    pub alignment_weight: Option<f64>,
    /// Null when a raw `alignment_weight` was asked for.
    pub trade_off: Option<f64>,
    /// -H + λ L_align; null where λ is infinite.
    pub total: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PathPoint {
    pub trade_off: f64,
    /// λ(t); null at t = 1.
    pub alignment_weight: Option<f64>,
    pub h_score: f64,
    pub gradient_alignment: f64,
    /// α in the order of `source_weights`.
    pub weights: Vec<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Optimum {
    pub weights: Vec<f64>,
    /// The minimised value, on the solver's own scale of order 1.
    pub value: f64,
    pub h_score: f64,
    pub gradient_alignment: f64,
    /// How many of the starts ended here.
    pub starts: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SolverReport {
    pub starts: usize,
    /// Of the start that won.
    pub iterations: usize,
    /// Objective evaluations over all starts and the path.
    pub evaluations: usize,
    pub stop_reason: StopReason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The projected gradient step moves α by less than 1e-9.
    Converged,
    /// No step along the projected gradient lowers the objective in floating point.
    NoDescent,
    MaxIterations,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Diagnostics {
    /// N and K: target samples used and classes among them.
    pub num_samples: usize,
    pub num_classes: usize,
    /// Unreadable images left out (`skip_bad`).
    pub skipped_images: usize,
    /// Samples heads were fitted without, fold by fold (2), or none (1).
    pub head_folds: usize,
    pub per_source: Vec<SourceDiagnostics>,
    /// One forward pass with the composed prompt itself.
    pub composed: PromptScore,
    /// H(f of the composed prompt) minus H(mixed features), over the latter.
    pub surrogate_gap: f64,
    /// What α is to be compared with; present when `eval_split` was given.
    pub baselines: Option<Baselines>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SourceDiagnostics {
    pub prompt: String,
    /// H of this source's features alone.
    pub h_score: f64,
    /// T of its closed-form head: logits are divided by it.
    pub head_temperature: f64,
    /// Mean cross-entropy of that head in nats, on samples it was not fitted on (with two folds).
    pub head_loss: f64,
    /// Root mean square over samples of ‖∂ℓ/∂Pᵢ‖.
    pub gradient_rms: f64,
}

/// How a prompt does on the target with a closed-form head fitted on the target samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PromptScore {
    pub h_score: f64,
    /// On the samples the head was fitted on.
    pub train_accuracy: f64,
    /// On `eval_split`.
    pub eval_accuracy: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Baselines {
    /// (1/M) Σ Pᵢ.
    pub uniform: PromptScore,
    /// The source with the highest H of its own.
    pub best_single: PromptScore,
    pub best_single_prompt: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ComposedPrompt {
    /// Null offline.
    pub prompt: Option<String>,
    pub version: Option<i32>,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
}

/// What the numbers rest on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Provenance {
    #[schema(value_type = String)]
    pub backbone_digest: Digest,
    pub preprocessing_id: String,
    /// Over the target samples' bytes and labels, in order.
    #[schema(value_type = String)]
    pub sample_digest: Digest,
    pub seed: u64,
    pub device: String,
    pub num_threads: usize,
    pub libtorch: String,
    /// promptweave's own version.
    pub version: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Warning {
    /// Stable, snake_case.
    pub code: String,
    pub detail: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_objective_is_the_default_and_unknown_fields_are_refused() {
        let objective: Objective = serde_json::from_str("{}").unwrap();
        assert_eq!(objective, Objective::default());
        assert_eq!(objective.weighing(), Ok(Weighing::TradeOff(0.5)));
        assert!(serde_json::from_str::<Objective>(r#"{"lambda": 1}"#).is_err());
    }

    #[test]
    fn ranges_are_checked_and_the_field_is_named() {
        let refusal = |json: &str| {
            serde_json::from_str::<Objective>(json)
                .unwrap()
                .weighing()
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            refusal(r#"{"trade_off": 1.5}"#),
            "`trade_off` is 1.5; it must lie in 0..=1"
        );
        assert_eq!(
            refusal(r#"{"h_score": {"shrinkage": 0}}"#),
            "`h_score.shrinkage` is 0; it must be at least 1e-6 and below 1"
        );
        assert_eq!(
            refusal(r#"{"trade_off": 0.5, "alignment_weight": 1.0}"#),
            "`alignment_weight` excludes `trade_off`: give one of the two"
        );
    }
}

//! What a composition is asked for and what it answers; the seam between worker and engine.
//!
//! The JSON here is one shape for three places: the API's result, `result.json` of
//! `promptweave compose`, and the row the worker stores.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::digest::Digest;
use crate::early_stopping::{EarlyStop, EarlyStopping};
use crate::method::Method;
use crate::objective::{Objective, TradeOffRule};
use crate::precision::Precision;
use crate::prompt_file::PromptFile;
use crate::split::Split;
use crate::words::WarningCode;

// ---- What is asked -------------------------------------------------------------------------

/// Which of a dataset's images are the target samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TargetSamples {
    pub split: Split,
    /// Labelled images the result is evaluated on; never used to choose α.
    pub eval_split: Option<Split>,
    /// At most this many, a seeded stratified choice.
    pub max_samples: usize,
    pub seed: u64,
    /// Leave unreadable images out (and count them) instead of failing.
    pub skip_unreadable: bool,
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
    /// A folder [`promptweave_formats::backbone::Backbone::open`] reads.
    pub backbone_dir: PathBuf,
    /// A folder [`promptweave_formats::dataset::LabelledImages::read`] reads.
    pub target_dir: PathBuf,
    pub target: TargetSamples,
    pub sources: Vec<Source>,
    pub objective: Objective,
    /// Where the work is shared; elsewhere all samples' gradients are taken.
    pub early_stopping: Option<EarlyStopping>,
}

/// Solving again: what a composition was computed from stands in for backbone and images.
#[derive(Clone, Debug)]
pub struct SolveInput {
    /// The bytes of a `statistics.safetensors`.
    pub statistics: Vec<u8>,
    /// Sources of that file, all of them or some, in any order. The file has their prompts too, so that
    /// nothing but their digests is needed.
    pub sources: Vec<SourceRef>,
    pub objective: Objective,
}

/// A source prompt without its file.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceRef {
    pub prompt: String,
    /// None offline.
    pub version: Option<i32>,
    pub digest: Digest,
}

// ---- The seam ------------------------------------------------------------------------------

// ---- The answer ----------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompositionResult {
    /// α: every weight ≥ 0, their sum 1. In the order of the request.
    pub source_weights: Vec<SourceWeight>,
    #[serde(default)]
    pub method: MethodReport,
    pub objective: ObjectiveValue,
    /// How tokens were put into a common order; null with `align_tokens` off.
    #[serde(default)]
    pub token_alignment: Option<TokenAlignment>,
    /// The Pareto path over `trade_off` from 0 to 1; empty where there are not two terms.
    pub pareto_path: Vec<PathPoint>,
    /// The distinct local optima found at the chosen weighing, best first; empty where the method does not solve.
    pub local_optima: Vec<Optimum>,
    /// Null where the method does not solve.
    pub solver: Option<SolverReport>,
    pub diagnostics: Diagnostics,
    pub composed_prompt: ComposedPrompt,
    /// Present where `early_stopping` ended it before all gradients were taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stop: Option<EarlyStop>,
    pub provenance: Provenance,
    pub warnings: Vec<Warning>,
    /// Seconds by phase.
    pub timings: BTreeMap<String, f64>,
}

/// What chose α, and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MethodReport {
    pub name: Method,
    /// What a source was weighed or chosen by, in the order of `source_weights`: H, LogME or loss with
    /// `single_best`, cosines with `spot` and `panda`, mean attention with `attempt`; null with the others.
    pub scores: Option<Vec<f64>>,
    /// Of the short tuning on the target, where the method needs one.
    pub target_tuning_seconds: Option<f64>,
    /// γ in αᵢ = (1-γ) α*ᵢ + γ/M.
    pub uniform_mix: f64,
    /// With `uniform_mix: "auto"`, what it was chosen by.
    pub uniform_mix_candidates: Vec<UniformMixPoint>,
    /// With a `fallback`, what was compared; null without.
    pub fallback: Option<FallbackReport>,
    /// β in P_T = P₀ + β Σ αᵢ (Pᵢ - P₀).
    pub scale: f64,
    /// Init seed of P₀; null at scale 1, where P₀ drops out.
    pub anchor_seed: Option<u64>,
    /// With `scale: "auto"`, what the scale was chosen by.
    pub scale_candidates: Vec<ScalePoint>,
}

impl Default for MethodReport {
    fn default() -> Self {
        Self {
            name: Method::default(),
            scores: None,
            target_tuning_seconds: None,
            uniform_mix: 0.0,
            uniform_mix_candidates: Vec::new(),
            fallback: None,
            scale: 1.0,
            anchor_seed: None,
            scale_candidates: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct UniformMixPoint {
    pub uniform_mix: f64,
    /// Cross-fitted, on the target samples.
    pub validation_accuracy: f64,
    /// Cross-entropy of the same, in nats, which chooses.
    pub validation_loss: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FallbackReport {
    /// The source that would stand in.
    pub prompt: String,
    /// Its cross-fitted loss on the target samples, in nats.
    pub validation_loss: f64,
    /// The same of the prompt that the method composed.
    pub composed_validation_loss: f64,
    /// Whether it has all weight.
    pub taken: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ScalePoint {
    pub scale: f64,
    /// Cross-fitted, on the target samples.
    pub validation_accuracy: f64,
    /// Cross-entropy of the same, in nats, which chooses.
    #[serde(default)]
    pub validation_loss: Option<f64>,
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
    /// Of the weight as it was solved for (before any `refine`), by leaving out one of ten folds of the
    /// samples at a time (jackknife), λ, heads and `uniform_mix` held. Null where the method does not solve for it, where a fold
    /// less leaves too little to solve, and where the `fallback` has all weight.
    #[serde(default)]
    pub standard_error: Option<f64>,
}

/// L(α) = -H(α) + λ L_align(α) and its parts at the returned α.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ObjectiveValue {
    /// H of the mixed features Σ αᵢ f_{Pᵢ}; ≤ K-1 (≤ 1 with `trace_ratio`), and below 0 with `cross_validated` where features are worse
    /// than none.
    pub h_score: f64,
    /// H less its chance level, over what is left above it: 0 for features that know nothing of the
    /// labels, 1 at the most; comparable across datasets.
    #[serde(default)]
    pub h_score_adjusted: f64,
    /// L_align ≥ 0; null where the method takes no gradients.
    pub gradient_alignment: Option<f64>,
    /// The effective λ, whichever way it was asked for. Null where it is infinite: at trade-off 1, or where H does
    /// not depend on α, or where the method does not solve.
    pub alignment_weight: Option<f64>,
    /// t; null when a raw `alignment_weight` was asked for, or where the method does not solve.
    pub trade_off: Option<f64>,
    /// What chose `trade_off`, if not the request.
    #[serde(default)]
    pub trade_off_rule: Option<TradeOffRule>,
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
    /// Cross-fitted accuracy of the composed prompt; with `trade_off: "validation"`.
    #[serde(default)]
    pub validation_accuracy: Option<f64>,
    /// Cross-entropy of the same, in nats, which chooses.
    #[serde(default)]
    pub validation_loss: Option<f64>,
    /// α in the order of `source_weights`.
    pub weights: Vec<f64>,
}

/// Row k of source i's aligned prompt is row `permutations[i][k]` of its file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TokenAlignment {
    /// The source whose order the others were given.
    pub reference: String,
    /// In the order of `source_weights`.
    pub permutations: Vec<Vec<usize>>,
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
    /// Unreadable images left out (`skip_unreadable`).
    pub skipped_images: usize,
    /// Samples heads were fitted without, fold by fold (2), or none (1).
    pub head_folds: usize,
    /// ρ of the H-score as it was used; null with `trace_ratio`.
    #[serde(default)]
    pub h_score_shrinkage: Option<f64>,
    pub per_source: Vec<SourceDiagnostics>,
    /// Share of the pairs of sources whose mean gradients have a negative cosine; null with one source.
    #[serde(default)]
    pub conflict_rate: Option<f64>,
    /// Cosines of the sources' mean gradients, [M, M], in the order of `source_weights`.
    #[serde(default)]
    pub gradient_cosines: Vec<Vec<f64>>,
    /// One forward pass with the composed prompt itself; null where α was solved for again from
    /// statistics, without the backbone.
    pub composed_score: Option<PromptScore>,
    /// H(f of the composed prompt) minus H(mixed features), over the latter, or over K-1 with `cross_validated`; null at a `scale` other than 1.
    pub surrogate_gap: Option<f64>,
    /// What `refine` steps found.
    #[serde(default)]
    pub refinement: Option<Refinement>,
    /// What α is to be compared with; present with `hgprompt_cv` and `hgprompt` when `eval_split` was given.
    pub baselines: Option<Baselines>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SourceDiagnostics {
    pub prompt: String,
    /// H of this source's features alone.
    pub h_score: f64,
    /// As `objective.h_score_adjusted`.
    #[serde(default)]
    pub h_score_adjusted: f64,
    /// Log of the maximum evidence a sample and class (You et al. 2021).
    #[serde(default)]
    pub logme: Option<f64>,
    /// Log expected empirical prediction ≤ 0 (Nguyen et al. 2020); where the prompt file has its source head.
    #[serde(default)]
    pub leep: Option<f64>,
    /// Negative conditional entropy ≤ 0 (Tran et al. 2019); where the prompt file has its source head.
    #[serde(default)]
    pub nce: Option<f64>,
    /// -H(Y_target | Y_source) ≤ 0 under optimal transport of the features (Tan et al. 2021); where the
    /// prompt file has a feature sketch.
    #[serde(default)]
    pub otce: Option<f64>,
    /// T of its closed-form head: logits are divided by it.
    pub head_temperature: f64,
    /// Mean cross-entropy of that head in nats, on samples it was not fitted on (with two folds).
    pub head_loss: f64,
    /// Share of the samples to whose largest class that head gives a probability above 0.999; such samples
    /// have next to no gradient.
    #[serde(default)]
    pub head_saturation: f64,
    /// Root mean square over samples of ‖∂ℓ/∂Pᵢ‖; null where the method takes no gradients.
    pub gradient_rms: Option<f64>,
}

/// How a prompt does on the target with a closed-form head fitted on the target samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PromptScore {
    pub h_score: f64,
    /// As `objective.h_score_adjusted`.
    #[serde(default)]
    pub h_score_adjusted: f64,
    /// On the samples the head was fitted on.
    pub train_accuracy: f64,
    /// On the same samples, cross-fitted: over ten folds, none scored by a head that saw it. What can be told of the
    /// prompt's use without an `eval_split`.
    #[serde(default)]
    pub validation_accuracy: Option<f64>,
    /// The same as cross-entropy, in nats, of probabilities at the temperature of least loss: it tells more of few samples
    /// than their accuracy does.
    #[serde(default)]
    pub validation_loss: Option<f64>,
    /// On `eval_split`.
    pub eval_accuracy: Option<f64>,
}

/// Steps on the true objective, -H(f of Σ αᵢ Pᵢ) + λ L_align(α), from the solver's α.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Refinement {
    /// Steps that were accepted, of those asked for.
    pub accepted_steps: u32,
    /// Forward passes over all samples, one a tried α.
    pub evaluations: u32,
    /// α before the first step; `source_weights` has it after the last.
    pub solved_weights: Vec<f64>,
    /// H(f of the composed prompt) before and after.
    pub h_score_before: f64,
    pub h_score_after: f64,
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
    /// Of the backbone's matrix products.
    #[serde(default)]
    pub precision: Precision,
    pub libtorch: String,
    /// promptweave's own version.
    pub version: String,
    /// Of the statistics α was solved for again from; null for a whole composition.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub solved_from: Option<Digest>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Warning {
    #[schema(value_type = WarningCode)]
    pub code: String,
    pub detail: String,
}

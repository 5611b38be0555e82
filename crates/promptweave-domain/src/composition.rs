//! The input and the answer of a composition: the data that worker and engine exchange.
//!
//! The JSON here has one shape in three places: the API's result, `result.json` of `promptweave
//! compose`, and the row that the worker stores.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::compatibility::PromptFacts;
use crate::digest::Digest;
use crate::early_stopping::{EarlyStop, EarlyStopping};
use crate::method::Method;
use crate::objective::{Objective, TradeOffRule};
use crate::precision::Precision;
use crate::prompt_file::PromptFile;
use crate::split::Split;
use crate::words::WarningCode;

// ---- Input ---------------------------------------------------------------------------------

/// Which of a dataset's images are the target samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TargetSamples {
    pub split: Split,
    /// The split of labelled images on which the result is evaluated. It is never used to choose α.
    pub eval_split: Option<Split>,
    /// The largest number of target samples. If there are more, a seeded stratified choice is
    /// taken.
    pub max_samples: usize,
    pub seed: u64,
    /// Leave unreadable images out (and count them) instead of failing.
    pub skip_unreadable: bool,
}

/// A source prompt, by the name that its user gave it.
#[derive(Clone, Debug)]
pub struct Source {
    pub prompt: String,
    /// The prompt's version; `None` without a registry.
    pub version: Option<i32>,
    /// The digest of the prompt file's bytes.
    pub digest: Digest,
    pub file: PromptFile,
}

impl Source {
    /// The facts that decide what the prompt goes together with.
    pub fn facts(&self) -> PromptFacts<'_> {
        let name = match self.version {
            Some(version) => format!("{}:{version}", self.prompt),
            None => self.prompt.clone(),
        };
        self.file.facts(name, self.digest)
    }
}

/// The complete input of a composition: files at hand, nothing to look up.
#[derive(Clone, Debug)]
pub struct CompositionInput {
    /// The backbone's folder, as `promptweave_formats::backbone::Backbone::open` reads it.
    pub backbone_dir: PathBuf,
    /// The target dataset's folder, as `promptweave_formats::dataset::LabelledImages::read` reads
    /// it.
    pub target_dir: PathBuf,
    pub target: TargetSamples,
    pub sources: Vec<Source>,
    pub objective: Objective,
    /// When to stop before all samples' gradients are taken. It has an effect only where the work
    /// is shared.
    pub early_stopping: Option<EarlyStopping>,
}

/// The input for solving again: an earlier composition's statistics replace backbone and images.
#[derive(Clone, Debug)]
pub struct SolveInput {
    /// The bytes of a `statistics.safetensors`.
    pub statistics: Vec<u8>,
    /// Sources from that file, all of them or some, in any order. The file contains their prompts,
    /// so that their digests suffice.
    pub sources: Vec<SourceRef>,
    pub objective: Objective,
}

/// A source prompt without its file.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceRef {
    pub prompt: String,
    /// The prompt's version; `None` without a registry.
    pub version: Option<i32>,
    pub digest: Digest,
}

// ---- Answer --------------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompositionResult {
    /// The weights α in the order of the request. Every weight is ≥ 0. Their sum is 1; with the method `pool` it is 1 minus
    /// the weight of no prompt (`pool.no_transfer`).
    pub source_weights: Vec<SourceWeight>,
    #[serde(default)]
    pub method: MethodReport,
    pub objective: ObjectiveValue,
    /// How the tokens were put into a common order; null with `align_tokens` off.
    #[serde(default)]
    pub token_alignment: Option<TokenAlignment>,
    /// The Pareto path over `trade_off` from 0 to 1. It is empty unless the method weighs two
    /// terms.
    pub pareto_path: Vec<PathPoint>,
    /// The distinct local optima at the chosen trade-off, best first. It is empty if the method
    /// does not solve for α.
    pub local_optima: Vec<Optimum>,
    /// The solver's report; null if the method does not solve for α.
    pub solver: Option<SolverReport>,
    /// The answer and what it could have been, on `eval_split`: the pool first. Empty unless the method is `pool` and
    /// `eval_split` was given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub comparison: Vec<Compared>,
    /// The pool of the sources' own predictions, beside the composed prompt; null in a solve from statistics
    /// that do not keep the predictions.
    #[serde(default)]
    pub pool: Option<PoolReport>,
    pub diagnostics: Diagnostics,
    pub composed_prompt: ComposedPrompt,
    /// Present if `early_stopping` ended the job before all gradients were taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stop: Option<EarlyStop>,
    pub provenance: Provenance,
    pub warnings: Vec<Warning>,
    /// Seconds spent in each phase.
    pub timings: BTreeMap<String, f64>,
}

/// How the method chose α, and what was done with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MethodReport {
    pub name: Method,
    /// The score by which each source was weighed or chosen, in the order of `source_weights`: H,
    /// LogME or loss with `single_best`, cosines with `spot` and `panda`, mean attention with
    /// `attempt`; null with the other methods.
    pub scores: Option<Vec<f64>>,
    /// Duration of the short tuning on the target in seconds; null if the method needs none.
    pub target_tuning_seconds: Option<f64>,
    /// γ in αᵢ = (1-γ) α*ᵢ + γ/M.
    pub uniform_mix: f64,
    /// The candidates that were compared with `uniform_mix: "auto"`; otherwise empty.
    pub uniform_mix_candidates: Vec<UniformMixPoint>,
    /// The comparison that a `fallback` made; null without a fallback.
    pub fallback: Option<FallbackReport>,
    /// β in P_T = P₀ + β Σ αᵢ (Pᵢ - P₀).
    pub scale: f64,
    /// Init seed of the initial prompt P₀; null at scale 1, where P₀ drops out.
    pub anchor_seed: Option<u64>,
    /// The candidates that were compared with `scale: "auto"`; otherwise empty.
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
    /// Cross-fitted accuracy on the target samples.
    pub validation_accuracy: f64,
    /// Cross-fitted cross-entropy on the target samples, in nats. The lowest is chosen.
    pub validation_loss: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FallbackReport {
    /// The source that replaces the composed prompt if it does better.
    pub prompt: String,
    /// Cross-fitted loss of that source on the target samples, in nats.
    pub validation_loss: f64,
    /// Cross-fitted loss of the composed prompt on the target samples, in nats.
    pub composed_validation_loss: f64,
    /// Whether the source replaced the composed prompt and has all weight.
    pub taken: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ScalePoint {
    pub scale: f64,
    /// Cross-fitted accuracy on the target samples.
    pub validation_accuracy: f64,
    /// Cross-fitted cross-entropy on the target samples, in nats. The lowest is chosen.
    #[serde(default)]
    pub validation_loss: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SourceWeight {
    pub prompt: String,
    /// The prompt's version; null without a registry (offline).
    pub version: Option<i32>,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    #[schema(minimum = 0, maximum = 1)]
    pub weight: f64,
    /// The jackknife standard error of the solved weight (before any `refine`), from leaving out
    /// one of ten folds of the samples at a time while λ, heads and `uniform_mix` are held. It is
    /// null if the method does not solve for α, if too few samples remain to solve, or if the
    /// `fallback` has all weight.
    #[serde(default)]
    pub standard_error: Option<f64>,
}

/// A log-linear pool: p(y|x) ∝ Πᵢ pᵢ(y|x)^(s αᵢ), where pᵢ is source i's own prediction by a closed-form head. It says how
/// much each source knows about the target, whatever the method is. The backbone without a prompt (no transfer) is one
/// more source. Nothing is mixed in prompt space; predicting with a pool takes a forward pass for each source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolReport {
    /// The weights α in the order of `source_weights`. With the weight of `no_transfer`, their sum is 1.
    pub weights: Vec<PoolWeight>,
    /// The backbone without a prompt; null in results without it.
    #[serde(default)]
    pub no_transfer: Option<NoTransfer>,
    /// The sharpness s > 0: about 1 if the sources know the same, more if they know different things.
    pub sharpness: f64,
    /// Cross-entropy in nats on the target samples, without those that are the only one of their class. No head is used
    /// on samples that it was fitted on. The M weights were fitted on them, so the loss is a little low.
    pub validation_loss: f64,
    /// Accuracy on the same samples.
    pub validation_accuracy: f64,
    /// The pool as a file that predicts. In the service, the method `pool` publishes it; with any other method, it is
    /// null there.
    #[serde(default)]
    pub ensemble: Option<PooledEnsemble>,
    /// The loss of a pool with equal weights at its best sharpness.
    pub uniform_validation_loss: f64,
    /// Whether the solver found the one optimum to rounding; if not, the weights are where it stopped.
    pub converged: bool,
}

/// The ensemble file of a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PooledEnsemble {
    /// Name that the ensemble is published under; null offline.
    pub prompt: Option<String>,
    pub version: Option<i32>,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// Forward passes of the backbone for each image.
    pub num_members: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolWeight {
    pub prompt: String,
    #[schema(minimum = 0, maximum = 1)]
    pub weight: f64,
    /// The jackknife standard error, from leaving out one of ten folds of the samples at a time while heads and
    /// temperatures are held.
    pub standard_error: f64,
    /// Cross-entropy in nats of this source alone, on the same samples.
    pub validation_loss: f64,
}

/// What the backbone predicts without a prompt, in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NoTransfer {
    #[schema(minimum = 0, maximum = 1)]
    pub weight: f64,
    /// The jackknife standard error, as for the sources.
    pub standard_error: f64,
    /// Cross-entropy in nats of this prediction alone, on the same samples.
    pub validation_loss: f64,
    /// How much lower the pool's cross-entropy is, in nats: the mean over the samples, and its standard error.
    pub gain: f64,
    pub gain_standard_error: f64,
}

/// One way to predict the target, on the images of `eval_split`. No label of theirs was used before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Compared {
    pub prediction: Prediction,
    /// Forward passes of the backbone that it takes for each image.
    pub forward_passes: usize,
    pub accuracy: f64,
    /// The 95 % interval of the accuracy (Wilson 1927), from its least to its greatest value.
    pub accuracy_interval: [f64; 2],
    /// Cross-entropy in nats. Every prediction has the same share of equal probabilities, ε = 0.01.
    pub loss: f64,
    /// The pool's accuracy minus this one.
    pub pool_gain: f64,
    /// The 95 % interval of `pool_gain`, paired by image (Agresti & Min 2005).
    pub pool_gain_interval: [f64; 2],
    /// The two-sided p-value of equal accuracies, paired by image (McNemar's test, exact).
    pub p_value: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The pool at its weights.
    Pool,
    /// The pool of all sources and the backbone without a prompt, at equal weights.
    UniformPool,
    /// The composed prompt.
    ComposedPrompt,
    /// The source with the lowest cross-fitted loss on the target samples.
    SingleBest,
    /// The backbone without a prompt.
    NoTransfer,
}

impl Prediction {
    /// The name as people read it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Pool => "pool",
            Self::UniformPool => "uniform pool",
            Self::ComposedPrompt => "composed prompt",
            Self::SingleBest => "single best",
            Self::NoTransfer => "no transfer",
        }
    }
}

/// The objective L(α) = -H(α) + λ L_align(α) and its parts at the returned α.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ObjectiveValue {
    /// H of the mixed features Σ αᵢ f_{Pᵢ}. It is at most K-1 (at most 1 with `trace_ratio`). With
    /// `cross_validated` it is below 0 if the features predict worse than none.
    pub h_score: f64,
    /// H minus its chance level, divided by the range that is left above it. It is 0 for features
    /// that know nothing of the labels and at most 1, and can be compared across datasets.
    #[serde(default)]
    pub h_score_adjusted: f64,
    /// The gradient alignment L_align ≥ 0; null if the method takes no gradients.
    pub gradient_alignment: Option<f64>,
    /// The effective λ, however it was requested. It is null if λ is infinite (at trade-off 1, or
    /// if H does not depend on α), or if the method does not solve for α.
    pub alignment_weight: Option<f64>,
    /// The trade-off t; null if a raw `alignment_weight` was requested, or if the method does not
    /// solve for α.
    pub trade_off: Option<f64>,
    /// The rule that chose `trade_off`; null if the request gave it.
    #[serde(default)]
    pub trade_off_rule: Option<TradeOffRule>,
    /// The objective -H + λ L_align; null if λ is infinite.
    pub total: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PathPoint {
    pub trade_off: f64,
    /// λ at this trade-off; null at t = 1.
    pub alignment_weight: Option<f64>,
    pub h_score: f64,
    pub gradient_alignment: f64,
    /// Cross-fitted accuracy of the composed prompt; present with `trade_off: "validation"`.
    #[serde(default)]
    pub validation_accuracy: Option<f64>,
    /// Cross-fitted cross-entropy of the composed prompt, in nats. The lowest is chosen.
    #[serde(default)]
    pub validation_loss: Option<f64>,
    /// The weights α in the order of `source_weights`.
    pub weights: Vec<f64>,
}

/// How the sources' tokens were reordered. Row k of source i's aligned prompt is row
/// `permutations[i][k]` of its file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TokenAlignment {
    /// The source whose token order the others were given.
    pub reference: String,
    /// One permutation for each source, in the order of `source_weights`.
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
    /// Iterations of the start that won.
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
    /// N, the number of target samples used. `num_classes` is K, the number of classes among them.
    pub num_samples: usize,
    pub num_classes: usize,
    /// Number of unreadable images that were left out (`skip_unreadable`).
    pub skipped_images: usize,
    /// Number of folds for the closed-form heads: with 2, no head is fitted on the samples it
    /// scores; with 1, one head is fitted on all.
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
    /// The score of the composed prompt itself, by one forward pass; null if α was solved for again
    /// from statistics, without the backbone.
    pub composed_score: Option<PromptScore>,
    /// H of the composed prompt's features minus H of the mixed features, divided by the latter (by
    /// K-1 with `cross_validated`); null at a `scale` other than 1.
    pub surrogate_gap: Option<f64>,
    /// The result of the `refine` steps; null without them.
    #[serde(default)]
    pub refinement: Option<Refinement>,
    /// The prompts to compare α with; present with `hgprompt_cv` and `hgprompt` if `eval_split` was
    /// given.
    pub baselines: Option<Baselines>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SourceDiagnostics {
    pub prompt: String,
    /// H of this source's features alone.
    pub h_score: f64,
    /// H minus its chance level, divided by the range above it (see `objective.h_score_adjusted`).
    #[serde(default)]
    pub h_score_adjusted: f64,
    /// LogME: log of the maximum evidence, for each sample and class (You et al. 2021).
    #[serde(default)]
    pub logme: Option<f64>,
    /// LEEP: log expected empirical prediction ≤ 0 (Nguyen et al. 2020); null if the prompt file
    /// has no source head.
    #[serde(default)]
    pub leep: Option<f64>,
    /// NCE: negative conditional entropy ≤ 0 (Tran et al. 2019); null if the prompt file has no
    /// source head.
    #[serde(default)]
    pub nce: Option<f64>,
    /// OTCE: -H(Y_target | Y_source) ≤ 0 under optimal transport of the features (Tan et al. 2021);
    /// null if the prompt file has no feature sketch.
    #[serde(default)]
    pub otce: Option<f64>,
    /// Temperature T of the source's closed-form head: logits are divided by it.
    pub head_temperature: f64,
    /// Mean cross-entropy of that head in nats, on samples it was not fitted on (with two folds).
    pub head_loss: f64,
    /// Share of the samples to whose largest class that head gives a probability above 0.999. Such
    /// samples have next to no gradient.
    #[serde(default)]
    pub head_saturation: f64,
    /// Root mean square over the samples of ‖∂ℓ/∂Pᵢ‖; null if the method takes no gradients.
    pub gradient_rms: Option<f64>,
}

/// How a prompt does on the target with a closed-form head fitted on the target samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PromptScore {
    pub h_score: f64,
    /// H minus its chance level, divided by the range above it (see `objective.h_score_adjusted`).
    #[serde(default)]
    pub h_score_adjusted: f64,
    /// Accuracy on the samples the head was fitted on.
    pub train_accuracy: f64,
    /// Cross-fitted accuracy on the same samples: over ten folds, each sample is scored by a head
    /// that has not seen it. It is the best estimate without an `eval_split`.
    #[serde(default)]
    pub validation_accuracy: Option<f64>,
    /// Cross-fitted cross-entropy on the same samples, in nats, at the temperature of least loss.
    /// With few samples it tells more than accuracy.
    #[serde(default)]
    pub validation_loss: Option<f64>,
    /// Accuracy on `eval_split`; null if none was given.
    pub eval_accuracy: Option<f64>,
}

/// The steps on the true objective, -H(f of Σ αᵢ Pᵢ) + λ L_align(α), from the solver's α.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Refinement {
    /// Number of accepted steps.
    pub accepted_steps: u32,
    /// Number of forward passes over all samples, one for each α that was tried.
    pub evaluations: u32,
    /// The weights α before the first step; `source_weights` has those after the last.
    pub solved_weights: Vec<f64>,
    /// H of the composed prompt's features before the steps; `h_score_after` has it after them.
    pub h_score_before: f64,
    pub h_score_after: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Baselines {
    /// The plain mean of the sources, (1/M) Σ Pᵢ.
    pub uniform: PromptScore,
    /// The source with the highest H of its own.
    pub best_single: PromptScore,
    pub best_single_prompt: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ComposedPrompt {
    /// Name of the published prompt; null offline.
    pub prompt: Option<String>,
    pub version: Option<i32>,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// The weights that the sources' prompts are summed with, in the order of `source_weights`. They differ from
    /// `source_weights` with the method `pool` alone. Empty in older results.
    #[serde(default)]
    pub weights: Vec<f64>,
}

/// The inputs and the platform that the numbers depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Provenance {
    #[schema(value_type = String)]
    pub backbone_digest: Digest,
    pub preprocessing_id: String,
    /// Digest over the target samples' bytes and labels, in order.
    #[schema(value_type = String)]
    pub sample_digest: Digest,
    pub seed: u64,
    pub device: String,
    pub num_threads: usize,
    /// Precision of the backbone's matrix products.
    #[serde(default)]
    pub precision: Precision,
    pub libtorch: String,
    /// The version of promptweave.
    pub version: String,
    /// Digest of the statistics from which α was solved for again; null for a whole composition.
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

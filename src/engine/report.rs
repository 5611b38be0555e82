//! The answer: result, composed prompt and statistics, assembled from what the steps found.

use std::collections::BTreeMap;

use tch::Tensor;

use super::compose::Verified;
use super::gradients::GradientSummary;
use super::head::SourceHead;
use super::samples::Samples;
use super::solver::Solution;
use super::sources::common_init_seed;
use super::statistics::{Metadata, SourceName, Statistics};
use super::vit::Vit;
use super::{EngineError, device};
use crate::domain::backbone::Backbone;
use crate::domain::composition::{
    ComposedPrompt, Composition, CompositionInput, CompositionResult, Diagnostics, ObjectiveValue,
    Provenance, SourceDiagnostics, SourceWeight, Warning,
};
use crate::domain::dataset::LabelledImages;
use crate::domain::digest::Digest;
use crate::domain::objective::Weighing;
use crate::domain::prompt_file::FORMAT;

/// The version that the set-up fetches and this tch is made for.
const LIBTORCH: &str = "2.11.0";

/// Everything a composition found.
pub struct Evidence<'a> {
    pub backbone: &'a Backbone,
    pub vit: &'a Vit,
    pub input: &'a CompositionInput,
    pub weighing: Weighing,
    pub dataset: &'a LabelledImages,
    pub samples: &'a Samples,
    /// [M, N, d]
    pub features: &'a Tensor,
    pub folds: &'a [usize],
    pub heads: &'a [SourceHead],
    pub gradients: GradientSummary,
    pub own_h_scores: Vec<f64>,
    pub solution: Solution,
    pub verified: Verified,
}

impl Evidence<'_> {
    pub fn composition(self, timings: BTreeMap<String, f64>) -> Result<Composition, EngineError> {
        let statistics = self.statistics()?;
        let composed = self.verified.composed.to_bytes();
        let diagnostics = self.diagnostics();
        let warnings = self.warnings(&diagnostics);
        let Solution {
            h_score,
            gradient_alignment,
            alignment_weight,
            ..
        } = self.solution;
        let result = CompositionResult {
            source_weights: self.source_weights(),
            token_alignment: None,
            objective: ObjectiveValue {
                h_score,
                h_score_adjusted: 0.0,
                gradient_alignment,
                alignment_weight,
                trade_off: match self.weighing {
                    Weighing::TradeOff(t) => Some(t),
                    Weighing::Rule(_) | Weighing::AlignmentWeight(_) => None,
                },
                trade_off_rule: None,
                total: alignment_weight.map(|lambda| lambda * gradient_alignment - h_score),
            },
            composed: ComposedPrompt {
                prompt: None,
                version: None,
                digest: Digest::of(&composed),
            },
            provenance: self.provenance(),
            path: self.solution.path,
            optima: self.solution.optima,
            solver: self.solution.report,
            diagnostics,
            warnings,
            timings,
        };
        Ok(Composition {
            result,
            composed,
            statistics,
        })
    }

    fn source_weights(&self) -> Vec<SourceWeight> {
        let weights = self.input.sources.iter().zip(&self.solution.alpha);
        weights
            .map(|(source, weight)| SourceWeight {
                prompt: source.prompt.clone(),
                version: source.version,
                digest: source.digest,
                weight: *weight,
                standard_error: None,
            })
            .collect()
    }

    fn provenance(&self) -> Provenance {
        Provenance {
            backbone_digest: self.backbone.digest,
            preprocessing_id: self.backbone.config.preprocessing.id(),
            sample_digest: self.samples.digest,
            seed: self.input.target.seed,
            device: device::name_of(self.vit.device),
            num_threads: tch::get_num_threads() as usize,
            libtorch: LIBTORCH.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            resolved_from: None,
        }
    }

    fn statistics(&self) -> Result<Vec<u8>, EngineError> {
        let statistics = Statistics {
            features: self.features,
            labels: &self.samples.labels,
            sample_indices: &self.samples.indices,
            folds: self.folds,
            head_temperature: self.heads.iter().map(|head| head.temperature).collect(),
            gradient_gram: self.gradients.whole.gram.clone(),
        };
        let sources = self.input.sources.iter();
        statistics.to_bytes(&Metadata {
            format: FORMAT,
            sources: sources
                .map(|s| SourceName {
                    prompt: &s.prompt,
                    digest: s.digest,
                })
                .collect(),
            backbone_digest: self.backbone.digest,
            preprocessing_id: self.backbone.config.preprocessing.id(),
            sample_digest: self.samples.digest,
            objective: &self.input.objective,
            seed: self.input.target.seed,
        })
    }

    fn diagnostics(&self) -> Diagnostics {
        let composed = &self.verified.score;
        let mixed = self.solution.h_score;
        let mut present = self.samples.labels.clone();
        present.sort_unstable();
        present.dedup();
        let per_source = self.input.sources.iter().zip(self.heads).enumerate();
        Diagnostics {
            num_samples: self.samples.len(),
            num_classes: present.len(),
            skipped_images: self.samples.skipped,
            head_folds: self.folds.iter().max().map_or(1, |last| last + 1),
            per_source: per_source
                .map(|(i, (source, head))| SourceDiagnostics {
                    prompt: source.prompt.clone(),
                    h_score: self.own_h_scores[i],
                    head_temperature: head.temperature,
                    head_loss: head.loss,
                    h_score_adjusted: 0.0,
                    head_saturation: head.saturation,
                    log_me: None,
                    leep: None,
                    nce: None,
                    otce: None,
                    gradient_rms: self.gradients.rms[i],
                })
                .collect(),
            h_score_shrinkage: None,
            conflict_rate: self.gradients.conflict_rate(),
            gradient_cosines: self
                .gradients
                .mean_cosine
                .chunks_exact(self.heads.len())
                .map(<[f64]>::to_vec)
                .collect(),
            surrogate_gap: Some((composed.h_score - mixed) / mixed.abs().max(f64::MIN_POSITIVE)),
            composed: Some(composed.clone()),
            refinement: None,
            baselines: self.verified.baselines.clone(),
        }
    }

    /// What a careful reader of the result would want to be told.
    fn warnings(&self, diagnostics: &Diagnostics) -> Vec<Warning> {
        let sources = &self.input.sources;
        let d = self.vit.config.embed_dim;
        let mut warnings = Vec::new();
        let mut warn = |code: &str, detail: String| {
            warnings.push(Warning {
                code: code.to_owned(),
                detail,
            });
        };
        let n = self.samples.len();
        if n < 2 * d {
            warn(
                "few_samples",
                format!(
                    "{n} samples for {d} feature dimensions: H is near its chance level below \
                     {} samples, and differences between sources are small",
                    2 * d
                ),
            );
        }
        let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
        self.samples
            .labels
            .iter()
            .for_each(|label| *counts.entry(*label).or_default() += 1);
        for (class, _) in counts.iter().filter(|(_, count)| **count == 1) {
            let name = &self.dataset.classes[*class];
            warn(
                "singleton_class",
                format!("class `{name}` has a single sample"),
            );
        }
        if sources.len() > 1 {
            for (source, weight) in sources.iter().zip(&self.solution.alpha) {
                if *weight == 0.0 || *weight == 1.0 {
                    let name = &source.prompt;
                    warn(
                        "weight_at_bound",
                        format!("source `{name}` has weight {weight}"),
                    );
                }
            }
            if common_init_seed(sources).is_none() {
                warn(
                    "init_seeds_differ",
                    "the sources' init seeds differ or are unknown, so that their tokens may be in \
                     different orders, on which Σ αᵢ Pᵢ depends"
                        .into(),
                );
            }
        }
        let near_best = |value: f64| {
            let best = self.solution.optima[0].value;
            (value - best).abs() <= 0.01 * best.abs().max(1e-12)
        };
        let rivals = self
            .solution
            .optima
            .iter()
            .skip(1)
            .filter(|o| near_best(o.value))
            .count();
        if rivals > 0 {
            warn(
                "near_ties",
                format!("{rivals} other local optima lie within 1 % of the best; see `optima`"),
            );
        }
        if let Some(gap) = diagnostics.surrogate_gap.filter(|gap| gap.abs() > 0.1) {
            warn(
                "surrogate_gap",
                format!(
                    "H of the composed prompt differs by {:+.1} % from H of the mixed features that α \
                     was chosen by",
                    100.0 * gap
                ),
            );
        }
        if diagnostics.skipped_images > 0 {
            let count = diagnostics.skipped_images;
            warn(
                "skipped_images",
                format!("{count} unreadable images were left out"),
            );
        }
        warnings
    }
}

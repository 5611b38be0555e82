//! The answer: result, composed prompt and statistics, assembled from the findings of the steps.

use std::collections::BTreeMap;

use crate::compose::Verified;
use crate::compose::ensemble::Pooled;
use crate::compose::steps::Steps;
use crate::device::LIBTORCH;
use crate::error::EngineError;
use crate::pool::Pool;
use crate::samples::classes::present;
use crate::score::gradients::GradientSummary;
use crate::score::head::num_heads;
use crate::solve::Solved;
use crate::solve::solver::{Solution, towards_vertex};
use crate::statistics::{Metadata, RecordedSource, Statistics};
use promptweave_domain::composer::Composition;
use promptweave_domain::composition::{
    Compared, ComposedPrompt, CompositionResult, Diagnostics, FallbackReport, MethodReport,
    NoTransfer, ObjectiveValue, Optimum, PoolReport, PoolWeight, PooledEnsemble, Provenance,
    Refinement, SourceDiagnostics, SourceWeight, Warning,
};
use promptweave_domain::digest::Digest;
use promptweave_domain::early_stopping::EarlyStop;
use promptweave_domain::ensemble_file::EnsembleFile;
use promptweave_domain::method::Method;
use promptweave_domain::objective::HScoreMode;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::words::WarningCode;

/// The share of saturated samples above which a head gets a warning.
const MANY_SATURATED: f64 = 0.2;

/// All findings of a composition.
pub struct Findings<'a> {
    pub metadata: Metadata,
    /// The sources' versions, in order; `None` offline.
    pub versions: Vec<Option<i32>>,
    pub device: String,
    /// Digest of the statistics that replaced backbone and images; `None` for a whole composition.
    pub solved_from: Option<Digest>,
    pub statistics: &'a Statistics,
    pub solved: Solved,
    pub method: MethodReport,
    /// The weights of the composed prompt: the solver's α, changed by refinement or a share of equal weights if
    /// requested.
    pub alpha: Vec<f64>,
    pub composed: PromptFile,
    /// The results of forward passes; `None` without a backbone.
    pub verified: Option<Verified>,
    pub refinement: Option<Refinement>,
    pub pooled: Option<Pooled>,
    pub comparison: Vec<Compared>,
    pub early_stop: Option<EarlyStop>,
    /// Whether a composition with a backbone would have had a fallback that this one lacks.
    pub fallback_dropped: bool,
}

impl Findings<'_> {
    pub fn composition(self, steps: Steps<'_>) -> Result<Composition, EngineError> {
        let composed = self.composed.to_bytes();
        let versions = &self.versions;
        let file = |pooled: &Pooled| pooled.file(self.statistics, &self.metadata, versions);
        let file = self.pooled.as_ref().map(file).transpose()?;
        let ensemble = file.as_ref().map(EnsembleFile::to_bytes);
        let pool = self.pooled.as_ref().map(|pooled| PoolReport {
            ensemble: file
                .zip(ensemble.as_ref())
                .map(|(file, bytes)| PooledEnsemble {
                    prompt: None,
                    version: None,
                    digest: Digest::of(bytes),
                    num_members: file.members.len(),
                }),
            ..self.pool_report(&pooled.pool)
        });
        let objective = self.objective_value()?;
        let diagnostics = self.diagnostics(objective.h_score)?;
        let warnings = self.warnings(&diagnostics, objective.h_score);
        let result = CompositionResult {
            source_weights: self.source_weights(),
            method: self.method.clone(),
            objective,
            composed_prompt: ComposedPrompt {
                prompt: None,
                version: None,
                digest: Digest::of(&composed),
                weights: self.alpha.clone(),
            },
            provenance: self.provenance(),
            early_stop: self.early_stop,
            token_alignment: self.metadata.token_alignment.clone(),
            pareto_path: match self.statistics.gradients {
                Some(_) => self.solved.solution.path,
                // Every point of the path would be the same.
                None => Vec::new(),
            },
            local_optima: self.solved.solution.optima,
            solver: self.solved.solution.report,
            comparison: self.comparison,
            pool,
            diagnostics,
            warnings,
            timings: steps.finish(),
        };
        Ok(Composition {
            result,
            composed,
            ensemble,
            statistics: self.statistics.to_bytes(&self.metadata)?,
        })
    }

    fn objective_value(&self) -> Result<ObjectiveValue, EngineError> {
        let Solved {
            h_score,
            alignment,
            solution,
            trade_off,
            trade_off_rule,
            alignment_weight,
            ..
        } = &self.solved;
        // The solver knows both terms at its own α.
        let (h, l) = if self.alpha == solution.alpha {
            (solution.h_score, solution.gradient_alignment)
        } else {
            (h_score.value(&self.alpha)?, alignment.value(&self.alpha))
        };
        let takes_gradients = self.statistics.gradients.is_some();
        Ok(ObjectiveValue {
            h_score: h,
            h_score_adjusted: h_score.adjusted(&self.alpha)?,
            gradient_alignment: takes_gradients.then_some(l),
            alignment_weight: *alignment_weight,
            trade_off: *trade_off,
            trade_off_rule: *trade_off_rule,
            total: alignment_weight.map(|lambda| lambda * l - h),
        })
    }

    /// The fallback that took the place of the composed prompt, if one did.
    fn fell_back(&self) -> Option<&FallbackReport> {
        self.method
            .fallback
            .as_ref()
            .filter(|fallback| fallback.taken)
    }

    fn source_weights(&self) -> Vec<SourceWeight> {
        // With `pool`, the answer is the pool, and the composed prompt is beside it.
        let pool = (self.pooled.as_ref()).filter(|_| self.method.name == Method::Pool);
        let pool = pool.map(|pooled| &pooled.pool);
        let alpha = pool.map_or(&self.alpha, |pool| &pool.alpha);
        // The standard errors belong to the weights that were solved for.
        let solved = (self.solved.standard_errors.as_ref()).filter(|_| self.fell_back().is_none());
        let errors = pool.map(|pool| &pool.standard_errors).or(solved);
        let sources = self.metadata.sources.iter().enumerate();
        sources
            .map(|(i, source)| SourceWeight {
                prompt: source.prompt.clone(),
                version: self.versions[i],
                digest: source.digest,
                weight: alpha[i],
                standard_error: errors.map(|errors| (1.0 - self.method.uniform_mix) * errors[i]),
            })
            .collect()
    }

    fn pool_report(&self, pool: &Pool) -> PoolReport {
        let sources = self.metadata.sources.iter().enumerate();
        let weights = sources.map(|(i, source)| PoolWeight {
            prompt: source.prompt.clone(),
            weight: pool.alpha[i],
            standard_error: pool.standard_errors[i],
            validation_loss: pool.source_losses[i],
        });
        let last = self.metadata.sources.len();
        PoolReport {
            weights: weights.collect(),
            no_transfer: Some(NoTransfer {
                weight: pool.alpha[last],
                standard_error: pool.standard_errors[last],
                validation_loss: pool.source_losses[last],
                gain: pool.gain.0,
                gain_standard_error: pool.gain.1,
            }),
            ensemble: None,
            sharpness: pool.sharpness,
            validation_loss: pool.loss,
            validation_accuracy: pool.accuracy,
            uniform_validation_loss: pool.uniform_loss,
            converged: pool.converged,
        }
    }

    fn provenance(&self) -> Provenance {
        let ground = &self.metadata;
        Provenance {
            backbone_digest: ground.backbone_digest,
            preprocessing_id: ground.preprocessing_id.clone(),
            sample_digest: ground.sample_digest,
            seed: ground.seed,
            device: self.device.clone(),
            num_threads: tch::get_num_threads() as usize,
            precision: ground.precision,
            libtorch: LIBTORCH.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            solved_from: self.solved_from,
        }
    }

    fn diagnostics(&self, mixed: f64) -> Result<Diagnostics, EngineError> {
        let Statistics {
            labels, gradients, ..
        } = self.statistics;
        let gradients = gradients.as_ref();
        let (m, n, d) = self.statistics.size();
        let per_source = (0..m)
            .map(|i| self.of_source(i))
            .collect::<Result<Vec<_>, _>>()?;
        let composed = self
            .verified
            .as_ref()
            .map(|verified| verified.score.clone());
        Ok(Diagnostics {
            num_samples: n,
            num_classes: present(labels).len(),
            skipped_images: self.metadata.skipped_images,
            head_folds: num_heads(n, d),
            h_score_shrinkage: self.solved.h_score.shrinkage(),
            per_source,
            conflict_rate: gradients.and_then(GradientSummary::conflict_rate),
            gradient_cosines: gradients.map_or(Vec::new(), |gradients| {
                let rows = gradients.mean_cosine.chunks_exact(m);
                rows.map(<[f64]>::to_vec).collect()
            }),
            // At another scale, the composed prompt is not the one that the mixed features stand
            // for.
            surrogate_gap: (composed.as_ref().filter(|_| self.method.scale == 1.0))
                .map(|score| (score.h_score - mixed) / self.size_of_h(mixed).0),
            composed_score: composed,
            refinement: self.refinement.clone(),
            baselines: self.verified.as_ref().and_then(|v| v.baselines.clone()),
        })
    }

    /// The size that a difference of H is compared with, and its name in words: H itself, or the
    /// maximum K-1 if H may be near 0.
    fn size_of_h(&self, mixed: f64) -> (f64, &'static str) {
        let most = present(&self.statistics.labels).len() as f64 - 1.0;
        match self.metadata.objective.h_score.mode() {
            HScoreMode::CrossValidated => (most, "of K-1"),
            HScoreMode::Standard | HScoreMode::TraceRatio => {
                (mixed.abs().max(f64::MIN_POSITIVE), "of it")
            }
        }
    }

    fn of_source(&self, i: usize) -> Result<SourceDiagnostics, EngineError> {
        let Statistics {
            heads, gradients, ..
        } = self.statistics;
        let RecordedSource { prompt, scores, .. } = &self.metadata.sources[i];
        let m = self.alpha.len();
        let alone = towards_vertex(i, m, 1.0);
        Ok(SourceDiagnostics {
            prompt: prompt.clone(),
            h_score: self.solved.solution.own_h_scores[i],
            h_score_adjusted: self.solved.h_score.adjusted(&alone)?,
            logme: Some(scores.logme),
            leep: scores.leep,
            nce: scores.nce,
            otce: scores.otce,
            head_temperature: heads.temperature[i],
            head_loss: heads.loss[i],
            head_saturation: heads.saturation[i],
            gradient_rms: gradients.as_ref().map(|gradients| gradients.rms[i]),
        })
    }

    /// The warnings about a result. `mixed` is H of the mixed features.
    fn warnings(&self, diagnostics: &Diagnostics, mixed: f64) -> Vec<Warning> {
        let mut warnings = Warnings::default();
        self.warn_of_samples(diagnostics, &mut warnings);
        self.warn_of_sources(diagnostics, &mut warnings);
        let Solution { optima, .. } = &self.solved.solution;
        let rivals = optima.split_first().map_or(0, |(best, others)| {
            let apart = 0.01 * best.value.abs().max(1e-12);
            let near = |other: &&Optimum| (other.value - best.value).abs() <= apart;
            others.iter().filter(near).count()
        });
        if rivals > 0 {
            warnings.add(
                WarningCode::NearTies,
                format!(
                    "{rivals} other local optima lie within 1 % of the best; see `local_optima`"
                ),
            );
        }
        // A fallback compared the composed prompt itself, so that the gap to the mixed features no
        // longer matters.
        let gap = (diagnostics.surrogate_gap).filter(|_| self.method.fallback.is_none());
        if let Some(gap) = gap.filter(|gap| gap.abs() > 0.1) {
            let way_out = match self.method.name.solves() && self.method.uniform_mix == 0.0 {
                true => ", which α was chosen by; `experimental.refine` works on the former",
                false => "",
            };
            let relative_to = self.size_of_h(mixed).1;
            warnings.add(
                WarningCode::SurrogateGap,
                format!(
                    "H of the composed prompt differs by {:+.1} % ({relative_to}) from H of the mixed features{way_out}",
                    100.0 * gap
                ),
            );
        }
        warnings.0
    }

    fn warn_of_samples(&self, diagnostics: &Diagnostics, warnings: &mut Warnings) {
        let (_, n, d) = self.statistics.size();
        let is_standard = self.metadata.objective.h_score.mode() == HScoreMode::Standard;
        if is_standard && n < 2 * d {
            warnings.add(
                WarningCode::FewSamples,
                format!(
                    "{n} samples for {d} feature dimensions: H as `standard` is near its chance level \
                     below {} samples, and differences between sources are small; `cross_validated` is not",
                    2 * d
                ),
            );
        }
        let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
        for label in &self.statistics.labels {
            *counts.entry(*label).or_default() += 1;
        }
        for (class, _) in counts.iter().filter(|(_, count)| **count == 1) {
            let name = &self.metadata.classes[*class];
            warnings.add(
                WarningCode::SingletonClass,
                format!("class `{name}` has a single sample"),
            );
        }
        if diagnostics.skipped_images > 0 {
            let count = diagnostics.skipped_images;
            warnings.add(
                WarningCode::SkippedImages,
                format!("{count} unreadable images were left out"),
            );
        }
        if self.solved.standard_errors.is_none() && self.method.name.solves() {
            warnings.add(
                WarningCode::NoStandardErrors,
                "too few samples, or too many pairs of sources, for the standard errors of the \
                 weights"
                    .into(),
            );
        }
    }

    /// With `pool`, warns if the sources are not known to help.
    fn warn_of_pool(&self, warnings: &mut Warnings) {
        let pooled = (self.pooled.as_ref()).filter(|_| self.method.name == Method::Pool);
        let Some(Pool {
            gain: (mean, error),
            ..
        }) = pooled.map(|pooled| &pooled.pool)
        else {
            return;
        };
        if *mean <= KNOWN * error {
            warnings.add(
                WarningCode::NothingHelps,
                format!(
                    "none of these sources is known to help: the pool's cross-fitted loss is {mean:.4} ± {error:.4} nats \
                     below that of the backbone without a prompt; give more samples, or other sources"
                ),
            );
        }
    }

    fn warn_of_sources(&self, diagnostics: &Diagnostics, warnings: &mut Warnings) {
        for source in &diagnostics.per_source {
            if source.head_saturation > MANY_SATURATED {
                warnings.add(
                    WarningCode::SaturatedHead,
                    format!(
                        "the head of source `{}` is certain of {:.0} % of the samples, so that the \
                         others make up nearly all of its gradient; raise `head.shrinkage`",
                        source.prompt,
                        100.0 * source.head_saturation
                    ),
                );
            }
        }
        self.warn_of_pool(warnings);
        let sources = &self.metadata.sources;
        if sources.len() == 1 {
            return;
        }
        if let Some(fallback) = self.fell_back() {
            let FallbackReport {
                prompt,
                validation_loss,
                composed_validation_loss,
                ..
            } = fallback;
            warnings.add(
                WarningCode::FellBack,
                format!(
                    "source `{prompt}` alone has a lower cross-fitted loss ({validation_loss:.4} nats) than the prompt \
                     that the method composed ({composed_validation_loss:.4}), and takes its place"
                ),
            );
        }
        if self.fallback_dropped {
            warnings.add(
                WarningCode::NoFallback,
                "without the backbone the composed prompt is not compared with the best single source, which may do better"
                    .into(),
            );
        }
        let solves = self.method.name.solves() && self.fell_back().is_none();
        for (source, weight) in sources.iter().zip(&self.alpha) {
            if solves && (*weight == 0.0 || *weight == 1.0) {
                let name = &source.prompt;
                warnings.add(
                    WarningCode::WeightAtBound,
                    format!("source `{name}` has weight {weight}"),
                );
            }
        }
        let aligned = self.metadata.token_alignment.is_some();
        if !aligned && self.metadata.common_init_seed().is_none() {
            warnings.add(
                WarningCode::InitSeedsDiffer,
                "the sources' init seeds differ or are unknown, so that their tokens may be in \
                 different orders, on which Σ αᵢ Pᵢ depends; `align_tokens: hungarian` matches them"
                    .into(),
            );
        }
    }
}

/// The number of standard errors that a gain must exceed to be known.
const KNOWN: f64 = 2.0;

#[derive(Default)]
struct Warnings(Vec<Warning>);

impl Warnings {
    fn add(&mut self, code: WarningCode, detail: String) {
        self.0.push(Warning {
            code: code.name().to_owned(),
            detail,
        });
    }
}

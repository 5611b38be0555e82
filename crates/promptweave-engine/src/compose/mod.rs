//! A whole composition, step by step.

pub(crate) mod ensemble;
pub(crate) mod refine;
pub(crate) mod report;
pub mod self_test;
pub(crate) mod solve_again;
pub mod sources;
pub(crate) mod steps;
pub(crate) mod tiny;
pub(crate) mod token_alignment;

mod ground;
mod rank;
mod weigh;

pub use self::rank::rank;

pub use self::weigh::TargetPrompt;

use tch::Tensor;

use crate::baselines::{towards_uniform, uniform};
use crate::cache::{CachedSources, ResultCache};
use crate::compose::ensemble::Pooled;
use crate::compose::refine::Refiner;
use crate::compose::report::Findings;
use crate::compose::sources::{anchored, check_sources, common_init_seed, composed_prompt};
use crate::compose::steps::{Steps, stop_on};
use crate::compose::token_alignment::align;
use crate::device;
use crate::error::EngineError;
use crate::samples::{Samples, Selection};
use crate::score::evaluate::{Evaluation, OnUnseen, cross_fitted};
use crate::score::transferability::SourceScores;
use crate::solve::Solved;
use crate::statistics::{Metadata, RecordedSource, Statistics};
use crate::tensors::prompt_tensor;
use crate::tune::initial_prompt;
use crate::vit::Vit;
use promptweave_domain::composer::{Composition, Observer};
use promptweave_domain::composition::{
    Baselines, CompositionInput, PathPoint, PromptScore, Refinement, Source, TokenAlignment,
};
use promptweave_domain::early_stopping::EarlyStopping;
use promptweave_domain::method::{Method, NO_ANCHOR, Scale};
use promptweave_domain::objective::{HScoreOptions, InvalidObjective, Objective, Shrinkage};
use promptweave_domain::phase::Phase;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::tensor::Tensor as PlainTensor;
use promptweave_formats::backbone::Backbone;
use promptweave_formats::dataset::LabelledImages;

pub fn compose(
    backbone: &Backbone,
    vit: &Vit,
    mut cache: Option<&mut ResultCache>,
    target_prompt: &mut Option<TargetPrompt>,
    input: &CompositionInput,
    observer: &mut dyn Observer,
) -> Result<Composition, EngineError> {
    let CompositionInput {
        target, sources, ..
    } = input;
    let objective = &input.objective.settled(input.early_stopping.is_none());
    let mut steps = Steps::new(observer);
    let inputs = Inputs::read(backbone, vit, input, &mut steps)?;
    let work = inputs.work(backbone, vit, input, objective);
    let Inputs {
        samples, dataset, ..
    } = &inputs;
    let nothing = PlainTensor::new([0, vit.config.embed_dim], Vec::new());
    let of_nothing = std::slice::from_ref(&nothing);
    let cached = cache.as_deref_mut();
    let cached = CachedSources::new(cached, backbone, vit, samples, of_nothing);
    let without_prompt = work.without_prompt(cached, &mut steps)?;
    let cached = CachedSources::new(cache, backbone, vit, samples, work.prompts);
    let (statistics, early_stop) = work.statistics(cached, without_prompt, &mut steps)?;
    steps.begin(Phase::Solve)?;
    let metadata = Metadata {
        format: Metadata::FORMAT,
        sources: work.recorded(&statistics, &mut steps)?,
        backbone_digest: backbone.digest,
        preprocessing_id: backbone.config.preprocessing.id(),
        precision: vit.compute.precision,
        sample_digest: samples.digest,
        classes: dataset.classes.clone(),
        objective: objective.clone(),
        gradient_normalization: (objective.alignment())
            .map(|alignment| alignment.gradient_normalization),
        token_alignment: inputs.token_alignment.clone(),
        seed: target.seed,
        skipped_images: samples.skipped,
    };
    let tick = &mut || stop_on(steps.tick(Phase::Solve));
    let pooled = Pooled::of(&statistics, &metadata, tick)?;
    let pool = pooled.as_ref().map(|pooled| &pooled.pool);
    let (solved, mut method) = work.weigh(statistics.ground(), pool, target_prompt, &mut steps)?;

    steps.begin(Phase::Verify)?;
    let (alpha, refinement) = work.refine(&solved, &mut steps)?;
    (method.uniform_mix, method.uniform_mix_candidates) = work.uniform_mix(&alpha, &mut steps)?;
    let alpha = towards_uniform(&alpha, method.uniform_mix);
    let (alpha, fallback) = work.fallback(alpha, statistics.ground(), &mut steps)?;
    method.fallback = fallback;
    (method.scale, method.scale_candidates) = work.scale(&alpha, &mut steps)?;
    let anchor = (objective.experimental.anchor_seed).or(inputs.init_seed);
    method.anchor_seed = anchor.filter(|_| method.scale != 1.0);
    let versions: Vec<Option<i32>> = sources.iter().map(|source| source.version).collect();
    let embeddings = work.composed(&alpha, method.scale);
    let mut composed = composed_prompt(&metadata, &versions, &alpha, embeddings);
    let (verified, logits) =
        work.verify(&mut composed, &solved, &statistics.features, &mut steps)?;
    let comparison = match (&pooled, logits, &inputs.eval) {
        (Some(pooled), Some(logits), Some(eval)) if objective.method() == Method::Pool => {
            work.compare(pooled, &logits, eval, &mut steps)?
        }
        _ => Vec::new(),
    };
    let evidence = Findings {
        metadata,
        versions,
        device: device::name_of(vit.device),
        solved_from: None,
        statistics: &statistics,
        solved,
        method,
        alpha,
        composed,
        verified: Some(verified),
        refinement,
        pooled,
        comparison,
        early_stop,
        fallback_dropped: false,
    };
    evidence.composition(steps)
}

/// The inputs before the first forward pass.
struct Inputs {
    dataset: LabelledImages,
    samples: Samples,
    eval: Option<Samples>,
    /// The sources' prompts, with their rows in the common order.
    prompts: Vec<PlainTensor<f32>>,
    token_alignment: Option<TokenAlignment>,
    /// Seed of the initial prompt that the sources share, if they state one.
    init_seed: Option<u64>,
    /// P₀, if the scale is not 1.
    anchor: Option<PlainTensor<f32>>,
}

impl Inputs {
    /// Reads and checks the inputs. From here on, images are decoded in the background.
    fn read(
        backbone: &Backbone,
        vit: &Vit,
        input: &CompositionInput,
        steps: &mut Steps<'_>,
    ) -> Result<Self, EngineError> {
        let CompositionInput {
            objective,
            target,
            sources,
            ..
        } = input;
        objective.check()?;
        check_sources(sources, backbone)?;
        let (prompts, token_alignment) = align(sources, objective.align_tokens)?;
        let init_seed = common_init_seed(sources);
        let anchor = match objective.experimental.scale == Scale::default() {
            true => None,
            false => {
                let seed = objective.experimental.anchor_seed.or(init_seed);
                Some(initial_prompt_of(&prompts[0], backbone, seed)?)
            }
        };
        let dataset = LabelledImages::read(&input.target_dir)?;

        steps.begin(Phase::Features)?;
        let selection = Selection::of_target(target);
        let preprocessing = &backbone.config.preprocessing;
        let samples = Samples::load(&dataset, &selection, preprocessing)?;
        samples.check_classes(&dataset.classes)?;
        // Checks that there are samples enough for the requested shrinkage.
        let (n, d) = (samples.len(), vit.config.embed_dim);
        objective.h_score.check_samples(n, d)?;
        // The evaluation images are loaded now, not when they are needed: an error in them should
        // show when they are decoded, behind the features, and not after hours.
        let load = |split| Samples::load(&dataset, &selection.whole(split), preprocessing);
        let eval = target.eval_split.map(load).transpose()?;
        Ok(Self {
            dataset,
            samples,
            eval,
            prompts,
            token_alignment,
            init_seed,
            anchor,
        })
    }

    fn work<'a>(
        &'a self,
        backbone: &'a Backbone,
        vit: &'a Vit,
        input: &'a CompositionInput,
        objective: &'a Objective,
    ) -> Workspace<'a> {
        Workspace {
            backbone,
            vit,
            samples: &self.samples,
            eval: self.eval.as_ref(),
            classes: &self.dataset.classes,
            seed: input.target.seed,
            init_seed: self.init_seed,
            anchor: self.anchor.as_ref(),
            objective,
            early_stopping: input.early_stopping,
            tensors: self.prompts.iter().map(|p| prompt_tensor(p, vit)).collect(),
            prompts: &self.prompts,
            sources: &input.sources,
        }
    }
}

/// P₀ in the shape of this prompt.
fn initial_prompt_of(
    prompt: &PlainTensor<f32>,
    backbone: &Backbone,
    init_seed: Option<u64>,
) -> Result<PlainTensor<f32>, EngineError> {
    let seed = init_seed.ok_or_else(|| InvalidObjective {
        field: "experimental.scale",
        problem: NO_ANCHOR.into(),
    })?;
    let [m, d] = [prompt.shape[0], prompt.shape[1]];
    let values = initial_prompt(m, d, backbone.config.patch_size, seed);
    Ok(PlainTensor::new([m, d], values))
}

/// The results of forward passes with the composed prompt itself.
pub struct Verified {
    pub score: PromptScore,
    pub baselines: Option<Baselines>,
}

/// Backbone, samples and prompts, for the steps with forward passes.
struct Workspace<'a> {
    backbone: &'a Backbone,
    vit: &'a Vit,
    samples: &'a Samples,
    eval: Option<&'a Samples>,
    /// The dataset's class names, whether the samples show them or not.
    classes: &'a [String],
    /// Seed of the choice of samples.
    seed: u64,
    /// Seed of the initial prompt that the sources share, if they state one.
    init_seed: Option<u64>,
    /// P₀, if the scale is not 1.
    anchor: Option<&'a PlainTensor<f32>>,
    objective: &'a Objective,
    early_stopping: Option<EarlyStopping>,
    sources: &'a [Source],
    /// The sources' prompts with their rows in the common order; `tensors` has the same on the
    /// device, [m, d] each.
    prompts: &'a [PlainTensor<f32>],
    tensors: Vec<Tensor>,
}

impl Workspace<'_> {
    /// The sources as the statistics record them, with their isolated scores.
    fn recorded(
        &self,
        statistics: &Statistics,
        steps: &mut Steps<'_>,
    ) -> Result<Vec<RecordedSource>, EngineError> {
        let Statistics {
            features, labels, ..
        } = statistics;
        let sources = self.sources.iter().enumerate();
        sources
            .map(|(i, source)| {
                stop_on(steps.tick(Phase::Solve))?;
                let metadata = source.file.metadata.as_ref();
                Ok(RecordedSource {
                    prompt: source.prompt.clone(),
                    digest: source.digest,
                    init_seed: metadata.and_then(|metadata| metadata.init_seed),
                    scores: SourceScores::of(&features.get(i as i64), labels, &source.file)?,
                })
            })
            .collect()
    }

    /// Cross-fitted results of the path's composed prompts, with a forward pass for each that
    /// differs from the one before.
    fn validate(
        &self,
        path: &[PathPoint],
        steps: &mut Steps<'_>,
    ) -> Result<Vec<OnUnseen>, EngineError> {
        let objective = self.objective;
        let evaluation = self.evaluation(&objective.h_score);
        let mut of_points: Vec<OnUnseen> = Vec::with_capacity(path.len());
        for (i, point) in path.iter().enumerate() {
            if i > 0 && point.weights == path[i - 1].weights {
                of_points.push(of_points[i - 1]);
                continue;
            }
            let experimental = &objective.experimental;
            let (share, scale) = (experimental.uniform_mix.known(), experimental.scale.known());
            let composed = self.composed(&towards_uniform(&point.weights, share), scale);
            let prompt = prompt_tensor(&composed, self.vit);
            let tick = |_| steps.tick(Phase::Solve);
            of_points.push(evaluation.cross_fitted(&prompt, tick)?);
        }
        Ok(of_points)
    }

    /// The solver's α, refined on the true objective if that was requested.
    fn refine(
        &self,
        solved: &Solved,
        steps: &mut Steps<'_>,
    ) -> Result<(Vec<f64>, Option<Refinement>), EngineError> {
        let alpha = &solved.solution.alpha;
        let steps_asked = self.objective.experimental.refine;
        if steps_asked == 0 || alpha.len() == 1 {
            return Ok((alpha.clone(), None));
        }
        let refiner = Refiner {
            vit: self.vit,
            samples: self.samples,
            prompts: &self.tensors,
            alignment: &solved.alignment,
            scale: solved.solution.scale,
            h_score: self.h_score_as_used(solved),
        };
        let tick = &mut || stop_on(steps.tick(Phase::Verify));
        let (alpha, refinement) = refiner.refine(alpha, steps_asked, tick)?;
        Ok((alpha, Some(refinement)))
    }

    /// Scores the composed prompt and gives it its head. If there are images to compare on, it also
    /// scores the uniform average and the source with the highest H of its own. The second value are the composed prompt's
    /// logits of these images.
    fn verify(
        &self,
        composed: &mut PromptFile,
        solved: &Solved,
        features: &Tensor,
        steps: &mut Steps<'_>,
    ) -> Result<(Verified, Option<Tensor>), EngineError> {
        let options = self.h_score_as_used(solved);
        let evaluation = self.evaluation(&options);
        let compares = self.eval.is_some() && self.objective.method().weighs();
        let anew = evaluation.work(false);
        let mut count = steps.counter(if compares {
            2 * anew + evaluation.work(true)
        } else {
            anew
        });
        let evaluated = evaluation.run(
            &prompt_tensor(&composed.prompt_embeddings, self.vit),
            None,
            &mut count,
        )?;
        composed.head = Some(evaluated.head.to_prompt_head()?);
        let mut baselines = None;
        if compares {
            let m = self.sources.len();
            let uniform = prompt_tensor(&self.composed(&uniform(m), 1.0), self.vit);
            let uniform = evaluation.run(&uniform, None, &mut count)?;
            let own = &solved.solution.own_h_scores;
            let best = (0..m)
                .max_by(|a, b| own[*a].total_cmp(&own[*b]).then(b.cmp(a)))
                .expect("there are sources");
            let of_best = features.get(best as i64);
            let best_single = evaluation.run(&self.tensors[best], Some(of_best), &mut count)?;
            baselines = Some(Baselines {
                uniform: uniform.score,
                best_single: best_single.score,
                best_single_prompt: self.sources[best].prompt.clone(),
            });
        }
        let verified = Verified {
            score: evaluated.score,
            baselines,
        };
        Ok((verified, evaluated.eval_logits))
    }

    /// A prompt without tokens, [0, d].
    fn no_prompt(&self) -> Tensor {
        let shape = [0, self.vit.embed_dim()];
        Tensor::zeros(shape, (self.vit.kind, self.vit.device))
    }

    fn evaluation<'b>(&'b self, h_score: &'b HScoreOptions) -> Evaluation<'b> {
        Evaluation {
            vit: self.vit,
            train: self.samples,
            eval: self.eval,
            num_classes: self.classes.len(),
            h_score,
            head: &self.objective.head,
        }
    }

    /// The H-score's options with the ρ that α was solved with.
    fn h_score_as_used(&self, solved: &Solved) -> HScoreOptions {
        let asked = &self.objective.h_score;
        HScoreOptions {
            shrinkage: (solved.h_score.shrinkage())
                .map(Shrinkage::Fixed)
                .or(asked.shrinkage),
            ..asked.clone()
        }
    }

    /// P₀ + β Σ αᵢ (Pᵢ - P₀) [m, d], as in the composed prompt's file.
    fn composed(&self, alpha: &[f64], scale: f64) -> PlainTensor<f32> {
        anchored(self.prompts, alpha, self.anchor, scale)
    }

    fn cross_fitted(&self, features: &Tensor) -> Result<OnUnseen, EngineError> {
        let labels = &self.samples.labels;
        cross_fitted(features, labels, self.classes.len(), &self.objective.head)
    }
}

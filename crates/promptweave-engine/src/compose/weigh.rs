//! The weights α by the requested method, their share of equal weights, and the scale of the
//! composed prompt.

use std::time::Instant;

use tch::{Kind, Tensor};

use crate::baselines::{
    effects, most_similar, proportional, scores, similarity, single_best, towards_uniform,
};
use crate::compose::Workspace;
use crate::compose::steps::{Steps, stop_on};
use crate::error::EngineError;
use crate::pool::Pool;
use crate::score::evaluate::OnUnseen;
use crate::solve::{Solved, Validate, weigh_features};
use crate::statistics::SolveInputs;
use crate::tensors::prompt_tensor;
use crate::tune::{Attention, Tuning};
use crate::vit::features::extract;
use promptweave_domain::composition::{FallbackReport, MethodReport, ScalePoint, UniformMixPoint};
use promptweave_domain::digest::Digest;
use promptweave_domain::method::{Criterion, Scale, SpotChoice, UniformMix};
use promptweave_domain::objective::{MethodOptions, Spot, TARGET_EPOCHS};
use promptweave_domain::phase::Phase;
use promptweave_domain::tensor::Tensor as PlainTensor;
use promptweave_domain::tuning::{NoCheckpoints, TuningOptions};

/// The prompt last tuned on a target, kept for another method that compares with the same one.
pub struct TargetPrompt {
    /// Digest of everything that the prompt depends on.
    key: Digest,
    pub(super) embeddings: PlainTensor<f32>,
    pub(super) seconds: f64,
}

impl Workspace<'_> {
    /// The weights α, and the report of how they were found.
    pub(super) fn weigh(
        &self,
        ground: SolveInputs<'_>,
        pool: Option<&Pool>,
        last: &mut Option<TargetPrompt>,
        steps: &mut Steps<'_>,
    ) -> Result<(Solved, MethodReport), EngineError> {
        let objective = self.objective;
        let (alpha, scores, seconds) = match &objective.options {
            MethodOptions::Attempt(_) => self.by_attention(steps)?,
            MethodOptions::Panda(_) => {
                let target = self.target_prompt(last.take(), steps)?;
                let (alpha, scores) =
                    self.by_effects(ground.features, &target.embeddings, steps)?;
                (alpha, scores, last.insert(target).seconds)
            }
            MethodOptions::Spot(spot) => {
                let target = self.target_prompt(last.take(), steps)?;
                let (alpha, scores) =
                    self.by_similarity(ground, spot, &target.embeddings, steps)?;
                (alpha, scores, last.insert(target).seconds)
            }
            _ => {
                let classes = self.classes.len();
                let validate: Validate<'_> = &mut |path, steps| self.validate(path, steps);
                return weigh_features(ground, pool, objective, classes, steps, validate);
            }
        };
        let report = MethodReport {
            name: objective.method(),
            scores: Some(scores),
            target_tuning_seconds: Some(seconds),
            ..MethodReport::default()
        };
        Ok((Solved::given(ground, objective, alpha)?, report))
    }

    /// Options of the short tuning on the target samples, which starts where the sources began.
    fn target_options(&self) -> TuningOptions {
        TuningOptions {
            num_tokens: self.prompts[0].shape[0],
            init_seed: self.init_seed.unwrap_or_default(),
            seed: self.seed,
            epochs: self.objective.target_epochs().unwrap_or(TARGET_EPOCHS) as usize,
            sketch_samples: 0,
            ..TuningOptions::default()
        }
    }

    fn target_tuning<'b>(&'b self, options: &'b TuningOptions) -> Tuning<'b> {
        Tuning {
            backbone: self.backbone,
            vit: self.vit,
            train: self.samples,
            held_out: None,
            task: "target",
            classes: self.classes,
            start: None,
            takes_head: false,
            teachers: &[],
            options,
        }
    }

    /// A prompt tuned on the target samples for a few epochs, from where the sources began. If
    /// `last` is that prompt, it is returned.
    pub(super) fn target_prompt(
        &self,
        last: Option<TargetPrompt>,
        steps: &mut Steps<'_>,
    ) -> Result<TargetPrompt, EngineError> {
        let options = self.target_options();
        let of = (
            self.backbone.digest,
            self.samples.digest,
            self.vit.compute.precision,
            &options,
        );
        let key = Digest::of(&serde_json::to_vec(&of).expect("plain data"));
        if let Some(last) = last.filter(|last| last.key == key) {
            return Ok(last);
        }
        let begun = Instant::now();
        let mut count = steps.counter((options.epochs * self.samples.len()) as u64);
        let tuning = self.target_tuning(&options);
        let file = tuning.run(&mut NoCheckpoints, |at| count(at.samples))?;
        Ok(TargetPrompt {
            key,
            embeddings: file.prompt_embeddings,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    /// ATTEMPT: weights by mean attention to each source, and the seconds that learning took.
    fn by_attention(
        &self,
        steps: &mut Steps<'_>,
    ) -> Result<(Vec<f64>, Vec<f64>, f64), EngineError> {
        let begun = Instant::now();
        let options = self.target_options();
        let mut count = steps.counter((options.epochs * self.samples.len()) as u64);
        let model = Attention::new(self.target_tuning(&options), self.prompts)?;
        let attention = model.learn(&mut |at| count(at.samples))?;
        let alpha = proportional(&attention, None);
        Ok((alpha, attention, begun.elapsed().as_secs_f64()))
    }

    /// SPoT: weights by similarity of prompts.
    fn by_similarity(
        &self,
        ground: SolveInputs<'_>,
        spot: &Spot,
        target: &PlainTensor<f32>,
        steps: &mut Steps<'_>,
    ) -> Result<(Vec<f64>, Vec<f64>), EngineError> {
        let similarities: Vec<f64> = (self.prompts.iter())
            .map(|prompt| similarity(spot.similarity, prompt, target))
            .collect();
        let alpha = match spot.choice {
            SpotChoice::WeightedAverage => proportional(&similarities, spot.top_k),
            SpotChoice::BestOf => {
                let mut scores = vec![f64::NEG_INFINITY; similarities.len()];
                for i in most_similar(&similarities, spot.top_k) {
                    stop_on(steps.tick(Phase::Solve))?;
                    let features = ground.features.get(i as i64);
                    scores[i] = -self.cross_fitted(&features)?.loss;
                }
                single_best(&scores)
            }
        };
        Ok((alpha, similarities))
    }

    /// PANDA: weights by similarity of the prompts' effects.
    pub(super) fn by_effects(
        &self,
        features: &Tensor,
        target: &PlainTensor<f32>,
        steps: &mut Steps<'_>,
    ) -> Result<(Vec<f64>, Vec<f64>), EngineError> {
        let mut features_of = |prompt: Tensor| -> Result<Tensor, EngineError> {
            let prompts = [prompt];
            let pairs = self.vit.pairs(self.samples, &prompts);
            Ok(extract(self.vit, &pairs, |_| steps.tick(Phase::Solve))?.get(0))
        };
        let without = features_of(self.no_prompt())?;
        let with = features_of(prompt_tensor(target, self.vit))?;
        let similarities = effects(&features.to_kind(Kind::Double), &without, &with);
        Ok((proportional(&similarities, None), similarities))
    }

    /// γ as requested, or the candidate that does best on the target samples.
    pub(super) fn uniform_mix(
        &self,
        alpha: &[f64],
        steps: &mut Steps<'_>,
    ) -> Result<(f64, Vec<UniformMixPoint>), EngineError> {
        let candidates = match self.objective.experimental.uniform_mix {
            UniformMix::Value(share) => return Ok((share, Vec::new())),
            UniformMix::Chosen(_) => UniformMix::CANDIDATES,
        };
        let scale = self.objective.experimental.scale.known();
        let composed = |share: f64| self.composed(&towards_uniform(alpha, share), scale);
        let (best, points) = self.best_of(&candidates, composed, steps)?;
        let point = |(uniform_mix, validation): (f64, OnUnseen)| UniformMixPoint {
            uniform_mix,
            validation_accuracy: validation.accuracy,
            validation_loss: validation.loss,
        };
        Ok((best, points.into_iter().map(point).collect()))
    }

    /// α; or all weight on the single best source, if a fallback is requested and that source does
    /// better on the target samples.
    pub(super) fn fallback(
        &self,
        alpha: Vec<f64>,
        ground: SolveInputs<'_>,
        steps: &mut Steps<'_>,
    ) -> Result<(Vec<f64>, Option<FallbackReport>), EngineError> {
        if !self.objective.falls_back() {
            return Ok((alpha, None));
        }
        let by = Criterion::Validation;
        let tick = &mut || stop_on(steps.tick(Phase::Verify));
        let of_sources = scores(by, ground, self.objective, self.classes.len(), tick)?;
        let single = single_best(&of_sources);
        let at = (single.iter().position(|weight| *weight > 0.0)).expect("it has all weight");
        let scale = self.objective.experimental.scale.known();
        let evaluation = self.evaluation(&self.objective.h_score);
        let mut loss_of = |weights: &[f64]| -> Result<f64, EngineError> {
            let prompt = prompt_tensor(&self.composed(weights, scale), self.vit);
            let tick = |_| steps.tick(Phase::Verify);
            Ok(evaluation.cross_fitted(&prompt, tick)?.loss)
        };
        // At scale 1 the source is used as it is, and its features are at hand.
        let validation_loss = match scale == 1.0 {
            true => -of_sources[at],
            false => loss_of(&single)?,
        };
        let composed_validation_loss = match alpha == single {
            true => validation_loss,
            false => loss_of(&alpha)?,
        };
        let report = FallbackReport {
            prompt: self.sources[at].prompt.clone(),
            validation_loss,
            composed_validation_loss,
            taken: validation_loss < composed_validation_loss,
        };
        let alpha = if report.taken { single } else { alpha };
        Ok((alpha, Some(report)))
    }

    /// β as requested, or the candidate that does best on the target samples.
    pub(super) fn scale(
        &self,
        alpha: &[f64],
        steps: &mut Steps<'_>,
    ) -> Result<(f64, Vec<ScalePoint>), EngineError> {
        let candidates = match self.objective.experimental.scale {
            Scale::Value(scale) => return Ok((scale, Vec::new())),
            Scale::Chosen(_) => Scale::CANDIDATES,
        };
        let composed = |scale: f64| self.composed(alpha, scale);
        let (best, points) = self.best_of(&candidates, composed, steps)?;
        let point = |(scale, validation): (f64, OnUnseen)| ScalePoint {
            scale,
            validation_accuracy: validation.accuracy,
            validation_loss: Some(validation.loss),
        };
        Ok((best, points.into_iter().map(point).collect()))
    }

    /// The candidate whose prompt has the lowest cross-fitted loss on the target samples (of equals
    /// the last), and every candidate's result.
    fn best_of(
        &self,
        candidates: &[f64],
        composed: impl Fn(f64) -> PlainTensor<f32>,
        steps: &mut Steps<'_>,
    ) -> Result<(f64, Vec<(f64, OnUnseen)>), EngineError> {
        let evaluation = self.evaluation(&self.objective.h_score);
        let mut points: Vec<(f64, OnUnseen)> = Vec::with_capacity(candidates.len());
        let mut last: Option<(PlainTensor<f32>, OnUnseen)> = None;
        for candidate in candidates {
            let prompt = composed(*candidate);
            // With one source, or equal weights, all candidates are the same prompt.
            let found = match last.filter(|(before, _)| *before == prompt) {
                Some((_, found)) => found,
                None => {
                    let tick = |_| steps.tick(Phase::Verify);
                    evaluation.cross_fitted(&prompt_tensor(&prompt, self.vit), tick)?
                }
            };
            points.push((*candidate, found));
            last = Some((prompt, found));
        }
        let (best, _) = points
            .iter()
            .max_by(|(_, a), (_, b)| b.loss.total_cmp(&a.loss))
            .expect("there are candidates");
        Ok((*best, points))
    }
}

//! Metrics of single sources, with the same features as a composition's.

use crate::baselines::similarity;
use crate::cache::{CachedSources, ResultCache};
use crate::compose::steps::Steps;
use crate::compose::{Inputs, TargetPrompt};
use crate::error::EngineError;
use crate::score::h_score::HScore;
use crate::score::transferability::SourceScores;
use crate::solve::solver::{own_h_scores, towards_vertex};
use crate::vit::Vit;
use promptweave_domain::composer::Observer;
use promptweave_domain::composition::CompositionInput;
use promptweave_domain::method::Similarity;
use promptweave_domain::objective::HScoreOptions;
use promptweave_domain::phase::Phase;
use promptweave_domain::ranking::{RankedSource, Ranking};
use promptweave_formats::backbone::Backbone;

/// Scores every source for the target. Of the objective only `h_score` and `target_epochs` matter.
pub fn rank(
    backbone: &Backbone,
    vit: &Vit,
    cache: Option<&mut ResultCache>,
    target_prompt: &mut Option<TargetPrompt>,
    input: &CompositionInput,
    observer: &mut dyn Observer,
) -> Result<Ranking, EngineError> {
    let mut steps = Steps::new(observer);
    let inputs = Inputs::read(backbone, vit, input, &mut steps)?;
    let work = inputs.work(backbone, vit, input, &input.objective);
    let mut cached = CachedSources::new(cache, backbone, vit, &inputs.samples, work.prompts);
    let (features, _) = work.all_features(&mut cached, &mut steps)?;

    steps.begin(Phase::Solve)?;
    let labels = &inputs.samples.labels;
    let options = &input.objective.h_score;
    let cross_validated = HScoreOptions {
        standardise: options.standardise,
        ..HScoreOptions::default()
    };
    let cross_validated = own_h_scores(&HScore::new(&features, labels, &cross_validated)?)?;
    let h_score = HScore::new(&features, labels, options)?;
    let target = work.target_prompt(target_prompt.take(), &mut steps)?;
    let (_, panda) = work.by_effects(&features, &target.embeddings, &mut steps)?;
    let m = work.prompts.len();
    let of_source = |i: usize| {
        let source = &input.sources[i];
        let alone = towards_vertex(i, m, 1.0);
        let scores = SourceScores::of(&features.get(i as i64), labels, &source.file)?;
        let to_target = |kind| similarity(kind, &work.prompts[i], &target.embeddings);
        Ok(RankedSource {
            prompt: source.prompt.clone(),
            digest: source.digest,
            h_score: h_score.value(&alone)?,
            h_score_adjusted: h_score.adjusted(&alone)?,
            h_score_cross_validated: cross_validated[i],
            logme: scores.logme,
            leep: scores.leep,
            nce: scores.nce,
            otce: scores.otce,
            spot_token_mean: to_target(Similarity::TokenMean),
            spot_all_pairs: to_target(Similarity::AllPairs),
            panda: panda[i],
        })
    };
    let ranking = Ranking {
        sources: (0..m).map(of_source).collect::<Result<_, EngineError>>()?,
        num_samples: labels.len(),
        target_tuning_seconds: target.seconds,
    };
    *target_prompt = Some(target);
    Ok(ranking)
}

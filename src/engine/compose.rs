//! The whole method, step by step.

use tch::Tensor;

use super::alignment::GradientAlignment;
use super::evaluate::Evaluation;
use super::features::extract;
use super::gradients::{accumulate, sample_folds};
use super::h_score::HScore;
use super::head::{fit_heads, folds};
use super::report::Evidence;
use super::samples::{Samples, Selection};
use super::solver::Solver;
use super::sources::{check_sources, composed_prompt, mix};
use super::steps::{Steps, stop_on};
use super::vit::Vit;
use super::{EngineError, prompt_tensor};
use crate::domain::backbone::Backbone;
use crate::domain::composition::{
    Baselines, Composition, CompositionInput, Observer, Phase, PromptScore,
};
use crate::domain::dataset::LabelledImages;
use crate::domain::objective::Shrinkage;
use crate::domain::prompt_file::PromptFile;

pub fn compose(
    backbone: &Backbone,
    vit: &Vit,
    input: &CompositionInput,
    observer: &mut dyn Observer,
) -> Result<Composition, EngineError> {
    let CompositionInput {
        sources,
        objective,
        target,
        ..
    } = input;
    let mut steps = Steps::new(observer);
    let weighing = objective.weighing()?;
    let h_score_shrinkage = match objective.h_score.shrinkage {
        Shrinkage::Fixed(rho) => rho,
        Shrinkage::Estimated(_) => 0.01,
    };
    check_sources(sources, backbone)?;
    let dataset = LabelledImages::read(&input.target_dir)?;
    let num_classes = dataset.classes.len();

    steps.begin(Phase::Features)?;
    let selection = Selection {
        split: target.split,
        max_samples: Some(target.max_samples),
        seed: target.seed,
        skip_bad: target.skip_bad,
    };
    let samples = Samples::load(&dataset, &selection, &backbone.config.preprocessing)?;
    check_classes(&samples, &dataset)?;
    // Now and not when it is needed: what is wrong with these images should not show after hours.
    let eval = match target.eval_split {
        None => None,
        Some(split) => {
            let all = Selection {
                split,
                max_samples: None,
                ..selection
            };
            Some(Samples::load(
                &dataset,
                &all,
                &backbone.config.preprocessing,
            )?)
        }
    };
    let prompts: Vec<Tensor> = sources
        .iter()
        .map(|s| prompt_tensor(&s.file, vit))
        .collect();
    let m = prompts.len();
    let pairs = (samples.len() * m) as u64;
    let features = extract(vit, &samples, &prompts, steps.counter(pairs))?;

    steps.begin(Phase::Heads)?;
    let folds = folds(&samples.labels, vit.config.embed_dim);
    let mut count = steps.counter(m as u64);
    let heads = fit_heads(
        &features,
        &samples.labels,
        &folds,
        num_classes,
        &objective.head,
        &mut || stop_on(count(1)),
    )?;
    drop(count);

    steps.begin(Phase::Gradients)?;
    let count = steps.counter(pairs);
    let by_sample = sample_folds(&samples.labels);
    let gradients = accumulate(vit, &samples, &prompts, &heads, &folds, &by_sample, count)?
        .finish(objective.alignment.gradient_norm)?;

    steps.begin(Phase::Solve)?;
    let h_score = HScore::new(&features, &samples.labels, h_score_shrinkage)?;
    let alignment = GradientAlignment::new(objective.alignment.reading, gradients.whole.clone());
    let solver = Solver {
        h_score: &h_score,
        alignment: &alignment,
        num_sources: m,
        tick: &mut || stop_on(steps.tick(Phase::Solve)),
    };
    let solution = solver.solve(weighing)?;
    let own_h_scores = (0..m)
        .map(|i| h_score.value(&vertex(i, m)))
        .collect::<Result<Vec<_>, _>>()?;

    steps.begin(Phase::Verify)?;
    let evaluation = Evaluation {
        vit,
        train: &samples,
        eval: eval.as_ref(),
        num_classes,
        h_score_shrinkage,
        head: &objective.head,
    };
    let best = (0..m)
        .max_by(|a, b| own_h_scores[*a].total_cmp(&own_h_scores[*b]))
        .expect("m > 0");
    let best = BestSingle {
        name: &sources[best].prompt,
        prompt: &prompts[best],
        features: features.get(best as i64),
    };
    let composed = composed_prompt(sources, mix(sources, &solution.alpha), backbone, &dataset);
    let verified = verify(&evaluation, composed, input, best, &mut steps)?;

    let evidence = Evidence {
        backbone,
        vit,
        input,
        weighing,
        dataset: &dataset,
        samples: &samples,
        features: &features,
        folds: &folds,
        heads: &heads,
        gradients,
        own_h_scores,
        solution,
        verified,
    };
    evidence.composition(steps.finish())
}

/// What forward passes with the composed prompt itself showed.
pub struct Verified {
    /// With its closed-form head.
    pub composed: PromptFile,
    pub score: PromptScore,
    pub baselines: Option<Baselines>,
}

/// The source with the highest H of its own.
struct BestSingle<'a> {
    name: &'a str,
    /// [m, d]
    prompt: &'a Tensor,
    /// [N, d], of the target samples.
    features: Tensor,
}

/// Scores the composed prompt and, where there are images to compare on, uniform average and the best
/// single source.
fn verify(
    evaluation: &Evaluation<'_>,
    mut composed: PromptFile,
    input: &CompositionInput,
    best: BestSingle<'_>,
    steps: &mut Steps<'_>,
) -> Result<Verified, EngineError> {
    let vit = evaluation.vit;
    let compares = evaluation.eval.is_some();
    let anew = evaluation.work(false);
    let mut count = steps.counter(if compares {
        2 * anew + evaluation.work(true)
    } else {
        anew
    });
    let evaluated = evaluation.run(&prompt_tensor(&composed, vit), None, &mut count)?;
    composed.head = Some(evaluated.head.to_prompt_head()?);
    let baselines = if compares {
        let m = input.sources.len();
        let mut uniform = composed.clone();
        uniform.prompt_embeddings.values = mix(&input.sources, &vec![1.0 / m as f64; m]);
        let uniform = evaluation.run(&prompt_tensor(&uniform, vit), None, &mut count)?;
        let best_single = evaluation.run(best.prompt, Some(best.features), &mut count)?;
        Some(Baselines {
            uniform: uniform.score,
            best_single: best_single.score,
            best_single_prompt: best.name.to_owned(),
        })
    } else {
        None
    };
    Ok(Verified {
        composed,
        score: evaluated.score,
        baselines,
    })
}

/// At least two classes must be present: with one, nothing can be told apart.
fn check_classes(samples: &Samples, dataset: &LabelledImages) -> Result<(), EngineError> {
    let first = samples.labels[0];
    if samples.labels.iter().all(|label| *label == first) {
        return Err(EngineError::OneClass(dataset.classes[first].clone()));
    }
    Ok(())
}

/// eᵢ
fn vertex(i: usize, m: usize) -> Vec<f64> {
    (0..m).map(|j| f64::from(u8::from(i == j))).collect()
}

//! Every transfer method on the tiny task: the same request, the method's definition, and the same
//! form of answer.

use std::ops::ControlFlow;
use std::path::Path;

use serde_json::json;
use tch::{Device, Tensor};

use crate::Engine;
use crate::compose::self_test;
use crate::pool::EPSILON;
use crate::predict::Predictor;
use crate::samples::{Samples, Selection};
use crate::score::evaluate::{correct, cross_entropy};
use crate::testing::{Recorder, assert_close};
use crate::vit::Vit;
use promptweave_domain::composer::{Composer as _, Composition, CompositionError};
use promptweave_domain::composition::{CompositionInput, Prediction, SolveInput, SourceRef};
use promptweave_domain::digest::Digest;
use promptweave_domain::ensemble_file::EnsembleFile;
use promptweave_domain::method::{Method, Scale, UniformMix};
use promptweave_domain::mixture::mix;
use promptweave_domain::phase::Phase;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::split::Split;
use promptweave_formats::dataset::LabelledImages;

fn job(dir: &Path, objective: serde_json::Value) -> CompositionInput {
    CompositionInput {
        objective: serde_json::from_value(objective).unwrap(),
        ..self_test::job(dir).unwrap()
    }
}

fn compose(input: &CompositionInput) -> (Composition, Vec<Phase>) {
    let mut recorder = Recorder::default();
    let composed = Engine::new(Device::Cpu).compose(input, &mut recorder);
    let mut phases: Vec<Phase> = recorder.seen.iter().map(|(phase, ..)| *phase).collect();
    phases.dedup();
    (composed.unwrap(), phases)
}

fn weights(composition: &Composition) -> Vec<f64> {
    let sources = composition.result.source_weights.iter();
    sources.map(|source| source.weight).collect()
}

fn refused(error: CompositionError) -> String {
    match error {
        CompositionError::Refused { detail, .. } => detail,
        other => panic!("{other:?}"),
    }
}

/// The composed prompt, as its file has it.
fn composed(composition: &Composition) -> promptweave_domain::tensor::Tensor<f32> {
    PromptFile::parse(&composition.composed)
        .unwrap()
        .prompt_embeddings
}

#[test]
fn average_and_single_best_give_the_weights_that_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let input = job(dir.path(), json!({"method": "average"}));
    let (average, phases) = compose(&input);
    assert_eq!(weights(&average), [1.0 / 3.0; 3]);
    // Three quarters of the work are not done.
    assert!(!phases.contains(&Phase::Gradients), "{phases:?}");
    let result = &average.result;
    assert_eq!(result.method.name, Method::Average);
    assert_eq!(
        (result.objective.gradient_alignment, &result.solver),
        (None, &None)
    );
    assert!(result.pareto_path.is_empty() && result.local_optima.is_empty());
    assert!(
        result
            .diagnostics
            .per_source
            .iter()
            .all(|s| s.gradient_rms.is_none())
    );
    let prompts: Vec<_> = (input.sources.iter())
        .map(|source| source.file.prompt_embeddings.clone())
        .collect();
    assert_eq!(composed(&average), mix(&prompts, &[1.0 / 3.0; 3]));

    for by in ["h_score", "logme", "validation"] {
        let objective = json!({"method": "single_best", "by": by});
        let (best, _) = compose(&job(dir.path(), objective));
        let scores = best.result.method.scores.clone().unwrap();
        let highest = scores.iter().copied().fold(f64::MIN, f64::max);
        let at = weights(&best).iter().position(|w| *w == 1.0).unwrap();
        assert_eq!(scores[at], highest, "{by}");
        assert_eq!(composed(&best), prompts[at]);
        let own = &best.result.diagnostics.per_source;
        for (score, own) in scores.iter().zip(own) {
            match by {
                "h_score" => assert_eq!(*score, own.h_score),
                "logme" => assert_close(*score, own.logme.unwrap(), 1e-12),
                _ => assert!(*score <= 0.0),
            }
        }
    }
}

#[test]
fn the_ablations_are_the_ends_of_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let of = |objective| compose(&job(dir.path(), objective));
    let (h_only, phases) = of(json!({"method": "h_only"}));
    assert!(!phases.contains(&Phase::Gradients));
    let (at_0, _) = of(json!({"trade_off": 0, "fallback": "none"}));
    let (alignment_only, _) = of(json!({"method": "alignment_only"}));
    let (at_1, _) = of(json!({"trade_off": 1, "fallback": "none"}));
    assert_close(
        h_only.result.objective.h_score,
        at_0.result.objective.h_score,
        1e-9,
    );
    assert_eq!(weights(&alignment_only), weights(&at_1));
    // Among all methods, none has a higher H, and none a lower L_align.
    let (hgprompt, _) = of(json!({"fallback": "none"}));
    assert!(h_only.result.objective.h_score >= hgprompt.result.objective.h_score - 1e-9);
    let l = |c: &Composition| c.result.objective.gradient_alignment.unwrap();
    assert!(l(&alignment_only) <= l(&hgprompt) + 1e-12);
}

#[test]
fn methods_that_tune_on_the_target_say_how_long_it_took_and_weigh_by_cosines() {
    let dir = tempfile::tempdir().unwrap();
    for method in ["spot", "panda", "attempt"] {
        let objective = json!({"method": method, "target_epochs": 2});
        let (composition, phases) = compose(&job(dir.path(), objective));
        let report = &composition.result.method;
        let scores = report.scores.clone().unwrap();
        assert!(
            scores.iter().all(|s| (-1.0..=1.0).contains(s)),
            "{scores:?}"
        );
        assert!(report.target_tuning_seconds.unwrap() > 0.0);
        assert!(!phases.contains(&Phase::Gradients));
        let sum: f64 = scores.iter().map(|s| s.max(0.0)).sum();
        for (weight, score) in weights(&composition).iter().zip(&scores) {
            let expected = if sum > 0.0 {
                score.max(0.0) / sum
            } else {
                1.0 / 3.0
            };
            assert_close(*weight, expected, 1e-12);
        }
    }
    let spot =
        json!({"method": "spot", "top_k": 2, "choice": "best_of", "similarity": "token_mean"});
    let (best_of, _) = compose(&job(dir.path(), spot));
    let scores = best_of.result.method.scores.clone().unwrap();
    let least = (0..3)
        .min_by(|a, b| scores[*a].total_cmp(&scores[*b]))
        .unwrap();
    let chosen = weights(&best_of).iter().position(|w| *w == 1.0).unwrap();
    assert_ne!(chosen, least);
}

#[test]
fn a_uniform_mix_goes_from_the_methods_weights_to_equal_ones() {
    let dir = tempfile::tempdir().unwrap();
    let of = |share: serde_json::Value| {
        let objective = json!({
            "method": "h_only",
            "h_score": {"shrinkage": 0.5},
            "experimental": {"uniform_mix": share},
        });
        compose(&job(dir.path(), objective)).0
    };
    let [own, part, equal] = [0.0, 0.25, 1.0].map(|share| of(json!(share)));
    for ((own, part), equal) in (weights(&own).iter().zip(weights(&part))).zip(weights(&equal)) {
        assert_close(part, 0.75 * own + 0.25 / 3.0, 1e-12);
        assert_close(equal, 1.0 / 3.0, 1e-12);
    }
    // What is reported about α refers to these weights.
    let of_source = |composition: &Composition| composition.result.source_weights[0].clone();
    let errors = [&own, &part].map(|composition| of_source(composition).standard_error.unwrap());
    assert_close(errors[1], 0.75 * errors[0], 1e-12);
    let objective = |composition: &Composition| composition.result.objective.h_score;
    assert!(objective(&part) < objective(&own));
    let (average, _) = compose(&job(dir.path(), json!({"method": "average"})));
    assert_eq!(composed(&equal), composed(&average));

    let auto = of(json!("auto"));
    let method = &auto.result.method;
    let losses = method
        .uniform_mix_candidates
        .iter()
        .map(|p| p.validation_loss);
    let least = losses.fold(f64::INFINITY, f64::min);
    let of_least = (method.uniform_mix_candidates.iter()).rfind(|p| p.validation_loss == least);
    assert_eq!(
        method.uniform_mix_candidates.len(),
        UniformMix::CANDIDATES.len()
    );
    assert_eq!(Some(method.uniform_mix), of_least.map(|p| p.uniform_mix));
    assert_eq!(composed(&auto), composed(&of(json!(method.uniform_mix))));
}

/// Whatever the method, the answer is the better of its prompt and the single best, and tells
/// which.
#[test]
fn a_fallback_is_the_single_best_where_the_composed_prompt_is_worse() {
    let dir = tempfile::tempdir().unwrap();
    let of = |objective: serde_json::Value| compose(&job(dir.path(), objective)).0;
    let single = of(json!({"method": "single_best", "by": "validation"}));
    let loss = |composition: &Composition| {
        let composed = composition
            .result
            .diagnostics
            .composed_score
            .as_ref()
            .unwrap();
        composed.validation_loss.unwrap()
    };
    let mut taken = Vec::new();
    for mut objective in [
        json!({"method": "average"}),
        json!({"method": "h_only", "h_score": {"shrinkage": 0.5}}),
        json!({}),
        // All weight is on the worst source.
        json!({"method": "spot", "top_k": 1, "target_epochs": 1}),
    ] {
        objective["fallback"] = json!("none");
        let own = of(objective.clone());
        assert!(own.result.method.fallback.is_none());
        objective["fallback"] = json!("single_best");
        let guarded = of(objective);
        let report = guarded.result.method.fallback.clone().unwrap();
        assert_close(report.composed_validation_loss, loss(&own), 1e-9);
        assert_close(report.validation_loss, loss(&single), 1e-9);
        let better = if loss(&single) < loss(&own) {
            &single
        } else {
            &own
        };
        assert_eq!(report.taken, std::ptr::eq(better, &single));
        assert_eq!(composed(&guarded), composed(better));
        let error = guarded.result.source_weights[0].standard_error;
        assert!(!report.taken || error.is_none());
        let warnings = guarded.result.warnings.iter();
        let told = warnings
            .filter(|warning| warning.code == "fell_back")
            .count();
        assert_eq!(told, usize::from(report.taken));
        taken.push(report.taken);
    }
    assert!(taken.contains(&true), "{taken:?}");
    // The fallback is there by default.
    let by_default = of(json!({}));
    assert_eq!(by_default.result.method.fallback.unwrap().taken, taken[2]);

    // A single source is no worse than itself.
    let mut alone = job(dir.path(), json!({"fallback": "single_best"}));
    alone.sources.truncate(1);
    let (alone, _) = compose(&alone);
    assert!(!alone.result.method.fallback.unwrap().taken);
}

#[test]
fn a_scale_goes_from_the_initial_prompt_to_the_sum() {
    let dir = tempfile::tempdir().unwrap();
    let of = |scale: serde_json::Value| {
        let objective =
            json!({"method": "average", "experimental": {"scale": scale, "anchor_seed": 7}});
        compose(&job(dir.path(), objective)).0
    };
    let [at_0, half, at_1] = [0.0, 0.5, 1.0].map(|scale| of(json!(scale)));
    let (start, middle, end) = (composed(&at_0), composed(&half), composed(&at_1));
    for ((start, middle), end) in start.values.iter().zip(&middle.values).zip(&end.values) {
        assert!((middle - (start + end) / 2.0).abs() < 1e-6);
    }
    assert_eq!(
        (
            at_1.result.method.anchor_seed,
            half.result.method.anchor_seed
        ),
        (None, Some(7))
    );
    // α is unchanged, and the initial prompt is not among the sources.
    assert_eq!(weights(&half), weights(&at_1));

    let auto = of(json!("auto")).result.method;
    assert_eq!(auto.scale_candidates.len(), Scale::CANDIDATES.len());
    let best = auto
        .scale_candidates
        .iter()
        .map(|p| p.validation_loss.unwrap())
        .fold(f64::INFINITY, f64::min);
    let last = auto
        .scale_candidates
        .iter()
        .rfind(|p| p.validation_loss == Some(best))
        .unwrap();
    assert_eq!(auto.scale, last.scale);

    // There is no anchor: the tiny prompts state no init seed.
    let objective = json!({"experimental": {"scale": 0.5}});
    let mut input = job(dir.path(), objective);
    for source in &mut input.sources {
        source.file.metadata.as_mut().unwrap().init_seed = None;
    }
    let error = Engine::new(Device::Cpu).compose(&input, &mut Recorder::default());
    let detail = refused(error.unwrap_err());
    assert!(
        detail.contains("name one by `experimental.anchor_seed`"),
        "{detail}"
    );
}

#[test]
fn statistics_serve_every_method_that_they_suffice_for() {
    let dir = tempfile::tempdir().unwrap();
    let resolve = |from: &Composition, input: &CompositionInput, objective: serde_json::Value| {
        let sources = input.sources.iter().map(|source| SourceRef {
            prompt: source.prompt.clone(),
            version: None,
            digest: source.digest,
        });
        let again = SolveInput {
            statistics: from.statistics.clone(),
            sources: sources.collect(),
            objective: serde_json::from_value(objective).unwrap(),
        };
        Engine::new(Device::Cpu).solve(&again, &mut Recorder::default())
    };
    let told = |composition: &Composition| {
        let mut warnings = composition.result.warnings.iter();
        warnings.any(|warning| warning.code == "no_fallback")
    };
    let own = json!({"h_score": {"shrinkage": 0.5}, "fallback": "none"});
    let input = job(dir.path(), own.clone());
    let (whole, _) = compose(&input);
    for objective in [
        json!({"method": "average"}),
        json!({"method": "single_best", "by": "validation"}),
        json!({"method": "single_best", "experimental": {"uniform_mix": 0.5}}),
    ] {
        let (direct, _) = compose(&job(dir.path(), objective.clone()));
        let again = resolve(&whole, &input, objective).unwrap();
        assert_eq!(weights(&again), weights(&direct));
        assert_eq!(again.result.method.scores, direct.result.method.scores);
        // The gradients are still there for a method that needs them.
        let back = resolve(&again, &input, own.clone()).unwrap();
        assert_eq!(weights(&back), weights(&whole));
        assert!(!told(&back));
    }

    // The comparison with the single best cannot be repeated now, and a warning says so.
    let guarded = job(dir.path(), json!({}));
    let again = resolve(&compose(&guarded).0, &guarded, json!({})).unwrap();
    assert!(told(&again) && again.result.method.fallback.is_none());

    let (average, _) = compose(&job(dir.path(), json!({"method": "average"})));
    let h_only = resolve(&average, &input, json!({"method": "h_only"})).unwrap();
    assert!(h_only.result.solver.is_some());
    for (objective, reason) in [
        (json!({}), "needs gradients"),
        (json!({"method": "spot"}), "tunes a prompt"),
        (
            json!({"method": "average", "experimental": {"scale": "auto"}}),
            "needs the backbone",
        ),
        (
            json!({"method": "average", "experimental": {"uniform_mix": "auto"}}),
            "choose a number",
        ),
        (
            json!({"method": "average", "fallback": "single_best"}),
            "needs the backbone",
        ),
    ] {
        let detail = refused(resolve(&average, &input, objective).unwrap_err());
        assert!(detail.contains(reason), "{detail}");
    }
}

#[test]
fn a_ranking_has_the_numbers_that_compositions_have() {
    let dir = tempfile::tempdir().unwrap();
    let input = job(dir.path(), json!({"method": "panda", "target_epochs": 2}));
    let ranking = Engine::new(Device::Cpu)
        .rank(&input, &mut Recorder::default())
        .unwrap();
    assert_eq!(ranking.num_samples, 60);
    assert!(ranking.target_tuning_seconds > 0.0);
    let (panda, _) = compose(&input);
    let spot = json!({"method": "spot", "target_epochs": 2});
    let (spot, _) = compose(&job(dir.path(), spot));
    for (i, source) in ranking.sources.iter().enumerate() {
        let own = &panda.result.diagnostics.per_source[i];
        assert_eq!(source.h_score, own.h_score);
        assert_eq!(source.h_score_adjusted, own.h_score_adjusted);
        assert_eq!((Some(source.logme), source.otce), (own.logme, own.otce));
        let score =
            |composition: &Composition| composition.result.method.scores.as_ref().unwrap()[i];
        assert_eq!(
            (source.panda, source.spot_all_pairs),
            (score(&panda), score(&spot))
        );
    }
}

/// A composition by the pool, evaluated on the test images.
fn pooled(dir: &Path, objective: serde_json::Value) -> (CompositionInput, Composition) {
    let mut input = job(dir, objective);
    input.target.eval_split = Some(Split::Test);
    let composition = compose(&input).0;
    (input, composition)
}

#[test]
fn the_pool_weighs_predictions_and_its_file_predicts_what_the_answer_says() {
    let dir = tempfile::tempdir().unwrap();
    let (input, composition) = pooled(dir.path(), json!({"method": "pool"}));
    let result = &composition.result;
    let pool = result.pool.as_ref().unwrap();
    let none = pool.no_transfer.unwrap().weight;
    assert_close(weights(&composition).iter().sum::<f64>() + none, 1.0, 1e-12);
    for (source, of_pool) in result.source_weights.iter().zip(&pool.weights) {
        assert_eq!(source.weight, of_pool.weight);
        assert_eq!(source.standard_error, Some(of_pool.standard_error));
    }
    // It takes no gradients, and the composed prompt is a mixture or the best source.
    assert_eq!(result.objective.gradient_alignment, None);
    let fallback = result.method.fallback.as_ref().unwrap();
    let summed = &result.composed_prompt.weights;
    assert_close(summed.iter().sum(), 1.0, 1e-12);
    assert_eq!(fallback.taken, summed.contains(&1.0));
    let file = PromptFile::parse(&composition.composed).unwrap();
    let named = file.metadata.unwrap().sources;
    assert_eq!(named.len(), summed.iter().filter(|w| **w > 0.0).count());
    for source in named {
        let at = input
            .sources
            .iter()
            .position(|it| Some(it.digest) == source.digest);
        assert_eq!(source.weight, summed[at.unwrap()]);
    }

    // The ensemble file predicts the evaluation images as the comparison says.
    let bytes = composition.ensemble.as_ref().unwrap();
    let ensemble = EnsembleFile::parse(bytes).unwrap();
    let reported = pool.ensemble.as_ref().unwrap();
    assert_eq!(reported.digest, Digest::of(bytes));
    assert_eq!(reported.num_members, ensemble.members.len());
    let mut engine = Engine::new(Device::Cpu);
    let (backbone, vit) = engine.backbone(&input.backbone_dir).unwrap();
    let dataset = LabelledImages::read(&input.target_dir).unwrap();
    let selection = Selection::of_target(&input.target).whole(Split::Test);
    let preprocessing = &backbone.config.preprocessing;
    let test = Samples::load(&dataset, &selection, preprocessing).unwrap();
    let of_ensemble = Predictor::of_ensemble(&ensemble, vit).unwrap();
    let of_prompt = Predictor::of_prompt(&PromptFile::parse(&composition.composed).unwrap(), vit);
    let rows = &result.comparison;
    let names: Vec<Prediction> = rows.iter().map(|row| row.prediction).collect();
    assert_eq!(
        names[..3],
        [
            Prediction::Pool,
            Prediction::UniformPool,
            Prediction::ComposedPrompt
        ]
    );
    for (row, predictor) in [
        (&rows[0], of_ensemble),
        (&rows[2], of_prompt.unwrap().unwrap()),
    ] {
        assert_eq!(row.forward_passes, predictor.num_members());
        let log_p = log_probabilities_of(&predictor, vit, &test);
        let right = correct(&log_p, &test.labels).unwrap();
        let accuracy = right.iter().filter(|it| **it).count() as f64 / right.len() as f64;
        assert_eq!(row.accuracy, accuracy, "{row:?}");
        // A prompt's file has no ε of its own.
        let even = match row.prediction {
            Prediction::Pool => log_p.shallow_clone(),
            _ => crate::pool::unseen::log_probabilities(&log_p, EPSILON),
        };
        assert_close(row.loss, cross_entropy(&even, &test.labels), 1e-5);
        assert!(row.accuracy_interval[0] <= accuracy && accuracy <= row.accuracy_interval[1]);
        // Images without labels are the same images.
        let paths = dataset.split(Split::Test).unwrap().iter();
        let paths = paths.map(|image| dataset.image_path(image)).collect();
        let images = Samples::unlabelled(paths, false, preprocessing).unwrap();
        assert_eq!(log_probabilities_of(&predictor, vit, &images), log_p);
    }
    assert_eq!((rows[0].pool_gain, rows[0].p_value), (0.0, 1.0));
}

fn log_probabilities_of(predictor: &Predictor, vit: &Vit, images: &Samples) -> Tensor {
    let go_on = |_| ControlFlow::Continue(());
    predictor.log_probabilities(vit, images, go_on).unwrap()
}

#[test]
fn a_pool_is_solved_for_again_with_other_options_and_fewer_sources() {
    let dir = tempfile::tempdir().unwrap();
    let (input, composition) = pooled(dir.path(), json!({"method": "pool"}));
    for (sources, objective) in [
        (vec![0, 1, 2], json!({"method": "pool"})),
        (vec![2, 0], json!({"method": "pool", "beta": 1.0})),
        (vec![0, 1, 2], json!({"method": "pool", "top_k": 1})),
    ] {
        let some = CompositionInput {
            sources: sources.iter().map(|i| input.sources[*i].clone()).collect(),
            objective: serde_json::from_value(objective.clone()).unwrap(),
            ..input.clone()
        };
        let refs = some.sources.iter().map(|source| SourceRef {
            prompt: source.prompt.clone(),
            version: None,
            digest: source.digest,
        });
        let again = SolveInput {
            statistics: composition.statistics.clone(),
            sources: refs.collect(),
            objective: some.objective.clone(),
        };
        let again = Engine::new(Device::Cpu).solve(&again, &mut Recorder::default());
        let (again, whole) = (again.unwrap(), compose(&some).0);
        for (a, b) in weights(&again).iter().zip(weights(&whole)) {
            assert_close(*a, b, 1e-6);
        }
        let [a, b] = [&again, &whole].map(|it| it.ensemble.clone().unwrap());
        let [a, b] = [a, b].map(|bytes| EnsembleFile::parse(&bytes).unwrap());
        assert_eq!(a.metadata.members.len(), b.metadata.members.len());
        if objective["top_k"] == 1 {
            assert_eq!(a.members.len(), 1);
        }
    }
}

//! The whole composition on a tiny ViT.

use tch::Device;

use crate::Engine;
use crate::testing::{D, Recorder, assert_close, input};
use crate::vit::Compute;
use promptweave_domain::composer::{Composer as _, Composition, CompositionError};
use promptweave_domain::composition::{CompositionInput, PathPoint, SolveInput, SourceRef};
use promptweave_domain::digest::Digest;
use promptweave_domain::objective::{AlignTokens, Objective, Shrinkage, TradeOff, TradeOffRule};
use promptweave_domain::phase::Phase;
use promptweave_domain::precision::Precision;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::words::JobErrorCode;

fn compose(input: &CompositionInput) -> Result<Composition, CompositionError> {
    Engine::new(Device::Cpu).compose(input, &mut Recorder::default())
}

fn refusal(input: &CompositionInput) -> (JobErrorCode, String) {
    match compose(input) {
        Err(CompositionError::Refused { code, detail }) => (code, detail),
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_source_is_returned_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 1);
    let composition = compose(&input).unwrap();
    let result = &composition.result;
    assert_eq!(result.source_weights[0].weight, 1.0);
    assert_eq!(result.objective.gradient_alignment, Some(0.0));
    assert_close(
        result.objective.h_score,
        result.diagnostics.per_source[0].h_score,
        1e-12,
    );
    assert_close(
        result.diagnostics.composed_score.as_ref().unwrap().h_score,
        result.objective.h_score,
        1e-12,
    );
    let composed = PromptFile::parse(&composition.composed).unwrap();
    assert_eq!(
        composed.prompt_embeddings,
        input.sources[0].file.prompt_embeddings
    );
}

#[test]
fn a_composition_is_whole_and_the_same_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path(), 3);
    input.target.eval_split = Some(promptweave_domain::split::Split::Test);
    let mut recorder = Recorder::default();
    let first = Engine::new(Device::Cpu)
        .compose(&input, &mut recorder)
        .unwrap();
    let again = compose(&input).unwrap();
    assert_eq!(first.result.source_weights, again.result.source_weights);
    assert_eq!(first.composed, again.composed);
    assert_eq!(first.statistics, again.statistics);

    let diagnostics = &first.result.diagnostics;
    assert_eq!((diagnostics.num_samples, diagnostics.num_classes), (60, 3));
    assert_eq!(diagnostics.head_folds, 2);
    assert!(
        diagnostics
            .composed_score
            .as_ref()
            .unwrap()
            .eval_accuracy
            .unwrap()
            > 0.5
    );
    assert!(diagnostics.baselines.is_some());
    for phase in Phase::OF_COMPOSITION {
        let last = recorder
            .seen
            .iter()
            .rfind(|(seen, _, _)| *seen == phase)
            .unwrap();
        assert!(phase == Phase::Solve || last.1 == last.2, "{last:?}");
        assert!(first.result.timings.contains_key(phase.name()));
    }
    // P_T = Σ αᵢ Pᵢ
    let composed = PromptFile::parse(&first.composed).unwrap();
    let expected: f64 = input
        .sources
        .iter()
        .zip(&first.result.source_weights)
        .map(|(s, w)| w.weight * f64::from(s.file.prompt_embeddings.values[5]))
        .sum();
    assert_close(
        f64::from(composed.prompt_embeddings.values[5]),
        expected,
        1e-6,
    );
    let codes: Vec<&str> = first
        .result
        .warnings
        .iter()
        .map(|w| w.code.as_str())
        .collect();
    assert!(codes.contains(&"few_samples"), "{codes:?}");
}

#[test]
fn a_composition_stops_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 2);
    for phase in [Phase::Features, Phase::Gradients] {
        let mut recorder = Recorder {
            stop_at: Some(phase),
            ..Recorder::default()
        };
        let stopped = Engine::new(Device::Cpu).compose(&input, &mut recorder);
        assert!(matches!(stopped, Err(CompositionError::Stopped)));
    }
}

#[test]
fn input_that_cannot_be_composed_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let good = input(dir.path(), 2);

    let mut same = good.clone();
    same.sources[1] = same.sources[0].clone();
    same.sources[1].prompt = "copy".into();
    let (code, detail) = refusal(&same);
    assert_eq!(code, "same_source");
    assert!(detail.contains("as `p0"), "{detail}");

    let mut narrow = good.clone();
    narrow.sources[1].file = promptweave_domain::testing::prompt_file(3, 8, 1);
    let (code, detail) = refusal(&narrow);
    assert_eq!(code, "width_mismatch");
    assert!(detail.contains("is 8 wide and"), "{detail}");

    let mut one_class = good.clone();
    one_class.target_dir = dir.path().join("one-class");
    std::fs::create_dir_all(one_class.target_dir.join("red")).unwrap();
    let image = dir.path().join("target/train/red/0002.png");
    std::fs::copy(&image, one_class.target_dir.join("red/a.png")).unwrap();
    assert_eq!(refusal(&one_class).0, "one_class");

    let mut empty = good.clone();
    empty.target.max_samples = 0;
    assert_eq!(refusal(&empty).0, "empty_split");

    let mut singular = good.clone();
    singular.objective.head.shrinkage = 1e-9;
    assert_eq!(refusal(&singular).0, "invalid_objective");

    let mut broken = good.clone();
    std::fs::write(dir.path().join("target/train/red/0002.png"), "no image").unwrap();
    let (code, detail) = refusal(&broken);
    assert_eq!(code, "unreadable_image");
    assert!(
        detail.contains("0002.png") && detail.contains("--skip-unreadable"),
        "{detail}"
    );
    broken.target.skip_unreadable = true;
    let skipped = compose(&broken).unwrap();
    assert_eq!(skipped.result.diagnostics.skipped_images, 1);
    assert_eq!(skipped.result.diagnostics.num_samples, 59);
}

#[test]
fn micro_batches_change_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 3);
    let whole = compose(&input).unwrap().result;
    let compute = Compute {
        largest_micro_batch: 7,
        ..Compute::on(Device::Cpu, Precision::F32)
    };
    let by_seven = Engine::with(compute)
        .compose(&input, &mut Recorder::default())
        .unwrap()
        .result;
    for (a, b) in whole.source_weights.iter().zip(&by_seven.source_weights) {
        assert_close(a.weight, b.weight, 1e-6);
    }
    assert_close(by_seven.objective.h_score, whole.objective.h_score, 1e-6);
}

#[test]
fn a_class_of_one_sample_and_few_samples_are_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 2);
    let odd = input.target_dir.join("train/violet");
    std::fs::create_dir_all(&odd).unwrap();
    let image = input.target_dir.join("train/red/0002.png");
    std::fs::rename(image, odd.join("a.png")).unwrap();
    let result = compose(&input).unwrap().result;
    let detail = |code: &str| {
        let warning = result.warnings.iter().find(|w| w.code == code);
        warning.map(|w| w.detail.clone()).unwrap_or_default()
    };
    assert!(
        detail("singleton_class").contains("`violet`"),
        "{:?}",
        result.warnings
    );
    assert!(
        detail("few_samples").contains("60 samples for 32"),
        "{:?}",
        result.warnings
    );
    assert!(result.source_weights.iter().all(|w| w.weight.is_finite()));
}

// ---- Solving again ----------------------------------------------------------------------------

/// Sources `keep` of an input, without their files.
fn refs(input: &CompositionInput, keep: &[usize]) -> Vec<SourceRef> {
    let of = |i: &usize| {
        let source = &input.sources[*i];
        SourceRef {
            prompt: source.prompt.clone(),
            version: source.version,
            digest: source.digest,
        }
    };
    keep.iter().map(of).collect()
}

fn resolve(input: &SolveInput) -> Result<Composition, CompositionError> {
    Engine::new(Device::Cpu).solve(input, &mut Recorder::default())
}

fn resolve_refusal(input: &SolveInput) -> (JobErrorCode, String) {
    match resolve(input) {
        Err(CompositionError::Refused { code, detail }) => (code, detail),
        other => panic!("{other:?}"),
    }
}

#[test]
fn solving_again_gives_the_same_and_with_fewer_sources_what_they_alone_give() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path(), 4);
    input.objective.align_tokens = AlignTokens::Hungarian;
    let first = compose(&input).unwrap();
    let again = SolveInput {
        statistics: first.statistics.clone(),
        sources: refs(&input, &[0, 1, 2, 3]),
        objective: input.objective.clone(),
    };
    let all = resolve(&again).unwrap();
    assert_eq!(all.result.source_weights, first.result.source_weights);
    assert_eq!(all.result.pareto_path, first.result.pareto_path);
    assert_eq!(all.statistics, first.statistics);
    let prompt = |c: &Composition| PromptFile::parse(&c.composed).unwrap();
    assert_eq!(
        prompt(&all).prompt_embeddings,
        prompt(&first).prompt_embeddings
    );
    assert!(prompt(&all).head.is_none() && all.result.diagnostics.composed_score.is_none());
    assert_eq!(
        all.result.provenance.solved_from,
        Some(Digest::of(&first.statistics))
    );

    // Two of the four sources, in another order: the answer is as if the others had never been
    // there.
    input.objective.align_tokens = AlignTokens::Off;
    let first = compose(&input).unwrap();
    let some = resolve(&SolveInput {
        statistics: first.statistics.clone(),
        sources: refs(&input, &[2, 0, 3]),
        objective: input.objective.clone(),
    })
    .unwrap();
    let mut fewer = input.clone();
    fewer.sources = [2, 0, 3].map(|i: usize| input.sources[i].clone()).to_vec();
    let alone = compose(&fewer).unwrap();
    let weights = some.result.source_weights.iter();
    for (a, b) in weights.zip(&alone.result.source_weights) {
        assert_eq!(a.prompt, b.prompt);
        assert_close(a.weight, b.weight, 1e-6);
        assert_close(a.standard_error.unwrap(), b.standard_error.unwrap(), 1e-5);
    }
    let l = |c: &Composition| c.result.objective.gradient_alignment.unwrap();
    assert!((l(&some) - l(&alone)).abs() <= 1e-9 * l(&alone));
}

#[test]
fn solving_again_takes_every_option_that_needs_no_backbone() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 3);
    let statistics = compose(&input).unwrap().statistics;
    for objective in [
        r#"{"trade_off": 0.2, "alignment": {"variant": "mixture_uniform"}}"#,
        r#"{"trade_off": "knee", "alignment": {"variant": "fishr"}}"#,
        r#"{"trade_off": {"alignment_weight": 0.5}, "h_score": {"mode": "trace_ratio"}}"#,
        r#"{"experimental": {"entropy": 0.1}, "h_score": {"standardise": "per_source", "shrinkage": "oas"}}"#,
        r#"{"h_score": {"shrinkage": "ledoit_wolf"}}"#,
        r#"{"h_score": {"shrinkage": 0}}"#,
    ] {
        let mut whole = input.clone();
        whole.objective = serde_json::from_str(objective).unwrap();
        let again = resolve(&SolveInput {
            statistics: statistics.clone(),
            sources: refs(&input, &[0, 1, 2]),
            objective: whole.objective.clone(),
        })
        .unwrap();
        let composed = compose(&whole).unwrap();
        assert_eq!(
            again.result.source_weights, composed.result.source_weights,
            "{objective}"
        );
        assert_eq!(again.result.objective, composed.result.objective);
        assert_eq!(again.result.pool, composed.result.pool);
    }
}

#[test]
fn a_result_has_the_pool_of_its_sources_whatever_the_method_is() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 3);
    let pool_of = |sources: &[usize], method: &str| {
        let mut some = input.clone();
        some.sources = sources.iter().map(|i| input.sources[*i].clone()).collect();
        some.objective = serde_json::from_str(&format!(r#"{{"method": "{method}"}}"#)).unwrap();
        compose(&some).unwrap().result.pool
    };
    let pool = pool_of(&[0, 1, 2], "average").unwrap();
    assert_eq!(pool_of(&[0, 1, 2], "hgprompt").unwrap(), pool);
    let names: Vec<_> = pool.weights.iter().map(|it| it.prompt.as_str()).collect();
    assert_eq!(names, ["p0", "p1", "p2"]);
    let none = pool.no_transfer.unwrap();
    let of_prompts: f64 = pool.weights.iter().map(|it| it.weight).sum();
    assert_close(of_prompts + none.weight, 1.0, 1e-12);
    assert!(
        pool.converged && pool.sharpness > 0.0 && (0.0..=1.0).contains(&pool.validation_accuracy)
    );
    let turned = pool_of(&[2, 0, 1], "average").unwrap();
    for (i, j) in [(0, 2), (1, 0), (2, 1)] {
        assert_eq!(turned.weights[i].prompt, pool.weights[j].prompt);
        assert_close(turned.weights[i].weight, pool.weights[j].weight, 1e-6);
        assert_close(
            turned.weights[i].validation_loss,
            pool.weights[j].validation_loss,
            1e-9,
        );
    }
    // One source is compared with the backbone without a prompt.
    let one = pool_of(&[1], "average").unwrap();
    assert_eq!(one.weights.len(), 1);
    assert_close(
        one.no_transfer.unwrap().validation_loss,
        none.validation_loss,
        1e-12,
    );
}

#[test]
fn statistics_that_cannot_be_solved_from_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 2);
    let statistics = compose(&input).unwrap().statistics;
    let good = SolveInput {
        statistics,
        sources: refs(&input, &[0, 1]),
        objective: Objective::default(),
    };
    for length in [0, 7, 100, good.statistics.len() - 1] {
        let mut cut = good.clone();
        cut.statistics.truncate(length);
        let (code, detail) = resolve_refusal(&cut);
        assert_eq!(code, "statistics_unusable");
        assert!(detail.contains("truncated"), "{detail}");
    }
    let mut prompt = good.clone();
    prompt.statistics = input.sources[0].file.to_bytes();
    let (code, detail) = resolve_refusal(&prompt);
    assert_eq!(code, "statistics_unusable");
    assert!(detail.contains("metadata key `promptweave`"), "{detail}");

    let mut stranger = good.clone();
    stranger.sources[1].digest = Digest::of(b"another");
    stranger.sources[1].prompt = "other".into();
    let (code, detail) = resolve_refusal(&stranger);
    assert_eq!(code, "unknown_source");
    assert!(
        detail.contains("`other`") && detail.contains("`p0`, `p1`"),
        "{detail}"
    );
    let mut twice = good.clone();
    twice.sources[1] = twice.sources[0].clone();
    assert_eq!(resolve_refusal(&twice).0, "same_source");
    let mut none = good.clone();
    none.sources.clear();
    assert_eq!(resolve_refusal(&none).0, "no_sources");

    for (objective, field) in [
        (r#"{"trade_off": "validation"}"#, "trade_off"),
        (r#"{"experimental": {"refine": 2}}"#, "experimental.refine"),
        (
            r#"{"alignment": {"gradient_normalization": "rms"}}"#,
            "alignment.gradient_normalization",
        ),
        (r#"{"head": {"kind": "ridge"}}"#, "head.kind"),
        (r#"{"align_tokens": "hungarian"}"#, "align_tokens"),
    ] {
        let mut refused = good.clone();
        refused.objective = serde_json::from_str(objective).unwrap();
        let (code, detail) = resolve_refusal(&refused);
        assert_eq!(code, "invalid_objective");
        assert!(detail.contains(field), "{detail}");
    }
}

// ---- Options that go through the backbone -----------------------------------------------------

#[test]
fn every_head_and_norm_makes_a_whole_composition() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path(), 2);
    for objective in [
        r#"{"head": {"kind": "ridge"}}"#,
        r#"{"head": {"kind": "shared"}, "alignment": {"gradient_normalization": "rms"}}"#,
    ] {
        input.objective = serde_json::from_str(objective).unwrap();
        let composition = compose(&input).unwrap();
        let composed = PromptFile::parse(&composition.composed).unwrap();
        assert!(composed.head.is_some());
        assert!(
            composition
                .result
                .diagnostics
                .composed_score
                .unwrap()
                .train_accuracy
                > 0.5
        );
    }
}

#[test]
fn the_validation_rule_takes_the_point_of_least_cross_fitted_loss() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path(), 3);
    *input.objective.options.trade_off_mut().unwrap() = TradeOff::Rule(TradeOffRule::Validation);
    let result = compose(&input).unwrap().result;
    let at = |t: f64| {
        result
            .pareto_path
            .iter()
            .find(|p| p.trade_off == t)
            .unwrap()
    };
    let chosen = at(result.objective.trade_off.unwrap());
    let loss = |point: &PathPoint| point.validation_loss.unwrap();
    assert!(
        result
            .pareto_path
            .iter()
            .all(|point| loss(point) >= loss(chosen))
    );
    assert_eq!(
        result.objective.trade_off_rule,
        Some(TradeOffRule::Validation)
    );
    // It is the accuracy of heads on samples that they were not fitted on.
    let accuracy = chosen.validation_accuracy.unwrap();
    assert!((0.3..=1.0).contains(&accuracy), "{accuracy}");
    let composed = result.diagnostics.composed_score.unwrap();
    assert_eq!(composed.validation_loss, chosen.validation_loss);
}

#[test]
fn refinement_of_h_alone_never_lowers_the_true_h() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path(), 3);
    *input.objective.options.trade_off_mut().unwrap() = TradeOff::Value(0.0);
    input.objective.h_score.shrinkage = Some(Shrinkage::Fixed(0.1));
    let plain = compose(&input).unwrap().result;
    input.objective.experimental.refine = 3;
    let refined = compose(&input).unwrap().result;
    let refinement = refined.diagnostics.refinement.unwrap();
    let h = |score: &Option<promptweave_domain::composition::PromptScore>| {
        score.as_ref().unwrap().h_score
    };
    assert_close(
        refinement.h_score_before,
        h(&plain.diagnostics.composed_score),
        1e-6,
    );
    assert_close(
        refinement.h_score_after,
        h(&refined.diagnostics.composed_score),
        1e-6,
    );
    assert!(refinement.h_score_after >= refinement.h_score_before);
    let weights = |w: &[promptweave_domain::composition::SourceWeight]| -> Vec<f64> {
        w.iter().map(|w| w.weight).collect()
    };
    assert_eq!(refinement.solved_weights, weights(&plain.source_weights));
    let moved = refinement.solved_weights != weights(&refined.source_weights);
    assert_eq!(moved, refinement.accepted_steps > 0);
    assert!(refinement.evaluations > refinement.accepted_steps);
}

#[test]
fn the_order_of_aligned_tokens_changes_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path(), 3);
    // Prompts near one another, like those of one init.
    let base = input.sources[0].file.prompt_embeddings.values.clone();
    for source in &mut input.sources {
        let values = &mut source.file.prompt_embeddings.values;
        for (value, base) in values.iter_mut().zip(&base) {
            *value = base + 0.3 * *value;
        }
    }
    let mut turned = input.clone();
    let prompt = &mut turned.sources[1].file.prompt_embeddings;
    prompt.values.rotate_left(D);
    for input in [&mut input, &mut turned] {
        for source in &mut input.sources {
            source.digest = Digest::of(&source.file.to_bytes());
        }
    }
    /// α, H and the sorted rows of P_T.
    fn outcome(
        input: &CompositionInput,
        option: AlignTokens,
        t: f64,
    ) -> (Vec<f64>, f64, Vec<Vec<f32>>) {
        let mut input = input.clone();
        input.objective.align_tokens = option;
        *input.objective.options.trade_off_mut().unwrap() = TradeOff::Value(t);
        let composition = compose(&input).unwrap();
        let composed = PromptFile::parse(&composition.composed).unwrap();
        let mut rows: Vec<Vec<f32>> = composed
            .prompt_embeddings
            .values
            .chunks(D)
            .map(<[f32]>::to_vec)
            .collect();
        rows.sort_by(|a, b| a[0].total_cmp(&b[0]));
        let weights = composition.result.source_weights.iter();
        (
            weights.map(|w| w.weight).collect(),
            composition.result.objective.h_score,
            rows,
        )
    }
    let far = |a: &[Vec<f32>], b: &[Vec<f32>]| -> f32 {
        let pairs = a.concat().into_iter().zip(b.concat());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    // H, and α at t = 0, do not depend on the order.
    let (alpha, h, _) = outcome(&input, AlignTokens::Off, 0.0);
    let (alpha_turned, h_turned, _) = outcome(&turned, AlignTokens::Off, 0.0);
    assert_close(h_turned, h, 1e-5);
    for (a, b) in alpha.iter().zip(&alpha_turned) {
        assert!((a - b).abs() < 1e-2, "{alpha:?} {alpha_turned:?}");
    }
    // With alignment, neither do L_align and the sum.
    let (alpha, _, rows) = outcome(&input, AlignTokens::Hungarian, 0.5);
    let (alpha_turned, _, rows_turned) = outcome(&turned, AlignTokens::Hungarian, 0.5);
    for (a, b) in alpha.iter().zip(&alpha_turned) {
        assert!((a - b).abs() < 1e-3, "{alpha:?} {alpha_turned:?}");
    }
    assert!(far(&rows, &rows_turned) < 1e-2, "{rows:?} {rows_turned:?}");
}

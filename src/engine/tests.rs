//! The method's oracles: properties that every version of it must keep.

use tch::{Kind, Tensor};

use super::Engine;
use super::alignment::{AlignmentStatistics, GradientAlignment, num_pairs};
use super::h_score::HScore;
use super::solver::{Solution, Solver};
use super::testing::{Recorder, alignment_statistics, input, noise, noise_tensor};
use crate::domain::composition::{
    Composer as _, Composition, CompositionError, CompositionInput, Phase,
};
use crate::domain::objective::{AlignmentReading, Weighing};
use crate::domain::prompt_file::PromptFile;

/// Features [M, N, d] with class signal of the given strength a source.
fn features(strengths: &[f64], labels: &[usize], d: usize, seed: u64) -> Tensor {
    let (m, n) = (strengths.len(), labels.len());
    let classes = labels.iter().max().unwrap() + 1;
    let directions = noise(m * classes * d, seed);
    let values = noise(m * n * d, seed + 1);
    let all: Vec<f64> = (0..m * n * d)
        .map(|at| {
            let (i, row, c) = (at / (n * d), at / d % n, at % d);
            values[at] + strengths[i] * directions[(i * classes + labels[row]) * d + c]
        })
        .collect();
    Tensor::from_slice(&all).view([m as i64, n as i64, d as i64])
}

fn labels(n: usize, classes: usize) -> Vec<usize> {
    (0..n).map(|i| i % classes).collect()
}

fn solve(h_score: &HScore, statistics: AlignmentStatistics, weighing: Weighing) -> Solution {
    solve_as(AlignmentReading::R1, h_score, statistics, weighing)
}

fn solve_as(
    reading: AlignmentReading,
    h_score: &HScore,
    statistics: AlignmentStatistics,
    weighing: Weighing,
) -> Solution {
    let m = statistics.num_sources;
    let alignment = GradientAlignment::new(reading, statistics);
    let solver = Solver {
        h_score,
        alignment: &alignment,
        num_sources: m,
        tick: &mut || Ok(()),
    };
    let solution = solver.solve(weighing).unwrap();
    assert!((solution.alpha.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    assert!(solution.alpha.iter().all(|weight| *weight >= 0.0));
    solution
}

fn no_gradients(m: usize) -> AlignmentStatistics {
    AlignmentStatistics {
        num_sources: m,
        gram: vec![0.0; num_pairs(m).pow(2)],
        variance_gram: vec![0.0; m.pow(2)],
    }
}

fn assert_close(a: f64, b: f64, tolerance: f64) {
    assert!(
        (a - b).abs() <= tolerance * (1.0 + b.abs()),
        "{a} is not {b} (± {tolerance})"
    );
}

/// tr(Σ_ρ⁻¹ B)(1-ρ) as it is written, with d × d matrices.
fn naive_h(features: &Tensor, labels: &[usize], alpha: &[f64], rho: f64) -> f64 {
    let (m, n, d) = features.size3().unwrap();
    let mixed = (features * Tensor::from_slice(alpha).view([m, 1, 1])).sum_dim_intlist(
        0,
        false,
        Kind::Double,
    );
    let x = &mixed - mixed.mean_dim(0, true, Kind::Double);
    let mut rows = Vec::new();
    for label in labels {
        let same: Vec<i64> = (0..n)
            .filter(|row| labels[*row as usize] == *label)
            .collect();
        rows.push(
            x.index_select(0, &Tensor::from_slice(&same))
                .mean_dim(0, false, Kind::Double),
        );
    }
    let means = Tensor::stack(&rows, 0);
    let scale = (n - 1) as f64;
    let (total, between) = (x.tr().matmul(&x) / scale, means.tr().matmul(&means) / scale);
    let trace = f64::try_from(total.trace()).unwrap() / d as f64;
    let shrunk =
        total * (1.0 - rho) + Tensor::eye(d, (Kind::Double, tch::Device::Cpu)) * (rho * trace);
    (1.0 - rho) * f64::try_from(shrunk.inverse().matmul(&between).trace()).unwrap()
}

#[test]
fn h_equals_its_definition_and_stays_in_its_bounds() {
    let labels = labels(60, 4);
    let features = features(&[0.5, 1.0, 0.0], &labels, 8, 1);
    for rho in [1e-6, 0.01, 0.5] {
        let h = HScore::new(&features, &labels, rho).unwrap();
        for alpha in [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]] {
            let value = h.value(&alpha).unwrap();
            assert_close(value, naive_h(&features, &labels, &alpha, rho), 1e-10);
            assert!((0.0..=3.0).contains(&value));
        }
    }
    let nearly_all = HScore::new(&features, &labels, 1.0 - 1e-9).unwrap();
    assert!(nearly_all.value(&[0.2, 0.3, 0.5]).unwrap() < 1e-6);
}

#[test]
fn h_of_one_feature_is_the_anova_share() {
    let labels = labels(30, 3);
    let features = features(&[0.7], &labels, 1, 2);
    let x: Vec<f64> = Vec::try_from(features.flatten(0, -1)).unwrap();
    let mean = |rows: &[f64]| rows.iter().sum::<f64>() / rows.len() as f64;
    let all = mean(&x);
    let between: f64 = (0..3)
        .map(|c| {
            let own: Vec<f64> = (0..30).filter(|i| labels[*i] == c).map(|i| x[i]).collect();
            own.len() as f64 * (mean(&own) - all).powi(2)
        })
        .sum();
    let total: f64 = x.iter().map(|v| (v - all).powi(2)).sum();
    let h = HScore::new(&features, &labels, 1e-12)
        .unwrap()
        .value(&[1.0])
        .unwrap();
    assert_close(h, between / total, 1e-9);
}

#[test]
fn h_ignores_scale_shift_rotation_order_and_names() {
    let labels = labels(50, 3);
    let f = features(&[0.5, 1.0], &labels, 6, 3);
    let alpha = [0.4, 0.6];
    let value = |f: &Tensor, labels: &[usize], alpha: &[f64]| {
        HScore::new(f, labels, 0.1).unwrap().value(alpha).unwrap()
    };
    let h = value(&f, &labels, &alpha);
    assert_close(value(&f, &labels, &[2.8, 4.2]), h, 1e-10);
    assert_close(value(&(&f + 5.0), &labels, &alpha), h, 1e-10);
    let (rotation, _) = Tensor::linalg_qr(&noise_tensor(&[6, 6], 4), "complete");
    assert_close(
        value(&(f.matmul(&rotation) * 3.0), &labels, &alpha),
        h,
        1e-9,
    );
    // A map that is not orthogonal does change H when ρ > 0.
    let skewed = f.matmul(&noise_tensor(&[6, 6], 5));
    assert!((value(&skewed, &labels, &alpha) - h).abs() > 1e-3);

    let reversed: Vec<usize> = labels.iter().rev().map(|label| 2 - label).collect();
    assert_close(value(&f.flip([1]), &reversed, &alpha), h, 1e-10);
}

#[test]
fn gradients_of_both_terms_agree_with_central_differences() {
    let labels = labels(40, 3);
    let h = HScore::new(&features(&[0.5, 1.0, 0.2], &labels, 7, 6), &labels, 0.05).unwrap();
    let l = GradientAlignment::new(
        AlignmentReading::R1,
        alignment_statistics(&noise_tensor(&[3, 40, 9], 7)),
    );
    let alpha = [0.2, 0.5, 0.3];
    let (_, dh) = h.value_and_gradient(&alpha).unwrap();
    let (_, dl) = l.value_and_gradient(&alpha);
    // Along e_i - α, which keeps Σα = 1 (L_align's gradient is valid there only).
    for i in 0..3 {
        let along = |step: f64| -> Vec<f64> {
            (0..3)
                .map(|k| alpha[k] + step * (f64::from(u8::from(i == k)) - alpha[k]))
                .collect()
        };
        let slope = |gradient: &[f64]| -> f64 {
            (0..3)
                .map(|k| gradient[k] * (f64::from(u8::from(i == k)) - alpha[k]))
                .sum()
        };
        let step = 1e-5;
        let numeric_h =
            (h.value(&along(step)).unwrap() - h.value(&along(-step)).unwrap()) / (2.0 * step);
        let numeric_l = (l.value(&along(step)) - l.value(&along(-step))) / (2.0 * step);
        assert_close(slope(&dh), numeric_h, 1e-6);
        assert_close(slope(&dl), numeric_l, 1e-6);
    }
}

#[test]
fn equal_prompts_give_uniform_weights() {
    let labels = labels(30, 3);
    let one = features(&[0.8], &labels, 5, 8);
    let all = Tensor::cat(&[&one, &one, &one], 0);
    let h = HScore::new(&all, &labels, 0.01).unwrap();
    assert_close(
        h.value(&[1.0, 0.0, 0.0]).unwrap(),
        h.value(&[0.0, 0.3, 0.7]).unwrap(),
        1e-10,
    );
    let solution = solve(&h, no_gradients(3), Weighing::TradeOff(0.5));
    for weight in solution.alpha {
        assert_close(weight, 1.0 / 3.0, 1e-9);
    }
}

#[test]
fn opposite_features_at_half_weight_stay_finite() {
    let labels = labels(30, 3);
    let one = features(&[0.8], &labels, 5, 9);
    let h = HScore::new(&Tensor::cat(&[&one, &(-&one)], 0), &labels, 0.01).unwrap();
    let (value, gradient) = h.value_and_gradient(&[0.5, 0.5]).unwrap();
    assert!(value.is_finite() && gradient.iter().all(|g| g.is_finite()));
    let single_class = HScore::new(&one, &[0; 30], 0.01).unwrap();
    assert_close(single_class.value(&[1.0]).unwrap(), 0.0, 1e-12);
}

#[test]
fn two_prompts_align_at_the_middle() {
    let labels = labels(40, 3);
    let h = HScore::new(&features(&[0.5, 1.5], &labels, 5, 10), &labels, 0.01).unwrap();
    let gradients = noise_tensor(&[2, 40, 9], 11) * Tensor::from_slice(&[1.0, 3.0]).view([2, 1, 1]);
    for reading in [
        AlignmentReading::R1,
        AlignmentReading::R2,
        AlignmentReading::R3,
    ] {
        let statistics = alignment_statistics(&gradients);
        let solution = solve_as(reading, &h, statistics, Weighing::TradeOff(1.0));
        assert_close(solution.alpha[0], 0.5, 1e-6);
        assert_eq!(solution.alignment_weight, None);
    }
}

#[test]
fn alignment_weighs_large_gradients_up() {
    // Uncorrelated gradients with sd (1, 1, 1, 3): α ≈ (.18, .18, .18, .46).
    let gradients =
        noise_tensor(&[4, 400, 60], 12) * Tensor::from_slice(&[1.0, 1.0, 1.0, 3.0]).view([4, 1, 1]);
    let labels = labels(40, 2);
    let h = HScore::new(&features(&[0.5; 4], &labels, 5, 13), &labels, 0.01).unwrap();
    let solution = solve(
        &h,
        alignment_statistics(&gradients),
        Weighing::TradeOff(1.0),
    );
    for (weight, expected) in solution.alpha.iter().zip([0.18, 0.18, 0.18, 0.46]) {
        assert!((weight - expected).abs() < 0.02, "{:?}", solution.alpha);
    }
}

#[test]
fn the_source_with_the_signal_wins_and_complements_share() {
    let labels = labels(600, 4);
    let planted = features(&[0.0, 1.5, 0.0], &labels, 6, 14);
    let h = HScore::new(&planted, &labels, 0.01).unwrap();
    let solution = solve(&h, no_gradients(3), Weighing::TradeOff(0.0));
    assert!(solution.alpha[1] > 0.95, "{:?}", solution.alpha);

    // Source 0 tells class 0 from 1 on one axis, source 1 tells class 2 from 3 on another.
    let mut values = noise(2 * 600 * 4, 15);
    for (row, label) in labels.iter().enumerate() {
        let contrast = [[3.0, -3.0, 0.0, 0.0], [0.0, 0.0, 3.0, -3.0]];
        values[row * 4] += contrast[0][*label];
        values[(600 + row) * 4 + 1] += contrast[1][*label];
    }
    let h = HScore::new(
        &Tensor::from_slice(&values).view([2, 600, 4]),
        &labels,
        0.01,
    )
    .unwrap();
    let solution = solve(&h, no_gradients(2), Weighing::TradeOff(0.0));
    assert!(
        solution.alpha.iter().all(|weight| *weight > 0.2),
        "{:?}",
        solution.alpha
    );
    let best = h
        .value(&[1.0, 0.0])
        .unwrap()
        .max(h.value(&[0.0, 1.0]).unwrap());
    assert!(solution.h_score > best);
}

#[test]
fn the_solver_is_at_least_as_good_as_a_grid() {
    let labels = labels(80, 4);
    for seed in 0..6 {
        let h = HScore::new(
            &features(&[0.4, 0.5, 0.6], &labels, 6, 20 + seed),
            &labels,
            0.01,
        )
        .unwrap();
        let statistics = alignment_statistics(&noise_tensor(&[3, 80, 8], 40 + seed));
        let l = GradientAlignment::new(AlignmentReading::R1, statistics.clone());
        let solution = solve(&h, statistics, Weighing::AlignmentWeight(2.0));
        let total = |alpha: &[f64]| 2.0 * l.value(alpha) - h.value(alpha).unwrap();
        let found = total(&solution.alpha);
        for i in 0..=20 {
            for j in 0..=20 - i {
                let (a, b) = (f64::from(i) * 0.05, f64::from(j) * 0.05);
                assert!(
                    found <= total(&[a, b, 1.0 - a - b]) + 1e-6,
                    "seed {seed}: {a} {b}"
                );
            }
        }
        // The first optimum is the answer.
        assert_eq!(solution.optima[0].weights, solution.alpha);
    }
}

#[test]
fn the_path_is_monotone_from_one_anchor_to_the_other_and_scale_free() {
    let labels = labels(80, 4);
    let h = HScore::new(
        &features(&[0.4, 0.8, 0.6, 0.5], &labels, 6, 50),
        &labels,
        0.01,
    )
    .unwrap();
    let gradients = noise_tensor(&[4, 80, 8], 51);
    let solution = solve(
        &h,
        alignment_statistics(&gradients),
        Weighing::TradeOff(0.5),
    );
    assert_eq!(solution.path.len(), 21);
    for pair in solution.path.windows(2) {
        assert!(pair[1].h_score <= pair[0].h_score + 1e-12);
        assert!(pair[1].gradient_alignment <= pair[0].gradient_alignment + 1e-12);
    }
    assert_eq!(solution.path[10].weights, solution.alpha);
    assert_eq!(solution.path[0].alignment_weight, Some(0.0));

    let small = solve(
        &h,
        alignment_statistics(&(gradients * 1e-3)),
        Weighing::TradeOff(0.5),
    );
    for (a, b) in solution.alpha.iter().zip(&small.alpha) {
        assert_close(*a, *b, 1e-6);
    }
    let ratio = small.alignment_weight.unwrap() / solution.alignment_weight.unwrap();
    assert_close(ratio, 1e12, 1e-6);

    // A raw λ equal to the effective one finds the same point.
    let raw = Weighing::AlignmentWeight(solution.alignment_weight.unwrap());
    let by_lambda = solve(
        &h,
        alignment_statistics(&noise_tensor(&[4, 80, 8], 51)),
        raw,
    );
    for (a, b) in solution.alpha.iter().zip(&by_lambda.alpha) {
        assert_close(*a, *b, 1e-6);
    }
}

#[test]
fn permuting_the_prompts_permutes_the_weights() {
    let labels = labels(80, 4);
    let f = features(&[0.4, 0.8, 0.6], &labels, 6, 60);
    let g = noise_tensor(&[3, 80, 8], 61);
    let order = Tensor::from_slice(&[2i64, 0, 1]);
    let run = |f: &Tensor, g: &Tensor| {
        let h = HScore::new(f, &labels, 0.01).unwrap();
        solve(&h, alignment_statistics(g), Weighing::TradeOff(0.5)).alpha
    };
    let (here, there) = (
        run(&f, &g),
        run(&f.index_select(0, &order), &g.index_select(0, &order)),
    );
    for (position, source) in [2, 0, 1].into_iter().enumerate() {
        assert_close(there[position], here[source], 1e-6);
    }
}

// ---- The whole composition on a tiny ViT ---------------------------------------------------

fn compose(input: &CompositionInput) -> Result<Composition, CompositionError> {
    Engine::new(tch::Device::Cpu).compose(input, &mut Recorder::default())
}

fn refusal(input: &CompositionInput) -> (&'static str, String) {
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
    assert_eq!(result.objective.gradient_alignment, 0.0);
    assert_close(
        result.objective.h_score,
        result.diagnostics.per_source[0].h_score,
        1e-12,
    );
    assert_close(
        result.diagnostics.composed.as_ref().unwrap().h_score,
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
    input.target.eval_split = Some(crate::domain::dataset::Split::Test);
    let mut recorder = Recorder::default();
    let first = Engine::new(tch::Device::Cpu)
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
            .composed
            .as_ref()
            .unwrap()
            .eval_accuracy
            .unwrap()
            > 0.5
    );
    assert!(diagnostics.baselines.is_some());
    for phase in Phase::ALL {
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
        let stopped = Engine::new(tch::Device::Cpu).compose(&input, &mut recorder);
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
    assert!(detail.contains("`p0` and `copy`"), "{detail}");

    let mut narrow = good.clone();
    narrow.sources[1].file = crate::domain::prompt_file::tests::prompt_file(3, 8, 1);
    let (code, detail) = refusal(&narrow);
    assert_eq!(code, "incompatible_source");
    assert!(
        detail.contains("`p1` is 8 wide, but the backbone is 32 wide"),
        "{detail}"
    );

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
        detail.contains("0002.png") && detail.contains("--skip-bad"),
        "{detail}"
    );
    broken.target.skip_bad = true;
    let skipped = compose(&broken).unwrap();
    assert_eq!(skipped.result.diagnostics.skipped_images, 1);
    assert_eq!(skipped.result.diagnostics.num_samples, 59);
}

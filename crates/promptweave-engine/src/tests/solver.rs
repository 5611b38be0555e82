//! Oracles of the solver, on features and gradients of known structure.

use serde::Deserialize;
use tch::Tensor;

use crate::score::alignment::{AlignmentStatistics, GradientAlignment, num_pairs};
use crate::score::gradients::sample_folds;
use crate::score::h_score::HScore;
use crate::solve::jackknife;
use crate::solve::jackknife::standard_errors;
use crate::solve::solver::{Solution, Solver, Terms};
use crate::testing::{
    alignment_statistics, assert_close, features, labels, noise, noise_tensor, standard,
};
use promptweave_domain::objective::{AlignmentVariant, TradeOffRule, Weighing};

fn solve(h_score: &HScore, statistics: AlignmentStatistics, weighing: Weighing) -> Solution {
    solve_as(
        AlignmentVariant::MixtureWeighted,
        h_score,
        statistics,
        weighing,
    )
}

fn solve_as(
    variant: AlignmentVariant,
    h_score: &HScore,
    statistics: AlignmentStatistics,
    weighing: Weighing,
) -> Solution {
    let alignment = GradientAlignment::new(variant, statistics);
    let solution = solve_with(h_score, &alignment, weighing, 0.0);
    assert!((solution.alpha.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    assert!(solution.alpha.iter().all(|weight| *weight >= 0.0));
    solution
}

fn solve_with(
    h_score: &HScore,
    alignment: &GradientAlignment,
    weighing: Weighing,
    entropy: f64,
) -> Solution {
    let mut solver = Solver::new(Terms { h_score, alignment });
    let explored = solver.explore(&mut || Ok(())).unwrap();
    let scale = match weighing {
        Weighing::TradeOff(t) => explored.ranges.at(t),
        Weighing::AlignmentWeight(lambda) => explored.ranges.at_lambda(lambda),
        Weighing::Rule(_) => explored
            .ranges
            .at(0.05 * explored.ranges.knee(&explored.path()) as f64),
    };
    solver
        .choose(explored, scale, entropy, &mut || Ok(()))
        .unwrap()
}

fn no_gradients(m: usize) -> AlignmentStatistics {
    AlignmentStatistics {
        num_sources: m,
        gram: vec![0.0; num_pairs(m).pow(2)],
        variance_gram: vec![0.0; m.pow(2)],
    }
}

#[test]
fn equal_prompts_give_uniform_weights() {
    let labels = labels(30, 3);
    let one = features(&[0.8], &labels, 5, 8);
    let all = Tensor::cat(&[&one, &one, &one], 0);
    let h = HScore::new(&all, &labels, &standard(0.01)).unwrap();
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
fn two_prompts_align_at_the_middle() {
    let labels = labels(40, 3);
    let h = HScore::new(
        &features(&[0.5, 1.5], &labels, 5, 10),
        &labels,
        &standard(0.01),
    )
    .unwrap();
    let gradients = noise_tensor(&[2, 40, 9], 11) * Tensor::from_slice(&[1.0, 3.0]).view([2, 1, 1]);
    for variant in [
        AlignmentVariant::MixtureWeighted,
        AlignmentVariant::MixtureUniform,
        AlignmentVariant::Fishr,
    ] {
        let statistics = alignment_statistics(&gradients);
        let solution = solve_as(variant, &h, statistics, Weighing::TradeOff(1.0));
        assert_close(solution.alpha[0], 0.5, 1e-6);
        assert_eq!(solution.scale.lambda(), None);
    }
}

#[test]
fn alignment_weighs_large_gradients_up() {
    // Uncorrelated gradients with standard deviations (1, 1, 1, 3): α ≈ (.18, .18, .18, .46).
    let gradients =
        noise_tensor(&[4, 400, 60], 12) * Tensor::from_slice(&[1.0, 1.0, 1.0, 3.0]).view([4, 1, 1]);
    let labels = labels(40, 2);
    let h = HScore::new(
        &features(&[0.5; 4], &labels, 5, 13),
        &labels,
        &standard(0.01),
    )
    .unwrap();
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
    let h = HScore::new(&planted, &labels, &standard(0.01)).unwrap();
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
        &standard(0.01),
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
            &standard(0.01),
        )
        .unwrap();
        let statistics = alignment_statistics(&noise_tensor(&[3, 80, 8], 40 + seed));
        let l = GradientAlignment::new(AlignmentVariant::MixtureWeighted, statistics.clone());
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
        &standard(0.01),
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
    let ratio = small.scale.lambda().unwrap() / solution.scale.lambda().unwrap();
    assert_close(ratio, 1e12, 1e-6);

    // A raw λ equal to the effective one finds the same point.
    let raw = Weighing::AlignmentWeight(solution.scale.lambda().unwrap());
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
fn every_point_of_the_path_is_what_its_trade_off_gives_on_its_own() {
    let labels = labels(80, 4);
    let f = features(&[0.4, 0.8, 0.6, 0.5], &labels, 6, 50);
    let h = HScore::new(&f, &labels, &standard(0.01)).unwrap();
    let statistics = alignment_statistics(&noise_tensor(&[4, 80, 8], 51));
    let path = solve(&h, statistics.clone(), Weighing::TradeOff(0.5)).path;
    for point in path.iter().step_by(5) {
        let t = Weighing::TradeOff(point.trade_off);
        let alone = solve(&h, statistics.clone(), t).alpha;
        for (a, b) in point.weights.iter().zip(&alone) {
            assert!((a - b).abs() < 1e-5, "{point:?} {alone:?}");
        }
    }
}

#[test]
fn permuting_the_prompts_permutes_the_weights() {
    let labels = labels(80, 4);
    let f = features(&[0.4, 0.8, 0.6], &labels, 6, 60);
    let g = noise_tensor(&[3, 80, 8], 61);
    let order = Tensor::from_slice(&[2i64, 0, 1]);
    let run = |f: &Tensor, g: &Tensor| {
        let h = HScore::new(f, &labels, &standard(0.01)).unwrap();
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

#[test]
fn both_optima_of_the_worked_example_are_found() {
    #[derive(Deserialize)]
    struct Example {
        features: Vec<Vec<Vec<f64>>>,
        labels: Vec<usize>,
        shrinkage: f64,
        maxima: Vec<Maximum>,
    }
    #[derive(Deserialize)]
    struct Maximum {
        alpha: Vec<f64>,
        h_score: f64,
    }
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/two_optima.json"
    );
    let example: Example = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let by_source: Vec<Tensor> = (example.features.iter())
        .map(|rows| Tensor::from_slice2(rows))
        .collect();
    let f = Tensor::stack(&by_source, 0);
    let h = HScore::new(&f, &example.labels, &standard(example.shrinkage)).unwrap();
    let solution = solve(&h, no_gradients(2), Weighing::TradeOff(0.0));
    assert_eq!(solution.optima.len(), example.maxima.len());
    for (found, expected) in solution.optima.iter().zip(&example.maxima) {
        assert_close(found.h_score, expected.h_score, 1e-9);
        for (a, b) in found.weights.iter().zip(&expected.alpha) {
            assert_close(*a, *b, 1e-6);
        }
    }
}

#[test]
fn the_knee_is_inside_and_farthest_from_the_chord() {
    let labels = labels(80, 4);
    let f = features(&[0.4, 0.8, 0.6, 0.5], &labels, 6, 50);
    let h = HScore::new(&f, &labels, &standard(0.01)).unwrap();
    let statistics = alignment_statistics(&noise_tensor(&[4, 80, 8], 51));
    let knee = solve(&h, statistics, Weighing::Rule(TradeOffRule::Knee));
    let (first, last) = (&knee.path[0], &knee.path[20]);
    let below = |h: f64, l: f64| {
        let x = (first.h_score - h) / (first.h_score - last.h_score);
        let y =
            (l - last.gradient_alignment) / (first.gradient_alignment - last.gradient_alignment);
        1.0 - x - y
    };
    let at_knee = below(knee.h_score, knee.gradient_alignment);
    assert!(at_knee > 0.0);
    for point in &knee.path {
        assert!(at_knee >= below(point.h_score, point.gradient_alignment) - 1e-9);
    }
}

#[test]
fn entropy_makes_every_weight_count_and_vanishes_with_its_strength() {
    let labels = labels(200, 4);
    let f = features(&[0.0, 1.5, 0.0], &labels, 6, 14);
    let h = HScore::new(&f, &labels, &standard(0.1)).unwrap();
    let l = GradientAlignment::new(AlignmentVariant::MixtureWeighted, no_gradients(3));
    let run = |entropy| solve_with(&h, &l, Weighing::TradeOff(0.0), entropy).alpha;
    let (sparse, dense, uniform) = (run(0.0), run(0.1), run(1e4));
    assert!(dense.iter().all(|weight| *weight > 0.0), "{dense:?}");
    assert!((dense.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    assert!(
        dense[1] < sparse[1] && dense[1] > 1.0 / 3.0,
        "{dense:?} {sparse:?}"
    );
    for weight in uniform {
        assert_close(weight, 1.0 / 3.0, 1e-3);
    }
    let near = run(1e-3);
    for (a, b) in near.iter().zip(&sparse) {
        assert!((a - b).abs() < 1e-2, "{near:?} {sparse:?}");
    }
}

#[test]
fn standard_errors_are_those_of_solving_without_each_fold() {
    let labels = labels(60, 3);
    let folds = sample_folds(&labels);
    let f = features(&[0.6, 0.8, 0.7], &labels, 5, 80);
    let g = noise_tensor(&[3, 60, 9], 81);
    let h = HScore::new(&f, &labels, &standard(0.05)).unwrap();
    let l = GradientAlignment::new(AlignmentVariant::MixtureWeighted, alignment_statistics(&g));
    let solution = solve_with(&h, &l, Weighing::TradeOff(0.5), 0.0);
    let of_fold = |fold: usize, is: bool| -> Tensor {
        let rows: Vec<i64> = (0..60)
            .filter(|n| (folds[*n as usize] == fold) == is)
            .collect();
        Tensor::from_slice(&rows)
    };
    let leave_out: Vec<AlignmentStatistics> = (0..10)
        .map(|fold| alignment_statistics(&g.index_select(1, &of_fold(fold, false))))
        .collect();
    let whole = jackknife::Solved {
        h_score: &h,
        features: &f,
        labels: &labels,
        variant: AlignmentVariant::MixtureWeighted,
        scale: solution.scale,
        entropy: 0.0,
        alpha: &solution.alpha,
    };
    let errors = standard_errors(&whole, &leave_out, &mut || Ok(()))
        .unwrap()
        .unwrap();

    // By hand: each fold's problem is made anew, and solved at the same λ from every start.
    let lambda = solution.scale.lambda().unwrap();
    let without: Vec<Vec<f64>> = (0..10)
        .map(|fold| {
            let kept = of_fold(fold, false);
            let rows = Vec::<i64>::try_from(&kept).unwrap();
            let kept_labels: Vec<usize> = rows.iter().map(|n| labels[*n as usize]).collect();
            let h = HScore::new(&f.index_select(1, &kept), &kept_labels, &standard(0.05)).unwrap();
            solve(
                &h,
                leave_out[fold].clone(),
                Weighing::AlignmentWeight(lambda),
            )
            .alpha
        })
        .collect();
    for i in 0..3 {
        let mean = without.iter().map(|a| a[i]).sum::<f64>() / 10.0;
        let squares: f64 = without.iter().map(|a| (a[i] - mean).powi(2)).sum();
        assert_close(errors[i], (0.9 * squares).sqrt(), 1e-5);
    }
    assert!(errors.iter().any(|error| *error > 1e-3), "{errors:?}");
    assert!(
        standard_errors(&whole, &[], &mut || Ok(()))
            .unwrap()
            .is_none()
    );
}

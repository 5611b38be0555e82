//! Oracles of the H-score: against its definition, other code's values, and what it must not depend on.

use std::path::Path;

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::score::h_score::second_moments::SecondMoments;
use crate::score::h_score::sums::{Centring, Sums};
use crate::score::h_score::{Form, HScore, centred, numbered, shrinkage};
use crate::score::head::row_tensor;
use crate::testing::{assert_close, features, labels, noise, noise_tensor, standard};
use promptweave_domain::objective::{
    HScoreMode, HScoreOptions, Shrinkage, ShrinkageEstimate, Standardise,
};

fn h(features: &Tensor, labels: &[usize], options: &HScoreOptions) -> HScore {
    HScore::new(features, labels, options).unwrap()
}

/// Mixed features [N, d], centred; and their class means, one row for each sample.
fn mixed(features: &Tensor, labels: &[usize], alpha: &[f64]) -> (Tensor, Tensor) {
    let (m, n, _) = features.size3().unwrap();
    let weights = Tensor::from_slice(alpha).view([m, 1, 1]);
    let mixed = (features * weights).sum_dim_intlist(0, false, Kind::Double);
    let x = &mixed - mixed.mean_dim(0, true, Kind::Double);
    let rows: Vec<Tensor> = labels
        .iter()
        .map(|label| {
            let same: Vec<i64> = (0..n)
                .filter(|row| labels[*row as usize] == *label)
                .collect();
            x.index_select(0, &Tensor::from_slice(&same))
                .mean_dim(0, false, Kind::Double)
        })
        .collect();
    (x, Tensor::stack(&rows, 0))
}

/// tr(Σ_ρ⁻¹ B)(1-ρ) by its definition, with d × d matrices.
fn naive(features: &Tensor, labels: &[usize], alpha: &[f64], rho: f64) -> f64 {
    let (x, means) = mixed(features, labels, alpha);
    let (n, d) = x.size2().unwrap();
    let scale = (n - 1) as f64;
    let (total, between) = (x.tr().matmul(&x) / scale, means.tr().matmul(&means) / scale);
    let trace = f64::try_from(total.trace()).unwrap() / d as f64;
    let shrunk = total * (1.0 - rho) + Tensor::eye(d, (Kind::Double, Device::Cpu)) * (rho * trace);
    (1.0 - rho) * f64::try_from(shrunk.inverse().matmul(&between).trace()).unwrap()
}

#[test]
fn h_equals_its_definition_in_both_forms_and_stays_in_its_bounds() {
    // 60 samples in 8 dimensions (primal), and 20 in 32 (dual).
    for (n, d) in [(60, 8), (20, 32)] {
        let labels = labels(n, 4);
        let features = features(&[0.5, 1.0, 0.0], &labels, d, 1);
        for rho in [1e-6, 0.01, 0.5] {
            let h = h(&features, &labels, &standard(rho));
            for alpha in [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]] {
                let value = h.value(&alpha).unwrap();
                // At ρ = 1e-6 the inverse itself loses digits if N < d.
                let tolerance = if rho < 1e-3 { 1e-7 } else { 1e-10 };
                assert_close(value, naive(&features, &labels, &alpha, rho), tolerance);
                assert!((0.0..=3.0 + 1e-9).contains(&value));
            }
        }
        let nearly_all = h(&features, &labels, &standard(1.0 - 1e-9));
        assert!(nearly_all.value(&[0.2, 0.3, 0.5]).unwrap() < 1e-6);
    }
}

#[test]
fn no_way_of_keeping_the_moments_changes_a_value() {
    let labels = labels(30, 3);
    let features = features(&[0.5, 1.0, 0.3], &labels, 9, 2);
    let alphas = [[0.2, 0.3, 0.5], [0.0, 0.4, 0.6]];
    let (classes, num_classes) = numbered(&labels);
    for cross_validated in [false, true] {
        let mut of_forms = Vec::new();
        for (dual, packed) in [(false, true), (false, false), (true, true), (true, false)] {
            let centring = Centring::of(&features, Standardise::None);
            let moments = match packed {
                true => SecondMoments::of(&features, &centring, dual),
                false => SecondMoments::made_each_time(centring.apply(&features), dual),
            };
            let sums = Sums::of(centring.blocks(&features), &classes, num_classes);
            let h = HScore::regression(centring, sums, (0.05, cross_validated), moments, &classes);
            let h = h.unwrap();
            let values = alphas.map(|alpha| h.value_and_gradient(&alpha).unwrap());
            let chance = alphas.map(|alpha| h.chance(&alpha).unwrap());
            of_forms.push((values, chance));
        }
        let (first, first_chance) = &of_forms[0];
        for (values, chance) in &of_forms[1..] {
            for k in 0..alphas.len() {
                assert_close(values[k].0, first[k].0, 1e-11);
                assert_close(chance[k], first_chance[k], 1e-10);
                for (a, b) in values[k].1.iter().zip(&first[k].1) {
                    assert_close(*a, *b, 1e-9);
                }
            }
        }
    }
}

#[test]
fn the_dual_form_is_chosen_below_seven_tenths_of_d() {
    for (n, dual) in [(6, true), (7, false)] {
        let labels = labels(n, 2);
        let h = h(&features(&[1.0], &labels, 10, 3), &labels, &standard(0.1));
        assert_eq!(is_dual(&h), dual, "N = {n}");
    }
}

#[test]
fn gradients_agree_with_central_differences_in_every_form() {
    let options = |mode, standardise| HScoreOptions {
        mode: Some(mode),
        standardise,
        shrinkage: Some(Shrinkage::Fixed(0.05)),
    };
    let cases = [
        (40, 7, standard(0.05)),
        (40, 7, standard(0.0)),
        (12, 20, standard(0.05)),
        (40, 7, options(HScoreMode::Standard, Standardise::PerSource)),
        (40, 7, options(HScoreMode::TraceRatio, Standardise::None)),
        (
            40,
            7,
            options(HScoreMode::CrossValidated, Standardise::None),
        ),
        (
            12,
            20,
            options(HScoreMode::CrossValidated, Standardise::PerSource),
        ),
    ];
    for (n, d, options) in cases {
        let labels = labels(n, 3);
        let h = h(
            &features(&[0.5, 1.0, 0.2], &labels, d, 6),
            &labels,
            &options,
        );
        let alpha = [0.2, 0.5, 0.3];
        let (_, gradient) = h.value_and_gradient(&alpha).unwrap();
        for i in 0..3 {
            let direction: Vec<f64> = (0..3)
                .map(|k| f64::from(u8::from(i == k)) - alpha[k])
                .collect();
            let along = |step: f64| {
                let moved: Vec<f64> = (0..3).map(|k| alpha[k] + step * direction[k]).collect();
                h.value(&moved).unwrap()
            };
            let slope: f64 = (0..3).map(|k| gradient[k] * direction[k]).sum();
            let numeric = (along(1e-5) - along(-1e-5)) / 2e-5;
            assert!(
                (slope - numeric).abs() < 1e-6,
                "{options:?}: {slope} {numeric}"
            );
        }
    }
}

#[test]
fn the_trace_ratio_is_the_ratio_of_the_traces() {
    let labels = labels(30, 3);
    let features = features(&[0.5, 1.0], &labels, 6, 4);
    let options = HScoreOptions {
        mode: Some(HScoreMode::TraceRatio),
        ..Default::default()
    };
    let h = h(&features, &labels, &options);
    let alpha = [0.3, 0.7];
    let (x, means) = mixed(&features, &labels, &alpha);
    let sum = |t: &Tensor| f64::try_from(t.square().sum(Kind::Double)).unwrap();
    assert_close(h.value(&alpha).unwrap(), sum(&means) / sum(&x), 1e-10);
    assert_eq!(h.shrinkage(), None);
    // Shuffled labels score (K-1)/(N-1).
    assert_close(h.chance(&alpha).unwrap(), 2.0 / 29.0, 1e-12);
}

/// Compares with the hat matrix of a ridge regression with a free intercept, by its normal
/// equations.
#[test]
fn cross_validated_h_is_the_error_of_a_ridge_regression_by_its_hat_matrix() {
    for (n, d, rho) in [(30, 5, 0.2), (12, 20, 0.2), (19, 20, 0.2), (19, 20, 1e-4)] {
        let labels = labels(n, 3);
        let features = features(&[0.5, 1.0], &labels, d, 4);
        let alpha = [0.3, 0.7];
        let (x, _) = mixed(&features, &labels, &alpha);
        let squares = |t: &Tensor| f64::try_from(t.square().sum(Kind::Double)).unwrap();
        let penalty = rho * squares(&x) / d as f64 / (1.0 - rho);
        let mut penalties = vec![penalty; d];
        penalties.push(0.0);
        let penalties = Tensor::from_slice(&penalties).diag(0);
        let ones = Tensor::ones([n as i64, 1], (Kind::Double, Device::Cpu));
        let x = Tensor::cat(&[x, ones], 1);
        let hat = x
            .matmul(&(x.tr().matmul(&x) + penalties).inverse())
            .matmul(&x.tr());
        let z: Vec<f64> = (labels.iter())
            .flat_map(|label| {
                let size = labels.iter().filter(|other| *other == label).count() as f64;
                (0..3).map(move |k| f64::from(u8::from(k == *label)) / size.sqrt())
            })
            .collect();
        let z = Tensor::from_slice(&z).view([n as i64, 3]);
        let residual = 1.0 - f64::try_from(hat.trace()).unwrap() / n as f64;
        let expected = 2.0 - squares(&(&z - hat.matmul(&z))) / residual.powi(2);
        let options = HScoreOptions {
            mode: Some(HScoreMode::CrossValidated),
            ..standard(rho)
        };
        let h = h(&features, &labels, &options);
        assert_eq!(is_dual(&h), n < d);
        // At a small ρ the error is tiny, and the reference loses digits of it.
        let tolerance = if rho < 1e-3 { 1e-5 } else { 1e-9 };
        assert_close(h.value(&alpha).unwrap(), expected, tolerance);
        assert_eq!(h.shrinkage(), Some(rho));
    }
}

fn is_dual(h: &HScore) -> bool {
    match &h.form {
        Form::Regression(regression) => regression.moments.is_dual(),
        Form::TraceRatio { .. } => false,
    }
}

#[test]
fn standardised_features_do_not_depend_on_the_units_of_any_coordinate() {
    let labels = labels(40, 3);
    let f = features(&[0.5, 1.0], &labels, 6, 5);
    let units = noise_tensor(&[2, 1, 6], 6).abs() + 0.1;
    let scaled = &f * units;
    let options = HScoreOptions {
        standardise: Standardise::PerSource,
        ..standard(0.1)
    };
    let value =
        |f: &Tensor, options: &HScoreOptions| h(f, &labels, options).value(&[0.4, 0.6]).unwrap();
    assert_close(value(&scaled, &options), value(&f, &options), 1e-10);
    assert!((value(&scaled, &standard(0.1)) - value(&f, &standard(0.1))).abs() > 1e-3);
    // A constant coordinate is left at 0.
    let constant = Tensor::cat(
        &[&f, &Tensor::ones([2, 40, 1], (Kind::Double, Device::Cpu))],
        2,
    );
    assert!(value(&constant, &options).is_finite());
}

#[test]
fn h_without_shrinkage_is_the_sum_of_squared_canonical_correlations() {
    let labels = labels(50, 4);
    let features = features(&[0.8], &labels, 6, 7);
    // Orthonormal bases of the centred features and of the centred class indicators. The singular
    // values of their product are the canonical correlations.
    let x = centred(&features, Standardise::None).get(0);
    let mut indicators = vec![0.0; 50 * 3];
    for (row, label) in labels.iter().enumerate().filter(|(_, label)| **label < 3) {
        indicators[row * 3 + label] = 1.0;
    }
    let y = Tensor::from_slice(&indicators).view([50, 3]);
    let y = &y - y.mean_dim(0, true, Kind::Double);
    let basis = |t: &Tensor| Tensor::linalg_qr(t, "reduced").0;
    let product = basis(&x).tr().matmul(&basis(&y));
    let squares = f64::try_from(product.square().sum(Kind::Double)).unwrap();
    let value = h(&features, &labels, &standard(0.0)).value(&[1.0]).unwrap();
    assert_close(value, squares, 1e-9);
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
    let value = h(&features, &labels, &standard(0.0)).value(&[1.0]).unwrap();
    assert_close(value, between / total, 1e-9);
}

#[test]
fn h_ignores_scale_shift_rotation_order_and_names() {
    let labels = labels(50, 3);
    let f = features(&[0.5, 1.0], &labels, 6, 3);
    let alpha = [0.4, 0.6];
    let value = |f: &Tensor, labels: &[usize], alpha: &[f64], rho| {
        h(f, labels, &standard(rho)).value(alpha).unwrap()
    };
    let shrunk = value(&f, &labels, &alpha, 0.1);
    assert_close(value(&f, &labels, &[2.8, 4.2], 0.1), shrunk, 1e-10);
    assert_close(value(&(&f + 5.0), &labels, &alpha, 0.1), shrunk, 1e-10);
    let (rotation, _) = Tensor::linalg_qr(&noise_tensor(&[6, 6], 4), "complete");
    let rotated = f.matmul(&rotation) * 3.0;
    assert_close(value(&rotated, &labels, &alpha, 0.1), shrunk, 1e-9);
    // A map that is not orthogonal changes H if ρ > 0, and does not if ρ = 0.
    let skewed = f.matmul(&noise_tensor(&[6, 6], 5));
    assert!((value(&skewed, &labels, &alpha, 0.1) - shrunk).abs() > 1e-3);
    let plain = value(&f, &labels, &alpha, 0.0);
    assert_close(value(&skewed, &labels, &alpha, 0.0), plain, 1e-8);

    let reversed: Vec<usize> = labels.iter().rev().map(|label| 2 - label).collect();
    assert_close(value(&f.flip([1]), &reversed, &alpha, 0.1), shrunk, 1e-10);
}

#[test]
fn shuffled_labels_score_what_chance_says() {
    for (n, d, mode) in [
        (40, 6, HScoreMode::Standard),
        (14, 30, HScoreMode::Standard),
        (40, 6, HScoreMode::TraceRatio),
        (40, 6, HScoreMode::CrossValidated),
        (14, 30, HScoreMode::CrossValidated),
    ] {
        let labels = labels(n, 4);
        let f = features(&[1.0], &labels, d, 11);
        let options = HScoreOptions {
            mode: Some(mode),
            ..standard(0.1)
        };
        let expected = h(&f, &labels, &options).chance(&[1.0]).unwrap();
        let shuffles = 400;
        let (mut scores, mut adjusted) = (Vec::new(), 0.0);
        for seed in 0..shuffles {
            let keys = noise(n, 100 + seed);
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| keys[*a].total_cmp(&keys[*b]));
            let shuffled: Vec<usize> = order.iter().map(|row| labels[*row]).collect();
            let h = h(&f, &shuffled, &options);
            scores.push(h.value(&[1.0]).unwrap());
            adjusted += h.adjusted(&[1.0]).unwrap() / shuffles as f64;
        }
        let count = scores.len() as f64;
        let mean = scores.iter().sum::<f64>() / count;
        let variance = scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let error = (variance / count).sqrt();
        assert!(
            (mean - expected).abs() < 3.0 * error,
            "{mean} ± {error}: {expected}"
        );
        assert!(adjusted.abs() < 0.03, "{adjusted}");
    }
}

#[test]
fn too_few_samples_without_shrinkage_are_refused_with_the_way_out() {
    let labels = labels(9, 3);
    let noise = noise_tensor(&[1, 9, 8], 8);
    let refused = HScore::new(&noise, &labels, &standard(0.0)).err().unwrap();
    assert!(refused.to_string().contains("set it to 0.01"), "{refused}");
    // Without shrinkage, everything up to N = d+1 scores K-1.
    let nearly = h(&noise, &labels, &standard(1e-6)).value(&[1.0]).unwrap();
    assert!(nearly > 1.99, "{nearly}");
}

#[test]
fn leaving_samples_out_is_not_having_had_them() {
    let labels = labels(40, 4);
    let of_class_two: Vec<usize> = (0..40).filter(|row| labels[*row] == 2).collect();
    let trace_ratio = HScoreOptions {
        mode: Some(HScoreMode::TraceRatio),
        ..standard(0.05)
    };
    let cross_validated = HScoreOptions {
        mode: Some(HScoreMode::CrossValidated),
        ..standard(0.05)
    };
    // In the primal form and in the dual one.
    for (d, options) in [
        (6, standard(0.05)),
        (90, standard(0.05)),
        (6, trace_ratio),
        (6, cross_validated.clone()),
        (90, cross_validated),
    ] {
        let f = features(&[0.5, 1.0], &labels, d, 9);
        for rows in [&[3, 4, 17, 39][..], &of_class_two] {
            let kept: Vec<usize> = (0..40).filter(|row| !rows.contains(row)).collect();
            let kept_labels: Vec<usize> = kept.iter().map(|row| labels[*row]).collect();
            let kept_features = f.index_select(1, &row_tensor(&kept));
            let left = h(&f, &labels, &options).without(&f, &labels, rows).unwrap();
            let anew = h(&kept_features, &kept_labels, &options);
            let (value, gradient) = left.value_and_gradient(&[0.3, 0.7]).unwrap();
            let (expected, slopes) = anew.value_and_gradient(&[0.3, 0.7]).unwrap();
            assert_close(value, expected, 1e-10);
            for (a, b) in gradient.iter().zip(&slopes) {
                assert_close(*a, *b, 1e-9);
            }
        }
    }
}

#[test]
fn standardisation_stays_as_it_was_when_samples_are_left_out() {
    let labels = labels(40, 4);
    let f = features(&[0.5, 1.0], &labels, 6, 9);
    let rows: Vec<usize> = (0..40).step_by(9).collect();
    let kept: Vec<usize> = (0..40).filter(|row| row % 9 != 0).collect();
    let kept_labels: Vec<usize> = kept.iter().map(|row| labels[*row]).collect();
    let standardised = HScoreOptions {
        standardise: Standardise::PerSource,
        ..standard(0.05)
    };
    let left = h(&f, &labels, &standardised)
        .without(&f, &labels, &rows)
        .unwrap();
    let scaled = centred(&f, Standardise::PerSource).index_select(1, &row_tensor(&kept));
    let expected = h(&scaled, &kept_labels, &standard(0.05))
        .value(&[0.3, 0.7])
        .unwrap();
    assert_close(left.value(&[0.3, 0.7]).unwrap(), expected, 1e-10);
}

#[test]
fn degenerate_targets_stay_finite() {
    let labels = labels(30, 3);
    let one = features(&[0.8], &labels, 5, 9);
    let opposite = h(&Tensor::cat(&[&one, &(-&one)], 0), &labels, &standard(0.01));
    let (value, gradient) = opposite.value_and_gradient(&[0.5, 0.5]).unwrap();
    assert!(value.is_finite() && gradient.iter().all(|g| g.is_finite()));
    // One class: nothing to tell apart.
    let single = h(&one, &[0; 30], &standard(0.01));
    assert_close(single.value(&[1.0]).unwrap(), 0.0, 1e-12);
    assert_eq!(single.adjusted(&[1.0]).unwrap(), 0.0);
    // An absent class is ignored, a singleton is finite.
    let renumbered: Vec<usize> = labels.iter().map(|label| 2 * label).collect();
    let (a, b) = (
        h(&one, &labels, &standard(0.01)),
        h(&one, &renumbered, &standard(0.01)),
    );
    assert_close(a.value(&[1.0]).unwrap(), b.value(&[1.0]).unwrap(), 1e-12);
    let mut with_singleton = labels.clone();
    with_singleton[0] = 3;
    assert!(
        h(&one, &with_singleton, &standard(0.01))
            .value(&[1.0])
            .unwrap()
            .is_finite()
    );
}

// ---- Other code's values (scripts/reference/scores.py) ------------------------------------------

fn fixture<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/scores");
    serde_json::from_slice(&std::fs::read(path.join(name)).unwrap()).unwrap()
}

fn matrix(rows: &[Vec<f64>]) -> Tensor {
    Tensor::from_slice2(rows)
}

#[test]
fn estimated_shrinkage_is_scikit_learns() {
    #[derive(Deserialize)]
    struct Case {
        samples: Vec<Vec<f64>>,
        ledoit_wolf: f64,
        oas: f64,
    }
    for case in fixture::<Vec<Case>>("shrinkage.json") {
        let x = matrix(&case.samples);
        let x = &x - x.mean_dim(0, true, Kind::Double);
        let rho = |by| shrinkage::estimate(&x, by).unwrap();
        assert_close(rho(ShrinkageEstimate::LedoitWolf), case.ledoit_wolf, 1e-12);
        assert_close(rho(ShrinkageEstimate::Oas), case.oas, 1e-12);
        // The same from the transposed product, which is used if N < d.
        let wide = noise_tensor(&[6, 11], 1);
        let padded = Tensor::cat(&[&wide, &Tensor::zeros([0, 11], tch::kind::DOUBLE_CPU)], 0);
        let estimate = shrinkage::estimate(&padded, ShrinkageEstimate::Oas).unwrap();
        assert!((0.0..=1.0).contains(&estimate));
    }
}

#[test]
fn h_is_the_transfer_learning_librarys() {
    #[derive(Deserialize)]
    struct Case {
        features: Vec<Vec<f64>>,
        labels: Vec<usize>,
        h_score: Option<f64>,
        ledoit_wolf: f64,
        regularized_h_score: f64,
    }
    for case in fixture::<Vec<Case>>("scores.json") {
        let x = matrix(&case.features).unsqueeze(0);
        let by_ledoit_wolf = HScoreOptions {
            shrinkage: Some(Shrinkage::Estimated(ShrinkageEstimate::LedoitWolf)),
            ..standard(0.0)
        };
        let h_lw = h(&x, &case.labels, &by_ledoit_wolf);
        assert_close(h_lw.shrinkage().unwrap(), case.ledoit_wolf, 1e-10);
        // The reference's covariance is over N, but its class means' covariance over N-1.
        let n = case.labels.len() as f64;
        let ours = h_lw.value(&[1.0]).unwrap() * n / (n - 1.0);
        assert_close(ours, case.regularized_h_score, 1e-9);
        if let Some(expected) = case.h_score {
            let ours = h(&x, &case.labels, &standard(0.0)).value(&[1.0]).unwrap();
            assert_close(ours, expected, 1e-8);
        }
    }
}

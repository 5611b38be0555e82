use serde::Deserialize;
use tch::{Kind, Tensor};

use crate::pool::solver::{Predictions, Pull};
use crate::pool::unseen::UnseenPredictions;
use crate::pool::{EPSILON, Pool, fit};
use crate::testing::{assert_close, features, labels, noise, noise_tensor};
use promptweave_domain::objective;
use promptweave_domain::objective::HeadOptions;

/// What `scripts/reference/pool.py` wrote.
#[derive(Deserialize)]
struct Reference {
    log_p: Vec<Vec<Vec<f32>>>,
    labels: Vec<usize>,
    sharpness: f64,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    beta: f64,
    weights: Vec<f64>,
    value: f64,
}

fn reference() -> Reference {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/pool.json"
    );
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn tensor(log_p: &[Vec<Vec<f32>>]) -> Tensor {
    let flat: Vec<f32> = log_p.iter().flatten().flatten().copied().collect();
    let (m, n, k) = (log_p.len(), log_p[0].len(), log_p[0][0].len());
    Tensor::from_slice(&flat).view([m as i64, n as i64, k as i64])
}

fn go_on() -> Result<(), crate::error::EngineError> {
    Ok(())
}

fn minimise(predictions: &Predictions, pull: Pull, start: &[f64]) -> Vec<f64> {
    let found = predictions.minimise(pull, start, &mut go_on).unwrap();
    assert!(found.converged, "{found:?}");
    found.weights
}

/// Log-probabilities of sources that favour the right class by the given strengths.
fn random(strengths: &[f64], labels: &[usize], classes: i64, seed: u64) -> Tensor {
    let (m, n) = (strengths.len() as i64, labels.len() as i64);
    let right: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
    let right = Tensor::from_slice(&right).one_hot(classes).unsqueeze(0);
    let strengths = Tensor::from_slice(strengths).view([m, 1, 1]);
    (noise_tensor(&[m, n, classes], seed) + strengths * right).log_softmax(-1, Kind::Double)
}

fn options(beta: f64, top_k: Option<usize>) -> objective::Pool {
    objective::Pool {
        beta,
        top_k,
        fallback: None,
    }
}

fn fit_all(predictions: &Predictions, labels: &[usize], beta: f64, top_k: Option<usize>) -> Pool {
    fit(predictions, labels, &options(beta, top_k), &mut go_on).unwrap()
}

#[test]
fn the_optimum_is_scipys_from_any_start() {
    let reference = reference();
    let predictions = Predictions::new(tensor(&reference.log_p), &reference.labels);
    let m = predictions.num_sources();
    let free = Pull {
        beta: 0.0,
        centre: 1.0,
    };
    let sharpness = minimise(&predictions.mean(), free, &[1.0])[0];
    assert_close(sharpness, reference.sharpness, 1e-6);
    for case in &reference.cases {
        let pull = Pull {
            beta: case.beta,
            centre: reference.sharpness / m as f64,
        };
        for start in [
            vec![pull.centre; m],
            vec![1.0; m],
            vec![1e-3; m],
            vec![0.1, 5.0, 0.1, 2.0, 1e-9],
        ] {
            let found = predictions.minimise(pull, &start, &mut go_on).unwrap();
            assert!(found.converged && found.iterations < 40, "{found:?}");
            assert_close(found.value, case.value, 1e-10);
            for (found, expected) in found.weights.iter().zip(&case.weights) {
                assert!(
                    (found - expected).abs() < 1e-6,
                    "β = {}: {found} is not {expected}",
                    case.beta
                );
            }
        }
    }
}

#[test]
fn the_objective_is_convex_on_random_segments() {
    let labels = labels(40, 3);
    let predictions = Predictions::new(random(&[1.0, 0.5, 0.0, 2.0], &labels, 3, 1), &labels);
    let pull = Pull {
        beta: 3.0,
        centre: 0.4,
    };
    let value = |w: &[f64]| predictions.loss(w) + pull.value(w) / 40.0;
    for segment in 0..200 {
        let ends = noise(8, 100 + segment);
        let (a, b): (Vec<f64>, Vec<f64>) = (0..4)
            .map(|i| (ends[i].abs() * 2.0, ends[4 + i].abs() * 2.0))
            .unzip();
        let middle: Vec<f64> = a.iter().zip(&b).map(|(a, b)| 0.5 * (a + b)).collect();
        assert!(value(&middle) <= 0.5 * (value(&a) + value(&b)) + 1e-12);
    }
}

#[test]
fn derivatives_are_central_differences() {
    let labels = labels(30, 4);
    let predictions = Predictions::new(random(&[1.0, 0.5, 0.0], &labels, 4, 2), &labels);
    let pull = Pull {
        beta: 2.0,
        centre: 0.3,
    };
    let at = [0.7, 0.2, 1.1];
    let point = predictions.point(&at, pull);
    assert_close(
        point.value,
        predictions.loss(&at) + pull.value(&at) / 30.0,
        1e-13,
    );
    for i in 0..3 {
        let moved = |by: f64| {
            let mut w = at;
            w[i] += by;
            predictions.point(&w, pull)
        };
        let (above, below) = (moved(1e-5), moved(-1e-5));
        let slope = (above.value - below.value) / 2e-5;
        assert_close(point.gradient.double_value(&[i as i64]), slope, 1e-7);
        for j in 0..3 {
            let of = |point: &crate::pool::solver::Point| point.gradient.double_value(&[j]);
            let curvature = (of(&above) - of(&below)) / 2e-5;
            assert_close(point.hessian.double_value(&[i as i64, j]), curvature, 1e-6);
        }
    }
}

#[test]
fn samples_in_chunks_are_the_samples_at_once() {
    let labels = labels(50, 3);
    let log_p = random(&[1.0, 0.3], &labels, 3, 3);
    let whole = Predictions::new(log_p.shallow_clone(), &labels);
    let mut chunked = Predictions::new(log_p, &labels);
    // Seven samples a chunk, and one in the last.
    chunked.chunk_bytes = 7 * 8 * 2 * 3;
    let pull = Pull {
        beta: 1.0,
        centre: 0.5,
    };
    let (a, b) = (
        minimise(&whole, pull, &[0.5; 2]),
        minimise(&chunked, pull, &[0.5; 2]),
    );
    for (a, b) in a.iter().zip(&b) {
        assert_close(*a, *b, 1e-12);
    }
    let difference = whole.pooled(&a) - chunked.pooled(&a);
    assert!(difference.abs().max().double_value(&[]) < 1e-13);
}

#[test]
fn weights_follow_their_sources_and_duplicates_share_theirs() {
    let labels = labels(60, 3);
    let log_p = random(&[1.5, 0.6, 0.0], &labels, 3, 4);
    let order = Tensor::from_slice(&[2i64, 0, 1, 0]);
    let fitted = fit_all(
        &Predictions::new(log_p.shallow_clone(), &labels),
        &labels,
        10.0,
        None,
    );
    let turned = log_p.index_select(0, &Tensor::from_slice(&[2i64, 0, 1]));
    let turned = fit_all(&Predictions::new(turned, &labels), &labels, 10.0, None);
    for (i, j) in [(0, 1), (1, 2), (2, 0)] {
        assert_close(fitted.alpha[i], turned.alpha[j], 1e-9);
        assert_close(fitted.standard_errors[i], turned.standard_errors[j], 1e-7);
    }
    let doubled = Predictions::new(log_p.index_select(0, &order), &labels);
    let doubled = fit_all(&doubled, &labels, 1e-3, None);
    assert_close(doubled.alpha[1], doubled.alpha[3], 1e-9);
    let alone = fit_all(&Predictions::new(log_p, &labels), &labels, 1e-3, None);
    assert!((doubled.alpha[1] + doubled.alpha[3] - alone.alpha[0]).abs() < 0.01);
    assert_close(fitted.alpha.iter().sum(), 1.0, 1e-12);
}

#[test]
fn a_strong_pull_gives_the_uniform_pool_and_none_gives_a_perfect_source_all() {
    let labels = labels(90, 3);
    let log_p = random(&[2.5, 2.0, 1.5], &labels, 3, 5);
    let pulled = fit_all(
        &Predictions::new(log_p.shallow_clone(), &labels),
        &labels,
        1e9,
        None,
    );
    for alpha in &pulled.alpha {
        assert_close(*alpha, 1.0 / 3.0, 1e-6);
    }
    assert_close(pulled.sharpness, pulled.uniform_sharpness, 1e-6);
    assert_close(pulled.loss, pulled.uniform_loss, 1e-7);
    // One source is right as often as it says, and the others know nothing.
    let many = self::labels(1200, 3);
    let said = many
        .iter()
        .enumerate()
        .map(|(n, label)| (label + usize::from(n % 20 == 0)) % 3);
    let said: Vec<i64> = said.map(|label| label as i64).collect();
    let said = Tensor::from_slice(&said).one_hot(3).to_kind(Kind::Double);
    let honest = (said * 0.925 + 0.025).log().unsqueeze(0);
    let log_p = Tensor::cat(&[honest, random(&[0.0, 0.0], &many, 3, 6)], 0);
    let free = fit_all(&Predictions::new(log_p, &many), &many, 0.0, None);
    assert!(free.alpha[0] > 0.9, "{free:?}");
    assert!((free.sharpness - 1.0).abs() < 0.1, "{free:?}");
    assert!(free.loss < free.source_losses[0] + 1e-12);
}

#[test]
fn two_sources_that_know_different_classes_do_better_together() {
    let labels = labels(400, 4);
    let knows = |half: usize, seed: u64| {
        let strengths: Vec<f64> = labels
            .iter()
            .map(|label| if label / 2 == half { 2.5 } else { 0.0 })
            .collect();
        let right = random(&[0.0], &labels, 4, seed);
        let of: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
        let signal =
            Tensor::from_slice(&of).one_hot(4) * Tensor::from_slice(&strengths).unsqueeze(1);
        (right + signal.unsqueeze(0)).log_softmax(-1, Kind::Double)
    };
    let useless = random(&[0.0], &labels, 4, 13);
    let log_p = Tensor::cat(&[knows(0, 11), knows(1, 12), useless], 0);
    let predictions = Predictions::new(log_p, &labels);
    let pool = fit_all(&predictions, &labels, 10.0, None);
    let best = pool
        .source_losses
        .iter()
        .copied()
        .fold(f64::INFINITY, f64::min);
    assert!(
        pool.loss < best - 0.2 && pool.loss < pool.uniform_loss,
        "{pool:?}"
    );
    assert!(
        pool.alpha[0] > 0.3 && pool.alpha[1] > 0.3 && pool.alpha[2] < 0.15,
        "{pool:?}"
    );
    // The two largest weights are fitted again without the third.
    let two = fit_all(&predictions, &labels, 10.0, Some(2));
    assert_eq!((two.alpha[2], two.standard_errors[2]), (0.0, 0.0));
    let of_two = fit_all(&predictions.of_sources(&[0, 1]), &labels, 10.0, None);
    assert_close(two.alpha[0], of_two.alpha[0], 1e-9);
    assert_close(two.loss, of_two.loss, 1e-12);
}

#[test]
fn useless_and_single_sources_have_an_answer() {
    let labels = labels(30, 3);
    // Every prediction is the same: no sharpness is better than another.
    let equal = Tensor::full(
        [2, 30, 3],
        (1f64 / 3.0).ln(),
        (Kind::Double, tch::Device::Cpu),
    );
    let pool = fit_all(&Predictions::new(equal, &labels), &labels, 10.0, None);
    // None of them knows anything: all weight is on the last, the backbone without a prompt.
    assert_eq!(pool.alpha, [0.0, 1.0]);
    assert_eq!(pool.over_prompts(), [1.0]);
    assert_close(pool.loss, 3f64.ln(), 1e-12);
    assert_eq!(pool.gain, (0.0, 0.0));
    // Sources that are wrong get next to no sharpness.
    let wrong = fit_all(
        &Predictions::new(random(&[-3.0, -3.0], &labels, 3, 7), &labels),
        &labels,
        10.0,
        None,
    );
    assert!(
        wrong.sharpness < 0.01 && wrong.loss < 3f64.ln() + 1e-3,
        "{wrong:?}"
    );
    let one = fit_all(
        &Predictions::new(random(&[1.0], &labels, 3, 8), &labels),
        &labels,
        10.0,
        Some(5),
    );
    assert_eq!((one.alpha[0], one.standard_errors[0]), (1.0, 0.0));
}

/// What one source of these features, and the backbone without a prompt, predict.
fn unseen(all: &Tensor, labels: &[usize], classes: usize) -> UnseenPredictions {
    let without = noise_tensor(&[labels.len() as i64, 6], 3);
    let head = HeadOptions::default();
    UnseenPredictions::new(all, without, labels, classes, &head, &mut go_on).unwrap()
}

#[test]
fn predictions_are_by_heads_that_did_not_see_the_sample() {
    let mut of_samples = labels(45, 3);
    let all = features(&[2.0], &of_samples, 6, 9);
    let found = unseen(&all, &of_samples, 3);
    assert_eq!(found.log_p.size(), [2, 45, 3]);
    let sums = found.log_p.exp().sum_dim_intlist(2, false, Kind::Double);
    assert!((sums - 1.0).abs().max().double_value(&[]) < 1e-5);
    assert!(found.log_p.min().double_value(&[]) >= (EPSILON / 3.0).ln() - 1e-5);
    // The source knows the classes, and noise does not.
    let (predictions, known) = found.labelled(&of_samples);
    assert_eq!(known, of_samples);
    let pool = fit_all(&predictions, &known, 10.0, None);
    let (gain, error) = pool.gain;
    assert!(pool.alpha[0] > 0.8 && gain > 3.0 * error, "{pool:?}");
    assert_close(gain, pool.source_losses[1] - pool.loss, 1e-12);
    assert_eq!(pool.over_prompts(), [1.0]);
    // A class with one sample is unknown to the head that predicts it, and has the probability that all classes have.
    of_samples[0] = 3;
    let found = unseen(&all, &of_samples, 4);
    let least = found.log_p.double_value(&[0, 0, 3]);
    assert_close(least, (EPSILON / 4.0).ln(), 1e-5);
    assert!(bool::try_from(found.log_p.isfinite().all()).unwrap());
    // So it is left out of the pool, which the other samples decide.
    let (predictions, known) = found.labelled(&of_samples);
    assert_eq!(
        (predictions.num_samples(), known.as_slice()),
        (44, &of_samples[1..])
    );
    assert!(fit_all(&predictions, &known, 10.0, None).alpha[0] > 0.8);
    // With such samples alone, nothing is known.
    let of_samples: Vec<usize> = (0..8).collect();
    let found = unseen(&all.narrow(1, 0, 8), &of_samples, 8);
    let (predictions, known) = found.labelled(&of_samples);
    assert_eq!(known.len(), 8);
    assert_eq!(fit_all(&predictions, &known, 10.0, None).alpha, [0.0, 1.0]);
}

#[test]
fn heads_for_other_images_are_as_sure_as_they_are_right() {
    let of_samples = labels(300, 3);
    // The first 150 are samples, the others are new.
    let all = features(&[0.7], &of_samples, 6, 11);
    let (seen, new) = (all.narrow(1, 0, 150), all.get(0).narrow(0, 150, 150));
    let found = unseen(&seen, &of_samples[..150], 3);
    let heads = found.heads(&seen, &of_samples[..150], &HeadOptions::default());
    let logits = heads.unwrap()[0].logits(&new);
    let p = logits.softmax(-1, Kind::Double).max_dim(1, false).0;
    let right = crate::score::evaluate::correct(&logits, &of_samples[150..]).unwrap();
    let accuracy = right.iter().filter(|right| **right).count() as f64 / 150.0;
    let sure = p.mean(Kind::Double).double_value(&[]);
    assert!((sure - accuracy).abs() < 0.1, "{sure} {accuracy}");
}

#[test]
fn a_source_that_knows_nothing_or_adds_nothing_is_left_out() {
    let labels = labels(300, 3);
    let log_p = random(&[2.5, 2.0, 0.0, 0.0, 0.0, 0.0], &labels, 3, 21);
    let predictions = Predictions::new(log_p, &labels);
    let pool = fit_all(&predictions, &labels, 10.0, None);
    let members = pool.members();
    assert!(
        members.len() < 6 && members.starts_with(&[0, 1]),
        "{pool:?}"
    );
    let of_members = fit_all(&predictions.of_sources(&members), &labels, 10.0, None);
    assert_close(pool.alpha[0], of_members.alpha[0], 1e-9);
    // Equal sources are all kept, however many they are.
    let equal = predictions.of_sources(&[0; 64]);
    assert_eq!(fit_all(&equal, &labels, 10.0, None).members().len(), 64);
}

/// Many weak sources are never wrong together, so that no sharpness is the largest. Their second derivatives vanish, and
/// must not become negative by rounding.
#[test]
fn sources_that_are_never_wrong_together_have_a_pool() {
    for (m, n, k, strength) in [(64, 300, 20, 3.0), (24, 500, 10, 8.0), (8, 200, 5, 40.0)] {
        for seed in 0..4 {
            let labels: Vec<usize> = (0..n).map(|i| i % k).collect();
            let strengths: Vec<f64> = (0..m).map(|i| strength * i as f64 / m as f64).collect();
            let log_p = random(&strengths, &labels, k as i64, seed).to_kind(Kind::Float);
            let predictions = Predictions::new(log_p, &labels);
            assert_eq!(predictions.mean().accuracy(&[1.0]), 1.0);
            for beta in [0.0, 10.0] {
                let pool = fit_all(&predictions, &labels, beta, None);
                let sum: f64 = pool.alpha.iter().sum();
                assert!(
                    (sum - 1.0).abs() < 1e-9 && pool.sharpness.is_finite(),
                    "{pool:?}"
                );
                assert!(pool.loss < 0.05 && pool.accuracy == 1.0, "{pool:?}");
                assert!(pool.standard_errors.iter().all(|error| error.is_finite()));
            }
        }
    }
}

#[test]
fn fitting_stops_when_told_to() {
    let labels = labels(30, 3);
    let predictions = Predictions::new(random(&[1.0, 0.0], &labels, 3, 10), &labels);
    let mut stop = || Err(crate::error::EngineError::Stopped);
    assert!(matches!(
        fit(&predictions, &labels, &options(10.0, None), &mut stop),
        Err(crate::error::EngineError::Stopped)
    ));
}

//! Transferability of one source prompt on its own, in closed form: how well its features fit the
//! target's labels, without the other sources.
//!
//! | score | from | higher means |
//! |---|---|---|
//! | LogME (You et al. 2021) | features, labels | a linear map explains the labels with more evidence |
//! | LEEP (Nguyen et al. 2020), NCE (Tran et al. 2019) | source head, labels | source classes predict target classes |
//! | OTCE (Tan et al. 2021) | feature sketch, labels | the nearest source samples predict target classes |
//!
//! None depends on the order of the samples or on the names of the labels. All numbers are in nats.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::device::threads::OneThread;
use crate::error::EngineError;
use crate::samples::classes::numbered;
use crate::score::assignment;
use promptweave_domain::prompt_file::{Head, PromptFile, Sketch};
use promptweave_domain::stratified::stratified_subset;
use promptweave_domain::tensor::Tensor as PlainTensor;

/// The most samples of either side in an optimal transport, which takes time cubic in them.
const MAX_TRANSPORT: usize = 400;

/// Scores of one source; `None` if its prompt file lacks what a score needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceScores {
    pub logme: f64,
    /// LEEP ≤ 0; needs the source head.
    pub leep: Option<f64>,
    /// NCE ≤ 0; needs the source head.
    pub nce: Option<f64>,
    /// OTCE = -H(Y_t|Y_s) ≤ 0; needs the sketch.
    pub otce: Option<f64>,
}

impl SourceScores {
    /// Scores a source. `features` [N, d] are the target's samples under this source's prompt;
    /// `labels` has N entries.
    pub fn of(
        features: &Tensor,
        labels: &[usize],
        prompt_file: &PromptFile,
    ) -> Result<Self, EngineError> {
        let _alone = OneThread::begin();
        let features = features.to_device(Device::Cpu).to_kind(Kind::Double);
        let theta = prompt_file
            .head
            .as_ref()
            .map(|head| probabilities(&features, head));
        let sketch = prompt_file
            .sketch
            .as_ref()
            .filter(|sketch| !sketch.labels.values.is_empty());
        Ok(Self {
            logme: logme(&features, labels)?,
            leep: theta.as_ref().map(|t| leep(t, labels)).transpose()?,
            nce: theta.as_ref().map(|t| nce(t, labels)).transpose()?,
            otce: sketch
                .map(|sketch| Ok::<_, EngineError>(otce(sketch, &features, labels)?.score))
                .transpose()?,
        })
    }
}

/// Probabilities of the source classes: θ = softmax(W f + b), [N, d] → [N, C_s].
fn probabilities(features: &Tensor, head: &Head) -> Tensor {
    features
        .linear(&matrix(&head.weight), Some(&matrix(&head.bias)))
        .softmax(-1, None)
}

/// A file's tensor, in f64.
pub fn matrix(plain: &PlainTensor<f32>) -> Tensor {
    let shape: Vec<i64> = plain.shape.iter().map(|size| *size as i64).collect();
    Tensor::from_slice(&plain.values)
        .view(shape.as_slice())
        .to_kind(Kind::Double)
}

/// LogME: the mean over the classes present of ln p(y | F)/N, the evidence of a Bayesian linear
/// model of the class's indicator y, maximised over the precisions α of the weights and β of the
/// noise. `features` is [N, d], not centred.
///
/// This is the fixed-point algorithm of arXiv 2110.10545 as its authors published it. For N < d
/// their code leaves the term -(d-N)/2·ln α out of the evidence, and so does this one. Only numbers
/// of equal N and d can be compared.
pub fn logme(features: &Tensor, labels: &[usize]) -> Result<f64, EngineError> {
    let x = finite(features, "the features")?;
    let (n, d) = x.size2()?;
    let (classes, num_classes) = numbered(labels);
    let y = one_hot(&classes, num_classes);
    // Only σ = s² and (s uᵀy)² of the singular value decomposition F = U S Vᵀ are needed. They come
    // from the smaller of FᵀF and FFᵀ.
    let (sigma, projected) = if n > d {
        let (sigma, v) = x.tr().matmul(&x).f_linalg_eigh("L")?;
        let projected = v.tr().matmul(&x.tr().matmul(&y)).square();
        (sigma, projected)
    } else {
        let (sigma, u) = x.matmul(&x.tr()).f_linalg_eigh("L")?;
        let projected = u.tr().matmul(&y).square() * sigma.clamp_min(0.0).unsqueeze(1);
        (sigma, projected)
    };
    let sigma: Vec<f64> = Vec::try_from(sigma.clamp_min(0.0))?;
    let mut total = 0.0;
    for class in 0..num_classes {
        let projected: Vec<f64> = Vec::try_from(projected.select(1, class as i64))?;
        let count = classes.iter().filter(|own| **own == class).count();
        total += evidence(&sigma, &projected, count as f64, n as f64, d as f64);
    }
    scored(total / num_classes as f64)
}

/// ln p(y | F)/N at the α and β that a fixed-point iteration finds, for one class's indicator y of
/// `y_squared` = ‖y‖². `sigma` and `projected` = (s uᵀy)² have one entry for each singular value.
fn evidence(sigma: &[f64], projected: &[f64], y_squared: f64, n: f64, d: f64) -> f64 {
    let over = |term: &dyn Fn(f64, f64) -> f64| -> f64 {
        sigma.iter().zip(projected).map(|(s, p)| term(*s, *p)).sum()
    };
    let (mut alpha, mut beta) = (1.0f64, 1.0f64);
    let (mut weights, mut residual) = (0.0, y_squared);
    for _ in 0..11 {
        let t = alpha / beta;
        let gamma = over(&|s, _| s / (s + t));
        // ‖m‖² of the posterior mean m, and ‖y - Fm‖².
        weights = over(&|s, p| p / (s + t).powi(2));
        residual = y_squared - over(&|s, p| p * (s + 2.0 * t) / (s + t).powi(2));
        alpha = gamma / (weights + 1e-5);
        beta = (n - gamma) / (residual + 1e-5);
        if (alpha / beta - t).abs() <= 1e-3 * t {
            break;
        }
    }
    let log_determinant = over(&|s, _| (alpha + beta * s).ln());
    let log_2_pi = (2.0 * std::f64::consts::PI).ln();
    0.5 * (d * alpha.ln() + n * beta.ln()
        - log_determinant
        - beta * residual
        - alpha * weights
        - n * log_2_pi)
        / n
}

/// LEEP: the mean log-likelihood of the labels if a source class z is drawn from θ_n, and the label
/// from P̂(y|z), θ's own joint table. `probabilities` θ is [N, C_s], rows on the simplex. The
/// result is ≤ 0.
pub fn leep(probabilities: &Tensor, labels: &[usize]) -> Result<f64, EngineError> {
    let theta = finite(probabilities, "the source head's probabilities")?;
    let (classes, num_classes) = numbered(labels);
    let joint = one_hot(&classes, num_classes).tr().matmul(&theta);
    // A source class without any probability takes no part.
    let of_source = joint
        .sum_dim_intlist(0, true, Kind::Double)
        .clamp_min(f64::MIN_POSITIVE);
    let expected = theta.matmul(&(joint / of_source).tr());
    let own: Vec<i64> = classes.iter().map(|class| *class as i64).collect();
    let likelihood = expected.gather(1, &Tensor::from_slice(&own).unsqueeze(1), false);
    scored(f64::try_from(likelihood.log().mean(Kind::Double))?)
}

/// NCE: -H(Y|Z), where z is the most probable source class of each sample. `probabilities` is [N,
/// C_s]. The result is ≤ 0.
pub fn nce(probabilities: &Tensor, labels: &[usize]) -> Result<f64, EngineError> {
    let theta = finite(probabilities, "the source head's probabilities")?;
    let z: Vec<i64> = Vec::try_from(theta.argmax(1, false))?;
    Ok(negative_conditional_entropy(&z, labels))
}

/// OTCE of a source task and the target; see [`otce`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Otce {
    /// -H(Y_t|Y_s) ≤ 0 of the labels that the transport brings together.
    pub score: f64,
    /// Mean squared distance that the samples are moved: the squared 2-Wasserstein distance.
    pub transport_cost: f64,
}

/// OTCE, by exact optimal transport (squared Euclidean) between the source task's features and the
/// target's [N, d]. Equally many samples are taken from both, by class and in proportion, so that
/// transport between uniform marginals is an assignment. `score` is OTCE's practical form. The full
/// one weighs score and cost by a regression on auxiliary tasks, which are not at hand.
pub fn otce(sketch: &Sketch, features: &Tensor, labels: &[usize]) -> Result<Otce, EngineError> {
    let target = finite(features, "the features")?;
    let source = finite(&matrix(&sketch.features), "the sketch's features")?;
    let (source_labels, _) = numbered(&sketch.labels.values);
    let size = source_labels.len().min(labels.len()).min(MAX_TRANSPORT);
    let (source_rows, target_rows) = (
        stratified_subset(&source_labels, size, 0),
        stratified_subset(labels, size, 0),
    );
    let select = |from: &Tensor, rows: &[usize]| {
        let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        from.index_select(0, &Tensor::from_slice(&rows))
    };
    let (source, target) = (select(&source, &source_rows), select(&target, &target_rows));
    // Mode 2 computes by differences, so that equal samples are at distance 0.
    let cost = Tensor::cdist(&source, &target, 2.0, 2).square();
    let columns = assignment::cheapest(&cost)?;
    let brought: Vec<usize> = columns.iter().map(|c| labels[target_rows[*c]]).collect();
    let from: Vec<usize> = source_rows.iter().map(|row| source_labels[*row]).collect();
    let moved: f64 = (0i64..)
        .zip(&columns)
        .map(|(row, column)| cost.double_value(&[row, *column as i64]))
        .sum();
    Ok(Otce {
        score: negative_conditional_entropy(&from, &brought),
        transport_cost: moved / size as f64,
    })
}

/// -H(Y|Z) = Σ P̂(y,z) ln(P̂(y,z)/P̂(z)) of two label sequences of equal length.
fn negative_conditional_entropy<Z: Ord + Copy, Y: Ord + Copy>(z: &[Z], y: &[Y]) -> f64 {
    let (mut joint, mut of_z) = (BTreeMap::new(), BTreeMap::new());
    for (z, y) in z.iter().zip(y) {
        *joint.entry((*z, *y)).or_insert(0.0) += 1.0;
        *of_z.entry(*z).or_insert(0.0) += 1.0;
    }
    let sum: f64 = joint
        .iter()
        .map(|((z, _), count): (_, &f64)| count * (count / of_z[z]).ln())
        .sum();
    sum / z.len() as f64
}

/// The one-hot matrix [N, K].
fn one_hot(classes: &[usize], num_classes: usize) -> Tensor {
    let classes: Vec<i64> = classes.iter().map(|class| *class as i64).collect();
    Tensor::from_slice(&classes)
        .one_hot(num_classes as i64)
        .to_kind(Kind::Double)
}

/// The tensor in f64 on the CPU. Values that are not finite are refused.
fn finite(tensor: &Tensor, what: &'static str) -> Result<Tensor, EngineError> {
    let tensor = tensor.to_device(Device::Cpu).to_kind(Kind::Double);
    match bool::try_from(tensor.isfinite().all())? {
        true => Ok(tensor),
        false => Err(EngineError::NotFinite(what)),
    }
}

fn scored(score: f64) -> Result<f64, EngineError> {
    match score.is_finite() {
        true => Ok(score),
        false => Err(EngineError::NotFinite("the transferability scores")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise_tensor;
    use promptweave_domain::testing::prompt_file;

    #[derive(serde::Deserialize)]
    struct Case {
        features: Vec<Vec<f64>>,
        labels: Vec<usize>,
        probabilities: Vec<Vec<f64>>,
        logme: f64,
        leep: f64,
        nce: f64,
        sketch: SketchCase,
        otce: OtceCase,
    }

    #[derive(serde::Deserialize)]
    struct SketchCase {
        features: Vec<Vec<f64>>,
        labels: Vec<i64>,
    }

    #[derive(serde::Deserialize)]
    struct OtceCase {
        score: f64,
        transport_cost: f64,
    }

    /// scripts/reference/scores.py wrote the values, and names the programs whose formulas it uses.
    fn reference() -> Vec<Case> {
        let json = include_str!("../../../../tests/fixtures/scores/scores.json");
        serde_json::from_str(json).unwrap()
    }

    fn rows(rows: &[Vec<f64>]) -> Tensor {
        Tensor::from_slice(&rows.concat()).view([rows.len() as i64, -1])
    }

    fn sketch(features: &Tensor, labels: &[i64]) -> Sketch {
        let (n, d) = features.size2().unwrap();
        let values = Vec::try_from(features.to_kind(Kind::Float).flatten(0, -1)).unwrap();
        Sketch {
            features: PlainTensor::new([n as usize, d as usize], values),
            labels: PlainTensor::new([n as usize], labels.to_vec()),
        }
    }

    fn close(a: f64, b: f64, tolerance: f64) {
        assert!(
            (a - b).abs() <= tolerance * b.abs(),
            "{a} is not {b} (± {tolerance})"
        );
    }

    /// Features [N, 6] with the given strength of class signal, and their labels of three classes.
    fn task(n: usize, signal: f64) -> (Tensor, Vec<usize>) {
        let labels: Vec<usize> = (0..n).map(|i| (i * 7 + i / 5) % 3).collect();
        let own: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
        let directions = noise_tensor(&[3, 6], 1).index_select(0, &Tensor::from_slice(&own));
        (
            noise_tensor(&[n as i64, 6], 2) + directions * signal,
            labels,
        )
    }

    /// Probabilities θ that tell something about the labels.
    fn theta(labels: &[usize]) -> Tensor {
        let known = one_hot(labels, 3).matmul(&noise_tensor(&[3, 4], 4));
        (known * 2.0 + noise_tensor(&[labels.len() as i64, 4], 3)).softmax(-1, None)
    }

    fn entropy(labels: &[usize]) -> f64 {
        -negative_conditional_entropy(&vec![0; labels.len()], labels)
    }

    #[test]
    fn scores_agree_with_the_published_programs() {
        for case in reference() {
            let features = rows(&case.features);
            let theta = rows(&case.probabilities);
            close(logme(&features, &case.labels).unwrap(), case.logme, 1e-10);
            close(leep(&theta, &case.labels).unwrap(), case.leep, 1e-12);
            close(nce(&theta, &case.labels).unwrap(), case.nce, 1e-12);

            let source = sketch(&rows(&case.sketch.features), &case.sketch.labels);
            let size = case.sketch.labels.len();
            let few = features.narrow(0, 0, size as i64);
            let transported = otce(&source, &few, &case.labels[..size]).unwrap();
            close(transported.score, case.otce.score, 1e-12);
            // A prompt file holds its sketch in f32.
            close(transported.transport_cost, case.otce.transport_cost, 1e-6);
        }
    }

    #[test]
    fn leep_is_nce_where_the_head_is_certain() {
        let (_, labels) = task(40, 0.0);
        let z = theta(&labels).argmax(1, false);
        let certain = z.one_hot(4).to_kind(Kind::Double);
        let nce = nce(&certain, &labels).unwrap();
        close(leep(&certain, &labels).unwrap(), nce, 1e-12);
        assert!(nce < 0.0);
    }

    #[test]
    fn a_head_that_knows_nothing_scores_the_labels_entropy() {
        let (_, labels) = task(40, 0.0);
        let blind = theta(&labels[..1]).expand([40, 4], false);
        close(leep(&blind, &labels).unwrap(), -entropy(&labels), 1e-12);
        close(nce(&blind, &labels).unwrap(), -entropy(&labels), 1e-12);
        let knowing = leep(&theta(&labels), &labels).unwrap();
        assert!(knowing < 0.0 && knowing > -entropy(&labels));
        close(
            leep(&one_hot(&labels, 3), &labels).unwrap() + 1.0,
            1.0,
            1e-12,
        );
    }

    #[test]
    fn order_of_samples_and_names_of_labels_change_nothing() {
        let (features, labels) = task(40, 0.5);
        let theta = theta(&labels);
        let source = sketch(&noise_tensor(&[40, 6], 5), &[0, 1, 2, 3].repeat(10));
        // The samples backwards, and with the names 9, 2, 5 for 0, 1, 2.
        let other: Vec<usize> = labels.iter().rev().map(|l| [9, 2, 5][*l]).collect();
        let (f, t) = (features.flip([0]), theta.flip([0]));
        close(
            logme(&f, &other).unwrap(),
            logme(&features, &labels).unwrap(),
            1e-10,
        );
        close(
            leep(&t, &other).unwrap(),
            leep(&theta, &labels).unwrap(),
            1e-12,
        );
        close(
            nce(&t, &other).unwrap(),
            nce(&theta, &labels).unwrap(),
            1e-12,
        );
        let (a, b) = (
            otce(&source, &f, &other).unwrap(),
            otce(&source, &features, &labels).unwrap(),
        );
        close(a.score, b.score, 1e-12);
        close(a.transport_cost, b.transport_cost, 1e-12);
    }

    #[test]
    fn logme_grows_with_the_signal_and_ignores_rotation() {
        let (features, labels) = task(60, 0.5);
        let (rotation, _) = Tensor::linalg_qr(&noise_tensor(&[6, 6], 6), "complete");
        let score = logme(&features, &labels).unwrap();
        close(
            logme(&features.matmul(&rotation), &labels).unwrap(),
            score,
            1e-10,
        );
        let scores: Vec<f64> = [0.0, 0.5, 1.0, 2.0, 4.0]
            .map(|signal| logme(&task(60, signal).0, &labels).unwrap())
            .to_vec();
        assert!(scores.is_sorted_by(|a, b| a + 1e-3 < *b), "{scores:?}");
    }

    #[test]
    fn logme_is_finite_for_dependent_or_constant_features_and_one_class() {
        let (features, labels) = task(30, 0.5);
        let twice = Tensor::cat(&[&features, &features], 1);
        for features in [&twice, &twice.narrow(0, 0, 7), &features.ones_like()] {
            let n = features.size()[0] as usize;
            assert!(logme(features, &labels[..n]).is_ok());
        }
        assert!(logme(&features, &[1; 30]).is_ok());
    }

    #[test]
    fn transport_to_the_same_task_costs_nothing_and_shuffled_labels_score_worse() {
        let (features, labels) = task(30, 0.5);
        // In f32, as the sketch holds them.
        let features = features.to_kind(Kind::Float);
        let own: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
        let reversed: Vec<usize> = labels.iter().rev().copied().collect();
        let same = otce(&sketch(&features, &own), &features.flip([0]), &reversed).unwrap();
        assert_eq!((same.score, same.transport_cost), (0.0, 0.0));

        let mut shuffled = own.clone();
        shuffled.sort_unstable();
        let worse = otce(&sketch(&features, &shuffled), &features, &labels).unwrap();
        assert!(
            worse.score < -0.5 && worse.transport_cost == 0.0,
            "{worse:?}"
        );
        // A distant target has a high transport cost, but if it is moved as a whole, the same
        // labels meet.
        let far = otce(&sketch(&(&features + 3.0), &own), &features, &labels).unwrap();
        assert_eq!(far.score, 0.0);
        close(far.transport_cost, 54.0, 1e-6);
    }

    #[test]
    fn a_transport_takes_equally_many_samples_of_every_class_from_both_sides() {
        let (features, labels) = task(60, 4.0);
        let features = features.to_kind(Kind::Float);
        let own: Vec<i64> = labels[..30].iter().map(|l| -(*l as i64)).collect();
        let few = sketch(&features.narrow(0, 0, 30), &own);
        // Well separated classes stay together with other samples, too.
        let scored = otce(&few, &features, &labels).unwrap();
        assert!(scored.score > -0.3, "{scored:?}");
    }

    #[test]
    fn a_source_has_the_scores_that_its_file_allows() {
        let (features, labels) = task(40, 0.5);
        let mut file = prompt_file(3, 6, 1);
        let bare = SourceScores::of(&features, &labels, &file).unwrap();
        assert_eq!((bare.leep, bare.nce, bare.otce), (None, None, None));
        close(bare.logme, logme(&features, &labels).unwrap(), 1e-12);

        file.head = Some(Head {
            weight: PlainTensor::new([2, 6], (0..12).map(|i| (i as f32).sin()).collect()),
            bias: PlainTensor::new([2], vec![0.5, -0.5]),
        });
        file.sketch = Some(sketch(&noise_tensor(&[12, 6], 7), &[0, 1].repeat(6)));
        let full = SourceScores::of(&features, &labels, &file).unwrap();
        let in_bounds =
            |score: Option<f64>| (-entropy(&labels) - 1e-9..=0.0).contains(&score.unwrap());
        assert!(in_bounds(full.leep) && in_bounds(full.nce), "{full:?}");
        // Twelve of the samples have an entropy of their own.
        assert!((-3f64.ln()..=0.0).contains(&full.otce.unwrap()));
        // A head whose bias always gives one class knows nothing.
        file.head.as_mut().unwrap().bias.values = vec![1e4, -1e4];
        let blind = SourceScores::of(&features, &labels, &file).unwrap();
        close(blind.leep.unwrap(), -entropy(&labels), 1e-12);
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        let (features, labels) = task(10, 0.5);
        let _ = features.get(3).fill_(f64::NAN);
        let error = SourceScores::of(&features, &labels, &prompt_file(3, 6, 1)).unwrap_err();
        assert_eq!(error.code(), "not_finite");
        let theta = Tensor::full([10, 2], f64::INFINITY, tch::kind::DOUBLE_CPU);
        assert_eq!(leep(&theta, &labels).unwrap_err().code(), "not_finite");
        assert_eq!(nce(&theta, &labels).unwrap_err().code(), "not_finite");
    }
}

//! Weights α by the methods that do not solve for them, from features or prompts alone.

use tch::{Kind, Tensor};

use crate::error::EngineError;
use crate::score::evaluate::cross_fitted;
use crate::score::h_score::HScore;
use crate::score::transferability::{logme, matrix};
use crate::solve::solver::{own_h_scores, towards_vertex};
use crate::statistics::SolveInputs;
use promptweave_domain::method::{Criterion, Similarity};
use promptweave_domain::objective::Objective;
use promptweave_domain::tensor::Tensor as PlainTensor;

/// Equal weights, 1/M each.
pub fn uniform(m: usize) -> Vec<f64> {
    vec![1.0 / m as f64; m]
}

/// Pulls weights towards equal ones: (1-γ) αᵢ + γ/M.
pub fn towards_uniform(alpha: &[f64], gamma: f64) -> Vec<f64> {
    let equal = gamma / alpha.len() as f64;
    alpha
        .iter()
        .map(|weight| (1.0 - gamma) * weight + equal)
        .collect()
}

/// All weight on the source with the highest score; of equals, on the first.
pub fn single_best(scores: &[f64]) -> Vec<f64> {
    let best = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b]).then(b.cmp(a)));
    towards_vertex(best.unwrap_or(0), scores.len(), 1.0)
}

/// αᵢ ∝ max(sᵢ, 0) among the `top_k` most similar sources, and 0 for the others. If none of those
/// is above 0, similarity says nothing and they share equally.
pub fn proportional(similarities: &[f64], top_k: Option<usize>) -> Vec<f64> {
    let top = most_similar(similarities, top_k);
    let clipped = |i: usize| similarities[i].max(0.0);
    let sum: f64 = top.iter().map(|i| clipped(*i)).sum();
    let share = |i: usize| match (top.contains(&i), sum > 0.0) {
        (false, _) => 0.0,
        (true, true) => clipped(i) / sum,
        (true, false) => 1.0 / top.len() as f64,
    };
    (0..similarities.len()).map(share).collect()
}

/// Indices of the `top_k` sources with the highest similarity, the highest first.
pub fn most_similar(similarities: &[f64], top_k: Option<usize>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..similarities.len()).collect();
    order.sort_by(|a, b| similarities[*b].total_cmp(&similarities[*a]));
    order.truncate(top_k.unwrap_or(usize::MAX).max(1));
    order
}

/// The scores by which `single_best` chooses, one for each source. `tick` is called before each;
/// its error ends the work.
pub fn scores(
    by: Criterion,
    ground: SolveInputs<'_>,
    objective: &Objective,
    num_classes: usize,
    tick: &mut dyn FnMut() -> Result<(), EngineError>,
) -> Result<Vec<f64>, EngineError> {
    let labels = ground.labels;
    let of_sources = (0..ground.features.size()[0]).map(|i| ground.features.get(i));
    match by {
        Criterion::HScore => {
            own_h_scores(&HScore::new(ground.features, labels, &objective.h_score)?)
        }
        Criterion::Logme => of_sources
            .map(|features| {
                tick()?;
                logme(&features.to_kind(Kind::Double), labels)
            })
            .collect(),
        Criterion::Validation => of_sources
            .map(|features| {
                tick()?;
                Ok(-cross_fitted(&features, labels, num_classes, &objective.head)?.loss)
            })
            .collect(),
    }
}

/// SPoT's similarity of two prompts [m, d], a cosine in [-1, 1] (Vu et al. 2022, section 3.1).
pub fn similarity(kind: Similarity, a: &PlainTensor<f32>, b: &PlainTensor<f32>) -> f64 {
    let [a, b] = [a, b].map(matrix);
    match kind {
        Similarity::TokenMean => {
            let mean = |x: &Tensor| x.mean_dim([0i64].as_slice(), false, Kind::Double);
            cosine(&mean(&a), &mean(&b))
        }
        Similarity::AllPairs => {
            let cosines = unit(&a).matmul(&unit(&b).tr());
            cosines.mean(Kind::Double).double_value(&[])
        }
    }
}

/// PANDA's similarity of every source to the target: the cosine of the prompts' effects on the mean
/// feature of the target's samples. `features` is [M, N, d] under the sources; `without` and
/// `target` are [N, d], without a prompt and under the tuned one.
pub fn effects(features: &Tensor, without: &Tensor, target: &Tensor) -> Vec<f64> {
    let effect = |with: &Tensor| {
        (with.to_kind(Kind::Double) - without.to_kind(Kind::Double)).mean_dim(
            [0i64].as_slice(),
            false,
            Kind::Double,
        )
    };
    let of_target = effect(target);
    (0..features.size()[0])
        .map(|i| cosine(&effect(&features.get(i)), &of_target))
        .collect()
}

/// The cosine of two vectors; 0 if one has length 0.
fn cosine(a: &Tensor, b: &Tensor) -> f64 {
    unit(a).dot(&unit(b)).double_value(&[])
}

/// Scales rows to length 1; rows of length 0 stay 0.
fn unit(x: &Tensor) -> Tensor {
    let length = x.norm_scalaropt_dim(2.0, [-1i64].as_slice(), true);
    x / length.clamp_min(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, noise_tensor};

    fn prompt(rows: &[[f32; 2]]) -> PlainTensor<f32> {
        PlainTensor::new([rows.len(), 2], rows.concat())
    }

    #[test]
    fn weights_are_on_the_simplex_and_follow_the_similarities() {
        assert_eq!(proportional(&[0.75, -0.5, 0.25], None), [0.75, 0.0, 0.25]);
        assert_eq!(
            proportional(&[0.375, 0.1, 0.125], Some(2)),
            [0.75, 0.0, 0.25]
        );
        // No source is similar, so that none is preferred.
        assert_eq!(proportional(&[-0.6, -0.1, 0.0], Some(2)), [0.0, 0.5, 0.5]);
        assert_eq!(proportional(&[0.3], Some(9)), [1.0]);
        assert_eq!(single_best(&[0.1, 0.7, 0.7]), [0.0, 1.0, 0.0]);
        assert_eq!(uniform(4), [0.25; 4]);
    }

    #[test]
    fn similarities_are_cosines_of_mean_tokens_and_means_of_cosines() {
        let a = prompt(&[[1.0, 0.0], [0.0, 1.0]]);
        let b = prompt(&[[2.0, 0.0], [2.0, 0.0]]);
        let half = 0.5f64.sqrt();
        assert!((similarity(Similarity::TokenMean, &a, &b) - half).abs() < 1e-15);
        // Two of the four pairs are equal, and two are at right angles.
        assert!((similarity(Similarity::AllPairs, &a, &b) - 0.5).abs() < 1e-15);
        for kind in [Similarity::TokenMean, Similarity::AllPairs] {
            let turned = prompt(&[[0.0, 1.0], [1.0, 0.0]]);
            assert_eq!(similarity(kind, &a, &b), similarity(kind, &turned, &b));
            let opposite = prompt(&[[-2.0, 0.0], [-2.0, 0.0]]);
            assert_eq!(similarity(kind, &b, &opposite), -1.0);
            assert_eq!(similarity(kind, &a, &prompt(&[[0.0; 2]; 2])), 0.0);
        }
    }

    /// Compares with plain loops.
    #[test]
    fn effects_are_cosines_of_mean_differences() {
        let (n, d) = (5, 3);
        let [sources, without, target] =
            [(1, 2 * n * d), (2, n * d), (3, n * d)].map(|(seed, len)| noise(len, seed));
        let mean_effect = |with: &[f64]| -> Vec<f64> {
            let at = |n: usize, k: usize| n * d + k;
            (0..d)
                .map(|k| {
                    (0..n)
                        .map(|row| with[at(row, k)] - without[at(row, k)])
                        .sum::<f64>()
                })
                .collect()
        };
        let cosine = |a: &[f64], b: &[f64]| {
            let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(x, y)| x * y).sum() };
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        let shape = [n as i64, d as i64];
        let found = effects(
            &noise_tensor(&[2, shape[0], shape[1]], 1),
            &noise_tensor(&shape, 2),
            &noise_tensor(&shape, 3),
        );
        for (i, found) in found.into_iter().enumerate() {
            let own = mean_effect(&sources[i * n * d..(i + 1) * n * d]);
            assert!((found - cosine(&own, &mean_effect(&target))).abs() < 1e-14);
        }
    }
}

//! t-SNE (van der Maaten & Hinton 2008), by its definition. Every pair of points counts, so it
//! suits hundreds of points.
//!
//! The crate for it (bhtsne) sums over threads in any order and begins at random. Here the same
//! points give the same picture.

use std::iter::zip;

/// Perplexity of a point's neighbourhood. It, the steps and the exaggeration are scikit-learn's.
const PERPLEXITY: f64 = 30.0;
const STEPS: usize = 1000;
const EXAGGERATION: f64 = 12.0;
/// Number of steps in which similarities are exaggerated and momentum is low.
const EARLY: usize = 250;
const SMALLEST_GAIN: f64 = 0.01;
/// Standard deviation of the points at the start.
const SPREAD: f64 = 1e-4;

/// A point in the plane.
pub type Point = [f64; 2];

/// The positions of these points in the plane. Each begins at its place in `start`, of which only
/// the directions matter.
pub fn embed(points: &[Vec<f64>], start: &[Point]) -> Vec<Point> {
    let n = points.len();
    let similarities = similarities(points);
    let rate = (n as f64 / EXAGGERATION / 4.0).max(50.0);
    let mut at = centred(start);
    let deviation = (at.iter().flatten().map(|x| x * x).sum::<f64>() / (2 * n) as f64).sqrt();
    at.iter_mut()
        .flatten()
        .for_each(|x| *x *= SPREAD / deviation.max(f64::MIN_POSITIVE));
    let mut moved = vec![[0.0; 2]; n];
    let mut gains = vec![[1.0; 2]; n];
    for step in 0..STEPS {
        let (exaggeration, momentum) = match step < EARLY {
            true => (EXAGGERATION, 0.5),
            false => (1.0, 0.8),
        };
        let slopes = slopes(&at, &similarities, exaggeration);
        for i in 0..n {
            for axis in 0..2 {
                let (slope, last) = (slopes[i][axis], moved[i][axis]);
                let gain: f64 = match slope * last < 0.0 {
                    true => gains[i][axis] + 0.2,
                    false => gains[i][axis] * 0.8,
                };
                gains[i][axis] = gain.max(SMALLEST_GAIN);
                moved[i][axis] = momentum * last - rate * gains[i][axis] * slope;
                at[i][axis] += moved[i][axis];
            }
        }
        at = centred(&at);
    }
    at
}

/// Gradient of the divergence of the plane's similarities from `similarities`, by every point's
/// position.
fn slopes(at: &[Point], similarities: &[Vec<f64>], exaggeration: f64) -> Vec<Point> {
    // Student's t with one degree of freedom.
    let near = |a: &Point, b: &Point| 1.0 / (1.0 + squared_distance(a, b));
    let all = |a: &Point| at.iter().map(|b| near(a, b)).sum::<f64>() - 1.0;
    let total: f64 = at.iter().map(all).sum();
    let of = |(a, similarities): (&Point, &Vec<f64>)| {
        let mut slope = [0.0; 2];
        for (b, similarity) in zip(at, similarities) {
            let near = near(a, b);
            let pull = 4.0 * (exaggeration * similarity - near / total) * near;
            slope[0] += pull * (a[0] - b[0]);
            slope[1] += pull * (a[1] - b[1]);
        }
        slope
    };
    zip(at, similarities).map(of).collect()
}

/// The similarities p of all pairs, [N, N]: symmetric, with sum 1.
fn similarities(points: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let n = points.len();
    let perplexity = PERPLEXITY.min((n.max(4) - 1) as f64 / 3.0);
    let of = |i: usize| {
        let distances: Vec<f64> = (points.iter())
            .map(|other| squared_distance(&points[i], other))
            .collect();
        neighbourhood(i, &distances, perplexity)
    };
    let one_way: Vec<Vec<f64>> = (0..n).map(of).collect();
    let both = |i: usize, j: usize| (one_way[i][j] + one_way[j][i]) / (2 * n) as f64;
    (0..n)
        .map(|i| (0..n).map(|j| both(i, j)).collect())
        .collect()
}

/// The similarities of the others to point i: a Gaussian over distances, wide enough to have the
/// requested perplexity.
fn neighbourhood(i: usize, distances: &[f64], perplexity: f64) -> Vec<f64> {
    let others = || (0..distances.len()).filter(|j| *j != i);
    let nearest = others().map(|j| distances[j]).fold(f64::INFINITY, f64::min);
    let (mut precision, mut low, mut high) = (1.0, 0.0, f64::INFINITY);
    let mut weights = vec![0.0; distances.len()];
    // Bisection, after doublings that find its upper end.
    for _ in 0..200 {
        // The nearest distance is subtracted, so that one weight is 1 however far all are.
        others().for_each(|j| weights[j] = (-precision * (distances[j] - nearest)).exp());
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
        let entropy: f64 = (weights.iter().filter(|weight| **weight > 0.0))
            .map(|weight| -weight * weight.ln())
            .sum();
        if entropy > perplexity.ln() {
            low = precision;
        } else {
            high = precision;
        }
        precision = match high.is_finite() {
            true => (low + high) / 2.0,
            false => 2.0 * low,
        };
    }
    weights
}

pub fn squared_distance(a: &[f64], b: &[f64]) -> f64 {
    zip(a, b).map(|(x, y)| (x - y) * (x - y)).sum()
}

fn centred(points: &[Point]) -> Vec<Point> {
    let mean = |axis: usize| points.iter().map(|p| p[axis]).sum::<f64>() / points.len() as f64;
    let (x, y) = (mean(0), mean(1));
    points.iter().map(|p| [p[0] - x, p[1] - y]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use promptweave_engine::testing::noise;

    const EACH: usize = 15;

    /// Two clusters in ten dimensions, one after the other.
    fn clusters(apart: f64) -> Vec<Vec<f64>> {
        let values = noise(2 * EACH * 10, 1);
        let cluster = |at: usize| if at < EACH { 0.0 } else { apart };
        let points = values.chunks_exact(10).enumerate();
        points
            .map(|(at, point)| point.iter().map(|x| x + cluster(at)).collect())
            .collect()
    }

    fn start() -> Vec<Point> {
        let values = noise(4 * EACH, 2);
        values.chunks_exact(2).map(|p| [p[0], p[1]]).collect()
    }

    /// Number of points whose nearest point in the plane is of the other cluster.
    fn strangers(at: &[Point]) -> usize {
        let nearest = |i: usize| {
            let others = (0..at.len()).filter(|j| *j != i);
            let distance = |j: &usize| squared_distance(&at[i], &at[*j]);
            others
                .min_by(|a, b| distance(a).total_cmp(&distance(b)))
                .unwrap()
        };
        (0..at.len())
            .filter(|i| (*i < EACH) != (nearest(*i) < EACH))
            .count()
    }

    #[test]
    fn clusters_stay_apart_and_what_is_one_does_not_fall_apart() {
        assert_eq!(strangers(&embed(&clusters(10.0), &start())), 0);
        assert!(strangers(&embed(&clusters(0.0), &start())) > EACH / 3);
    }

    #[test]
    fn the_same_points_lie_in_the_same_places_and_as_many_times_as_far_too() {
        let at = embed(&clusters(2.0), &start());
        assert_eq!(embed(&clusters(2.0), &start()), at);
        let large: Vec<Vec<f64>> = (clusters(2.0).iter())
            .map(|point| point.iter().map(|x| 1024.0 * x).collect())
            .collect();
        let off = zip(embed(&large, &start()), at).map(|(a, b)| squared_distance(&a, &b));
        let off = off.fold(0.0, f64::max);
        assert!(off < 1e-6, "{off}");
    }

    #[test]
    fn a_neighbourhood_is_as_wide_as_asked_for() {
        let distances: Vec<f64> = noise(50, 3).iter().map(|x| 3e4 + x * x).collect();
        let weights = neighbourhood(7, &distances, 10.0);
        let entropy: f64 = (weights.iter().filter(|w| **w > 0.0))
            .map(|w| -w * w.ln())
            .sum();
        assert!((entropy.exp() - 10.0).abs() < 1e-6, "{}", entropy.exp());
        assert_eq!(weights[7], 0.0);
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}

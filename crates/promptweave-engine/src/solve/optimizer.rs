//! Minimising a smooth function over the simplex by projected gradient, with Barzilai-Borwein steps
//! and Armijo backtracking (Birgin, Martínez & Raydan 2000). It reaches exact zeros, which softmax
//! parametrisations cannot, and it is deterministic.

use promptweave_domain::composition::StopReason;

/// Largest move of a unit projected-gradient step at which a point counts as stationary. The
/// function should be on a scale of order 1.
const TOLERANCE: f64 = 1e-9;
const MAX_ITERATIONS: usize = 500;
/// Rounding error of one evaluation, relative to its value. A smaller rise does not count as one.
const NOISE: f64 = 1e-14;
/// The longest move of a weight in one step before the projection, whose rounding error grows with
/// it. The simplex is 1.5 across.
const LONGEST_MOVE: f64 = 1e3;
/// The longest move of ln α in one step, so that no weight changes more than e⁵-fold between
/// evaluations.
const LONGEST_SMOOTH_MOVE: f64 = 5.0;

/// The end of a descent from one start.
#[derive(Clone, Debug)]
pub struct Descent {
    pub alpha: Vec<f64>,
    pub value: f64,
    pub iterations: usize,
    pub stop_reason: StopReason,
}

/// The nearest point with every entry ≥ 0 and sum 1 (exact, by sorting).
pub fn project_to_simplex(v: &[f64]) -> Vec<f64> {
    let mut sorted = v.to_vec();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let (mut sum, mut shift) = (0.0, 0.0);
    for (count, value) in sorted.iter().enumerate() {
        sum += value;
        let candidate = (sum - 1.0) / (count + 1) as f64;
        if value - candidate > 0.0 {
            shift = candidate;
        }
    }
    v.iter().map(|value| (value - shift).max(0.0)).collect()
}

/// Descends from `start` (on the simplex). `function` gives value and gradient.
pub fn minimise<E>(
    mut function: impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
    start: &[f64],
) -> Result<Descent, E> {
    let mut descent = descend(
        |alpha| {
            // Only the gradient's part along Σα = 1 matters. Without the rest the projection has
            // small numbers.
            let (value, mut gradient) = function(alpha)?;
            let mean = gradient.iter().sum::<f64>() / gradient.len() as f64;
            gradient.iter_mut().for_each(|g| *g -= mean);
            Ok((value, gradient))
        },
        project_to_simplex(start),
    )?;
    descent.alpha = without_dust(&descent.alpha);
    Ok(descent)
}

/// Minimises `function` minus τ·S(α)/ln M, with the entropy S = -Σ α ln α, over M > 1 weights. The
/// minimum has no zero. The variables are z in α = softmax(z), in which the entropy is smooth.
pub fn minimise_dense<E>(
    mut function: impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
    tau: f64,
    start: &[f64],
) -> Result<Descent, E> {
    let tau = tau / (start.len() as f64).ln();
    let start: Vec<f64> = start.iter().map(|a| a.max(1e-6).ln()).collect();
    // The initial guess is the entropy's own second derivative, τ diag(α). Along it a step is the
    // fixed-point iteration z = -∂function/τ, and weights of very different sizes move alike.
    let curvature: Vec<f64> = softmax(&start).iter().map(|a| tau * a).collect();
    let mut descent = descend_smooth(
        |z| {
            let alpha = softmax(z);
            let (value, slopes) = function(&alpha)?;
            let logs: Vec<f64> = alpha
                .iter()
                .map(|a| a.max(f64::MIN_POSITIVE).ln())
                .collect();
            let slopes: Vec<f64> = slopes
                .iter()
                .zip(&logs)
                .map(|(slope, log)| slope + tau * (log + 1.0))
                .collect();
            let mean = dot(&alpha, &slopes);
            let gradient = alpha.iter().zip(&slopes).map(|(a, s)| a * (s - mean));
            Ok((value + tau * dot(&alpha, &logs), gradient.collect()))
        },
        start,
        &curvature,
    )?;
    // At the minimum α = softmax(-∂function/τ). One such step leaves the large weights where they
    // are. It ranks the small ones, which the descent ignores once they stop mattering.
    let alpha = softmax(&descent.alpha);
    let (_, slopes) = function(&alpha)?;
    let exponents: Vec<f64> = slopes.iter().map(|slope| -slope / tau).collect();
    let ranked = softmax(&exponents);
    let moved = largest(&difference(&ranked, &alpha));
    descent.alpha = if moved < 1e-4 { ranked } else { alpha };
    Ok(descent)
}

/// BFGS with Armijo backtracking, from a diagonal guess of the second derivatives (Nocedal & Wright
/// 2006, 6.1).
fn descend_smooth<E>(
    mut function: impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
    mut z: Vec<f64>,
    curvature: &[f64],
) -> Result<Descent, E> {
    let m = z.len();
    // The inverse matrix of second derivatives, row-major.
    let mut inverse = vec![0.0; m * m];
    for (i, curvature) in curvature.iter().enumerate() {
        inverse[i * (m + 1)] = 1.0 / curvature;
    }
    let (mut value, mut gradient) = function(&z)?;
    let mut iterations = 0;
    let stop_reason = loop {
        if largest(&gradient) < TOLERANCE {
            break StopReason::Converged;
        }
        if iterations == MAX_ITERATIONS {
            break StopReason::MaxIterations;
        }
        let mut direction: Vec<f64> = inverse
            .chunks_exact(m)
            .map(|row| -dot(row, &gradient))
            .collect();
        let longest = largest(&direction);
        if longest > LONGEST_SMOOTH_MOVE {
            direction
                .iter_mut()
                .for_each(|d| *d *= LONGEST_SMOOTH_MOVE / longest);
        }
        let slope = dot(&gradient, &direction);
        let ahead = |fraction: f64| {
            let moved = z.iter().zip(&direction).map(|(z, d)| z + fraction * d);
            moved.collect()
        };
        let accepted = backtrack(&mut function, value, slope, ahead)?;
        let Some((next, next_value, next_gradient)) = accepted else {
            break StopReason::NoDescent;
        };
        let moved = difference(&next, &z);
        let turned = difference(&next_gradient, &gradient);
        update(&mut inverse, &moved, &turned);
        (z, value, gradient) = (next, next_value, next_gradient);
        iterations += 1;
    };
    Ok(Descent {
        alpha: z,
        value,
        iterations,
        stop_reason,
    })
}

/// A point, and the function's value and gradient there.
type Found = (Vec<f64>, f64, Vec<f64>);

/// Armijo backtracking: tries the whole move, half of it, a quarter …, and takes the first that
/// lowers `value`. `slope` is the derivative along the move; `ahead` gives the point at a fraction
/// of it.
fn backtrack<E>(
    function: &mut impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
    value: f64,
    slope: f64,
    ahead: impl Fn(f64) -> Vec<f64>,
) -> Result<Option<Found>, E> {
    let noise = NOISE * (1.0 + value.abs());
    let mut fraction = 1.0;
    while slope < 0.0 && fraction > 1e-12 {
        let candidate = ahead(fraction);
        let (found, gradient) = function(&candidate)?;
        if found <= value + 1e-4 * fraction * slope + noise {
            return Ok(Some((candidate, found, gradient)));
        }
        fraction *= 0.5;
    }
    Ok(None)
}

/// B⁻¹ ← (I - ρ s yᵀ) B⁻¹ (I - ρ y sᵀ) + ρ s sᵀ with ρ = 1/sᵀy. Along negative curvature B⁻¹ stays
/// as it is.
fn update(inverse: &mut [f64], moved: &[f64], turned: &[f64]) {
    let m = moved.len();
    let curvature = dot(moved, turned);
    if curvature <= 1e-12 * dot(moved, moved).sqrt() * dot(turned, turned).sqrt() {
        return;
    }
    let through: Vec<f64> = inverse
        .chunks_exact(m)
        .map(|row| dot(row, turned))
        .collect();
    let along = (1.0 + dot(turned, &through) / curvature) / curvature;
    for i in 0..m {
        for j in 0..m {
            let cross = moved[i] * through[j] + through[i] * moved[j];
            inverse[i * m + j] += along * moved[i] * moved[j] - cross / curvature;
        }
    }
}

fn softmax(z: &[f64]) -> Vec<f64> {
    let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = z.iter().map(|v| (v - most).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

/// The descent itself; `alpha` is on the simplex.
fn descend<E>(
    mut function: impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
    mut alpha: Vec<f64>,
) -> Result<Descent, E> {
    let ahead = |alpha: &[f64], gradient: &[f64], step: f64| -> Vec<f64> {
        let moved: Vec<f64> = alpha
            .iter()
            .zip(gradient)
            .map(|(a, g)| a - step * g)
            .collect();
        project_to_simplex(&moved)
    };
    let (mut value, mut gradient) = function(&alpha)?;
    let mut step = 1.0 / largest(&gradient).max(1e-10);
    let mut iterations = 0;
    let stop_reason = loop {
        if largest(&difference(&ahead(&alpha, &gradient, 1.0), &alpha)) < TOLERANCE {
            break StopReason::Converged;
        }
        if iterations == MAX_ITERATIONS {
            break StopReason::MaxIterations;
        }
        let target = ahead(&alpha, &gradient, step);
        let direction = difference(&target, &alpha);
        let slope = dot(&gradient, &direction);
        // The full step lands on `target` itself, so that its zeros stay exact.
        let part_way = |fraction: f64| match fraction == 1.0 {
            true => target.clone(),
            false => {
                let moved = alpha.iter().zip(&direction).map(|(a, d)| a + fraction * d);
                moved.collect()
            }
        };
        let accepted = backtrack(&mut function, value, slope, part_way)?;
        let Some((next, next_value, next_gradient)) = accepted else {
            break StopReason::NoDescent;
        };
        let moved = difference(&next, &alpha);
        let turned = difference(&next_gradient, &gradient);
        let curvature = dot(&moved, &turned);
        // Along negative curvature the longest step is as good a guess as any.
        let longest = LONGEST_MOVE / largest(&next_gradient).max(1e-10);
        step = if curvature > 0.0 {
            dot(&moved, &moved) / curvature
        } else {
            longest
        };
        step = step.clamp(1e-10, longest);
        (alpha, value, gradient) = (next, next_value, next_gradient);
        iterations += 1;
    };
    Ok(Descent {
        alpha,
        value,
        iterations,
        stop_reason,
    })
}

/// Sets weights that are rounding errors to exact zeros, and the sum back to 1.
fn without_dust(alpha: &[f64]) -> Vec<f64> {
    let kept = alpha.iter().map(|a| if *a < 1e-15 { 0.0 } else { *a });
    let sum: f64 = kept.clone().sum();
    kept.map(|a| a / sum).collect()
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// The inner product Σ aᵢ bᵢ.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn largest(v: &[f64]) -> f64 {
    v.iter().fold(0.0, |most, value| most.max(value.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn the_projection_is_on_the_simplex_and_leaves_its_points_alone() {
        assert_eq!(project_to_simplex(&[0.25, 0.75, 0.0]), [0.25, 0.75, 0.0]);
        assert_eq!(project_to_simplex(&[5.0, 0.0, 0.0]), [1.0, 0.0, 0.0]);
        let projected = project_to_simplex(&[0.9, 0.8, -3.0, 0.1]);
        assert!((projected.iter().sum::<f64>() - 1.0).abs() < 1e-15);
        assert!(projected.iter().all(|value| *value >= 0.0));
    }

    #[test]
    fn entropy_keeps_every_weight_and_ranks_the_small_ones() {
        // For a linear function the minimum is exactly softmax(-c ln M/τ).
        let costs = [0.0, 0.5, 1.0, 1.5];
        let tau = 0.05;
        let descent =
            minimise_dense::<Infallible>(|a| Ok((dot(a, &costs), costs.to_vec())), tau, &[0.25; 4])
                .unwrap();
        let expected = softmax(&costs.map(|c| -c * 4f64.ln() / tau));
        for (found, expected) in descent.alpha.iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < 1e-6, "{descent:?}");
            assert!(*found > 0.0);
        }
    }

    #[test]
    fn the_minimum_with_entropy_is_stationary() {
        // At the minimum of f - τ S/ln M, α = softmax(-∇f(α) ln M/τ); here f is ‖α - c‖².
        let centre = [0.9, 0.3, -0.2];
        let slopes = |a: &[f64]| difference(a, &centre).iter().map(|d| 2.0 * d).collect();
        for tau in [0.1, 1.0] {
            let function = |a: &[f64]| {
                let from_centre = difference(a, &centre);
                Ok((dot(&from_centre, &from_centre), slopes(a)))
            };
            let descent = minimise_dense::<Infallible>(function, tau, &[0.2, 0.3, 0.5]).unwrap();
            let slopes: Vec<f64> = slopes(&descent.alpha);
            let exponents: Vec<f64> = slopes.iter().map(|s| -s * 3f64.ln() / tau).collect();
            assert!(
                largest(&difference(&descent.alpha, &softmax(&exponents))) < 1e-5,
                "{descent:?}"
            );
        }
    }

    #[test]
    fn a_step_that_would_rise_is_shortened() {
        // f'(x) = (x - 0.2)(0.8 - x) in the first weight: a minimum at 0.2, and beyond the maximum
        // at 0.8 a lower vertex, but not as low as the start. The first, longest step leads there.
        let slope = |x: f64| (x - 0.2) * (0.8 - x);
        let value = |x: f64| -x.powi(3) / 3.0 + x.powi(2) / 2.0 - 0.16 * x;
        let start = [0.1, 0.9];
        let descent =
            minimise::<Infallible>(|a| Ok((value(a[0]), vec![slope(a[0]), 0.0])), &start).unwrap();
        assert!(value(1.0) > value(start[0]) && value(1.0) < value(0.8));
        assert!((descent.alpha[0] - 0.2).abs() < 1e-6, "{descent:?}");
    }

    #[test]
    fn a_quadratic_is_minimised_inside_and_on_the_boundary() {
        // ‖α - c‖² with c outside the simplex has its minimum at the projection of c.
        let centre = [0.7, 0.6, -0.4];
        let descent = minimise::<Infallible>(
            |a| {
                let difference = difference(a, &centre);
                Ok((
                    dot(&difference, &difference),
                    difference.iter().map(|d| 2.0 * d).collect(),
                ))
            },
            &[1.0 / 3.0; 3],
        )
        .unwrap();
        assert_eq!(descent.stop_reason, StopReason::Converged);
        for (found, expected) in descent.alpha.iter().zip([0.55, 0.45, 0.0]) {
            assert!((found - expected).abs() < 1e-9, "{descent:?}");
        }
        assert_eq!(descent.alpha[2], 0.0);
    }
}

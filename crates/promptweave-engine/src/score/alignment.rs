//! Gradient alignment L_align(α) in its three variants, from compressed statistics alone.
//!
//! Let g̃ᵢₙ be the gradient of sample n's loss by prompt i, minus its mean over the prompts, and
//! S_ij\[p] = 1/(N-1) Σ_n g̃ᵢₙ\[p] g̃ⱼₙ\[p]. The variance of prompt i's gradients about the mixed gradient
//! Σ_k α_k g_k is vᵢ = uᵢ + αᵀSα on Σα = 1, where uᵢ = S_ii - 2(Sα)ᵢ. So
//!
//! L_align(α) = (1/M) Σ_i ‖vᵢ - v̄‖² = (1/M) Σ_i Σ_p rᵢ\[p]²
//!
//! | variant | vᵢ about | v̄ | rᵢ |
//! |---|---|---|---|
//! | `mixture_weighted` | the mixed gradient | Σ_k α_k v_k | uᵢ - Σ_k α_k u_k: quartic in α |
//! | `mixture_uniform` | the mixed gradient | (1/M) Σ_k v_k | uᵢ - (1/M) Σ_k u_k: linear in α, so L_align is convex |
//! | `fishr` | prompt i's own mean, as in Fishr (Ramé et al. 2022) | Σ_k α_k v_k | vᵢ - Vα: linear in α |
//!
//! In `mixture_weighted` and `mixture_uniform` every rᵢ is a linear combination of the T = M(M+1)/2 packed
//! rows of S, with coefficients that depend on α only. The data enter through Γ = S Sᵀ [T, T]. In `fishr`
//! every rᵢ combines the M columns of V, and the data enter through VᵀV. L_align scales with the fourth
//! power of the gradients.

use crate::solve::optimizer::dot;
use promptweave_domain::objective::AlignmentVariant;

/// Row of the pair (i, j) in the packed order (0,0), (0,1), …, (0,M-1), (1,1), ….
pub fn packed(i: usize, j: usize, m: usize) -> usize {
    let (i, j) = (i.min(j), i.max(j));
    i * (2 * m - i + 1) / 2 + (j - i)
}

/// T = M(M+1)/2
pub fn num_pairs(m: usize) -> usize {
    m * (m + 1) / 2
}

/// The numbers that L_align needs of the gradients. They are plain numbers, so that they can be
/// stored, and restricted to some of the sources.
#[derive(Clone, Debug, PartialEq)]
pub struct AlignmentStatistics {
    pub num_sources: usize,
    /// Γ [T, T], row-major.
    pub gram: Vec<f64>,
    /// VᵀV [M, M], row-major. Column i of V holds each coordinate's sample variance (1/(N-1)) of
    /// prompt i's gradients about their own mean.
    pub variance_gram: Vec<f64>,
}

impl AlignmentStatistics {
    /// The statistics without gradients: L_align is 0 everywhere.
    pub fn none(num_sources: usize) -> Self {
        let t = num_pairs(num_sources);
        Self {
            num_sources,
            gram: vec![0.0; t * t],
            variance_gram: vec![0.0; num_sources * num_sources],
        }
    }

    /// The statistics of the sources `keep`, in that order.
    ///
    /// L_align is exactly that of these sources' gradients alone. Γ stays centred over all the
    /// sources it was made of, but a vector common to all prompts of a sample changes no variance
    /// about the mixed gradient.
    pub fn of_sources(&self, keep: &[usize]) -> Self {
        let m = self.num_sources;
        let rows: Vec<usize> = keep
            .iter()
            .enumerate()
            .flat_map(|(at, i)| keep[at..].iter().map(move |j| packed(*i, *j, m)))
            .collect();
        Self {
            num_sources: keep.len(),
            gram: submatrix(&self.gram, num_pairs(m), &rows),
            variance_gram: submatrix(&self.variance_gram, m, keep),
        }
    }
}

/// The given rows and columns of a square matrix.
fn submatrix(matrix: &[f64], size: usize, rows: &[usize]) -> Vec<f64> {
    rows.iter()
        .flat_map(|row| rows.iter().map(move |column| matrix[row * size + column]))
        .collect()
}

/// L_align as a function of α.
pub struct GradientAlignment {
    variant: AlignmentVariant,
    statistics: AlignmentStatistics,
}

impl GradientAlignment {
    /// L_align of a variant.
    ///
    /// # Panics
    /// If Γ is not T × T, or VᵀV not M × M.
    pub fn new(variant: AlignmentVariant, statistics: AlignmentStatistics) -> Self {
        let m = statistics.num_sources;
        assert_eq!(statistics.gram.len(), num_pairs(m).pow(2));
        assert_eq!(statistics.variance_gram.len(), m.pow(2));
        Self {
            variant,
            statistics,
        }
    }

    pub fn value(&self, alpha: &[f64]) -> f64 {
        self.value_and_gradient(alpha).0
    }

    /// L_align and its gradient, which is valid along Σα = 1.
    pub fn value_and_gradient(&self, alpha: &[f64]) -> (f64, Vec<f64>) {
        let m = self.statistics.num_sources;
        let (value, gradient) = match self.variant {
            AlignmentVariant::MixtureWeighted => self.about_the_mixed(alpha, alpha, true),
            AlignmentVariant::MixtureUniform => {
                self.about_the_mixed(alpha, &vec![1.0 / m as f64; m], false)
            }
            AlignmentVariant::Fishr => self.about_their_own(alpha),
        };
        // Γ and VᵀV are positive semi-definite up to rounding.
        (value.max(0.0), gradient)
    }

    /// `mixture_weighted` and `mixture_uniform`: v̄ = Σ_k `weights`_k v_k, where `weights` are α itself (`moves`) or constant.
    fn about_the_mixed(&self, alpha: &[f64], weights: &[f64], moves: bool) -> (f64, Vec<f64>) {
        let m = self.statistics.num_sources;
        let pairs = num_pairs(m);
        let u: Vec<Vec<f64>> = (0..m).map(|i| u(i, alpha)).collect();
        let u_bar: Vec<f64> = (0..pairs)
            .map(|t| (0..m).map(|k| weights[k] * u[k][t]).sum())
            .collect();

        let mut value = 0.0;
        // Σ_i Γ r_i; and for each l the sum over i that the term -2 S_il of ∂r_i/∂α_l takes.
        let mut gamma_r_sum = vec![0.0; pairs];
        let mut gradient = vec![0.0; m];
        for (i, u_i) in u.iter().enumerate() {
            let r: Vec<f64> = u_i.iter().zip(&u_bar).map(|(a, b)| a - b).collect();
            let gamma_r: Vec<f64> = self
                .statistics
                .gram
                .chunks_exact(pairs)
                .map(|row| dot(row, &r))
                .collect();
            value += dot(&r, &gamma_r);
            for (l, g) in gradient.iter_mut().enumerate() {
                *g -= 2.0 * gamma_r[packed(i, l, m)];
            }
            for (sum, term) in gamma_r_sum.iter_mut().zip(&gamma_r) {
                *sum += term;
            }
        }
        // The rest of ∂r_i/∂α_l is the same for every i: 2 Σ_k w_k S_kl, and -u_l if w is α.
        for (l, g) in gradient.iter_mut().enumerate() {
            let through_u: f64 = (0..m)
                .map(|k| weights[k] * gamma_r_sum[packed(k, l, m)])
                .sum();
            *g += 2.0 * through_u;
            if moves {
                *g -= dot(&u[l], &gamma_r_sum);
            }
        }
        let scale = 1.0 / m as f64;
        gradient.iter_mut().for_each(|g| *g *= 2.0 * scale);
        (value * scale, gradient)
    }

    /// `fishr`: (1/M) Σ_i (eᵢ - α)ᵀ VᵀV (eᵢ - α).
    fn about_their_own(&self, alpha: &[f64]) -> (f64, Vec<f64>) {
        let m = self.statistics.num_sources;
        let (mut value, mut gradient) = (0.0, vec![0.0; m]);
        for i in 0..m {
            let r: Vec<f64> = (0..m)
                .map(|k| f64::from(u8::from(k == i)) - alpha[k])
                .collect();
            let rows = self.statistics.variance_gram.chunks_exact(m);
            let gram_r: Vec<f64> = rows.map(|row| dot(row, &r)).collect();
            value += dot(&r, &gram_r) / m as f64;
            for (g, term) in gradient.iter_mut().zip(&gram_r) {
                *g -= 2.0 * term / m as f64;
            }
        }
        (value, gradient)
    }
}

/// The coefficients of u_i = S_ii - 2 Σ_k α_k S_ik over the packed rows.
fn u(i: usize, alpha: &[f64]) -> Vec<f64> {
    let m = alpha.len();
    let mut coefficients = vec![0.0; num_pairs(m)];
    coefficients[packed(i, i, m)] = 1.0;
    for (k, weight) in alpha.iter().enumerate() {
        coefficients[packed(i, k, m)] -= 2.0 * weight;
    }
    coefficients
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::AlignmentVariant::{Fishr, MixtureUniform, MixtureWeighted};
    use super::*;
    use crate::testing::{alignment_statistics, noise_tensor};

    const VARIANTS: [AlignmentVariant; 3] = [MixtureWeighted, MixtureUniform, Fishr];
    const ALPHA: [f64; 4] = [0.1, 0.2, 0.3, 0.4];

    /// Gradients [M, N, P] of different scales, with means and a part common to the prompts.
    fn gradients(seed: u64) -> Tensor {
        let scales = Tensor::from_slice(&[0.5, 1.0, 2.0, 1.5]).view([4, 1, 1]);
        noise_tensor(&[4, 15, 6], seed) * scales
            + noise_tensor(&[4, 1, 6], seed + 1)
            + noise_tensor(&[1, 15, 6], seed + 2)
    }

    fn value(variant: AlignmentVariant, gradients: &Tensor, alpha: &[f64]) -> f64 {
        GradientAlignment::new(variant, alignment_statistics(gradients)).value(alpha)
    }

    /// L_align by its definition, from the gradients themselves.
    fn naive(variant: AlignmentVariant, gradients: &Tensor, alpha: &[f64]) -> f64 {
        let (m, n, _) = gradients.size3().unwrap();
        let weights = Tensor::from_slice(alpha);
        let about = match variant {
            MixtureWeighted | MixtureUniform => {
                (gradients * weights.view([m, 1, 1])).sum_dim_intlist(0, true, Kind::Double)
            }
            Fishr => gradients.mean_dim(1, true, Kind::Double),
        };
        let v = (gradients - about)
            .square()
            .sum_dim_intlist(1, false, Kind::Double)
            / (n - 1) as f64;
        let v_bar = match variant {
            MixtureWeighted | Fishr => {
                (&v * weights.view([m, 1])).sum_dim_intlist(0, true, Kind::Double)
            }
            MixtureUniform => v.mean_dim(0, true, Kind::Double),
        };
        f64::try_from((v - v_bar).square().sum(Kind::Double)).unwrap() / m as f64
    }

    fn assert_relative(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance * b.abs(), "{a} is not {b}");
    }

    #[test]
    fn every_reading_equals_its_definition() {
        let gradients = gradients(1);
        for variant in VARIANTS {
            for alpha in [ALPHA, [0.25; 4], [0.0, 1.0, 0.0, 0.0]] {
                let expected = naive(variant, &gradients, &alpha);
                assert_relative(value(variant, &gradients, &alpha), expected, 1e-10);
            }
        }
        let v = |i| naive(Fishr, &gradients.narrow(0, i, 1), &[1.0]);
        assert_eq!([v(0), v(3)], [0.0; 2], "one prompt is aligned with itself");
        assert_eq!(packed(2, 1, 4), 5);
    }

    #[test]
    fn the_gradient_agrees_with_central_differences() {
        let statistics = alignment_statistics(&gradients(4));
        for variant in VARIANTS {
            let alignment = GradientAlignment::new(variant, statistics.clone());
            let (_, gradient) = alignment.value_and_gradient(&ALPHA);
            for i in 0..4 {
                // The direction eᵢ - α keeps Σα = 1: the gradient is valid there only.
                let direction: Vec<f64> = (0..4)
                    .map(|k| f64::from(u8::from(i == k)) - ALPHA[k])
                    .collect();
                let at = |step: f64| {
                    let moved = ALPHA.iter().zip(&direction).map(|(a, d)| a + step * d);
                    alignment.value(&moved.collect::<Vec<_>>())
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                let analytic = dot(&gradient, &direction);
                assert!(
                    (numeric - analytic).abs() < 1e-6 * (1.0 + analytic.abs()),
                    "{variant:?}, {i}: {numeric} {analytic}"
                );
            }
        }
    }

    #[test]
    fn what_all_prompts_share_counts_in_r3_only_and_the_order_of_coordinates_nowhere() {
        let gradients = gradients(7);
        let shared = &gradients + noise_tensor(&[1, 15, 6], 10) * 3.0;
        let order = Tensor::from_slice(&[3i64, 5, 0, 1, 4, 2]);
        let reordered = gradients.index_select(2, &order);
        for variant in VARIANTS {
            let here = value(variant, &gradients, &ALPHA);
            let there = value(variant, &shared, &ALPHA);
            if variant == Fishr {
                assert!((there - here).abs() > 0.01 * here, "{here} {there}");
            } else {
                assert_relative(there, here, 1e-10);
            }
            assert_relative(value(variant, &reordered, &ALPHA), here, 1e-12);
            let scaled = value(variant, &(&gradients * 3.0), &ALPHA);
            assert_relative(scaled, 81.0 * here, 1e-10);
        }
    }

    #[test]
    fn r3_is_least_at_uniform_weights() {
        let alignment = GradientAlignment::new(Fishr, alignment_statistics(&gradients(11)));
        let (least, gradient) = alignment.value_and_gradient(&[0.25; 4]);
        assert!(least > 0.0 && gradient.iter().all(|g| g.abs() < 1e-10 * least));
        for seed in 0..20 {
            let drawn = crate::testing::noise(4, seed);
            let sum: f64 = drawn.iter().map(|a| a.abs()).sum();
            let alpha: Vec<f64> = drawn.iter().map(|a| a.abs() / sum).collect();
            assert!(alignment.value(&alpha) >= least);
        }
    }

    #[test]
    fn r2_and_r3_are_convex_quadratics() {
        let statistics = alignment_statistics(&gradients(14));
        for variant in [MixtureUniform, Fishr] {
            let alignment = GradientAlignment::new(variant, statistics.clone());
            // Along any line, the second differences of a quadratic are the same everywhere, and
            // those of a convex one are not negative.
            for seed in 0..20 {
                let drawn = crate::testing::noise(4, seed);
                let mean = drawn.iter().sum::<f64>() / 4.0;
                let second_difference = |centre: &[f64; 4], step: f64| {
                    let at = |step: f64| {
                        let moved = centre.iter().zip(&drawn);
                        let moved: Vec<f64> = moved.map(|(a, d)| a + step * (d - mean)).collect();
                        alignment.value(&moved)
                    };
                    (at(step) - 2.0 * at(0.0) + at(-step)) / step.powi(2)
                };
                let here = second_difference(&ALPHA, 0.1);
                assert!(here > 0.0, "{variant:?}: {here}");
                assert_relative(second_difference(&[0.7, 0.1, 0.2, 0.0], 0.5), here, 1e-9);
            }
        }
    }

    #[test]
    fn a_subset_of_the_sources_is_what_their_gradients_alone_give() {
        let gradients = gradients(17);
        let whole = alignment_statistics(&gradients);
        for keep in [vec![2, 0], vec![3, 1, 2], vec![1, 0, 3, 2], vec![2]] {
            let rows: Vec<i64> = keep.iter().map(|i| *i as i64).collect();
            let alone = gradients.index_select(0, &Tensor::from_slice(&rows));
            let subset = whole.of_sources(&keep);
            let m = keep.len();
            let alpha: Vec<f64> = (1..=m).map(|i| i as f64 / num_pairs(m) as f64).collect();
            for variant in VARIANTS {
                let value = GradientAlignment::new(variant, subset.clone()).value(&alpha);
                let expected = naive(variant, &alone, &alpha);
                let scale = naive(variant, &gradients, &ALPHA);
                assert!((value - expected).abs() <= 1e-12 * scale.max(expected));
            }
        }
        assert_eq!(whole.of_sources(&[0, 1, 2, 3]), whole);
    }
}

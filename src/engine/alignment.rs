//! Gradient alignment, reading R1, from the compressed Gram matrix Γ alone.
//!
//! With S_ij[p] = 1/(N-1) Σ_n g̃ᵢₙ[p] g̃ⱼₙ[p] (per-sample gradients centred over the prompts),
//! u_i = S_ii - 2(Sα)_i and r_i = u_i - Σ_k α_k u_k, on Σα = 1:
//!
//! L_align(α) = (1/M) Σ_i ‖vᵢ - v̄(α)‖² = (1/M) Σ_i Σ_p r_i[p]²
//!
//! where vᵢ is the variance of prompt i's gradients about the mixed gradient. Every r_i is a linear
//! combination, with coefficients that depend on α only, of the T = M(M+1)/2 packed rows of S, so the
//! data enter through Γ = S Sᵀ [T, T]. L_align scales with the fourth power of the gradients.

/// Row of the pair (i, j) in the packed order (0,0), (0,1), …, (0,M-1), (1,1), ….
pub fn packed(i: usize, j: usize, m: usize) -> usize {
    let (i, j) = (i.min(j), i.max(j));
    i * (2 * m - i + 1) / 2 + (j - i)
}

/// T = M(M+1)/2
pub fn num_pairs(m: usize) -> usize {
    m * (m + 1) / 2
}

pub struct GradientAlignment {
    num_sources: usize,
    /// [T, T], row-major.
    gram: Vec<f64>,
}

impl GradientAlignment {
    /// # Panics
    /// When `gram` is not T × T.
    pub fn new(num_sources: usize, gram: Vec<f64>) -> Self {
        assert_eq!(gram.len(), num_pairs(num_sources).pow(2));
        Self { num_sources, gram }
    }

    pub fn value(&self, alpha: &[f64]) -> f64 {
        self.value_and_gradient(alpha).0
    }

    /// L_align and its gradient, which is valid along Σα = 1.
    pub fn value_and_gradient(&self, alpha: &[f64]) -> (f64, Vec<f64>) {
        let m = self.num_sources;
        let pairs = num_pairs(m);
        let u: Vec<Vec<f64>> = (0..m).map(|i| self.u(i, alpha)).collect();
        let u_bar: Vec<f64> = (0..pairs)
            .map(|t| (0..m).map(|k| alpha[k] * u[k][t]).sum())
            .collect();

        let mut value = 0.0;
        // Σ_i Γ r_i, and for each l the sum over i that ∂r_i/∂α_l's term -2 S_il takes.
        let mut gamma_r_sum = vec![0.0; pairs];
        let mut gradient = vec![0.0; m];
        for (i, u_i) in u.iter().enumerate() {
            let r: Vec<f64> = u_i.iter().zip(&u_bar).map(|(a, b)| a - b).collect();
            let gamma_r: Vec<f64> = self
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
        // The rest of ∂r_i/∂α_l is the same for every i: -u_l + 2 Σ_k α_k S_kl.
        for (l, g) in gradient.iter_mut().enumerate() {
            *g -= dot(&u[l], &gamma_r_sum);
            *g += 2.0
                * (0..m)
                    .map(|k| alpha[k] * gamma_r_sum[packed(k, l, m)])
                    .sum::<f64>();
        }
        let scale = 1.0 / m as f64;
        gradient.iter_mut().for_each(|g| *g *= 2.0 * scale);
        // Γ is positive semi-definite up to rounding.
        (value.max(0.0) * scale, gradient)
    }

    /// The coefficients of u_i = S_ii - 2 Σ_k α_k S_ik over the packed rows.
    fn u(&self, i: usize, alpha: &[f64]) -> Vec<f64> {
        let m = self.num_sources;
        let mut coefficients = vec![0.0; num_pairs(m)];
        coefficients[packed(i, i, m)] = 1.0;
        for (k, weight) in alpha.iter().enumerate() {
            coefficients[packed(i, k, m)] -= 2.0 * weight;
        }
        coefficients
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

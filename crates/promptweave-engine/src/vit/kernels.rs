//! The operations between a transformer's matrix products on a CPU, each as a single pass over its
//! rows.
//!
//! Separate library calls for bias, residual, LayerNorm, GELU and their derivatives read and write
//! the same activations several times. At the speed of matrix products on a modern core that takes
//! as long as a fifth of them. Every pass here runs on one thread (a stream has one), and is
//! compiled for the widest vectors of the machine.
//!
//! Activations are stored as f32, f64 or bfloat16. Sums are in f32, and for f64 in f64.

use multiversion::multiversion;

/// A type in which activations are stored.
pub trait Element: Copy + Send + Sync + 'static {
    const KIND: tch::Kind;
    /// The type to compute in: f32, or f64 for f64.
    type Real: Real;
    fn load(self) -> Self::Real;
    /// Rounds to nearest, ties to even.
    fn store(value: Self::Real) -> Self;
}

/// bfloat16: the upper half of an f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(u16);

impl Element for f32 {
    const KIND: tch::Kind = tch::Kind::Float;
    type Real = f32;
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        value
    }
}

impl Element for f64 {
    const KIND: tch::Kind = tch::Kind::Double;
    type Real = f64;
    #[inline(always)]
    fn load(self) -> f64 {
        self
    }
    #[inline(always)]
    fn store(value: f64) -> Self {
        value
    }
}

impl Element for Bf16 {
    const KIND: tch::Kind = tch::Kind::BFloat16;
    type Real = f32;
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        let bits = value.to_bits();
        // A NaN may become an infinity here. Both are refused at the end.
        Self((bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16)
    }
}

/// A type to compute in.
pub trait Real:
    Element<Real = Self>
    + Default
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
{
    fn of(value: f64) -> Self;
    fn sqrt(self) -> Self;
    /// self · b + c, rounded once.
    fn fused(self, b: Self, c: Self) -> Self;
    fn max(self, other: Self) -> Self;
    /// eˣ for x ≤ 0.
    fn exp_of_negative(self) -> Self;
    /// Φ(x) and φ(x), distribution function and density of the normal distribution.
    fn normal(self) -> (Self, Self);
}

/// log₂ e, and ln 2 in two parts, the first of which has few bits.
const LOG2_E: f32 = std::f32::consts::LOG2_E;
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Adding and subtracting it rounds an f32 below 2²² to a whole number.
const ROUNDER: f32 = 12_582_912.0;

impl Real for f32 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        self.mul_add(b, c)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }

    /// Uses x = k ln 2 + r with |r| ≤ ½ ln 2 and eˣ = 2ᵏ eʳ (Cody and Waite), with eʳ by Cephes'
    /// polynomial. The relative error is below 2e-7. Below -87 the result stays at e⁻⁸⁷ = 2e-38.
    #[inline(always)]
    fn exp_of_negative(self) -> Self {
        let x = if self < -87.0 { -87.0 } else { self };
        let shifted = x.fused(LOG2_E, ROUNDER);
        let k = shifted - ROUNDER;
        let r = k.fused(-LN_2_HIGH, x);
        let r = k.fused(-LN_2_LOW, r);
        let mut p = 1.987_569_1e-4f32;
        for coefficient in [
            1.398_2e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            p = p.fused(r, coefficient);
        }
        let e = p.fused(r * r, r) + 1.0;
        // k is in the low bits of `shifted`.
        let exponent = shifted.to_bits() << 23;
        f32::from_bits(e.to_bits().wrapping_add(exponent))
    }

    /// Uses Φ(-|x|) = t (a₁ + … + a₅ t⁴) φ(x) √(2π)/2 with t = 1/(1 + p |x|/√2) (Abramowitz and
    /// Stegun 7.1.26). The absolute error is below 1e-7. Φ and φ share the exponential.
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        let x = self;
        let e = (-0.5 * x * x).exp_of_negative();
        let t = 1.0
            / x.abs()
                .fused(0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2, 1.0);
        let mut p = 1.061_405_4f32;
        for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_72, 0.254_829_6] {
            p = p.fused(t, coefficient);
        }
        let lower = 0.5 * p * t * e;
        let function = if x < 0.0 { lower } else { 1.0 - lower };
        (function, e * 0.398_942_3)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        self * b + c
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn exp_of_negative(self) -> Self {
        self.exp()
    }
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        let function = 0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2);
        let density = (-0.5 * self * self).exp() * 0.398_942_280_401_432_7;
        (function, density)
    }
}

/// Number of partial sums of a reduction: enough to keep the widest vector units busy.
const LANES: usize = 32;

/// Σ f(k) over 0..length in LANES partial sums.
#[inline(always)]
fn sum<R: Real>(length: usize, f: impl Fn(usize) -> R) -> R {
    let mut lanes = [R::default(); LANES];
    let whole = length / LANES * LANES;
    let mut start = 0;
    while start < whole {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(start + lane);
        }
        start += LANES;
    }
    let mut total = R::default();
    for k in whole..length {
        total += f(k);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
        width /= 2;
    }
    total + lanes[0]
}

/// Residual and LayerNorm, without its affine part, which the next matrix contains. If there is a
/// `y`, every row of `x` [R, d] becomes x + y + bias. Then `normed` = (x - μ)/√(σ² + ε), and
/// `inverse` `[R]` = 1/√(σ² + ε).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn add_and_normalise<E: Element>(
    x: &mut [E::Real],
    added: Option<(&[E], &[E::Real])>,
    normed: &mut [E],
    inverse: &mut [E::Real],
    epsilon: f64,
) {
    // Without rows there is no width, and nothing to do.
    let d = x.len() / inverse.len().max(1);
    if d == 0 {
        return;
    }
    let by_d = E::Real::of(1.0 / d as f64);
    let rows = x.chunks_exact_mut(d).zip(normed.chunks_exact_mut(d));
    for (r, ((x, normed), inverse)) in rows.zip(inverse).enumerate() {
        if let Some((y, bias)) = added {
            let y = &y[r * d..(r + 1) * d];
            let bias = &bias[..d];
            for k in 0..d {
                x[k] += y[k].load() + bias[k];
            }
        }
        let x = &*x;
        let mean = sum(d, |k| x[k]) * by_d;
        let variance = sum(d, |k| (x[k] - mean) * (x[k] - mean)) * by_d;
        let scale = E::Real::of(1.0) / (variance + E::Real::of(epsilon)).sqrt();
        *inverse = scale;
        for k in 0..d {
            normed[k] = E::store((x[k] - mean) * scale);
        }
    }
}

/// The way back through [`add_and_normalise`]. `by_normed` is the derivative of a loss by the
/// normed rows; the derivative by x is added to `by_x` [R, d]. `rounded` gets the sum as the matrix
/// products read it.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn add_normalise_backward<E: Element>(
    by_x: &mut [E::Real],
    by_normed: &[E],
    normed: &[E],
    inverse: &[E::Real],
    rounded: &mut [E],
) {
    let d = by_x.len() / inverse.len().max(1);
    if d == 0 {
        return;
    }
    let by_d = E::Real::of(1.0 / d as f64);
    for (r, scale) in inverse.iter().enumerate() {
        let row = r * d..(r + 1) * d;
        let (by_x, by_normed) = (&mut by_x[row.clone()], &by_normed[row.clone()]);
        let (normed, rounded) = (&normed[row.clone()], &mut rounded[row]);
        let mean = sum(d, |k| by_normed[k].load()) * by_d;
        let along = sum(d, |k| by_normed[k].load() * normed[k].load()) * by_d;
        for k in 0..d {
            let own = by_normed[k].load() - mean - normed[k].load() * along;
            by_x[k] = scale.fused(own, by_x[k]);
            rounded[k] = E::store(by_x[k]);
        }
    }
}

/// GELU with erf. Let h be `hidden` `[R, w]` + bias `[w]`. `out` = h Φ(h), and `hidden` becomes the
/// derivative Φ(h) + h φ(h).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn gelu_with_slope<E: Element>(hidden: &mut [E], bias: &[E::Real], out: &mut [E]) {
    let w = bias.len();
    for (hidden, out) in hidden.chunks_exact_mut(w).zip(out.chunks_exact_mut(w)) {
        for k in 0..w {
            let h = hidden[k].load() + bias[k];
            let (function, density) = h.normal();
            out[k] = E::store(h * function);
            hidden[k] = E::store(h.fused(density, function));
        }
    }
}

/// `values` *= `factors`, entry by entry.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn multiply<E: Element>(values: &mut [E], factors: &[E]) {
    for (value, factor) in values.iter_mut().zip(factors) {
        *value = E::store(value.load() * factor.load());
    }
}

/// Adds `row` `[w]` to the first w entries of every `stride` ones.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn add_to_rows<E: Element>(values: &mut [E], stride: usize, row: &[E::Real]) {
    let w = row.len();
    for values in values.chunks_exact_mut(stride) {
        let values = &mut values[..w];
        for k in 0..w {
            values[k] = E::store(values[k].load() + row[k]);
        }
    }
}

/// Softmax of every row of `scores` [R, n], in place.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn softmax<E: Element>(scores: &mut [E], n: usize) {
    for row in scores.chunks_exact_mut(n) {
        let mut largest = row[0].load();
        for value in row.iter() {
            largest = largest.max(value.load());
        }
        for value in row.iter_mut() {
            *value = E::store((value.load() - largest).exp_of_negative());
        }
        let total = sum(n, |k| row[k].load());
        let scale = E::Real::of(1.0) / total;
        for value in row.iter_mut() {
            *value = E::store(value.load() * scale);
        }
    }
}

/// The way back through [`softmax`]: `by_weights` [R, n] becomes the derivative by the scores, p ∘
/// (g - ⟨g, p⟩).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn softmax_backward<E: Element>(by_weights: &mut [E], weights: &[E], n: usize) {
    for (by, p) in by_weights.chunks_exact_mut(n).zip(weights.chunks_exact(n)) {
        let inner = {
            let by = &*by;
            sum(n, |k| by[k].load() * p[k].load())
        };
        for k in 0..n {
            by[k] = E::store((by[k].load() - inner) * p[k].load());
        }
    }
}

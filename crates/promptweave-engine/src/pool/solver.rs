//! The weights of a log-linear pool: a convex problem with one optimum.
//!
//! A pool of M sources predicts p_w(y|x) ∝ Πᵢ pᵢ(y|x)^wᵢ with w ≥ 0. The weights minimise
//!
//!   F(w) = 1/N Σₙ -log p_w(yₙ|xₙ) + β/N Σᵢ (wᵢ log(wᵢ/u) - wᵢ + u)
//!
//! The first term is a log-sum-exp of linear functions of w, less a linear one: it is convex. The second pulls the weights
//! towards equal ones, u each, with the strength of β samples; it is strictly convex, and 0 at w = u.
//!
//! Newton's method solves it. A weight that shrinks is multiplied by exp(δ/w), where δ is its Newton step: this is exact
//! for a weight that the second term alone holds up, and keeps it above 0. At β = 0 weights may reach 0, and those that
//! would go below are held there (Bertsekas 1982, two-metric projection).
//!
//! An evaluation takes one exponential for each sample and class, not one for each source.

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::tensors::cholesky;

/// Small enough that what is computed of a chunk stays in a core's cache, and that libtorch gets no new pages for it.
const CHUNK_BYTES: i64 = 2 << 20;
const MAX_ITERATIONS: usize = 100;
/// The solver stops when no weight moves by more than this share of the largest weight.
const TOLERANCE: f64 = 1e-10;
/// The solver stops below this Newton decrement too, since sources that are never wrong have no largest sharpness at β = 0.
const SMALLEST: f64 = 1e-16;
/// Below this Newton decrement, the objective cannot be told apart in floating point, and whole steps are taken.
const EXACT: f64 = 1e-13;
/// The smallest positive weight, as a share of u.
const FLOOR: f64 = 1e-30;

/// What M sources predict for N labelled samples of K classes.
pub struct Predictions {
    /// log pᵢ(k|xₙ), `[M, N, K]` in f32 or f64, all finite.
    log_p: Tensor,
    /// The class of every sample, `[N]`.
    labels: Tensor,
    /// The most bytes of log-probabilities that are in f64 at once.
    pub(super) chunk_bytes: i64,
}

/// F at some weights, with its derivatives.
pub(super) struct Point {
    pub value: f64,
    pub gradient: Tensor,
    pub hessian: Tensor,
}

/// The optimum, and how it was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimum {
    /// w, one weight for each source.
    pub weights: Vec<f64>,
    /// F(w).
    pub value: f64,
    pub iterations: usize,
    /// Whether the weights stopped moving before the last iteration allowed.
    pub converged: bool,
}

/// F without its samples: the pull towards equal weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pull {
    /// β ≥ 0, in samples.
    pub beta: f64,
    /// u > 0, the weight that it pulls towards.
    pub centre: f64,
}

impl Predictions {
    /// `log_p` is `[M, N, K]`, `labels` has N entries below K.
    pub fn new(log_p: Tensor, labels: &[usize]) -> Self {
        let labels: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
        Self {
            log_p,
            labels: Tensor::from_slice(&labels),
            chunk_bytes: CHUNK_BYTES,
        }
    }

    pub fn num_sources(&self) -> usize {
        self.log_p.size()[0] as usize
    }

    pub fn num_samples(&self) -> usize {
        self.log_p.size()[1] as usize
    }

    /// The predictions of some of the sources. Those of all are not copied.
    pub fn of_sources(&self, keep: &[usize]) -> Self {
        let rows: Vec<i64> = keep.iter().map(|i| *i as i64).collect();
        let all = keep.iter().copied().eq(0..self.num_sources());
        Self {
            log_p: match all {
                true => self.log_p.shallow_clone(),
                false => self.log_p.index_select(0, &Tensor::from_slice(&rows)),
            },
            labels: self.labels.shallow_clone(),
            chunk_bytes: self.chunk_bytes,
        }
    }

    /// The predictions for some of the samples.
    pub fn of_samples(&self, rows: &[usize]) -> Self {
        let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        let rows = Tensor::from_slice(&rows);
        Self {
            log_p: self.log_p.index_select(1, &rows),
            labels: self.labels.index_select(0, &rows),
            chunk_bytes: self.chunk_bytes,
        }
    }

    /// One source whose log-probabilities are the mean of all: a uniform pool, up to its sharpness.
    pub fn mean(&self) -> Self {
        let mean = self.log_p.mean_dim([0i64].as_slice(), true, Kind::Double);
        Self {
            log_p: mean,
            labels: self.labels.shallow_clone(),
            chunk_bytes: self.chunk_bytes,
        }
    }

    /// log p_w(k|xₙ), `[N, K]`.
    pub fn pooled(&self, weights: &[f64]) -> Tensor {
        let (_, n, k) = self.sizes();
        let w = Tensor::from_slice(weights);
        let mut pooled = Vec::new();
        self.in_chunks(|chunk, _| {
            let z = w.unsqueeze(0).matmul(&chunk.flatten(1, 2)).view([-1, k]);
            pooled.push(z.log_softmax(-1, Kind::Double));
        });
        Tensor::cat(&pooled, 0).view([n, k])
    }

    /// The loss of every sample by a pool with these weights in nats, `[N]`.
    pub fn losses(&self, weights: &[f64]) -> Tensor {
        let own = self
            .pooled(weights)
            .gather(1, &self.labels.unsqueeze(1), false);
        -own.squeeze_dim(1)
    }

    /// Mean loss of a pool with these weights in nats: the first term of F.
    pub fn loss(&self, weights: &[f64]) -> f64 {
        self.losses(weights).mean(Kind::Double).double_value(&[])
    }

    /// Share of the samples whose label a pool with these weights finds most probable.
    pub fn accuracy(&self, weights: &[f64]) -> f64 {
        let correct = self
            .pooled(weights)
            .argmax(1, false)
            .eq_tensor(&self.labels);
        correct
            .to_kind(Kind::Double)
            .mean(Kind::Double)
            .double_value(&[])
    }

    fn sizes(&self) -> (i64, i64, i64) {
        self.log_p.size3().expect("three axes")
    }

    /// Calls a function with the log-probabilities `[M, B, K]` in f64 and the labels `[B]` of all samples, some at a time.
    fn in_chunks(&self, mut of_chunk: impl FnMut(&Tensor, &Tensor)) {
        let (m, n, k) = self.sizes();
        let rows = (self.chunk_bytes / (8 * m * k)).max(1);
        for start in (0..n).step_by(rows as usize) {
            let len = rows.min(n - start);
            let chunk = self
                .log_p
                .narrow(1, start, len)
                .to_kind(Kind::Double)
                .contiguous();
            of_chunk(&chunk, &self.labels.narrow(0, start, len));
        }
    }

    /// F with its derivatives.
    pub(super) fn point(&self, weights: &[f64], pull: Pull) -> Point {
        let (m, n, k) = self.sizes();
        let w = Tensor::from_slice(weights);
        let mut value = 0.0;
        let mut gradient = Tensor::zeros([m], (Kind::Double, Device::Cpu));
        let mut hessian = Tensor::zeros([m, m], (Kind::Double, Device::Cpu));
        self.in_chunks(|chunk, labels| {
            let rows = labels.size()[0];
            let flat = chunk.view([m, rows * k]);
            let z = w.unsqueeze(0).matmul(&flat).view([rows, k]);
            let (largest, _) = z.max_dim(1, true);
            let exps = (&z - &largest).exp();
            let sums = exps.sum_dim_intlist(1, true, Kind::Double);
            let q = exps / &sums;
            let own = labels.view([1, rows, 1]).expand([m, rows, 1], false);
            let own = chunk.gather(2, &own, false).view([m, rows]);
            let log_sums = (sums.log() + largest).sum(Kind::Double);
            value += log_sums.double_value(&[])
                - w.dot(&own.sum_dim_intlist(1, false, Kind::Double))
                    .double_value(&[]);
            let q = q.view([1, rows, k]);
            let means = (chunk * &q).sum_dim_intlist(2, true, Kind::Double);
            gradient += (means.view([m, rows]) - own).sum_dim_intlist(1, false, Kind::Double);
            // Centred, with √q in both factors, the product has no negative direction. A difference of second moments
            // has one by rounding, where the pool is nearly certain of every sample.
            let mut centred = chunk - means;
            let _ = centred.g_mul_(&q.sqrt());
            let centred = centred.view([m, rows * k]);
            hessian += centred.matmul(&centred.tr());
        });
        let share = 1.0 / n as f64;
        let strength = pull.beta * share;
        let penalty = pull.value(weights) * share;
        let mut point = Point {
            value: value * share + penalty,
            gradient: gradient * share,
            hessian: hessian * share,
        };
        if strength > 0.0 {
            point.gradient += (&w / pull.centre).log() * strength;
            point.hessian += (w.reciprocal() * strength).diag(0);
        }
        point
    }

    /// F alone.
    fn value(&self, weights: &[f64], pull: Pull) -> f64 {
        self.loss(weights) + pull.value(weights) / self.num_samples() as f64
    }

    /// Minimises F over w ≥ 0 from the given weights, which must be above 0 if β is. `tick` is called before every step.
    pub fn minimise(
        &self,
        pull: Pull,
        start: &[f64],
        tick: &mut dyn FnMut() -> Result<(), EngineError>,
    ) -> Result<Optimum, EngineError> {
        let mut weights = start.to_vec();
        let mut point = self.point(&weights, pull);
        for iteration in 1..=MAX_ITERATIONS {
            tick()?;
            let step = Step::at(&weights, &point, pull)?;
            let (next, at_next) = self.along(&weights, &point, &step, pull);
            let largest = next.iter().copied().fold(0.0, f64::max);
            let moved = (weights.iter().zip(&next)).map(|(a, b)| (a - b).abs());
            let still =
                moved.fold(0.0, f64::max) <= TOLERANCE * largest || step.decrement < SMALLEST;
            (weights, point) = (next, at_next);
            if still {
                return Ok(Optimum {
                    weights,
                    value: point.value,
                    iterations: iteration,
                    converged: true,
                });
            }
        }
        Ok(Optimum {
            weights,
            value: point.value,
            iterations: MAX_ITERATIONS,
            converged: false,
        })
    }

    /// The weights after the longest step that lowers F enough (Armijo 1966), with F there. They stay if no step does.
    fn along(&self, weights: &[f64], point: &Point, step: &Step, pull: Pull) -> (Vec<f64>, Point) {
        let gradient = Vec::<f64>::try_from(&point.gradient).expect("one number a source");
        let enough = |next: &[f64], value: f64| {
            let expected: f64 = (gradient.iter().zip(weights.iter().zip(next)))
                .map(|(slope, (before, after))| slope * (after - before))
                .sum();
            value <= point.value + 1e-4 * expected.min(0.0)
        };
        // A whole step is nearly always short enough, and the next iteration needs the derivatives there.
        let mut next = step.taken(weights, 1.0, pull);
        let whole = self.point(&next, pull);
        if step.decrement < EXACT || enough(&next, whole.value) {
            return (next, whole);
        }
        let mut length = 0.5;
        while length > 1e-12 {
            next = step.taken(weights, length, pull);
            if enough(&next, self.value(&next, pull)) {
                let point = self.point(&next, pull);
                return (next, point);
            }
            length *= 0.5;
        }
        (weights.to_vec(), self.point(weights, pull))
    }
}

impl Pull {
    /// β Σᵢ (wᵢ log(wᵢ/u) - wᵢ + u); 0 log 0 is 0.
    pub(super) fn value(self, weights: &[f64]) -> f64 {
        if self.beta == 0.0 {
            return 0.0;
        }
        let of = |w: f64| match w {
            0.0 => self.centre,
            _ => w * (w / self.centre).ln() - w + self.centre,
        };
        self.beta * weights.iter().map(|w| of(*w)).sum::<f64>()
    }
}

/// A Newton step δ.
struct Step {
    delta: Vec<f64>,
    /// -g·δ, about twice what the step lowers F by.
    decrement: f64,
}

impl Step {
    fn at(weights: &[f64], point: &Point, pull: Pull) -> Result<Self, EngineError> {
        let gradient = Vec::<f64>::try_from(&point.gradient)?;
        let largest = weights.iter().copied().fold(0.0, f64::max);
        // At the border, and F falls beyond it.
        let held =
            |i: &usize| pull.beta == 0.0 && weights[*i] <= 1e-6 * largest && gradient[*i] > 0.0;
        let free: Vec<i64> = (0..weights.len())
            .filter(|i| !held(i))
            .map(|i| i as i64)
            .collect();
        let mut delta: Vec<f64> = weights.iter().map(|w| -w).collect();
        if !free.is_empty() {
            let rows = Tensor::from_slice(&free);
            let hessian = point.hessian.index_select(0, &rows).index_select(1, &rows);
            // If nothing pulls, equal sources make it singular, and useless ones 0.
            let ridge = hessian.diagonal(0, 0, 1) * 1e-12 + 1e-14;
            let factor = cholesky(&(hessian + ridge.diag(0)), "the pool's losses")?;
            let slope = point.gradient.index_select(0, &rows).unsqueeze(1);
            let solved = Vec::<f64>::try_from(slope.cholesky_solve(&factor, false).flatten(0, -1))?;
            for (i, step) in free.iter().zip(solved) {
                delta[*i as usize] = -step;
            }
        }
        let decrement = -(gradient.iter().zip(&delta))
            .map(|(g, d)| g * d)
            .sum::<f64>();
        Ok(Self { delta, decrement })
    }

    /// The weights after a part of the step.
    fn taken(&self, weights: &[f64], length: f64, pull: Pull) -> Vec<f64> {
        let moved = weights.iter().zip(&self.delta).map(|(w, delta)| {
            let delta = length * delta;
            match pull.beta > 0.0 {
                true if delta < 0.0 => (w * (delta / w).exp()).max(FLOOR * pull.centre),
                _ => (w + delta).max(0.0),
            }
        });
        moved.collect()
    }
}

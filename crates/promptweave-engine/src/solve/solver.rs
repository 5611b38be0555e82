//! Solving for α: both terms' own optima, the Pareto path between them, and the chosen trade-off.
//!
//! ```text
//! starts ─► α_H, α_L (anchors) ─► ranges ─► path, t = 0 … 1, warm-started from both ends ─┐
//!    └────────────────────────────────────► chosen trade-off, from every start ───────────┴─► pool
//! ```
//!
//! The end of every descent joins one pool, and every answer is the pool's best for its own
//! trade-off. So neither a bad start nor a bad local optimum can make the path go the wrong way.

use crate::error::EngineError;
use crate::score::alignment::GradientAlignment;
use crate::score::h_score::HScore;
use crate::solve::optimizer::{Descent, minimise, minimise_dense};
use crate::solve::term_weights::{Candidate, Ranges, Scale};
use promptweave_domain::composition::{Optimum, PathPoint, SolverReport};

/// Points of the Pareto path: t = 0, 0.05, …, 1.
const PATH_POINTS: usize = 21;
/// Two ends of descents closer than this in every weight are one optimum.
const SAME_OPTIMUM: f64 = 1e-4;

/// The two terms of L(α) as functions of α.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    pub h_score: &'a HScore,
    pub alignment: &'a GradientAlignment,
}

impl Terms<'_> {
    pub fn candidate(&self, alpha: Vec<f64>) -> Result<Candidate, EngineError> {
        Ok(Candidate {
            h: self.h_score.value(&alpha)?,
            l: self.alignment.value(&alpha),
            alpha,
        })
    }

    /// The minimised function and its gradient (which is valid along Σα = 1).
    fn evaluate(&self, scale: Scale, alpha: &[f64]) -> Result<(f64, Vec<f64>), EngineError> {
        let mut value = 0.0;
        let mut gradient = vec![0.0; alpha.len()];
        let mut add = |weight: f64, (term, slopes): (f64, Vec<f64>)| {
            value += weight * term;
            gradient
                .iter_mut()
                .zip(slopes)
                .for_each(|(g, slope)| *g += weight * slope);
        };
        if scale.h > 0.0 {
            add(-scale.h, self.h_score.value_and_gradient(alpha)?);
        }
        if scale.l > 0.0 {
            add(scale.l, self.alignment.value_and_gradient(alpha));
        }
        Ok((value, gradient))
    }
}

/// A minimisation over the simplex of -h·H + l·L_align, minus τ times the entropy over ln M.
pub struct Descender<'a> {
    pub terms: Terms<'a>,
    pub scale: Scale,
    /// The weight τ of the entropy; 0 for none.
    pub entropy: f64,
}

impl Descender<'_> {
    /// Descends from a start. `tick` is called before every evaluation; its error ends the descent.
    pub fn from(
        &self,
        start: &[f64],
        mut tick: impl FnMut() -> Result<(), EngineError>,
    ) -> Result<Descent, EngineError> {
        let function = |alpha: &[f64]| {
            tick()?;
            self.terms.evaluate(self.scale, alpha)
        };
        if self.entropy > 0.0 && start.len() > 1 {
            minimise_dense(function, self.entropy, start)
        } else {
            minimise(function, start)
        }
    }
}

/// The chosen α and everything that led to it.
pub struct Solution {
    pub alpha: Vec<f64>,
    pub h_score: f64,
    pub gradient_alignment: f64,
    /// The scale of the function that was minimised last.
    pub scale: Scale,
    /// H of every source alone.
    pub own_h_scores: Vec<f64>,
    pub path: Vec<PathPoint>,
    /// The distinct local optima, best first.
    pub optima: Vec<Optimum>,
    /// The solver's report; `None` if α was given.
    pub report: Option<SolverReport>,
}

impl Solution {
    /// The solution record of an α that was not solved for.
    pub fn given(terms: Terms<'_>, alpha: Vec<f64>) -> Result<Self, EngineError> {
        let own_h_scores = own_h_scores(terms.h_score)?;
        let Candidate { alpha, h, l } = terms.candidate(alpha)?;
        Ok(Self {
            alpha,
            h_score: h,
            gradient_alignment: l,
            scale: Scale { h: 1.0, l: 0.0 },
            own_h_scores,
            path: Vec::new(),
            optima: Vec::new(),
            report: None,
        })
    }
}

/// H of every source alone.
pub fn own_h_scores(h_score: &HScore) -> Result<Vec<f64>, EngineError> {
    let m = h_score.num_sources();
    let alone = |i| h_score.value(&towards_vertex(i, m, 1.0));
    (0..m).map(alone).collect()
}

/// Both anchors and the path between them, from which the trade-off is chosen.
pub struct Explored {
    pub ranges: Ranges,
    starts: Vec<Vec<f64>>,
    /// Where the descents of H alone ended, one for each start.
    ends_of_h: Vec<(Descent, Candidate)>,
    own_h_scores: Vec<f64>,
    pool: Vec<Candidate>,
}

impl Explored {
    /// The path. Every point is the best of the pool, which makes both terms monotone along it.
    pub fn path(&self) -> Vec<PathPoint> {
        trade_offs()
            .map(|t| {
                let scale = self.ranges.at(t);
                let point = best(&self.pool, scale);
                PathPoint {
                    trade_off: t,
                    alignment_weight: scale.lambda(),
                    h_score: point.h,
                    gradient_alignment: point.l,
                    validation_accuracy: None,
                    validation_loss: None,
                    weights: point.alpha.clone(),
                }
            })
            .collect()
    }
}

/// t = 0, 0.05, …, 1.
fn trade_offs() -> impl DoubleEndedIterator<Item = f64> {
    (0..PATH_POINTS).map(|i| i as f64 / (PATH_POINTS - 1) as f64)
}

/// A callback before every evaluation; its error ends the solve.
pub type Tick<'a> = &'a mut dyn FnMut() -> Result<(), EngineError>;

/// Solves for α.
pub struct Solver<'a> {
    terms: Terms<'a>,
    evaluations: usize,
}

impl<'a> Solver<'a> {
    pub fn new(terms: Terms<'a>) -> Self {
        Self {
            terms,
            evaluations: 0,
        }
    }

    /// Finds the two anchors, then the path, warm-started from both sides.
    pub fn explore(&mut self, tick: Tick<'_>) -> Result<Explored, EngineError> {
        let m = self.terms.h_score.num_sources();
        let own_h_scores = own_h_scores(self.terms.h_score)?;
        let starts = starts(m, &own_h_scores);
        let mut pool = Vec::new();
        let only_h = Scale { h: 1.0, l: 0.0 };
        let ends_of_h = self.descend_all(only_h, 0.0, &starts, &mut pool, tick)?;
        let largest_l = pool.iter().map(|c: &Candidate| c.l).fold(0.0, f64::max);
        let only_l = Scale {
            h: 0.0,
            l: 1.0 / largest_l.max(f64::MIN_POSITIVE.sqrt()),
        };
        self.descend_all(only_l, 0.0, &starts, &mut pool, tick)?;
        let ranges = Ranges::between(best(&pool, only_h), best(&pool, only_l), largest_l);
        // Without gradients every point of the path is the same.
        let points = trade_offs().chain(trade_offs().rev());
        for t in points.filter(|_| largest_l > 0.0) {
            let scale = ranges.at(t);
            let warm = best(&pool, scale).alpha.clone();
            self.descend_all(scale, 0.0, &[warm], &mut pool, tick)?;
        }
        Ok(Explored {
            ranges,
            starts,
            ends_of_h,
            own_h_scores,
            pool,
        })
    }

    /// Solves at the chosen trade-off, from every start and the best point so far.
    pub fn choose(
        mut self,
        mut explored: Explored,
        scale: Scale,
        entropy: f64,
        tick: Tick<'_>,
    ) -> Result<Solution, EngineError> {
        // For H alone, the ends of the other starts are already known.
        let known = match scale.l == 0.0 && entropy == 0.0 {
            true => std::mem::take(&mut explored.ends_of_h),
            false => Vec::new(),
        };
        let mut starts = vec![best(&explored.pool, scale).alpha.clone()];
        if known.is_empty() {
            starts.append(&mut explored.starts);
        }
        let mut ends = self.descend_all(scale, entropy, &starts, &mut explored.pool, tick)?;
        ends.extend(known);
        let value = |candidate: &Candidate| {
            scale.value(candidate) - entropy * relative_entropy(&candidate.alpha)
        };
        let (winner, end) = ends
            .iter()
            .min_by(|a, b| value(&a.1).total_cmp(&value(&b.1)))
            .expect("there are starts");
        // With entropy the pool's points belong to another function.
        let chosen = if entropy > 0.0 {
            end
        } else {
            best(&explored.pool, scale)
        };
        Ok(Solution {
            alpha: chosen.alpha.clone(),
            h_score: chosen.h,
            gradient_alignment: chosen.l,
            scale,
            optima: distinct(&ends, chosen, value),
            report: Some(SolverReport {
                starts: ends.len(),
                iterations: winner.iterations,
                evaluations: self.evaluations,
                stop_reason: winner.stop_reason,
            }),
            path: explored.path(),
            own_h_scores: explored.own_h_scores,
        })
    }

    /// Descends from each start; the ends join the pool.
    fn descend_all(
        &mut self,
        scale: Scale,
        entropy: f64,
        starts: &[Vec<f64>],
        pool: &mut Vec<Candidate>,
        tick: Tick<'_>,
    ) -> Result<Vec<(Descent, Candidate)>, EngineError> {
        let descender = Descender {
            terms: self.terms,
            scale,
            entropy,
        };
        let mut ends = Vec::with_capacity(starts.len());
        for start in starts {
            let descent = descender.from(start, || {
                self.evaluations += 1;
                tick()
            })?;
            let candidate = self.terms.candidate(descent.alpha.clone())?;
            pool.push(candidate.clone());
            ends.push((descent, candidate));
        }
        Ok(ends)
    }
}

/// Weights with `share` at source i, the rest spread evenly over all.
pub fn towards_vertex(i: usize, m: usize, share: f64) -> Vec<f64> {
    let rest = (1.0 - share) / m as f64;
    (0..m)
        .map(|j| rest + if i == j { share } else { 0.0 })
        .collect()
}

/// The starts: uniform; near every vertex (0.9 eᵢ + 0.1/M); proportional to the sources' own H.
fn starts(m: usize, own_h_scores: &[f64]) -> Vec<Vec<f64>> {
    let mut starts = vec![vec![1.0 / m as f64; m]];
    if m == 1 {
        return starts;
    }
    starts.extend((0..m).map(|i| towards_vertex(i, m, 0.9)));
    let sum: f64 = own_h_scores.iter().sum();
    if sum > 0.0 {
        starts.push(own_h_scores.iter().map(|h| h / sum).collect());
    }
    starts
}

/// The candidate of least value. Among equals (to rounding) it is the one of largest entropy, so
/// that weights are uniform if nothing tells the sources apart.
fn best(pool: &[Candidate], scale: Scale) -> &Candidate {
    let least = pool
        .iter()
        .map(|c| scale.value(c))
        .fold(f64::INFINITY, f64::min);
    let equal = least + 1e-12 * (1.0 + least.abs());
    pool.iter()
        .filter(|c| scale.value(c) <= equal)
        .max_by(|a, b| entropy(&a.alpha).total_cmp(&entropy(&b.alpha)))
        .expect("the pool is not empty")
}

/// The entropy S(α) = -Σ α ln α.
fn entropy(alpha: &[f64]) -> f64 {
    -alpha
        .iter()
        .filter(|a| **a > 0.0)
        .map(|a| a * a.ln())
        .sum::<f64>()
}

/// The relative entropy S(α)/ln M, in [0, 1].
fn relative_entropy(alpha: &[f64]) -> f64 {
    if alpha.len() == 1 {
        return 0.0;
    }
    entropy(alpha) / (alpha.len() as f64).ln()
}

/// The distinct ends, best first. The chosen α leads even if a path point found it.
fn distinct(
    ends: &[(Descent, Candidate)],
    chosen: &Candidate,
    value: impl Fn(&Candidate) -> f64,
) -> Vec<Optimum> {
    let optimum = |candidate: &Candidate, starts| Optimum {
        weights: candidate.alpha.clone(),
        value: value(candidate),
        h_score: candidate.h,
        gradient_alignment: candidate.l,
        starts,
    };
    let mut found = vec![optimum(chosen, 0)];
    for (_, end) in ends {
        let same = found.iter_mut().find(|o| {
            o.weights
                .iter()
                .zip(&end.alpha)
                .all(|(a, b)| (a - b).abs() < SAME_OPTIMUM)
        });
        match same {
            Some(optimum) => optimum.starts += 1,
            None => found.push(optimum(end, 1)),
        }
    }
    found[1..].sort_by(|a, b| a.value.total_cmp(&b.value));
    found
}

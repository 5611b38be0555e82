//! L(α) = -H(α) + λ L_align(α): the two terms together, and how they are weighed.
//!
//! H is unitless and L_align scales with the fourth power of the gradients, so a fixed λ means nothing
//! across tasks. The scale-free trade-off t normalises each term by its range between the two terms'
//! own optima (utopia-nadir normalisation), with α_H = argmax H and α_L = argmin L_align:
//!
//! (1-t)·(H* - H)/(H* - H(α_L)) + t·(L_align - L*)/(L_align(α_H) - L*), t in [0, 1]
//!
//! which is the minimisation of L(α) at λ(t) = t/(1-t)·(H* - H(α_L))/(L_align(α_H) - L*).

use std::cell::Cell;

use super::EngineError;
use super::alignment::GradientAlignment;
use super::h_score::HScore;
use super::optimizer::{Descent, minimise};
use crate::domain::composition::{Optimum, PathPoint, SolverReport};
use crate::domain::objective::Weighing;

/// Points of the Pareto path: t = 0, 0.05, …, 1.
const PATH_POINTS: usize = 21;
/// Two ends of a descent closer than this in every weight are one optimum.
const SAME_OPTIMUM: f64 = 1e-4;
/// A range smaller than this share of its term's size is rounding: the terms agree.
const NO_RANGE: f64 = 1e-9;

/// The chosen α and everything that led to it.
pub struct Solution {
    pub alpha: Vec<f64>,
    pub h_score: f64,
    pub gradient_alignment: f64,
    /// λ, or `None` where it is infinite.
    pub alignment_weight: Option<f64>,
    pub path: Vec<PathPoint>,
    pub optima: Vec<Optimum>,
    pub report: SolverReport,
}

/// Both terms at a point some descent ended in.
#[derive(Clone)]
struct Candidate {
    alpha: Vec<f64>,
    h: f64,
    l: f64,
}

/// How much a unit of each term counts: the minimised function is -h·H + l·L_align.
#[derive(Clone, Copy)]
struct Scale {
    h: f64,
    l: f64,
}

impl Scale {
    fn value(self, candidate: &Candidate) -> f64 {
        -self.h * candidate.h + self.l * candidate.l
    }

    fn lambda(self) -> Option<f64> {
        (self.h > 0.0).then(|| self.l / self.h)
    }
}

/// The ranges of the two terms between their own optima.
struct Ranges {
    h: f64,
    l: f64,
}

impl Ranges {
    /// The scale of trade-off t. Where one term has no range the other's optimum attains both, so the
    /// other alone decides.
    fn at(&self, t: f64) -> Scale {
        match (self.h > 0.0, self.l > 0.0) {
            (true, true) => Scale {
                h: (1.0 - t) / self.h,
                l: t / self.l,
            },
            (true, false) => Scale {
                h: 1.0 / self.h,
                l: 0.0,
            },
            (false, true) => Scale {
                h: 0.0,
                l: 1.0 / self.l,
            },
            (false, false) => Scale { h: 1.0, l: 0.0 },
        }
    }

    fn of(&self, weighing: Weighing) -> Scale {
        match weighing {
            Weighing::TradeOff(t) => self.at(t),
            Weighing::Rule(_) => self.at(0.5),
            Weighing::AlignmentWeight(lambda) => {
                let size = (self.h + lambda * self.l).max(f64::MIN_POSITIVE);
                if size.is_normal() && size > 1e-300 {
                    Scale {
                        h: 1.0 / size,
                        l: lambda / size,
                    }
                } else {
                    Scale { h: 1.0, l: lambda }
                }
            }
        }
    }
}

/// Solves for α. `tick` is asked before every evaluation; its error ends the solve.
pub struct Solver<'a> {
    pub h_score: &'a HScore,
    pub alignment: &'a GradientAlignment,
    pub num_sources: usize,
    pub tick: &'a mut dyn FnMut() -> Result<(), EngineError>,
}

impl Solver<'_> {
    pub fn solve(mut self, weighing: Weighing) -> Result<Solution, EngineError> {
        let evaluations = Cell::new(0);
        let starts = self.starts()?;

        // The two anchors.
        let mut pool = Vec::new();
        let only_h = Scale { h: 1.0, l: 0.0 };
        self.descend_all(only_h, &starts, &mut pool, &evaluations)?;
        let largest_l = pool.iter().map(|c: &Candidate| c.l).fold(0.0, f64::max);
        let only_l = Scale {
            h: 0.0,
            l: 1.0 / largest_l.max(f64::MIN_POSITIVE.sqrt()),
        };
        self.descend_all(only_l, &starts, &mut pool, &evaluations)?;
        let best_h = best(&pool, only_h).clone();
        let best_l = best(&pool, only_l).clone();
        let range = |wide: f64, size: f64| if wide > NO_RANGE * size { wide } else { 0.0 };
        let ranges = Ranges {
            h: range(best_h.h - best_l.h, best_h.h.abs()),
            l: range(best_h.l - best_l.l, largest_l),
        };

        // The chosen weighing from every start; then the path, warm-started from both sides.
        let scale = ranges.of(weighing);
        let mut starts_here = starts;
        starts_here.push(best_h.alpha.clone());
        starts_here.push(best_l.alpha.clone());
        let ends = self.descend_all(scale, &starts_here, &mut pool, &evaluations)?;
        let trade_offs: Vec<f64> = (0..PATH_POINTS)
            .map(|i| i as f64 / (PATH_POINTS - 1) as f64)
            .collect();
        for t in trade_offs.iter().chain(trade_offs.iter().rev()) {
            let warm = best(&pool, ranges.at(*t)).alpha.clone();
            self.descend_all(ranges.at(*t), &[warm], &mut pool, &evaluations)?;
        }

        // Every point of the path is the best of one common pool, which makes both terms monotone
        // along it whatever local optima single descents ended in.
        let path = trade_offs
            .iter()
            .map(|t| {
                let scale = ranges.at(*t);
                let point = best(&pool, scale);
                PathPoint {
                    trade_off: *t,
                    alignment_weight: scale.lambda(),
                    h_score: point.h,
                    gradient_alignment: point.l,
                    validation_accuracy: None,
                    weights: point.alpha.clone(),
                }
            })
            .collect();
        let chosen = best(&pool, scale);
        let optima = distinct(&ends, chosen, scale);
        let winner = ends
            .iter()
            .min_by(|a, b| a.0.value.total_cmp(&b.0.value))
            .map(|(descent, _)| descent)
            .expect("there are starts");
        Ok(Solution {
            alpha: chosen.alpha.clone(),
            h_score: chosen.h,
            gradient_alignment: chosen.l,
            alignment_weight: match weighing {
                Weighing::AlignmentWeight(lambda) => Some(lambda),
                _ => scale.lambda(),
            },
            path,
            optima,
            report: SolverReport {
                starts: starts_here.len(),
                iterations: winner.iterations,
                evaluations: evaluations.get(),
                stop_reason: winner.stop_reason,
            },
        })
    }

    /// Uniform; near every vertex (0.9 eᵢ + 0.1/M); proportional to the sources' own H.
    fn starts(&self) -> Result<Vec<Vec<f64>>, EngineError> {
        let m = self.num_sources;
        let near_vertex = |i: usize, share: f64| -> Vec<f64> {
            let rest = (1.0 - share) / m as f64;
            (0..m)
                .map(|j| rest + if i == j { share } else { 0.0 })
                .collect()
        };
        let mut starts = vec![vec![1.0 / m as f64; m]];
        if m == 1 {
            return Ok(starts);
        }
        starts.extend((0..m).map(|i| near_vertex(i, 0.9)));
        let own = (0..m)
            .map(|i| self.h_score.value(&near_vertex(i, 1.0)))
            .collect::<Result<Vec<_>, _>>()?;
        let sum: f64 = own.iter().sum();
        if sum > 0.0 {
            starts.push(own.iter().map(|h| h / sum).collect());
        }
        Ok(starts)
    }

    /// Descends from each start; ends join the pool.
    fn descend_all(
        &mut self,
        scale: Scale,
        starts: &[Vec<f64>],
        pool: &mut Vec<Candidate>,
        evaluations: &Cell<usize>,
    ) -> Result<Vec<(Descent, Candidate)>, EngineError> {
        let mut ends = Vec::with_capacity(starts.len());
        for start in starts {
            let descent = minimise(
                |alpha| {
                    (self.tick)()?;
                    evaluations.set(evaluations.get() + 1);
                    evaluate(self.h_score, self.alignment, scale, alpha)
                },
                start,
            )?;
            let candidate = Candidate {
                h: self.h_score.value(&descent.alpha)?,
                l: self.alignment.value(&descent.alpha),
                alpha: descent.alpha.clone(),
            };
            pool.push(candidate.clone());
            ends.push((descent, candidate));
        }
        Ok(ends)
    }
}

/// The minimised function and its gradient.
fn evaluate(
    h_score: &HScore,
    alignment: &GradientAlignment,
    scale: Scale,
    alpha: &[f64],
) -> Result<(f64, Vec<f64>), EngineError> {
    let mut value = 0.0;
    let mut gradient = vec![0.0; alpha.len()];
    if scale.h > 0.0 {
        let (h, dh) = h_score.value_and_gradient(alpha)?;
        value -= scale.h * h;
        gradient
            .iter_mut()
            .zip(dh)
            .for_each(|(g, d)| *g -= scale.h * d);
    }
    if scale.l > 0.0 {
        let (l, dl) = alignment.value_and_gradient(alpha);
        value += scale.l * l;
        gradient
            .iter_mut()
            .zip(dl)
            .for_each(|(g, d)| *g += scale.l * d);
    }
    Ok((value, gradient))
}

/// The candidate of least value; among equals (to rounding) the one of largest entropy, so that where
/// nothing tells sources apart the weights are uniform.
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

fn entropy(alpha: &[f64]) -> f64 {
    -alpha
        .iter()
        .filter(|a| **a > 0.0)
        .map(|a| a * a.ln())
        .sum::<f64>()
}

/// The distinct ends, best first; the chosen α leads even when a path point found it.
fn distinct(ends: &[(Descent, Candidate)], chosen: &Candidate, scale: Scale) -> Vec<Optimum> {
    let optimum = |candidate: &Candidate, starts| Optimum {
        weights: candidate.alpha.clone(),
        value: scale.value(candidate),
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

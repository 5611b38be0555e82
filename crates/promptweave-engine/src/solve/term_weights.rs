//! The weights of the two terms in L(α) = -H(α) + λ L_align(α).
//!
//! H is unitless and L_align scales with the fourth power of the gradients, so a fixed λ means nothing
//! across tasks. The scale-free trade-off t normalises each term by its range between the two terms'
//! own optima (utopia-nadir normalisation). With α_H = argmax H and α_L = argmin L_align, it minimises
//!
//! (1-t)·(H* - H)/(H* - H(α_L)) + t·(L_align - L*)/(L_align(α_H) - L*), t in [0, 1]
//!
//! This is the minimisation of L(α) at λ(t) = t/(1-t)·(H* - H(α_L))/(L_align(α_H) - L*).

use promptweave_domain::composition::PathPoint;

/// A range smaller than this share of its term's size is rounding: both terms have the same
/// optimum.
const NO_RANGE: f64 = 1e-9;
/// The least size of H that ranges are compared with. H is at most K-1, or 1, and may cross 0.
const LEAST_H: f64 = 1e-3;

/// Both terms at the end of a descent.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub alpha: Vec<f64>,
    pub h: f64,
    pub l: f64,
}

/// The weight of each term: the minimised function is -h·H + l·L_align.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    pub h: f64,
    pub l: f64,
}

impl Scale {
    pub fn value(self, candidate: &Candidate) -> f64 {
        -self.h * candidate.h + self.l * candidate.l
    }

    /// λ, or `None` if it is infinite.
    pub fn lambda(self) -> Option<f64> {
        (self.h > 0.0).then(|| self.l / self.h)
    }
}

/// The ranges of the two terms between their own optima; 0 for no range.
#[derive(Clone, Copy, Debug)]
pub struct Ranges {
    h: f64,
    l: f64,
}

impl Ranges {
    /// The ranges between the best candidates for each term. `largest_l` gives the size of
    /// L_align's rounding.
    pub fn between(best_h: &Candidate, best_l: &Candidate, largest_l: f64) -> Self {
        let range = |wide: f64, size: f64| if wide > NO_RANGE * size { wide } else { 0.0 };
        Self {
            // H may be near 0 and still carry the rounding error of its parts.
            h: range(best_h.h - best_l.h, best_h.h.abs().max(LEAST_H)),
            l: range(best_h.l - best_l.l, largest_l),
        }
    }

    /// The scale of trade-off t. If one term has no range, the other's optimum attains both, so the
    /// other alone decides.
    pub fn at(&self, t: f64) -> Scale {
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

    /// The scale of a raw λ, brought to order 1.
    pub fn at_lambda(&self, lambda: f64) -> Scale {
        let size = self.h + lambda * self.l;
        let size = if size > 1e-300 && size.is_finite() {
            size
        } else {
            1.0
        };
        Scale {
            h: 1.0 / size,
            l: lambda / size,
        }
    }

    /// Index of the path's point farthest below the chord between its ends, both terms normalised.
    /// The middle if a term has no range.
    pub fn knee(&self, path: &[PathPoint]) -> usize {
        let middle = path.len() / 2;
        let (Some(first), Some(last)) = (path.first(), path.last()) else {
            return middle;
        };
        if self.h == 0.0 || self.l == 0.0 {
            return middle;
        }
        // The chord runs from (0, 1) to (1, 0), so 1 - x - y is √2 times the distance.
        let below = |point: &PathPoint| {
            let x = (first.h_score - point.h_score) / self.h;
            let y = (point.gradient_alignment - last.gradient_alignment) / self.l;
            1.0 - x - y
        };
        (0..path.len())
            .max_by(|a, b| below(&path[*a]).total_cmp(&below(&path[*b])).then(b.cmp(a)))
            .unwrap_or(middle)
    }
}

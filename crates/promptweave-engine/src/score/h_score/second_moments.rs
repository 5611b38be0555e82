//! The sum Σᵢⱼ αᵢ αⱼ Q_ij and the derivative of its inner products by α. It is the scatter matrix
//! F̃ᵀF̃ [d, d] of the mixed features, or their Gram matrix F̃F̃ᵀ [N, N] (dual).
//!
//! The T = M(M+1)/2 matrices Q_ij + Q_ji are symmetric, so only their lower triangles are kept, one
//! in each row. At M = 11 and d = 768 that is 156 MB, and an evaluation reads only the pairs whose
//! weights are not zero. If even that is too much, the matrix is made from the features each time.

use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::score::alignment::num_pairs;
use crate::score::h_score::sums::Centring;

/// The most bytes of packed matrices that are kept.
const LARGEST: usize = 1 << 30;

pub struct SecondMoments {
    /// Whether the matrices are N × N rather than d × d.
    dual: bool,
    kept: Kept,
}

enum Kept {
    Pairs(Packed),
    /// The centred features x [M, N, d].
    Features(Tensor),
}

struct Packed {
    /// One tensor [s(s+1)/2] for each pair i ≤ j: the lower triangle, row by row, of Q_ii or of
    /// Q_ij + Q_ji.
    pairs: Vec<Tensor>,
    triangle: Rc<Triangle>,
}

/// The map between a lower triangle and the flat matrix.
struct Triangle {
    size: i64,
    /// [s(s+1)/2]: the position of each entry in the matrix.
    positions: Tensor,
    /// `[s²]`: the position in the triangle of each entry of the matrix, or of its mirror image.
    /// Gathering by it takes a twentieth of the time of scattering by `positions`.
    origins: Tensor,
    /// 2 off the diagonal, 1 on it.
    multiplicity: Tensor,
}

impl SecondMoments {
    /// The second moments of `features` [M, N, d], centred by `centring`.
    pub fn of(features: &Tensor, centring: &Centring, dual: bool) -> Self {
        let (m, n, d) = features.size3().expect("three axes");
        let size = if dual { n } else { d };
        let bytes = num_pairs(m as usize) * (size * (size + 1) / 2) as usize * 8;
        if bytes > LARGEST {
            return Self::made_each_time(centring.apply(features), dual);
        }
        let triangle = Rc::new(Triangle::new(size));
        let packed = match dual {
            true => Packed::of(&centring.apply(features), true, triangle),
            false => (centring.blocks(features))
                .map(|x| Packed::of(&x, false, Rc::clone(&triangle)))
                .reduce(Packed::plus)
                .expect("there are samples"),
        };
        Self {
            dual,
            kept: Kept::Pairs(packed),
        }
    }

    /// The second moments of centred features x [M, N, d], which are kept in place of the matrices.
    pub fn made_each_time(x: Tensor, dual: bool) -> Self {
        Self {
            dual,
            kept: Kept::Features(x),
        }
    }

    pub fn is_dual(&self) -> bool {
        self.dual
    }

    /// The second moments without the samples `left_out` [M, N - `num_kept`, d], about the others'
    /// `mean` [M, d]. `None` if that needs the features.
    pub fn without(&self, left_out: &Tensor, mean: &Tensor, num_kept: usize) -> Option<Self> {
        match &self.kept {
            Kept::Pairs(packed) if !self.dual => Some(Self {
                dual: false,
                kept: Kept::Pairs(packed.without(left_out, mean, num_kept)),
            }),
            _ => None,
        }
    }

    /// The matrix at α, [s, s].
    pub fn at(&self, alpha: &[f64]) -> Tensor {
        let packed = match &self.kept {
            Kept::Pairs(packed) => packed,
            Kept::Features(x) => {
                let mixed = mixed(x, alpha);
                return if self.dual {
                    mixed.matmul(&mixed.tr())
                } else {
                    mixed.tr().matmul(&mixed)
                };
            }
        };
        let mut sum = packed.pairs[0].zeros_like();
        for (i, j, pair) in packed.pairs(alpha.len()) {
            let weight = alpha[i] * alpha[j];
            if weight != 0.0 {
                // In place, it takes one pass over the pair, and none over a temporary.
                let _ = sum.addcmul_(pair, &Tensor::from(weight));
            }
        }
        packed.triangle.unpack(&sum)
    }

    /// The derivative ∂/∂αᵢ of ⟨matrix at α, W⟩ for a symmetric W [s, s] that does not depend on α.
    pub fn contract(&self, alpha: &[f64], w: &Tensor) -> Result<Vec<f64>, EngineError> {
        let packed = match &self.kept {
            Kept::Pairs(packed) => packed,
            Kept::Features(x) => {
                let mixed = mixed(x, alpha);
                let by_mixed = if self.dual {
                    w.matmul(&mixed)
                } else {
                    mixed.matmul(w)
                };
                let slopes = x.flatten(1, -1).matmul(&by_mixed.flatten(0, -1));
                return Ok(Vec::try_from(slopes * 2.0)?);
            }
        };
        let w = packed.triangle.pack_weights(w);
        let mut slopes = vec![0.0; alpha.len()];
        for (i, j, pair) in packed.pairs(alpha.len()) {
            if alpha[i] == 0.0 && alpha[j] == 0.0 {
                continue;
            }
            let product = f64::try_from(pair.dot(&w))?;
            // The term is αᵢαⱼ(Q_ij + Q_ji) off the diagonal, and αᵢ² Q_ii on it.
            slopes[i] += alpha[j] * product;
            slopes[j] += alpha[i] * product;
        }
        Ok(slopes)
    }
}

/// The mixed features Σ αᵢ x_i, [N, d].
pub fn mixed(x: &Tensor, alpha: &[f64]) -> Tensor {
    let (_, n, d) = x.size3().expect("three axes");
    let weights = Tensor::from_slice(alpha);
    weights.matmul(&x.flatten(1, -1)).view([n, d])
}

impl Packed {
    fn of(x: &Tensor, dual: bool, triangle: Rc<Triangle>) -> Self {
        let m = x.size()[0];
        let mut pairs = Vec::with_capacity(num_pairs(m as usize));
        for i in 0..m {
            for j in i..m {
                let (a, b) = (x.get(i), x.get(j));
                let product = if dual {
                    a.matmul(&b.tr())
                } else {
                    a.tr().matmul(&b)
                };
                pairs.push(triangle.pack(&if i == j {
                    product
                } else {
                    &product + product.tr()
                }));
            }
        }
        Self { pairs, triangle }
    }

    /// Scatter matrices add up over samples.
    fn plus(mut self, other: Self) -> Self {
        for (sum, more) in self.pairs.iter_mut().zip(other.pairs) {
            *sum += more;
        }
        self
    }

    /// The rest is centred again: with `num_kept` samples whose mean is now μ, Σ x xᵀ falls by
    /// num_kept·μμᵀ.
    fn without(&self, left_out: &Tensor, mean: &Tensor, num_kept: usize) -> Self {
        let theirs = Self::of(left_out, false, Rc::clone(&self.triangle));
        let of_mean = Self::of(&mean.unsqueeze(1), false, Rc::clone(&self.triangle));
        let pairs = (self.pairs.iter().zip(theirs.pairs).zip(of_mean.pairs))
            .map(|((all, left), mean)| all - left - mean * num_kept as f64)
            .collect();
        Self {
            pairs,
            triangle: Rc::clone(&self.triangle),
        }
    }

    /// The tuples (i, j, matrix) for i ≤ j.
    fn pairs(&self, m: usize) -> impl Iterator<Item = (usize, usize, &Tensor)> {
        let indices = (0..m).flat_map(move |i| (i..m).map(move |j| (i, j)));
        indices.zip(&self.pairs).map(|((i, j), pair)| (i, j, pair))
    }
}

impl Triangle {
    fn new(size: i64) -> Self {
        let on_cpu = (Kind::Int64, Device::Cpu);
        let indices = Tensor::tril_indices(size, size, 0, on_cpu);
        let (rows, columns) = (indices.get(0), indices.get(1));
        let multiplicity = rows.ne_tensor(&columns).to_kind(Kind::Double) + 1.0;
        let all = Tensor::arange(size, on_cpu);
        let (row, column) = (all.unsqueeze(1), all.unsqueeze(0));
        let (below, above) = (row.maximum(&column), row.minimum(&column));
        let origins = (&below * (&below + 1)).floor_divide_scalar(2);
        Self {
            size,
            positions: rows * size + columns,
            origins: (origins + above).flatten(0, -1),
            multiplicity,
        }
    }

    fn pack(&self, matrix: &Tensor) -> Tensor {
        matrix.flatten(0, -1).index_select(0, &self.positions)
    }

    /// Packs a symmetric matrix with weights, so that its inner product with another packed matrix
    /// is that of the whole matrices.
    fn pack_weights(&self, matrix: &Tensor) -> Tensor {
        self.pack(matrix) * &self.multiplicity
    }

    fn unpack(&self, packed: &Tensor) -> Tensor {
        packed
            .index_select(0, &self.origins)
            .view([self.size, self.size])
    }
}

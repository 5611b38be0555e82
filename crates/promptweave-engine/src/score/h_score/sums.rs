//! The sums over samples that H needs. They are added up block by block, so that no copy of the
//! features in f64 is ever whole, and the jackknife can subtract a fold's part.

use tch::{Device, Kind, Tensor};

use crate::score::head::row_tensor;
use promptweave_domain::objective::Standardise;

/// Number of values of a block in f64: 16 MiB. It is small in tests, so that they have several
/// blocks.
const BLOCK: i64 = if cfg!(test) { 64 } else { 2 << 20 };
/// The fewest rows of a block, so that packing a product pays.
const LEAST_ROWS: i64 = if cfg!(test) { 7 } else { 256 };

/// The transformation of features to the centred (and standardised) x, source by source.
pub struct Centring {
    /// Mean of each coordinate, [M, 1, d].
    mean: Tensor,
    /// Standard deviation of each coordinate, [M, 1, d]; 1 if it is constant, so that it stays 0.
    deviation: Option<Tensor>,
}

impl Centring {
    /// The centring of `features` [M, N, d]. libtorch can differentiate it, and the result of
    /// [`Centring::apply`].
    pub fn of(features: &Tensor, standardise: Standardise) -> Self {
        let n = features.size()[1];
        let over_samples = |of_block: &dyn Fn(Tensor) -> Tensor| {
            blocks(features)
                .map(|block| of_block(plain(&block)).sum_dim_intlist(1, true, Kind::Double))
                .reduce(|sum, more| sum + more)
                .expect("there are samples")
        };
        let mean = over_samples(&|x| x) / n as f64;
        let deviation = (standardise == Standardise::PerSource).then(|| {
            let squares = over_samples(&|x| (x - &mean).square());
            let variance = squares / (n.max(2) - 1) as f64;
            variance.masked_fill(&variance.le(0.0), 1.0).sqrt()
        });
        Self { mean, deviation }
    }

    /// x of some samples' features [M, B, d], in f64 on the CPU.
    pub fn apply(&self, features: &Tensor) -> Tensor {
        let x = plain(features) - &self.mean;
        match &self.deviation {
            None => x,
            Some(deviation) => x / deviation,
        }
    }

    /// x of all samples' features, one block at a time.
    pub fn blocks<'a>(&'a self, features: &'a Tensor) -> impl Iterator<Item = Tensor> + 'a {
        blocks(features).map(|block| self.apply(&block))
    }

    /// The same with the origin moved to the x that is now `shift` [M, d].
    pub fn moved(&self, shift: &Tensor) -> Self {
        let shift = shift.unsqueeze(1);
        Self {
            mean: match &self.deviation {
                None => &self.mean + shift,
                Some(deviation) => &self.mean + shift * deviation,
            },
            deviation: self.deviation.as_ref().map(Tensor::shallow_clone),
        }
    }
}

/// Features in f64 on the CPU.
fn plain(features: &Tensor) -> Tensor {
    features.to_kind(Kind::Double).to_device(Device::Cpu)
}

/// Blocks of [M, N, d] along its samples.
fn blocks(features: &Tensor) -> impl Iterator<Item = Tensor> + '_ {
    let (m, n, d) = features.size3().expect("three axes");
    let rows = (BLOCK / (m * d)).max(LEAST_ROWS);
    (0..n)
        .step_by(rows as usize)
        .map(move |start| features.narrow(1, start, rows.min(n - start)))
}

/// Sums over centred x [M, N, d], by class and in all.
pub struct Sums {
    /// Number of samples of each class present, `[K]`.
    pub counts: Vec<usize>,
    /// Σ x over each class's samples, [K, M, d].
    pub by_class: Tensor,
    /// Σ_n ⟨x_in, x_jn⟩, [M, M].
    pub products: Tensor,
}

impl Sums {
    /// The sums of `blocks` of x. `classes` gives the class of every sample in 0..K, in the blocks'
    /// order.
    pub fn of(blocks: impl Iterator<Item = Tensor>, classes: &[usize], num_classes: usize) -> Self {
        let mut counts = vec![0; num_classes];
        classes.iter().for_each(|class| counts[*class] += 1);
        let mut start = 0;
        let (by_class, products) = blocks
            .map(|x| {
                let (m, size, d) = x.size3().expect("three axes");
                let own = row_tensor(&classes[start..start + size as usize]);
                start += size as usize;
                let none = Tensor::zeros([num_classes as i64, m, d], (Kind::Double, Device::Cpu));
                let flat = x.flatten(1, -1);
                let by_class = none.index_add(0, &own, &x.transpose(0, 1));
                (by_class, flat.matmul(&flat.tr()))
            })
            .reduce(|sum, more| (sum.0 + more.0, sum.1 + more.1))
            .expect("there are samples");
        Self {
            counts,
            by_class,
            products,
        }
    }

    /// The degrees of freedom N-1.
    pub fn degrees(&self) -> f64 {
        self.num_samples().max(2.0) - 1.0
    }

    /// The number of samples N.
    pub fn num_samples(&self) -> f64 {
        self.counts.iter().sum::<usize>() as f64
    }

    /// The number K of classes present.
    pub fn num_classes(&self) -> f64 {
        self.counts.len() as f64
    }

    /// √n_c, `[K]`.
    pub fn rooted_counts(&self) -> Tensor {
        let roots: Vec<f64> = (self.counts.iter())
            .map(|count| (*count as f64).sqrt())
            .collect();
        Tensor::from_slice(&roots)
    }

    /// w_c/n_c² = 1/(n_c (N-1)), `[K]`, since `by_class` has n_c times the class means.
    pub fn class_weights(&self) -> Tensor {
        let weights = (self.counts.iter()).map(|count| 1.0 / (*count as f64 * self.degrees()));
        Tensor::from_slice(&weights.collect::<Vec<_>>())
    }

    /// The sums without the samples of `left`, whose classes have the same numbers; and the others'
    /// mean [M, d], about which the new sums are.
    pub fn without(&self, left: &Self) -> (Self, Tensor) {
        let counts: Vec<usize> = (self.counts.iter().zip(&left.counts))
            .map(|(all, left)| all - left)
            .collect();
        let present: Vec<usize> = (0..counts.len()).filter(|k| counts[*k] > 0).collect();
        let by_class = (&self.by_class - &left.by_class).index_select(0, &row_tensor(&present));
        let counts: Vec<usize> = present.iter().map(|k| counts[*k]).collect();
        let n = counts.iter().sum::<usize>() as f64;
        let mean = by_class.sum_dim_intlist(0, false, Kind::Double) / n;
        let of_class: Vec<f64> = counts.iter().map(|count| *count as f64).collect();
        let of_class = Tensor::from_slice(&of_class).view([-1, 1, 1]);
        let sums = Self {
            counts,
            by_class: by_class - of_class * &mean,
            products: &self.products - &left.products - mean.matmul(&mean.tr()) * n,
        };
        (sums, mean)
    }
}

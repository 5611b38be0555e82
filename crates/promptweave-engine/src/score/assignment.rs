//! The cheapest one-to-one assignment of rows to columns. It gives exact optimal transport between
//! equally many points, and the alignment of one prompt's tokens with another's.

use pathfinding::prelude::{Matrix, kuhn_munkres_min};
use tch::{Kind, Tensor};

use crate::error::EngineError;

/// Number of steps to which the range of costs is rounded, so that the method runs in whole
/// numbers. The sum over a million rows still fits.
const STEPS: f64 = (1u64 << 42) as f64;

/// The cheapest assignment of a square matrix of finite costs [n, n]: the column of every row, each
/// column once. The sum of costs is least to n·2⁻⁴² of their range. It takes O(n³): a tenth of a
/// second at n = 400.
pub fn cheapest(cost: &Tensor) -> Result<Vec<usize>, EngineError> {
    let (n, columns) = cost.size2()?;
    assert_eq!(n, columns, "a cost for every pair");
    if n == 0 {
        return Ok(Vec::new());
    }
    let costs: Vec<f64> = Vec::try_from(cost.to_kind(Kind::Double).flatten(0, -1))?;
    if costs.iter().any(|cost| !cost.is_finite()) {
        return Err(EngineError::NotFinite("the costs of an assignment"));
    }
    // A shift common to all pairs changes no assignment.
    let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = costs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let step = match (largest - least) / STEPS {
        step if step > 0.0 => step,
        _ => 1.0,
    };
    let n = n as usize;
    let whole = Matrix::from_fn(n, n, |(row, column)| {
        ((costs[row * n + column] - least) / step).round() as i64
    });
    Ok(kuhn_munkres_min(&whole).1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise_tensor;

    #[test]
    fn no_permutation_is_cheaper() {
        let permutations = |n: usize| {
            (0..n).fold(vec![vec![]], |shorter: Vec<Vec<usize>>, _| {
                let longer = |p: &Vec<usize>| {
                    let unused = (0..n).filter(|c| !p.contains(c)).collect::<Vec<_>>();
                    let with = |c| p.iter().copied().chain([c]).collect::<Vec<_>>();
                    unused.into_iter().map(with).collect::<Vec<_>>()
                };
                shorter.iter().flat_map(longer).collect()
            })
        };
        for seed in 0..10 {
            // Costs of either sign and any scale.
            let cost = noise_tensor(&[5, 5], seed) * 1e-6 + 3.0;
            let total = |columns: &[usize]| -> f64 {
                let of = |(row, column): (usize, &usize)| {
                    cost.double_value(&[row as i64, *column as i64]) - 3.0
                };
                columns.iter().enumerate().map(of).sum()
            };
            let found = cheapest(&cost).unwrap();
            let least = permutations(5)
                .iter()
                .map(|p| total(p))
                .fold(f64::INFINITY, f64::min);
            assert!((total(&found) - least).abs() < 1e-15, "{found:?}");
        }
    }

    #[test]
    fn equal_costs_give_some_assignment_and_nan_an_error() {
        let mut columns = cheapest(&Tensor::ones([4, 4], tch::kind::DOUBLE_CPU)).unwrap();
        columns.sort_unstable();
        assert_eq!(columns, [0, 1, 2, 3]);
        assert!(
            cheapest(&Tensor::zeros([0, 0], tch::kind::DOUBLE_CPU))
                .unwrap()
                .is_empty()
        );
        let nan = Tensor::full([2, 2], f64::NAN, tch::kind::DOUBLE_CPU);
        assert_eq!(cheapest(&nan).unwrap_err().code(), "not_finite");
    }
}

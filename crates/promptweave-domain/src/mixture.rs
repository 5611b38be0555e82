//! The sum Σ αᵢ Pᵢ, which ensembles and `POST /v1/prompts/compose` make of source prompts and
//! weights.

use crate::tensor::Tensor;

/// Σ αᵢ Pᵢ [m, d], computed in f64 and rounded once. A prompt at weight 1 comes out bit by bit. The
/// order of the prompts changes no bit: each number's terms are added from the least to the
/// greatest.
///
/// # Panics
/// If there are no prompts, or their shapes differ.
pub fn mix(prompts: &[Tensor<f32>], alpha: &[f64]) -> Tensor<f32> {
    let shape = &prompts[0].shape;
    assert!(prompts.iter().all(|prompt| prompt.shape == *shape));
    let mut terms = vec![0f64; prompts.len()];
    let values = (0..prompts[0].values.len()).map(|index| {
        for (term, (prompt, weight)) in terms.iter_mut().zip(prompts.iter().zip(alpha)) {
            *term = weight * f64::from(prompt.values[index]);
        }
        terms.sort_unstable_by(f64::total_cmp);
        terms.iter().fold(0f64, |sum, term| sum + term) as f32
    });
    Tensor::new(shape.clone(), values.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prompts with numbers of all sizes, so that the order of additions matters.
    fn prompts() -> Vec<Tensor<f32>> {
        let value = |seed: u32| {
            let bits = seed.wrapping_mul(2_654_435_761);
            (bits as f32 / u32::MAX as f32 - 0.5) * 10f32.powi((bits % 13) as i32 - 6)
        };
        (0..7)
            .map(|i| Tensor::new([4, 25], (0..100).map(|j| value(1 + i * 100 + j)).collect()))
            .collect()
    }

    #[test]
    fn a_prompt_at_weight_one_comes_out_bit_by_bit() {
        let prompts = prompts();
        let alpha = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(mix(&prompts, &alpha), prompts[2]);
    }

    #[test]
    fn it_is_the_weighted_sum() {
        let prompts = [[1.0, -2.0], [3.0, 0.5]].map(|values| Tensor::new([1, 2], values.to_vec()));
        assert_eq!(mix(&prompts, &[0.25, 0.75]).values, [2.5, -0.125]);
    }

    #[test]
    fn the_order_of_the_prompts_changes_no_bit() {
        let prompts = prompts();
        let alpha = [0.3, 0.1, 0.05, 0.15, 0.2, 0.12, 0.08];
        let mixed = mix(&prompts, &alpha);
        for turn in 0..7 {
            let (mut prompts, mut alpha) = (prompts.clone(), alpha);
            prompts.rotate_left(turn);
            alpha.rotate_left(turn);
            assert_eq!(mix(&prompts, &alpha), mixed, "turned by {turn}");
            prompts.reverse();
            alpha.reverse();
            assert_eq!(
                mix(&prompts, &alpha),
                mixed,
                "turned by {turn} and reversed"
            );
        }
    }
}

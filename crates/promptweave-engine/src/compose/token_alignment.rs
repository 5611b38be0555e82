//! Putting the sources' tokens into one order before they are summed.
//!
//! A prompt's tokens have no positions. So f_P does not depend on the order of its rows, and the
//! rows of its gradient move along. But Σ αᵢ Pᵢ and L_align are computed row by row and depend on
//! it. Every prompt's rows are matched by cosine similarity to those of the medoid, the source most
//! like the others. So the order of the sources in the request does not matter either.

use tch::{Kind, Tensor};

use crate::error::EngineError;
use crate::score::assignment::cheapest;
use promptweave_domain::composition::{Source, TokenAlignment};
use promptweave_domain::objective::AlignTokens;
use promptweave_domain::tensor::Tensor as PlainTensor;

/// The sources' prompts [m, d] with their rows in a common order, and the permutations.
pub fn align(
    sources: &[Source],
    option: AlignTokens,
) -> Result<(Vec<PlainTensor<f32>>, Option<TokenAlignment>), EngineError> {
    let prompts = sources.iter().map(|source| &source.file.prompt_embeddings);
    if option == AlignTokens::Off {
        return Ok((prompts.cloned().collect(), None));
    }
    let directions: Vec<Tensor> = prompts.clone().map(directions).collect();
    let m = sources.len();
    // likeness[i][j] is the sum of cosines of the best matching of i's rows with j's.
    let mut likeness = vec![vec![0.0; m]; m];
    for i in 0..m {
        for j in i + 1..m {
            let (_, sum) = matching(&directions[i], &directions[j])?;
            likeness[i][j] = sum;
            likeness[j][i] = sum;
        }
    }
    let total = |i: &usize| likeness[*i].iter().sum::<f64>();
    // Of equals, the first is taken.
    let medoid = (0..m)
        .rev()
        .max_by(|a, b| total(a).total_cmp(&total(b)))
        .ok_or(EngineError::NoSources)?;
    let permutations = (0..m)
        .map(|i| Ok(matching(&directions[medoid], &directions[i])?.0))
        .collect::<Result<Vec<_>, EngineError>>()?;
    let aligned = prompts
        .zip(&permutations)
        .map(|(prompt, permutation)| permuted(prompt, permutation))
        .collect();
    let alignment = TokenAlignment {
        reference: sources[medoid].prompt.clone(),
        permutations,
    };
    Ok((aligned, Some(alignment)))
}

/// The prompt with its rows permuted: row k of the result is row `permutation[k]`.
fn permuted(prompt: &PlainTensor<f32>, permutation: &[usize]) -> PlainTensor<f32> {
    let width = prompt.shape[1];
    let rows = permutation
        .iter()
        .flat_map(|row| &prompt.values[row * width..(row + 1) * width]);
    PlainTensor::new(prompt.shape.clone(), rows.copied().collect())
}

/// The rows [m, d] scaled to length 1. A row of zeros stays zero, and is like no other.
fn directions(prompt: &PlainTensor<f32>) -> Tensor {
    let rows = Tensor::from_slice(&prompt.values)
        .view([prompt.shape[0] as i64, prompt.shape[1] as i64])
        .to_kind(Kind::Double);
    let norms = rows.square().sum_dim_intlist(1, true, Kind::Double).sqrt();
    &rows / norms.clamp_min(f64::MIN_POSITIVE)
}

/// The matching row of `b` for every row of `a`, and the sum of their cosines.
fn matching(a: &Tensor, b: &Tensor) -> Result<(Vec<usize>, f64), EngineError> {
    let cosines = a.matmul(&b.tr());
    let columns = cheapest(&(-&cosines))?;
    let sum = columns
        .iter()
        .enumerate()
        .map(|(row, column)| cosines.double_value(&[row as i64, *column as i64]))
        .sum();
    Ok((columns, sum))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{D, TOKENS, input};
    use promptweave_domain::mixture::mix;

    #[test]
    fn rows_are_brought_back_into_the_order_they_were_taken_from() {
        let dir = tempfile::tempdir().unwrap();
        let mut sources = input(dir.path(), 3).sources;
        // All prompts are near one, then shuffled.
        let base = sources[0].file.prompt_embeddings.values.clone();
        assert_eq!(base.len(), TOKENS * D);
        let shuffles = [[0, 1, 2], [2, 0, 1], [1, 0, 2]];
        let mut ordered = Vec::new();
        for (source, shuffle) in sources.iter_mut().zip(&shuffles) {
            let prompt = &mut source.file.prompt_embeddings;
            for (value, base) in prompt.values.iter_mut().zip(&base) {
                *value = base + 0.01 * *value;
            }
            ordered.push(prompt.clone());
            *prompt = permuted(prompt, shuffle);
        }
        let (aligned, alignment) = align(&sources, AlignTokens::Hungarian).unwrap();
        let alignment = alignment.unwrap();
        // In the medoid's order, all prompts are in one order again.
        let medoid = sources
            .iter()
            .position(|s| s.prompt == alignment.reference)
            .unwrap();
        for (aligned, ordered) in aligned.iter().zip(&ordered) {
            assert_eq!(*aligned, permuted(ordered, &shuffles[medoid]));
        }
        assert_eq!(alignment.permutations[medoid], [0, 1, 2]);
        // The sum of prompts depends on the order.
        let uniform = [1.0 / 3.0; 3];
        let shuffled: Vec<_> = (sources.iter())
            .map(|source| source.file.prompt_embeddings.clone())
            .collect();
        let kept = permuted(&mix(&ordered, &uniform), &shuffles[medoid]);
        assert_eq!(mix(&aligned, &uniform), kept);
        assert_ne!(mix(&shuffled, &uniform), kept);
        assert!(align(&sources, AlignTokens::Off).unwrap().1.is_none());
    }
}

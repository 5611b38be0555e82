//! The certainty of α, by a delete-one-fold jackknife (Tukey 1958; Efron & Stein 1981) over
//! stratified folds of the target samples.
//!
//! SEᵢ² = (J-1)/J Σⱼ (αᵢ₍ⱼ₎ - ᾱᵢ)², where α₍ⱼ₎ is solved for without fold j, from the whole α.
//!
//! λ (or t's ranges), ρ, and the heads that define the loss are held fixed. So it is the
//! uncertainty of α from the choice of samples, given those.

use tch::Tensor;

use crate::error::EngineError;
use crate::score::alignment::{AlignmentStatistics, GradientAlignment};
use crate::score::gradients::sample_folds;
use crate::score::h_score::HScore;
use crate::solve::solver::{Descender, Terms, Tick};
use crate::solve::term_weights::Scale;
use promptweave_domain::objective::{AlignmentVariant, InvalidObjective};

/// The problem that was solved, on all samples.
pub struct Solved<'a> {
    pub h_score: &'a HScore,
    /// Features [M, N, d].
    pub features: &'a Tensor,
    pub labels: &'a [usize],
    pub variant: AlignmentVariant,
    pub scale: Scale,
    pub entropy: f64,
    pub alpha: &'a [f64],
}

/// One standard error for each source. `None` if one fold less leaves too few samples to solve, or
/// if there are no `leave_out` statistics.
pub fn standard_errors(
    solved: &Solved<'_>,
    leave_out: &[AlignmentStatistics],
    tick: Tick<'_>,
) -> Result<Option<Vec<f64>>, EngineError> {
    let folds = sample_folds(solved.labels);
    if leave_out.len() < 2 {
        return Ok(None);
    }
    let mut without: Vec<Vec<f64>> = Vec::with_capacity(leave_out.len());
    for (fold, statistics) in leave_out.iter().enumerate() {
        let rows: Vec<usize> = (0..folds.len()).filter(|n| folds[*n] == fold).collect();
        let h_score = match solved
            .h_score
            .without(solved.features, solved.labels, &rows)
        {
            Ok(h_score) => h_score,
            Err(EngineError::Objective(InvalidObjective { .. })) => return Ok(None),
            Err(error) => return Err(error),
        };
        let descender = Descender {
            terms: Terms {
                h_score: &h_score,
                alignment: &GradientAlignment::new(solved.variant, statistics.clone()),
            },
            scale: solved.scale,
            entropy: solved.entropy,
        };
        without.push(descender.from(solved.alpha, &mut *tick)?.alpha);
    }
    Ok(Some(errors_of(&without)))
}

/// SEᵢ from the weights without each fold: one standard error for each source.
pub fn errors_of(without: &[Vec<f64>]) -> Vec<f64> {
    let folds = without.len() as f64;
    let of_source = |i: usize| {
        let mean = without.iter().map(|alpha| alpha[i]).sum::<f64>() / folds;
        let squares: f64 = without.iter().map(|alpha| (alpha[i] - mean).powi(2)).sum();
        ((folds - 1.0) / folds * squares).sqrt()
    };
    (0..without[0].len()).map(of_source).collect()
}

//! Early stopping: when a job has seen enough of the samples' gradients, and the report that it
//! stopped.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::composition::SourceWeight;

/// The condition under which a job stops taking gradients.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopping {
    /// The largest standard error allowed. The job stops if no weight's standard error is above it,
    /// and no weight moved by more with the last shard.
    #[schema(exclusive_minimum = 0, maximum = 1, example = 0.01)]
    pub max_standard_error: f64,
}

impl EarlyStopping {
    /// Whether every weight's standard error is small enough.
    pub fn is_met_by(&self, weights: &[SourceWeight]) -> bool {
        weights.iter().all(|source| {
            let error = source.standard_error;
            error.is_some_and(|error| error <= self.max_standard_error)
        })
    }
}

/// The report of a job that stopped before all gradients were taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EarlyStop {
    /// Number of samples whose gradients were taken, out of `total_samples`.
    pub samples: usize,
    pub total_samples: usize,
    /// The standard error that the request allowed. `max_standard_error` is the largest that a
    /// weight has.
    pub requested: f64,
    pub max_standard_error: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enough_is_known_when_every_weight_has_a_small_error() {
        let met = |errors: &[Option<f64>]| {
            let weights: Vec<SourceWeight> = (errors.iter())
                .map(|error| SourceWeight {
                    prompt: "p".into(),
                    version: None,
                    digest: crate::digest::Digest::of(b"p"),
                    weight: 0.5,
                    standard_error: *error,
                })
                .collect();
            EarlyStopping {
                max_standard_error: 0.01,
            }
            .is_met_by(&weights)
        };
        assert!(met(&[Some(0.01), Some(0.0)]));
        assert!(!met(&[Some(0.0), Some(0.011)]));
        assert!(!met(&[Some(0.0), None]));
    }
}

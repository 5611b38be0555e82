//! `statistics.safetensors`: what α was computed from, so that it can be checked, and solved again
//! without the backbone.
//!
//! | tensor | shape | dtype | |
//! |---|---|---|---|
//! | `features` | [M, N, d] | f32 | f_{Pᵢ}(xₙ) |
//! | `labels` | [N] | i64 | |
//! | `sample_indices` | [N] | i64 | positions in the list file, in row order |
//! | `folds` | [N] | i64 | cross-fit fold of the head; all 0 without |
//! | `head_temperature` | [M] | f64 | |
//! | `gradient_gram` | [T, T] | f64 | Γ, T = M(M+1)/2, packed i ≤ j row by row |
//!
//! The one metadata key, `promptweave`, names the sources in order, the digests and the options.

use std::collections::HashMap;

use serde::Serialize;
use tch::Tensor;

use super::{EngineError, plain};
use crate::domain::digest::Digest;
use crate::domain::objective::Objective;
use crate::domain::prompt_file::METADATA_KEY;
use crate::domain::tensor::{Stored, Tensor as PlainTensor};

pub struct Statistics<'a> {
    /// [M, N, d]
    pub features: &'a Tensor,
    pub labels: &'a [usize],
    pub sample_indices: &'a [usize],
    pub folds: &'a [usize],
    pub head_temperature: Vec<f64>,
    /// Γ, row-major.
    pub gradient_gram: Vec<f64>,
}

#[derive(Serialize)]
pub struct Metadata<'a> {
    pub format: u32,
    pub sources: Vec<SourceName<'a>>,
    pub backbone_digest: Digest,
    pub preprocessing_id: String,
    pub sample_digest: Digest,
    pub objective: &'a Objective,
    pub seed: u64,
}

#[derive(Serialize)]
pub struct SourceName<'a> {
    pub prompt: &'a str,
    pub digest: Digest,
}

impl Statistics<'_> {
    /// The bytes of the file; the same content gives the same bytes.
    pub fn to_bytes(&self, metadata: &Metadata<'_>) -> Result<Vec<u8>, EngineError> {
        let (m, n, d) = self.features.size3()?;
        let whole = |values: &[usize]| {
            let values: Vec<i64> = values.iter().map(|v| *v as i64).collect();
            Stored::from(&PlainTensor::new([values.len()], values))
        };
        let pairs = self.gradient_gram.len().isqrt();
        let gram = PlainTensor::new([pairs, pairs], self.gradient_gram.clone());
        let shape = [m as usize, n as usize, d as usize];
        let temperature =
            PlainTensor::new([self.head_temperature.len()], self.head_temperature.clone());
        let tensors = vec![
            (
                "features",
                Stored::from(&PlainTensor::new(shape, plain(self.features)?)),
            ),
            ("labels", whole(self.labels)),
            ("sample_indices", whole(self.sample_indices)),
            ("folds", whole(self.folds)),
            ("head_temperature", Stored::from(&temperature)),
            ("gradient_gram", Stored::from(&gram)),
        ];
        let json = serde_json::to_value(metadata)
            .expect("plain data")
            .to_string();
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), json)]);
        Ok(safetensors::serialize(tensors, Some(metadata)).expect("shapes agree with their data"))
    }
}

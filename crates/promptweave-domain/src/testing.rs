//! Helpers for the tests of several crates.

use crate::digest::Digest;
use crate::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata};
use crate::tensor::Tensor;

/// A valid prompt file of `m` × `d` numbers, which depend on `seed`.
pub fn prompt_file(m: usize, d: usize, seed: u64) -> PromptFile {
    let values = (0..m * d).map(|i| ((i as u64 * 37 + seed * 101) % 97) as f32 / 97.0 - 0.5);
    PromptFile {
        metadata: Some(PromptMetadata {
            format: FORMAT,
            backbone_digest: Some(Digest::of(b"backbone")),
            preprocessing_id: Some("98-bicubic-imagenet".into()),
            init_seed: Some(7),
            task: Some("digits".into()),
            classes: Some(vec!["zero".into(), "one".into()]),
            origin: Origin::Tuned,
            training: None,
            sources: Vec::new(),
        }),
        prompt_embeddings: Tensor::new([m, d], values.collect()),
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    }
}

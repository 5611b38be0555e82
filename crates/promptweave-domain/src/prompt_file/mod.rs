//! The prompt file: one visual prompt as safetensors, with an optional head and feature sketch.
//!
//! | tensor | shape | dtype |
//! |---|---|---|
//! | `prompt_embeddings` | `[m, d]`; a leading axis of 1 is dropped | f32, f16, bf16 |
//! | `deep_prompt_embeddings` (optional) | `[L-1, m, d]` | f32, f16, bf16 |
//! | `head.weight`, `head.bias` (optional, together) | `[K, d]`, `[K]` | f32, f16, bf16 |
//! | `sketch.features`, `sketch.labels` (optional, together) | `[n, d]`, `[n]` | float, i64 |
//!
//! Any other tensor is refused by name. There is exactly one metadata key, `promptweave`, with JSON
//! in sorted keys; safetensors writes several metadata keys in random order, and the same content
//! must give the same bytes. A file without it (PEFT, VPT) is accepted: [`PromptFile::metadata`] is
//! then `None` and the missing fields come from the request.

mod error;
pub(crate) mod metadata;
pub(crate) mod read;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use safetensors::serialize;

use crate::compatibility::PromptFacts;
use crate::digest::Digest;
use crate::tensor::{Stored, Tensor};
pub use error::PromptFileError;
pub use metadata::{
    FORMAT, MAX_METADATA_BYTES, METADATA_KEY, Origin, PromptMetadata, WeighedPrompt,
};
pub use read::{MAX_EMBED_DIM, MAX_TOKENS};

/// A linear head on the feature: logits = W f + b.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// The weights W, [K, d].
    pub weight: Tensor<f32>,
    /// The biases b, `[K]`.
    pub bias: Tensor<f32>,
}

/// A few labelled features of the source task, for transferability scores that need them.
#[derive(Clone, Debug, PartialEq)]
pub struct Sketch {
    /// The features, [n, d].
    pub features: Tensor<f32>,
    /// The labels, `[n]`.
    pub labels: Tensor<i64>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct PromptFile {
    pub metadata: Option<PromptMetadata>,
    /// The prompt at the first block's input, [m, d].
    pub prompt_embeddings: Tensor<f32>,
    /// The prompts of the blocks after the first, [L-1, m, d].
    pub deep_prompt_embeddings: Option<Tensor<f32>>,
    pub head: Option<Head>,
    pub sketch: Option<Sketch>,
    /// The dtype `prompt_embeddings` had in the file: `f32`, `f16` or `bf16`.
    pub dtype: &'static str,
}

impl PromptFile {
    /// The bytes of the file: f32, names sorted, one metadata key. The same content gives the same
    /// bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut tensors: Vec<(&str, Stored)> =
            vec![("prompt_embeddings", Stored::from(&self.prompt_embeddings))];
        if let Some(deep) = &self.deep_prompt_embeddings {
            tensors.push(("deep_prompt_embeddings", Stored::from(deep)));
        }
        if let Some(head) = &self.head {
            tensors.push(("head.weight", Stored::from(&head.weight)));
            tensors.push(("head.bias", Stored::from(&head.bias)));
        }
        if let Some(sketch) = &self.sketch {
            tensors.push(("sketch.features", Stored::from(&sketch.features)));
            tensors.push(("sketch.labels", Stored::from(&sketch.labels)));
        }
        let metadata = self.metadata.as_ref().map(|metadata| {
            // `Value` has maps sorted by key.
            let json = serde_json::to_value(metadata)
                .expect("plain data")
                .to_string();
            HashMap::from([(METADATA_KEY.to_owned(), json)])
        });
        serialize(tensors, metadata).expect("shapes agree with their data")
    }

    /// m, the prompt's length in tokens.
    pub fn num_tokens(&self) -> usize {
        self.prompt_embeddings.shape[0]
    }

    /// d, the prompt's width; equals the backbone's.
    pub fn embed_dim(&self) -> usize {
        self.prompt_embeddings.shape[1]
    }

    /// The facts that decide what the prompt goes together with. `digest` is the sha256 of the file.
    pub fn facts(&self, name: String, digest: Digest) -> PromptFacts<'_> {
        let metadata = self.metadata.as_ref();
        PromptFacts {
            name,
            digest,
            num_tokens: self.num_tokens(),
            embed_dim: self.embed_dim(),
            deep: self.deep_prompt_embeddings.is_some(),
            backbone_digest: metadata.and_then(|it| it.backbone_digest),
            preprocessing_id: metadata.and_then(|it| it.preprocessing_id.as_deref()),
        }
    }
}

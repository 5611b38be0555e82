//! What a prompt file says about itself, under its one metadata key.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::digest::Digest;
use crate::prompt_file::error::PromptFileError;

pub const METADATA_KEY: &str = "promptweave";
pub const FORMAT: u32 = 1;
/// The longest metadata accepted, in bytes. It is kept with every version and sent in every list; a
/// thousand class names take some 20 KiB.
pub const MAX_METADATA_BYTES: usize = 256 << 10;

/// How a prompt came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Sent by a client, made elsewhere.
    Uploaded,
    /// Trained by `promptweave tune`.
    Tuned,
    /// Made of other prompts: their sum Σ αᵢ Pᵢ, or an ensemble of them.
    Composed,
}

/// A prompt and its weight in what was made of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WeighedPrompt {
    /// The prompt's name; null for the backbone without a prompt.
    pub prompt: Option<String>,
    /// The prompt's version; null without a registry.
    pub version: Option<i32>,
    /// sha256 of the prompt's file.
    #[schema(value_type = Option<String>, example = "sha256:…")]
    pub digest: Option<Digest>,
    pub weight: f64,
}

impl WeighedPrompt {
    /// The prompts that a file names as its sources: those with a weight, by digest, since a sum does not depend on their
    /// order.
    pub fn with_weight(all: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let counting = all.into_iter().filter(|source| source.weight > 0.0);
        let mut sources: Vec<Self> = counting.collect();
        sources.sort_by_key(|source| source.digest);
        sources
    }
}

/// A prompt file's statements about itself. It has no time and no job id, so that the same content
/// gives the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptMetadata {
    pub format: u32,
    /// Digest of the frozen backbone the prompt was trained for.
    #[serde(default)]
    pub backbone_digest: Option<Digest>,
    /// The preprocessing, e.g. `98-bicubic-imagenet`. Prompts with different preprocessing cannot
    /// be mixed.
    #[serde(default)]
    pub preprocessing_id: Option<String>,
    /// Seed of the initial prompt. Prompts from one init keep their tokens in a common order.
    #[serde(default)]
    pub init_seed: Option<u64>,
    #[serde(default)]
    pub task: Option<String>,
    /// Class names of the prompt's task, in label order.
    #[serde(default)]
    pub classes: Option<Vec<String>>,
    pub origin: Origin,
    /// The training record; free-form.
    #[serde(default)]
    pub training: Option<Value>,
    /// The prompts that a composed prompt is the sum of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<WeighedPrompt>,
}

impl PromptMetadata {
    /// The metadata of a file that says nothing about itself.
    pub fn unknown() -> Self {
        Self {
            format: FORMAT,
            backbone_digest: None,
            preprocessing_id: None,
            init_seed: None,
            task: None,
            classes: None,
            origin: Origin::Uploaded,
            training: None,
            sources: Vec::new(),
        }
    }

    pub(super) fn read(json: &str) -> Result<Self, PromptFileError> {
        check_length(json)?;
        let read: Self = serde_json::from_str(json).map_err(PromptFileError::Metadata)?;
        check_format(read.format)?;
        Ok(read)
    }
}

pub fn check_length(json: &str) -> Result<(), PromptFileError> {
    match json.len() {
        ..=MAX_METADATA_BYTES => Ok(()),
        length => Err(PromptFileError::MetadataTooLong(length)),
    }
}

pub fn check_format(format: u32) -> Result<(), PromptFileError> {
    match format {
        FORMAT => Ok(()),
        format => Err(PromptFileError::Format(format)),
    }
}

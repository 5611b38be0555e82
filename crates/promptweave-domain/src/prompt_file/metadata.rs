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
    /// The sum Σ αᵢ Pᵢ, made by an ensemble.
    Composed,
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
        }
    }

    pub(super) fn read(json: &str) -> Result<Self, PromptFileError> {
        if json.len() > MAX_METADATA_BYTES {
            return Err(PromptFileError::MetadataTooLong(json.len()));
        }
        let read: Self = serde_json::from_str(json).map_err(PromptFileError::Metadata)?;
        if read.format != FORMAT {
            return Err(PromptFileError::Format(read.format));
        }
        Ok(read)
    }
}

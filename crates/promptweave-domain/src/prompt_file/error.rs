//! Why a file is not a prompt file: the tensor or key at fault, and the rule that it breaks.

use safetensors::SafeTensorError;

use crate::foreign_format::{ForeignFormat, MAX_HEADER_BYTES};
use crate::prompt_file::metadata::{MAX_METADATA_BYTES, METADATA_KEY};

#[derive(Debug, thiserror::Error)]
pub enum PromptFileError {
    /// A file of another format. It is refused before anything is parsed, since such files can run
    /// code when loaded.
    #[error("the file is {}, and only safetensors is accepted; {}", .0.name, .0.advice)]
    Foreign(ForeignFormat),
    #[error("not a safetensors file")]
    NotSafetensors(#[source] SafeTensorError),
    #[error("the file's header is longer than {MAX_HEADER_BYTES} bytes, which no prompt needs")]
    HeaderTooLong,
    #[error("tensor `{tensor}` is not part of a prompt file{}", hint(.tensor))]
    UnknownTensor { tensor: String },
    #[error("tensor `{0}` is missing")]
    MissingTensor(String),
    #[error("tensor `{tensor}` has dtype {dtype}, expected {expected}")]
    Dtype {
        tensor: String,
        dtype: String,
        expected: &'static str,
    },
    #[error("tensor `{tensor}` has shape {shape:?}, expected {expected}")]
    Shape {
        tensor: String,
        shape: Vec<usize>,
        expected: String,
    },
    #[error("tensor `{tensor}` holds {value} at index {index}; every value must be finite")]
    NotFinite {
        tensor: String,
        index: usize,
        value: f32,
    },
    #[error("tensor `{tensor}` holds label {label} at index {index}; labels are {expected}")]
    Label {
        tensor: &'static str,
        index: usize,
        label: i64,
        expected: String,
    },
    #[error("metadata key `promptweave` cannot be read")]
    Metadata(#[source] serde_json::Error),
    #[error(
        "metadata key `promptweave` has {0} bytes, more than {MAX_METADATA_BYTES}; shorten the \
         training record or the class names"
    )]
    MetadataTooLong(usize),
    #[error("metadata key `promptweave` has format {0}; this version reads format 1")]
    Format(u32),
}

impl PromptFileError {
    /// The tensor (or metadata key) the complaint is about.
    pub fn subject(&self) -> Option<&str> {
        match self {
            Self::UnknownTensor { tensor }
            | Self::Dtype { tensor, .. }
            | Self::Shape { tensor, .. }
            | Self::NotFinite { tensor, .. } => Some(tensor),
            Self::MissingTensor(tensor) => Some(tensor),
            Self::Label { tensor, .. } => Some(tensor),
            Self::Metadata(_) | Self::MetadataTooLong(_) | Self::Format(_) => Some(METADATA_KEY),
            Self::Foreign(_) | Self::NotSafetensors(_) | Self::HeaderTooLong => None,
        }
    }
}

/// Advice about a tensor that other programs store beside a prompt.
fn hint(tensor: &str) -> &'static str {
    let name = tensor.rsplit('.').next().unwrap_or(tensor);
    if tensor.contains("prompt_proj") {
        return "; a projected prompt is sent as the product, `prompt_proj(prompt_embeddings)`";
    }
    match name {
        "prompt_embeddings" | "shallow_prompt" => "; name it `prompt_embeddings`",
        "deep_prompt_embeddings" | "deep_prompt" => "; name it `deep_prompt_embeddings`",
        _ if tensor.starts_with("enc.") || tensor.starts_with("blocks.") => {
            "; leave the backbone's weights out"
        }
        _ => "; leave it out",
    }
}

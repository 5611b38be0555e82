//! The prompt file: one visual prompt as safetensors, with an optional head and feature sketch.
//!
//! | tensor | shape | dtype |
//! |---|---|---|
//! | `prompt_embeddings` | [m, d]; a leading axis of 1 is dropped | f32, f16, bf16 |
//! | `deep_prompt_embeddings` (optional) | [L-1, m, d] | f32, f16, bf16 |
//! | `head.weight`, `head.bias` (optional, together) | [K, d], [K] | f32, f16, bf16 |
//! | `sketch.features`, `sketch.labels` (optional, together) | [n, d], [n] | float, i64 |
//!
//! Any other tensor is refused by name. There is exactly one metadata key, `promptweave`, with JSON
//! in sorted keys; safetensors writes several metadata keys in random order, and the same content
//! must give the same bytes. A file without it (PEFT, VPT) is accepted: [`PromptFile::metadata`] is
//! then `None` and the missing fields come from the request.

use std::collections::HashMap;

use safetensors::{Dtype, SafeTensorError, SafeTensors, serialize};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::digest::Digest;
use super::tensor::{Stored, Tensor, read_f32, read_i64};

pub const METADATA_KEY: &str = "promptweave";
pub const FORMAT: u32 = 1;
/// Longest metadata accepted, in bytes (it is kept with every version and sent in every list;
/// a thousand class names take some 20 KiB).
pub const MAX_METADATA_BYTES: usize = 256 << 10;
/// Longest prompt accepted, in tokens (VPT's own grid ends at 200).
pub const MAX_TOKENS: usize = 4096;
/// Widest prompt accepted (the largest public ViT, 22 B parameters, has 6144).
pub const MAX_EMBED_DIM: usize = 16_384;

/// How a prompt came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Sent by a client, made elsewhere.
    Uploaded,
    /// Trained by `promptweave tune`.
    Tuned,
    /// Σ αᵢ Pᵢ, made by an ensemble.
    Composed,
}

/// What the file says about itself. No time and no job id: the same content gives the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptMetadata {
    pub format: u32,
    /// Digest of the frozen backbone the prompt was trained for.
    #[serde(default)]
    pub backbone_digest: Option<Digest>,
    /// e.g. `98-bicubic-imagenet`; prompts of different preprocessing do not mix.
    #[serde(default)]
    pub preprocessing_id: Option<String>,
    /// Seed of the initial prompt. Prompts from one init keep their tokens in a common order.
    #[serde(default)]
    pub init_seed: Option<u64>,
    #[serde(default)]
    pub task: Option<String>,
    /// Class names of that task, in label order.
    #[serde(default)]
    pub classes: Option<Vec<String>>,
    pub origin: Origin,
    /// The training record; free-form.
    #[serde(default)]
    pub training: Option<Value>,
}

/// A linear head on the feature: logits = W f + b.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// [K, d]
    pub weight: Tensor<f32>,
    /// [K]
    pub bias: Tensor<f32>,
}

/// A few labelled features of the source task, for transferability scores that need them.
#[derive(Clone, Debug, PartialEq)]
pub struct Sketch {
    /// [n, d]
    pub features: Tensor<f32>,
    /// [n]
    pub labels: Tensor<i64>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct PromptFile {
    pub metadata: Option<PromptMetadata>,
    /// [m, d]
    pub prompt_embeddings: Tensor<f32>,
    /// [L-1, m, d]
    pub deep_prompt_embeddings: Option<Tensor<f32>>,
    pub head: Option<Head>,
    pub sketch: Option<Sketch>,
    /// The dtype `prompt_embeddings` had in the file: `f32`, `f16` or `bf16`.
    pub dtype: &'static str,
}

#[derive(Debug, thiserror::Error)]
pub enum PromptFileError {
    /// Refused before anything is parsed: such files can run code when loaded.
    #[error("the file is {0}, not safetensors; only safetensors is accepted")]
    OtherFormat(&'static str),
    #[error("not a safetensors file")]
    NotSafetensors(#[source] SafeTensorError),
    #[error("tensor `{0}` is not part of a prompt file")]
    UnknownTensor(String),
    #[error("tensor `{0}` is missing")]
    MissingTensor(&'static str),
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
            Self::UnknownTensor(tensor)
            | Self::Dtype { tensor, .. }
            | Self::Shape { tensor, .. }
            | Self::NotFinite { tensor, .. } => Some(tensor),
            Self::MissingTensor(tensor) => Some(tensor),
            Self::Metadata(_) | Self::MetadataTooLong(_) | Self::Format(_) => Some(METADATA_KEY),
            Self::OtherFormat(_) | Self::NotSafetensors(_) => None,
        }
    }
}

/// Formats people do upload, by their first bytes.
fn other_format(bytes: &[u8]) -> Option<&'static str> {
    const MAGIC: &[(&[u8], &str)] = &[
        (
            b"PK\x03\x04",
            "a zip archive (a PyTorch .pt/.pth or .npz file)",
        ),
        (b"\x80\x02", "a pickle"),
        (b"\x80\x03", "a pickle"),
        (b"\x80\x04", "a pickle"),
        (b"\x80\x05", "a pickle"),
        (b"\x93NUMPY", "a numpy array"),
        (b"\x1f\x8b", "gzip data"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"\x89HDF", "an HDF5 file"),
    ];
    MAGIC
        .iter()
        .find(|(magic, _)| bytes.starts_with(magic))
        .map(|(_, name)| *name)
}

impl PromptFile {
    /// Reads and checks a prompt file: format, names, dtypes, shapes, finite values.
    pub fn parse(bytes: &[u8]) -> Result<Self, PromptFileError> {
        // A safetensors header length could start with 0x80 0x02 by chance (a header of 640 bytes,
        // say), so the magic bytes only decide about what safetensors itself does not accept.
        let file = SafeTensors::deserialize(bytes).map_err(|error| match other_format(bytes) {
            Some(format) => PromptFileError::OtherFormat(format),
            None => PromptFileError::NotSafetensors(error),
        })?;
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(PromptFileError::NotSafetensors)?;
        let metadata = match header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY)) {
            None => None,
            Some(json) if json.len() > MAX_METADATA_BYTES => {
                return Err(PromptFileError::MetadataTooLong(json.len()));
            }
            Some(json) => {
                let read: PromptMetadata =
                    serde_json::from_str(json).map_err(PromptFileError::Metadata)?;
                if read.format != FORMAT {
                    return Err(PromptFileError::Format(read.format));
                }
                Some(read)
            }
        };
        let tensors = Tensors::check_names(&file)?;

        let dtype = match file.tensor("prompt_embeddings").map(|t| t.dtype()) {
            Ok(Dtype::F16) => "f16",
            Ok(Dtype::BF16) => "bf16",
            _ => "f32",
        };
        let mut prompt_embeddings = tensors
            .float("prompt_embeddings")?
            .ok_or(PromptFileError::MissingTensor("prompt_embeddings"))?;
        if prompt_embeddings.shape.len() == 3 && prompt_embeddings.shape[0] == 1 {
            prompt_embeddings.shape.remove(0);
        }
        let &[m, d] = prompt_embeddings.shape.as_slice() else {
            return Err(shape(
                "prompt_embeddings",
                &prompt_embeddings.shape,
                "[m, d]",
            ));
        };
        if !(1..=MAX_TOKENS).contains(&m) || !(1..=MAX_EMBED_DIM).contains(&d) {
            let expected = format!("[m, d] with m in 1..={MAX_TOKENS}, d in 1..={MAX_EMBED_DIM}");
            return Err(shape(
                "prompt_embeddings",
                &prompt_embeddings.shape,
                &expected,
            ));
        }
        let deep_prompt_embeddings = tensors.float("deep_prompt_embeddings")?;
        if let Some(deep) = &deep_prompt_embeddings
            && (deep.shape.len() != 3 || deep.shape[0] == 0 || deep.shape[1..] != [m, d])
        {
            return Err(shape(
                "deep_prompt_embeddings",
                &deep.shape,
                &format!("[L-1, {m}, {d}]"),
            ));
        }
        Ok(Self {
            metadata,
            prompt_embeddings,
            deep_prompt_embeddings,
            head: tensors.head(d)?,
            sketch: tensors.sketch(d)?,
            dtype,
        })
    }

    /// The bytes of the file: f32, names sorted, one metadata key. Same content, same bytes.
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
            // Through `Value`, whose maps are sorted by key.
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
}

fn shape(tensor: &str, shape: &[usize], expected: &str) -> PromptFileError {
    PromptFileError::Shape {
        tensor: tensor.to_owned(),
        shape: shape.to_vec(),
        expected: expected.to_owned(),
    }
}

/// The tensors of a file whose names are all known.
struct Tensors<'a>(&'a SafeTensors<'a>);

impl<'a> Tensors<'a> {
    const NAMES: [&'static str; 6] = [
        "prompt_embeddings",
        "deep_prompt_embeddings",
        "head.weight",
        "head.bias",
        "sketch.features",
        "sketch.labels",
    ];

    fn check_names(file: &'a SafeTensors<'a>) -> Result<Self, PromptFileError> {
        let mut unknown: Vec<_> = file
            .names()
            .into_iter()
            .filter(|n| !Self::NAMES.contains(n))
            .collect();
        unknown.sort_unstable();
        match unknown.first() {
            Some(name) => Err(PromptFileError::UnknownTensor((*name).to_owned())),
            None => Ok(Self(file)),
        }
    }

    fn float(&self, name: &str) -> Result<Option<Tensor<f32>>, PromptFileError> {
        let Ok(view) = self.0.tensor(name) else {
            return Ok(None);
        };
        let values = read_f32(&view).ok_or_else(|| PromptFileError::Dtype {
            tensor: name.to_owned(),
            dtype: format!("{:?}", view.dtype()).to_lowercase(),
            expected: "f32, f16 or bf16",
        })?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(index) => Err(PromptFileError::NotFinite {
                tensor: name.to_owned(),
                index,
                value: values[index],
            }),
            None => Ok(Some(Tensor::new(view.shape(), values))),
        }
    }

    fn head(&self, d: usize) -> Result<Option<Head>, PromptFileError> {
        let (weight, bias) = match (self.float("head.weight")?, self.float("head.bias")?) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(PromptFileError::MissingTensor("head.bias")),
            (None, Some(_)) => return Err(PromptFileError::MissingTensor("head.weight")),
            (Some(weight), Some(bias)) => (weight, bias),
        };
        if weight.shape.len() != 2 || weight.shape[0] == 0 || weight.shape[1] != d {
            return Err(shape("head.weight", &weight.shape, &format!("[K, {d}]")));
        }
        if bias.shape != weight.shape[..1] {
            return Err(shape(
                "head.bias",
                &bias.shape,
                &format!("[{}]", weight.shape[0]),
            ));
        }
        Ok(Some(Head { weight, bias }))
    }

    fn sketch(&self, d: usize) -> Result<Option<Sketch>, PromptFileError> {
        let labels = match self.0.tensor("sketch.labels") {
            Err(_) => None,
            Ok(view) => Some(Tensor::new(
                view.shape(),
                read_i64(&view).ok_or_else(|| PromptFileError::Dtype {
                    tensor: "sketch.labels".to_owned(),
                    dtype: format!("{:?}", view.dtype()).to_lowercase(),
                    expected: "i64",
                })?,
            )),
        };
        let (features, labels) = match (self.float("sketch.features")?, labels) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(PromptFileError::MissingTensor("sketch.labels")),
            (None, Some(_)) => return Err(PromptFileError::MissingTensor("sketch.features")),
            (Some(features), Some(labels)) => (features, labels),
        };
        if features.shape.len() != 2 || features.shape[1] != d {
            return Err(shape(
                "sketch.features",
                &features.shape,
                &format!("[n, {d}]"),
            ));
        }
        if labels.shape != features.shape[..1] {
            let expected = format!("[{}]", features.shape[0]);
            return Err(shape("sketch.labels", &labels.shape, &expected));
        }
        Ok(Some(Sketch { features, labels }))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A valid file of `m` × `d` numbers that differ by `seed`; other modules' tests use it too.
    pub(crate) fn prompt_file(m: usize, d: usize, seed: u64) -> PromptFile {
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
            }),
            prompt_embeddings: Tensor::new([m, d], values.collect()),
            deep_prompt_embeddings: None,
            head: None,
            sketch: None,
            dtype: "f32",
        }
    }

    fn with(tensors: Vec<(&str, Stored)>) -> Result<PromptFile, PromptFileError> {
        PromptFile::parse(&serialize(tensors, None).unwrap())
    }

    fn zeros(shape: &[usize]) -> Stored {
        Stored::from(&Tensor::new(shape, vec![0f32; shape.iter().product()]))
    }

    #[test]
    fn what_is_written_reads_back_and_the_bytes_are_the_same_each_time() {
        let mut file = prompt_file(3, 8, 1);
        file.head = Some(Head {
            weight: Tensor::new([2, 8], vec![0.5; 16]),
            bias: Tensor::new([2], vec![0.0, 1.0]),
        });
        file.sketch = Some(Sketch {
            features: Tensor::new([4, 8], vec![0.25; 32]),
            labels: Tensor::new([4], vec![0, 1, 0, 1]),
        });
        let bytes = file.to_bytes();
        assert_eq!(PromptFile::parse(&bytes).unwrap(), file);
        assert_eq!(file.to_bytes(), bytes);
    }

    #[test]
    fn a_file_without_metadata_and_with_a_leading_axis_is_accepted() {
        let file = with(vec![("prompt_embeddings", zeros(&[1, 5, 8]))]).unwrap();
        assert_eq!(file.metadata, None);
        assert_eq!((file.num_tokens(), file.embed_dim()), (5, 8));
    }

    #[test]
    fn a_bad_file_is_refused_and_the_tensor_is_named() {
        let refusal = |tensors| with(tensors).unwrap_err().to_string();
        assert_eq!(
            refusal(vec![
                ("prompt_embeddings", zeros(&[5, 8])),
                ("lora_A", zeros(&[1]))
            ]),
            "tensor `lora_A` is not part of a prompt file"
        );
        assert_eq!(
            refusal(vec![("head.bias", zeros(&[2]))]),
            "tensor `prompt_embeddings` is missing"
        );
        assert_eq!(
            refusal(vec![("prompt_embeddings", zeros(&[8]))]),
            "tensor `prompt_embeddings` has shape [8], expected [m, d]"
        );
        let whole = Stored::from(&Tensor::new([1, 2], vec![1i64, 2]));
        assert_eq!(
            refusal(vec![("prompt_embeddings", whole)]),
            "tensor `prompt_embeddings` has dtype i64, expected f32, f16 or bf16"
        );
        let nan = Stored::from(&Tensor::new([1, 2], vec![1.0, f32::NAN]));
        assert_eq!(
            refusal(vec![("prompt_embeddings", nan)]),
            "tensor `prompt_embeddings` holds NaN at index 1; every value must be finite"
        );
        let narrow = vec![
            ("prompt_embeddings", zeros(&[5, 8])),
            ("head.weight", zeros(&[2, 7])),
            ("head.bias", zeros(&[2])),
        ];
        assert_eq!(
            refusal(narrow),
            "tensor `head.weight` has shape [2, 7], expected [K, 8]"
        );
    }

    #[test]
    fn metadata_may_be_long_but_not_endless() {
        let with_record = |length: usize| {
            let mut file = prompt_file(2, 4, 1);
            let metadata = file.metadata.as_mut().unwrap();
            metadata.training = Some(Value::String("x".repeat(length)));
            PromptFile::parse(&file.to_bytes())
        };
        assert!(with_record(MAX_METADATA_BYTES - 1024).is_ok());
        let error = with_record(MAX_METADATA_BYTES).unwrap_err();
        assert_eq!(error.subject(), Some(METADATA_KEY));
        assert!(matches!(error, PromptFileError::MetadataTooLong(n) if n > MAX_METADATA_BYTES));
    }

    #[test]
    fn other_formats_are_named_before_anything_is_parsed() {
        for (bytes, name) in [
            (&b"PK\x03\x04rest"[..], "zip"),
            (b"\x80\x04\x95rest....", "pickle"),
            (b"\x93NUMPY\x01\x00", "numpy"),
        ] {
            match PromptFile::parse(bytes) {
                Err(PromptFileError::OtherFormat(format)) => assert!(format.contains(name)),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(
            PromptFile::parse(b"plain text, long enough"),
            Err(PromptFileError::NotSafetensors(_))
        ));
    }
}

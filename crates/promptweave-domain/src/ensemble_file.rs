//! The ensemble file: a pool of several prompts with their heads, as safetensors.
//!
//! An ensemble predicts p(y|x) ∝ Πᵢ pᵢ(y|x)^(s αᵢ), with pᵢ(y|x) = (1-ε) softmax(Wᵢ fᵢ(x) + bᵢ)_y + ε/K. fᵢ(x) is the
//! backbone's feature of x with member i's prompt. αᵢ is the member's weight, s the sharpness; softmax of the heads'
//! logits needs no temperature.
//!
//! | tensor, for member i = 0, 1, … | shape | dtype |
//! |---|---|---|
//! | `i.prompt_embeddings`; absent where the member is the backbone without a prompt | `[m, d]` | f32, f16, bf16 |
//! | `i.head.weight`, `i.head.bias` | `[K, d]`, `[K]` | f32, f16, bf16 |
//!
//! There is exactly one metadata key, `promptweave`, with [`EnsembleMetadata`] as JSON in sorted keys, so that the same
//! content gives the same bytes.

use std::collections::HashMap;

use safetensors::{SafeTensors, serialize};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::compatibility::PromptFacts;
use crate::digest::Digest;
use crate::prompt_file::metadata::{check_format, check_length};
use crate::prompt_file::read::{Tensors, check_names, shape};
use crate::prompt_file::{Head, METADATA_KEY, PromptFileError, WeighedPrompt};
use crate::tensor::{Stored, Tensor};

/// The most members accepted: an ensemble takes a forward pass for each.
pub const MAX_MEMBERS: usize = 1024;

/// The largest sharpness accepted. Calibrated members that know different things have one of at most their number.
pub const MAX_SHARPNESS: f64 = 1e6;

/// The word in the metadata that tells an ensemble file from a prompt file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnsembleKind {
    Ensemble,
}

/// An ensemble file's statements about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EnsembleMetadata {
    pub format: u32,
    pub kind: EnsembleKind,
    #[schema(value_type = String, example = "sha256:…")]
    pub backbone_digest: Digest,
    pub preprocessing_id: String,
    /// Class names of the target task, in label order.
    pub classes: Vec<String>,
    /// The members in the order of the tensors. Their weights α sum to 1.
    pub members: Vec<WeighedPrompt>,
    /// The sharpness s, above 0 and at most 1e6.
    pub sharpness: f64,
    /// ε in [0, 1): the share of equal probabilities in every member's prediction.
    pub epsilon: f64,
}

/// One member's tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// The prompt, [m, d]; `None` for the backbone without a prompt.
    pub prompt_embeddings: Option<Tensor<f32>>,
    /// The head, whose logits are calibrated.
    pub head: Head,
}

#[derive(Clone, Debug, PartialEq)]
pub struct EnsembleFile {
    pub metadata: EnsembleMetadata,
    /// As many as the metadata names.
    pub members: Vec<Member>,
}

/// Why a file is not an ensemble file.
#[derive(Debug, thiserror::Error)]
pub enum EnsembleFileError {
    #[error(transparent)]
    File(#[from] PromptFileError),
    #[error("it has no metadata of kind `ensemble`")]
    NotAnEnsemble,
    #[error("metadata key `promptweave`: {0}")]
    Metadata(String),
}

impl EnsembleFile {
    /// Whether the bytes say that they are an ensemble file. They may still not be a whole one.
    pub fn is_one(bytes: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct OnlyKind {
            #[serde(rename = "kind")]
            _kind: EnsembleKind,
        }
        let Ok((_, header)) = SafeTensors::read_metadata(bytes) else {
            return false;
        };
        let json = header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY));
        json.is_some_and(|json| serde_json::from_str::<OnlyKind>(json).is_ok())
    }

    /// Reads and checks an ensemble file: names, dtypes, shapes and finite values, and the ranges of the numbers.
    pub fn parse(bytes: &[u8]) -> Result<Self, EnsembleFileError> {
        if !Self::is_one(bytes) {
            return Err(EnsembleFileError::NotAnEnsemble);
        }
        let file = SafeTensors::deserialize(bytes).map_err(PromptFileError::NotSafetensors)?;
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(PromptFileError::NotSafetensors)?;
        let json = &header.metadata().as_ref().expect("it says its kind")[METADATA_KEY];
        let metadata = EnsembleMetadata::read(json)?;
        let known = |name: &str| {
            let part = name.split_once('.');
            part.is_some_and(|(i, name)| {
                let i: Option<usize> = i.parse().ok();
                i.is_some_and(|i| i < metadata.members.len()) && NAMES.contains(&name)
            })
        };
        check_names(&file, known)?;
        let members = (0..metadata.members.len()).map(|i| Member::read(&file, i, &metadata));
        let members = members.collect::<Result<Vec<_>, _>>()?;
        let width = |member: &Member| member.head.weight.shape[1];
        if let Some(i) = (1..members.len()).find(|i| width(&members[*i]) != width(&members[0])) {
            let expected = format!("[K, {}], as for the first member", width(&members[0]));
            let found = &members[i].head.weight.shape;
            return Err(shape(&format!("{i}.head.weight"), found, &expected).into());
        }
        Ok(Self { metadata, members })
    }

    /// The bytes of the file: f32, names sorted, one metadata key. The same content gives the same bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut tensors: Vec<(String, Stored)> = Vec::new();
        for (i, member) in self.members.iter().enumerate() {
            if let Some(prompt) = &member.prompt_embeddings {
                tensors.push((format!("{i}.{}", NAMES[0]), Stored::from(prompt)));
            }
            tensors.push((
                format!("{i}.{}", NAMES[1]),
                Stored::from(&member.head.weight),
            ));
            tensors.push((format!("{i}.{}", NAMES[2]), Stored::from(&member.head.bias)));
        }
        // `Value` has maps sorted by key.
        let json = serde_json::to_value(&self.metadata).expect("plain data");
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), json.to_string())]);
        serialize(tensors, Some(metadata)).expect("shapes agree with their data")
    }

    /// d, the members' width.
    pub fn embed_dim(&self) -> usize {
        self.members[0].head.weight.shape[1]
    }

    /// The facts that decide which backbone the ensemble fits. `digest` is the sha256 of the file.
    pub fn facts(&self, name: String, digest: Digest) -> PromptFacts<'_> {
        PromptFacts {
            name,
            digest,
            num_tokens: 0,
            embed_dim: self.embed_dim(),
            deep: false,
            backbone_digest: Some(self.metadata.backbone_digest),
            preprocessing_id: Some(&self.metadata.preprocessing_id),
        }
    }
}

const NAMES: [&str; 3] = ["prompt_embeddings", "head.weight", "head.bias"];

impl Member {
    fn read(
        file: &SafeTensors<'_>,
        i: usize,
        metadata: &EnsembleMetadata,
    ) -> Result<Self, EnsembleFileError> {
        let prefix = format!("{i}.");
        let tensors = Tensors {
            file,
            prefix: &prefix,
        };
        let prompt_embeddings = tensors.prompt()?;
        // A head without a prompt has any width; that of the others is compared with it.
        let d = match &prompt_embeddings {
            Some(prompt) => prompt.shape[1],
            None => {
                let weight = file.tensor(&format!("{prefix}{}", NAMES[1]));
                let weight = weight.map_err(|_| tensors.missing(NAMES[1]))?;
                weight.shape().last().copied().unwrap_or(0)
            }
        };
        if prompt_embeddings.is_none() && metadata.members[i].prompt.is_some() {
            return Err(tensors.missing(NAMES[0]).into());
        }
        let head = tensors.head(d)?.ok_or_else(|| tensors.missing(NAMES[1]))?;
        let k = metadata.classes.len();
        if head.bias.shape[0] != k {
            let name = format!("{prefix}{}", NAMES[1]);
            let expected = format!("[K, d] with K = {k}, the number of `classes`");
            return Err(shape(&name, &head.weight.shape, &expected).into());
        }
        Ok(Self {
            prompt_embeddings,
            head,
        })
    }
}

impl EnsembleMetadata {
    fn read(json: &str) -> Result<Self, EnsembleFileError> {
        check_length(json)?;
        let read: Self = serde_json::from_str(json).map_err(PromptFileError::Metadata)?;
        check_format(read.format)?;
        let refuse = |problem: String| Err(EnsembleFileError::Metadata(problem));
        let count = read.members.len();
        if !(1..=MAX_MEMBERS).contains(&count) {
            return refuse(format!("`members` has {count}; 1 to {MAX_MEMBERS} can be"));
        }
        let weights = || read.members.iter().map(|member| member.weight);
        if !weights().all(|weight| (0.0..=1.0).contains(&weight)) {
            return refuse("a member's `weight` is outside 0..=1".to_owned());
        }
        let sum: f64 = weights().sum();
        if (sum - 1.0).abs() > 1e-6 {
            return refuse(format!("the members' weights sum to {sum}, not to 1"));
        }
        if !(read.sharpness > 0.0 && read.sharpness <= MAX_SHARPNESS) {
            return refuse(format!(
                "`sharpness` is {}; it must be above 0 and at most {MAX_SHARPNESS}",
                read.sharpness
            ));
        }
        if !(0.0..1.0).contains(&read.epsilon) {
            return refuse(format!(
                "`epsilon` is {}; it must be at least 0 and below 1",
                read.epsilon
            ));
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt_file::FORMAT;

    /// A change that breaks a rule.
    type Break = fn(&mut EnsembleFile);

    fn tensor(shape: &[usize], seed: usize) -> Tensor<f32> {
        let count = shape.iter().product();
        let values = (0..count).map(|i| ((i * 31 + seed * 7) % 13) as f32 - 6.0);
        Tensor::new(shape, values.collect())
    }

    fn ensemble() -> EnsembleFile {
        let member = |tokens: Option<usize>, seed| Member {
            prompt_embeddings: tokens.map(|m| tensor(&[m, 4], seed)),
            head: Head {
                weight: tensor(&[3, 4], seed + 1),
                bias: tensor(&[3], seed + 2),
            },
        };
        let source = |name: &str, weight| WeighedPrompt {
            prompt: Some(name.to_owned()),
            version: Some(2),
            digest: Some(Digest::of(name.as_bytes())),
            weight,
        };
        let nothing = WeighedPrompt {
            prompt: None,
            version: None,
            digest: None,
            weight: 0.125,
        };
        EnsembleFile {
            metadata: EnsembleMetadata {
                format: FORMAT,
                kind: EnsembleKind::Ensemble,
                backbone_digest: Digest::of(b"backbone"),
                preprocessing_id: "98-bicubic-imagenet".to_owned(),
                classes: ["a", "b", "c"].map(str::to_owned).to_vec(),
                members: vec![source("x", 0.5), source("y", 0.375), nothing],
                sharpness: 2.5,
                epsilon: 0.01,
            },
            members: vec![member(Some(2), 1), member(Some(5), 4), member(None, 9)],
        }
    }

    #[test]
    fn a_written_file_reads_back_and_has_the_same_bytes() {
        let file = ensemble();
        let bytes = file.to_bytes();
        assert!(EnsembleFile::is_one(&bytes));
        let read = EnsembleFile::parse(&bytes).unwrap();
        assert_eq!(read, file);
        assert_eq!(read.to_bytes(), bytes);
    }

    #[test]
    fn a_prompt_file_is_none_and_an_ensemble_is_no_prompt_file() {
        let prompt = crate::testing::prompt_file(2, 4, 1).to_bytes();
        assert!(!EnsembleFile::is_one(&prompt));
        let refused = EnsembleFile::parse(&prompt).unwrap_err().to_string();
        assert!(refused.contains("kind `ensemble`"), "{refused}");
        assert!(crate::prompt_file::PromptFile::parse(&ensemble().to_bytes()).is_err());
        assert!(!EnsembleFile::is_one(b"other bytes"));
    }

    #[test]
    fn every_broken_rule_is_told_by_name() {
        let broken: [(&str, Break); 9] = [
            ("sum to 0.875", |it| it.metadata.members[2].weight = 0.0),
            ("`sharpness` is 0", |it| it.metadata.sharpness = 0.0),
            ("at most 1000000", |it| it.metadata.sharpness = 1e308),
            ("`epsilon` is 1", |it| it.metadata.epsilon = 1.0),
            ("K = 2, the number of `classes`", |it| {
                it.metadata.classes.pop();
            }),
            ("tensor `0.prompt_embeddings` is missing", |it| {
                it.members[0].prompt_embeddings = None;
            }),
            ("`1.prompt_embeddings` holds NaN at index 3", |it| {
                it.members[1].prompt_embeddings.as_mut().unwrap().values[3] = f32::NAN;
            }),
            ("`2.head.weight` has shape [3, 5]", |it| {
                it.members[2].head.weight = tensor(&[3, 5], 1);
            }),
            ("tensor `2.head.bias` is not part", |it| {
                it.metadata.members.pop();
                it.metadata.members[0].weight = 0.625;
            }),
        ];
        for (expected, break_it) in broken {
            let mut file = ensemble();
            break_it(&mut file);
            let refused = EnsembleFile::parse(&file.to_bytes()).unwrap_err();
            let refused = refused.to_string();
            assert!(refused.contains(expected), "{expected}: {refused}");
        }
    }
}

//! Predictions for the images of a dataset, by a prompt with a head or by an ensemble.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::compatibility::{BackboneFacts, Incompatible, PromptFacts, check_fits};
use crate::digest::Digest;
use crate::ensemble_file::{EnsembleFile, EnsembleFileError};
use crate::prompt_file::PromptFile;
use crate::split::Split;
use crate::words::JobErrorCode;

/// The form of a table of predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TableFormat {
    #[default]
    Csv,
    /// JSON Lines: one object a line.
    Jsonl,
    Parquet,
}

impl TableFormat {
    pub const ALL: [Self; 3] = [Self::Csv, Self::Jsonl, Self::Parquet];

    /// The name, which is also the extension of files of this format.
    pub fn name(self) -> &'static str {
        match self {
            Self::Csv => "csv",
            Self::Jsonl => "jsonl",
            Self::Parquet => "parquet",
        }
    }

    pub fn media_type(self) -> &'static str {
        match self {
            Self::Csv => "text/csv; charset=utf-8",
            Self::Jsonl => "application/jsonl",
            Self::Parquet => "application/vnd.apache.parquet",
        }
    }
}

impl std::str::FromStr for TableFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|format| format.name() == name);
        known.ok_or_else(|| format!("`{name}` is not a format; use csv, jsonl or parquet"))
    }
}

/// A file that predicts: a prompt with a head, or an ensemble.
#[derive(Clone, Debug)]
pub enum Model {
    Prompt(Box<PromptFile>),
    Ensemble(EnsembleFile),
}

impl Model {
    /// Reads and checks a prompt file or an ensemble file. A prompt file need not have a head; [`Self::check`] asks for
    /// one.
    pub fn parse(bytes: &[u8]) -> Result<Self, EnsembleFileError> {
        match EnsembleFile::is_one(bytes) {
            true => EnsembleFile::parse(bytes).map(Self::Ensemble),
            false => Ok(Self::Prompt(Box::new(PromptFile::parse(bytes)?))),
        }
    }

    /// The facts that decide which backbone the model fits. `digest` is the sha256 of the file.
    pub fn facts(&self, name: String, digest: Digest) -> PromptFacts<'_> {
        match self {
            Self::Prompt(file) => file.facts(name, digest),
            Self::Ensemble(file) => file.facts(name, digest),
        }
    }

    /// Checks that the model can predict with a backbone, and returns the names of its classes in label order.
    pub fn check(
        &self,
        name: &str,
        digest: Digest,
        backbone: &BackboneFacts<'_>,
    ) -> Result<Vec<String>, Incompatible> {
        check_fits(&self.facts(name.to_owned(), digest), backbone)?;
        match self {
            Self::Ensemble(file) => Ok(file.metadata.classes.clone()),
            Self::Prompt(file) if file.deep_prompt_embeddings.is_some() => Err(Incompatible {
                code: JobErrorCode::DeepPromptNotPredictable,
                detail: format!("`{name}` is a deep prompt; only shallow prompts predict here"),
            }),
            Self::Prompt(file) => {
                let Some(head) = &file.head else {
                    return Err(Incompatible {
                        code: JobErrorCode::NoHead,
                        detail: format!(
                            "`{name}` has no head, so it names no classes; a tuning or an ensemble with its backbone makes a prompt with one"
                        ),
                    });
                };
                let named = file.metadata.as_ref().and_then(|it| it.classes.clone());
                let numbers = || (0..head.bias.shape[0]).map(|class| class.to_string());
                Ok(named.unwrap_or_else(|| numbers().collect()))
            }
        }
    }
}

/// What a prediction is computed from, with all files at hand.
#[derive(Clone, Debug)]
pub struct PredictionInput {
    pub backbone_dir: PathBuf,
    pub dataset_dir: PathBuf,
    pub split: Split,
    /// Leave out unreadable images and count them, instead of failing.
    pub skip_unreadable: bool,
    /// The model's name for messages, e.g. `location:1`.
    pub name: String,
    /// Digest of the model's file.
    pub digest: Digest,
    pub model: Model,
    /// How many of the most probable classes the table has for each image.
    pub top_k: usize,
    pub format: TableFormat,
}

/// A finished prediction: the answer, and the table as a file.
#[derive(Clone, Debug)]
pub struct Predicted {
    pub result: PredictionResult,
    pub file: Vec<u8>,
}

/// The most classes of a confusion matrix.
pub const MAX_CONFUSION_CLASSES: usize = 200;

/// The result of a prediction. It has a score if the labels are known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PredictionResult {
    /// The file with a row for each image.
    pub file: TableFile,
    /// N, the number of images that were predicted.
    pub num_images: usize,
    /// Unreadable images that were left out.
    pub skipped: usize,
    /// Forward passes of the backbone for each image.
    pub forward_passes: usize,
    /// The model's classes, in label order.
    pub classes: Vec<String>,
    /// How good the predictions are; null if the labels are not known.
    pub score: Option<PredictionScore>,
    /// Why there is no `score`; null if there is one.
    pub no_score: Option<String>,
    /// The device that predicted, e.g. `cpu` or `cuda:0`.
    pub device: String,
    pub seconds: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TableFile {
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    pub format: TableFormat,
}

/// Predictions beside the labels of the dataset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PredictionScore {
    pub accuracy: f64,
    /// The 95 % interval of the accuracy (Wilson 1927), from its least to its greatest value.
    pub accuracy_interval: [f64; 2],
    /// Cross-entropy in nats.
    pub loss: f64,
    /// K × K counts: row i has the images of class i, column j those that were predicted as class j. Empty for more than
    /// 200 classes.
    pub confusion: Vec<Vec<u64>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt_file::Head;
    use crate::tensor::Tensor;
    use crate::testing::prompt_file;

    #[test]
    fn a_prompt_predicts_if_it_has_a_head_and_is_shallow() {
        let mut file = prompt_file(2, 4, 1);
        let digest = Digest::of(b"file");
        let check = |file: &PromptFile| {
            let metadata = file.metadata.as_ref();
            let backbone = BackboneFacts {
                name: None,
                digest: metadata.and_then(|it| it.backbone_digest).unwrap_or(digest),
                embed_dim: 4,
                preprocessing_id: (metadata.and_then(|it| it.preprocessing_id.clone()))
                    .unwrap_or_default(),
            };
            let checked = Model::Prompt(Box::new(file.clone())).check("a:1", digest, &backbone);
            checked.map_err(|refused| refused.code)
        };
        file.head = None;
        assert_eq!(check(&file), Err(JobErrorCode::NoHead));
        file.head = Some(Head {
            weight: Tensor::new([2, 4], vec![0.5; 8]),
            bias: Tensor::new([2], vec![0.0, 1.0]),
        });
        let named = ["cat", "dog"].map(str::to_owned).to_vec();
        if let Some(metadata) = &mut file.metadata {
            metadata.classes = Some(named.clone());
        }
        assert_eq!(check(&file), Ok(named));
        // Without names, classes are numbered.
        let mut unnamed = file.clone();
        unnamed.metadata = None;
        assert_eq!(check(&unnamed), Ok(vec!["0".to_owned(), "1".to_owned()]));
        file.deep_prompt_embeddings = Some(Tensor::new([1, 2, 4], vec![0.5; 8]));
        assert_eq!(check(&file), Err(JobErrorCode::DeepPromptNotPredictable));
    }

    #[test]
    fn a_format_is_known_by_its_name() {
        for format in TableFormat::ALL {
            assert_eq!(format.name().parse(), Ok(format));
            assert_eq!(serde_json::to_value(format).unwrap(), format.name());
        }
        assert!("xlsx".parse::<TableFormat>().unwrap_err().contains("jsonl"));
    }
}

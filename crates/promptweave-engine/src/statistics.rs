//! `statistics.safetensors`: what α was computed from, so that it can be checked, and solved for again
//! without the backbone, with other weighings or fewer sources. It is complete: the prompts are in it too.
//!
//! | tensor | shape | dtype | |
//! |---|---|---|---|
//! | `features` | `[M, N, d]` | f32 | f_{Pᵢ}(xₙ) |
//! | `prompts` | `[M, m, d]` | f32 | Pᵢ, rows in the order they are summed in |
//! | `labels` | `[N]` | i64 | |
//! | `sample_indices` | `[N]` | i64 | positions in the list file, in row order |
//! | `folds` | `[N]` | i64 | cross-fit fold of the head; all 0 without |
//! | `head_temperature`, `head_loss`, `head_saturation` | `[M]` | f64 | |
//! | `log_predictions` | `[M+1, N, K]` | f32 | log pᵢ(k\|xₙ) by heads that did not see xₙ; the last without a prompt |
//! | `prediction_temperature` | `[M+1]` | f64 | of those heads |
//! | `features_without_prompt` | `[N, d]` | f32 | |
//! | `gradient_gram` | `[T, T]` | f64 | Γ, T = M(M+1)/2, packed i ≤ j row by row |
//! | `gradient_variance_gram` | `[M, M]` | f64 | VᵀV |
//! | `gradient_gram_leave_out` | `[J, T, T]` | f64 | Γ without each of J sample folds |
//! | `gradient_variance_gram_leave_out` | `[J, M, M]` | f64 | VᵀV likewise |
//! | `gradient_mean_cosine` | `[M, M]` | f64 | of the prompts' mean gradients |
//! | `gradient_rms` | `[M]` | f64 | before any `gradient_normalization` |
//!
//! The `gradient_…` tensors are there where the method takes gradients.
//!
//! The one metadata key, `promptweave`, names the sources in order, the digests and the options.

use std::borrow::Cow;
use std::collections::HashMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors, View};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::EngineError;
use crate::pool::unseen::UnseenPredictions;
use crate::score::alignment::{AlignmentStatistics, num_pairs};
use crate::score::gradients::GradientSummary;
use crate::score::transferability::SourceScores;
use promptweave_domain::composition::TokenAlignment;
use promptweave_domain::digest::Digest;
use promptweave_domain::method::common_seed;
use promptweave_domain::objective::{GradientNormalization, Objective};
use promptweave_domain::precision::Precision;
use promptweave_domain::prompt_file::METADATA_KEY;
use promptweave_domain::tensor::{Stored, Tensor as PlainTensor, read_f32, read_f64, read_i64};

/// Format number of the file. Another number means another layout.
const FORMAT: u32 = 1;

/// Why a statistics file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StatisticsError {
    #[error(
        "the file is truncated, or not safetensors; run the composition again to write it anew"
    )]
    Unreadable(#[source] SafeTensorError),
    #[error(
        "tensor `{0}` is missing: the file was written by another version, or is not of statistics"
    )]
    MissingTensor(&'static str),
    #[error("tensor `{tensor}` has shape {shape:?} or another dtype, expected {expected}")]
    Shape {
        tensor: &'static str,
        shape: Vec<usize>,
        expected: String,
    },
    #[error("tensor `{0}` holds values that are not finite, or out of range")]
    Values(&'static str),
    #[error("metadata key `promptweave` is missing or cannot be read: {0}")]
    Metadata(String),
    #[error("the statistics have format {0}; this version reads format {FORMAT}")]
    Format(u32),
}

/// The data that α is computed from.
pub struct Statistics {
    /// Features [M, N, d] in f32.
    pub features: Tensor,
    /// The sources' prompts, [m, d] each.
    pub prompts: Vec<PlainTensor<f32>>,
    pub labels: Vec<usize>,
    pub sample_indices: Vec<usize>,
    pub folds: Vec<usize>,
    pub heads: HeadStatistics,
    /// The predictions that a pool is fitted on; `None` if the file was written before they were kept.
    pub predictions: Option<UnseenPredictions>,
    /// Summary of the gradients; `None` if the method takes none.
    pub gradients: Option<GradientSummary>,
}

/// The part of [`Statistics`] that α is solved from.
#[derive(Clone, Copy)]
pub struct SolveInputs<'a> {
    /// Features [M, N, d].
    pub features: &'a Tensor,
    pub labels: &'a [usize],
    pub gradients: Option<&'a GradientSummary>,
}

/// The heads' numbers, one for each source.
pub struct HeadStatistics {
    pub temperature: Vec<f64>,
    pub loss: Vec<f64>,
    pub saturation: Vec<f64>,
}

/// The inputs that the numbers depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    pub format: u32,
    pub sources: Vec<RecordedSource>,
    pub backbone_digest: Digest,
    pub preprocessing_id: String,
    #[serde(default)]
    pub precision: Precision,
    pub sample_digest: Digest,
    /// Class names of the target, in label order.
    pub classes: Vec<String>,
    pub objective: Objective,
    /// Normalisation of the gradients in the file; null without gradients. It stays when an
    /// `objective` that takes none replaces the one the gradients were taken for.
    pub gradient_normalization: Option<GradientNormalization>,
    /// The token alignment at the time the gradients were taken.
    pub token_alignment: Option<TokenAlignment>,
    pub seed: u64,
    pub skipped_images: usize,
}

impl Metadata {
    pub const FORMAT: u32 = FORMAT;

    /// Reads a file's metadata, without its tensors.
    pub fn read(bytes: &[u8]) -> Result<Self, StatisticsError> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(StatisticsError::Unreadable)?;
        let json = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get(METADATA_KEY))
            .ok_or_else(|| StatisticsError::Metadata("there is none".into()))?;
        // The format is checked first, since another one may differ in every other way.
        #[derive(Deserialize)]
        struct OnlyFormat {
            format: u32,
        }
        let unreadable = |error: serde_json::Error| StatisticsError::Metadata(error.to_string());
        let OnlyFormat { format } = serde_json::from_str(json).map_err(unreadable)?;
        if format != FORMAT {
            return Err(StatisticsError::Format(format));
        }
        serde_json::from_str(json).map_err(unreadable)
    }

    /// The metadata of some of the sources, in the order given.
    pub fn of_sources(&self, keep: &[usize]) -> Self {
        let token_alignment = self.token_alignment.as_ref().map(|all| TokenAlignment {
            reference: all.reference.clone(),
            permutations: keep.iter().map(|i| all.permutations[*i].clone()).collect(),
        });
        Self {
            sources: keep.iter().map(|i| self.sources[*i].clone()).collect(),
            token_alignment,
            ..self.clone()
        }
    }

    /// The sources' names, as an error lists them.
    pub fn source_names(&self) -> String {
        let names = self
            .sources
            .iter()
            .map(|source| format!("`{}`", source.prompt));
        names.collect::<Vec<_>>().join(", ")
    }

    /// The init seed that all sources state, if it is one and the same.
    pub fn common_init_seed(&self) -> Option<u64> {
        common_seed(self.sources.iter().map(|source| source.init_seed))
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordedSource {
    pub prompt: String,
    pub digest: Digest,
    pub init_seed: Option<u64>,
    /// Isolated scores of the source. They need the prompt's file, which is not kept.
    pub scores: SourceScores,
}

impl Statistics {
    /// The sizes M, N, d.
    pub fn size(&self) -> (usize, usize, usize) {
        let (m, n, d) = self.features.size3().expect("three axes");
        (m as usize, n as usize, d as usize)
    }

    pub fn ground(&self) -> SolveInputs<'_> {
        SolveInputs {
            features: &self.features,
            labels: &self.labels,
            gradients: self.gradients.as_ref(),
        }
    }

    /// The bytes of the file. The same content gives the same bytes.
    pub fn to_bytes(&self, metadata: &Metadata) -> Result<Vec<u8>, EngineError> {
        let (m, _, d) = self.size();
        let t = num_pairs(m);
        let numbers = |shape: &[usize], values: Vec<f64>| {
            Entry::Small(Stored::from(&PlainTensor::new(shape.to_vec(), values)))
        };
        let whole = |values: &[usize]| {
            let values: Vec<i64> = values.iter().map(|v| *v as i64).collect();
            Entry::Small(Stored::from(&PlainTensor::new([values.len()], values)))
        };
        let shape = [m, self.prompts[0].shape[0], d];
        let prompts = self.prompts.iter().flat_map(|prompt| &prompt.values);
        let prompts = PlainTensor::new(shape, prompts.copied().collect());
        let mut tensors = vec![
            ("features", Entry::floats(&self.features)),
            ("prompts", Entry::Small(Stored::from(&prompts))),
            ("labels", whole(&self.labels)),
            ("sample_indices", whole(&self.sample_indices)),
            ("folds", whole(&self.folds)),
            (
                "head_temperature",
                numbers(&[m], self.heads.temperature.clone()),
            ),
            ("head_loss", numbers(&[m], self.heads.loss.clone())),
            (
                "head_saturation",
                numbers(&[m], self.heads.saturation.clone()),
            ),
        ];
        if let Some(unseen) = &self.predictions {
            let temperatures = unseen.temperatures.clone();
            tensors.extend([
                ("log_predictions", Entry::floats(&unseen.log_p)),
                (
                    "prediction_temperature",
                    numbers(&[temperatures.len()], temperatures),
                ),
                (
                    "features_without_prompt",
                    Entry::floats(&unseen.without_prompt),
                ),
            ]);
        }
        if let Some(GradientSummary {
            whole: all,
            leave_out,
            mean_cosine,
            rms,
        }) = &self.gradients
        {
            let j = leave_out.len();
            let stacked = |of: fn(&AlignmentStatistics) -> &Vec<f64>| -> Vec<f64> {
                leave_out.iter().flat_map(of).copied().collect()
            };
            tensors.extend([
                ("gradient_gram", numbers(&[t, t], all.gram.clone())),
                (
                    "gradient_variance_gram",
                    numbers(&[m, m], all.variance_gram.clone()),
                ),
                (
                    "gradient_gram_leave_out",
                    numbers(&[j, t, t], stacked(|s| &s.gram)),
                ),
                (
                    "gradient_variance_gram_leave_out",
                    numbers(&[j, m, m], stacked(|s| &s.variance_gram)),
                ),
                (
                    "gradient_mean_cosine",
                    numbers(&[m, m], mean_cosine.clone()),
                ),
                ("gradient_rms", numbers(&[m], rms.clone())),
            ]);
        }
        let json = serde_json::to_value(metadata)
            .expect("plain data")
            .to_string();
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), json)]);
        Ok(safetensors::serialize(tensors, Some(metadata)).expect("shapes agree with their data"))
    }

    /// Reads and checks a file: it must be whole and complete, with matching shapes and finite
    /// values.
    pub fn parse(bytes: &[u8]) -> Result<(Self, Metadata), StatisticsError> {
        let file = SafeTensors::deserialize(bytes).map_err(StatisticsError::Unreadable)?;
        let metadata = Metadata::read(bytes)?;
        let file = File(&file);
        let m = metadata.sources.len();
        let labels = file.whole("labels", None)?;
        let n = labels.len();
        let permutations = metadata.token_alignment.as_ref();
        if permutations.is_some_and(|alignment| alignment.permutations.len() != m) {
            return Err(StatisticsError::Metadata(
                "`token_alignment` is not of all sources".into(),
            ));
        }
        if m == 0 || n == 0 || labels.iter().any(|label| *label >= metadata.classes.len()) {
            return Err(StatisticsError::Values("labels"));
        }
        let (features, [_, _, d]) = file.floats("features", [Some(m), Some(n), None])?;
        let (prompts, [_, tokens, _]) = file.floats("prompts", [Some(m), None, Some(d)])?;
        let statistics = Self {
            features: Tensor::from_slice(&features).view([m as i64, n as i64, d as i64]),
            prompts: (prompts.chunks_exact(tokens * d))
                .map(|values| PlainTensor::new([tokens, d], values.to_vec()))
                .collect(),
            labels,
            sample_indices: file.whole("sample_indices", Some(n))?,
            folds: file.whole("folds", Some(n))?,
            heads: HeadStatistics {
                temperature: file.numbers("head_temperature", &[m])?,
                loss: file.numbers("head_loss", &[m])?,
                saturation: file.numbers("head_saturation", &[m])?,
            },
            predictions: file.predictions([m, n, d], metadata.classes.len())?,
            gradients: file.gradients(m)?,
        };
        Ok((statistics, metadata))
    }

    /// The statistics of some of the sources, in the order given. They are exact: what the
    /// gradients were centred with is common to all sources, and drops out of L_align.
    pub fn of_sources(&self, keep: &[usize]) -> Self {
        let rows: Vec<i64> = keep.iter().map(|i| *i as i64).collect();
        let of = |values: &[f64]| -> Vec<f64> { keep.iter().map(|i| values[*i]).collect() };
        Self {
            features: self.features.index_select(0, &Tensor::from_slice(&rows)),
            prompts: keep.iter().map(|i| self.prompts[*i].clone()).collect(),
            labels: self.labels.clone(),
            sample_indices: self.sample_indices.clone(),
            folds: self.folds.clone(),
            heads: HeadStatistics {
                temperature: of(&self.heads.temperature),
                loss: of(&self.heads.loss),
                saturation: of(&self.heads.saturation),
            },
            predictions: (self.predictions.as_ref()).map(|all| all.of_sources(keep)),
            gradients: self.gradients.as_ref().map(|all| all.of_sources(keep)),
        }
    }
}

/// A tensor to be written to the file.
enum Entry<'a> {
    Small(Stored),
    /// A tensor on the CPU, with its shape, written in f32. Its bytes are made only when they are written, since such
    /// tensors are the largest part.
    Floats(&'a Tensor, Vec<usize>),
}

impl<'a> Entry<'a> {
    fn floats(tensor: &'a Tensor) -> Self {
        let shape = tensor.size().iter().map(|size| *size as usize).collect();
        Self::Floats(tensor, shape)
    }
}

impl View for Entry<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Small(stored) => stored.dtype(),
            Self::Floats(..) => Dtype::F32,
        }
    }
    fn shape(&self) -> &[usize] {
        match self {
            Self::Small(stored) => stored.shape(),
            Self::Floats(_, shape) => shape,
        }
    }
    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Small(stored) => stored.data(),
            Self::Floats(tensor, _) => {
                let mut bytes = vec![0; self.data_len()];
                let tensor = tensor.to_kind(Kind::Float).contiguous();
                tensor.copy_data_u8(&mut bytes, tensor.numel());
                Cow::Owned(bytes)
            }
        }
    }
    fn data_len(&self) -> usize {
        match self {
            Self::Small(stored) => stored.data_len(),
            Self::Floats(tensor, _) => 4 * tensor.numel(),
        }
    }
}

/// A file's tensors, checked as they are read.
pub(crate) struct File<'a>(pub &'a SafeTensors<'a>);

impl File<'_> {
    pub fn view(&self, name: &'static str) -> Result<TensorView<'_>, StatisticsError> {
        self.0
            .tensor(name)
            .map_err(|_| StatisticsError::MissingTensor(name))
    }

    /// Reads the predictions of m sources and of the backbone without a prompt, for n samples and k classes, if there are
    /// any.
    fn predictions(
        &self,
        [m, n, d]: [usize; 3],
        k: usize,
    ) -> Result<Option<UnseenPredictions>, StatisticsError> {
        if !self.0.names().contains(&"log_predictions") {
            return Ok(None);
        }
        let tensor = |values: &[f32], shape: &[usize]| {
            let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
            Tensor::from_slice(values).view(shape.as_slice())
        };
        let (log_p, shape) = self.floats("log_predictions", [Some(m + 1), Some(n), Some(k)])?;
        let (without, of_samples) = self.floats("features_without_prompt", [Some(n), Some(d)])?;
        Ok(Some(UnseenPredictions {
            log_p: tensor(&log_p, &shape),
            temperatures: self.numbers("prediction_temperature", &[m + 1])?,
            without_prompt: tensor(&without, &of_samples),
        }))
    }

    /// Reads the gradients of m sources, if there are any.
    fn gradients(&self, m: usize) -> Result<Option<GradientSummary>, StatisticsError> {
        if self
            .0
            .names()
            .iter()
            .all(|name| !name.starts_with("gradient_"))
        {
            return Ok(None);
        }
        let t = num_pairs(m);
        let leave_out_shape = self.view("gradient_gram_leave_out")?.shape().to_vec();
        let j = leave_out_shape.first().copied().unwrap_or(0);
        let grams = self.numbers("gradient_gram_leave_out", &[j, t, t])?;
        let variance_grams = self.numbers("gradient_variance_gram_leave_out", &[j, m, m])?;
        let leave_out = (grams.chunks_exact(t * t))
            .zip(variance_grams.chunks_exact(m * m))
            .map(|(gram, variance_gram)| AlignmentStatistics {
                num_sources: m,
                gram: gram.to_vec(),
                variance_gram: variance_gram.to_vec(),
            })
            .collect();
        Ok(Some(GradientSummary {
            whole: AlignmentStatistics {
                num_sources: m,
                gram: self.numbers("gradient_gram", &[t, t])?,
                variance_gram: self.numbers("gradient_variance_gram", &[m, m])?,
            },
            leave_out,
            mean_cosine: self.numbers("gradient_mean_cosine", &[m, m])?,
            rms: self.numbers("gradient_rms", &[m])?,
        }))
    }

    pub fn numbers(
        &self,
        name: &'static str,
        shape: &[usize],
    ) -> Result<Vec<f64>, StatisticsError> {
        let view = self.view(name)?;
        let values = read_f64(&view).filter(|_| view.shape() == shape);
        let values = values.ok_or_else(|| misshapen(name, &view, format!("f64 {shape:?}")))?;
        if values.iter().all(|value| value.is_finite()) {
            Ok(values)
        } else {
            Err(StatisticsError::Values(name))
        }
    }

    pub fn whole(
        &self,
        name: &'static str,
        len: Option<usize>,
    ) -> Result<Vec<usize>, StatisticsError> {
        let view = self.view(name)?;
        let fits = view.shape().len() == 1 && len.is_none_or(|len| view.shape() == [len]);
        let values = read_i64(&view).filter(|_| fits);
        let values = values.ok_or_else(|| misshapen(name, &view, "i64 [N]".into()))?;
        values
            .into_iter()
            .map(|value| usize::try_from(value).map_err(|_| StatisticsError::Values(name)))
            .collect()
    }

    /// Reads values and shape. `None` in `expected` stands for any length but 0.
    pub fn floats<const AXES: usize>(
        &self,
        name: &'static str,
        expected: [Option<usize>; AXES],
    ) -> Result<(Vec<f32>, [usize; AXES]), StatisticsError> {
        let view = self.view(name)?;
        let shape = <[usize; AXES]>::try_from(view.shape()).ok();
        let shape = shape.filter(|shape| {
            let mut lengths = shape.iter().zip(expected);
            lengths.all(|(length, expected)| expected.map_or(*length > 0, |e| e == *length))
        });
        let (Some(shape), Some(values)) = (shape, read_f32(&view)) else {
            let lengths = expected.map(|e| e.map_or("any".into(), |e| e.to_string()));
            let expected = format!("f32 [{}]", lengths.join(", "));
            return Err(misshapen(name, &view, expected));
        };
        if values.iter().all(|value| value.is_finite()) {
            Ok((values, shape))
        } else {
            Err(StatisticsError::Values(name))
        }
    }
}

fn misshapen(tensor: &'static str, view: &TensorView<'_>, expected: String) -> StatisticsError {
    StatisticsError::Shape {
        tensor,
        shape: view.shape().to_vec(),
        expected,
    }
}

//! Predictions for images by a prompt or an ensemble, with the heads in its file.

use std::ops::ControlFlow;
use std::time::Instant;

use tch::{Kind, Tensor};

use crate::error::EngineError;
use crate::pool::unseen::log_probabilities;
use crate::samples::{Samples, Selection};
use crate::score::evaluate::cross_entropy;
use crate::score::head::ClosedFormHead;
use crate::score::transferability::matrix;
use crate::tensors::prompt_tensor;
use crate::vit::Vit;
use crate::vit::features::extract;
use promptweave_domain::composer::Observer;
use promptweave_domain::digest::Digest;
use promptweave_domain::ensemble_file::EnsembleFile;
use promptweave_domain::phase::Phase;
use promptweave_domain::prediction::{
    MAX_CONFUSION_CLASSES, Model, Predicted, PredictionInput, PredictionResult, PredictionScore,
    TableFile,
};
use promptweave_domain::prompt_file::{Head, PromptFile};
use promptweave_domain::proportions::wilson;
use promptweave_formats::backbone::Backbone;
use promptweave_formats::dataset::LabelledImages;
use promptweave_formats::prediction_table::{PredictionRow, PredictionTable};

/// A log-linear pool of prompts with their heads; a prompt alone is a pool of one.
pub struct Predictor {
    members: Vec<Member>,
    /// ε, the share of equal probabilities in every member's prediction.
    epsilon: f64,
}

struct Member {
    /// [m, d]; m is 0 for the backbone without a prompt.
    prompt: Tensor,
    head: ClosedFormHead,
    /// w = s α.
    exponent: f64,
}

impl Predictor {
    /// Predicts with the prompt and the head of a file; `None` if the file has no head.
    pub fn of_prompt(file: &PromptFile, vit: &Vit) -> Result<Option<Self>, EngineError> {
        let Some(head) = &file.head else {
            return Ok(None);
        };
        let member = Member {
            prompt: prompt_tensor(&file.prompt_embeddings, vit),
            head: read(head)?,
            exponent: 1.0,
        };
        Ok(Some(Self {
            members: vec![member],
            epsilon: 0.0,
        }))
    }

    /// The predictor of a checked model; `None` for a prompt without a head.
    pub fn of(model: &Model, vit: &Vit) -> Result<Option<Self>, EngineError> {
        match model {
            Model::Prompt(file) => Self::of_prompt(file, vit),
            Model::Ensemble(file) => Self::of_ensemble(file, vit).map(Some),
        }
    }

    pub fn of_ensemble(file: &EnsembleFile, vit: &Vit) -> Result<Self, EngineError> {
        let nothing = || Tensor::zeros([0, vit.embed_dim()], (vit.kind, vit.device));
        let weights = file.metadata.members.iter().map(|member| member.weight);
        let members = file.members.iter().zip(weights).map(|(member, weight)| {
            let prompt = member.prompt_embeddings.as_ref();
            Ok(Member {
                prompt: prompt.map_or_else(nothing, |prompt| prompt_tensor(prompt, vit)),
                head: read(&member.head)?,
                exponent: file.metadata.sharpness * weight,
            })
        });
        Ok(Self {
            members: members.collect::<Result<_, EngineError>>()?,
            epsilon: file.metadata.epsilon,
        })
    }

    /// Number of forward passes that each image takes.
    pub fn num_members(&self) -> usize {
        self.members.len()
    }

    /// log p(y|x) of every image and class, `[N, K]` in f64. `progress` gets the number of image × member pairs that each
    /// step finished.
    pub fn log_probabilities(
        &self,
        vit: &Vit,
        images: &Samples,
        mut progress: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Tensor, EngineError> {
        let mut sum: Option<Tensor> = None;
        for member in &self.members {
            let pairs = vit.pairs(images, std::slice::from_ref(&member.prompt));
            let features = extract(vit, &pairs, &mut progress)?.get(0);
            let log_p = log_probabilities(&member.head.logits(&features), self.epsilon);
            let part = log_p * member.exponent;
            sum = Some(match sum {
                Some(sum) => sum + part,
                None => part,
            });
        }
        let sum = sum.expect("a file has a member");
        Ok(sum.log_softmax(-1, Kind::Double))
    }
}

/// Predicts all images of a split, and compares the predictions with the labels if the model knows their classes.
pub fn predict(
    backbone: &Backbone,
    vit: &Vit,
    device: String,
    input: &PredictionInput,
    observer: &mut dyn Observer,
) -> Result<Predicted, EngineError> {
    let started = Instant::now();
    let classes = (input.model).check(&input.name, input.digest, &backbone.facts())?;
    let predictor = Predictor::of(&input.model, vit)?.expect("a model that was checked has a head");
    let dataset = LabelledImages::read(&input.dataset_dir)?;
    let selection = Selection {
        split: input.split,
        max_samples: None,
        seed: 0,
        skip_unreadable: input.skip_unreadable,
    };
    let images = Samples::load(&dataset, &selection, &backbone.config.preprocessing)?;
    let total = (predictor.num_members() * images.len()) as u64;
    let mut done = 0;
    let log_p = predictor.log_probabilities(vit, &images, |pairs| {
        done += pairs;
        observer.progress(Phase::Features, done, total)
    })?;
    if !all_finite(&log_p) {
        return Err(EngineError::NotFinite("the predictions"));
    }
    let (score, no_score) = match known_labels(&images, &dataset.classes, &classes) {
        Ok(labels) => (Some(score(&log_p, &labels, classes.len())?), None),
        Err(why) => (None, Some(why)),
    };
    let listed = dataset.split(input.split)?;
    let named = images
        .indices
        .iter()
        .zip(&images.labels)
        .map(|(at, label)| {
            let label = dataset.classes[*label].clone();
            (listed[*at].path.clone(), Some(label))
        });
    let table = table(named, &log_p, &classes, input.top_k)?;
    let mut file = Vec::new();
    table
        .write(input.format, &mut file)
        .expect("a table is written to memory");
    let result = PredictionResult {
        file: TableFile {
            digest: Digest::of(&file),
            size: file.len() as u64,
            format: input.format,
        },
        num_images: images.len(),
        skipped: images.skipped,
        forward_passes: predictor.num_members(),
        classes,
        score,
        no_score,
        device,
        seconds: started.elapsed().as_secs_f64(),
    };
    Ok(Predicted { result, file })
}

fn all_finite(log_p: &Tensor) -> bool {
    log_p.isfinite().all().int64_value(&[]) == 1
}

/// The images' labels as indices of the model's classes; otherwise the reason why they are not known.
fn known_labels(
    images: &Samples,
    of_dataset: &[String],
    of_model: &[String],
) -> Result<Vec<usize>, String> {
    let at = |label: &usize| {
        let class = &of_dataset[*label];
        let at = of_model.iter().position(|known| known == class);
        at.ok_or_else(|| {
            let count = images.labels.iter().filter(|other| *other == label).count();
            format!("{count} images are labelled `{class}`, which is no class of the model")
        })
    };
    images.labels.iter().map(at).collect()
}

fn score(
    log_p: &Tensor,
    labels: &[usize],
    num_classes: usize,
) -> Result<PredictionScore, EngineError> {
    let predicted = Vec::<i64>::try_from(log_p.argmax(-1, false))?;
    let pairs = || {
        labels
            .iter()
            .copied()
            .zip(predicted.iter().map(|class| *class as usize))
    };
    let right = pairs()
        .filter(|(label, predicted)| label == predicted)
        .count();
    // The matrix grows with the square of the classes.
    let mut confusion = Vec::new();
    if num_classes <= MAX_CONFUSION_CLASSES {
        confusion = vec![vec![0; num_classes]; num_classes];
        pairs().for_each(|(label, predicted)| confusion[label][predicted] += 1);
    }
    Ok(PredictionScore {
        accuracy: right as f64 / labels.len() as f64,
        accuracy_interval: wilson(right, labels.len()),
        loss: cross_entropy(log_p, labels),
        confusion,
    })
}

/// The `top_k` most probable classes of images, which are given by their names and labels. log p is `[N, K]`.
pub fn table(
    images: impl IntoIterator<Item = (String, Option<String>)>,
    log_p: &Tensor,
    classes: &[String],
    top_k: usize,
) -> Result<PredictionTable, EngineError> {
    let k = top_k.min(classes.len());
    let (values, indices) = log_p.exp().topk(k as i64, -1, true, true);
    let values = Vec::<f64>::try_from(values.flatten(0, -1))?;
    let indices = Vec::<i64>::try_from(indices.flatten(0, -1))?;
    let of_images = values.chunks_exact(k).zip(indices.chunks_exact(k));
    let rows = images.into_iter().zip(of_images);
    let rows = rows.map(|((image, label), (values, indices))| PredictionRow {
        image,
        label,
        top: (indices.iter().zip(values))
            .map(|(class, p)| (classes[*class as usize].clone(), *p))
            .collect(),
    });
    Ok(PredictionTable {
        rows: rows.collect(),
    })
}

fn read(head: &Head) -> Result<ClosedFormHead, EngineError> {
    ClosedFormHead::given(&matrix(&head.weight), &matrix(&head.bias))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_most_probable_classes_in_order() {
        let log_p = Tensor::from_slice(&[0.125f64, 0.625, 0.25, 0.5, 0.0, 0.5]).log();
        let classes = ["a", "b", "c"].map(str::to_owned);
        let images = ["x.png", "y.png"].map(|image| (image.to_owned(), None));
        let found = table(images, &log_p.view([2, 3]), &classes, 9).unwrap();
        let [x, y] = found.rows.as_slice() else {
            panic!("{found:?}");
        };
        assert_eq!(x.image, "x.png");
        let names: Vec<&str> = x.top.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["b", "c", "a"]);
        assert!((x.top[0].1 - 0.625).abs() < 1e-12);
        assert_eq!(y.top[2], ("b".to_owned(), 0.0));
    }

    #[test]
    fn the_confusion_matrix_has_labels_in_rows() {
        let p = [0.75f64, 0.25, 0.75, 0.25, 0.25, 0.75];
        let log_p = Tensor::from_slice(&p).log().view([3, 2]);
        let score = score(&log_p, &[0, 1, 1], 2).unwrap();
        assert_eq!(score.confusion, [[1, 0], [1, 1]]);
        assert_eq!(score.accuracy, 2.0 / 3.0);
        let expected = -(0.75f64.ln() + 0.25f64.ln() + 0.75f64.ln()) / 3.0;
        assert!((score.loss - expected).abs() < 1e-12);
    }
}

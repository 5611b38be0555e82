//! Evaluation of prompts on a labelled set, with a closed-form head on the frozen feature.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use crate::device::threads::OneThread;
use crate::error::EngineError;
use crate::samples::Samples;
use crate::score::gradients::sample_folds;
use crate::score::h_score::HScore;
use crate::score::head::{ClosedFormHead, fit_temperature, mean_loss, row_tensor};
use crate::score::transferability::matrix;
use crate::tensors::prompt_tensor;
use crate::vit::Vit;
use crate::vit::features::extract;
use promptweave_domain::composition::PromptScore;
use promptweave_domain::objective::{HScoreOptions, HeadOptions};
use promptweave_domain::prompt_file::PromptFile;

/// A prompt's head on the target samples, and the scores of both.
pub struct Evaluated {
    /// Fitted on all training samples, with the temperature of least cross-fitted loss: its logits are calibrated.
    pub head: ClosedFormHead,
    pub score: PromptScore,
    /// The head's logits of the evaluation samples, `[N, K]`; `None` without them.
    pub eval_logits: Option<Tensor>,
}

/// The samples and options of an evaluation.
pub struct Evaluation<'a> {
    pub vit: &'a Vit,
    /// The samples that the head is fitted on: all of them, without cross-fit.
    pub train: &'a Samples,
    /// Samples that the head never sees.
    pub eval: Option<&'a Samples>,
    pub num_classes: usize,
    pub h_score: &'a HScoreOptions,
    pub head: &'a HeadOptions,
}

impl Evaluation<'_> {
    /// Number of sample × prompt pairs that [`Self::run`] sends through the backbone for each
    /// prompt. `known` tells whether the prompt's training features are at hand.
    pub fn work(&self, known: bool) -> u64 {
        let train = if known { 0 } else { self.train.len() };
        (train + self.eval.map_or(0, Samples::len)) as u64
    }

    /// Scores one prompt [m, d]. `train_features` [N, d] saves a pass if they are at hand.
    pub fn run(
        &self,
        prompt: &Tensor,
        train_features: Option<Tensor>,
        mut progress: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Evaluated, EngineError> {
        let _alone = OneThread::begin();
        let mut features_of = |samples: &Samples| -> Result<Tensor, EngineError> {
            let prompts = std::slice::from_ref(prompt);
            Ok(extract(self.vit, &self.vit.pairs(samples, prompts), &mut progress)?.get(0))
        };
        let train_features = match train_features {
            Some(features) => features,
            None => features_of(self.train)?,
        };
        let labels = &self.train.labels;
        let h_score = HScore::new(&train_features.unsqueeze(0), labels, self.h_score)?;
        let validation = cross_fitted(&train_features, labels, self.num_classes, self.head)?;
        let head = ClosedFormHead::fit(&train_features, labels, self.num_classes, self.head)?
            .calibrated(validation.temperature);
        let eval_logits = match self.eval {
            None => None,
            Some(eval) => Some(head.logits(&features_of(eval)?)),
        };
        let eval_accuracy = (self.eval.zip(eval_logits.as_ref()))
            .map(|(eval, logits)| accuracy(logits, &eval.labels))
            .transpose()?;
        Ok(Evaluated {
            score: PromptScore {
                h_score: h_score.value(&[1.0])?,
                h_score_adjusted: h_score.adjusted(&[1.0])?,
                train_accuracy: accuracy(&head.logits(&train_features), labels)?,
                validation_accuracy: Some(validation.accuracy),
                validation_loss: Some(validation.loss),
                eval_accuracy,
            },
            head,
            eval_logits,
        })
    }

    /// [`cross_fitted`] for a prompt [m, d] whose features are not at hand.
    pub fn cross_fitted(
        &self,
        prompt: &Tensor,
        progress: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<OnUnseen, EngineError> {
        let prompts = std::slice::from_ref(prompt);
        let features = extract(self.vit, &self.vit.pairs(self.train, prompts), progress)?.get(0);
        cross_fitted(&features, &self.train.labels, self.num_classes, self.head)
    }
}

/// The result of closed-form heads on samples that they were not fitted on.
#[derive(Clone, Copy, Debug)]
pub struct OnUnseen {
    /// Share of the samples that are classified correctly.
    pub accuracy: f64,
    /// Mean cross-entropy of softmax(logits/T) in nats, at the T of least loss, over the samples
    /// whose class the head knows.
    pub loss: f64,
    /// That T.
    pub temperature: f64,
}

/// Scores features [N, d] of the samples over ten folds. It needs no split but the target samples,
/// and no sample is scored by a head that saw it.
pub fn cross_fitted(
    features: &Tensor,
    labels: &[usize],
    num_classes: usize,
    head: &HeadOptions,
) -> Result<OnUnseen, EngineError> {
    let unseen = UnseenLogits::new(features, labels, num_classes, head)?;
    let accuracy = accuracy(&unseen.logits, labels)?;
    Ok(OnUnseen::of(
        accuracy,
        &unseen.with_loss(labels)?,
        num_classes,
    ))
}

/// Logits of every sample by a closed-form head that was not fitted on it, over ten folds.
pub struct UnseenLogits {
    /// `[N, K]`, in f64 on the CPU.
    pub logits: Tensor,
    /// Whether the sample's head knows the sample's class.
    pub known: Vec<bool>,
}

impl UnseenLogits {
    /// `features` is `[N, d]`; `labels` has N entries below `num_classes`.
    pub fn new(
        features: &Tensor,
        labels: &[usize],
        num_classes: usize,
        head: &HeadOptions,
    ) -> Result<Self, EngineError> {
        let _alone = OneThread::begin();
        let folds = sample_folds(labels);
        let (n, k) = (labels.len() as i64, num_classes as i64);
        let mut unseen = Self {
            logits: Tensor::zeros([n, k], (Kind::Double, Device::Cpu)),
            known: vec![false; labels.len()],
        };
        for fold in 0..=folds.iter().copied().max().unwrap_or(0) {
            let (own, others): (Vec<usize>, Vec<usize>) =
                (0..labels.len()).partition(|row| folds[*row] == fold);
            let of_others: Vec<usize> = others.iter().map(|row| labels[*row]).collect();
            let others = features.index_select(0, &row_tensor(&others));
            let fitted = ClosedFormHead::fit(&others, &of_others, num_classes, head)?;
            let rows = row_tensor(&own);
            let logits = fitted.logits(&features.index_select(0, &rows));
            unseen.logits = (unseen.logits).index_copy(0, &rows, &logits.to_device(Device::Cpu));
            for row in own {
                unseen.known[row] = fitted.knows(labels[row]);
            }
        }
        Ok(unseen)
    }

    /// Logits and label of the samples that have a loss.
    pub fn with_loss(&self, labels: &[usize]) -> Result<Vec<(Vec<f64>, usize)>, EngineError> {
        known_logits(&self.logits, labels, |row| self.known[row])
    }
}

/// Scores the head in a prompt file on samples that it was not fitted on.
pub fn carried_head(
    vit: &Vit,
    samples: &Samples,
    file: &PromptFile,
) -> Result<OnUnseen, EngineError> {
    let _alone = OneThread::begin();
    let stored = file
        .head
        .as_ref()
        .expect("a composed or tuned prompt has one");
    let head = ClosedFormHead::given(&matrix(&stored.weight), &matrix(&stored.bias))?;
    let prompts = [prompt_tensor(&file.prompt_embeddings, vit)];
    let progress = |_| ControlFlow::Continue(());
    let features = extract(vit, &vit.pairs(samples, &prompts), progress)?.get(0);
    let labels = &samples.labels;
    let logits = head.logits(&features);
    let with_loss = known_logits(&logits, labels, |row| head.knows(labels[row]))?;
    let num_classes = stored.bias.shape[0];
    Ok(OnUnseen::of(
        accuracy(&logits, labels)?,
        &with_loss,
        num_classes,
    ))
}

impl OnUnseen {
    fn of(accuracy: f64, with_loss: &[(Vec<f64>, usize)], num_classes: usize) -> Self {
        let temperature = fit_temperature(with_loss);
        Self {
            accuracy,
            // With no known class the loss is that of guessing.
            loss: match with_loss {
                [] => (num_classes as f64).ln(),
                known => mean_loss(known, temperature),
            },
            temperature,
        }
    }
}

/// Whether the largest of each row of `logits` `[N, K]` is its label's.
pub fn correct(logits: &Tensor, labels: &[usize]) -> Result<Vec<bool>, EngineError> {
    let predicted = Vec::<i64>::try_from(logits.argmax(-1, false))?;
    let pairs = predicted.iter().zip(labels);
    Ok(pairs
        .map(|(found, label)| *found == *label as i64)
        .collect())
}

/// Mean cross-entropy of softmax(z) in nats, of logits z `[N, K]`.
pub fn cross_entropy(logits: &Tensor, labels: &[usize]) -> f64 {
    let own = row_tensor(labels).unsqueeze(1);
    let log_p = logits.log_softmax(-1, Kind::Double).gather(1, &own, false);
    -log_p.mean(Kind::Double).double_value(&[])
}

fn accuracy(logits: &Tensor, labels: &[usize]) -> Result<f64, EngineError> {
    let correct = correct(logits, labels)?;
    let count = correct.iter().filter(|correct| **correct).count();
    Ok(count as f64 / labels.len().max(1) as f64)
}

/// Rows of `logits` [N, K] with their labels, where the head knows the label of the row.
fn known_logits(
    logits: &Tensor,
    labels: &[usize],
    knows: impl Fn(usize) -> bool,
) -> Result<Vec<(Vec<f64>, usize)>, EngineError> {
    let num_classes = logits.size2()?.1 as usize;
    let logits = Vec::<f64>::try_from(logits.flatten(0, -1))?;
    let rows = logits.chunks_exact(num_classes).zip(labels).enumerate();
    let known = rows.filter(|(row, _)| knows(*row));
    Ok(known
        .map(|(_, (logits, label))| (logits.to_vec(), *label))
        .collect())
}

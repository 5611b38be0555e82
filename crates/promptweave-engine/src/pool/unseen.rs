//! What every source predicts for the target samples by heads that did not see them, and the heads for other images.

use tch::{Kind, Tensor};

use crate::error::EngineError;
use crate::pool::EPSILON;
use crate::pool::solver::Predictions;
use crate::score::evaluate::UnseenLogits;
use crate::score::head::{ClosedFormHead, fit_temperature};
use promptweave_domain::objective::HeadOptions;

/// The members' predictions for the target samples. Members are the sources in their order, and last the backbone without
/// a prompt.
pub struct UnseenPredictions {
    /// log pᵢ(k|xₙ), `[M+1, N, K]` in f32.
    pub log_p: Tensor,
    /// The temperature T of every member's head, M+1 numbers.
    pub temperatures: Vec<f64>,
    /// Features without a prompt, `[N, d]` in f32.
    pub without_prompt: Tensor,
}

impl UnseenPredictions {
    /// `features` is `[M, N, d]`, `without_prompt` `[N, d]`; `labels` has N entries below `num_classes`. `tick` is called
    /// before every member.
    pub fn new(
        features: &Tensor,
        without_prompt: Tensor,
        labels: &[usize],
        num_classes: usize,
        head: &HeadOptions,
        tick: &mut dyn FnMut() -> Result<(), EngineError>,
    ) -> Result<Self, EngineError> {
        let (mut log_p, mut temperatures) = (Vec::new(), Vec::new());
        let without_prompt = without_prompt.to_kind(Kind::Float);
        for features in members(features, &without_prompt) {
            tick()?;
            let unseen = UnseenLogits::new(&features, labels, num_classes, head)?;
            let temperature = fit_temperature(&unseen.with_loss(labels)?);
            log_p.push(
                log_probabilities(&(unseen.logits / temperature), EPSILON).to_kind(Kind::Float),
            );
            temperatures.push(temperature);
        }
        Ok(Self {
            log_p: Tensor::stack(&log_p, 0),
            temperatures,
            without_prompt,
        })
    }

    /// The predictions of some of the sources, and of the backbone without a prompt.
    pub fn of_sources(&self, keep: &[usize]) -> Self {
        let last = self.temperatures.len() - 1;
        let kept: Vec<usize> = keep.iter().copied().chain([last]).collect();
        let rows: Vec<i64> = kept.iter().map(|i| *i as i64).collect();
        Self {
            log_p: self.log_p.index_select(0, &Tensor::from_slice(&rows)),
            temperatures: kept.iter().map(|i| self.temperatures[*i]).collect(),
            without_prompt: self.without_prompt.shallow_clone(),
        }
    }

    /// The predictions as a pool's input, with their labels. The only sample of a class is left out, since its head knows
    /// nothing of the class; if there are no others, all are kept.
    pub fn labelled(&self, labels: &[usize]) -> (Predictions, Vec<usize>) {
        let alone = |row: &usize| {
            labels
                .iter()
                .filter(|label| **label == labels[*row])
                .count()
                == 1
        };
        let known: Vec<usize> = (0..labels.len()).filter(|row| !alone(row)).collect();
        let all = Predictions::new(self.log_p.shallow_clone(), labels);
        if known.is_empty() || known.len() == labels.len() {
            return (all, labels.to_vec());
        }
        let of_known = known.iter().map(|row| labels[*row]).collect();
        (all.of_samples(&known), of_known)
    }

    /// Every member's head for images that are not among the samples: fitted on all of them, with calibrated logits.
    pub fn heads(
        &self,
        features: &Tensor,
        labels: &[usize],
        head: &HeadOptions,
    ) -> Result<Vec<ClosedFormHead>, EngineError> {
        let num_classes = self.log_p.size()[2] as usize;
        let members = members(features, &self.without_prompt).zip(&self.temperatures);
        members
            .map(|(features, temperature)| {
                let head = ClosedFormHead::fit(&features, labels, num_classes, head)?;
                Ok(head.calibrated(*temperature))
            })
            .collect()
    }
}

fn members<'a>(
    features: &'a Tensor,
    without_prompt: &'a Tensor,
) -> impl Iterator<Item = Tensor> + 'a {
    let sources = (0..features.size()[0]).map(|i| features.get(i));
    sources.chain([without_prompt.shallow_clone()])
}

/// log((1-ε) softmax(z) + ε/K) of calibrated logits z `[…, K]`, in f64.
pub fn log_probabilities(logits: &Tensor, epsilon: f64) -> Tensor {
    if epsilon == 0.0 {
        return logits.log_softmax(-1, Kind::Double);
    }
    let num_classes = *logits.size().last().expect("classes are the last axis");
    let p = logits.softmax(-1, Kind::Double);
    (p * (1.0 - epsilon) + epsilon / num_classes as f64).log()
}

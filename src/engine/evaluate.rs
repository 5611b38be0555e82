//! How well prompts do on a labelled set: a closed-form head on the frozen feature.

use std::ops::ControlFlow;

use tch::{Kind, Tensor};

use super::EngineError;
use super::features::extract;
use super::h_score::HScore;
use super::head::ClosedFormHead;
use super::samples::Samples;
use super::vit::Vit;
use crate::domain::composition::PromptScore;
use crate::domain::objective::HeadOptions;

/// A prompt's head on the target samples, and how well both do.
pub struct Evaluated {
    pub head: ClosedFormHead,
    pub score: PromptScore,
}

/// What prompts are evaluated on and with.
pub struct Evaluation<'a> {
    pub vit: &'a Vit,
    /// The head is fitted on these: all of them, no cross-fit.
    pub train: &'a Samples,
    /// Never seen by the head.
    pub eval: Option<&'a Samples>,
    pub num_classes: usize,
    pub h_score_shrinkage: f64,
    pub head: &'a HeadOptions,
}

impl Evaluation<'_> {
    /// Sample × prompt pairs that [`Self::run`] sends through the backbone for each prompt whose
    /// training features are not at hand (`known` false) or are.
    pub fn work(&self, known: bool) -> u64 {
        let train = if known { 0 } else { self.train.len() };
        (train + self.eval.map_or(0, Samples::len)) as u64
    }

    /// Scores one prompt [m, d]. `train_features` [N, d] saves a pass where they are at hand.
    pub fn run(
        &self,
        prompt: &Tensor,
        train_features: Option<Tensor>,
        mut progress: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Evaluated, EngineError> {
        let mut features_of = |samples: &Samples| -> Result<Tensor, EngineError> {
            let prompts = std::slice::from_ref(prompt);
            Ok(extract(self.vit, samples, prompts, &mut progress)?.get(0))
        };
        let train_features = match train_features {
            Some(features) => features,
            None => features_of(self.train)?,
        };
        let labels = &self.train.labels;
        let h_score = HScore::new(&train_features.unsqueeze(0), labels, self.h_score_shrinkage)?
            .value(&[1.0])?;
        let head = ClosedFormHead::fit(&train_features, labels, self.num_classes, self.head)?;
        let accuracy = |features: &Tensor, labels: &[usize]| -> Result<f64, EngineError> {
            Ok(head.count_correct(features, labels)? as f64 / labels.len().max(1) as f64)
        };
        let train_accuracy = accuracy(&train_features, labels)?;
        let eval_accuracy = match self.eval {
            None => None,
            Some(eval) => Some(accuracy(
                &features_of(eval)?.to_kind(Kind::Double),
                &eval.labels,
            )?),
        };
        Ok(Evaluated {
            score: PromptScore {
                h_score,
                train_accuracy,
                eval_accuracy,
            },
            head,
        })
    }
}

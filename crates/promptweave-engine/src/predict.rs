//! Predictions for images by a prompt or an ensemble, with the heads in its file.

use std::ops::ControlFlow;

use tch::{Kind, Tensor};

use crate::error::EngineError;
use crate::pool::unseen::log_probabilities;
use crate::samples::Samples;
use crate::score::head::ClosedFormHead;
use crate::score::transferability::matrix;
use crate::tensors::prompt_tensor;
use crate::vit::Vit;
use crate::vit::features::extract;
use promptweave_domain::ensemble_file::EnsembleFile;
use promptweave_domain::prompt_file::{Head, PromptFile};

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

fn read(head: &Head) -> Result<ClosedFormHead, EngineError> {
    ClosedFormHead::given(&matrix(&head.weight), &matrix(&head.bias))
}

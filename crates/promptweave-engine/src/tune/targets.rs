//! The targets for the training samples' logits: labels, and the logits of teachers if there are
//! any.

use std::ops::ControlFlow;

use tch::{Device, Kind, Reduction, Tensor};

use crate::error::EngineError;
use crate::samples::classes::present;
use crate::score::head::{ClosedFormHead, SourceHead, folds, row_tensor};
use crate::tensors::prompt_tensor;
use crate::tune::Tuning;
use crate::vit::features::extract;
use promptweave_domain::composition::Source;
use promptweave_domain::objective::HeadOptions;

pub struct Targets {
    /// The labels, `[N]`.
    labels: Tensor,
    teachers: Option<Teachers>,
}

/// Frozen prompts with closed-form heads on the training samples (PANDA's distillation: Zhong et
/// al. 2022).
struct Teachers {
    /// The classes that the training samples show.
    classes: Tensor,
    /// The logits of every teacher, [T, N, K].
    logits: Tensor,
    weight: f64,
}

impl Targets {
    pub fn of(tuning: &Tuning<'_>) -> Result<Self, EngineError> {
        let labels: Vec<i64> = (tuning.train.labels.iter())
            .map(|label| *label as i64)
            .collect();
        let teachers = match tuning.teachers {
            [] => None,
            teachers => Some(Teachers::of(tuning, teachers)?),
        };
        Ok(Self {
            labels: Tensor::from_slice(&labels),
            teachers,
        })
    }

    /// The sum of the losses of these samples, whose logits [B, K] are given. libtorch can
    /// differentiate it.
    pub fn loss(&self, rows: &[usize], logits: &Tensor) -> Tensor {
        let device = logits.device();
        let rows = row_tensor(rows);
        let labels = self.labels.index_select(0, &rows).to_device(device);
        let loss = logits.cross_entropy_loss(&labels, None::<Tensor>, Reduction::Sum, -100, 0.0);
        let Some(teachers) = &self.teachers else {
            return loss;
        };
        let theirs = teachers.logits.index_select(1, &rows);
        let theirs = theirs.to_device(device).to_kind(logits.kind());
        let own = logits.index_select(1, &teachers.classes.to_device(device));
        let apart = (own.unsqueeze(0) - theirs).square();
        let means = apart.mean_dim([0i64, 2].as_slice(), false, None::<Kind>);
        loss + means.sum(None::<Kind>) * teachers.weight
    }

    /// A copy for another thread, sharing the tensors.
    pub fn share(&self) -> Self {
        Self {
            labels: self.labels.shallow_clone(),
            teachers: self.teachers.as_ref().map(|teachers| Teachers {
                classes: teachers.classes.shallow_clone(),
                logits: teachers.logits.shallow_clone(),
                weight: teachers.weight,
            }),
        }
    }
}

impl Teachers {
    fn of(tuning: &Tuning<'_>, teachers: &[Source]) -> Result<Self, EngineError> {
        let (vit, train) = (tuning.vit, tuning.train);
        let prompts: Vec<Tensor> = teachers
            .iter()
            .map(|teacher| prompt_tensor(&teacher.file.prompt_embeddings, vit))
            .collect();
        let go_on = |_| ControlFlow::Continue(());
        let features = extract(vit, &vit.pairs(train, &prompts), go_on)?;
        let classes = row_tensor(&present(&train.labels));
        let of_teacher = |i: i64| -> Result<Tensor, EngineError> {
            let features = features.get(i);
            let (k, options) = (tuning.classes.len(), HeadOptions::default());
            let labels = &train.labels;
            let head = ClosedFormHead::fit(&features, labels, k, &options)?;
            // The logits are divided by the fitted temperature if it is above 1. So they are no
            // sharper than the head's own, nor than cross-fitting supports.
            let folds = folds(labels, vit.config.embed_dim);
            let fitted = SourceHead::fit(&features, labels, &folds, k, &options)?;
            let logits = head.logits(&features) / fitted.temperature.max(1.0);
            Ok(logits.index_select(1, &classes))
        };
        let logits = (0..teachers.len() as i64).map(of_teacher);
        let logits: Vec<Tensor> = logits.collect::<Result<_, EngineError>>()?;
        Ok(Self {
            classes,
            logits: Tensor::stack(&logits, 0).to_device(Device::Cpu),
            weight: tuning.options.distillation_weight,
        })
    }
}

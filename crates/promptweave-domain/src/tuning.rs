//! The input of a tuning and the record of it. They have one shape for the API, the command line, a
//! job's specification and the training record in a prompt file.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::composition::{Provenance, Source, TargetSamples};
use crate::digest::Digest;
use crate::prompt_file::MAX_TOKENS;
use crate::tuning_method::TuningMethod;

/// The most epochs accepted. Each epoch's loss goes into the prompt file's record, whose size is
/// limited.
pub const MAX_EPOCHS: usize = 1000;
pub const MAX_BATCH_SIZE: usize = 65_536;
/// The most samples in a sketch. More would say no more about the features' distribution.
pub const MAX_SKETCH_SAMPLES: usize = 10_000;
/// The most pairs of learning rate and weight decay in a grid. Each pair takes a tuning of its own.
pub const MAX_PAIRS: usize = 64;

/// The options of a tuning, which has linear warm-up and cosine decay. They are stored in the
/// prompt file as its training record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TuningOptions {
    /// m, the prompt's length in tokens.
    #[schema(minimum = 1, maximum = 4096)]
    pub num_tokens: usize,
    /// Seed of the initial prompt. Prompts that are to be composed should share it, so that their
    /// tokens start in one order.
    pub init_seed: u64,
    /// Seed of the choice of samples and of the order of batches.
    pub seed: u64,
    #[schema(minimum = 1, maximum = 1000)]
    pub epochs: usize,
    #[schema(minimum = 1, maximum = 65536)]
    pub batch_size: usize,
    /// Learning rate of everything that is trained beside the head. If it is too high, the prompt
    /// ends far from its initial values, where prompts mix badly.
    #[schema(minimum = 0)]
    pub prompt_learning_rate: f64,
    #[schema(minimum = 0)]
    pub head_learning_rate: f64,
    #[schema(minimum = 0)]
    pub weight_decay: f64,
    /// Epochs of linear warm-up, at most `epochs`.
    #[schema(minimum = 0)]
    pub warmup_epochs: usize,
    #[serde(skip_serializing_if = "is_default")]
    pub optimizer: OptimizerKind,
    /// Share of the prompt's values that a step drops, in [0, 1); each step makes one choice for
    /// all its images. 0 is off.
    #[serde(skip_serializing_if = "is_default")]
    #[schema(minimum = 0, exclusive_maximum = 1)]
    pub prompt_dropout: f64,
    /// Number of epochs without a lower cross-entropy on held-out samples after which the tuning
    /// stops. The epoch with the lowest is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub patience: Option<usize>,
    /// Number of labelled features to keep in the file for transferability scores; 0 for none.
    #[schema(minimum = 0, maximum = 10000)]
    pub sketch_samples: usize,
    /// What is trained beside the head: `vpt-shallow` or `vpt-deep`; the command line also accepts
    /// the methods they are compared with.
    #[serde(skip_serializing_if = "is_default")]
    #[schema(default = "vpt-shallow")]
    pub method: TuningMethod,
    /// w ≥ 0: adds w times the mean squared difference from the teachers' logits to each sample's
    /// loss (PANDA's distillation). It is 0 without a teacher.
    #[serde(skip_serializing_if = "is_default")]
    #[schema(minimum = 0)]
    pub distillation_weight: f64,
}

impl Default for TuningOptions {
    fn default() -> Self {
        Self {
            num_tokens: 10,
            init_seed: 0,
            seed: 0,
            epochs: 10,
            batch_size: 32,
            prompt_learning_rate: 2e-3,
            head_learning_rate: 1e-2,
            weight_decay: 1e-4,
            warmup_epochs: 1,
            optimizer: OptimizerKind::AdamW,
            prompt_dropout: 0.0,
            patience: None,
            sketch_samples: 100,
            method: TuningMethod::default(),
            distillation_weight: 0.0,
        }
    }
}

/// Whether the option has its default, so that it can be omitted.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// Adam with weight decay apart from the gradient.
    #[default]
    AdamW,
    /// Gradient descent with momentum 0.9 and weight decay as part of the gradient.
    Sgd,
}

/// A grid of learning rates and weight decays. All pairs are tried on held-out samples, and the
/// best is taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Grid {
    /// The learning rates to try; if empty, that of the options.
    pub prompt_learning_rates: Vec<f64>,
    /// The weight decays to try; if empty, that of the options.
    pub weight_decays: Vec<f64>,
}

impl Grid {
    /// The pairs of learning rate and weight decay, in the order in which they are tried.
    pub fn pairs(&self, options: &TuningOptions) -> Vec<(f64, f64)> {
        let or_own = |values: &[f64], own| match values {
            [] => vec![own],
            values => values.to_vec(),
        };
        let decays = or_own(&self.weight_decays, options.weight_decay);
        or_own(&self.prompt_learning_rates, options.prompt_learning_rate)
            .into_iter()
            .flat_map(|rate| decays.iter().map(move |decay| (rate, *decay)))
            .collect()
    }
}

/// One pair of the grid and its result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Candidate {
    pub prompt_learning_rate: f64,
    pub weight_decay: f64,
    /// Accuracy on the held-out samples; null if the losses did not stay finite.
    pub accuracy: Option<f64>,
    pub cross_entropy: Option<f64>,
}

/// The losses of each epoch so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Curves {
    /// Mean cross-entropy over each epoch, in nats.
    pub cross_entropy: Vec<f64>,
    /// The result on the held-out samples after each epoch; empty if none are held out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_out: Vec<HeldOut>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HeldOut {
    /// Mean cross-entropy in nats.
    pub cross_entropy: f64,
    pub accuracy: f64,
}

impl Curves {
    /// The last epoch of the curves; `None` before the first.
    pub fn last(&self) -> Option<Epoch> {
        Some(Epoch {
            epoch: self.cross_entropy.len(),
            cross_entropy: *self.cross_entropy.last()?,
            held_out: self.held_out.last().copied(),
        })
    }
}

/// One epoch's point of the curves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Epoch {
    /// The epoch's number, counted from 1.
    pub epoch: usize,
    /// Mean cross-entropy over the epoch, in nats.
    pub cross_entropy: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<HeldOut>,
}

/// A checkpoint exists but cannot be read now. Another attempt may read it; starting afresh would
/// lose work.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the last checkpoint cannot be read: {0}")]
pub struct CheckpointUnavailable(pub String);

/// The store of a tuning's last checkpoint.
pub trait Checkpoints {
    /// The last checkpoint; `None` if there is none, or no longer one.
    fn last(&mut self) -> Result<Option<Vec<u8>>, CheckpointUnavailable>;

    /// Stores the checkpoint after an epoch, in place of the one before. If it cannot be written,
    /// the tuning goes on.
    fn keep(&mut self, epoch: &Epoch, bytes: &[u8]);

    /// The checkpoints of the pair at this place of a grid. Each pair is a tuning of its own.
    fn of_pair(&mut self, _place: usize) -> Box<dyn Checkpoints + '_> {
        Box::new(NoCheckpoints)
    }
}

/// A store that keeps nothing.
pub struct NoCheckpoints;

impl Checkpoints for NoCheckpoints {
    fn last(&mut self) -> Result<Option<Vec<u8>>, CheckpointUnavailable> {
        Ok(None)
    }

    fn keep(&mut self, _: &Epoch, _: &[u8]) {}
}

// ---- Interface between worker and engine -------------------------------------------------------

/// The complete input of a tuning: files at hand, nothing to look up.
#[derive(Clone, Debug)]
pub struct TuningInput {
    /// The backbone's folder, as `promptweave_formats::backbone::Backbone::open` reads it.
    pub backbone_dir: PathBuf,
    /// The target dataset's folder, as `promptweave_formats::dataset::LabelledImages::read` reads
    /// it.
    pub target_dir: PathBuf,
    pub target: TargetSamples,
    /// Name of the task, which goes into the prompt file.
    pub task: String,
    pub start: Option<Source>,
    pub options: TuningOptions,
    pub grid: Grid,
}

/// A finished tuning.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// The answer. `result.tuned` holds the digest of `file`; the caller adds name and version.
    pub result: TuningResult,
    /// The bytes of the prompt file.
    pub file: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TuningResult {
    /// The options of the tuning. With a grid, they have the chosen learning rate and weight decay.
    pub options: TuningOptions,
    /// The pairs that were tried; empty without a grid.
    pub candidates: Vec<Candidate>,
    pub curves: Curves,
    /// ‖P - P₀‖ / ‖P₀‖, how far the prompt moved from its start; null if it started from zeros.
    pub distance_from_init: Option<f64>,
    /// The result of prompt and head on `eval_split`; null if none was given.
    pub evaluation: Option<HeldOut>,
    /// N, the number of images trained on. `num_classes` is K, the number of the dataset's classes.
    pub num_samples: usize,
    pub num_classes: usize,
    /// Number of held-out images, by which something was chosen; 0 if nothing was.
    pub num_held_out: usize,
    /// Number of unreadable images that were left out (`skip_unreadable`).
    pub skipped_images: usize,
    pub tuned: TunedPrompt,
    pub provenance: Provenance,
    /// Seconds spent in each phase.
    pub timings: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TunedPrompt {
    /// Name of the published prompt; null until it is published.
    pub prompt: Option<String>,
    pub version: Option<i32>,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
}

// ---- Ranges ----------------------------------------------------------------------------------

#[derive(Debug, thiserror::Error, PartialEq)]
#[error("`{field}` {problem}")]
pub struct InvalidTuning {
    pub field: &'static str,
    pub problem: String,
}

fn refuse(field: &'static str, problem: impl Into<String>) -> Result<(), InvalidTuning> {
    let problem = problem.into();
    Err(InvalidTuning { field, problem })
}

fn within<T: PartialOrd + Display>(
    field: &'static str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), InvalidTuning> {
    if range.contains(&value) {
        return Ok(());
    }
    let (least, most) = range.into_inner();
    refuse(
        field,
        format!("is {value}; it must lie in {least}..={most}"),
    )
}

/// Checks a learning rate or weight decay.
fn check_rate(field: &'static str, rate: f64) -> Result<(), InvalidTuning> {
    if rate.is_finite() && rate >= 0.0 {
        return Ok(());
    }
    refuse(
        field,
        format!("is {rate}; it must be finite and at least 0"),
    )
}

impl TuningOptions {
    pub fn check(&self) -> Result<(), InvalidTuning> {
        self.mistakes().into_iter().next().map_or(Ok(()), Err)
    }

    /// All mistakes in the options.
    pub fn mistakes(&self) -> Vec<InvalidTuning> {
        let checked = [
            within("num_tokens", self.num_tokens, 1..=MAX_TOKENS),
            within("epochs", self.epochs, 1..=MAX_EPOCHS),
            within("batch_size", self.batch_size, 1..=MAX_BATCH_SIZE),
            check_rate("prompt_learning_rate", self.prompt_learning_rate),
            check_rate("head_learning_rate", self.head_learning_rate),
            check_rate("weight_decay", self.weight_decay),
            check_rate("distillation_weight", self.distillation_weight),
            self.check_warmup(),
            self.check_dropout(),
            match self.patience {
                Some(0) => refuse("patience", "is 0; it must be at least 1"),
                _ => Ok(()),
            },
            within(
                "sketch_samples",
                self.sketch_samples,
                0..=MAX_SKETCH_SAMPLES,
            ),
        ];
        checked.into_iter().filter_map(Result::err).collect()
    }

    fn check_warmup(&self) -> Result<(), InvalidTuning> {
        let (warmup, epochs) = (self.warmup_epochs, self.epochs);
        if warmup <= epochs {
            return Ok(());
        }
        let problem = format!("is {warmup}; with {epochs} epochs it can be {epochs} at most");
        refuse("warmup_epochs", problem)
    }

    fn check_dropout(&self) -> Result<(), InvalidTuning> {
        let dropout = self.prompt_dropout;
        if (0.0..1.0).contains(&dropout) {
            return Ok(());
        }
        let problem = format!("is {dropout}; it must be at least 0 and below 1");
        refuse("prompt_dropout", problem)
    }
}

impl Grid {
    pub fn check(&self) -> Result<(), InvalidTuning> {
        let pairs = self.prompt_learning_rates.len().max(1) * self.weight_decays.len().max(1);
        if pairs > MAX_PAIRS {
            let problem =
                format!("makes {pairs} pairs with `weight_decays`; {MAX_PAIRS} are the most");
            return refuse("prompt_learning_rates", problem);
        }
        for rate in &self.prompt_learning_rates {
            check_rate("prompt_learning_rates", *rate)?;
        }
        for decay in &self.weight_decays {
            check_rate("weight_decays", *decay)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Results files and checkpoints are told apart by these bytes.
    #[test]
    fn what_is_not_asked_for_is_left_out_of_the_record() {
        let text = serde_json::to_string(&TuningOptions::default()).unwrap();
        assert_eq!(
            text,
            r#"{"num_tokens":10,"init_seed":0,"seed":0,"epochs":10,"batch_size":32,"prompt_learning_rate":0.002,"head_learning_rate":0.01,"weight_decay":0.0001,"warmup_epochs":1,"sketch_samples":100}"#
        );
        let asked = json!({"optimizer": "sgd", "prompt_dropout": 0.1, "patience": 3});
        let options: TuningOptions = serde_json::from_value(asked).unwrap();
        let text = serde_json::to_string(&options).unwrap();
        assert!(
            text.ends_with(
                r#","optimizer":"sgd","prompt_dropout":0.1,"patience":3,"sketch_samples":100}"#
            ),
            "{text}"
        );
        assert!(serde_json::from_value::<TuningOptions>(json!({"epoch": 3})).is_err());
    }

    #[test]
    fn a_value_out_of_its_range_is_refused_by_its_name() {
        assert_eq!(TuningOptions::default().check(), Ok(()));
        for (field, value) in [
            ("num_tokens", json!(0)),
            ("epochs", json!(0)),
            ("epochs", json!(1001)),
            ("batch_size", json!(0)),
            ("prompt_learning_rate", json!(-0.1)),
            ("head_learning_rate", json!(-1)),
            ("weight_decay", json!(-1)),
            ("warmup_epochs", json!(11)),
            ("prompt_dropout", json!(1.0)),
            ("patience", json!(0)),
            ("sketch_samples", json!(10_001)),
        ] {
            let options: TuningOptions = serde_json::from_value(json!({field: value})).unwrap();
            assert_eq!(options.check().unwrap_err().field, field);
        }
        let grid = |rates: &[f64], decays: &[f64]| Grid {
            prompt_learning_rates: rates.to_vec(),
            weight_decays: decays.to_vec(),
        };
        assert_eq!(grid(&[], &[]).check(), Ok(()));
        for (rates, decays, field) in [
            (&[0.1, f64::NAN][..], &[][..], "prompt_learning_rates"),
            (&[], &[-1.0], "weight_decays"),
            (&[0.1; 9], &[0.1; 8], "prompt_learning_rates"),
        ] {
            assert_eq!(grid(rates, decays).check().unwrap_err().field, field);
        }
    }

    #[test]
    fn a_grid_has_all_pairs_and_the_options_own_value_where_it_names_none() {
        let options = TuningOptions::default();
        let grid = Grid {
            prompt_learning_rates: vec![0.1, 0.2],
            weight_decays: vec![],
        };
        assert_eq!(grid.pairs(&options), [(0.1, 1e-4), (0.2, 1e-4)]);
        assert_eq!(Grid::default().pairs(&options), [(2e-3, 1e-4)]);
    }
}

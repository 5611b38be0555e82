//! The record of a tuning in the file that it made.

use serde::{Deserialize, Serialize, Serializer};

use crate::digest::Digest;
use crate::prompt_file::PromptMetadata;
use crate::tuning::{Curves, TuningOptions};
use crate::tuning_method::TuningMethod;

/// The training record. It has no times, so that the same content gives the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingRecord {
    pub num_samples: usize,
    #[serde(flatten, serialize_with = "with_method")]
    pub options: TuningOptions,
    /// Digest of the prompt file that the tuning began with, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Digest>,
    /// Digests of the prompt files whose logits the loss pulled towards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub teachers: Vec<Digest>,
    /// The losses of each epoch.
    #[serde(flatten)]
    pub curves: Curves,
    /// ‖θ - θ₀‖ / ‖θ₀‖ of everything that is trained beside the head: how far the prompt moved from
    /// its initial values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distance_from_init: Option<f64>,
}

/// Writes the method always. The options alone leave out the default.
fn with_method<S: Serializer>(options: &TuningOptions, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct WithMethod<'a> {
        method: TuningMethod,
        #[serde(flatten)]
        options: &'a TuningOptions,
    }
    let method = options.method;
    WithMethod { method, options }.serialize(serializer)
}

impl TrainingRecord {
    /// The record in a prompt file's metadata. `None` if the file was not tuned by promptweave.
    pub fn of(metadata: &PromptMetadata) -> Option<Self> {
        serde_json::from_value(metadata.training.clone()?).ok()
    }

    /// The record as it stands in a file, with its keys in order.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("plain data")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(training: serde_json::Value) -> Option<TrainingRecord> {
        TrainingRecord::of(&PromptMetadata {
            training: Some(training),
            ..PromptMetadata::unknown()
        })
    }

    /// Prompt files are told apart by these bytes.
    #[test]
    fn a_record_is_written_with_its_method_and_reads_back() {
        let record = TrainingRecord {
            num_samples: 6,
            options: TuningOptions::default(),
            start: None,
            teachers: Vec::new(),
            curves: Curves {
                cross_entropy: vec![0.5, 0.25],
                held_out: Vec::new(),
            },
            distance_from_init: None,
        };
        assert_eq!(
            record.to_json().to_string(),
            r#"{"batch_size":32,"cross_entropy":[0.5,0.25],"epochs":10,"head_learning_rate":0.01,"init_seed":0,"method":"vpt-shallow","num_samples":6,"num_tokens":10,"prompt_learning_rate":0.002,"seed":0,"sketch_samples":100,"warmup_epochs":1,"weight_decay":0.0001}"#
        );
        assert_eq!(read(record.to_json()), Some(record.clone()));
        let deep = TrainingRecord {
            options: TuningOptions {
                method: TuningMethod::VptDeep,
                patience: Some(2),
                ..record.options.clone()
            },
            start: Some(Digest::of(b"start")),
            teachers: vec![Digest::of(b"teacher")],
            distance_from_init: Some(0.1),
            ..record
        };
        assert_eq!(deep.to_json()["method"], "vpt-deep");
        assert_eq!(read(deep.to_json()), Some(deep));
        assert_eq!(read(json!({"epochs": 3})), None);
    }
}

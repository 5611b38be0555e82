//! The file of a method that makes no prompt: the trained tensors as safetensors, with the names of
//! [`crate::tune::network`] and of the head. Its one metadata key, `promptweave`, holds the
//! backbone, the task and the training record.

use std::collections::HashMap;

use safetensors::serialize;
use serde::Serialize;

use crate::error::EngineError;
use crate::tune::{Trained, stored};
use promptweave_domain::digest::Digest;
use promptweave_domain::prompt_file::METADATA_KEY;
use promptweave_domain::tensor::Stored;
use promptweave_domain::training_record::TrainingRecord;

const FORMAT: u32 = 1;

#[derive(Serialize)]
struct Metadata<'a> {
    adaptation_format: u32,
    backbone_digest: Digest,
    preprocessing_id: String,
    task: &'a str,
    classes: &'a [String],
    training: TrainingRecord,
}

impl Trained<'_> {
    pub fn adaptation(&self) -> Result<Vec<u8>, EngineError> {
        let mut tensors = Vec::new();
        let mut add = |name: String, tensor: &tch::Tensor| -> Result<(), EngineError> {
            tensors.push((name, Stored::from(&stored(tensor)?)));
            Ok(())
        };
        for (initial, tuned) in self.initial.iter().zip(&self.parameters) {
            add(initial.name.clone(), tuned)?;
        }
        for (layer, (mean, variance)) in self.model.statistics(&self.parameters).iter().enumerate()
        {
            add(format!("head.hidden.{layer}.norm.mean"), mean)?;
            add(format!("head.hidden.{layer}.norm.variance"), variance)?;
        }
        let metadata = Metadata {
            adaptation_format: FORMAT,
            backbone_digest: self.tuning.backbone.digest,
            preprocessing_id: self.tuning.backbone.config.preprocessing.id(),
            task: self.tuning.task,
            classes: self.tuning.classes,
            training: self.record()?,
        };
        // `Value` has maps sorted by key.
        let json = serde_json::to_value(metadata)
            .expect("plain data")
            .to_string();
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), json)]);
        Ok(serialize(tensors, Some(metadata)).expect("shapes agree with their data"))
    }
}

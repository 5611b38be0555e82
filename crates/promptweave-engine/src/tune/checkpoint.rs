//! A checkpoint in the middle of a tuning, with everything needed to reach the very same prompt.
//!
//! The file is safetensors: the parameters, and one tensor for each part of the optimizer's state.
//! Its one metadata key holds JSON with the finished epochs and the key of the tuning.

use std::collections::HashMap;

use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::EngineError;
use crate::tensors::plain;
use crate::tune::optimizer::Optimizer;
use promptweave_domain::digest::Digest;
use promptweave_domain::prompt_file::METADATA_KEY;
use promptweave_domain::tensor::{Stored, Tensor as PlainTensor, read_f32};
use promptweave_domain::tuning::Curves;

/// The JSON that is written after an epoch.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    /// Digest of everything that the tuning depends on. The checkpoint fits only that tuning.
    of: Digest,
    curves: Curves,
    steps: i64,
}

/// The state of a tuning between two epochs.
pub struct Progress {
    pub parameters: Vec<Tensor>,
    pub optimizer: Optimizer,
    pub curves: Curves,
    /// Parameters after the epoch with the lowest cross-entropy on held-out samples. Without
    /// held-out samples they stay as at first.
    pub best: Vec<Tensor>,
}

impl Progress {
    /// All tensors of the state, by name.
    fn tensors(&mut self) -> Vec<(String, &mut Tensor)> {
        let mut all = Vec::new();
        let rows = [
            ("parameter".to_owned(), &mut self.parameters),
            ("best".to_owned(), &mut self.best),
        ];
        let moments = self.optimizer.state.iter_mut().enumerate();
        let moments = moments.map(|(moment, tensors)| (format!("moment.{moment}"), tensors));
        for (row, tensors) in rows.into_iter().chain(moments) {
            for (at, tensor) in tensors.iter_mut().enumerate() {
                all.push((format!("{row}.{at}"), tensor));
            }
        }
        all
    }
}

/// The bytes of the checkpoint file.
pub fn write(of: Digest, progress: &mut Progress) -> Result<Vec<u8>, EngineError> {
    let header = Header {
        of,
        curves: progress.curves.clone(),
        steps: progress.optimizer.steps,
    };
    let mut tensors = Vec::new();
    for (name, tensor) in progress.tensors() {
        let shape: Vec<usize> = tensor.size().iter().map(|size| *size as usize).collect();
        tensors.push((name, Stored::from(&PlainTensor::new(shape, plain(tensor)?))));
    }
    let json = serde_json::to_string(&header).expect("plain data");
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), json)]);
    Ok(safetensors::serialize(tensors, Some(metadata)).expect("shapes agree with their data"))
}

/// Sets `progress` to the file's state. Returns false, and changes nothing, if the file belongs to
/// another tuning or is not whole.
pub fn read(of: Digest, bytes: &[u8], progress: &mut Progress) -> bool {
    let Some(header) = header(bytes).filter(|header| header.of == of) else {
        return false;
    };
    let Ok(file) = SafeTensors::deserialize(bytes) else {
        return false;
    };
    let there = |(name, like): &(String, &mut Tensor)| -> Option<Tensor> {
        let values = read_f32(&file.tensor(name).ok()?)?;
        let fits = values.len() == like.numel();
        fits.then(|| {
            Tensor::from_slice(&values)
                .view(like.size().as_slice())
                .to_device(like.device())
        })
    };
    let mut tensors = progress.tensors();
    let Some(read) = tensors.iter().map(there).collect::<Option<Vec<_>>>() else {
        return false;
    };
    for ((_, tensor), read) in tensors.iter_mut().zip(read) {
        **tensor = read;
    }
    progress.optimizer.steps = header.steps;
    progress.curves = header.curves;
    true
}

fn header(bytes: &[u8]) -> Option<Header> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    serde_json::from_str(header.metadata().as_ref()?.get(METADATA_KEY)?).ok()
}

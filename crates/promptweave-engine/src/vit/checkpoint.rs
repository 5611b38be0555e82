//! A backbone's tensors by timm name, on the engine's device and in its kind.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use promptweave_formats::backbone::Backbone;

/// Tensors that are not yet taken into a model.
pub struct Checkpoint {
    tensors: HashMap<String, Tensor>,
    device: Device,
    kind: Kind,
}

impl Checkpoint {
    /// Loads the tensors. [`Backbone::open`] has checked their names, shapes and dtypes.
    pub fn load(backbone: &Backbone, device: Device, kind: Kind) -> Result<Self, EngineError> {
        let tensors = Tensor::read_safetensors(backbone.model_path())?
            .into_iter()
            .collect();
        Ok(Self {
            tensors,
            device,
            kind,
        })
    }

    pub fn take(&mut self, name: &str) -> Result<Tensor, EngineError> {
        self.take_optional(name)?.ok_or_else(|| {
            EngineError::Backbone(promptweave_formats::backbone::BackboneError::MissingTensor(
                name.to_owned(),
            ))
        })
    }

    pub fn take_optional(&mut self, name: &str) -> Result<Option<Tensor>, EngineError> {
        let Some(tensor) = self.tensors.remove(name) else {
            return Ok(None);
        };
        Ok(Some(tensor.f_to_device(self.device)?.f_to_kind(self.kind)?))
    }
}

//! Prompt-induced features f_P of every sample, for every prompt.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use super::EngineError;
use super::samples::Samples;
use super::vit::Vit;

/// Features [M, N, d] in f32 on the CPU, for M prompts [m, d]. `progress` hears how many sample ×
/// prompt pairs each step finished.
pub fn extract(
    vit: &Vit,
    samples: &Samples,
    prompts: &[Tensor],
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<Tensor, EngineError> {
    let _no_grad = tch::no_grad_guard();
    let mut batches = Vec::new();
    for rows in samples.micro_batches(vit.micro_batch(prompts)) {
        let patch_tokens = vit.patch_tokens(&samples.images(&rows, vit)?);
        let mut of_batch = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            of_batch.push(vit.features(&patch_tokens, Some(prompt)));
            if progress(rows.len() as u64).is_break() {
                return Err(EngineError::Stopped);
            }
        }
        batches.push(
            Tensor::stack(&of_batch, 0)
                .to_device(Device::Cpu)
                .to_kind(storage(vit.kind)),
        );
    }
    let features = Tensor::cat(&batches, 1);
    if !bool::try_from(features.isfinite().all()).expect("one value") {
        return Err(EngineError::NotFinite("features"));
    }
    Ok(features)
}

/// Features are kept in f32; a model in f64 (tests) keeps its precision.
fn storage(kind: Kind) -> Kind {
    if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}

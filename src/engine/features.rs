//! Prompt-induced features f_P of every sample, for every prompt.

use std::ops::ControlFlow;

use tch::{Device, Tensor};

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
    let mut batches = Vec::new();
    vit.each_micro_batch(
        &vit.pairs(samples, prompts),
        || (),
        |(), batch| Ok(batch.features()?.to_device(Device::Cpu)),
        |_, features| {
            batches.push(features);
            Ok(())
        },
        &mut progress,
    )?;
    let features = Tensor::cat(&batches, 1);
    if !bool::try_from(features.isfinite().all()).expect("one value") {
        return Err(EngineError::NotFinite("features"));
    }
    Ok(features)
}

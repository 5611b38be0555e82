//! Prompt-induced features f_P of every sample, for every prompt.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::vit::Vit;
use crate::vit::streams::Pairs;

/// Features [M, N, d] on the CPU, for M prompts [m, d] and the N samples of `pairs` in their order.
/// They are in f32, or in f64 if the model is. `progress` gets the number of sample × prompt pairs
/// that each step finished.
pub fn extract(
    vit: &Vit,
    pairs: &Pairs<'_>,
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<Tensor, EngineError> {
    let (m, n) = (pairs.prompts.len() as i64, pairs.num_samples() as i64);
    let d = vit.config.embed_dim as i64;
    let kind = match vit.kind {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    };
    // Allocated first: small tensors that outlive a micro-batch would lie between its large ones,
    // and fragment their memory.
    let features = Tensor::empty([m, n, d], (kind, Device::Cpu));
    let mut done = 0;
    vit.each_micro_batch(
        pairs,
        || (),
        |(), batch| batch.features(),
        |rows, of_batch| {
            if !bool::try_from(of_batch.isfinite().all())? {
                return Err(EngineError::NotFinite("features"));
            }
            let size = rows.len() as i64;
            features.narrow(1, done, size).f_copy_(&of_batch)?;
            done += size;
            Ok(())
        },
        &mut progress,
    )?;
    Ok(features)
}

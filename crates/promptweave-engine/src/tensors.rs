//! Conversions between plain numbers and tensors.

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::vit::Vit;
use promptweave_domain::tensor::Tensor as PlainTensor;

/// The Cholesky factor L of a positive definite matrix [d, d] = L Lᵀ. `what` names the matrix in
/// the error if it is not positive definite.
pub(crate) fn cholesky(matrix: &Tensor, what: &'static str) -> Result<Tensor, EngineError> {
    let (factor, failed_at) = matrix.f_linalg_cholesky_ex(false, false)?;
    match i64::try_from(failed_at)? {
        0 => Ok(factor),
        _ => Err(EngineError::NotFinite(what)),
    }
}

/// A tensor's values in row-major order, as files store them.
pub(crate) fn plain(tensor: &Tensor) -> Result<Vec<f32>, EngineError> {
    let flat = tensor
        .detach()
        .to_device(Device::Cpu)
        .to_kind(Kind::Float)
        .flatten(0, -1);
    Ok(Vec::try_from(flat)?)
}

/// A prompt [m, d] on the model's device.
pub fn prompt_tensor(prompt: &PlainTensor<f32>, vit: &Vit) -> Tensor {
    let shape: Vec<i64> = prompt.shape.iter().map(|s| *s as i64).collect();
    Tensor::from_slice(&prompt.values)
        .view(shape.as_slice())
        .to_device(vit.device)
        .to_kind(vit.kind)
}

//! Square RGB pixels to the backbone's normalised input.

use tch::{Device, Kind, Tensor};

use promptweave_domain::backbone::Preprocessing;

/// A batch of images, each size × size × 3 bytes, → [B, 3, size, size]: x/255, then (x - mean)/std.
pub fn to_tensor(
    pixels: &[&[u8]],
    preprocessing: &Preprocessing,
    device: Device,
    kind: Kind,
) -> Tensor {
    let size = preprocessing.size as i64;
    let bytes = pixels.concat();
    let raw = Tensor::from_data_size(&bytes, &[pixels.len() as i64, size, size, 3], Kind::Uint8);
    let channel = |values: &[f64; 3]| Tensor::from_slice(values).to_device(device).to_kind(kind);
    let scaled = raw.to_device(device).to_kind(kind) / 255.0;
    let normalised = (scaled - channel(&preprocessing.mean)) / channel(&preprocessing.std);
    normalised.permute([0, 3, 1, 2]).contiguous()
}

//! The file of a shard: features of its samples, or sums over their gradients. It is safetensors
//! without metadata. The reader knows which shard it belongs to, and its digest proves it whole.
//!
//! | tensor | shape | dtype | |
//! |---|---|---|---|
//! | `features` | `[M, n, d]` | f32 or f64 | of the shard's n samples, in order |
//! | `products` | `[J, T', P]` | f64 | sums fold by fold, as [`GradientStatistics`] has them |
//! | `sums`, `squares` | `[J, M, P]` | f64 | |
//! | `counts` | `[J]` | i64 | samples in each fold |

use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::score::gradients::GradientStatistics;
use crate::statistics::{File, StatisticsError};
use promptweave_domain::tensor::{Element, Stored, Tensor as PlainTensor};

/// Writes the file of features [M, n, d].
pub fn of_features(features: &Tensor) -> Result<Vec<u8>, EngineError> {
    let stored = match features.kind() {
        Kind::Double => stored::<f64>(features)?,
        _ => stored::<f32>(features)?,
    };
    Ok(written(vec![("features", stored)]))
}

/// Reads features [M, n, d] from their file.
pub fn features(bytes: &[u8], [m, n, d]: [usize; 3]) -> Result<Tensor, EngineError> {
    let file = read(bytes)?;
    let file = File(&file);
    let shape = [m as i64, n as i64, d as i64];
    let values = if file.view("features")?.dtype() == Dtype::F64 {
        Tensor::from_slice(&file.numbers("features", &[m, n, d])?)
    } else {
        Tensor::from_slice(&file.floats("features", [Some(m), Some(n), Some(d)])?.0)
    };
    Ok(values.view(shape))
}

/// Writes the file of a shard's sums.
pub fn of_gradients(statistics: &GradientStatistics) -> Result<Vec<u8>, EngineError> {
    // Sums that are not finite are refused here, where another worker may do better, rather than at
    // the reader.
    for sums in [&statistics.products, &statistics.squares] {
        if !bool::try_from(sums.isfinite().all())? {
            return Err(EngineError::NotFinite("the prompts' gradients"));
        }
    }
    let counts: Vec<i64> = statistics.counts.iter().map(|n| *n as i64).collect();
    let counts = PlainTensor::new([counts.len()], counts);
    Ok(written(vec![
        ("products", stored::<f64>(&statistics.products)?),
        ("sums", stored::<f64>(&statistics.sums)?),
        ("squares", stored::<f64>(&statistics.squares)?),
        ("counts", Stored::from(&counts)),
    ]))
}

/// Adds a shard's sums from their file to those of the same prompts and folds.
pub fn add_gradients(to: &mut GradientStatistics, bytes: &[u8]) -> Result<(), EngineError> {
    let file = read(bytes)?;
    let file = File(&file);
    let numbers = |name, like: &Tensor| {
        let shape: Vec<usize> = like.size().iter().map(|size| *size as usize).collect();
        let values = Tensor::from_slice(&file.numbers(name, &shape)?);
        Ok::<_, StatisticsError>(values.view(like.size().as_slice()).to_device(like.device()))
    };
    let shard = GradientStatistics {
        products: numbers("products", &to.products)?,
        sums: numbers("sums", &to.sums)?,
        squares: numbers("squares", &to.squares)?,
        counts: file.whole("counts", Some(to.counts.len()))?,
    };
    to.merge(&shard);
    Ok(())
}

fn stored<T: Element + tch::kind::Element>(tensor: &Tensor) -> Result<Stored, EngineError> {
    let shape: Vec<usize> = tensor.size().iter().map(|size| *size as usize).collect();
    let flat = tensor.to_device(Device::Cpu).flatten(0, -1);
    let mut values = vec![T::ZERO; flat.numel()];
    flat.f_copy_data(&mut values, flat.numel())?;
    Ok(Stored::from(&PlainTensor::new(shape, values)))
}

fn written(tensors: Vec<(&str, Stored)>) -> Vec<u8> {
    safetensors::serialize(tensors, None).expect("shapes agree with their data")
}

fn read(bytes: &[u8]) -> Result<SafeTensors<'_>, StatisticsError> {
    SafeTensors::deserialize(bytes).map_err(StatisticsError::Unreadable)
}

//! The rates of matrix products in floating-point operations per second, which the engine's times are compared with.

use std::time::{Duration, Instant};

use serde::Serialize;
use tch::{Cuda, Device, Kind, TchError, Tensor};

use promptweave_engine::device::allow_tf32;

/// The shape of an MLP's first product in a ViT-S, [tokens, d] × [d, 4d], for some images at 98 px.
const ON_CPU: [i64; 3] = [1536, 384, 1536];
/// The shape of the same product in a ViT-B, for 64 images at 224 px.
const ON_CUDA: [i64; 3] = [12608, 768, 3072];
/// The best product within this time counts, because other programs may use the machine.
const MEASURED: Duration = Duration::from_millis(500);

#[derive(Clone, Debug, Serialize)]
pub struct Rate {
    /// Precision: `f32`, `tf32` or `bf16`.
    pub precision: &'static str,
    /// CPU threads; none on a GPU.
    pub threads: Option<i32>,
    pub gflop_per_s: f64,
    /// [rows, inner, columns] of the product.
    pub shape: [i64; 3],
}

/// Measures the CPU on one thread and on all of libtorch's threads.
pub fn of_cpu() -> Result<Vec<Rate>, TchError> {
    let all = tch::get_num_threads();
    let mut rates = Vec::new();
    for threads in if all > 1 { vec![1, all] } else { vec![1] } {
        tch::set_num_threads(threads);
        for (precision, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
            rates.push(Rate {
                precision,
                threads: Some(threads),
                gflop_per_s: measure(Device::Cpu, kind, ON_CPU, 1)?,
                shape: ON_CPU,
            });
        }
    }
    tch::set_num_threads(all);
    Ok(rates)
}

/// Measures a GPU in f32 with and without TF32, and in bf16.
pub fn of_cuda(index: usize) -> Result<Vec<Rate>, TchError> {
    let device = Device::Cuda(index);
    let mut rates = Vec::new();
    for (precision, kind, tf32) in [
        ("f32", Kind::Float, false),
        ("tf32", Kind::Float, true),
        ("bf16", Kind::BFloat16, false),
    ] {
        if allow_tf32(tf32).is_err() {
            continue;
        }
        rates.push(Rate {
            precision,
            threads: None,
            // Several launches are timed together, because waiting for each would take time itself.
            gflop_per_s: measure(device, kind, ON_CUDA, 20)?,
            shape: ON_CUDA,
        });
    }
    Ok(rates)
}

fn measure(device: Device, kind: Kind, shape: [i64; 3], products: usize) -> Result<f64, TchError> {
    let [rows, inner, columns] = shape;
    let random = |shape: [i64; 2]| Tensor::f_randn(shape, (Kind::Float, device))?.f_to_kind(kind);
    let (a, b) = (random([rows, inner])?, random([inner, columns])?);
    let mut out = a.f_matmul(&b)?;
    let mut once = || -> Result<Duration, TchError> {
        finish(device);
        let start = Instant::now();
        for _ in 0..products {
            out = a.f_matmul_out(&out, &b)?;
        }
        finish(device);
        Ok(start.elapsed())
    };
    // The first products choose their kernels.
    once()?;
    let (start, mut best) = (Instant::now(), Duration::MAX);
    while start.elapsed() < MEASURED {
        best = best.min(once()?);
    }
    let operations = (2 * rows * inner * columns) as f64 * products as f64;
    Ok(operations / best.as_secs_f64() / 1e9)
}

fn finish(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

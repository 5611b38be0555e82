//! A frozen Vision Transformer with prompt insertion, and the ways to pass images and prompts
//! through it.
//!
//! | path | where | what |
//! |---|---|---|
//! | [`plain`] | on demand | the definition as it is written; the others must equal it |
//! | [`shared`] | GPU | nothing twice, prompts × images on one batch axis, automatic differentiation |
//! | [`fused`] | CPU | nothing twice, single passes between products, derivative by hand; one thread a stream |
//!
//! Images go through in micro-batches, which [`crate::vit::streams`] deals to the streams.

pub mod backbones;
pub mod checkpoint;
pub mod features;
#[cfg(test)]
mod reference_tests;
pub mod streams;

mod attention;
mod buffers;
pub mod flops;
mod fold_weights;
mod fused;
mod kernels;
mod plain;
mod shared;
mod weights;

use std::cell::RefCell;
use std::ops::Range;

use rayon::ThreadPool;
use tch::{Device, Kind, Tensor};

use self::buffers::{Widths, bytes_a_token};
use self::fused::Fused;
use self::kernels::{Bf16, Element};
use self::plain::Plain;
use self::shared::Shared;
pub use self::weights::Weights;
use crate::device::memory::available_bytes;
use crate::device::{allow_cudnn_attention, allow_tf32};
use crate::error::EngineError;
use crate::vit::streams::{Stream, threads_for};
use promptweave_domain::backbone::BackboneConfig;
use promptweave_domain::precision::Precision;
use promptweave_formats::backbone::Backbone;

/// Computes ∂ℓ/∂f [B, d] from the prompt's number and its f [B, d]. Every row is by its own
/// sample's loss.
pub type FeatureGradient<'a> = dyn FnMut(usize, &Tensor) -> Result<Tensor, EngineError> + 'a;

/// A way to pass images and prompts through the backbone. What is the same for all images is
/// computed when the prompts are taken; what is the same for all prompts, when the images are.
pub trait Pass: Send {
    /// Takes prompts [m, d], m ≥ 0.
    fn take_prompts(&mut self, prompts: &[Tensor]);

    /// Takes a micro-batch of normalised images [B, 3, s, s].
    fn take_images(&mut self, images: &Tensor);

    /// The features f [G, B, d] of a range of G prompts.
    fn features(&mut self, prompts: Range<usize>) -> Tensor;

    /// ∂ℓ/∂P of every image, [G, B, m, d]. The loss is given by its derivative by f.
    fn gradients(
        &mut self,
        prompts: Range<usize>,
        slope: &mut FeatureGradient<'_>,
    ) -> Result<Tensor, EngineError>;
}

/// The devices, the precision and the paths to compute with.
#[derive(Clone, Debug, PartialEq)]
pub struct Compute {
    /// One or more devices, all CPU or all CUDA.
    pub devices: Vec<Device>,
    pub precision: Precision,
    /// Number of threads on a CPU, over all streams together.
    pub threads: usize,
    /// Use one stream whose products take all threads, instead of one stream for each thread. It is
    /// there to compare the two.
    pub wide: bool,
    /// Compute by the definition, with all threads on one stream.
    pub plain: bool,
    /// The most images in a micro-batch.
    pub largest_micro_batch: usize,
}

impl Compute {
    /// All of this machine's CPU, or this device.
    pub fn on(device: Device, precision: Precision) -> Self {
        Self::over(vec![device], precision)
    }

    pub fn over(devices: Vec<Device>, precision: Precision) -> Self {
        Self {
            devices,
            precision,
            threads: usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1),
            wide: false,
            plain: false,
            largest_micro_batch: usize::MAX,
        }
    }

    pub fn device(&self) -> Device {
        self.devices[0]
    }

    /// Number of streams on a CPU: one for each thread, or fewer if the available memory is less
    /// than twice what they take.
    fn num_streams(&self) -> usize {
        if self.wide || self.plain {
            return 1;
        }
        let fit = available_bytes().map_or(usize::MAX, |bytes| bytes as usize / (2 * CPU_BYTES));
        self.threads.min(fit).max(1)
    }
}

/// The number of images and prompts that go through at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    pub images: usize,
    /// The number of prompts, out of all.
    pub prompts: usize,
}

pub struct Vit {
    pub config: BackboneConfig,
    pub compute: Compute,
    /// The device and the kind (f32 or f64) of prompts and images.
    pub device: Device,
    pub kind: Kind,
    pub(crate) streams: RefCell<Vec<Stream>>,
    /// One thread for each stream.
    pub(crate) threads: ThreadPool,
}

impl Vit {
    pub fn load(backbone: &Backbone, compute: &Compute) -> Result<Self, EngineError> {
        let kind = residual_kind(compute.precision);
        if compute.device() != Device::Cpu
            && let Err(error) = allow_tf32(compute.precision == Precision::F32)
                .and_then(|()| allow_cudnn_attention(false))
        {
            tracing::warn!(%error, "libtorch's switches for CUDA stay as they are");
        }
        let mut streams = Vec::new();
        for device in &compute.devices {
            let weights = Weights::load(backbone, *device, kind)?;
            let passes = passes(weights, *device, compute);
            let threads = match device {
                Device::Cpu => (compute.threads / passes.len()).max(1),
                _ => 1,
            };
            streams.extend(passes.into_iter().map(|pass| Stream {
                device: *device,
                kind,
                threads,
                pass,
            }));
        }
        Ok(Self {
            config: backbone.config.clone(),
            compute: compute.clone(),
            device: compute.device(),
            kind,
            threads: threads_for(streams.len())?,
            streams: RefCell::new(streams),
        })
    }

    /// d, the width of tokens and features.
    pub fn embed_dim(&self) -> i64 {
        self.config.embed_dim as i64
    }

    pub fn num_streams(&self) -> usize {
        self.streams.borrow().len()
    }

    /// How much to pass forward and backward at once. It is about a second of work, so that a stop
    /// is noticed in time, and no more activations than a modest machine holds. It depends only on
    /// the model and the kind of device, so that equal inputs are cut equally everywhere.
    pub fn batch(&self, prompts: &[Tensor]) -> Batch {
        let BackboneConfig {
            embed_dim: d,
            depth,
            patch_size,
            ..
        } = self.config;
        let grid = self.config.preprocessing.size / patch_size;
        let num_tokens = prompts
            .first()
            .map_or(0, |prompt| prompt.size()[0] as usize);
        let n = 1 + num_tokens + grid * grid;
        // A block's forward pass is 12nd² + 2n²d multiply-adds, its backward pass 12nd² + 4n²d.
        let flops = 2 * depth * (24 * n * d * d + 6 * n * n * d);
        let largest = self.compute.largest_micro_batch.max(1);
        if self.device == Device::Cpu {
            // Products of about a thousand rows run at full speed, and their rows stay in the
            // caches.
            let widths = Widths {
                depth,
                d,
                hidden: 4 * d,
                num_heads: self.config.num_heads,
            };
            let image = n * bytes_a_token(widths, n, size_of::<f32>());
            let images = (CPU_ROWS / n).min(CPU_FLOPS / flops).min(CPU_BYTES / image);
            let images = images.max(1);
            return Batch {
                images: images.min(largest),
                prompts: 1,
            };
        }
        // Automatic differentiation keeps about 34 bytes for each token, channel and block.
        let pairs = (CUDA_BYTES / (depth * 34 * n * d)).min(CUDA_FLOPS / flops);
        let images = pairs.clamp(1, 64).min(largest);
        Batch {
            images,
            prompts: (pairs / images).clamp(1, prompts.len().max(1)),
        }
    }
}

const CPU_ROWS: usize = 1000;
/// The most floating-point operations of a micro-batch with one prompt, forward and backward.
const CPU_FLOPS: usize = 400_000_000_000;
/// The most bytes of a stream's buffers.
const CPU_BYTES: usize = 512 << 20;
const CUDA_BYTES: usize = 16 << 30;
const CUDA_FLOPS: usize = 100_000_000_000_000;

/// The kind of images, prompts and the residual stream.
fn residual_kind(precision: Precision) -> Kind {
    match precision {
        Precision::F64 => Kind::Double,
        Precision::F32 | Precision::Bf16 => Kind::Float,
    }
}

/// The kind of the matrix products.
fn product_kind(precision: Precision) -> Kind {
    match precision {
        Precision::Bf16 => Kind::BFloat16,
        Precision::F32 | Precision::F64 => residual_kind(precision),
    }
}

/// One pass for each stream of this device.
fn passes(weights: Weights, device: Device, compute: &Compute) -> Vec<Box<dyn Pass>> {
    if compute.plain {
        return vec![Box::new(Plain::new(weights))];
    }
    // A single block is first and last at once. The fast path on a CPU does not support it, so the
    // other takes it.
    if device != Device::Cpu || weights.blocks.len() == 1 {
        let kind = product_kind(compute.precision);
        return vec![Box::new(Shared::new(weights, kind))];
    }
    fn fused<E: Element>(weights: &Weights, count: usize) -> Vec<Box<dyn Pass>> {
        let first = Fused::<E>::new(weights);
        let another = (1..count).map(|_| Box::new(first.another()) as Box<dyn Pass>);
        let mut all: Vec<_> = another.collect();
        all.push(Box::new(first));
        all
    }
    let count = compute.num_streams();
    match compute.precision {
        Precision::F32 => fused::<f32>(&weights, count),
        Precision::Bf16 => fused::<Bf16>(&weights, count),
        Precision::F64 => fused::<f64>(&weights, count),
    }
}

/// Every path through a backbone, by name.
#[cfg(test)]
pub fn all_paths(backbone: &Backbone, precision: Precision) -> Vec<(&'static str, Box<dyn Pass>)> {
    let compute = Compute::on(Device::Cpu, precision);
    let kind = residual_kind(precision);
    let products = product_kind(precision);
    let weights = || Weights::load(backbone, Device::Cpu, kind).unwrap();
    vec![
        ("plain", Box::new(Plain::new(weights()))),
        ("shared", Box::new(Shared::new(weights(), products))),
        (
            "fused",
            passes(weights(), Device::Cpu, &compute).swap_remove(0),
        ),
    ]
}

#[cfg(test)]
mod tests;

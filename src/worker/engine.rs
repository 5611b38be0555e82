//! The worker's real composer: the engine, made on the thread that will own it.

use super::composer_thread::NewComposer;
use crate::config::{StorageOptions, WorkerOptions};
use crate::domain::composition::CompositionError;
use crate::engine::vit::Compute;
use crate::engine::{Engine, device};
use crate::telemetry::chain;

/// What makes the engine on the device of the options.
pub fn factory(options: &WorkerOptions, storage: &StorageOptions) -> anyhow::Result<NewComposer> {
    let devices = device::all_named(&options.device, options.libtorch_cuda.as_deref())?;
    let mut compute = Compute::over(devices, options.precision);
    if options.threads > 0 {
        compute.threads = options.threads;
    }
    let backbone_bytes = u64::from(options.backbones_gib) << 30;
    let (cache, blob_dir) = (options.cache, storage.blob_dir());
    Ok(Box::new(move || {
        // libtorch keeps the number of threads by thread.
        tch::set_num_threads(compute.threads as i32);
        let engine = Engine::with(compute.clone()).with_backbone_bytes(backbone_bytes);
        let cache = cache
            .cache(&blob_dir)
            .map_err(|error| CompositionError::Retry {
                code: "cache_unusable",
                detail: chain(error.as_ref()),
            })?;
        Ok(Box::new(match cache {
            Some(cache) => engine.with_cache(cache),
            None => engine,
        }))
    }))
}

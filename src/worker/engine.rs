//! The worker's real composer: the engine, made on the thread that will own it.

use crate::config::{StorageOptions, WorkerOptions};
use crate::worker::composer_thread::NewComposer;
use promptweave_domain::composer::CompositionError;
use promptweave_domain::error_chain::chain;
use promptweave_domain::words::JobErrorCode;
use promptweave_engine::Engine;
use promptweave_engine::cache::ResultCache;
use promptweave_engine::device;
use promptweave_engine::device::DeviceError;
use promptweave_engine::vit::Compute;

/// Returns what makes the engine on the configured device. Everything that can fail does so when it is called, where
/// the worker can still write to the database why it does not start.
pub fn factory(options: &WorkerOptions, storage: &StorageOptions) -> NewComposer {
    let (options, data_dir) = (options.clone(), storage.data_dir());
    Box::new(move || {
        let unusable = |error: DeviceError| CompositionError::device_failed(chain(&error));
        let devices = device::all_named(&options.device, options.libtorch_cuda.as_deref())
            .map_err(unusable)?;
        let mut compute = Compute::over(devices, options.precision);
        if options.threads > 0 {
            compute.threads = options.threads;
        }
        // libtorch keeps the number of threads per thread.
        tch::set_num_threads(compute.threads as i32);
        let backbone_bytes = u64::from(options.backbone_cache_gib) << 30;
        let engine = Engine::with(compute).with_backbone_bytes(backbone_bytes);
        let kept = options.cache;
        let cache = ResultCache::open(&data_dir, kept.max_bytes(), kept.cache_gradients).map_err(
            |error| CompositionError::Retry {
                code: JobErrorCode::CacheUnusable,
                detail: chain(&error),
            },
        )?;
        Ok(Box::new(match cache {
            Some(cache) => engine.with_cache(cache),
            None => engine,
        }))
    })
}

//! The worker's real composer: the engine, made on the thread that will own it.

use super::composer_thread::NewComposer;
use crate::config::{StorageOptions, WorkerOptions};
use crate::domain::composition::CompositionError;
use crate::domain::words::JobErrorCode;
use crate::engine::Engine;
use crate::engine::device::{self, DeviceError};
use crate::engine::vit::Compute;
use crate::telemetry::chain;

/// What makes the engine on the device of the options. All that can fail fails when it is called, where the worker
/// can still say in the database why it does not start.
pub fn factory(options: &WorkerOptions, storage: &StorageOptions) -> NewComposer {
    let (options, blob_dir) = (options.clone(), storage.blob_dir());
    Box::new(move || {
        let unusable = |error: DeviceError| CompositionError::device_failed(chain(&error));
        let devices = device::all_named(&options.device, options.libtorch_cuda.as_deref())
            .map_err(unusable)?;
        let mut compute = Compute::over(devices, options.precision);
        if options.threads > 0 {
            compute.threads = options.threads;
        }
        // libtorch keeps the number of threads by thread.
        tch::set_num_threads(compute.threads as i32);
        let backbone_bytes = u64::from(options.backbone_cache_gib) << 30;
        let engine = Engine::with(compute).with_backbone_bytes(backbone_bytes);
        let cache = options
            .cache
            .cache(&blob_dir)
            .map_err(|error| CompositionError::Retry {
                code: JobErrorCode::CacheUnusable,
                detail: chain(error.as_ref()),
            })?;
        Ok(Box::new(match cache {
            Some(cache) => engine.with_cache(cache),
            None => engine,
        }))
    })
}

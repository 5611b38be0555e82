//! The worker's real composer: the engine, made on the thread that will own it.

use anyhow::Context;

use super::composer_thread::NewComposer;
use crate::config::WorkerOptions;
use crate::engine::Engine;

/// What makes the engine on the device of the options.
pub fn factory(options: &WorkerOptions) -> anyhow::Result<NewComposer> {
    let name = options.device.clone();
    let device = Engine::device_named(&name)
        .with_context(|| format!("`{name}` is not a device; use auto, cpu or cuda:<n>"))?;
    let threads = i32::try_from(options.threads)?;
    Ok(Box::new(move || {
        // libtorch keeps the number of threads by thread.
        if threads > 0 {
            tch::set_num_threads(threads);
        }
        Ok(Box::new(Engine::new(device)))
    }))
}

//! The worker's real composer: the engine, made on the thread that will own it.

use super::composer_thread::NewComposer;
use crate::config::WorkerOptions;
use crate::engine::{Engine, device};

/// What makes the engine on the device of the options.
pub fn factory(options: &WorkerOptions) -> anyhow::Result<NewComposer> {
    let device = device::named(&options.device)?;
    let threads = i32::try_from(options.threads)?;
    Ok(Box::new(move || {
        // libtorch keeps the number of threads by thread.
        if threads > 0 {
            tch::set_num_threads(threads);
        }
        Ok(Box::new(Engine::new(device)))
    }))
}

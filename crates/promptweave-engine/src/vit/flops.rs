//! Time of the parts of the fast path on a CPU, from which `make bench-engine` tells what limits
//! it. The clock is read about two hundred times in a micro-batch of some hundred milliseconds, so
//! it can always run.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// A part of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Forward and backward passes as a whole, including the other parts.
    Pass,
    /// Products with the model's weights.
    Linear,
    /// Softmax attention and the way back through it.
    Attention,
}

/// The total of one part over all streams of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FlopCounter {
    pub seconds: f64,
    /// Floating-point operations of the part's matrix products; a multiply-add is two.
    pub operations: f64,
}

struct Counters {
    nanoseconds: AtomicU64,
    operations: AtomicU64,
}

static COUNTERS: [Counters; 3] = [const {
    Counters {
        nanoseconds: AtomicU64::new(0),
        operations: AtomicU64::new(0),
    }
}; 3];

pub fn spent(part: Part) -> FlopCounter {
    let counters = &COUNTERS[part as usize];
    FlopCounter {
        seconds: counters.nanoseconds.load(Relaxed) as f64 * 1e-9,
        operations: counters.operations.load(Relaxed) as f64,
    }
}

pub(crate) fn timed<T>(part: Part, operations: u64, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    let counters = &COUNTERS[part as usize];
    let nanoseconds = start.elapsed().as_nanos() as u64;
    counters.nanoseconds.fetch_add(nanoseconds, Relaxed);
    counters.operations.fetch_add(operations, Relaxed);
    done
}

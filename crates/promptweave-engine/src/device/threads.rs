//! How many cores libtorch's own operations take.
//!
//! Solving, scoring and fitting heads are many small products: a second thread does not make one faster, and where another
//! process has its core, waiting for it makes all of them a hundred times slower. They run on one.

/// While this lives, operations begun on this thread run on it alone; also those of threads made meanwhile,
/// where they ask for nothing else.
pub struct OneThread {
    before: i32,
}

impl OneThread {
    pub fn begin() -> Self {
        let before = tch::get_num_threads();
        tch::set_num_threads(1);
        Self { before }
    }
}

impl Drop for OneThread {
    fn drop(&mut self) {
        tch::set_num_threads(self.before);
    }
}

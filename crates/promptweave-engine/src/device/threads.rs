//! The number of cores for libtorch's own operations.
//!
//! Solving, scoring and fitting heads are many small products, and a second thread makes none
//! faster. If another process has that thread's core, waiting for it makes all of them a hundred
//! times slower. So they run on one thread.

/// While this value lives, operations started on this thread run on one core. The same holds for
/// threads made meanwhile, unless they set their own number.
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

//! Full-speed matrix products on processors that are not Intel's.
//!
//! libtorch's products on a CPU come from Intel's MKL. MKL asks itself whether the CPU is a genuine
//! Intel one, and otherwise keeps to code for older processors, whatever instructions there are. On
//! an AMD processor with AVX-512 that gives less than half the speed. With the answer "yes" MKL
//! still checks itself which instructions there are. The question is a function of the library,
//! `mkl_serv_intel_cpu_true`; a function of the same name in the executable is found before it.

use std::ffi::c_int;

#[expect(
    unsafe_code,
    reason = "takes the place of the library's own by its name"
)]
#[unsafe(no_mangle)]
pub extern "C" fn mkl_serv_intel_cpu_true() -> c_int {
    1
}

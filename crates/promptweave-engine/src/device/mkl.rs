//! Matrix products at the processor's own speed, on processors that are not Intel's.
//!
//! libtorch's products on a CPU come from Intel's MKL, which asks itself "is this a genuine Intel CPU?" and
//! without one keeps to code for older processors, whatever instructions there are: on an AMD processor
//! with AVX-512 less than half of what the same library does when it is told yes. It still looks for itself which
//! instructions are there. The question is a function of the library, `mkl_serv_intel_cpu_true`; the one
//! of the same name in the executable is found before it.

use std::ffi::c_int;

#[expect(
    unsafe_code,
    reason = "takes the place of the library's own by its name"
)]
#[unsafe(no_mangle)]
pub extern "C" fn mkl_serv_intel_cpu_true() -> c_int {
    1
}

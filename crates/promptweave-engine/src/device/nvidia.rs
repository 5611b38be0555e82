//! NVIDIA's driver and its devices, queried through the driver's own library. It is there wherever
//! CUDA works, whether libtorch's CUDA part is or not.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::fs;

use libloading::os::unix::Library;
use serde::Serialize;

use promptweave_domain::error_chain::chain;

#[derive(Debug, Default, Serialize)]
pub struct Nvidia {
    /// The driver's version, e.g. 580.159.03; null if the kernel module is not loaded, or does not
    /// report it.
    pub driver: Option<String>,
    /// The newest CUDA version that the driver runs, e.g. (13, 0).
    pub cuda: Option<(i32, i32)>,
    pub devices: Vec<Card>,
    /// Why the driver's library does not work; null if it does.
    pub error: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct Card {
    pub name: String,
    pub memory_bytes: u64,
}

impl Nvidia {
    pub fn here() -> Self {
        let version = fs::read_to_string("/proc/driver/nvidia/version").ok();
        let driver = version
            .as_deref()
            .and_then(kernel_module)
            .map(str::to_owned);
        match ask_driver() {
            Ok((cuda, devices)) => Self {
                driver,
                cuda: Some(cuda),
                devices,
                error: None,
            },
            Err(error) => Self {
                driver,
                error: Some(error),
                ..Self::default()
            },
        }
    }
}

/// The version in "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Thu …": the first
/// word that looks like one.
fn kernel_module(text: &str) -> Option<&str> {
    let line = text
        .lines()
        .find(|line| line.starts_with("NVRM version:"))?;
    line.split_whitespace()
        .find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
}

type DriverReport = ((i32, i32), Vec<Card>);

#[expect(
    unsafe_code,
    reason = "the driver's C interface, as cuda.h declares it; there is no other"
)]
fn ask_driver() -> Result<DriverReport, String> {
    let said = |error: libloading::Error| chain(&error);
    // SAFETY: the initialisers of NVIDIA's library run. Every function is called with the types
    // that cuda.h gives it, and with buffers of the length it is told.
    unsafe {
        let library = Library::new("libcuda.so.1").map_err(said)?;
        let init = library.get::<unsafe extern "C" fn(c_uint) -> c_int>("cuInit");
        let version =
            library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>("cuDriverGetVersion");
        let count = library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>("cuDeviceGetCount");
        let device = library.get::<unsafe extern "C" fn(*mut c_int, c_int) -> c_int>("cuDeviceGet");
        let name = library
            .get::<unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int>("cuDeviceGetName");
        let memory =
            library.get::<unsafe extern "C" fn(*mut usize, c_int) -> c_int>("cuDeviceTotalMem_v2");
        let (init, version, count) = (
            init.map_err(said)?,
            version.map_err(said)?,
            count.map_err(said)?,
        );
        let (device, name, memory) = (
            device.map_err(said)?,
            name.map_err(said)?,
            memory.map_err(said)?,
        );

        checked("cuInit", init(0))?;
        let mut number = 0;
        checked("cuDriverGetVersion", version(&mut number))?;
        let mut num_devices = 0;
        checked("cuDeviceGetCount", count(&mut num_devices))?;
        let mut cards = Vec::new();
        for index in 0..num_devices {
            let (mut handle, mut bytes, mut text) = (0, 0, [0; 256]);
            checked("cuDeviceGet", device(&mut handle, index))?;
            checked("cuDeviceGetName", name(text.as_mut_ptr(), 255, handle))?;
            checked("cuDeviceTotalMem", memory(&mut bytes, handle))?;
            cards.push(Card {
                name: CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned(),
                memory_bytes: bytes as u64,
            });
        }
        // libtorch uses the library too, so it stays open.
        std::mem::forget(library);
        Ok(((number / 1000, number % 1000 / 10), cards))
    }
}

fn checked(call: &str, status: c_int) -> Result<(), String> {
    match status {
        0 => Ok(()),
        100 => Err(format!("{call}: there is no device (100)")),
        803 => Err(format!(
            "{call}: the driver's library and its kernel module differ in version (803); restart the machine"
        )),
        999 => Err(format!("{call}: unknown error (999)")),
        status => Err(format!("{call}: error {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_modules_version_is_found_in_what_it_says() {
        let says = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Thu Sep 11 2026\nGCC version:  gcc 12.2.0\n";
        assert_eq!(kernel_module(says), Some("580.159.03"));
        let says =
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n";
        assert_eq!(kernel_module(says), Some("580.65.06"));
        assert_eq!(kernel_module("nothing"), None);
    }

    #[test]
    fn what_the_driver_answers_is_whole_or_has_a_reason() {
        let found = Nvidia::here();
        assert_eq!(found.cuda.is_none(), found.error.is_some(), "{found:?}");
        assert!(found.cuda.is_some() || found.devices.is_empty());
    }
}

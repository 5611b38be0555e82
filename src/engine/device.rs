//! The device to compute on, and CUDA without a rebuild.
//!
//! The binary is linked with libtorch for the CPU. Where `libtorch_cuda.so` lies beside
//! `libtorch_cpu.so` (and NVIDIA's libraries where it looks for them), it is opened at run time: its
//! kernels register themselves, and the same binary computes on the GPU.

use std::fs;
use std::path::PathBuf;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device};

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("`{0}` is not a device; use auto, cpu or cuda:<n>")]
    Unknown(String),
    #[error("`{}` cannot be opened", .path.display())]
    Unusable {
        path: PathBuf,
        source: libloading::Error,
    },
    #[error(
        "there is no device cuda:{index}: libtorch sees {found} CUDA devices; use auto or cpu, or \
         see that libtorch_cuda.so lies beside libtorch_cpu.so and that a driver is installed"
    )]
    NoCuda { index: usize, found: i64 },
}

/// `auto` (CUDA where it works), `cpu` or `cuda:<n>`. To be called before the first tensor is made.
pub fn named(name: &str) -> Result<Device, DeviceError> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    if name == "auto" {
        // A CUDA library that does not load (no driver, say) is no reason not to work.
        if let Err(error) = open_cuda() {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "computing on the CPU");
        }
        return Ok(Device::cuda_if_available());
    }
    let index = name
        .strip_prefix("cuda:")
        .and_then(|index| index.parse().ok());
    let index: usize = index.ok_or_else(|| DeviceError::Unknown(name.to_owned()))?;
    open_cuda()?;
    let found = Cuda::device_count();
    if index as i64 >= found {
        return Err(DeviceError::NoCuda { index, found });
    }
    Ok(Device::Cuda(index))
}

/// As [`named`] reads it.
pub fn name_of(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

/// Opens `libtorch_cuda.so` beside the `libtorch_cpu.so` of this process, if it is there.
fn open_cuda() -> Result<(), DeviceError> {
    // Any call makes sure that libtorch_cpu.so is mapped.
    tch::get_num_threads();
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let cpu = maps.lines().find_map(|line| {
        let path = &line[line.find('/')?..];
        path.ends_with("/libtorch_cpu.so")
            .then(|| PathBuf::from(path))
    });
    let Some(path) = cpu.map(|cpu| cpu.with_file_name("libtorch_cuda.so")) else {
        return Ok(());
    };
    if !path.exists() {
        return Ok(());
    }
    #[expect(
        unsafe_code,
        reason = "the library's initialisers run; it belongs to libtorch itself"
    )]
    let opened = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
    match opened {
        Ok(library) => {
            // Its kernels are registered for as long as the process lives.
            std::mem::forget(library);
            Ok(())
        }
        Err(source) => Err(DeviceError::Unusable { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_refused_by_name() {
        assert_eq!(named("cpu").unwrap(), Device::Cpu);
        assert!(
            named("gpu")
                .unwrap_err()
                .to_string()
                .starts_with("`gpu` is not a device")
        );
        assert!(
            named("cuda:4096")
                .unwrap_err()
                .to_string()
                .contains("cuda:4096")
        );
    }
}

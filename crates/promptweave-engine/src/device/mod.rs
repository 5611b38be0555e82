//! The device to compute on, and CUDA without a rebuild.
//!
//! The binary is linked with libtorch for the CPU. `libtorch_cuda.so` is opened at run time, from a
//! named directory or from the one of `libtorch_cpu.so`. Its kernels register themselves, and the
//! same binary computes on the GPU.
//!
//! A library from another directory (that of a Python's torch, say) is tied in by names. The loader
//! gives it the `libtorch_cpu.so` and `libc10.so` that are in this process already, which must be
//! of its own version. It finds `libc10_cuda.so` beside itself, and NVIDIA's libraries in
//! `../../nvidia/*/lib`, as PyPI's wheels lay them out.

pub mod memory;
pub mod mkl;
pub mod nvidia;
pub(crate) mod platform;
pub(crate) mod threads;

use std::ffi::c_void;
use std::fs;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device};

/// The libtorch version that the binary is built for.
pub const LIBTORCH: &str = "2.11.0";

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("`{0}` is not a device; use auto, cpu or cuda:<n>")]
    Unknown(String),
    #[error("`{0}` cannot be used together; name different CUDA devices, or one device")]
    Mixed(String),
    #[error(
        "there is no libtorch_cuda.so in `{}`; name the folder torch/lib of PyTorch {LIBTORCH} for CUDA", .0.display()
    )]
    NoLibrary(PathBuf),
    #[error(
        "`{}` is of PyTorch {found}, and this program is built for {LIBTORCH}; name the folder \
         torch/lib of that version", .path.display()
    )]
    OtherVersion { path: PathBuf, found: String },
    #[error(
        "`{}` cannot be opened; `pip install torch=={LIBTORCH}` brings it with NVIDIA's libraries \
         where it looks for them, then give its folder torch/lib with --libtorch-cuda", .path.display()
    )]
    Unusable {
        path: PathBuf,
        source: libloading::Error,
    },
    #[error(
        "there is no device cuda:{index}: libtorch sees {found} CUDA devices; use auto or cpu, or ask \
         `promptweave doctor` what is missing"
    )]
    NoCuda { index: usize, found: i64 },
}

/// The device of a name: `auto` (CUDA if it works), `cpu` or `cuda:<n>`. Call it before the first
/// tensor is made. `libtorch_cuda` is a directory with `libtorch_cuda.so`.
pub fn named(name: &str, libtorch_cuda: Option<&Path>) -> Result<Device, DeviceError> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    if name == "auto" {
        match open_cuda(libtorch_cuda) {
            // A CUDA library that was not asked for and does not load is no reason to stop.
            Err(error) if libtorch_cuda.is_none() => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "computing on the CPU");
            }
            opened => drop(opened?),
        }
        return Ok(Device::cuda_if_available());
    }
    let index = name
        .strip_prefix("cuda:")
        .and_then(|index| index.parse().ok());
    let index: usize = index.ok_or_else(|| DeviceError::Unknown(name.to_owned()))?;
    open_cuda(libtorch_cuda)?;
    let found = Cuda::device_count();
    if index as i64 >= found {
        return Err(DeviceError::NoCuda { index, found });
    }
    Ok(Device::Cuda(index))
}

/// Several devices of one kind, separated by commas. `auto` takes all CUDA devices, or the CPU.
pub fn all_named(names: &str, libtorch_cuda: Option<&Path>) -> Result<Vec<Device>, DeviceError> {
    let named: Vec<Device> = names
        .split(',')
        .map(|name| named(name, libtorch_cuda))
        .collect::<Result<_, _>>()?;
    if names == "auto" && named[0] != Device::Cpu {
        return Ok((0..Cuda::device_count() as usize)
            .map(Device::Cuda)
            .collect());
    }
    let twice = |at: usize| named[..at].contains(&named[at]);
    if named.len() > 1 && (named.contains(&Device::Cpu) || (0..named.len()).any(twice)) {
        return Err(DeviceError::Mixed(names.to_owned()));
    }
    Ok(named)
}

/// The name of a device, as [`named`] reads it.
pub fn name_of(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

/// The names of devices, as [`all_named`] reads them.
pub fn names_of(devices: &[Device]) -> String {
    let names: Vec<String> = devices.iter().map(|device| name_of(*device)).collect();
    names.join(",")
}

/// Opens `libtorch_cuda.so` in `dir`, or beside the `libtorch_cpu.so` of this process if it is
/// there. Returns the path that it opened.
pub fn open_cuda(dir: Option<&Path>) -> Result<Option<PathBuf>, DeviceError> {
    let own = libtorch_cpu().and_then(|cpu| Some(cpu.parent()?.to_owned()));
    let Some(dir) = dir.or(own.as_deref()) else {
        return Ok(None);
    };
    let path = dir.join("libtorch_cuda.so");
    if !path.exists() {
        return if own.as_deref() == Some(dir) {
            Ok(None)
        } else {
            Err(DeviceError::NoLibrary(dir.to_owned()))
        };
    }
    check_version(&path)?;
    open_for_good(&path).map_err(|source| DeviceError::Unusable {
        path: path.clone(),
        source,
    })?;
    // libtorch opens these by name when it first needs them, and looks beside libtorch_cpu.so
    // alone. Once they are opened here, their names are known. If one fails, only the operation
    // that needs it will miss it.
    for name in ["libtorch_cuda_linalg.so", "libcaffe2_nvrtc.so"] {
        let _ = open_for_good(&dir.join(name));
    }
    Ok(Some(path))
}

/// Path of the `libtorch_cpu.so` of this process.
pub fn libtorch_cpu() -> Option<PathBuf> {
    // Any call makes sure that the library is mapped.
    tch::get_num_threads();
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let path = &line[line.find('/')?..];
        path.ends_with("/libtorch_cpu.so")
            .then(|| PathBuf::from(path))
    })
}

/// The version that the libtorch of this process reports, e.g. 2.11.0.
#[expect(
    unsafe_code,
    reason = "tch does not tell; it is a function of libtorch's stable C interface"
)]
pub fn loaded_version() -> Option<String> {
    // SAFETY: `uint64_t aoti_torch_abi_version()`: major, minor and patch in the topmost three bytes.
    let version = unsafe {
        let get = Library::this().get::<unsafe extern "C" fn() -> u64>("aoti_torch_abi_version");
        get.ok()?()
    };
    let [major, minor, patch, ..] = version.to_be_bytes();
    Some(format!("{major}.{minor}.{patch}"))
}

/// Sets whether CUDA may round the inputs of matrix products in f32 to TF32, with 10 bits of
/// mantissa. libtorch's default is no.
pub fn allow_tf32(allowed: bool) -> Result<(), libloading::Error> {
    set("_ZN2at7Context18setAllowTF32CuBLASEb", allowed)
}

/// Sets whether attention may be cuDNN's, which libtorch prefers on an H100. cuDNN makes a plan for
/// every shape on every thread. That takes longer than the attention of a whole job here; the other
/// implementations need no plans.
pub fn allow_cudnn_attention(allowed: bool) -> Result<(), libloading::Error> {
    set("_ZN2at7Context14setSDPUseCuDNNEb", allowed)
}

/// Sets a switch of `at::Context` by the mangled name of its setter, which takes one `bool`.
#[expect(
    unsafe_code,
    reason = "tch has no setter; these are libtorch's own, as its C++ headers declare them"
)]
fn set(setter: &str, value: bool) -> Result<(), libloading::Error> {
    type GlobalContext = unsafe extern "C" fn() -> *mut c_void;
    type Setter = unsafe extern "C" fn(*mut c_void, bool);
    let this = Library::this();
    // SAFETY: these are `at::Context& at::globalContext()` and `void at::Context::<setter>(bool)`.
    // Their mangled names determine their types, and the context lives as long as the process.
    unsafe {
        let context = this.get::<GlobalContext>("_ZN2at13globalContextEv")?;
        let set = this.get::<Setter>(setter)?;
        set(context(), value);
    }
    Ok(())
}

/// Checks a wheel's version, which lies beside its libraries. Another layout is not checked.
fn check_version(library: &Path) -> Result<(), DeviceError> {
    let Some(torch) = library.parent().and_then(Path::parent) else {
        return Ok(());
    };
    let text = fs::read_to_string(torch.join("version.py")).unwrap_or_default();
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("__version__ = "))
        .map(|version| version.trim_matches(['\'', '"']));
    match version {
        // `2.11.0+cu130` is 2.11.0 for CUDA 13.0.
        Some(found) if found.split('+').next() != Some(LIBTORCH) => {
            Err(DeviceError::OtherVersion {
                path: library.to_owned(),
                found: found.to_owned(),
            })
        }
        _ => Ok(()),
    }
}

/// Opens a library and never closes it: its kernels stay registered for the life of the process.
fn open_for_good(path: &Path) -> Result<(), libloading::Error> {
    #[expect(
        unsafe_code,
        reason = "the library's initialisers run; it belongs to libtorch itself"
    )]
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(library);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_refused_by_name() {
        let refusal = |name: &str| named(name, None).unwrap_err().to_string();
        assert_eq!(named("cpu", None).unwrap(), Device::Cpu);
        assert!(refusal("gpu").starts_with("`gpu` is not a device"));
        assert!(refusal("cuda:4096").contains("cuda:4096"));
        assert_eq!(all_named("cpu", None).unwrap(), [Device::Cpu]);
        let refusal = |names: &str| all_named(names, None).unwrap_err().to_string();
        assert!(refusal("cpu,cpu").contains("cannot be used together"));
        assert!(refusal("cpu,gpu").contains("`gpu`"));
    }

    #[test]
    fn a_directory_without_a_fitting_library_is_refused_also_for_auto() {
        let dir = tempfile::tempdir().unwrap();
        let lib = dir.path().join("torch/lib");
        fs::create_dir_all(&lib).unwrap();
        let refusal = |name: &str| named(name, Some(&lib)).unwrap_err();
        for device in ["auto", "cuda:0"] {
            let text = refusal(device).to_string();
            assert!(text.contains("no libtorch_cuda.so in"), "{text}");
            assert!(text.contains(&lib.display().to_string()), "{text}");
        }
        // A request for the CPU does not look for CUDA.
        assert_eq!(named("cpu", Some(&lib)).unwrap(), Device::Cpu);

        fs::write(lib.join("libtorch_cuda.so"), "no library").unwrap();
        let DeviceError::Unusable { path, source } = refusal("auto") else {
            panic!("it was opened");
        };
        assert_eq!(path, lib.join("libtorch_cuda.so"));
        assert!(!source.to_string().is_empty());

        let version = dir.path().join("torch/version.py");
        fs::write(&version, "debug = False\n__version__ = '2.9.1+cu128'\n").unwrap();
        let text = refusal("cuda:0").to_string();
        assert!(text.contains("PyTorch 2.9.1+cu128"), "{text}");
        fs::write(&version, "__version__ = '2.11.0+cu130'\n").unwrap();
        assert!(matches!(refusal("cuda:0"), DeviceError::Unusable { .. }));
    }

    #[test]
    #[expect(
        unsafe_code,
        reason = "as `set`: libtorch's own, as its C++ headers declare them"
    )]
    fn tf32_is_as_it_was_last_set() {
        // SAFETY: `bool at::Context::allowTF32CuBLAS() const`.
        let allowed = || unsafe {
            type GlobalContext = unsafe extern "C" fn() -> *mut c_void;
            type AllowTf32 = unsafe extern "C" fn(*mut c_void) -> bool;
            let this = Library::this();
            let context = this.get::<GlobalContext>("_ZN2at13globalContextEv");
            let get = this.get::<AllowTf32>("_ZNK2at7Context15allowTF32CuBLASEv");
            get.unwrap()(context.unwrap()())
        };
        for allow in [true, false, true] {
            allow_tf32(allow).unwrap();
            assert_eq!(allowed(), allow);
        }
        allow_tf32(false).unwrap();
    }
}

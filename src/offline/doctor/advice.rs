//! Advice on what was found.

use crate::offline::doctor::Report;
use promptweave_engine::device::LIBTORCH;

/// The CUDA version of PyPI's wheels of `LIBTORCH`, and below it the first driver that runs it.
const CUDA: (i32, i32) = (13, 0);
const DRIVER: &str = "580";

/// The advice, most needed first.
pub fn on(report: &Report) -> Vec<String> {
    let Report {
        libtorch,
        cuda_library,
        nvidia,
        cuda_devices,
        device,
        ..
    } = report;
    let mut advice = Vec::new();
    if let Some(version) = libtorch.version.as_deref().filter(|v| *v != LIBTORCH) {
        advice.push(format!(
            "libtorch is of version {version} and this program is built for {LIBTORCH}: run \
             scripts/setup.sh, or set LD_LIBRARY_PATH to the folder torch/lib of that version"
        ));
    }
    let has_driver = nvidia.cuda.is_some();
    // A machine without a GPU needs no advice about one, unless a GPU was asked for.
    if !has_driver && !device.asked.starts_with("cuda") && cuda_library.error.is_none() {
        return advice;
    }
    if !has_driver {
        advice.push(format!(
            "install NVIDIA's driver, {DRIVER} or newer; a container also has to be given the GPU \
             (`docker run --gpus all`, with NVIDIA's container toolkit)"
        ));
    }
    if let Some(runs) = nvidia.cuda.filter(|runs| *runs < CUDA) {
        advice.push(format!(
            "update NVIDIA's driver to {DRIVER} or newer: this one runs CUDA {}.{} at most, and PyTorch \
             {LIBTORCH} from PyPI needs {}.{}",
            runs.0, runs.1, CUDA.0, CUDA.1
        ));
    }
    match (&cuda_library.opened, &cuda_library.error) {
        (None, None) => advice.push(format!(
            "`pip install torch=={LIBTORCH}` in any Python environment brings libtorch's part for CUDA: give \
             its folder site-packages/torch/lib with --libtorch-cuda or in PROMPTWEAVE_LIBTORCH_CUDA"
        )),
        (None, Some(error)) => {
            if let Some(missing) = missing_library(error) {
                advice.push(format!(
                    "`{missing}` is one of NVIDIA's libraries, which libtorch_cuda.so looks for in \
                     ../../nvidia/*/lib beside its folder: `pip install torch=={LIBTORCH}` puts all of \
                     them there"
                ));
            }
        }
        (Some(_), _) if has_driver && !nvidia.devices.is_empty() && cuda_devices.is_empty() => {
            advice.push(
                "libtorch is open for CUDA and the driver has devices, yet libtorch sees none: compare \
                 their CUDA versions above, and CUDA_VISIBLE_DEVICES"
                    .to_owned(),
            );
        }
        _ => {}
    }
    advice
}

/// The library's name in "libcudnn.so.9: cannot open shared object file: …", wherever the loader's message has it.
fn missing_library(error: &str) -> Option<&str> {
    let before = error.split(": cannot open shared object file").next()?;
    let name = before.rsplit([' ', '/']).next()?;
    (before.len() < error.len() && name.contains(".so")).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offline::doctor::cpu::Cpu;
    use crate::offline::doctor::{Asked, CudaLibrary, Libtorch};
    use promptweave_engine::device::memory::Memory;
    use promptweave_engine::device::nvidia::{Card, Nvidia};

    fn report(asked: &str, nvidia: Nvidia, cuda_library: CudaLibrary) -> Report {
        Report {
            version: "0",
            libtorch: Libtorch {
                version: Some(LIBTORCH.into()),
                path: None,
            },
            cpu: Cpu::here(),
            threads: 1,
            memory: Memory::here(),
            rates: Vec::new(),
            cuda_library,
            nvidia,
            cuda_devices: Vec::new(),
            device: Asked {
                asked: asked.into(),
                uses: Vec::new(),
                error: None,
            },
            advice: Vec::new(),
        }
    }

    fn driver(cuda: (i32, i32)) -> Nvidia {
        Nvidia {
            cuda: Some(cuda),
            devices: vec![Card {
                name: "NVIDIA A100".into(),
                memory_bytes: 40 << 30,
            }],
            ..Nvidia::default()
        }
    }

    fn library(opened: Option<&str>, error: Option<&str>) -> CudaLibrary {
        CudaLibrary {
            opened: opened.map(Into::into),
            error: error.map(Into::into),
        }
    }

    #[test]
    fn nothing_is_advised_where_nothing_is_missed() {
        let found = report("auto", Nvidia::default(), CudaLibrary::default());
        assert_eq!(on(&found), Vec::<String>::new());
    }

    #[test]
    fn advice_names_what_is_missing() {
        let expect = |found: Report, parts: &[&str]| {
            let advice = on(&found);
            assert_eq!(advice.len(), parts.len(), "{advice:?}");
            for (advice, part) in advice.iter().zip(parts) {
                assert!(advice.contains(part), "{advice}");
            }
        };
        let none = CudaLibrary::default;
        expect(
            report("cuda:0", Nvidia::default(), none()),
            &["install NVIDIA's driver", "pip install torch==2.11.0"],
        );
        expect(
            report("auto", driver((13, 0)), none()),
            &["--libtorch-cuda"],
        );
        let error = "`/t/libtorch_cuda.so` cannot be opened: libcudnn.so.9: cannot open shared object \
                     file: No such file or directory";
        expect(
            report("auto", driver((12, 4)), library(None, Some(error))),
            &[
                "this one runs CUDA 12.4 at most",
                "`libcudnn.so.9` is one of",
            ],
        );
        expect(
            report(
                "auto",
                driver((13, 1)),
                library(Some("/t/libtorch_cuda.so"), None),
            ),
            &["CUDA_VISIBLE_DEVICES"],
        );
        let mut other = report("cpu", Nvidia::default(), none());
        other.libtorch.version = Some("2.9.1".into());
        expect(other, &["libtorch is of version 2.9.1"]);
    }
}

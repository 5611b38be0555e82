//! `promptweave doctor`: what the engine finds on this machine, how fast it is, and what to do if something is missing.

mod advice;
mod cpu;
mod rates;

use std::fmt;
use std::path::PathBuf;

use anyhow::Context as _;
use serde::Serialize;
use tch::Device;

use self::cpu::Cpu;
use self::rates::Rate;
use promptweave_domain::error_chain::chain;
use promptweave_engine::device;
use promptweave_engine::device::memory::Memory;
use promptweave_engine::device::nvidia::Nvidia;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Device that has to work: `auto` (whichever is there), `cpu`, `cuda:<n>`, or several as `cuda:0,cuda:1`.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Folder with libtorch_cuda.so: `torch/lib` of PyTorch 2.11.0 for CUDA [default: the folder of libtorch_cpu.so, if
    /// it has one].
    #[arg(long, env = "PROMPTWEAVE_LIBTORCH_CUDA", value_name = "DIR")]
    pub libtorch_cuda: Option<PathBuf>,
    /// CPU threads [default: one per core].
    #[arg(long)]
    pub threads: Option<u32>,
    /// Print JSON, for machines.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    /// The version of promptweave.
    version: &'static str,
    libtorch: Libtorch,
    cpu: Cpu,
    threads: i32,
    memory: Memory,
    rates: Vec<Rate>,
    cuda_library: CudaLibrary,
    nvidia: Nvidia,
    /// The devices that libtorch computes on.
    cuda_devices: Vec<CudaDevice>,
    device: Asked,
    advice: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Libtorch {
    version: Option<String>,
    /// The path of its `libtorch_cpu.so`.
    path: Option<PathBuf>,
}

/// The state of `libtorch_cuda.so`.
#[derive(Debug, Default, Serialize)]
struct CudaLibrary {
    /// The file that was opened; null without an error if there is none.
    opened: Option<PathBuf>,
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct CudaDevice {
    device: String,
    rates: Vec<Rate>,
    error: Option<String>,
}

/// The device that was asked for, and the devices that it means if they work.
#[derive(Debug, Serialize)]
struct Asked {
    asked: String,
    uses: Vec<String>,
    error: Option<String>,
}

/// Prints the report, and fails if the device that was asked for does not work.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let report = examine(args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    match report.device.error {
        None => Ok(()),
        Some(error) => Err(anyhow::anyhow!(error)),
    }
}

fn examine(args: &Args) -> anyhow::Result<Report> {
    let dir = args.libtorch_cuda.as_deref();
    // This comes first: kernels register themselves before the first tensor is made.
    let cuda_library = match device::open_cuda(dir) {
        Ok(opened) => CudaLibrary {
            opened,
            error: None,
        },
        Err(error) => CudaLibrary {
            opened: None,
            error: Some(chain(&error)),
        },
    };
    let asked = device::all_named(&args.device, dir);
    if let Some(threads) = args.threads {
        tch::set_num_threads(i32::try_from(threads.max(1))?);
    }
    let rates = rates::of_cpu().context("the CPU cannot multiply matrices")?;
    let cuda_devices: Vec<CudaDevice> = (0..tch::Cuda::device_count().max(0) as usize)
        .map(|index| {
            let measured = rates::of_cuda(index);
            CudaDevice {
                device: device::name_of(Device::Cuda(index)),
                error: measured.as_ref().err().map(|error| error.to_string()),
                rates: measured.unwrap_or_default(),
            }
        })
        .collect();
    let uses: Vec<String> = asked
        .iter()
        .flatten()
        .map(|device| device::name_of(*device))
        .collect();
    // A device that exists but fails at a product does not work either.
    let failed = cuda_devices
        .iter()
        .filter(|found| uses.contains(&found.device))
        .find_map(|found| found.error.clone());
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        libtorch: Libtorch {
            version: device::loaded_version(),
            path: device::libtorch_cpu(),
        },
        cpu: Cpu::here(),
        threads: tch::get_num_threads(),
        memory: Memory::here(),
        rates,
        cuda_library,
        nvidia: Nvidia::here(),
        cuda_devices,
        device: Asked {
            asked: args.device.clone(),
            error: asked.err().map(|error| chain(&error)).or(failed),
            uses,
        },
        advice: Vec::new(),
    };
    report.advice = advice::on(&report);
    Ok(report)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |what: &str, text: &str| writeln!(f, "{what:<16}{text}");
        line("promptweave", self.version)?;
        let version = self.libtorch.version.as_deref().unwrap_or("unknown");
        let path = self.libtorch.path.as_deref().map(|path| path.display());
        let path = path.map_or(String::new(), |path| format!(" from {path}"));
        line("libtorch", &format!("{version}{path}"))?;
        line("CPU", &self.cpu.model)?;
        line(
            "",
            &format!(
                "{} cores, {} threads; {}",
                self.cpu.cores,
                self.threads,
                self.cpu.instruction_sets.join(" ")
            ),
        )?;
        for rate in &self.rates {
            line("", &rate.to_string())?;
        }
        line("memory", &memory_in_words(&self.memory))?;
        let CudaLibrary { opened, error } = &self.cuda_library;
        let library = match (opened, error) {
            (Some(path), _) => format!("{} is open", path.display()),
            (None, Some(error)) => error.clone(),
            (None, None) => "there is no libtorch_cuda.so beside libtorch_cpu.so".to_owned(),
        };
        line("CUDA", &library)?;
        line("NVIDIA driver", &driver_in_words(&self.nvidia))?;
        for (index, card) in self.nvidia.devices.iter().enumerate() {
            let memory = gib(card.memory_bytes);
            line("", &format!("device {index}: {}, {memory}", card.name))?;
        }
        for device in &self.cuda_devices {
            line(&device.device, device.error.as_deref().unwrap_or("works"))?;
            for rate in &device.rates {
                line("", &rate.to_string())?;
            }
        }
        let Asked { asked, uses, error } = &self.device;
        let uses = uses.join(",");
        let answer = match error {
            None if uses == *asked => "works".to_owned(),
            None => format!("works, on {uses}"),
            Some(_) => "does not work".to_owned(),
        };
        line(&format!("--device {asked}"), &answer)?;
        for advice in &self.advice {
            writeln!(f, "\n→ {advice}")?;
        }
        Ok(())
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [rows, inner, columns] = self.shape;
        let on = match self.threads {
            None => String::new(),
            Some(1) => " on 1 thread".to_owned(),
            Some(threads) => format!(" on {threads} threads"),
        };
        write!(
            f,
            "{:<5}{:>9.0} GFLOP/s{on} ({rows} × {inner} × {columns})",
            self.precision, self.gflop_per_s
        )
    }
}

fn memory_in_words(memory: &Memory) -> String {
    let (total, available) = (gib(memory.total_bytes), gib(memory.available_bytes));
    let limit = memory.limit_bytes.map_or(String::new(), |limit| {
        format!("; {} for this container", gib(limit))
    });
    format!("{total}, {available} available{limit}")
}

fn driver_in_words(nvidia: &Nvidia) -> String {
    let driver = nvidia.driver.as_deref();
    match (nvidia.cuda, &nvidia.error) {
        (Some((major, minor)), _) => {
            let version = driver.map_or(String::new(), |driver| format!("{driver}, "));
            format!("{version}runs CUDA up to {major}.{minor}")
        }
        (None, error) => {
            let version = driver.unwrap_or("none");
            let error = error.as_deref().unwrap_or_default();
            format!("{version} ({error})")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machines_report_is_whole_for_people_and_machines() {
        let args = Args {
            device: "cpu".into(),
            libtorch_cuda: None,
            threads: Some(1),
            json: false,
        };
        let report = examine(&args).unwrap();
        assert!(report.device.error.is_none());
        assert_eq!(report.libtorch.version.as_deref(), Some(device::LIBTORCH));
        assert!(report.libtorch.path.as_ref().is_some_and(|p| p.exists()));
        let precisions: Vec<&str> = report.rates.iter().map(|rate| rate.precision).collect();
        assert_eq!(precisions, ["f32", "bf16"]);
        assert!(report.rates.iter().all(|rate| rate.gflop_per_s > 0.1));
        let text = report.to_string();
        for part in [
            "libtorch        2.11.0 from /",
            "GFLOP/s on 1 thread",
            "--device cpu    works",
        ] {
            assert!(text.contains(part), "{text}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["device"]["uses"], serde_json::json!(["cpu"]));
    }

    #[test]
    fn a_device_that_does_not_work_is_a_failure_with_its_reason() {
        let args = Args {
            device: "cuda:4096".into(),
            libtorch_cuda: None,
            threads: Some(1),
            json: true,
        };
        let refused = run(&args).unwrap_err().to_string();
        assert!(
            refused.contains("there is no device cuda:4096"),
            "{refused}"
        );
    }
}

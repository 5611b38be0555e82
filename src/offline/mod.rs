//! Commands on local files, with neither server nor database. They call the same engine functions as the worker.

pub mod compose;
pub mod doctor;
pub mod evaluate;
pub mod objective;
pub mod predict;
pub mod progress;
pub mod rank;
pub mod solve;
pub mod tune;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use promptweave_domain::composer::Composition;
use promptweave_domain::digest::Digest;
use promptweave_domain::precision::Precision;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::split::Split;
use promptweave_engine::vit::Compute;
use promptweave_engine::{Engine, device};

/// Options of every offline command.
#[derive(Clone, Debug, Args)]
pub struct EngineOptions {
    /// Folder of the frozen backbone, with config.json and model.safetensors.
    #[arg(long, value_name = "DIR")]
    pub backbone: PathBuf,
    /// Device: `auto` (all GPUs there are, or the CPU), `cpu`, `cuda:<n>`, or several as `cuda:0,cuda:1`.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Folder with libtorch_cuda.so: `torch/lib` of PyTorch 2.11.0 for CUDA [default: the folder of libtorch_cpu.so, if
    /// it has one].
    #[arg(long, env = "PROMPTWEAVE_LIBTORCH_CUDA", value_name = "DIR")]
    pub libtorch_cuda: Option<PathBuf>,
    /// CPU threads [default: one per core]. Results are bit-identical only for the same number.
    #[arg(long)]
    pub threads: Option<u32>,
    /// The most samples to send through the backbone at once [default: chosen by the model's size].
    #[arg(long, value_name = "SAMPLES")]
    pub micro_batch: Option<usize>,
    /// Precision: `f32` (on CUDA with TensorFloat-32), `bf16` (about twice as fast if the processor has it;
    /// docs/performance.md shows how it changes the weights) or `f64`.
    #[arg(long, default_value_t)]
    pub precision: Precision,
    /// Compute exactly as the definition is written: every prompt with every image, and automatic differentiation.
    /// Slow; for checking the fast path.
    #[arg(long)]
    pub reference_path: bool,
    /// Leave out unreadable images and count them, instead of failing.
    #[arg(long)]
    pub skip_unreadable: bool,
}

impl EngineOptions {
    /// The engine that these options describe.
    pub fn engine(&self) -> anyhow::Result<Engine> {
        let devices = device::all_named(&self.device, self.libtorch_cuda.as_deref())?;
        if let Some(threads) = self.threads {
            tch::set_num_threads(i32::try_from(threads.max(1))?);
        }
        Ok(Engine::with(Compute {
            plain: self.reference_path,
            largest_micro_batch: self.micro_batch.unwrap_or(usize::MAX),
            ..Compute::over(devices, self.precision)
        }))
    }
}

/// Reads and checks a prompt file.
pub fn read_prompt(path: &Path) -> anyhow::Result<(Digest, PromptFile)> {
    let bytes = fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let file = PromptFile::parse(&bytes)
        .with_context(|| format!("`{}` is not a prompt file", path.display()))?;
    Ok((Digest::of(&bytes), file))
}

/// Writes a file completely or not at all: it is written under another name, then renamed.
pub fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        // Temporary files are private by default; a result should be as readable as any file that its user makes.
        let mut file = tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(0o666))
            .tempfile_in(dir)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write `{}`", path.display()))
}

/// Writes the files of a composition and prints what is in them.
fn write_composition(out: &Path, composition: &Composition) -> anyhow::Result<()> {
    let result = &composition.result;
    let json = serde_json::to_vec_pretty(result).context("result.json")?;
    write_whole(&out.join("statistics.safetensors"), &composition.statistics)?;
    write_whole(&out.join("composed.safetensors"), &composition.composed)?;
    if let Some(ensemble) = &composition.ensemble {
        write_whole(&out.join("ensemble.safetensors"), ensemble)?;
    }
    write_whole(&out.join("result.json"), &json)?;

    for (source, own) in result
        .source_weights
        .iter()
        .zip(&result.diagnostics.per_source)
    {
        let error = source
            .standard_error
            .map_or(String::new(), |error| format!(" ± {error:.4}"));
        println!(
            "{:24} α = {:.4}{error}   H = {:.4}",
            source.prompt, source.weight, own.h_score
        );
    }
    println!("{:24} H = {:.4} mixed", "Σ α P", result.objective.h_score);
    if let Some(composed) = &result.diagnostics.composed_score {
        println!("{:24} H = {:.4} composed", "", composed.h_score);
    }
    if let Some(pool) = &result.pool {
        let weights = pool.weights.iter();
        let none = pool.no_transfer.iter();
        let none = none.map(|it| ("no prompt", it.weight, it.standard_error));
        let weights = weights.map(|it| (it.prompt.as_str(), it.weight, it.standard_error));
        let weights: Vec<String> = weights
            .chain(none)
            .map(|(name, weight, error)| format!("{name} {weight:.3} ± {error:.3}"))
            .collect();
        println!(
            "{:24} {:.4} nats cross-fitted: {}",
            "pool of predictions",
            pool.validation_loss,
            weights.join(", ")
        );
    }
    for row in &result.comparison {
        let [low, high] = row.accuracy_interval.map(|it| 100.0 * it);
        println!(
            "{:24} accuracy {:.1} % ({low:.1} to {high:.1}), {:.4} nats, {} forward passes an image",
            row.prediction.words(),
            100.0 * row.accuracy,
            row.loss,
            row.forward_passes,
        );
    }
    for warning in &result.warnings {
        eprintln!("warning: {} ({})", warning.detail, warning.code);
    }
    println!("wrote {}", out.display());
    Ok(())
}

fn parse_split(name: &str) -> Result<Split, String> {
    Split::ALL
        .into_iter()
        .find(|split| split.name() == name)
        .ok_or_else(|| format!("`{name}` is not a split; use train, val or test"))
}

/// Parses a command's options from words, as a shell would pass them.
#[cfg(test)]
fn parsed<A: clap::Args>(
    words: impl IntoIterator<Item = impl Into<std::ffi::OsString> + Clone>,
) -> A {
    let matches = A::augment_args(clap::Command::new("command")).get_matches_from(words);
    A::from_arg_matches(&matches).unwrap()
}

//! Commands that work on local files, with neither server nor database. They call the very engine
//! functions the worker calls.

pub mod compose;
pub mod doctor;
pub mod evaluate;
pub mod objective;
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

/// Options every offline command has.
#[derive(Clone, Debug, Args)]
pub struct EngineOptions {
    /// Folder of the frozen backbone: config.json and model.safetensors.
    #[arg(long, value_name = "DIR")]
    pub backbone: PathBuf,
    /// `auto` (all GPUs there are, or the CPU), `cpu`, `cuda:<n>` or several, `cuda:0,cuda:1`.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Folder to take libtorch_cuda.so from: `torch/lib` of PyTorch 2.11.0 for CUDA [default: where
    /// libtorch_cpu.so lies, if it is there].
    #[arg(long, env = "PROMPTWEAVE_LIBTORCH_CUDA", value_name = "DIR")]
    pub libtorch_cuda: Option<PathBuf>,
    /// CPU threads; the default is one a core. Results are the same to the last bit only at the same
    /// number of threads.
    #[arg(long)]
    pub threads: Option<u32>,
    /// At most this many samples at once through the backbone [default: what the model's size allows].
    #[arg(long, value_name = "SAMPLES")]
    pub micro_batch: Option<usize>,
    /// `f32` (on CUDA with TensorFloat-32), `bf16` (about twice as fast where the processor has it, see
    /// docs/performance.md for what it does to the weights) or `f64`.
    #[arg(long, default_value_t)]
    pub precision: Precision,
    /// By the definition as it is written: every prompt with every image, automatic differentiation. Slow; to check
    /// the fast path by.
    #[arg(long)]
    pub reference_path: bool,
    /// Leave unreadable images out (and count them) instead of failing.
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

/// Writes a file whole or not at all: under another name first, then renamed.
pub fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        // Temporary files are private by default; a result is as readable as any file its user makes.
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

/// Writes the three files of a composition and says what is in them.
fn write_composition(out: &Path, composition: &Composition) -> anyhow::Result<()> {
    let result = &composition.result;
    let json = serde_json::to_vec_pretty(result).context("result.json")?;
    write_whole(&out.join("statistics.safetensors"), &composition.statistics)?;
    write_whole(&out.join("composed.safetensors"), &composition.composed)?;
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

/// A command's options, from its words as a shell would give them.
#[cfg(test)]
fn parsed<A: clap::Args>(
    words: impl IntoIterator<Item = impl Into<std::ffi::OsString> + Clone>,
) -> A {
    let matches = A::augment_args(clap::Command::new("command")).get_matches_from(words);
    A::from_arg_matches(&matches).unwrap()
}

//! Commands that work on local files, with neither server nor database. They call the very engine
//! functions the worker calls.

pub mod compose;
pub mod evaluate;
pub mod progress;
pub mod tune;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use crate::domain::dataset::Split;
use crate::domain::digest::Digest;
use crate::domain::prompt_file::PromptFile;
use crate::engine::{Engine, device};

/// Options every offline command has.
#[derive(Clone, Debug, Args)]
pub struct EngineOptions {
    /// Folder of the frozen backbone: config.json and model.safetensors.
    #[arg(long, value_name = "DIR")]
    pub backbone: PathBuf,
    /// `auto` (CUDA where there is one), `cpu` or `cuda:<n>`.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads; the default is one a core. Results are the same to the last bit only at the same
    /// number of threads.
    #[arg(long)]
    pub threads: Option<u32>,
    /// Leave unreadable images out (and count them) instead of failing.
    #[arg(long)]
    pub skip_bad: bool,
}

impl EngineOptions {
    fn engine(&self) -> anyhow::Result<Engine> {
        let device = device::named(&self.device)?;
        if let Some(threads) = self.threads {
            tch::set_num_threads(i32::try_from(threads.max(1))?);
        }
        Ok(Engine::new(device))
    }
}

/// Reads and checks a prompt file.
fn read_prompt(path: &Path) -> anyhow::Result<(Digest, PromptFile)> {
    let bytes = fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let file = PromptFile::parse(&bytes)
        .with_context(|| format!("`{}` is not a prompt file", path.display()))?;
    Ok((Digest::of(&bytes), file))
}

/// Writes a file whole or not at all: under another name first, then renamed.
fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
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

fn parse_split(name: &str) -> Result<Split, String> {
    Split::ALL
        .into_iter()
        .find(|split| split.name() == name)
        .ok_or_else(|| format!("`{name}` is not a split; use train, val or test"))
}

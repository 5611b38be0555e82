//! `promptweave predict`: classes and probabilities of images, by a prompt or an ensemble with the heads in its file.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context as _, bail};
use tch::Tensor;

use crate::offline::progress::bar;
use crate::offline::{EngineOptions, write_whole};
use promptweave_domain::digest::Digest;
use promptweave_domain::prediction::{Model, TableFormat};
use promptweave_engine::predict::{Predictor, table};
use promptweave_engine::samples::Samples;
use promptweave_engine::vit::Vit;
use promptweave_formats::backbone::Backbone;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub engine: EngineOptions,
    #[command(flatten)]
    pub by: ModelFile,
    /// Images (PNG, JPEG, BMP, GIF, WebP), or folders of images, which are searched with their sub-folders.
    #[arg(required = true, value_name = "IMAGES")]
    pub images: Vec<PathBuf>,
    /// The number of classes to print for each image, the most probable ones.
    #[arg(long, value_name = "K", default_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    pub top_k: u32,
    /// File for the predictions; its extension tells the format [default: stdout].
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Format: `csv`, `jsonl` or `parquet` [default: that of --out, otherwise csv].
    #[arg(long)]
    pub format: Option<TableFormat>,
}

/// A file that can predict.
#[derive(Clone, Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct ModelFile {
    /// A prompt file with a head, for example a composed or tuned one.
    #[arg(long, value_name = "FILE")]
    pub prompt: Option<PathBuf>,
    /// An ensemble file, as `compose` writes it.
    #[arg(long, value_name = "FILE")]
    pub ensemble: Option<PathBuf>,
}

/// What predicts, and the names of its classes.
pub(super) struct Predicting {
    pub predictor: Predictor,
    pub classes: Vec<String>,
}

impl ModelFile {
    /// Reads the file, and checks that it fits the backbone.
    pub(super) fn read(&self, backbone: &Backbone, vit: &Vit) -> anyhow::Result<Predicting> {
        let (path, is_ensemble) = match (&self.prompt, &self.ensemble) {
            (Some(path), _) => (path, false),
            (None, Some(path)) => (path, true),
            (None, None) => unreachable!("one of them is required"),
        };
        let name = path.display().to_string();
        let bytes = fs::read(path).with_context(|| format!("cannot read `{name}`"))?;
        let kind = match is_ensemble {
            true => "an ensemble file",
            false => "a prompt file",
        };
        let model = Model::parse(&bytes).with_context(|| format!("`{name}` is not {kind}"))?;
        match (&model, is_ensemble) {
            (Model::Ensemble(_), false) => {
                bail!("`{name}` is an ensemble file; give it as --ensemble")
            }
            (Model::Prompt(_), true) => bail!("`{name}` is a prompt file; give it as --prompt"),
            _ => {}
        }
        let classes = model.check(&name, Digest::of(&bytes), &backbone.facts())?;
        let predictor = Predictor::of(&model, vit)?.expect("a model that was checked has a head");
        Ok(Predicting { predictor, classes })
    }
}

impl Predicting {
    /// log p(y|x) of all images, `[N, K]`.
    pub(super) fn log_probabilities(&self, vit: &Vit, images: &Samples) -> anyhow::Result<Tensor> {
        let members = self.predictor.num_members();
        let bar = bar("predict", (members * images.len()) as u64);
        let found = self.predictor.log_probabilities(vit, images, |done| {
            bar.inc(done);
            ControlFlow::Continue(())
        })?;
        bar.finish();
        Ok(found)
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let format = format(args)?;
    let mut paths = Vec::new();
    for path in &args.images {
        collect(path, &mut paths)?;
    }
    let mut engine = args.engine.engine()?;
    let (backbone, vit) = engine.backbone(&args.engine.backbone)?;
    let model = args.by.read(backbone, vit)?;
    let skip = args.engine.skip_unreadable;
    let images = Samples::unlabelled(paths.clone(), skip, &backbone.config.preprocessing)?;
    if images.skipped > 0 {
        eprintln!("{} unreadable images were left out", images.skipped);
    }
    let paths: Vec<&Path> = images
        .indices
        .iter()
        .map(|at| paths[*at].as_path())
        .collect();
    let log_p = model.log_probabilities(vit, &images)?;
    let named = paths.iter().map(|path| (path.display().to_string(), None));
    let table = table(named, &log_p, &model.classes, args.top_k as usize)?;
    match &args.out {
        Some(path) => {
            let mut bytes = Vec::new();
            table.write(format, &mut bytes)?;
            write_whole(path, &bytes)?;
            eprintln!("wrote {} predictions to {}", paths.len(), path.display());
        }
        None => table.write(format, io::stdout())?,
    }
    Ok(())
}

fn format(args: &Args) -> anyhow::Result<TableFormat> {
    let extension = args.out.as_ref().and_then(|path| path.extension());
    match (args.format, extension) {
        (Some(format), _) => Ok(format),
        (None, Some(extension)) => {
            let of_file = extension.to_string_lossy().parse();
            of_file.map_err(|error| anyhow::anyhow!("--out: {error}; or give --format"))
        }
        (None, None) => Ok(TableFormat::Csv),
    }
}

/// Adds an image, or all files of a folder in the order of their names. A file that begins with a dot is left out, as
/// programs keep their own notes in such files.
fn collect(path: &Path, images: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let unreadable = || format!("cannot read `{}`", path.display());
    if !fs::metadata(path).with_context(unreadable)?.is_dir() {
        images.push(path.to_owned());
        return Ok(());
    }
    let entries = fs::read_dir(path).with_context(unreadable)?;
    let entries = entries.map(|entry| entry.map(|entry| entry.path()));
    let mut entries = entries
        .collect::<io::Result<Vec<_>>>()
        .with_context(unreadable)?;
    entries.retain(|entry| {
        let name = entry.file_name().unwrap_or_default();
        !name.as_encoded_bytes().starts_with(b".")
    });
    if entries.is_empty() {
        bail!("folder `{}` has no images", path.display());
    }
    entries.sort();
    entries.iter().try_for_each(|entry| collect(entry, images))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offline::parsed;

    fn args(more: &[&str]) -> Args {
        let given = ["predict", "--backbone", "b", "--prompt", "p"];
        parsed(given.iter().chain(more))
    }

    #[test]
    fn the_format_is_that_of_the_file_unless_it_is_given() {
        let of = |more: &[&str]| format(&args(more)).map_err(|error| error.to_string());
        assert_eq!(of(&["x.png"]), Ok(TableFormat::Csv));
        assert_eq!(
            of(&["x.png", "--out", "a.parquet"]),
            Ok(TableFormat::Parquet)
        );
        assert_eq!(
            of(&["x.png", "--out", "a.txt", "--format", "jsonl"]),
            Ok(TableFormat::Jsonl)
        );
        let refused = of(&["x.png", "--out", "a.xlsx"]).unwrap_err();
        assert!(
            refused.starts_with("--out: `xlsx` is not a format"),
            "{refused}"
        );
    }

    #[test]
    fn folders_are_searched_in_order_and_an_empty_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["b/2.png", "b/1.png", "a.png", ".notes", "b/.DS_Store"] {
            fs::create_dir_all(at(name).parent().unwrap()).unwrap();
            fs::write(at(name), "").unwrap();
        }
        let mut images = Vec::new();
        collect(dir.path(), &mut images).unwrap();
        assert_eq!(images, ["a.png", "b/1.png", "b/2.png"].map(at));
        // A file that is named is taken whatever its name is.
        collect(&at(".notes"), &mut images).unwrap();
        assert_eq!(images.last(), Some(&at(".notes")));
        fs::create_dir(at("empty")).unwrap();
        for (missing, said) in [("empty", "has no images"), ("nothing", "cannot read")] {
            let refused = collect(&at(missing), &mut Vec::new()).unwrap_err();
            assert!(refused.to_string().contains(said), "{refused:#}");
        }
    }
}

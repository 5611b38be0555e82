//! `promptweave tune`: train one visual prompt on a labelled image set with a frozen backbone.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, ensure};
use clap::ValueEnum;
use indicatif::ProgressBar;

use super::progress::bar;
use super::{EngineOptions, parse_split, read_prompt, write_whole};
use crate::domain::composition::Phase;
use crate::domain::dataset::{LabelledImages, Split};
use crate::domain::tuning::{
    Candidate, Checkpoints, Epoch, Grid, InvalidTuning, OptimizerKind, TuningOptions,
};
use crate::engine::samples::Selection;
use crate::engine::tuning::{Course, Images, Outcome, Tuning};

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub engine: EngineOptions,
    /// Folder of labelled images: an image folder or VTAB-1k list files.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// The prompt file to write.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Name of the task, kept in the file [default: the folder's name].
    #[arg(long)]
    pub task: Option<String>,
    /// Split to train on.
    #[arg(long, default_value = "train", value_parser = parse_split)]
    pub split: Split,
    /// At most this many images, a stratified choice [default: all].
    #[arg(long)]
    pub max_samples: Option<usize>,
    /// Begin with this prompt file, a composed one say, and with its head where it is one of these classes [default: the
    /// initial prompt of --init-seed, and no head]. Its head is left out where images are held out, which it may know.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["num_tokens", "init_seed"])]
    pub start: Option<PathBuf>,
    /// m, the prompt's length in tokens.
    #[arg(long, default_value_t = TuningOptions::default().num_tokens)]
    pub num_tokens: usize,
    /// Seed of the initial prompt; prompts that are to be composed should share it.
    #[arg(long, default_value_t = 0)]
    pub init_seed: u64,
    /// Seed of the choice of images and the order of batches.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[arg(long, default_value_t = TuningOptions::default().epochs)]
    pub epochs: usize,
    #[arg(long, default_value_t = TuningOptions::default().batch_size)]
    pub batch_size: usize,
    #[arg(long, value_enum, default_value_t = OptimizerName::AdamW)]
    pub optimizer: OptimizerName,
    /// Too high and the prompt ends far from its initial values, where prompts mix badly. Several, with `,` between them, are
    /// tried on held-out images, and the best is taken.
    #[arg(long, value_delimiter = ',', default_values_t = [TuningOptions::default().prompt_learning_rate])]
    pub prompt_learning_rate: Vec<f64>,
    #[arg(long, default_value_t = TuningOptions::default().head_learning_rate)]
    pub head_learning_rate: f64,
    /// Several are tried, as above.
    #[arg(long, value_delimiter = ',', default_values_t = [TuningOptions::default().weight_decay])]
    pub weight_decay: Vec<f64>,
    #[arg(long, default_value_t = TuningOptions::default().warmup_epochs)]
    pub warmup_epochs: usize,
    /// Share of the prompt's values that a step leaves out, from 0 to below 1.
    #[arg(long, default_value_t = 0.0)]
    pub prompt_dropout: f64,
    /// Stop after so many epochs without a lower loss on held-out images, and take the epoch with the lowest; then the
    /// held-out images are not trained on [default: all epochs, and all images].
    #[arg(long, value_name = "EPOCHS")]
    pub patience: Option<usize>,
    /// Labelled features kept in the file for transferability scores; 0 for none.
    #[arg(long, default_value_t = TuningOptions::default().sketch_samples)]
    pub sketch_samples: usize,
    /// Where the state after every epoch is kept, to go on from after a kill; deleted at the end [default: beside --out].
    #[arg(long, value_name = "FILE")]
    pub checkpoint: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OptimizerName {
    #[value(alias = "adamw")]
    AdamW,
    /// With momentum 0.9.
    Sgd,
}

impl Args {
    fn check(&self) -> anyhow::Result<()> {
        let of_option = |invalid: InvalidTuning| {
            let option = invalid.field.replace('_', "-");
            // A grid's lists are one option each, of the single value's name.
            let option = option
                .replace("-rates", "-rate")
                .replace("-decays", "-decay");
            anyhow!("--{option} {}", invalid.problem)
        };
        self.options().check().map_err(of_option)?;
        self.grid().check().map_err(of_option)
    }

    fn options(&self) -> TuningOptions {
        TuningOptions {
            num_tokens: self.num_tokens,
            init_seed: self.init_seed,
            seed: self.seed,
            epochs: self.epochs,
            batch_size: self.batch_size,
            prompt_learning_rate: self.prompt_learning_rate[0],
            head_learning_rate: self.head_learning_rate,
            weight_decay: self.weight_decay[0],
            warmup_epochs: self.warmup_epochs,
            optimizer: match self.optimizer {
                OptimizerName::AdamW => OptimizerKind::AdamW,
                OptimizerName::Sgd => OptimizerKind::Sgd,
            },
            prompt_dropout: self.prompt_dropout,
            patience: self.patience,
            sketch_samples: self.sketch_samples,
        }
    }

    fn grid(&self) -> Grid {
        Grid {
            prompt_learning_rates: self.prompt_learning_rate.clone(),
            weight_decays: self.weight_decay.clone(),
        }
    }

    fn task(&self) -> String {
        let folder = self
            .data
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        self.task.clone().or(folder).unwrap_or_default()
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    args.check()?;
    let start = args
        .start
        .as_deref()
        .map(read_prompt)
        .transpose()?
        .map(|(_, file)| file);
    let mut engine = args.engine.engine()?;
    let (backbone, vit) = engine.backbone(&args.engine.backbone)?;
    if let (Some(file), Some(path)) = (&start, &args.start) {
        ensure!(
            file.embed_dim() == backbone.config.embed_dim,
            "`{}` is {} wide, the backbone {}",
            path.display(),
            file.embed_dim(),
            backbone.config.embed_dim
        );
    }
    let dataset = LabelledImages::read(&args.data)?;
    let selection = Selection {
        split: args.split,
        max_samples: args.max_samples,
        seed: args.seed,
        skip_bad: args.engine.skip_bad,
    };
    let images = Images::load(&dataset, &selection, &backbone.config.preprocessing)?;
    let (task, grid, options) = (args.task(), args.grid(), args.options());
    let course = Course {
        tuning: Tuning {
            backbone,
            vit,
            train: &images.all,
            held_out: None,
            task: &task,
            classes: &dataset.classes,
            start: start.as_ref(),
            options: &options,
        },
        grid: &grid,
        images: &images,
    };
    if course.holds_out() {
        let (held_out, whose) = (images.held_out.len(), images.whose);
        eprintln!("held out: {held_out} images, {whose}");
    }
    let mut checkpoint = CheckpointFile::of(args);
    let outcome = watched(&course, &mut checkpoint)?;
    if !outcome.candidates.is_empty() {
        print!("{}", table(&outcome));
    }
    let file = outcome.file;
    write_whole(&args.out, &file.to_bytes())?;
    checkpoint.delete(outcome.candidates.len());
    let training = file
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.training.as_ref());
    let losses =
        training.and_then(|training| training["cross_entropy"].as_array()?.last()?.as_f64());
    println!(
        "wrote {}: {} tokens for `{task}`, last epoch's cross-entropy {:.4} nats",
        args.out.display(),
        file.num_tokens(),
        losses.expect("there are epochs")
    );
    Ok(())
}

/// The pairs of the grid, the chosen one marked.
fn table(outcome: &Outcome) -> String {
    let mut text = format!(
        "{:>20}  {:>12}  {:>17}\n",
        "prompt learning rate", "weight decay", "held-out accuracy"
    );
    for Candidate {
        prompt_learning_rate,
        weight_decay,
        accuracy,
        ..
    } in &outcome.candidates
    {
        let is_chosen = *prompt_learning_rate == outcome.options.prompt_learning_rate
            && *weight_decay == outcome.options.weight_decay;
        let mark = if is_chosen { "  chosen" } else { "" };
        text +=
            &format!("{prompt_learning_rate:>20}  {weight_decay:>12}  {accuracy:>17.4}{mark}\n");
    }
    text
}

/// Runs with a bar for each phase, that shows epoch and loss.
fn watched(course: &Course<'_>, checkpoint: &mut CheckpointFile) -> anyhow::Result<Outcome> {
    let mut current: Option<(Phase, ProgressBar)> = None;
    let outcome = course.run(checkpoint, &mut |phase, at| {
        if current.as_ref().is_none_or(|(there, _)| *there != phase) {
            if let Some((_, finished)) = current.take() {
                finished.finish();
            }
            current = Some((phase, bar(phase.name(), course.total(phase))));
        }
        if let Some((_, bar)) = &current {
            bar.inc(at.samples);
            let (epoch, loss) = (at.epoch + 1, at.cross_entropy);
            bar.set_message(format!("epoch {epoch} loss {loss:.3}"));
        }
        ControlFlow::Continue(())
    });
    if let Some((_, bar)) = current {
        bar.finish();
    }
    Ok(outcome?)
}

/// A file beside the result; of a grid's pairs one more each.
struct CheckpointFile(PathBuf);

impl CheckpointFile {
    fn of(args: &Args) -> Self {
        let beside = || with_suffix(&args.out, "checkpoint");
        Self(args.checkpoint.clone().unwrap_or_else(beside))
    }

    fn at_pair(&self, place: usize) -> Self {
        Self(with_suffix(&self.0, &place.to_string()))
    }

    fn delete(&self, pairs: usize) {
        let all = (0..pairs).map(|place| self.at_pair(place).0);
        for path in all.chain([self.0.clone()]) {
            let _ = fs::remove_file(path);
        }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}

impl Checkpoints for CheckpointFile {
    fn last(&mut self) -> Option<Vec<u8>> {
        fs::read(&self.0).ok()
    }

    fn keep(&mut self, _: &Epoch, bytes: &[u8]) {
        let written = write_whole(&self.0, bytes).context("no checkpoint");
        if let Err(error) = written {
            eprintln!("warning: {error:#}; after a kill this tuning would begin anew");
        }
    }

    fn of_pair(&mut self, place: usize) -> Box<dyn Checkpoints + '_> {
        Box::new(self.at_pair(place))
    }
}

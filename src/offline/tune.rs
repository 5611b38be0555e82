//! `promptweave tune`: train one visual prompt on a labelled image set with a frozen backbone.

use std::collections::HashSet;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::ValueEnum;

use super::progress::bar;
use super::{EngineOptions, parse_split, read_prompt, write_whole};
use crate::domain::backbone::Preprocessing;
use crate::domain::dataset::{LabelledImages, Split, stratified_subset};
use crate::engine::samples::{Samples, Selection};
use crate::engine::tuning::{
    Candidate, Checkpoints, Grid, OptimizerKind, Tuning, TuningOptions, TuningProgress,
};

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
        ensure!(self.num_tokens > 0, "--num-tokens must be at least 1");
        ensure!(self.batch_size > 0, "--batch-size must be at least 1");
        ensure!(self.epochs > 0, "--epochs must be at least 1");
        ensure!(self.patience != Some(0), "--patience must be at least 1");
        let dropout = self.prompt_dropout;
        ensure!(
            (0.0..1.0).contains(&dropout),
            "--prompt-dropout is {dropout}; it must be at least 0 and below 1"
        );
        let numbers = self.prompt_learning_rate.iter().chain(&self.weight_decay);
        for number in numbers.chain([&self.head_learning_rate]) {
            ensure!(
                number.is_finite() && *number >= 0.0,
                "learning rates and weight decays must be finite and at least 0; one is {number}"
            );
        }
        Ok(())
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
    let mut start = args
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
    let images = Images::load(args, &dataset, &backbone.config.preprocessing)?;
    let (task, grid) = (args.task(), args.grid());
    if grid.len() > 1 || args.patience.is_some() {
        // It was fitted on images that are to be held out, and would know them.
        if let Some(file) = &mut start {
            file.head = None;
        }
        ensure!(
            !images.part.labels.is_empty(),
            "one image is too few to hold any out"
        );
        eprintln!(
            "held out: {} images, {}",
            images.held_out.len(),
            images.whose
        );
    }
    let asked = args.options();
    let tuning = Tuning {
        backbone,
        vit,
        train: &images.all,
        held_out: None,
        task: &task,
        classes: &dataset.classes,
        start: start.as_ref(),
        options: &asked,
    };
    let selected = match grid.len() {
        1 => None,
        _ => Some(select(&grid, tuning, &images)?),
    };
    let tuning = Tuning {
        options: selected.as_ref().unwrap_or(&asked),
        ..tuning
    };
    // Who stops early is told by images that are not trained on.
    let tuning = match args.patience {
        Some(_) => Tuning {
            train: &images.part,
            held_out: Some(&images.held_out),
            ..tuning
        },
        None => tuning,
    };
    let mut checkpoint = CheckpointFile::of(args);
    let file = watched("tune", args.epochs * tuning.train.len(), |watch| {
        tuning.run(&mut checkpoint, watch)
    })?;
    write_whole(&args.out, &file.to_bytes())?;
    checkpoint.delete();
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

/// The best of the grid, told with the others.
fn select(grid: &Grid, tuning: Tuning<'_>, images: &Images) -> anyhow::Result<TuningOptions> {
    let total = grid.len() * tuning.options.epochs * images.part.len();
    let (chosen, candidates) = watched("select", total, |watch| {
        grid.select(tuning, (&images.part, &images.held_out), watch)
    })?;
    println!(
        "{:>20}  {:>12}  {:>17}",
        "prompt learning rate", "weight decay", "held-out accuracy"
    );
    for Candidate {
        prompt_learning_rate,
        weight_decay,
        accuracy,
        ..
    } in &candidates
    {
        let is_chosen = *prompt_learning_rate == chosen.prompt_learning_rate
            && *weight_decay == chosen.weight_decay;
        let mark = if is_chosen { "  chosen" } else { "" };
        println!("{prompt_learning_rate:>20}  {weight_decay:>12}  {accuracy:>17.4}{mark}");
    }
    Ok(chosen)
}

/// Runs with a bar that shows epoch and loss.
fn watched<T, E>(
    name: &str,
    total: usize,
    run: impl FnOnce(&mut dyn FnMut(TuningProgress) -> ControlFlow<()>) -> Result<T, E>,
) -> Result<T, E> {
    let bar = bar(name, total as u64);
    let done = run(&mut |at| {
        bar.inc(at.samples);
        bar.set_message(format!(
            "epoch {} loss {:.3}",
            at.epoch + 1,
            at.cross_entropy
        ));
        ControlFlow::Continue(())
    });
    bar.finish();
    done
}

/// The images of the split, and the same in two parts.
struct Images {
    all: Samples,
    part: Samples,
    held_out: Samples,
    /// What is held out.
    whose: &'static str,
}

impl Images {
    fn load(
        args: &Args,
        dataset: &LabelledImages,
        preprocessing: &Preprocessing,
    ) -> anyhow::Result<Self> {
        let selection = |split, max_samples| Selection {
            split,
            max_samples,
            seed: args.seed,
            skip_bad: args.engine.skip_bad,
        };
        let all = Samples::load(
            dataset,
            &selection(args.split, args.max_samples),
            preprocessing,
        )?;
        // VTAB-1k's val200 is a part of train800val200.
        let paths = |split: Split| -> HashSet<&str> {
            let images = dataset.splits.get(&split).into_iter().flatten();
            images.map(|image| image.path.as_str()).collect()
        };
        let val = paths(Split::Val);
        let listed = &dataset.splits[&args.split];
        let is_val = |row: &usize| val.contains(listed[all.indices[*row]].path.as_str());
        let (mut held_out, mut part): (Vec<usize>, Vec<usize>) = (0..all.len()).partition(is_val);
        let mut whose = "of the split val";
        if held_out.is_empty() && !val.is_empty() && args.split != Split::Val {
            // A split of its own, as image folders have it.
            let held_out = Samples::load(dataset, &selection(Split::Val, None), preprocessing)?;
            return Ok(Self {
                part: all.only(&part),
                whose,
                held_out,
                all,
            });
        }
        if held_out.is_empty() || part.is_empty() {
            whose = "every fifth of the images";
            held_out = stratified_subset(&all.labels, all.len().div_ceil(5), args.seed);
            part = (0..all.len())
                .filter(|row| !held_out.contains(row))
                .collect();
        }
        Ok(Self {
            part: all.only(&part),
            held_out: all.only(&held_out),
            whose,
            all,
        })
    }
}

/// A file beside the result.
struct CheckpointFile(PathBuf);

impl CheckpointFile {
    fn of(args: &Args) -> Self {
        let beside = || {
            let mut name = args.out.as_os_str().to_owned();
            name.push(".checkpoint");
            PathBuf::from(name)
        };
        Self(args.checkpoint.clone().unwrap_or_else(beside))
    }

    fn delete(&self) {
        let _ = fs::remove_file(&self.0);
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Checkpoints for CheckpointFile {
    fn last(&mut self) -> Option<Vec<u8>> {
        fs::read(self.path()).ok()
    }

    fn keep(&mut self, bytes: &[u8]) {
        let written = write_whole(self.path(), bytes).context("no checkpoint");
        if let Err(error) = written {
            eprintln!("warning: {error:#}; after a kill this tuning would begin anew");
        }
    }
}

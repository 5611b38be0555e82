//! `promptweave tune`: trains one visual prompt on a labelled image set with a frozen backbone, or a baseline that
//! prompts are compared with.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context as _, anyhow};
use clap::ValueEnum;
use indicatif::ProgressBar;

use crate::offline::progress::bar;
use crate::offline::{EngineOptions, parse_split, read_prompt, write_whole};
use promptweave_domain::backbone::Preprocessing;
use promptweave_domain::composition::Source;
use promptweave_domain::phase::Phase;
use promptweave_domain::split::Split;
use promptweave_domain::tuning::{
    Candidate, CheckpointUnavailable, Checkpoints, Epoch, Grid, InvalidTuning, OptimizerKind,
    TuningOptions,
};
use promptweave_domain::tuning_method::TuningMethod;
use promptweave_engine::compose::sources::{check_sources, check_start_of};
use promptweave_engine::error::EngineError;
use promptweave_engine::samples::{Samples, Selection};
use promptweave_engine::tune::{Images, Outcome, Trained, Tuning, TuningProgress, TuningRun};
use promptweave_formats::dataset::LabelledImages;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub engine: EngineOptions,
    /// Folder of labelled images: an image folder or VTAB-1k list files.
    #[arg(long, value_name = "DIR")]
    pub target: PathBuf,
    /// What to train beside the head: `vpt-shallow` or `vpt-deep`; or, as a baseline without a prompt, `linear`,
    /// `mlp-K`, `partial-K`, `bias`, `adapter-R`, `sidetune` or `full`.
    #[arg(long, default_value_t = TuningMethod::default())]
    pub method: TuningMethod,
    /// File to write: the prompt, or the trained tensors of a method without one.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Name of the task, kept in the file [default: the folder's name].
    #[arg(long)]
    pub task: Option<String>,
    /// Split to train on.
    #[arg(long, default_value = "train", value_parser = parse_split)]
    pub split: Split,
    /// The most images to use, a stratified choice [default: all].
    #[arg(long)]
    pub max_samples: Option<usize>,
    /// Prompt file to start from, for example a composed one [default: the initial prompt of --init-seed, and no head].
    /// Its head is used too if it has the same classes, but not when images are held out, which the head may have seen.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["num_tokens", "init_seed"])]
    pub start: Option<PathBuf>,
    /// A source prompt to learn from (PANDA's distillation): the loss pulls towards its logits, which come from a
    /// closed-form head on the training images. May be given several times.
    #[arg(long, value_name = "FILE")]
    pub teacher: Vec<PathBuf>,
    /// Weight of the mean squared difference to the teachers' logits [default: 0.1 with a teacher].
    #[arg(long, requires = "teacher")]
    pub distillation_weight: Option<f64>,
    /// Length of the prompt in tokens, m.
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
    /// Learning rate of everything that is trained beside the head. Too high: the prompt ends far from its initial
    /// values, where prompts mix badly. If several are given, with `,` between them, each is tried on held-out images
    /// and the best is taken [default: 0.002; 0.0001 with `partial` and `full`].
    #[arg(long, value_delimiter = ',')]
    pub prompt_learning_rate: Vec<f64>,
    #[arg(long, default_value_t = TuningOptions::default().head_learning_rate)]
    pub head_learning_rate: f64,
    /// Weight decay; if several are given, they are tried too, as above.
    #[arg(long, value_delimiter = ',', default_values_t = [TuningOptions::default().weight_decay])]
    pub weight_decay: Vec<f64>,
    #[arg(long, default_value_t = TuningOptions::default().warmup_epochs)]
    pub warmup_epochs: usize,
    /// Share of the prompt's values that each step leaves out, from 0 to below 1.
    #[arg(long, default_value_t = 0.0)]
    pub prompt_dropout: f64,
    /// Stop after this many epochs without a lower loss on held-out images, and take the epoch with the lowest. The
    /// held-out images are then not trained on [default: all epochs, and all images].
    #[arg(long, value_name = "EPOCHS")]
    pub patience: Option<usize>,
    /// Labelled features to keep in the file for transferability scores; 0 keeps none.
    #[arg(long, default_value_t = TuningOptions::default().sketch_samples)]
    pub sketch_samples: usize,
    /// File that keeps the state after every epoch, so that a killed run can continue; deleted at the end [default:
    /// beside --out].
    #[arg(long, value_name = "FILE")]
    pub checkpoint: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OptimizerName {
    #[value(alias = "adamw")]
    AdamW,
    /// SGD with momentum 0.9.
    Sgd,
}

impl Args {
    fn check(&self) -> anyhow::Result<()> {
        let of_option = |invalid: InvalidTuning| {
            let option = invalid.field.replace('_', "-");
            // Each list of a grid is one option, named like the single value.
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
            prompt_learning_rate: (self.prompt_learning_rate.first().copied())
                .unwrap_or_else(|| self.method.usual_learning_rate()),
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
            method: self.method,
            distillation_weight: match self.teacher.as_slice() {
                [] => 0.0,
                _ => self.distillation_weight.unwrap_or(0.1),
            },
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
            .target
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        self.task.clone().or(folder).unwrap_or_default()
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    args.check()?;
    let read = |path: &PathBuf| -> anyhow::Result<Source> {
        let (digest, file) = read_prompt(path)?;
        Ok(Source {
            prompt: path.display().to_string(),
            version: None,
            digest,
            file,
        })
    };
    let start = args.start.as_ref().map(read).transpose()?;
    let teachers = args.teacher.iter().map(read);
    let teachers: Vec<Source> = teachers.collect::<anyhow::Result<_>>()?;
    let mut engine = args.engine.engine()?;
    let (backbone, vit) = engine.backbone(&args.engine.backbone)?;
    if let Some(start) = &start {
        check_start_of(args.method, start, backbone)?;
    }
    for teacher in &teachers {
        check_sources(std::slice::from_ref(teacher), backbone)?;
    }
    let mut options = args.options();
    if let Some(start) = &start {
        // The length and seed of the prompt that it starts from cannot change.
        let metadata = start.file.metadata.as_ref();
        options.num_tokens = start.file.num_tokens();
        options.init_seed = metadata.and_then(|m| m.init_seed).unwrap_or_default();
    }
    let dataset = LabelledImages::read(&args.target)?;
    let selection = Selection {
        split: args.split,
        max_samples: args.max_samples,
        seed: args.seed,
        skip_unreadable: args.engine.skip_unreadable,
    };
    let images = Images::load(&dataset, &selection, &backbone.config.preprocessing)?;
    let (task, grid) = (args.task(), args.grid());
    let course = TuningRun {
        tuning: Tuning {
            backbone,
            vit,
            train: &images.all,
            held_out: None,
            task: &task,
            classes: &dataset.classes,
            start: start.as_ref(),
            takes_head: true,
            teachers: &teachers,
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
    let test = test_images(&dataset, &selection, &backbone.config.preprocessing)?;
    let outcome = watched(&course, &mut checkpoint, &mut |tuned| {
        let go_on = &mut || ControlFlow::Continue(());
        let bytes = match options.method.makes_prompt() {
            true => tuned.prompt_file(go_on)?.to_bytes(),
            false => tuned.adaptation()?,
        };
        let tested = test.as_ref().map(|test| tuned.score(test, go_on));
        let tested = tested.transpose()?;
        Ok((bytes, tuned.curves.clone(), tested))
    })?;
    if !outcome.candidates.is_empty() {
        print!("{}", table(&outcome));
    }
    let (bytes, curves, tested) = &outcome.made;
    write_whole(&args.out, bytes)?;
    checkpoint.delete(outcome.candidates.len());
    let loss = curves.cross_entropy.last().expect("there are epochs");
    let tested = tested.map_or(String::new(), |score| {
        format!(", test accuracy {:.4}", score.accuracy)
    });
    println!(
        "wrote {}: {} for `{task}`, last epoch's loss {loss:.4} nats{tested}",
        args.out.display(),
        options.method,
    );
    Ok(())
}

/// The images of the split `test`, unless that split is trained on.
fn test_images(
    dataset: &LabelledImages,
    selection: &Selection,
    preprocessing: &Preprocessing,
) -> anyhow::Result<Option<Samples>> {
    if selection.split == Split::Test || !dataset.splits.contains_key(&Split::Test) {
        return Ok(None);
    }
    let all = selection.whole(Split::Test);
    Ok(Some(Samples::load(dataset, &all, preprocessing)?))
}

/// The pairs of the grid, with the chosen one marked.
fn table<T>(outcome: &Outcome<T>) -> String {
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
        let accuracy = accuracy.map_or("not finite".into(), |share| format!("{share:.4}"));
        text += &format!("{prompt_learning_rate:>20}  {weight_decay:>12}  {accuracy:>17}{mark}\n");
    }
    text
}

/// Runs with a progress bar for each phase, which shows epoch and loss.
fn watched<T>(
    course: &TuningRun<'_>,
    checkpoint: &mut CheckpointFile,
    make: &mut dyn FnMut(&Trained<'_>) -> Result<T, EngineError>,
) -> anyhow::Result<Outcome<T>> {
    let mut current: Option<(Phase, ProgressBar)> = None;
    let mut watch = |phase: Phase, at: TuningProgress| {
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
    };
    let outcome = course.make(checkpoint, &mut watch, make);
    if let Some((_, bar)) = current {
        bar.finish();
    }
    Ok(outcome?)
}

/// A checkpoint file beside the result; each pair of a grid has its own.
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
    fn last(&mut self) -> Result<Option<Vec<u8>>, CheckpointUnavailable> {
        match fs::read(&self.0) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CheckpointUnavailable(format!(
                "`{}`: {error}; delete it to begin anew",
                self.0.display()
            ))),
        }
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

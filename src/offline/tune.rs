//! `promptweave tune`: train one visual prompt on a labelled image set with a frozen backbone.

use std::ops::ControlFlow;
use std::path::PathBuf;

use super::progress::bar;
use super::{EngineOptions, parse_split, write_whole};
use crate::domain::dataset::{LabelledImages, Split};
use crate::engine::samples::{Samples, Selection};
use crate::engine::tuning::{TuningOptions, tune};

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
    /// Too high and the prompt ends far from its initial values, where prompts mix badly.
    #[arg(long, default_value_t = TuningOptions::default().prompt_learning_rate)]
    pub prompt_learning_rate: f64,
    #[arg(long, default_value_t = TuningOptions::default().head_learning_rate)]
    pub head_learning_rate: f64,
    #[arg(long, default_value_t = TuningOptions::default().weight_decay)]
    pub weight_decay: f64,
    #[arg(long, default_value_t = TuningOptions::default().warmup_epochs)]
    pub warmup_epochs: usize,
    /// Labelled features kept in the file for transferability scores; 0 for none.
    #[arg(long, default_value_t = TuningOptions::default().sketch_samples)]
    pub sketch_samples: usize,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.num_tokens > 0, "--num-tokens must be at least 1");
    anyhow::ensure!(args.batch_size > 0, "--batch-size must be at least 1");
    anyhow::ensure!(args.epochs > 0, "--epochs must be at least 1");
    let mut engine = args.engine.engine()?;
    let (backbone, vit) = engine.backbone(&args.engine.backbone)?;
    let dataset = LabelledImages::read(&args.data)?;
    let selection = Selection {
        split: args.split,
        max_samples: args.max_samples,
        seed: args.seed,
        skip_bad: args.engine.skip_bad,
    };
    let train = Samples::load(&dataset, &selection, &backbone.config.preprocessing)?;
    let folder = args
        .data
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let task = args.task.clone().or(folder).unwrap_or_default();
    let options = TuningOptions {
        num_tokens: args.num_tokens,
        init_seed: args.init_seed,
        seed: args.seed,
        epochs: args.epochs,
        batch_size: args.batch_size,
        prompt_learning_rate: args.prompt_learning_rate,
        head_learning_rate: args.head_learning_rate,
        weight_decay: args.weight_decay,
        warmup_epochs: args.warmup_epochs,
        sketch_samples: args.sketch_samples,
    };
    let bar = bar("tune", (args.epochs * train.len()) as u64);
    let mut last = None;
    let file = tune(
        backbone,
        vit,
        &train,
        &task,
        &dataset.classes,
        &options,
        |at| {
            bar.inc(at.samples);
            bar.set_message(format!(
                "epoch {} loss {:.3}",
                at.epoch + 1,
                at.cross_entropy
            ));
            last = Some(at.cross_entropy);
            ControlFlow::Continue(())
        },
    )?;
    bar.finish();
    write_whole(&args.out, &file.to_bytes())?;
    println!(
        "wrote {}: {} tokens for `{task}`, last epoch's cross-entropy {:.4} nats",
        args.out.display(),
        args.num_tokens,
        last.unwrap_or(f64::NAN)
    );
    Ok(())
}

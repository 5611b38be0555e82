//! `promptweave evaluate`: accuracy of a prompt on a labelled image set with its closed-form head, or of an ensemble with
//! the heads in its file.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::bail;
use serde::Serialize;

use crate::offline::predict::ModelFile;
use crate::offline::progress::bar;
use crate::offline::{EngineOptions, parse_split, read_prompt};
use promptweave_domain::composition::Source;
use promptweave_domain::objective::{
    HScoreMode, HScoreOptions, HeadOptions, Shrinkage, check_shrinkage,
};
use promptweave_domain::proportions::wilson;
use promptweave_domain::split::Split;
use promptweave_engine::compose::sources::check_sources;
use promptweave_engine::samples::{Samples, Selection};
use promptweave_engine::score::evaluate::{Evaluation, correct, cross_entropy};
use promptweave_engine::tensors::prompt_tensor;
use promptweave_formats::dataset::LabelledImages;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub engine: EngineOptions,
    #[command(flatten)]
    pub by: ModelFile,
    /// Folder of labelled images: an image folder or VTAB-1k list files.
    #[arg(long, value_name = "DIR")]
    pub target: PathBuf,
    /// Split to fit the head on.
    #[arg(long, default_value = "train", value_parser = parse_split)]
    pub split: Split,
    /// Split to measure accuracy on.
    #[arg(long, default_value = "test", value_parser = parse_split)]
    pub eval_split: Split,
    /// The most samples to fit the head on.
    #[arg(long, default_value_t = 2000)]
    pub max_samples: usize,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Mode of the reported H-score: `cross_validated`, `standard` or `trace_ratio`.
    #[arg(long, default_value_t)]
    pub h_score_mode: HScoreMode,
    /// Shrinkage ρ of that H-score: 0, or from 1e-6 to below 1; or `oas`, or `ledoit_wolf` [default: 0.3 with
    /// `cross_validated`, otherwise 0.01].
    #[arg(long)]
    pub h_score_shrinkage: Option<Shrinkage>,
    /// Shrinkage ρ of the head.
    #[arg(long, default_value_t = 0.3)]
    pub head_shrinkage: f64,
}

/// Prints `{"h_score": …, "train_accuracy": …, "eval_accuracy": …}`; of an ensemble `{"accuracy": …, "loss": …}`.
pub fn run(args: &Args) -> anyhow::Result<()> {
    match &args.by.prompt {
        Some(prompt) => of_prompt(args, prompt),
        None => of_ensemble(args),
    }
}

/// What an ensemble's own heads score on labelled images.
#[derive(Serialize)]
struct EnsembleScore {
    num_samples: usize,
    /// Forward passes for each image.
    forward_passes: usize,
    accuracy: f64,
    /// The 95 % interval (Wilson 1927).
    accuracy_interval: [f64; 2],
    /// Cross-entropy in nats.
    loss: f64,
}

fn of_ensemble(args: &Args) -> anyhow::Result<()> {
    let mut engine = args.engine.engine()?;
    let (backbone, vit) = engine.backbone(&args.engine.backbone)?;
    let model = args.by.read(backbone, vit)?;
    let dataset = LabelledImages::read(&args.target)?;
    if model.classes != dataset.classes {
        bail!(
            "the ensemble predicts the classes {}, and `{}` has {}: an ensemble is evaluated on the classes that it was \
             made for",
            listed(&model.classes),
            args.target.display(),
            listed(&dataset.classes)
        );
    }
    let selection = Selection {
        split: args.eval_split,
        max_samples: None,
        seed: args.seed,
        skip_unreadable: args.engine.skip_unreadable,
    };
    let images = Samples::load(&dataset, &selection, &backbone.config.preprocessing)?;
    let log_p = model.log_probabilities(vit, &images)?;
    let right = correct(&log_p, &images.labels)?;
    let successes = right.iter().filter(|right| **right).count();
    let score = EnsembleScore {
        num_samples: images.len(),
        forward_passes: model.predictor.num_members(),
        accuracy: successes as f64 / images.len() as f64,
        accuracy_interval: wilson(successes, images.len()),
        loss: cross_entropy(&log_p, &images.labels),
    };
    println!("{}", serde_json::to_string_pretty(&score)?);
    Ok(())
}

/// A few class names, and how many there are.
fn listed(classes: &[String]) -> String {
    let first = classes.iter().take(3).map(|name| format!("`{name}`"));
    let first = first.collect::<Vec<_>>().join(", ");
    match classes.len() {
        ..=3 => first,
        count => format!("{first}, … ({count})"),
    }
}

fn of_prompt(args: &Args, prompt: &Path) -> anyhow::Result<()> {
    let h_score = HScoreOptions {
        mode: Some(args.h_score_mode),
        shrinkage: args.h_score_shrinkage,
        ..Default::default()
    };
    h_score.shrinkage().check("--h-score-shrinkage")?;
    check_shrinkage("--head-shrinkage", args.head_shrinkage)?;
    let (digest, file) = read_prompt(prompt)?;
    let mut engine = args.engine.engine()?;
    let (backbone, vit) = engine.backbone(&args.engine.backbone)?;
    let name = prompt.display().to_string();
    let prompt = prompt_tensor(&file.prompt_embeddings, vit);
    check_sources(
        &[Source {
            prompt: name,
            version: None,
            digest,
            file,
        }],
        backbone,
    )?;

    let dataset = LabelledImages::read(&args.target)?;
    let load = |split, max_samples| {
        let selection = Selection {
            split,
            max_samples,
            seed: args.seed,
            skip_unreadable: args.engine.skip_unreadable,
        };
        Samples::load(&dataset, &selection, &backbone.config.preprocessing)
    };
    let train = load(args.split, Some(args.max_samples))?;
    let eval = load(args.eval_split, None)?;
    let evaluation = Evaluation {
        vit,
        train: &train,
        eval: Some(&eval),
        num_classes: dataset.classes.len(),
        h_score: &h_score,
        head: &HeadOptions {
            shrinkage: args.head_shrinkage,
            ..Default::default()
        },
    };
    let bar = bar("evaluate", evaluation.work(false));
    let evaluated = evaluation.run(&prompt, None, |done| {
        bar.inc(done);
        ControlFlow::Continue(())
    })?;
    bar.finish();
    println!("{}", serde_json::to_string_pretty(&evaluated.score)?);
    Ok(())
}

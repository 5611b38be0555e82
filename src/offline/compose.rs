//! `promptweave compose`: the whole method on local files.

use std::path::PathBuf;

use anyhow::Context as _;

use super::progress::Bars;
use super::{EngineOptions, parse_split, read_prompt, write_whole};
use crate::domain::composition::{Composer as _, CompositionInput, Source, TargetSamples};
use crate::domain::dataset::Split;
use crate::domain::objective::{
    AlignmentOptions, HScoreOptions, HeadOptions, Objective, Shrinkage, TradeOff,
};

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub engine: EngineOptions,
    /// Folder of the target task: an image folder or VTAB-1k list files.
    #[arg(long, value_name = "DIR")]
    pub target: PathBuf,
    /// A source prompt; repeat for each.
    #[arg(long = "source", value_name = "NAME=FILE", value_parser = parse_source, required = true)]
    pub sources: Vec<(String, PathBuf)>,
    /// Where result.json, composed.safetensors and statistics.safetensors go.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Split whose images are the target samples.
    #[arg(long, default_value = "train", value_parser = parse_split)]
    pub split: Split,
    /// Split to report accuracies on, beside uniform average and best single source.
    #[arg(long, value_parser = parse_split)]
    pub eval_split: Option<Split>,
    /// At most this many target samples, a stratified choice.
    #[arg(long, default_value_t = 2000)]
    pub max_samples: usize,
    /// Seed of that choice.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// t in 0..=1: 0 weighs transferability alone, 1 gradient alignment alone [default: 0.5].
    #[arg(long)]
    pub trade_off: Option<TradeOff>,
    /// A raw λ instead of --trade-off.
    #[arg(long, conflicts_with = "trade_off")]
    pub alignment_weight: Option<f64>,
    /// ρ of the H-score's covariance, between 0 and 1.
    #[arg(long, default_value_t = Shrinkage::Fixed(0.01))]
    pub h_score_shrinkage: Shrinkage,
    /// ρ of the closed-form head, between 0 and 1.
    #[arg(long, default_value_t = 0.3)]
    pub head_shrinkage: f64,
}

fn parse_source(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(file)))
        }
        _ => Err(format!("`{text}` is not NAME=FILE")),
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let sources = args
        .sources
        .iter()
        .map(|(name, path)| {
            let (digest, file) = read_prompt(path)?;
            Ok(Source {
                prompt: name.clone(),
                version: None,
                digest,
                file,
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let input = CompositionInput {
        backbone_dir: args.engine.backbone.clone(),
        target_dir: args.target.clone(),
        target: TargetSamples {
            split: args.split,
            eval_split: args.eval_split,
            max_samples: args.max_samples,
            seed: args.seed,
            skip_bad: args.engine.skip_bad,
        },
        sources,
        objective: Objective {
            trade_off: args.trade_off,
            alignment_weight: args.alignment_weight,
            h_score: HScoreOptions {
                shrinkage: args.h_score_shrinkage,
                ..Default::default()
            },
            alignment: AlignmentOptions::default(),
            head: HeadOptions {
                shrinkage: args.head_shrinkage,
                ..Default::default()
            },
            ..Default::default()
        },
    };
    let composition = args
        .engine
        .engine()?
        .compose(&input, &mut Bars::default())?;

    let json = serde_json::to_vec_pretty(&composition.result).context("result.json")?;
    write_whole(
        &args.out.join("statistics.safetensors"),
        &composition.statistics,
    )?;
    write_whole(
        &args.out.join("composed.safetensors"),
        &composition.composed,
    )?;
    write_whole(&args.out.join("result.json"), &json)?;

    let result = &composition.result;
    for (source, own) in result
        .source_weights
        .iter()
        .zip(&result.diagnostics.per_source)
    {
        println!(
            "{:24} α = {:.4}   H = {:.4}",
            source.prompt, source.weight, own.h_score
        );
    }
    if let Some(composed) = &result.diagnostics.composed {
        println!(
            "{:24} H = {:.4} mixed, {:.4} composed",
            "Σ α P", result.objective.h_score, composed.h_score
        );
    }
    for warning in &result.warnings {
        eprintln!("warning: {} ({})", warning.detail, warning.code);
    }
    println!("wrote {}", args.out.display());
    Ok(())
}

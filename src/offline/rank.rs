//! `promptweave rank`: every transferability metric of some prompts for a target task, in one table.

use std::path::PathBuf;

use crate::offline::compose::{parse_source, read_sources};
use crate::offline::progress::Bars;
use crate::offline::{EngineOptions, parse_split};
use promptweave_domain::composition::{CompositionInput, TargetSamples};
use promptweave_domain::objective::{HScoreOptions, Shrinkage, TARGET_EPOCHS};
use promptweave_domain::ranking::{RankedSource, Ranking, RankingObjective};
use promptweave_domain::split::Split;

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
    /// Split to take the target samples from.
    #[arg(long, default_value = "train", value_parser = parse_split)]
    pub split: Split,
    /// The most target samples to use, a stratified choice.
    #[arg(long, default_value_t = 2000)]
    pub max_samples: usize,
    /// Seed of that choice, and of the target's tuning.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Shrinkage ρ of the covariance of `h_score` and `h_score_adjusted`.
    #[arg(long, value_name = "RHO", default_value = "0.01")]
    pub h_score_shrinkage: Shrinkage,
    /// Epochs of the short tuning on the target. SPoT and PANDA measure similarity to its prompt.
    #[arg(long, value_name = "EPOCHS", default_value_t = TARGET_EPOCHS)]
    pub target_epochs: u32,
    /// Metric to sort the table by, best first.
    #[arg(long, value_name = "METRIC", default_value = "h_score_cross_validated", value_parser = RankedSource::METRICS)]
    pub sort_by: String,
    /// Print JSON, in the order of the sources.
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let objective = RankingObjective {
        h_score: HScoreOptions {
            shrinkage: Some(args.h_score_shrinkage),
            ..Default::default()
        },
        target_epochs: args.target_epochs,
    }
    .objective();
    objective.check()?;
    let input = CompositionInput {
        backbone_dir: args.engine.backbone.clone(),
        target_dir: args.target.clone(),
        target: TargetSamples {
            split: args.split,
            eval_split: None,
            max_samples: args.max_samples,
            seed: args.seed,
            skip_unreadable: args.engine.skip_unreadable,
        },
        sources: read_sources(&args.sources)?,
        objective,
        early_stopping: None,
    };
    let ranking = args.engine.engine()?.rank(&input, &mut Bars::default())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&ranking)?);
    } else {
        print!("{}", table(&ranking, &args.sort_by));
    }
    Ok(())
}

/// One line per source, best first; a dash if its file lacks what a metric needs.
fn table(ranking: &Ranking, by: &str) -> String {
    let mut sources: Vec<&RankedSource> = ranking.sources.iter().collect();
    // A source without the metric comes last.
    let key = |source: &RankedSource| source.metric(by).unwrap_or(f64::NEG_INFINITY);
    sources.sort_by(|a, b| key(b).total_cmp(&key(a)));
    let widest = sources.iter().map(|source| source.prompt.chars().count());
    let width = widest.max().unwrap_or(0).max("source".len());
    let mut text = format!("{:width$}", "source");
    for metric in RankedSource::METRICS {
        text += &format!("  {metric:>9}");
    }
    for source in sources {
        text += &format!("\n{:width$}", source.prompt);
        for metric in RankedSource::METRICS {
            let value = source
                .metric(metric)
                .map_or("–".into(), |value| format!("{value:.4}"));
            let column = metric.len().max(9);
            text += &format!("  {value:>column$}");
        }
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use promptweave_domain::digest::Digest;

    #[test]
    fn the_table_is_sorted_and_says_what_is_missing() {
        let source = |name: &str, h_score, leep| RankedSource {
            prompt: name.into(),
            digest: Digest::of(name.as_bytes()),
            h_score,
            h_score_adjusted: 0.5,
            h_score_cross_validated: 0.25,
            logme: -0.25,
            leep,
            nce: None,
            otce: None,
            spot_token_mean: 0.9,
            spot_all_pairs: 0.8,
            panda: -0.1,
        };
        let ranking = Ranking {
            sources: vec![
                source("emoji", 1.5, None),
                source("fashion", 2.5, Some(-0.75)),
            ],
            num_samples: 10,
            target_tuning_seconds: 0.5,
        };
        let by_h = table(&ranking, "h_score");
        let lines: Vec<&str> = by_h.lines().collect();
        assert!(lines[1].starts_with("fashion     2.5000"), "{by_h}");
        assert!(
            lines[2].starts_with("emoji       1.5000") && lines[2].contains('–'),
            "{by_h}"
        );
        let widths: Vec<usize> = lines.iter().map(|line| line.chars().count()).collect();
        assert_eq!(widths, vec![widths[0]; 3]);
        for metric in RankedSource::METRICS {
            assert_eq!(
                ranking.sources[1].metric(metric).is_some(),
                !["nce", "otce"].contains(&metric)
            );
        }
    }
}

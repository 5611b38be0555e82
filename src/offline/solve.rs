//! `promptweave solve`: solve for α again from `statistics.safetensors`, without backbone or images.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;

use crate::offline::objective::SolveOptions;
use crate::offline::progress::Bars;
use crate::offline::write_composition;
use promptweave_domain::composer::Composer as _;
use promptweave_domain::composition::{SolveInput, SourceRef};
use promptweave_engine::Engine;
use promptweave_engine::error::EngineError;
use promptweave_engine::statistics::{Metadata, RecordedSource};

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// `statistics.safetensors` of `promptweave compose`, or of an ensemble.
    #[arg(long, value_name = "FILE")]
    pub statistics: PathBuf,
    /// Use only these sources, by their names in the statistics [default: all]. Options that are not given are those of
    /// the composition.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub sources: Vec<String>,
    #[command(flatten)]
    pub objective: SolveOptions,
    /// Folder for result.json, composed.safetensors and statistics.safetensors.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// CPU threads [default: one per core].
    #[arg(long)]
    pub threads: Option<u32>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let name = args.statistics.display();
    let statistics = fs::read(&args.statistics).with_context(|| format!("cannot read `{name}`"))?;
    let unsolvable = || format!("cannot solve from `{name}`");
    let recorded = Metadata::read(&statistics).with_context(unsolvable)?;
    if let Some(threads) = args.threads {
        tch::set_num_threads(i32::try_from(threads.max(1))?);
    }
    let input = SolveInput {
        sources: named(&args.sources, &recorded)?,
        objective: args
            .objective
            .over(&recorded.objective.without_forward_passes())?,
        statistics,
    };
    let composition = Engine::new(tch::Device::Cpu)
        .solve(&input, &mut Bars::default())
        .with_context(unsolvable)?;
    write_composition(&args.out, &composition)
}

/// The named sources of the file; all of them if none is named.
fn named(names: &[String], recorded: &Metadata) -> Result<Vec<SourceRef>, EngineError> {
    let found = |name: &String| {
        let source = recorded.sources.iter().find(|s| s.prompt == *name);
        source.ok_or_else(|| EngineError::UnknownSource {
            prompt: name.clone(),
            known: recorded.source_names(),
        })
    };
    let chosen = if names.is_empty() {
        recorded.sources.iter().collect()
    } else {
        names.iter().map(found).collect::<Result<Vec<_>, _>>()?
    };
    let of = |source: &RecordedSource| SourceRef {
        prompt: source.prompt.clone(),
        version: None,
        digest: source.digest,
    };
    Ok(chosen.into_iter().map(of).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tch::Device;

    use super::*;
    use crate::offline::parsed;
    use promptweave_domain::composer::Unwatched;
    use promptweave_domain::objective::{HScoreMode, Objective, Shrinkage};
    use promptweave_engine::compose::self_test::job;

    #[test]
    fn a_mode_that_is_asked_for_counts_whatever_the_method_has_by_default() {
        let h_score = |asked: &[&str]| {
            let files = ["solve", "--statistics", "a", "--out", "b"];
            let args: Args = parsed(files.iter().chain(asked));
            let objective = args.objective.over(&Objective::default()).unwrap();
            let objective = objective.settled(true);
            (objective.h_score.mode(), objective.h_score.shrinkage())
        };
        let paper = ["--method", "hgprompt"];
        let (standard, cross_validated) = (HScoreMode::Standard, HScoreMode::CrossValidated);
        assert_eq!(h_score(&paper), (standard, Shrinkage::Fixed(0.01)));
        let asked = [paper.as_slice(), &["--h-score-mode", "cross_validated"]].concat();
        assert_eq!(h_score(&asked), (cross_validated, Shrinkage::Fixed(0.3)));
        let asked = ["--h-score-mode", "standard", "--h-score-shrinkage", "0.1"];
        assert_eq!(h_score(&asked), (standard, Shrinkage::Fixed(0.1)));
    }

    #[test]
    fn what_needs_the_backbone_is_refused_where_it_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let input = job(dir.path()).unwrap();
        let composed = Engine::new(Device::Cpu).compose(&input, &mut Unwatched);
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("statistics"), composed.unwrap().statistics).unwrap();
        let solve = |share: &str| {
            let (statistics, out) = (path("statistics"), path("out"));
            let files = ["solve", "--statistics", &statistics, "--out", &out];
            let asked = ["--uniform-mix", share];
            run(&parsed(files.iter().chain(&asked)))
        };
        let refused = format!("{:#}", solve("auto").unwrap_err());
        assert!(refused.contains("choose a number"), "{refused}");
        solve("1").unwrap();
        let result = fs::read(path("out/result.json")).unwrap();
        let result: Value = serde_json::from_slice(&result).unwrap();
        for source in result["source_weights"].as_array().unwrap() {
            assert_eq!(source["weight"], 1.0 / 3.0);
        }
    }
}

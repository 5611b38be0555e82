//! `promptweave compose`: the whole method on local files.

use std::path::PathBuf;

use crate::config::CacheOptions;
use crate::offline::objective::{BackboneOptions, SolveOptions};
use crate::offline::progress::Bars;
use crate::offline::{EngineOptions, parse_split, read_prompt, write_composition};
use promptweave_domain::composer::Composer as _;
use promptweave_domain::composition::{CompositionInput, Source, TargetSamples};
use promptweave_domain::split::Split;
use promptweave_engine::cache::ResultCache;

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
    /// Folder for result.json, composed.safetensors, ensemble.safetensors and statistics.safetensors.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Split to take the target samples from.
    #[arg(long, default_value = "train", value_parser = parse_split)]
    pub split: Split,
    /// Split to report accuracies on, compared with the uniform average and the best single source.
    #[arg(long, value_parser = parse_split)]
    pub eval_split: Option<Split>,
    /// The most target samples to use, a stratified choice.
    #[arg(long, default_value_t = 2000)]
    pub max_samples: usize,
    /// Seed of that choice.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Folder to keep features and gradients of the sources in, so that a later composition with some of them computes
    /// only what is new. Without it nothing is kept.
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    #[command(flatten)]
    pub cache_options: CacheOptions,
    #[command(flatten)]
    pub solve: SolveOptions,
    #[command(flatten)]
    pub backbone_options: BackboneOptions,
}

pub(super) fn parse_source(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(file)))
        }
        _ => Err(format!("`{text}` is not NAME=FILE")),
    }
}

/// Reads prompt files, each with the name it was given.
pub(super) fn read_sources(named: &[(String, PathBuf)]) -> anyhow::Result<Vec<Source>> {
    let source = |(name, path): &(String, PathBuf)| {
        let (digest, file) = read_prompt(path)?;
        Ok(Source {
            prompt: name.clone(),
            version: None,
            digest,
            file,
        })
    };
    named.iter().map(source).collect()
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    // Before any file is read: what is wrong with a flag is quickly said.
    let objective = args.solve.objective(&args.backbone_options)?;
    objective.check()?;
    let input = CompositionInput {
        backbone_dir: args.engine.backbone.clone(),
        target_dir: args.target.clone(),
        target: TargetSamples {
            split: args.split,
            eval_split: args.eval_split,
            max_samples: args.max_samples,
            seed: args.seed,
            skip_unreadable: args.engine.skip_unreadable,
        },
        sources: read_sources(&args.sources)?,
        objective,
        early_stopping: None,
    };
    let mut engine = args.engine.engine()?;
    let kept = args.cache_options;
    if let Some(dir) = &args.cache
        && let Some(cache) = ResultCache::open(dir, kept.max_bytes(), kept.cache_gradients)?
    {
        engine = engine.with_cache(cache);
    }
    let composition = engine.compose(&input, &mut Bars::default())?;
    write_composition(&args.out, &composition)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offline::parsed;
    use promptweave_domain::objective::MethodOptions;

    #[test]
    fn options_of_the_method_count_and_those_of_another_are_refused() {
        let objective = |asked: &[&str]| {
            let files = ["compose", "--backbone", "a", "--target", "b", "--out", "c"];
            let source = ["--source", "d=e"];
            let args: Args = parsed(files.iter().chain(&source).chain(asked));
            args.solve.objective(&args.backbone_options)
        };
        let spot = ["--method", "spot", "--top-k", "3", "--target-epochs", "2"];
        let MethodOptions::Spot(spot) = objective(&spot).unwrap().options else {
            panic!("another method");
        };
        assert_eq!((spot.top_k, spot.target_epochs), (Some(3), 2));
        let paper = objective(&["--method", "hgprompt", "--refine", "5"]).unwrap();
        assert_eq!(paper.experimental.refine, 5);
        let average = objective(&["--method", "average", "--refine", "5"]).unwrap();
        assert_eq!(average.check().unwrap_err().field, "experimental.refine");
        let refused = objective(&["--method", "panda", "--top-k", "3"]).unwrap_err();
        let refused = refused.to_string();
        assert!(
            refused.starts_with("--top-k: ") && refused.ends_with("is of `pool`, `spot`"),
            "{refused}"
        );
    }
}

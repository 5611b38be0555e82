//! Computes cells with the engine's own composition: what a user's request runs is what the tables are of.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use serde_json::Value;

use super::cells::{ALONE, Cell, NONE, method};
use super::results::Row;
use super::suite::Suite;
use super::{Args, Settings};
use crate::config::CacheOptions;
use crate::domain::backbone::Backbone;
use crate::domain::composition::{
    Composer as _, CompositionInput, CompositionResult, Observer, Phase, Source, SourceDiagnostics,
    TargetSamples,
};
use crate::domain::dataset::{LabelledImages, Split};
use crate::domain::method::TargetTuning;
use crate::domain::objective::Objective;
use crate::domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata};
use crate::domain::tensor::Tensor;
use crate::domain::tuning::{NoCheckpoints, TuningOptions};
use crate::engine::Engine;
use crate::engine::samples::{Samples, Selection};
use crate::engine::tuning::{Tuning, evaluate, initial_prompt};
use crate::offline::{read_prompt, write_whole};

pub struct Runner<'a> {
    args: &'a Args,
    suite: &'a Suite,
    settings: &'a Settings,
    engine: Engine,
    /// Source prompts by seed and task, as their files have them.
    prompts: HashMap<(u64, String), Source>,
}

impl<'a> Runner<'a> {
    pub fn new(args: &'a Args, suite: &'a Suite, settings: &'a Settings) -> anyhow::Result<Self> {
        let options = CacheOptions {
            cache_gib: args.cache_gib,
            cache_gradients: true,
        };
        let mut engine = args.engine.engine()?;
        if let Some(cache) = options.cache(&args.out.join("cache"))? {
            engine = engine.with_cache(cache);
        }
        Ok(Self {
            args,
            suite,
            settings,
            engine,
            prompts: HashMap::new(),
        })
    }

    pub fn compute(&mut self, cell: &Cell) -> anyhow::Result<Row> {
        let sources = self.sources(cell)?;
        let input = CompositionInput {
            backbone_dir: self.args.engine.backbone.clone(),
            target_dir: self.suite.task(&cell.target).dir.clone(),
            target: TargetSamples {
                split: Split::Train,
                eval_split: Some(Split::Test),
                max_samples: self.settings.target_samples,
                seed: cell.seed,
                skip_bad: self.args.engine.skip_bad,
            },
            sources,
            objective: self.objective(cell)?,
            stop_when: None,
        };
        let begun = Instant::now();
        let composition = self.engine.compose(&input, &mut Unwatched)?;
        let seconds = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let tuned_accuracy = match &self.settings.target_tuning {
            // A source alone is what rankings are compared with: as it is, whatever the profile.
            Some(options) if cell.method != ALONE => {
                Some(self.tune_on(cell, options, &composition.composed)?)
            }
            _ => None,
        };
        let mut row = row(cell, &composition.result, seconds)?;
        row.tuning_seconds = tuned_accuracy.map(|_| begun.elapsed().as_secs_f64());
        row.tuned_accuracy = tuned_accuracy;
        Ok(row)
    }

    /// Test accuracy after tuning prompt and head on the target, from the composed prompt and its closed-form head.
    fn tune_on(
        &mut self,
        cell: &Cell,
        options: &TuningOptions,
        composed: &[u8],
    ) -> anyhow::Result<f64> {
        let start = PromptFile::parse(composed)?;
        let options = TuningOptions {
            seed: cell.seed,
            ..options.clone()
        };
        let samples = self.settings.target_samples;
        let tuned = self.tuned(&cell.target, samples, Some(&start), &options)?;
        let test = self.samples(&cell.target, Split::Test, None, cell.seed)?;
        let (_, vit) = self.engine.backbone(&self.args.engine.backbone)?;
        Ok(evaluate(vit, &test, &tuned)?.accuracy)
    }

    fn samples(
        &mut self,
        task: &str,
        split: Split,
        max_samples: Option<usize>,
        seed: u64,
    ) -> anyhow::Result<Samples> {
        let dataset = LabelledImages::read(&self.suite.task(task).dir)?;
        let (backbone, _) = self.engine.backbone(&self.args.engine.backbone)?;
        let selection = Selection {
            split,
            max_samples,
            seed,
            skip_bad: self.args.engine.skip_bad,
        };
        let preprocessing = &backbone.config.preprocessing;
        Ok(Samples::load(&dataset, &selection, preprocessing)?)
    }

    fn objective(&self, cell: &Cell) -> anyhow::Result<Objective> {
        let mut objective: Objective = serde_json::from_value((method(cell.method).objective)())?;
        if objective.method.tunes() {
            objective.target_tuning = TargetTuning {
                epochs: self.settings.target_epochs,
            };
        }
        Ok(objective)
    }

    fn sources(&mut self, cell: &Cell) -> anyhow::Result<Vec<Source>> {
        if cell.method == NONE {
            return Ok(vec![self.initial(cell.seed)?]);
        }
        let sources = cell.sources.iter().map(|task| self.source(cell.seed, task));
        sources.collect()
    }

    /// The prompt of a task, tuned now where it has no file yet.
    fn source(&mut self, seed: u64, task: &str) -> anyhow::Result<Source> {
        let key = (seed, task.to_owned());
        if !self.prompts.contains_key(&key) {
            let path = self.prompt_path(seed, task);
            let options = self.tuning(seed);
            if !is_tuned_so(&path, &options) {
                let file = self
                    .tuned(task, self.settings.source_samples, None, &options)
                    .with_context(|| format!("cannot tune a prompt for `{task}`"))?;
                write_whole(&path, &file.to_bytes())?;
            }
            let (digest, file) = read_prompt(&path)?;
            let source = Source {
                prompt: task.to_owned(),
                version: None,
                digest,
                file,
            };
            self.prompts.insert(key.clone(), source);
        }
        Ok(self.prompts[&key].clone())
    }

    fn prompt_path(&self, seed: u64, task: &str) -> PathBuf {
        self.args
            .out
            .join("prompts")
            .join(format!("{task}-{seed}.safetensors"))
    }

    fn tuning(&self, seed: u64) -> TuningOptions {
        TuningOptions {
            init_seed: seed,
            seed,
            ..self.settings.source_tuning.clone()
        }
    }

    fn tuned(
        &mut self,
        task: &str,
        max_samples: usize,
        start: Option<&PromptFile>,
        options: &TuningOptions,
    ) -> anyhow::Result<PromptFile> {
        let train = self.samples(task, Split::Train, Some(max_samples), options.seed)?;
        let classes = LabelledImages::read(&self.suite.task(task).dir)?
            .listing
            .classes;
        let (backbone, vit) = self.engine.backbone(&self.args.engine.backbone)?;
        let tuning = Tuning {
            backbone,
            vit,
            train: &train,
            held_out: None,
            task,
            classes: &classes,
            start,
            options,
        };
        Ok(tuning.run(&mut NoCheckpoints, |_| ControlFlow::Continue(()))?)
    }

    /// What the sources of a seed began with.
    fn initial(&mut self, seed: u64) -> anyhow::Result<Source> {
        let (backbone, _) = self.engine.backbone(&self.args.engine.backbone)?;
        let file = initial_file(
            backbone,
            &TuningOptions {
                init_seed: seed,
                ..self.settings.source_tuning.clone()
            },
        );
        Ok(Source {
            prompt: NONE.to_owned(),
            version: None,
            digest: crate::domain::digest::Digest::of(&file.to_bytes()),
            file,
        })
    }
}

/// Whether there is a prompt that was tuned with these options.
fn is_tuned_so(path: &Path, options: &TuningOptions) -> bool {
    let Ok((_, file)) = read_prompt(path) else {
        return false;
    };
    let training = file.metadata.and_then(|metadata| metadata.training);
    let (Some(training), Ok(Value::Object(asked))) = (training, serde_json::to_value(options))
    else {
        return false;
    };
    asked
        .iter()
        .all(|(name, value)| training.get(name) == Some(value))
}

fn initial_file(backbone: &Backbone, options: &TuningOptions) -> PromptFile {
    let (m, d) = (options.num_tokens, backbone.config.embed_dim);
    PromptFile {
        metadata: Some(PromptMetadata {
            format: FORMAT,
            backbone_digest: Some(backbone.digest),
            preprocessing_id: Some(backbone.config.preprocessing.id()),
            init_seed: Some(options.init_seed),
            task: None,
            classes: None,
            origin: Origin::Uploaded,
            training: None,
        }),
        prompt_embeddings: Tensor::new(
            [m, d],
            initial_prompt(m, d, backbone.config.patch_size, options.init_seed),
        ),
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    }
}

fn row(cell: &Cell, result: &CompositionResult, seconds: f64) -> anyhow::Result<Row> {
    let composed = result.diagnostics.composed.as_ref();
    let composed = composed.ok_or_else(|| anyhow!("a composition with a backbone is verified"))?;
    let eval_accuracy = composed.eval_accuracy;
    Ok(Row {
        seed: cell.seed,
        target: cell.target.clone(),
        method: cell.method.to_owned(),
        sources: cell.sources.clone(),
        weights: result
            .source_weights
            .iter()
            .map(|source| source.weight)
            .collect(),
        scores: scores(result)?,
        scale: result.method.scale,
        eval_accuracy: eval_accuracy.ok_or_else(|| anyhow!("the test split was asked for"))?,
        train_accuracy: composed.train_accuracy,
        tuned_accuracy: None,
        tuning_seconds: None,
        h_score: composed.h_score,
        surrogate_gap: result.diagnostics.surrogate_gap,
        seconds,
        target_tuning_seconds: result.method.target_tuning_seconds,
    })
}

/// What is said of each source alone; a metric that some source lacks is left out.
fn scores(result: &CompositionResult) -> anyhow::Result<Vec<(String, Vec<f64>)>> {
    let of =
        |source: &SourceDiagnostics| -> anyhow::Result<Value> { Ok(serde_json::to_value(source)?) };
    let per_source = result.diagnostics.per_source.iter().map(of);
    let per_source = per_source.collect::<anyhow::Result<Vec<_>>>()?;
    let mut scores = Vec::new();
    for metric in [
        "h_score",
        "h_score_adjusted",
        "log_me",
        "leep",
        "nce",
        "otce",
    ] {
        let values: Option<Vec<f64>> = per_source
            .iter()
            .map(|source| source[metric].as_f64())
            .collect();
        scores.extend(values.map(|values| (metric.to_owned(), values)));
    }
    let by_method = result.method.scores.clone();
    scores.extend(by_method.map(|values| ("by_method".to_owned(), values)));
    Ok(scores)
}

struct Unwatched;

impl Observer for Unwatched {
    fn progress(&mut self, _: Phase, _: u64, _: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

//! Computes cells with the engine's own composition, so that the tables describe what a user's
//! request runs.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use serde_json::Value;

use crate::reproduce::cells::{Cell, NONE, method};
use crate::reproduce::results::Row;
use crate::reproduce::suite::Suite;
use crate::reproduce::{Args, Settings};
use promptweave::offline::{read_prompt, write_whole};
use promptweave_domain::composer::{Composer as _, Unwatched};
use promptweave_domain::composition::{
    CompositionInput, CompositionResult, Source, SourceDiagnostics, TargetSamples,
};
use promptweave_domain::digest::Digest;
use promptweave_domain::objective::Objective;
use promptweave_domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata};
use promptweave_domain::split::Split;
use promptweave_domain::stratified::stratified_subset;
use promptweave_domain::tensor::Tensor;
use promptweave_domain::training_record::TrainingRecord;
use promptweave_domain::tuning::{NoCheckpoints, TuningOptions};
use promptweave_engine::Engine;
use promptweave_engine::cache::ResultCache;
use promptweave_engine::samples::{Samples, Selection};
use promptweave_engine::score::evaluate::{OnUnseen, carried_head};
use promptweave_engine::score::transferability::matrix;
use promptweave_engine::tune::{Tuning, initial_prompt};
use promptweave_engine::vit::Vit;
use promptweave_engine::vit::features::extract;
use promptweave_formats::backbone::Backbone;
use promptweave_formats::dataset::LabelledImages;

pub struct Runner<'a> {
    args: &'a Args,
    suite: &'a Suite,
    settings: &'a Settings,
    engine: Engine,
    /// Source prompts by seed and task, as their files have them.
    prompts: HashMap<(u64, String), Source>,
    /// Unseen images of the last target and seed.
    unseen: Option<(String, u64, Unseen)>,
    /// Accuracies by target, seed and composed prompt. Several methods may give the same prompt.
    accuracies: HashMap<(String, u64, Digest), Accuracies>,
}

/// The target's images that no method sees.
pub struct Unseen {
    pub test: Samples,
    /// Training images that are not among the samples; `None` if all of them are.
    pub held_out: Option<Samples>,
}

/// Accuracies of a composed prompt with its closed-form head, and after tuning on the target.
#[derive(Clone, Copy)]
struct Accuracies {
    test: f64,
    held_out: Option<OnUnseen>,
    /// Accuracy on the test images after tuning prompt and head on the target, and the seconds that
    /// tuning and test took.
    tuned: Option<(f64, f64)>,
}

/// The most held-out images, as a multiple of the samples: enough to compare settings by.
const HELD_OUT: usize = 2;

impl<'a> Runner<'a> {
    pub fn new(args: &'a Args, suite: &'a Suite, settings: &'a Settings) -> anyhow::Result<Self> {
        let mut engine = args.engine.engine()?;
        let cache_bytes = u64::from(args.cache_gib) << 30;
        if let Some(cache) = ResultCache::open(&args.out.join("cache"), cache_bytes, true)? {
            engine = engine.with_cache(cache);
        }
        Ok(Self {
            args,
            suite,
            settings,
            engine,
            prompts: HashMap::new(),
            unseen: None,
            accuracies: HashMap::new(),
        })
    }

    pub fn compute(&mut self, cell: &Cell) -> anyhow::Result<Row> {
        let input = self.input(cell)?;
        let begun = Instant::now();
        let composition = self.engine.compose(&input, &mut Unwatched)?;
        let seconds = begun.elapsed().as_secs_f64();
        let composed = Source {
            prompt: cell.method.to_owned(),
            version: None,
            digest: Digest::of(&composition.composed),
            file: PromptFile::parse(&composition.composed)?,
        };
        let accuracies = self.accuracies(cell, &composed)?;
        let mut row = row(cell, &composition.result, &accuracies, seconds)?;
        if cell.is_tuned() {
            (row.tuned_accuracy, row.tuning_seconds) = accuracies.tuned.unzip();
        }
        Ok(row)
    }

    fn input(&mut self, cell: &Cell) -> anyhow::Result<CompositionInput> {
        Ok(CompositionInput {
            backbone_dir: self.args.engine.backbone.clone(),
            target_dir: self.suite.task(&cell.target).dir.clone(),
            target: TargetSamples {
                split: Split::Train,
                eval_split: None,
                max_samples: self.settings.target_samples,
                seed: cell.seed,
                skip_unreadable: self.args.engine.skip_unreadable,
            },
            sources: self.sources(cell)?,
            objective: self.objective(cell)?,
            early_stopping: None,
        })
    }

    /// Features [2, N, d] of test images under the initial prompt and under the one that the cell
    /// composes, with their labels.
    pub fn test_features(
        &mut self,
        cell: &Cell,
        max_samples: usize,
    ) -> anyhow::Result<(tch::Tensor, Vec<usize>)> {
        let input = self.input(cell)?;
        let composed = self.engine.compose(&input, &mut Unwatched)?.composed;
        let files = [self.initial(cell.seed)?.file, PromptFile::parse(&composed)?];
        let test = self.samples(&cell.target, Split::Test, Some(max_samples), cell.seed)?;
        let (_, vit) = self.engine.backbone(&self.args.engine.backbone)?;
        let prompts = files.map(|file| {
            let prompt = matrix(&file.prompt_embeddings);
            prompt.to_device(vit.device).to_kind(vit.kind)
        });
        let features = extract(vit, &vit.pairs(&test, &prompts), |_| {
            ControlFlow::Continue(())
        })?;
        Ok((features, test.labels))
    }

    fn accuracies(&mut self, cell: &Cell, composed: &Source) -> anyhow::Result<Accuracies> {
        // The metadata is left out, since it tells how the prompt was found.
        let values = PromptFile {
            metadata: None,
            ..composed.file.clone()
        };
        let digest = Digest::of(&values.to_bytes());
        let key = (cell.target.clone(), cell.seed, digest);
        let mut found = match self.accuracies.get(&key) {
            Some(found) => *found,
            None => self.unseen(cell, |vit, Unseen { test, held_out }| {
                let of = |samples| carried_head(vit, samples, &composed.file);
                Ok(Accuracies {
                    test: of(test)?.accuracy,
                    held_out: held_out.as_ref().map(of).transpose()?,
                    tuned: None,
                })
            })?,
        };
        if let Some(options) = &self.settings.target_tuning
            && cell.is_tuned()
            && found.tuned.is_none()
        {
            let options = TuningOptions {
                seed: cell.seed,
                ..options.clone()
            };
            let begun = Instant::now();
            let samples = self.settings.target_samples;
            let tuned = self.tuned(&cell.target, samples, Some(composed), &options)?;
            let accuracy = self.unseen(cell, |vit, unseen| {
                Ok(carried_head(vit, &unseen.test, &tuned)?.accuracy)
            })?;
            found.tuned = Some((accuracy, begun.elapsed().as_secs_f64()));
        }
        self.accuracies.insert(key, found);
        Ok(found)
    }

    /// Computes something on the target's images that no method sees.
    fn unseen<T>(
        &mut self,
        cell: &Cell,
        find: impl FnOnce(&Vit, &Unseen) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let is_of = |(target, seed, _): &(String, u64, Unseen)| {
            (target, *seed) == (&cell.target, cell.seed)
        };
        let unseen = match self.unseen.take().filter(is_of) {
            Some((_, _, unseen)) => unseen,
            None => self.load_unseen(&cell.target, cell.seed)?,
        };
        let (_, vit) = self.engine.backbone(&self.args.engine.backbone)?;
        let found = find(vit, &unseen)?;
        self.unseen = Some((cell.target.clone(), cell.seed, unseen));
        Ok(found)
    }

    pub fn load_unseen(&mut self, target: &str, seed: u64) -> anyhow::Result<Unseen> {
        let test = self.samples(target, Split::Test, None, seed)?;
        let samples = self.settings.target_samples;
        // Chosen in the same way as the samples, without decoding their images again.
        let dataset = LabelledImages::read(&self.suite.task(target).dir)?;
        let listed = dataset.split(Split::Train)?;
        let labels: Vec<usize> = listed.iter().map(|image| image.label).collect();
        let seen = stratified_subset(&labels, samples, seed);
        let more = self.samples(target, Split::Train, Some((1 + HELD_OUT) * samples), seed)?;
        let is_unseen = |row: &usize| !seen.contains(&more.indices[*row]);
        let rows: Vec<usize> = (0..more.len()).filter(is_unseen).collect();
        Ok(Unseen {
            test,
            held_out: (!rows.is_empty()).then(|| more.only(&rows)),
        })
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
            skip_unreadable: self.args.engine.skip_unreadable,
        };
        let preprocessing = &backbone.config.preprocessing;
        Ok(Samples::load(&dataset, &selection, preprocessing)?)
    }

    fn objective(&self, cell: &Cell) -> anyhow::Result<Objective> {
        let mut objective: Objective = serde_json::from_value((method(cell.method).objective)())?;
        if let Some(epochs) = objective.options.target_epochs_mut() {
            *epochs = self.settings.target_epochs;
        }
        Ok(objective)
    }

    fn sources(&mut self, cell: &Cell) -> anyhow::Result<Vec<Source>> {
        let of_tasks = cell.sources.iter().map(|task| self.source(cell.seed, task));
        let mut sources = of_tasks.collect::<anyhow::Result<Vec<_>>>()?;
        if cell.has_initial() {
            sources.push(self.initial(cell.seed)?);
        }
        Ok(sources)
    }

    /// The prompt of a task. It is tuned now if it has no file yet.
    pub fn source(&mut self, seed: u64, task: &str) -> anyhow::Result<Source> {
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
        start: Option<&Source>,
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
            takes_head: true,
            teachers: &[],
            options,
        };
        Ok(tuning.run(&mut NoCheckpoints, |_| ControlFlow::Continue(()))?)
    }

    /// The initial prompt of the sources of a seed.
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
            digest: Digest::of(&file.to_bytes()),
            file,
        })
    }
}

/// Whether the file holds a prompt that was tuned with these options.
fn is_tuned_so(path: &Path, options: &TuningOptions) -> bool {
    let Ok((_, file)) = read_prompt(path) else {
        return false;
    };
    (file.metadata.as_ref().and_then(TrainingRecord::of))
        .is_some_and(|record| record.options == *options)
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
            sources: Vec::new(),
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

fn row(
    cell: &Cell,
    result: &CompositionResult,
    accuracies: &Accuracies,
    seconds: f64,
) -> anyhow::Result<Row> {
    let composed = result.diagnostics.composed_score.as_ref();
    let composed = composed.ok_or_else(|| anyhow!("a composition with a backbone is verified"))?;
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
        uniform_mix: Some(result.method.uniform_mix),
        scale: result.method.scale,
        eval_accuracy: accuracies.test,
        train_accuracy: composed.train_accuracy,
        validation_accuracy: composed.validation_accuracy,
        validation_loss: composed.validation_loss,
        held_out_accuracy: accuracies.held_out.map(|held_out| held_out.accuracy),
        held_out_loss: accuracies.held_out.map(|held_out| held_out.loss),
        tuned_accuracy: None,
        tuning_seconds: None,
        h_score: composed.h_score,
        surrogate_gap: result.diagnostics.surrogate_gap,
        seconds,
        target_tuning_seconds: result.method.target_tuning_seconds,
    })
}

/// The scores of each source alone. A metric that some source lacks is left out.
fn scores(result: &CompositionResult) -> anyhow::Result<Vec<(String, Vec<f64>)>> {
    let of =
        |source: &SourceDiagnostics| -> anyhow::Result<Value> { Ok(serde_json::to_value(source)?) };
    let per_source = result.diagnostics.per_source.iter().map(of);
    let per_source = per_source.collect::<anyhow::Result<Vec<_>>>()?;
    let mut scores = Vec::new();
    for metric in [
        "h_score",
        "h_score_adjusted",
        "logme",
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

//! The whole method, step by step.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::time::Instant;

use tch::Tensor;

use super::alignment::GradientAlignment;
use super::evaluate::Evaluation;
use super::features::{MICRO_BATCH, extract};
use super::gradients::accumulate;
use super::h_score::HScore;
use super::head::{SourceHead, folds};
use super::objective::{Solution, Solver};
use super::samples::{Samples, Selection};
use super::statistics::{Metadata, SourceName, Statistics};
use super::vit::Vit;
use super::{EngineError, device_name, prompt_tensor};
use crate::domain::backbone::Backbone;
use crate::domain::composition::{
    Baselines, ComposedPrompt, Composition, CompositionInput, CompositionResult, Diagnostics,
    ObjectiveValue, Observer, Phase, PromptScore, Provenance, Source, SourceDiagnostics,
    SourceWeight, Warning, Weighing,
};
use crate::domain::dataset::LabelledImages;
use crate::domain::digest::Digest;
use crate::domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata};
use crate::domain::tensor::Tensor as PlainTensor;

/// libtorch's version; torch-sys refuses to link another one.
const LIBTORCH: &str = "2.11.0";

pub fn compose(
    backbone: &Backbone,
    vit: &Vit,
    input: &CompositionInput,
    observer: &mut dyn Observer,
) -> Result<Composition, EngineError> {
    let CompositionInput {
        sources,
        objective,
        target,
        ..
    } = input;
    let weighing = objective.weighing()?;
    let mut steps = Steps::new(observer);

    let dataset = LabelledImages::read(&input.target_dir)?;
    let preprocessing = &backbone.config.preprocessing;
    let selection = Selection {
        split: target.split,
        max_samples: Some(target.max_samples),
        seed: target.seed,
        skip_bad: target.skip_bad,
    };
    check_sources(sources, backbone)?;
    steps.begin(Phase::Features)?;
    let samples = Samples::load(&dataset, &selection, preprocessing)?;
    let present = check_classes(&samples, &dataset)?;
    let prompts: Vec<Tensor> = sources
        .iter()
        .map(|s| prompt_tensor(&s.file, vit))
        .collect();
    let (m, n) = (sources.len(), samples.len());

    let pairs = (n * m) as u64;
    let features = extract(vit, &samples, &prompts, MICRO_BATCH, steps.counter(pairs))?;

    steps.begin(Phase::Heads)?;
    let embed_dim = vit.embed_dim() as usize;
    let num_classes = dataset.classes.len();
    let folds = folds(&samples.labels, embed_dim);
    let mut count = steps.counter(m as u64);
    let mut heads = Vec::with_capacity(m);
    for i in 0..m as i64 {
        let of_source = features.get(i);
        let shrinkage = objective.head.shrinkage;
        heads.push(SourceHead::fit(
            &of_source,
            &samples.labels,
            &folds,
            num_classes,
            shrinkage,
        )?);
        stop_on(count(1))?;
    }
    drop(count);

    steps.begin(Phase::Gradients)?;
    let count = steps.counter(pairs);
    let gradients = accumulate(vit, &samples, &prompts, &heads, &folds, MICRO_BATCH, count)?;

    steps.begin(Phase::Solve)?;
    let h_score = HScore::new(&features, &samples.labels, objective.h_score.shrinkage)?;
    let gradient_gram = gradients.gram()?;
    let alignment = GradientAlignment::new(m, gradient_gram.clone());
    let mut tick = || stop_on(steps.tick(Phase::Solve));
    let solver = Solver {
        h_score: &h_score,
        alignment: &alignment,
        num_sources: m,
        tick: &mut tick,
    };
    let solution = solver.solve(weighing)?;
    let own_h = (0..m)
        .map(|i| h_score.value(&unit(i, m)))
        .collect::<Result<Vec<_>, _>>()?;

    steps.begin(Phase::Verify)?;
    let eval = match target.eval_split {
        None => None,
        Some(split) => {
            let all = Selection {
                split,
                max_samples: None,
                ..selection
            };
            Some(Samples::load(&dataset, &all, preprocessing)?)
        }
    };
    let evaluation = Evaluation {
        vit,
        train: &samples,
        eval: eval.as_ref(),
        num_classes,
        h_score_shrinkage: objective.h_score.shrinkage,
        head_shrinkage: objective.head.shrinkage,
    };
    let best = (0..m)
        .max_by(|a, b| own_h[*a].total_cmp(&own_h[*b]))
        .expect("checked above");
    let compares = eval.is_some();
    let work = evaluation.work(false) * if compares { 2 } else { 1 }
        + if compares { evaluation.work(true) } else { 0 };
    let mut count = steps.counter(work);
    let mixed = mix(sources, &solution.alpha);
    let mut composed_file = composed_prompt(sources, mixed, backbone, &dataset);
    let composed = evaluation.run(&prompt_tensor(&composed_file, vit), None, &mut count)?;
    composed_file.head = Some(composed.head.to_prompt_head()?);
    let baselines = if compares {
        let uniform = mix(sources, &vec![1.0 / m as f64; m]);
        let uniform = composed_prompt(sources, uniform, backbone, &dataset);
        let best_features = features.get(best as i64);
        Some(Baselines {
            uniform: evaluation
                .run(&prompt_tensor(&uniform, vit), None, &mut count)?
                .score,
            best_single: evaluation
                .run(&prompts[best], Some(best_features), &mut count)?
                .score,
            best_single_prompt: sources[best].prompt.clone(),
        })
    } else {
        None
    };
    drop(count);

    let statistics = Statistics {
        features: &features,
        labels: &samples.labels,
        sample_indices: &samples.indices,
        folds: &folds,
        head_temperature: heads.iter().map(|head| head.temperature).collect(),
        gradient_gram,
    };
    let statistics = statistics.to_bytes(&Metadata {
        format: FORMAT,
        sources: sources
            .iter()
            .map(|s| SourceName {
                prompt: &s.prompt,
                digest: s.digest,
            })
            .collect(),
        backbone_digest: backbone.digest,
        preprocessing_id: preprocessing.id(),
        sample_digest: samples.digest,
        objective,
        seed: target.seed,
    })?;
    let composed_bytes = composed_file.to_bytes();

    let rms = gradients.rms();
    let per_source = (0..m)
        .map(|i| SourceDiagnostics {
            prompt: sources[i].prompt.clone(),
            h_score: own_h[i],
            head_temperature: heads[i].temperature,
            head_loss: heads[i].loss,
            gradient_rms: rms[i],
        })
        .collect();
    let diagnostics = Diagnostics {
        num_samples: n,
        num_classes: present.len(),
        skipped_images: samples.skipped,
        head_folds: folds.iter().max().map_or(1, |last| last + 1),
        per_source,
        surrogate_gap: surrogate_gap(&composed.score, &solution),
        composed: composed.score,
        baselines,
    };
    let warnings = warnings(
        &samples,
        &dataset,
        sources,
        &solution,
        &diagnostics,
        embed_dim,
    );
    let result = CompositionResult {
        source_weights: sources
            .iter()
            .zip(&solution.alpha)
            .map(|(source, weight)| SourceWeight {
                prompt: source.prompt.clone(),
                version: source.version,
                digest: source.digest,
                weight: *weight,
            })
            .collect(),
        objective: ObjectiveValue {
            h_score: solution.h_score,
            gradient_alignment: solution.gradient_alignment,
            alignment_weight: solution.alignment_weight,
            trade_off: match weighing {
                Weighing::TradeOff(t) => Some(t),
                Weighing::AlignmentWeight(_) => None,
            },
            total: solution
                .alignment_weight
                .map(|lambda| lambda * solution.gradient_alignment - solution.h_score),
        },
        path: solution.path,
        optima: solution.optima,
        solver: solution.report,
        diagnostics,
        composed: ComposedPrompt {
            prompt: None,
            version: None,
            digest: Digest::of(&composed_bytes),
        },
        provenance: Provenance {
            backbone_digest: backbone.digest,
            preprocessing_id: preprocessing.id(),
            sample_digest: samples.digest,
            seed: target.seed,
            device: device_name(vit.device),
            num_threads: tch::get_num_threads() as usize,
            libtorch: LIBTORCH.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        warnings,
        timings: steps.finish(),
    };
    Ok(Composition {
        result,
        composed: composed_bytes,
        statistics,
    })
}

/// Refuses sources that cannot be summed or are the same, by name.
pub fn check_sources(sources: &[Source], backbone: &Backbone) -> Result<(), EngineError> {
    let first = sources.first().ok_or(EngineError::NoSources)?;
    let mut seen: HashMap<Digest, &str> = HashMap::new();
    let num_tokens = first.file.num_tokens();
    for source in sources {
        if let Some(earlier) = seen.insert(source.digest, &source.prompt) {
            return Err(EngineError::SameSource {
                first: earlier.to_owned(),
                second: source.prompt.clone(),
                digest: source.digest.to_string(),
            });
        }
        let refuse = |what: String, expected: String| {
            Err(EngineError::Incompatible {
                prompt: source.prompt.clone(),
                what,
                expected,
            })
        };
        let file = &source.file;
        if file.embed_dim() != backbone.config.embed_dim {
            return refuse(
                format!("{} wide", file.embed_dim()),
                format!("the backbone is {} wide", backbone.config.embed_dim),
            );
        }
        if file.num_tokens() != num_tokens {
            return refuse(
                format!("{} tokens long", file.num_tokens()),
                format!("`{}` has {num_tokens}", first.prompt),
            );
        }
        if file.deep_prompt_embeddings.is_some() {
            return refuse(
                "a deep prompt".into(),
                "only shallow prompts can be composed".into(),
            );
        }
        let Some(metadata) = &file.metadata else {
            continue;
        };
        if let Some(digest) = metadata.backbone_digest.filter(|d| *d != backbone.digest) {
            return refuse(
                format!("made for backbone {digest}"),
                format!("this one is {}", backbone.digest),
            );
        }
        let here = backbone.config.preprocessing.id();
        if let Some(id) = metadata.preprocessing_id.as_ref().filter(|id| **id != here) {
            return refuse(
                format!("made with preprocessing `{id}`"),
                format!("the backbone's is `{here}`"),
            );
        }
    }
    Ok(())
}

/// The classes present, at least two.
fn check_classes(
    samples: &Samples,
    dataset: &LabelledImages,
) -> Result<BTreeSet<usize>, EngineError> {
    let present: BTreeSet<usize> = samples.labels.iter().copied().collect();
    match present.iter().collect::<Vec<_>>().as_slice() {
        [] => Err(EngineError::NoSamples),
        [only] => Err(EngineError::OneClass(dataset.classes[**only].clone())),
        _ => Ok(present),
    }
}

/// Σ αᵢ Pᵢ in f64, rounded once. A prompt at weight 1 comes out bit by bit.
fn mix(sources: &[Source], alpha: &[f64]) -> Vec<f32> {
    let mut sum = vec![0f64; sources[0].file.prompt_embeddings.values.len()];
    for (source, weight) in sources.iter().zip(alpha) {
        for (total, value) in sum.iter_mut().zip(&source.file.prompt_embeddings.values) {
            *total += weight * f64::from(*value);
        }
    }
    sum.into_iter().map(|value| value as f32).collect()
}

fn composed_prompt(
    sources: &[Source],
    values: Vec<f32>,
    backbone: &Backbone,
    dataset: &LabelledImages,
) -> PromptFile {
    PromptFile {
        metadata: Some(PromptMetadata {
            format: FORMAT,
            backbone_digest: Some(backbone.digest),
            preprocessing_id: Some(backbone.config.preprocessing.id()),
            init_seed: common_init_seed(sources),
            task: None,
            classes: Some(dataset.classes.clone()),
            origin: Origin::Composed,
            training: None,
        }),
        prompt_embeddings: PlainTensor::new(
            sources[0].file.prompt_embeddings.shape.clone(),
            values,
        ),
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    }
}

/// The init seed all sources share, if they do and say so.
fn common_init_seed(sources: &[Source]) -> Option<u64> {
    let seeds: BTreeSet<Option<u64>> = sources
        .iter()
        .map(|source| {
            source
                .file
                .metadata
                .as_ref()
                .and_then(|metadata| metadata.init_seed)
        })
        .collect();
    match seeds.into_iter().collect::<Vec<_>>().as_slice() {
        [seed] => *seed,
        _ => None,
    }
}

fn unit(i: usize, m: usize) -> Vec<f64> {
    (0..m).map(|j| f64::from(u8::from(i == j))).collect()
}

fn surrogate_gap(composed: &PromptScore, solution: &Solution) -> f64 {
    (composed.h_score - solution.h_score) / solution.h_score.abs().max(f64::MIN_POSITIVE)
}

/// What a careful reader of the result would want to be told.
fn warnings(
    samples: &Samples,
    dataset: &LabelledImages,
    sources: &[Source],
    solution: &Solution,
    diagnostics: &Diagnostics,
    embed_dim: usize,
) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let mut warn = |code: &str, detail: String| {
        warnings.push(Warning {
            code: code.to_owned(),
            detail,
        });
    };
    let n = samples.len();
    if n < 2 * embed_dim {
        warn(
            "few_samples",
            format!(
                "{n} samples for {embed_dim} feature dimensions: H is near its chance level below \
                 {} samples, and differences between sources are small",
                2 * embed_dim
            ),
        );
    }
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    samples
        .labels
        .iter()
        .for_each(|label| *counts.entry(*label).or_default() += 1);
    for (class, _) in counts.iter().filter(|(_, count)| **count == 1) {
        let name = &dataset.classes[*class];
        warn(
            "singleton_class",
            format!("class `{name}` has a single sample"),
        );
    }
    if sources.len() > 1 {
        for (source, weight) in sources.iter().zip(&solution.alpha) {
            if *weight == 0.0 || *weight == 1.0 {
                let name = &source.prompt;
                warn(
                    "weight_at_bound",
                    format!("source `{name}` has weight {weight}"),
                );
            }
        }
        if common_init_seed(sources).is_none() {
            warn(
                "init_seeds_differ",
                "the sources' init seeds differ or are unknown, so that their tokens may be in \
                 different orders, on which Σ αᵢ Pᵢ depends"
                    .into(),
            );
        }
    }
    let near_best = |value: f64| {
        let best = solution.optima[0].value;
        (value - best).abs() <= 0.01 * best.abs().max(1e-12)
    };
    let rivals = solution
        .optima
        .iter()
        .skip(1)
        .filter(|o| near_best(o.value))
        .count();
    if rivals > 0 {
        warn(
            "near_ties",
            format!("{rivals} other local optima lie within 1 % of the best; see `optima`"),
        );
    }
    if diagnostics.surrogate_gap.abs() > 0.1 {
        warn(
            "surrogate_gap",
            format!(
                "H of the composed prompt differs by {:+.1} % from H of the mixed features that α \
                 was chosen by",
                100.0 * diagnostics.surrogate_gap
            ),
        );
    }
    if diagnostics.skipped_images > 0 {
        let count = diagnostics.skipped_images;
        warn(
            "skipped_images",
            format!("{count} unreadable images were left out"),
        );
    }
    warnings
}

fn stop_on(flow: ControlFlow<()>) -> Result<(), EngineError> {
    if flow.is_break() {
        Err(EngineError::Stopped)
    } else {
        Ok(())
    }
}

/// Tells the observer where the work is, and times the phases.
struct Steps<'a> {
    observer: &'a mut dyn Observer,
    started: Instant,
    current: Option<Phase>,
    timings: BTreeMap<String, f64>,
}

impl<'a> Steps<'a> {
    fn new(observer: &'a mut dyn Observer) -> Self {
        Self {
            observer,
            started: Instant::now(),
            current: None,
            timings: BTreeMap::new(),
        }
    }

    fn begin(&mut self, phase: Phase) -> Result<(), EngineError> {
        self.close();
        self.current = Some(phase);
        stop_on(self.tick(phase))
    }

    fn close(&mut self) {
        if let Some(phase) = self.current.take() {
            self.timings.insert(
                phase.name().to_owned(),
                self.started.elapsed().as_secs_f64(),
            );
        }
        self.started = Instant::now();
    }

    /// A sign of life where nothing can be counted.
    fn tick(&mut self, phase: Phase) -> ControlFlow<()> {
        self.observer.progress(phase, 0, 1)
    }

    /// Counts finished units of the current phase up to `total`.
    fn counter(&mut self, total: u64) -> impl FnMut(u64) -> ControlFlow<()> {
        let phase = self.current.expect("a phase has begun");
        let observer = &mut *self.observer;
        let mut done = 0;
        move |finished| {
            done += finished;
            observer.progress(phase, done, total)
        }
    }

    fn finish(mut self) -> BTreeMap<String, f64> {
        self.close();
        self.timings
    }
}

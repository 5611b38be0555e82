//! Visual prompt tuning (VPT-shallow, Jia et al. 2022): train a prompt and a linear head, nothing else.
//!
//! ```text
//! start ─► for each epoch: batches in a seeded order ─► gradients ─► optimizer ─┬─► prompt file
//!   ▲                                                                          │
//!   └──────────────────────────── checkpoint ◄──────────────────────────────────┘
//! ```

mod checkpoint;
mod course;
mod images;
mod optimizer;
mod select;

use std::ops::ControlFlow;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::features::extract;
use super::samples::Samples;
use super::streams::{MicroBatch, Pairs};
use super::transferability::matrix;
use super::vit::Vit;
use super::{EngineError, plain};
use crate::domain::backbone::Backbone;
use crate::domain::dataset::stratified_subset;
use crate::domain::digest::Digest;
use crate::domain::prompt_file::{FORMAT, Head, Origin, PromptFile, PromptMetadata, Sketch};
use crate::domain::tensor::Tensor as PlainTensor;
use crate::domain::tuning::{Checkpoints, Curves, HeldOut, TuningOptions};

use self::checkpoint::Progress;
pub use self::course::{Course, Outcome};
pub use self::images::Images;
use self::optimizer::Optimizer;

/// The training record, without times: the same content gives the same bytes.
#[derive(Serialize)]
struct TrainingRecord<'a> {
    method: &'static str,
    num_samples: usize,
    #[serde(flatten)]
    options: &'a TuningOptions,
    /// Of the prompt file that it began with, if it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    start: Option<Digest>,
    /// Epoch by epoch.
    #[serde(flatten)]
    curves: &'a Curves,
    /// ‖P - P₀‖ / ‖P₀‖: how far the prompt moved from its initial values.
    distance_from_init: f64,
}

/// What [`Tuning::run`] reports after every batch.
pub struct TuningProgress {
    pub epoch: usize,
    pub samples: u64,
    /// Mean over the epoch so far.
    pub cross_entropy: f64,
}

/// P₀ [m, d]: uniform(-v, v) with v = √(6/(3·patch² + d)), VPT's initialisation.
pub fn initial_prompt(num_tokens: usize, embed_dim: usize, patch: usize, seed: u64) -> Vec<f32> {
    let bound = (6.0 / (3 * patch * patch + embed_dim) as f64).sqrt();
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    (0..num_tokens * embed_dim)
        .map(|_| {
            let unit = f64::from(rng.next_u32()) / f64::from(u32::MAX);
            ((2.0 * unit - 1.0) * bound) as f32
        })
        .collect()
}

/// A prompt that is to be trained, on what and how.
#[derive(Clone, Copy)]
pub struct Tuning<'a> {
    pub backbone: &'a Backbone,
    pub vit: &'a Vit,
    pub train: &'a Samples,
    /// Scored after every epoch, and never trained on.
    pub held_out: Option<&'a Samples>,
    /// Both go into the file.
    pub task: &'a str,
    pub classes: &'a [String],
    /// Begin with this prompt, and with its head where it has one for these classes; otherwise with the initial prompt of
    /// `init_seed` and no head.
    pub start: Option<&'a PromptFile>,
    pub options: &'a TuningOptions,
}

/// Places of the parameters.
const PROMPT: usize = 0;
const WEIGHT: usize = 1;
const BIAS: usize = 2;

impl Tuning<'_> {
    /// Trains, from the last checkpoint of the same tuning if there is one, and keeps one after every epoch.
    pub fn run(
        &self,
        checkpoints: &mut dyn Checkpoints,
        mut progress: impl FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<PromptFile, EngineError> {
        let initial = self.initial();
        let mut state = Progress {
            optimizer: Optimizer::new(self.options.optimizer, self.options.weight_decay, &initial),
            curves: Curves::default(),
            best: initial.iter().map(Tensor::copy).collect(),
            parameters: initial.iter().map(Tensor::copy).collect(),
        };
        let key = self.key();
        if let Some(bytes) = checkpoints.last() {
            checkpoint::read(key, &bytes, &mut state);
        }
        while !self.is_over(&state.curves) {
            self.epoch(&mut state, &mut progress)?;
            let epoch = state.curves.last().expect("one is over");
            checkpoints.keep(&epoch, &checkpoint::write(key, &mut state)?);
        }
        let chosen = match self.held_out.and(self.options.patience) {
            Some(_) => &state.best,
            None => &state.parameters,
        };
        self.file(&initial[PROMPT], chosen, &state.curves)
    }

    /// All that the outcome depends on.
    fn key(&self) -> Digest {
        let of = (
            self.backbone.digest,
            self.vit.compute.precision,
            (self.train.digest, &self.train.indices),
            self.held_out
                .map(|samples| (samples.digest, &samples.indices)),
            self.start.map(|file| Digest::of(&file.to_bytes())),
            self.options,
        );
        Digest::of(&serde_json::to_vec(&of).expect("plain data"))
    }

    /// Prompt [m, d], weight [K, d] and bias [K], in f32 whatever the backbone computes in.
    fn initial(&self) -> [Tensor; 3] {
        let (m, d, k) = (
            self.num_tokens(),
            self.vit.config.embed_dim,
            self.classes.len(),
        );
        let on_device = |values: &[f32], shape: &[usize]| {
            let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
            Tensor::from_slice(values)
                .view(shape.as_slice())
                .to_device(self.vit.device)
        };
        let prompt = match self.start {
            Some(file) => on_device(&file.prompt_embeddings.values, &[m, d]),
            None => {
                let patch = self.vit.config.patch_size;
                on_device(
                    &initial_prompt(m, d, patch, self.options.init_seed),
                    &[m, d],
                )
            }
        };
        let head = self.start.and_then(|file| file.head.as_ref());
        let (weight, bias) = match head.filter(|head| head.weight.shape == [k, d]) {
            Some(head) => (
                on_device(&head.weight.values, &[k, d]),
                on_device(&head.bias.values, &[k]),
            ),
            None => (
                on_device(&vec![0.0; k * d], &[k, d]),
                on_device(&vec![0.0; k], &[k]),
            ),
        };
        [prompt, weight, bias]
    }

    fn num_tokens(&self) -> usize {
        self.start
            .map_or(self.options.num_tokens, PromptFile::num_tokens)
    }

    fn is_over(&self, curves: &Curves) -> bool {
        if curves.cross_entropy.len() >= self.options.epochs {
            return true;
        }
        let Some(patience) = self.options.patience else {
            return false;
        };
        let held_out = &curves.held_out;
        let lowest = (0..held_out.len()).min_by(|a, b| {
            held_out[*a]
                .cross_entropy
                .total_cmp(&held_out[*b].cross_entropy)
        });
        lowest.is_some_and(|lowest| held_out.len() - 1 - lowest >= patience)
    }

    fn epoch(
        &self,
        state: &mut Progress,
        progress: &mut dyn FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let options = self.options;
        let n = self.train.len();
        let epoch = state.curves.cross_entropy.len();
        let steps_per_epoch = n.div_ceil(options.batch_size);
        let (mut total, mut seen) = (0.0, 0);
        for (batch, rows) in shuffled(n, options.seed, epoch)
            .chunks(options.batch_size)
            .enumerate()
        {
            let rate = schedule(epoch * steps_per_epoch + batch, steps_per_epoch, options);
            let prompt_rate = options.prompt_learning_rate * rate;
            let head_rate = options.head_learning_rate * rate;
            let (loss, gradients) =
                self.gradients(rows, &state.parameters, state.optimizer.steps)?;
            let rates = [prompt_rate, head_rate, head_rate];
            state
                .optimizer
                .step(&mut state.parameters, &gradients, &rates)?;
            total += loss;
            seen += rows.len();
            let at = TuningProgress {
                epoch,
                samples: rows.len() as u64,
                cross_entropy: total / seen as f64,
            };
            if progress(at).is_break() {
                return Err(EngineError::Stopped);
            }
        }
        state.curves.cross_entropy.push(total / n as f64);
        if let Some(held_out) = self.held_out {
            let score = score(self.vit, held_out, &state.parameters)?;
            let lowest = state
                .curves
                .held_out
                .iter()
                .map(|score| score.cross_entropy);
            if score.cross_entropy < lowest.fold(f64::INFINITY, f64::min) {
                state.best = state.parameters.iter().map(Tensor::copy).collect();
            }
            state.curves.held_out.push(score);
        }
        Ok(())
    }

    /// The sum of these rows' cross-entropies, and the gradients of their mean by the parameters: made in micro-batches on all
    /// streams.
    fn gradients(
        &self,
        rows: &[usize],
        parameters: &[Tensor],
        step: i64,
    ) -> Result<(f64, Vec<Tensor>), EngineError> {
        let (vit, train) = (self.vit, self.train);
        let kept = self.kept(&parameters[PROMPT], step);
        let prompts = [(&parameters[PROMPT] * &kept).to_kind(vit.kind)];
        let head = [WEIGHT, BIAS].map(|at| parameters[at].to_kind(vit.kind));
        let size = vit.batch(&prompts).images;
        // As many as there are streams, where they would be larger than that.
        let size = size.min(rows.len().div_ceil(vit.num_streams()));
        let pairs = Pairs {
            samples: train,
            prompts: &prompts,
            batches: rows.chunks(size).map(<[usize]>::to_vec).collect(),
        };
        let mut sum = 0.0;
        let mut totals: Vec<Tensor> = parameters.iter().map(Tensor::zeros_like).collect();
        vit.each_micro_batch(
            &pairs,
            || head.each_ref().map(Tensor::shallow_clone),
            |head, batch| {
                let labels: Vec<i64> = (batch.rows.iter())
                    .map(|row| train.labels[*row] as i64)
                    .collect();
                head_gradients(head, &labels, batch)
            },
            |_, (loss, gradients)| {
                sum += loss;
                for (total, gradient) in totals.iter_mut().zip(gradients) {
                    *total += gradient.to_device(total.device()).to_kind(Kind::Float);
                }
                Ok(())
            },
            &mut |_| ControlFlow::Continue(()),
        )?;
        totals[PROMPT] *= kept;
        let mean = 1.0 / rows.len() as f64;
        Ok((sum, totals.into_iter().map(|total| total * mean).collect()))
    }

    /// 0 for what dropout leaves out, 1/(1-p) for the rest: a function of the seed and the step, so that a tuning that was
    /// killed goes on with the same.
    fn kept(&self, prompt: &Tensor, step: i64) -> Tensor {
        let p = self.options.prompt_dropout;
        if p == 0.0 {
            return prompt.ones_like();
        }
        let mut rng = ChaCha20Rng::seed_from_u64(self.options.seed);
        rng.set_stream(1 + step as u64);
        let scale = (1.0 / (1.0 - p)) as f32;
        let values: Vec<f32> = (0..prompt.numel())
            .map(|_| {
                if f64::from(rng.next_u32()) < p * f64::from(u32::MAX) {
                    0.0
                } else {
                    scale
                }
            })
            .collect();
        let kept = Tensor::from_slice(&values).view(prompt.size().as_slice());
        kept.to_device(prompt.device())
    }

    fn file(
        &self,
        initial: &Tensor,
        parameters: &[Tensor],
        curves: &Curves,
    ) -> Result<PromptFile, EngineError> {
        let (m, d, k) = (
            self.num_tokens(),
            self.vit.config.embed_dim,
            self.classes.len(),
        );
        let cpu = |tensor: &Tensor| tensor.to_device(Device::Cpu);
        let (prompt, initial) = (cpu(&parameters[PROMPT]), cpu(initial));
        let distance = f64::try_from((&prompt - &initial).norm() / initial.norm())?;
        if !distance.is_finite() {
            return Err(EngineError::NotFinite("the tuned prompt's values"));
        }
        let record = TrainingRecord {
            method: "vpt-shallow",
            num_samples: self.train.len(),
            options: self.options,
            start: self.start.map(|file| Digest::of(&file.to_bytes())),
            curves,
            distance_from_init: distance,
        };
        let init_seed = match self.start {
            Some(file) => file
                .metadata
                .as_ref()
                .and_then(|metadata| metadata.init_seed),
            None => Some(self.options.init_seed),
        };
        Ok(PromptFile {
            metadata: Some(PromptMetadata {
                format: FORMAT,
                backbone_digest: Some(self.backbone.digest),
                preprocessing_id: Some(self.backbone.config.preprocessing.id()),
                init_seed,
                task: Some(self.task.to_owned()),
                classes: Some(self.classes.to_vec()),
                origin: Origin::Tuned,
                training: Some(serde_json::to_value(record).expect("plain data")),
            }),
            sketch: sketch(self.vit, self.train, &prompt, self.options)?,
            prompt_embeddings: PlainTensor::new([m, d], plain(&prompt)?),
            deep_prompt_embeddings: None,
            head: Some(Head {
                weight: PlainTensor::new([k, d], plain(&parameters[WEIGHT])?),
                bias: PlainTensor::new([k], plain(&parameters[BIAS])?),
            }),
            dtype: "f32",
        })
    }
}

/// How a prompt file does with the head that it carries.
pub fn evaluate(vit: &Vit, samples: &Samples, file: &PromptFile) -> Result<HeldOut, EngineError> {
    let head = file.head.as_ref().expect("a tuned prompt has one");
    let parameters = [&file.prompt_embeddings, &head.weight, &head.bias].map(matrix);
    score(vit, samples, &parameters)
}

/// Of prompt, weight and bias on labelled samples.
fn score(vit: &Vit, samples: &Samples, parameters: &[Tensor]) -> Result<HeldOut, EngineError> {
    let prompts = [parameters[PROMPT].to_device(vit.device).to_kind(vit.kind)];
    let features = extract(vit, &vit.pairs(samples, &prompts), |_| {
        ControlFlow::Continue(())
    })?;
    let [weight, bias] =
        [WEIGHT, BIAS].map(|at| parameters[at].to_device(Device::Cpu).to_kind(Kind::Double));
    let logits = features
        .get(0)
        .to_kind(Kind::Double)
        .linear(&weight, Some(&bias));
    let labels: Vec<i64> = samples.labels.iter().map(|label| *label as i64).collect();
    let labels = Tensor::from_slice(&labels);
    let correct = logits
        .argmax(-1, false)
        .eq_tensor(&labels)
        .to_kind(Kind::Double);
    Ok(HeldOut {
        cross_entropy: f64::try_from(logits.cross_entropy_for_logits(&labels))?,
        accuracy: f64::try_from(correct.mean(Kind::Double))?,
    })
}

/// What one stream adds up of a micro-batch: the loss, and its derivatives by prompt, weight and bias.
type Gradients = (f64, [Tensor; 3]);

/// Of the sum of a micro-batch's losses.
fn head_gradients(
    head: &[Tensor; 2],
    labels: &[i64],
    batch: &mut MicroBatch<'_>,
) -> Result<Gradients, EngineError> {
    let (mut loss, mut by_head) = (0.0, None);
    let by_prompt = batch.gradients(&mut |_, features| {
        let of = |x: &Tensor| {
            x.to_device(features.device())
                .copy()
                .set_requires_grad(true)
        };
        let (leaf, weight, bias) = (of(features), of(&head[0]), of(&head[1]));
        let labels = Tensor::from_slice(labels).to_device(features.device());
        let sum = leaf.linear(&weight, Some(&bias)).cross_entropy_loss(
            &labels,
            None::<Tensor>,
            tch::Reduction::Sum,
            -100,
            0.0,
        );
        loss = f64::try_from(&sum)?;
        let mut gradients =
            Tensor::f_run_backward(&[sum], &[&leaf, &weight, &bias], false, false)?.into_iter();
        let mut next = || gradients.next().expect("one a leaf");
        let by_features = next();
        by_head = Some([next(), next()]);
        Ok(by_features)
    })?;
    let [by_weight, by_bias] = by_head.expect("one prompt");
    let by_prompt = by_prompt.sum_dim_intlist([0i64, 1].as_slice(), false, None::<tch::Kind>);
    Ok((loss, [by_prompt, by_weight, by_bias]))
}

/// Features of a stratified few of the training samples, with their labels.
fn sketch(
    vit: &Vit,
    train: &Samples,
    prompt: &Tensor,
    options: &TuningOptions,
) -> Result<Option<Sketch>, EngineError> {
    let rows = stratified_subset(&train.labels, options.sketch_samples, options.seed);
    if rows.is_empty() {
        return Ok(None);
    }
    let few = train.only(&rows);
    let prompts = [prompt.to_device(vit.device).to_kind(vit.kind)];
    let features = extract(vit, &vit.pairs(&few, &prompts), |_| {
        ControlFlow::Continue(())
    })?;
    let labels: Vec<i64> = few.labels.iter().map(|label| *label as i64).collect();
    Ok(Some(Sketch {
        features: PlainTensor::new([rows.len(), vit.config.embed_dim], plain(&features)?),
        labels: PlainTensor::new([rows.len()], labels),
    }))
}

/// Share of the full learning rate at a step: linear warm-up, then half a cosine down to 0.
fn schedule(step: usize, steps_per_epoch: usize, options: &TuningOptions) -> f64 {
    let warmup = options.warmup_epochs * steps_per_epoch;
    let total = options.epochs * steps_per_epoch;
    if step < warmup {
        return (step + 1) as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / (total - warmup).max(1) as f64;
    0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// 0..n in the random order of an epoch (Fisher-Yates), n - 1 numbers of two words after those of the epoch before.
fn shuffled(n: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    rng.set_word_pos(2 * epoch as u128 * n.saturating_sub(1) as u128);
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        order.swap(last, (rng.next_u64() % (last as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests;

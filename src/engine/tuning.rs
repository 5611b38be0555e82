//! Visual prompt tuning (VPT-shallow, Jia et al. 2022): train a prompt and a linear head, nothing else.

use std::ops::ControlFlow;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;
use tch::Tensor;
use tch::nn::{self, OptimizerConfig};

use super::features::extract;
use super::samples::Samples;
use super::streams::{MicroBatch, Pairs};
use super::vit::Vit;
use super::{EngineError, plain};
use crate::domain::backbone::Backbone;
use crate::domain::dataset::stratified_subset;
use crate::domain::prompt_file::{FORMAT, Head, Origin, PromptFile, PromptMetadata, Sketch};
use crate::domain::tensor::Tensor as PlainTensor;

/// AdamW with linear warm-up and cosine decay. Stored in the prompt file as its training record.
#[derive(Clone, Debug, Serialize)]
pub struct TuningOptions {
    /// m
    pub num_tokens: usize,
    /// Seed of the initial prompt. Prompts that are to be composed should share it: their tokens then
    /// start in one order.
    pub init_seed: u64,
    /// Seed of the choice of samples and of the order of batches.
    pub seed: u64,
    pub epochs: usize,
    pub batch_size: usize,
    pub prompt_learning_rate: f64,
    pub head_learning_rate: f64,
    pub weight_decay: f64,
    pub warmup_epochs: usize,
    /// Labelled features to keep in the file for transferability scores; 0 for none.
    pub sketch_samples: usize,
}

impl Default for TuningOptions {
    fn default() -> Self {
        Self {
            num_tokens: 10,
            init_seed: 0,
            seed: 0,
            epochs: 10,
            batch_size: 32,
            prompt_learning_rate: 2e-3,
            head_learning_rate: 1e-2,
            weight_decay: 1e-4,
            warmup_epochs: 1,
            sketch_samples: 100,
        }
    }
}

/// The training record, without times: the same content gives the same bytes.
#[derive(Serialize)]
struct TrainingRecord<'a> {
    method: &'static str,
    num_samples: usize,
    #[serde(flatten)]
    options: &'a TuningOptions,
    /// Mean cross-entropy in nats, epoch by epoch.
    cross_entropy: &'a [f64],
    /// ‖P - P₀‖ / ‖P₀‖: how far the prompt moved from its initial values.
    distance_from_init: f64,
}

/// What [`tune`] reports after every batch.
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

/// Trains a prompt on `train`; `task` and `classes` go into the file.
pub fn tune(
    backbone: &Backbone,
    vit: &Vit,
    train: &Samples,
    task: &str,
    classes: &[String],
    options: &TuningOptions,
    mut progress: impl FnMut(TuningProgress) -> ControlFlow<()>,
) -> Result<PromptFile, EngineError> {
    let (m, d) = (options.num_tokens, vit.config.embed_dim);
    let (k, n) = (classes.len(), train.len());
    let start = initial_prompt(m, d, vit.config.patch_size, options.init_seed);
    let initial = Tensor::from_slice(&start).view([m as i64, d as i64]);

    let store = nn::VarStore::new(vit.device);
    let root = store.root();
    let (prompt_group, head_group) = (
        (&root / "prompt").set_group(0),
        (&root / "head").set_group(1),
    );
    let prompt = prompt_group.var_copy("prompt_embeddings", &initial);
    let weight = head_group.zeros("weight", &[k as i64, d as i64]);
    let bias = head_group.zeros("bias", &[k as i64]);
    let mut optimizer = nn::AdamW {
        wd: options.weight_decay,
        ..nn::AdamW::default()
    }
    .build(&store, options.prompt_learning_rate)?;

    let mut rng = ChaCha20Rng::seed_from_u64(options.seed);
    let steps_per_epoch = n.div_ceil(options.batch_size);
    let mut losses = Vec::with_capacity(options.epochs);
    let mut step = 0;
    for epoch in 0..options.epochs {
        let order = shuffled(n, &mut rng);
        let (mut total, mut seen) = (0.0, 0);
        for rows in order.chunks(options.batch_size) {
            let rate = schedule(step, steps_per_epoch, options);
            optimizer.set_lr_group(0, options.prompt_learning_rate * rate);
            optimizer.set_lr_group(1, options.head_learning_rate * rate);
            let loss = step_on(vit, train, rows, &prompt, &weight, &bias)?;
            optimizer.backward_step(&loss.linear);
            total += loss.sum;
            seen += rows.len();
            step += 1;
            let cross_entropy = total / seen as f64;
            let at = TuningProgress {
                epoch,
                samples: rows.len() as u64,
                cross_entropy,
            };
            if progress(at).is_break() {
                return Err(EngineError::Stopped);
            }
        }
        losses.push(total / n as f64);
    }

    let prompt = prompt.detach().to_device(tch::Device::Cpu);
    let distance = f64::try_from((&prompt - &initial).norm() / initial.norm())?;
    let record = TrainingRecord {
        method: "vpt-shallow",
        num_samples: n,
        options,
        cross_entropy: &losses,
        distance_from_init: distance,
    };
    if !distance.is_finite() {
        return Err(EngineError::NotFinite("the tuned prompt's values"));
    }
    Ok(PromptFile {
        metadata: Some(PromptMetadata {
            format: FORMAT,
            backbone_digest: Some(backbone.digest),
            preprocessing_id: Some(backbone.config.preprocessing.id()),
            init_seed: Some(options.init_seed),
            task: Some(task.to_owned()),
            classes: Some(classes.to_vec()),
            origin: Origin::Tuned,
            training: Some(serde_json::to_value(record).expect("plain data")),
        }),
        sketch: sketch(vit, train, &prompt, options)?,
        prompt_embeddings: PlainTensor::new([m, d], plain(&prompt)?),
        deep_prompt_embeddings: None,
        head: Some(Head {
            weight: PlainTensor::new([k, d], plain(&weight)?),
            bias: PlainTensor::new([k], plain(&bias)?),
        }),
        dtype: "f32",
    })
}

/// The loss of a step's batch.
struct StepLoss {
    /// Σ over the batch of the cross-entropy, nats.
    sum: f64,
    /// A function of prompt and head that is linear and has the mean loss's gradient.
    linear: Tensor,
}

/// What one stream adds up of a micro-batch: the loss, and its derivatives by prompt, weight and bias.
type Gradients = (f64, [Tensor; 3]);

/// The mean cross-entropy of some rows as the optimizer needs it: its gradient is made in micro-batches
/// on all streams.
fn step_on(
    vit: &Vit,
    train: &Samples,
    rows: &[usize],
    prompt: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
) -> Result<StepLoss, EngineError> {
    let prompts = [prompt.detach()];
    let size = vit.batch(&prompts).images;
    // As many as there are streams, where they would be larger than that.
    let size = size.min(rows.len().div_ceil(vit.num_streams()));
    let pairs = Pairs {
        samples: train,
        prompts: &prompts,
        batches: rows.chunks(size).map(<[usize]>::to_vec).collect(),
    };
    let mut sum = 0.0;
    let mut totals = [prompt, weight, bias].map(|x| x.detach().zeros_like());
    vit.each_micro_batch(
        &pairs,
        || [weight.detach(), bias.detach()],
        |head, batch| {
            let labels: Vec<i64> = (batch.rows.iter())
                .map(|row| train.labels[*row] as i64)
                .collect();
            head_gradients(head, &labels, batch)
        },
        |_, (loss, gradients)| {
            sum += loss;
            for (total, gradient) in totals.iter_mut().zip(gradients) {
                *total += gradient.to_device(total.device());
            }
            Ok(())
        },
        &mut |_| ControlFlow::Continue(()),
    )?;
    let linear = (prompt * &totals[0]).sum(prompt.kind())
        + (weight * &totals[1]).sum(weight.kind())
        + (bias * &totals[2]).sum(bias.kind());
    Ok(StepLoss {
        sum,
        linear: linear / rows.len() as f64,
    })
}

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
    let prompts = [prompt.to_device(vit.device)];
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

/// 0..n in random order (Fisher-Yates).
fn shuffled(n: usize, rng: &mut ChaCha20Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        order.swap(last, (rng.next_u64() % (last as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_initial_prompt_is_a_function_of_its_seed_and_within_bounds() {
        let prompt = initial_prompt(3, 384, 14, 7);
        assert_eq!(prompt, initial_prompt(3, 384, 14, 7));
        assert_ne!(prompt, initial_prompt(3, 384, 14, 8));
        let bound = (6.0f64 / (3.0 * 196.0 + 384.0)).sqrt() as f32;
        assert!(prompt.iter().all(|v| v.abs() <= bound));
        assert!(prompt.iter().any(|v| v.abs() > 0.9 * bound));
    }
}

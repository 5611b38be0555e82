//! Training by batches for any model: epochs, learning rates, checkpoints, and when to stop.
//!
//! ```text
//! parameters ─► for each epoch: batches in a seeded order ─► gradients ─► optimizer ─┬─► parameters
//!   ▲                                                                               │
//!   └──────────────────────────────── checkpoint ◄──────────────────────────────────┘
//! ```

use std::ops::ControlFlow;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::Tensor;

use crate::error::EngineError;
use crate::samples::Samples;
use crate::tune::checkpoint;
use crate::tune::checkpoint::Progress;
use crate::tune::optimizer::Optimizer;
use promptweave_domain::digest::Digest;
use promptweave_domain::tuning::{Checkpoints, Curves, HeldOut, TuningOptions};

/// A tensor that is trained, in f32 on the device.
pub struct Parameter {
    /// The name it is stored under.
    pub name: String,
    pub values: Tensor,
    /// Whether it belongs to the head, and learns at the head's rate.
    pub of_head: bool,
}

/// A model that can be trained. It is given its parameters and holds none, so that a training that
/// goes on from a checkpoint equals one that never stopped.
pub trait Model {
    /// The initial parameters.
    fn initial(&self) -> Result<Vec<Parameter>, EngineError>;

    /// The sum of these rows' losses, and the gradients of their mean, one for each parameter.
    /// `step` counts from 0; everything random is a function of it.
    fn gradients(
        &self,
        rows: &[usize],
        parameters: &[Tensor],
        step: i64,
    ) -> Result<(f64, Vec<Tensor>), EngineError>;

    /// The features f [N, d], or whatever the linear head is put on.
    fn features(
        &self,
        samples: &Samples,
        parameters: &[Tensor],
        alive: Alive<'_>,
    ) -> Result<Tensor, EngineError>;

    /// Mean and variance by which each normalised layer of the head normalises.
    fn statistics(&self, _parameters: &[Tensor]) -> Vec<(Tensor, Tensor)> {
        Vec::new()
    }

    /// Scores labelled samples, which need not be training samples.
    fn score(
        &self,
        samples: &Samples,
        parameters: &[Tensor],
        alive: Alive<'_>,
    ) -> Result<HeldOut, EngineError>;
}

/// A callback between batches when nothing is trained, as a sign of life.
pub type Alive<'a> = &'a mut dyn FnMut() -> ControlFlow<()>;

pub struct Training<'a> {
    pub model: &'a dyn Model,
    pub options: &'a TuningOptions,
    pub num_samples: usize,
    /// Samples that are scored after every epoch, and never trained on.
    pub held_out: Option<&'a Samples>,
    /// Digest of everything that the outcome depends on.
    pub key: Digest,
}

/// The report after every batch.
pub struct TuningProgress {
    pub epoch: usize,
    pub samples: u64,
    /// Mean cross-entropy over the epoch so far.
    pub cross_entropy: f64,
}

impl Training<'_> {
    /// Trains, from the last checkpoint of the same training if there is one. Keeps a checkpoint
    /// after every epoch. Returns the parameters of the last epoch, or of the best if patience
    /// chose it.
    pub fn run(
        &self,
        initial: &[Parameter],
        checkpoints: &mut dyn Checkpoints,
        progress: &mut dyn FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<(Vec<Tensor>, Curves), EngineError> {
        let copies = || -> Vec<Tensor> { initial.iter().map(|p| p.values.copy()).collect() };
        let parameters = copies();
        let mut state = Progress {
            optimizer: Optimizer::new(
                self.options.optimizer,
                self.options.weight_decay,
                &parameters,
            ),
            curves: Curves::default(),
            best: copies(),
            parameters,
        };
        if let Some(bytes) = checkpoints.last()? {
            checkpoint::read(self.key, &bytes, &mut state);
        }
        let of_head: Vec<bool> = initial.iter().map(|parameter| parameter.of_head).collect();
        while !self.is_over(&state.curves) {
            self.epoch(&of_head, &mut state, progress)?;
            let epoch = state.curves.last().expect("one is over");
            checkpoints.keep(&epoch, &checkpoint::write(self.key, &mut state)?);
        }
        let chosen = match self.held_out.and(self.options.patience) {
            Some(_) => state.best,
            None => state.parameters,
        };
        for parameter in &chosen {
            if !bool::try_from(parameter.isfinite().all())? {
                return Err(EngineError::NotFinite("the tuned values"));
            }
        }
        Ok((chosen, state.curves))
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
        of_head: &[bool],
        state: &mut Progress,
        progress: &mut dyn FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let options = self.options;
        let n = self.num_samples;
        let epoch = state.curves.cross_entropy.len();
        let steps_per_epoch = n.div_ceil(options.batch_size);
        let (mut total, mut seen) = (0.0, 0);
        for (batch, rows) in shuffled(n, options.seed, epoch)
            .chunks(options.batch_size)
            .enumerate()
        {
            let share = schedule(epoch * steps_per_epoch + batch, steps_per_epoch, options);
            let rate = |of_head: &bool| match of_head {
                true => options.head_learning_rate * share,
                false => options.prompt_learning_rate * share,
            };
            let rates: Vec<f64> = of_head.iter().map(rate).collect();
            let (loss, gradients) =
                self.model
                    .gradients(rows, &state.parameters, state.optimizer.steps)?;
            state
                .optimizer
                .step(&mut state.parameters, &gradients, &rates)?;
            if !loss.is_finite() {
                return Err(EngineError::NotFinite("the losses"));
            }
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
            let mut alive = || {
                progress(TuningProgress {
                    epoch,
                    samples: 0,
                    cross_entropy: total / n as f64,
                })
            };
            let score = self.model.score(held_out, &state.parameters, &mut alive)?;
            let earlier = &state.curves.held_out;
            let lowest = earlier.iter().map(|score| score.cross_entropy);
            if score.cross_entropy < lowest.fold(f64::INFINITY, f64::min) {
                state.best = state.parameters.iter().map(Tensor::copy).collect();
            }
            state.curves.held_out.push(score);
        }
        Ok(())
    }
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

/// 0..n in the random order of an epoch (Fisher-Yates). It takes n - 1 numbers of two words, after
/// those of the epoch before.
fn shuffled(n: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    rng.set_word_pos(2 * epoch as u128 * n.saturating_sub(1) as u128);
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        order.swap(last, (rng.next_u64() % (last as u64 + 1)) as usize);
    }
    order
}

/// Dropout's factors, in the shape of `values`: 0 for dropped values, 1/(1-p) for the rest. They
/// are a function of seed, step and place, so that a training that was killed goes on with the
/// same.
pub fn kept(values: &Tensor, p: f64, seed: u64, step: i64, place: u64) -> Tensor {
    if p == 0.0 {
        return values.ones_like();
    }
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    rng.set_stream((place << 32) + 1 + step as u64);
    let scale = (1.0 / (1.0 - p)) as f32;
    let factors: Vec<f32> = (0..values.numel())
        .map(|_| {
            if f64::from(rng.next_u32()) < p * f64::from(u32::MAX) {
                0.0
            } else {
                scale
            }
        })
        .collect();
    Tensor::from_slice(&factors)
        .view(values.size().as_slice())
        .to_device(values.device())
}

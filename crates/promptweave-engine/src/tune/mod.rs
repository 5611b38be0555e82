//! Tuning on a labelled target with a frozen backbone: a visual prompt and a linear head (VPT, Jia
//! et al. 2022), and the methods that prompts are compared with.
//!
//! | model | methods | gradients |
//! |---|---|---|
//! | [`shallow`] | `vpt-shallow` | by the fast way through the backbone |
//! | [`heads`] | `linear`, `mlp-K` | of the head, on features that are computed once |
//! | [`full_model`] | `vpt-deep`, `partial-K`, `bias`, `adapter-R`, `sidetune`, `full` | automatic, through the [`network`] |

pub(crate) mod job;

mod adaptation;
mod attention;
mod checkpoint;
mod full_model;
mod heads;
mod images;
mod network;
mod optimizer;
mod select;
mod shallow;
mod targets;
mod train;
mod tuning_run;

use std::ops::ControlFlow;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor, no_grad};

use crate::compose::steps::stop_on;
use crate::error::EngineError;
use crate::samples::Samples;
use crate::tensors::plain;
use crate::vit::Vit;
use promptweave_domain::composition::Source;
use promptweave_domain::digest::Digest;
use promptweave_domain::prompt_file::{FORMAT, Head, Origin, PromptFile, PromptMetadata, Sketch};
use promptweave_domain::stratified::stratified_subset;
use promptweave_domain::tensor::Tensor as PlainTensor;
use promptweave_domain::training_record::TrainingRecord;
use promptweave_domain::tuning::{Checkpoints, Curves, HeldOut, TuningOptions};
use promptweave_domain::tuning_method::TuningMethod;
use promptweave_formats::backbone::Backbone;

pub use self::attention::Attention;
use self::full_model::FullModel;
use self::heads::Heads;
pub use self::images::Images;
use self::shallow::Shallow;
pub use self::train::TuningProgress;
use self::train::{Alive, Model, Parameter, Training};
pub use self::tuning_run::{Outcome, TuningRun};

/// P₀ [m, d]: uniform(-v, v) with v = √(6/(3·patch² + d)), VPT's initialisation.
pub fn initial_prompt(num_tokens: usize, embed_dim: usize, patch: usize, seed: u64) -> Vec<f32> {
    initial_prompts(num_tokens, embed_dim, patch, seed, 0)
}

/// Initial values of the same distribution for the prompt of block `block`; 0 is the first block.
fn initial_prompts(
    num_tokens: usize,
    embed_dim: usize,
    patch: usize,
    seed: u64,
    block: u64,
) -> Vec<f32> {
    let bound = (6.0 / (3 * patch * patch + embed_dim) as f64).sqrt();
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    rng.set_stream(block);
    (0..num_tokens * embed_dim)
        .map(|_| {
            let unit = f64::from(rng.next_u32()) / f64::from(u32::MAX);
            ((2.0 * unit - 1.0) * bound) as f32
        })
        .collect()
}

/// Normal numbers with mean 0, a function of seed and stream (Box & Muller 1958).
fn gaussian(shape: &[i64], deviation: f64, seed: u64, stream: u64) -> Tensor {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    // These streams are apart from those of the initial prompts.
    rng.set_stream((1 << 32) + stream);
    let mut unit = || (f64::from(rng.next_u32()) + 0.5) / (f64::from(u32::MAX) + 1.0);
    let values: Vec<f32> = (0..shape.iter().product::<i64>())
        .map(|_| {
            let (radius, angle) = ((-2.0 * unit().ln()).sqrt(), std::f64::consts::TAU * unit());
            (deviation * radius * angle.cos()) as f32
        })
        .collect();
    Tensor::from_slice(&values).view(shape)
}

/// What is to be trained, on what data, and how.
#[derive(Clone, Copy)]
pub struct Tuning<'a> {
    pub backbone: &'a Backbone,
    pub vit: &'a Vit,
    pub train: &'a Samples,
    /// Samples that are scored after every epoch, and never trained on.
    pub held_out: Option<&'a Samples>,
    /// Name of the task. It goes into the file, like `classes`.
    pub task: &'a str,
    pub classes: &'a [String],
    /// The prompt file to begin with. Its prompt is used if the method has one, its head if it is
    /// for these classes. Otherwise the tuning begins with the initial prompt of `init_seed` and no
    /// head.
    pub start: Option<&'a Source>,
    /// Whether the start's head is used. It must not be if it was fitted on images that are held
    /// out.
    pub takes_head: bool,
    /// Source prompts whose logits the loss pulls towards, by `distillation_weight`.
    pub teachers: &'a [Source],
    pub options: &'a TuningOptions,
}

impl<'a> Tuning<'a> {
    /// Trains a prompt as [`Self::train`] does. The method must be one that makes a prompt.
    pub fn run(
        &self,
        checkpoints: &mut dyn Checkpoints,
        mut progress: impl FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<PromptFile, EngineError> {
        let trained = self.train(checkpoints, &mut progress)?;
        trained.prompt_file(&mut || ControlFlow::Continue(()))
    }

    /// Trains, from the last checkpoint of the same tuning if there is one. Keeps a checkpoint
    /// after every epoch.
    pub fn train(
        &self,
        checkpoints: &mut dyn Checkpoints,
        progress: &mut dyn FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<Trained<'a>, EngineError> {
        if self.options.method == TuningMethod::VptDeep && self.vit.config.depth < 2 {
            return Err(EngineError::OneBlock);
        }
        let model: Box<dyn Model + 'a> = match self.options.method {
            TuningMethod::VptShallow => Box::new(Shallow::new(*self)?),
            TuningMethod::Linear | TuningMethod::Mlp(_) => Box::new(Heads::new(*self)?),
            _ => Box::new(FullModel::new(*self)?),
        };
        let initial = model.initial()?;
        let training = Training {
            model: model.as_ref(),
            options: self.options,
            num_samples: self.train.len(),
            held_out: self.held_out,
            key: self.key(),
        };
        let (parameters, curves) = training.run(&initial, checkpoints, progress)?;
        Ok(Trained {
            tuning: *self,
            model,
            initial,
            parameters,
            curves,
        })
    }

    /// Digest of everything that the outcome depends on.
    fn key(&self) -> Digest {
        let of = (
            env!("CARGO_PKG_VERSION"),
            self.backbone.digest,
            self.vit.compute.precision,
            (self.train.digest, &self.train.indices),
            self.held_out
                .map(|samples| (samples.digest, &samples.indices)),
            (self.start.map(digest), self.takes_head),
            self.digests_of_teachers(),
            self.options,
        );
        Digest::of(&serde_json::to_vec(&of).expect("plain data"))
    }

    fn on_device(&self, values: &[f32], shape: &[usize]) -> Tensor {
        let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
        Tensor::from_slice(values)
            .view(shape.as_slice())
            .to_device(self.vit.device)
    }

    /// The initial prompt [m, d], in f32 whatever the backbone's precision.
    fn initial_prompt(&self) -> Parameter {
        let (m, d) = (self.num_tokens(), self.vit.config.embed_dim);
        let values = match self.start {
            Some(start) => self.on_device(&start.file.prompt_embeddings.values, &[m, d]),
            None => {
                let patch = self.vit.config.patch_size;
                let values = initial_prompt(m, d, patch, self.options.init_seed);
                self.on_device(&values, &[m, d])
            }
        };
        Parameter {
            name: "prompt_embeddings".into(),
            values,
            of_head: false,
        }
    }

    /// The initial prompts of later blocks [L-1, m, d], from the start if it is deep.
    fn initial_deep_prompts(&self) -> Tensor {
        let (m, d) = (self.num_tokens(), self.vit.config.embed_dim);
        let behind_first = self.vit.config.depth - 1;
        let of_start = self
            .start
            .and_then(|start| start.file.deep_prompt_embeddings.as_ref());
        match of_start.filter(|deep| deep.shape == [behind_first, m, d]) {
            Some(deep) => self.on_device(&deep.values, &deep.shape),
            None => {
                let (patch, seed) = (self.vit.config.patch_size, self.options.init_seed);
                let of_block = |block| initial_prompts(m, d, patch, seed, block as u64);
                let values: Vec<f32> = (1..=behind_first).flat_map(of_block).collect();
                self.on_device(&values, &[behind_first, m, d])
            }
        }
    }

    /// The initial head: weight `[K, d]` and bias `[K]`.
    fn initial_head(&self) -> [Parameter; 2] {
        let (d, k) = (self.vit.config.embed_dim, self.classes.len());
        // A head of as many classes may still belong to other classes.
        let is_of_others = |file: &&PromptFile| {
            let theirs = file.metadata.as_ref().and_then(|m| m.classes.as_deref());
            theirs.is_some_and(|theirs| theirs != self.classes)
        };
        let start = self.start.filter(|_| self.takes_head);
        let file = start
            .map(|start| &start.file)
            .filter(|file| !is_of_others(file));
        let head = file.and_then(|file| file.head.as_ref());
        let (weight, bias) = match head.filter(|head| head.weight.shape == [k, d]) {
            Some(head) => (head.weight.values.clone(), head.bias.values.clone()),
            None => (vec![0.0; k * d], vec![0.0; k]),
        };
        let of_head = |name: &str, values| Parameter {
            name: name.into(),
            values,
            of_head: true,
        };
        [
            of_head("head.weight", self.on_device(&weight, &[k, d])),
            of_head("head.bias", self.on_device(&bias, &[k])),
        ]
    }

    /// Calls `work` on the images of these rows, in f32 on the device. A batch has as many images
    /// as a pass takes with a prompt of this length. Training more than a prompt needs a little
    /// more memory, but not much.
    fn each_batch(
        &self,
        samples: &Samples,
        rows: &[usize],
        mut work: impl FnMut(&[usize], &Tensor) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let vit = self.vit;
        let size = vit.batch(&[self.initial_prompt().values]).images;
        for rows in rows.chunks(size) {
            work(rows, &samples.images(rows, vit.device, Kind::Float)?)?;
        }
        Ok(())
    }

    /// The outputs [N, …] of `forward` for all images, without gradients.
    fn of_all(
        &self,
        samples: &Samples,
        alive: Alive<'_>,
        forward: impl Fn(&Tensor) -> Tensor,
    ) -> Result<Tensor, EngineError> {
        let all: Vec<usize> = (0..samples.len()).collect();
        let mut parts = Vec::new();
        self.each_batch(samples, &all, |_, images| {
            parts.push(no_grad(|| forward(images)));
            stop_on(alive())
        })?;
        Ok(Tensor::cat(&parts, 0))
    }

    fn num_tokens(&self) -> usize {
        self.start
            .map_or(self.options.num_tokens, |start| start.file.num_tokens())
    }

    fn digests_of_teachers(&self) -> Vec<Digest> {
        self.teachers.iter().map(digest).collect()
    }
}

fn digest(source: &Source) -> Digest {
    source.digest
}

/// A finished training.
pub struct Trained<'a> {
    tuning: Tuning<'a>,
    model: Box<dyn Model + 'a>,
    initial: Vec<Parameter>,
    parameters: Vec<Tensor>,
    pub curves: Curves,
}

impl Trained<'_> {
    pub fn score(&self, samples: &Samples, alive: Alive<'_>) -> Result<HeldOut, EngineError> {
        self.model.score(samples, &self.parameters, alive)
    }

    /// A tuned tensor by its name, on the CPU.
    fn stored(&self, name: &str) -> Result<Option<PlainTensor<f32>>, EngineError> {
        let place = self.initial.iter().position(|p| p.name == name);
        place.map(|at| stored(&self.parameters[at])).transpose()
    }

    pub fn record(&self) -> Result<TrainingRecord, EngineError> {
        let flat = |of: &dyn Fn(usize) -> Tensor| -> Option<Tensor> {
            let beside_head = (0..self.initial.len()).filter(|at| !self.initial[*at].of_head);
            let all: Vec<Tensor> = beside_head.map(|at| of(at).flatten(0, -1)).collect();
            (!all.is_empty()).then(|| Tensor::cat(&all, 0).to_device(Device::Cpu))
        };
        let initial = flat(&|at| self.initial[at].values.shallow_clone());
        let tuned = flat(&|at| self.parameters[at].shallow_clone());
        let distance = match initial.zip(tuned) {
            Some((initial, tuned)) => {
                Some(f64::try_from((tuned - &initial).norm() / initial.norm())?)
            }
            None => None,
        };
        Ok(TrainingRecord {
            num_samples: self.tuning.train.len(),
            options: self.tuning.options.clone(),
            start: self.tuning.start.map(digest),
            teachers: self.tuning.digests_of_teachers(),
            curves: self.curves.clone(),
            distance_from_init: distance.filter(|distance| distance.is_finite()),
        })
    }

    /// The prompt file of a method that makes a prompt.
    pub fn prompt_file(&self, alive: Alive<'_>) -> Result<PromptFile, EngineError> {
        let Tuning {
            backbone,
            task,
            classes,
            start,
            options,
            ..
        } = self.tuning;
        let method = options.method;
        let prompt = self.stored("prompt_embeddings")?;
        let prompt = prompt.ok_or(EngineError::MakesNoPrompt(method))?;
        let head = self
            .stored("head.weight")?
            .zip(self.stored("head.bias")?)
            .map(|(weight, bias)| Head { weight, bias });
        let of_start = |start: &Source| start.file.metadata.as_ref()?.init_seed;
        Ok(PromptFile {
            metadata: Some(PromptMetadata {
                format: FORMAT,
                backbone_digest: Some(backbone.digest),
                preprocessing_id: Some(backbone.config.preprocessing.id()),
                init_seed: match start {
                    Some(start) => of_start(start),
                    None => Some(options.init_seed),
                },
                task: Some(task.to_owned()),
                classes: Some(classes.to_vec()),
                origin: Origin::Tuned,
                training: Some(self.record()?.to_json()),
                sources: Vec::new(),
            }),
            sketch: self.sketch(alive)?,
            prompt_embeddings: prompt,
            deep_prompt_embeddings: self.stored("deep_prompt_embeddings")?,
            head,
            dtype: "f32",
        })
    }

    /// Features of a small stratified choice of the training samples, with their labels.
    fn sketch(&self, alive: Alive<'_>) -> Result<Option<Sketch>, EngineError> {
        let Tuning { train, options, .. } = self.tuning;
        let rows = stratified_subset(&train.labels, options.sketch_samples, options.seed);
        if rows.is_empty() {
            return Ok(None);
        }
        let few = train.only(&rows);
        let labels: Vec<i64> = few.labels.iter().map(|label| *label as i64).collect();
        Ok(Some(Sketch {
            features: stored(&self.model.features(&few, &self.parameters, alive)?)?,
            labels: PlainTensor::new([rows.len()], labels),
        }))
    }
}

fn stored(tensor: &Tensor) -> Result<PlainTensor<f32>, EngineError> {
    let shape: Vec<usize> = tensor.size().iter().map(|size| *size as usize).collect();
    let values = tensor.to_device(Device::Cpu).to_kind(Kind::Float);
    Ok(PlainTensor::new(shape, plain(&values)?))
}

/// The parameters as leaves to differentiate by.
fn leaves(parameters: &[Tensor]) -> Vec<Tensor> {
    let leaf = |parameter: &Tensor| parameter.detach().set_requires_grad(true);
    parameters.iter().map(leaf).collect()
}

/// The sum of the gradients of a batch's parts.
#[derive(Default)]
struct Totals(Vec<Tensor>);

impl Totals {
    fn add(&mut self, gradients: Vec<Tensor>) {
        self.0 = match self.0.as_slice() {
            [] => gradients,
            totals => totals.iter().zip(&gradients).map(|(a, b)| a + b).collect(),
        };
    }

    fn mean(self, n: usize) -> Vec<Tensor> {
        let share = 1.0 / n as f64;
        self.0.into_iter().map(|total| total * share).collect()
    }
}

/// Scores logits [N, K] on the CPU.
fn score_of(logits: &Tensor, labels: &[usize]) -> Result<HeldOut, EngineError> {
    let logits = logits.to_kind(Kind::Double);
    let labels: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
    let labels = Tensor::from_slice(&labels);
    let correct = logits
        .argmax(-1, false)
        .eq_tensor(&labels)
        .to_kind(Kind::Double);
    let cross_entropy = f64::try_from(logits.cross_entropy_for_logits(&labels))?;
    if !cross_entropy.is_finite() {
        return Err(EngineError::NotFinite("the losses"));
    }
    Ok(HeldOut {
        cross_entropy,
        accuracy: f64::try_from(correct.mean(Kind::Double))?,
    })
}

#[cfg(test)]
mod baselines;
#[cfg(test)]
mod tests;

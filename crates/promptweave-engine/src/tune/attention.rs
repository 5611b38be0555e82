//! ATTEMPT (Asai et al. 2022): each sample has its own mixture of frozen source prompts and a new
//! one, by attention.
//!
//! P(x) = P₀ + Σⱼ aⱼ(x) Pⱼ, a(x) = softmaxⱼ(⟨kⱼ, q(x)⟩/τ) over j = 0 … M with τ = d·e.
//! kⱼ is the maximum of every coordinate over the tokens of Pⱼ, x̂ the same over the tokens of the
//! image, and q(x) = LayerNorm(W_up SiLU(W_down x̂)). P₀, W_down, W_up, the normalisation and the
//! head are trained.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor, no_grad};

use crate::error::EngineError;
use crate::samples::Samples;
use crate::tune::targets::Targets;
use crate::tune::train::{Alive, Model, Parameter, Training, TuningProgress};
use crate::tune::{Totals, Tuning, gaussian, leaves, score_of};
use crate::vit::Weights;
use promptweave_domain::tensor::Tensor as PlainTensor;
use promptweave_domain::tuning::{HeldOut, NoCheckpoints};

/// Channels between W_down and W_up.
const INNER: i64 = 100;
const NORM_EPS: f64 = 1e-5;
/// Positions of the parameters. The head's parameters follow.
const PROMPT: usize = 0;
const DOWN: usize = 1;
const UP: usize = 2;
const SCALE: usize = 3;
const SHIFT: usize = 4;

pub struct Attention<'a> {
    tuning: Tuning<'a>,
    targets: Targets,
    weights: Weights,
    /// The frozen sources, [M, m, d].
    sources: Tensor,
}

impl<'a> Attention<'a> {
    pub fn new(tuning: Tuning<'a>, sources: &[PlainTensor<f32>]) -> Result<Self, EngineError> {
        let there = |prompt: &PlainTensor<f32>| tuning.on_device(&prompt.values, &prompt.shape);
        let sources: Vec<Tensor> = sources.iter().map(there).collect();
        Ok(Self {
            targets: Targets::of(&tuning)?,
            weights: Weights::load(tuning.backbone, tuning.vit.device, Kind::Float)?,
            sources: Tensor::stack(&sources, 0),
            tuning,
        })
    }

    /// Trains, and returns the mean attention over the training samples to each source, `[M]`. What
    /// is missing to 1 goes to the new prompt.
    pub fn learn(
        &self,
        progress: &mut dyn FnMut(TuningProgress) -> ControlFlow<()>,
    ) -> Result<Vec<f64>, EngineError> {
        let training = Training {
            model: self,
            options: self.tuning.options,
            num_samples: self.tuning.train.len(),
            held_out: None,
            key: self.tuning.key(),
        };
        let (parameters, _) = training.run(&self.initial()?, &mut NoCheckpoints, progress)?;
        let of_samples = self.of_samples(self.tuning.train, &parameters)?;
        let mean = of_samples.mean_dim(0, false, Kind::Double);
        let all: Vec<f64> = Vec::try_from(mean.to_device(Device::Cpu))?;
        Ok(all[1..].to_vec())
    }

    /// The attention a of every sample, [N, M+1]; the new prompt comes first.
    pub fn of_samples(
        &self,
        samples: &Samples,
        parameters: &[Tensor],
    ) -> Result<Tensor, EngineError> {
        let forward = |images: &Tensor| {
            let tokens = self.weights.embedding.tokens(images);
            self.attention(&tokens, parameters)
        };
        let alive = &mut || ControlFlow::Continue(());
        self.tuning.of_all(samples, alive, forward)
    }

    /// The attention [B, M+1] for images' tokens [B, t, d], CLS first.
    fn attention(&self, tokens: &Tensor, parameters: &[Tensor]) -> Tensor {
        let d = self.tuning.vit.embed_dim();
        let own = parameters[PROMPT].unsqueeze(0);
        let keys = Tensor::cat(&[&own, &self.sources], 0).amax([1i64].as_slice(), false);
        let patches = tokens.narrow(1, 1, tokens.size()[1] - 1);
        let largest = patches.amax([1i64].as_slice(), false);
        let inner = largest.linear(&parameters[DOWN], None::<Tensor>).silu();
        let query = inner.linear(&parameters[UP], None::<Tensor>).layer_norm(
            [d],
            Some(&parameters[SCALE]),
            Some(&parameters[SHIFT]),
            NORM_EPS,
            false,
        );
        let temperature = d as f64 * std::f64::consts::E;
        (query.matmul(&keys.tr()) / temperature).softmax(-1, None::<Kind>)
    }

    fn features_of(&self, images: &Tensor, parameters: &[Tensor]) -> Tensor {
        let tokens = self.weights.embedding.tokens(images);
        let attention = self.attention(&tokens, parameters);
        let own = parameters[PROMPT].unsqueeze(0);
        let all = Tensor::cat(&[&own, &self.sources], 0);
        let (m, d) = (all.size()[1], all.size()[2]);
        let mixed = attention.matmul(&all.flatten(1, -1)).view([-1, m, d]);
        self.weights.features(&tokens, &(mixed + own))
    }
}

impl Model for Attention<'_> {
    fn initial(&self) -> Result<Vec<Parameter>, EngineError> {
        let (vit, seed) = (self.tuning.vit, self.tuning.options.init_seed);
        let d = vit.embed_dim();
        let like = (Kind::Float, vit.device);
        let parameter = |name: &str, values: Tensor| Parameter {
            name: format!("attention.{name}"),
            values: values.to_device(vit.device),
            of_head: false,
        };
        let random = |shape: &[i64], stream| {
            let deviation = (1.0 / shape[1] as f64).sqrt();
            gaussian(shape, deviation, seed, stream)
        };
        let mut all = vec![
            self.tuning.initial_prompt(),
            parameter("down", random(&[INNER, d], 0)),
            parameter("up", random(&[d, INNER], 1)),
            parameter("norm.weight", Tensor::ones([d], like)),
            parameter("norm.bias", Tensor::zeros([d], like)),
        ];
        all.extend(self.tuning.initial_head());
        Ok(all)
    }

    fn gradients(
        &self,
        rows: &[usize],
        parameters: &[Tensor],
        _step: i64,
    ) -> Result<(f64, Vec<Tensor>), EngineError> {
        let leaves = leaves(parameters);
        let (weight, bias) = (&leaves[SHIFT + 1], &leaves[SHIFT + 2]);
        let (mut sum, mut totals) = (0.0, Totals::default());
        self.tuning
            .each_batch(self.tuning.train, rows, |rows, images| {
                let logits = self.features_of(images, &leaves).linear(weight, Some(bias));
                let loss = self.targets.loss(rows, &logits);
                sum += f64::try_from(&loss)?;
                totals.add(Tensor::f_run_backward(&[loss], &leaves, false, false)?);
                Ok(())
            })?;
        Ok((sum, totals.mean(rows.len())))
    }

    fn features(
        &self,
        samples: &Samples,
        parameters: &[Tensor],
        alive: Alive<'_>,
    ) -> Result<Tensor, EngineError> {
        let forward = |images: &Tensor| self.features_of(images, parameters);
        self.tuning.of_all(samples, alive, forward)
    }

    fn score(
        &self,
        samples: &Samples,
        parameters: &[Tensor],
        alive: Alive<'_>,
    ) -> Result<HeldOut, EngineError> {
        let features = self.features(samples, parameters, alive)?;
        let (weight, bias) = (&parameters[SHIFT + 1], &parameters[SHIFT + 2]);
        let logits = no_grad(|| features.linear(weight, Some(bias)));
        score_of(&logits.to_device(Device::Cpu), &samples.labels)
    }
}

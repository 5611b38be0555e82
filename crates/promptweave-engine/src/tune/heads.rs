//! Methods that train nothing but a head, linear or with hidden layers. The backbone's own features
//! are computed once.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::samples::Samples;
use crate::score::head::row_tensor;
use crate::tune::targets::Targets;
use crate::tune::train::{Alive, Model, Parameter, kept};
use crate::tune::{Tuning, gaussian, leaves, score_of};
use crate::vit::features::extract;
use promptweave_domain::tuning::HeldOut;
use promptweave_domain::tuning_method::TuningMethod;

/// Dropout probability of hidden units in training.
const DROPOUT: f64 = 0.1;
const NORM_EPS: f64 = 1e-5;
/// Number of parameters of a layer: weight and bias, of the layer and of its normalisation.
const OF_LAYER: usize = 4;

pub struct Heads<'a> {
    tuning: Tuning<'a>,
    targets: Targets,
    num_layers: usize,
    /// Features of the training samples, [N, d].
    features: Tensor,
}

impl<'a> Heads<'a> {
    pub fn new(tuning: Tuning<'a>) -> Result<Self, EngineError> {
        Ok(Self {
            targets: Targets::of(&tuning)?,
            num_layers: match tuning.options.method {
                TuningMethod::Mlp(layers) => layers,
                _ => 0,
            },
            features: own_features(&tuning, tuning.train, &mut || ControlFlow::Continue(()))?,
            tuning,
        })
    }

    /// Logits of `x` [B, d]. Each layer normalises its input by `statistics`, or without them by
    /// the input's own, which are returned.
    fn logits(
        &self,
        x: &Tensor,
        parameters: &[Tensor],
        statistics: Option<&[(Tensor, Tensor)]>,
        dropout: &dyn Fn(usize, &Tensor) -> Tensor,
    ) -> (Tensor, Vec<(Tensor, Tensor)>) {
        let mut x = x.shallow_clone();
        let mut own = Vec::new();
        for (layer, of_layer) in parameters[..OF_LAYER * self.num_layers]
            .chunks_exact(OF_LAYER)
            .enumerate()
        {
            let [weight, bias, scale, shift] = of_layer else {
                unreachable!("four a layer");
            };
            let hidden = x.linear(weight, Some(bias)).relu();
            let (mean, variance) = match statistics {
                Some(statistics) => {
                    let (mean, variance) = &statistics[layer];
                    (mean.shallow_clone(), variance.shallow_clone())
                }
                None => (
                    hidden.mean_dim(0, false, None::<Kind>),
                    hidden.var_dim([0i64].as_slice(), false, false),
                ),
            };
            let normalised = (hidden - &mean) / (&variance + NORM_EPS).sqrt();
            x = dropout(layer, &(normalised * scale + shift));
            own.push((mean, variance));
        }
        let [weight, bias] = &parameters[OF_LAYER * self.num_layers..] else {
            unreachable!("weight and bias of the head");
        };
        (x.linear(weight, Some(bias)), own)
    }
}

impl Model for Heads<'_> {
    fn initial(&self) -> Result<Vec<Parameter>, EngineError> {
        let d = self.tuning.vit.embed_dim();
        let like = (Kind::Float, self.tuning.vit.device);
        let mut parameters = Vec::new();
        for layer in 0..self.num_layers {
            let mut add = |name: &str, values: Tensor| {
                parameters.push(Parameter {
                    name: format!("head.hidden.{layer}.{name}"),
                    values,
                    of_head: true,
                });
            };
            // He et al. 2015, for ReLU.
            let deviation = (2.0 / d as f64).sqrt();
            let seed = self.tuning.options.init_seed;
            let weight = gaussian(&[d, d], deviation, seed, layer as u64);
            add("weight", weight.to_device(self.tuning.vit.device));
            add("bias", Tensor::zeros([d], like));
            add("norm.weight", Tensor::ones([d], like));
            add("norm.bias", Tensor::zeros([d], like));
        }
        parameters.extend(self.tuning.initial_head());
        Ok(parameters)
    }

    fn gradients(
        &self,
        rows: &[usize],
        parameters: &[Tensor],
        step: i64,
    ) -> Result<(f64, Vec<Tensor>), EngineError> {
        let leaves = leaves(parameters);
        let rows_there = row_tensor(rows).to_device(self.features.device());
        let x = self.features.index_select(0, &rows_there);
        let seed = self.tuning.options.seed;
        let drop = |layer: usize, x: &Tensor| x * kept(x, DROPOUT, seed, step, 1 + layer as u64);
        let (logits, _) = self.logits(&x, &leaves, None, &drop);
        let loss = self.targets.loss(rows, &logits);
        let sum = f64::try_from(&loss)?;
        let mean = loss / rows.len() as f64;
        let gradients = Tensor::f_run_backward(&[mean], &leaves, false, false)?;
        Ok((sum, gradients))
    }

    fn features(
        &self,
        samples: &Samples,
        _: &[Tensor],
        alive: Alive<'_>,
    ) -> Result<Tensor, EngineError> {
        own_features(&self.tuning, samples, alive)
    }

    /// Mean and variance of every layer's input over all training samples.
    fn statistics(&self, parameters: &[Tensor]) -> Vec<(Tensor, Tensor)> {
        let as_it_is = |_: usize, x: &Tensor| x.shallow_clone();
        tch::no_grad(|| self.logits(&self.features, parameters, None, &as_it_is).1)
    }

    fn score(
        &self,
        samples: &Samples,
        parameters: &[Tensor],
        alive: Alive<'_>,
    ) -> Result<HeldOut, EngineError> {
        let x = own_features(&self.tuning, samples, alive)?;
        let as_it_is = |_: usize, x: &Tensor| x.shallow_clone();
        let statistics = self.statistics(parameters);
        let (logits, _) =
            tch::no_grad(|| self.logits(&x, parameters, Some(&statistics), &as_it_is));
        score_of(&logits.to_device(Device::Cpu), &samples.labels)
    }
}

/// Features without any prompt, in f32 on the device.
fn own_features(
    tuning: &Tuning<'_>,
    samples: &Samples,
    alive: Alive<'_>,
) -> Result<Tensor, EngineError> {
    let vit = tuning.vit;
    let none = [Tensor::zeros([0, vit.embed_dim()], (vit.kind, vit.device))];
    let features = extract(vit, &vit.pairs(samples, &none), |_| alive())?.get(0);
    Ok(features.to_device(vit.device).to_kind(Kind::Float))
}

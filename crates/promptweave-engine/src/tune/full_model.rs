//! Methods that reach inside the backbone: deep prompts, some of its tensors, adapters, or a
//! network beside it. Gradients come from libtorch, by automatic differentiation of the definition.

use tch::{Device, Kind, Tensor, no_grad};

use crate::error::EngineError;
use crate::samples::Samples;
use crate::tune::network::{Network, SIDE_LAYERS};
use crate::tune::targets::Targets;
use crate::tune::train::{Alive, Model, Parameter, kept};
use crate::tune::{Totals, Tuning, gaussian, leaves, score_of};
use crate::vit::Weights;
use promptweave_domain::tuning::HeldOut;
use promptweave_domain::tuning_method::TuningMethod;

/// Standard deviation of the projections into adapters at the start. The projections out begin at
/// 0. So nothing changes at first, but unlike with both at 0 there is a gradient.
const ADAPTER_DEVIATION: f64 = 0.02;

pub struct FullModel<'a> {
    tuning: Tuning<'a>,
    targets: Targets,
    network: Network,
    /// Names of the trained tensors, the head's last.
    names: Vec<String>,
}

impl<'a> FullModel<'a> {
    pub fn new(tuning: Tuning<'a>) -> Result<Self, EngineError> {
        let vit = tuning.vit;
        let mut model = Self {
            targets: Targets::of(&tuning)?,
            network: Network {
                weights: Weights::load(tuning.backbone, vit.device, Kind::Float)?,
                added: Default::default(),
            },
            tuning,
            names: Vec::new(),
        };
        model.names = model.initial()?.into_iter().map(|p| p.name).collect();
        Ok(model)
    }

    /// The backbone's own tensors that are trained.
    fn own(&self) -> Vec<Parameter> {
        let depth = self.tuning.vit.config.depth;
        let is_trained = |name: &str| match self.tuning.options.method {
            TuningMethod::Full => true,
            TuningMethod::Bias => name.ends_with(".bias"),
            TuningMethod::Partial(blocks) => {
                let of_last = |l: usize| name.starts_with(&format!("blocks.{l}."));
                name.starts_with("norm.") || (depth.saturating_sub(blocks)..depth).any(of_last)
            }
            _ => false,
        };
        let mut own = Vec::new();
        self.network.weights.clone().each(&mut |name, values| {
            if is_trained(name) {
                own.push(Parameter {
                    name: name.to_owned(),
                    values: values.copy(),
                    of_head: false,
                });
            }
        });
        own
    }

    /// The tensors that the method adds.
    fn added(&self) -> Result<Vec<Parameter>, EngineError> {
        let Tuning { vit, options, .. } = self.tuning;
        let (d, depth) = (vit.embed_dim(), vit.config.depth);
        let mut added = Vec::new();
        let mut add = |name: String, values: Tensor| {
            added.push(Parameter {
                name,
                values: values.to_device(vit.device),
                of_head: false,
            });
        };
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let random = |shape: &[i64], deviation: f64, stream: usize| {
            gaussian(shape, deviation, options.init_seed, stream as u64)
        };
        match options.method {
            TuningMethod::VptDeep => {
                let prompt = self.tuning.initial_prompt();
                let deep = self.tuning.initial_deep_prompts();
                add(prompt.name, prompt.values);
                add("deep_prompt_embeddings".into(), deep);
            }
            TuningMethod::Adapter(reduction) => {
                let inner = (d / reduction as i64).max(1);
                for l in 0..depth {
                    let named = |part: &str| format!("adapters.{l}.{part}");
                    let down = random(&[inner, d], ADAPTER_DEVIATION, l);
                    add(named("down.weight"), down);
                    add(named("down.bias"), zeros(&[inner]));
                    add(named("up.weight"), zeros(&[d, inner]));
                    add(named("up.bias"), zeros(&[d]));
                }
            }
            TuningMethod::Sidetune => {
                let mut channels = 3;
                for (i, (out, kernel)) in SIDE_LAYERS.into_iter().enumerate() {
                    let inputs = channels * kernel * kernel;
                    // He et al. 2015, for ReLU.
                    let shape = [out, channels, kernel, kernel];
                    let weight = random(&shape, (2.0 / inputs as f64).sqrt(), i);
                    add(format!("side.conv.{i}.weight"), weight);
                    add(format!("side.conv.{i}.bias"), zeros(&[out]));
                    channels = out;
                }
                let deviation = (1.0 / channels as f64).sqrt();
                let project = random(&[d, channels], deviation, SIDE_LAYERS.len());
                add("side.project.weight".into(), project);
                // σ(0) gives both halves equal shares.
                add("side.mix".into(), zeros(&[]));
            }
            _ => {}
        }
        Ok(added)
    }

    /// The network with these parameters in it, and the head's weight `[K, d]` and bias `[K]`.
    fn network(&self, parameters: &[Tensor]) -> (Network, [Tensor; 2]) {
        let of_network = parameters.len() - 2;
        let named = self.names[..of_network].iter().zip(parameters);
        let tensors = named.map(|(name, tensor)| (name.as_str(), tensor.shallow_clone()));
        let head = [0, 1].map(|at| parameters[of_network + at].shallow_clone());
        (self.network.with(tensors), head)
    }
}

impl Model for FullModel<'_> {
    fn initial(&self) -> Result<Vec<Parameter>, EngineError> {
        let mut all = self.own();
        all.extend(self.added()?);
        all.extend(self.tuning.initial_head());
        Ok(all)
    }

    fn gradients(
        &self,
        rows: &[usize],
        parameters: &[Tensor],
        step: i64,
    ) -> Result<(f64, Vec<Tensor>), EngineError> {
        let options = self.tuning.options;
        let leaves = leaves(parameters);
        let is_prompt = |name: &String| name.ends_with("prompt_embeddings");
        let enter = |at: usize| match self.names.get(at).is_some_and(is_prompt) {
            true => {
                let p = options.prompt_dropout;
                &leaves[at] * kept(&leaves[at], p, options.seed, step, at as u64)
            }
            false => leaves[at].shallow_clone(),
        };
        let entering: Vec<Tensor> = (0..leaves.len()).map(enter).collect();
        let (network, [weight, bias]) = self.network(&entering);
        let mut sum = 0.0;
        let mut totals = Totals::default();
        self.tuning
            .each_batch(self.tuning.train, rows, |rows, images| {
                let logits = network.features(images).linear(&weight, Some(&bias));
                let loss = self.targets.loss(rows, &logits);
                sum += f64::try_from(&loss)?;
                // The batches share the masks of dropout.
                totals.add(Tensor::f_run_backward(&[loss], &leaves, true, false)?);
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
        let (network, _) = self.network(parameters);
        let forward = |images: &Tensor| network.features(images);
        self.tuning.of_all(samples, alive, forward)
    }

    fn score(
        &self,
        samples: &Samples,
        parameters: &[Tensor],
        alive: Alive<'_>,
    ) -> Result<HeldOut, EngineError> {
        let (_, [weight, bias]) = self.network(parameters);
        let features = self.features(samples, parameters, alive)?;
        let logits = no_grad(|| features.linear(&weight, Some(&bias)));
        score_of(&logits.to_device(Device::Cpu), &samples.labels)
    }
}

//! VPT-shallow (Jia et al. 2022): a prompt and a linear head. Gradients come by the fast way
//! through the backbone, which gives them for a prompt at its input and nothing else.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::samples::Samples;
use crate::tune::targets::Targets;
use crate::tune::train::{Alive, Model, Parameter, kept};
use crate::tune::{Tuning, score_of};
use crate::vit::Vit;
use crate::vit::features::extract;
use crate::vit::streams::{MicroBatch, Pairs};
use promptweave_domain::tuning::HeldOut;

/// Positions of the parameters.
const PROMPT: usize = 0;
const WEIGHT: usize = 1;
const BIAS: usize = 2;

pub struct Shallow<'a> {
    tuning: Tuning<'a>,
    targets: Targets,
}

impl<'a> Shallow<'a> {
    pub fn new(tuning: Tuning<'a>) -> Result<Self, EngineError> {
        Ok(Self {
            targets: Targets::of(&tuning)?,
            tuning,
        })
    }
}

impl Model for Shallow<'_> {
    fn initial(&self) -> Result<Vec<Parameter>, EngineError> {
        let [weight, bias] = self.tuning.initial_head();
        Ok(vec![self.tuning.initial_prompt(), weight, bias])
    }

    /// Gradients are computed in micro-batches on all streams.
    fn gradients(
        &self,
        rows: &[usize],
        parameters: &[Tensor],
        step: i64,
    ) -> Result<(f64, Vec<Tensor>), EngineError> {
        let Tuning { vit, options, .. } = self.tuning;
        let prompt = &parameters[PROMPT];
        let kept = kept(prompt, options.prompt_dropout, options.seed, step, 0);
        let prompts = [(prompt * &kept).to_kind(vit.kind)];
        let head = [WEIGHT, BIAS].map(|at| parameters[at].to_kind(vit.kind));
        let size = vit.batch(&prompts).images;
        // At least one micro-batch for each stream, even if they could be larger.
        let size = size.min(rows.len().div_ceil(vit.num_streams()));
        let pairs = Pairs {
            samples: self.tuning.train,
            prompts: &prompts,
            batches: rows.chunks(size).map(<[usize]>::to_vec).collect(),
        };
        let mut sum = 0.0;
        let mut totals: Vec<Tensor> = parameters.iter().map(Tensor::zeros_like).collect();
        vit.each_micro_batch(
            &pairs,
            || {
                let head = head.each_ref().map(Tensor::shallow_clone);
                (head, self.targets.share())
            },
            |(head, targets), batch| head_gradients(head, targets, batch),
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

    fn features(
        &self,
        samples: &Samples,
        parameters: &[Tensor],
        alive: Alive<'_>,
    ) -> Result<Tensor, EngineError> {
        features(self.tuning.vit, samples, &parameters[PROMPT], alive)
    }

    fn score(
        &self,
        samples: &Samples,
        parameters: &[Tensor],
        alive: Alive<'_>,
    ) -> Result<HeldOut, EngineError> {
        score(self.tuning.vit, samples, parameters, alive)
    }
}

/// Scores prompt, weight and bias on labelled samples.
pub fn score(
    vit: &Vit,
    samples: &Samples,
    parameters: &[Tensor],
    alive: Alive<'_>,
) -> Result<HeldOut, EngineError> {
    let features = features(vit, samples, &parameters[PROMPT], alive)?;
    let [weight, bias] =
        [WEIGHT, BIAS].map(|at| parameters[at].to_device(Device::Cpu).to_kind(Kind::Double));
    let logits = features.to_kind(Kind::Double).linear(&weight, Some(&bias));
    score_of(&logits, &samples.labels)
}

fn features(
    vit: &Vit,
    samples: &Samples,
    prompt: &Tensor,
    alive: Alive<'_>,
) -> Result<Tensor, EngineError> {
    let prompts = [prompt.to_device(vit.device).to_kind(vit.kind)];
    Ok(extract(vit, &vit.pairs(samples, &prompts), |_| alive())?.get(0))
}

/// The result of one stream for a micro-batch: the loss, and its derivatives by prompt, weight and
/// bias.
type Gradients = (f64, [Tensor; 3]);

/// Derivatives of the sum of a micro-batch's losses by the head.
fn head_gradients(
    head: &[Tensor; 2],
    targets: &Targets,
    batch: &mut MicroBatch<'_>,
) -> Result<Gradients, EngineError> {
    let (mut loss, mut by_head) = (0.0, None);
    let rows = batch.rows;
    let by_prompt = batch.gradients(&mut |_, features| {
        let of = |x: &Tensor| {
            x.to_device(features.device())
                .copy()
                .set_requires_grad(true)
        };
        let (leaf, weight, bias) = (of(features), of(&head[0]), of(&head[1]));
        let sum = targets.loss(rows, &leaf.linear(&weight, Some(&bias)));
        loss = f64::try_from(&sum)?;
        let mut gradients =
            Tensor::f_run_backward(&[sum], &[&leaf, &weight, &bias], false, false)?.into_iter();
        let mut next = || gradients.next().expect("one a leaf");
        let by_features = next();
        by_head = Some([next(), next()]);
        Ok(by_features)
    })?;
    let [by_weight, by_bias] = by_head.expect("one prompt");
    let by_prompt = by_prompt.sum_dim_intlist([0i64, 1].as_slice(), false, None::<Kind>);
    Ok((loss, [by_prompt, by_weight, by_bias]))
}

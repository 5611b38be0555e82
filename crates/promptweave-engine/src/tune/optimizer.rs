//! AdamW and SGD with momentum on a few tensors, as PyTorch defines them. Their state is plain
//! tensors, so that a tuning goes on from a checkpoint as if it had never stopped. libtorch's own
//! optimizers do not allow that.

use tch::{Tensor, no_grad};

use crate::error::EngineError;
use promptweave_domain::tuning::OptimizerKind;

/// β₁ and β₂ of AdamW (Loshchilov & Hutter 2019), with PyTorch's defaults; ε follows.
const DECAY: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;
/// Momentum of SGD, as in VPT.
const MOMENTUM: f64 = 0.9;

pub struct Optimizer {
    kind: OptimizerKind,
    weight_decay: f64,
    /// Number of steps taken.
    pub steps: i64,
    /// AdamW's two moments or SGD's momentum. Each has one tensor for each parameter, in the
    /// parameters' order.
    pub state: Vec<Vec<Tensor>>,
}

impl Optimizer {
    pub fn new(kind: OptimizerKind, weight_decay: f64, parameters: &[Tensor]) -> Self {
        let moments = match kind {
            OptimizerKind::AdamW => 2,
            OptimizerKind::Sgd => 1,
        };
        let zeros = || parameters.iter().map(Tensor::zeros_like).collect();
        Self {
            kind,
            weight_decay,
            steps: 0,
            state: (0..moments).map(|_| zeros()).collect(),
        }
    }

    /// Moves every parameter against its gradient, each at its own learning rate.
    pub fn step(
        &mut self,
        parameters: &mut [Tensor],
        gradients: &[Tensor],
        rates: &[f64],
    ) -> Result<(), EngineError> {
        self.steps += 1;
        no_grad(|| {
            for at in 0..parameters.len() {
                match self.kind {
                    OptimizerKind::AdamW => {
                        self.adam_w(at, &mut parameters[at], &gradients[at], rates[at])?;
                    }
                    OptimizerKind::Sgd => {
                        self.sgd(at, &mut parameters[at], &gradients[at], rates[at])?;
                    }
                }
            }
            Ok(())
        })
    }

    fn adam_w(
        &mut self,
        at: usize,
        parameter: &mut Tensor,
        gradient: &Tensor,
        rate: f64,
    ) -> Result<(), EngineError> {
        let [first, second] = [0, 1].map(|moment: usize| self.state[moment][at].shallow_clone());
        let first = first * DECAY[0] + gradient * (1.0 - DECAY[0]);
        let second = second * DECAY[1] + gradient.square() * (1.0 - DECAY[1]);
        let bias = DECAY.map(|decay| 1.0 - decay.powi(self.steps as i32));
        let size = second.sqrt() / bias[1].sqrt() + EPSILON;
        let moved =
            &*parameter * (1.0 - rate * self.weight_decay) - &first / size * (rate / bias[0]);
        parameter.f_copy_(&moved)?;
        self.state[0][at] = first;
        self.state[1][at] = second;
        Ok(())
    }

    fn sgd(
        &mut self,
        at: usize,
        parameter: &mut Tensor,
        gradient: &Tensor,
        rate: f64,
    ) -> Result<(), EngineError> {
        let decayed = gradient + &*parameter * self.weight_decay;
        let momentum = &self.state[0][at] * MOMENTUM + decayed;
        let moved = &*parameter - &momentum * rate;
        parameter.f_copy_(&moved)?;
        self.state[0][at] = momentum;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::nn::{self, OptimizerConfig};
    use tch::{Device, Kind};

    use super::*;
    use crate::testing::noise_tensor;

    /// Compares twenty steps on a bowl with libtorch's own optimizer.
    fn compare(kind: OptimizerKind, weight_decay: f64, rate: f64) {
        let start = noise_tensor(&[3, 4], 1).to_kind(Kind::Float);
        let slopes = noise_tensor(&[3, 4], 2).to_kind(Kind::Float);
        let store = nn::VarStore::new(Device::Cpu);
        let theirs = store.root().var_copy("x", &start);
        let mut reference = match kind {
            OptimizerKind::AdamW => nn::AdamW {
                wd: weight_decay,
                ..nn::AdamW::default()
            }
            .build(&store, rate),
            OptimizerKind::Sgd => nn::Sgd {
                momentum: MOMENTUM,
                wd: weight_decay,
                ..nn::Sgd::default()
            }
            .build(&store, rate),
        }
        .unwrap();
        let mut ours = vec![start.copy()];
        let mut optimizer = Optimizer::new(kind, weight_decay, &ours);
        for step in 0..20 {
            let rate = rate / f64::from(1 + step);
            let loss = (theirs.square() / 2.0 + &theirs * &slopes).sum(Kind::Float);
            reference.set_lr(rate);
            reference.backward_step(&loss);
            let gradient = &ours[0] + &slopes;
            optimizer.step(&mut ours, &[gradient], &[rate]).unwrap();
        }
        let off = f64::try_from((&ours[0] - &theirs).abs().max()).unwrap();
        assert!(off < 1e-6, "{kind:?}: {off}");
        let moved = f64::try_from((&ours[0] - &start).abs().max()).unwrap();
        assert!(moved > 0.01);
    }

    #[test]
    fn they_do_what_libtorchs_do() {
        compare(OptimizerKind::AdamW, 0.1, 0.05);
        compare(OptimizerKind::Sgd, 0.1, 0.05);
    }
}

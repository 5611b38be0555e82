//! A block's weights, with everything that can be folded into them.
//!
//! Let x̂ be the normed tokens before LayerNorm's own γ and β. Then W (γ∘x̂ + β) + b = (W γ) x̂ +
//! (W β + b). The attention's 1/√(d/h) goes into the queries' rows, and LayerScale into proj's and
//! fc2's. A softmax sums to one, so the values' bias passes through attention unchanged and joins
//! proj's. A softmax does not change if all scores of a row move together, so the keys' bias drops
//! out. Weights are folded in f64, then rounded once.

use tch::{Kind, Tensor};

use crate::vit::kernels::{Element, Real};
use crate::vit::weights::{Block, LayerNorm, Linear};

#[derive(Clone)]
pub struct FoldedBlock<E: Element> {
    /// Queries, keys and values, [3d, d].
    pub qkv: Matrix,
    pub query_bias: Vec<E::Real>,
    /// The projection after attention, [d, d].
    pub proj: Matrix,
    pub proj_bias: Vec<E::Real>,
    /// The MLP's first layer, [w, d].
    pub fc1: Matrix,
    pub fc1_bias: Vec<E::Real>,
    /// The MLP's second layer, [d, w].
    pub fc2: Matrix,
    pub fc2_bias: Vec<E::Real>,
}

/// A weight that clones share.
pub struct Matrix(pub Tensor);

impl Clone for Matrix {
    fn clone(&self) -> Self {
        Self(self.0.shallow_clone())
    }
}

impl<E: Element> FoldedBlock<E> {
    pub fn new(block: &Block) -> Self {
        let (mut qkv, mut bias) = after_norm(&block.qkv, &block.norm1);
        let d = block.norm1.weight.size()[0];
        let by_root = ((block.num_heads as f64) / d as f64).sqrt();
        let _ = qkv.narrow(0, 0, d).g_mul_scalar_(by_root);
        let _ = bias.narrow(0, 0, d).g_mul_scalar_(by_root);
        let of_values = bias.narrow(0, 2 * d, d);
        let proj_bias = double(&block.proj.weight).mv(&of_values) + double(&block.proj.bias);
        let (proj, proj_bias) = scaled(&double(&block.proj.weight), &proj_bias, &block.ls1);
        let (fc1, fc1_bias) = after_norm(&block.fc1, &block.norm2);
        let fc2 = (double(&block.fc2.weight), double(&block.fc2.bias));
        let (fc2, fc2_bias) = scaled(&fc2.0, &fc2.1, &block.ls2);
        let stored = |weight: Tensor| Matrix(weight.to_kind(E::KIND).contiguous());
        qkv = qkv.contiguous();
        bias = bias.narrow(0, 0, d);
        Self {
            qkv: stored(qkv),
            query_bias: values(&bias),
            proj: stored(proj),
            proj_bias: values(&proj_bias),
            fc1: stored(fc1),
            fc1_bias: values(&fc1_bias),
            fc2: stored(fc2),
            fc2_bias: values(&fc2_bias),
        }
    }
}

fn double(tensor: &Tensor) -> Tensor {
    tensor.to_kind(Kind::Double)
}

/// Turns a map of a LayerNorm's output into one of its normed tokens before the affine part.
fn after_norm(linear: &Linear, norm: &LayerNorm) -> (Tensor, Tensor) {
    let weight = double(&linear.weight);
    let bias = double(&linear.bias) + weight.mv(&double(&norm.bias));
    (weight * double(&norm.weight), bias)
}

/// Scales a map's outputs by LayerScale.
fn scaled(weight: &Tensor, bias: &Tensor, gamma: &Option<Tensor>) -> (Tensor, Tensor) {
    match gamma {
        None => (weight.shallow_clone(), bias.shallow_clone()),
        Some(gamma) => {
            let gamma = double(gamma);
            (weight * gamma.unsqueeze(1), bias * gamma)
        }
    }
}

fn values<R: Real>(tensor: &Tensor) -> Vec<R> {
    let values: Vec<f64> = Vec::try_from(double(tensor)).expect("a vector on the CPU");
    values.into_iter().map(R::of).collect()
}

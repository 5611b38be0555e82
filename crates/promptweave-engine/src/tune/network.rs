//! The whole network with everything that tuning methods add, for automatic differentiation: any of
//! its tensors can be trained.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use crate::vit::Weights;

/// The layers of a small network beside the backbone, on the normalised images: convolutions with
/// ReLU and stride 2, then the mean over all places. Each has its channels and the width of its
/// (square) kernels.
pub const SIDE_LAYERS: [(i64, i64); 3] = [(32, 5), (64, 3), (128, 3)];

/// Tensors by name: those of the backbone as timm names them, and those that are added.
pub struct Network {
    pub weights: Weights,
    /// | name | shape |
    /// |---|---|
    /// | `prompt_embeddings` | `[m, d]` |
    /// | `deep_prompt_embeddings` | `[L-1, m, d]` |
    /// | `adapters.{l}.down.weight`, `.down.bias`, `.up.weight`, `.up.bias` | `[d/r, d]`, `[d/r]`, `[d, d/r]`, `[d]` |
    /// | `side.conv.{i}.weight`, `.bias`, `side.project.weight`, `side.mix` | `[o, i, k, k]`, `[o]`, `[d, o]`, [] |
    pub added: HashMap<String, Tensor>,
}

impl Network {
    /// The network with these tensors in place of those with the same names. The others are shared.
    pub fn with<'a>(&self, tensors: impl Iterator<Item = (&'a str, Tensor)>) -> Self {
        let mut network = Self {
            weights: self.weights.clone(),
            added: HashMap::new(),
        };
        let mut given: HashMap<&str, Tensor> = tensors.collect();
        network.weights.each(&mut |name, tensor| {
            if let Some(other) = given.remove(name) {
                *tensor = other;
            }
        });
        let added = given.into_iter();
        network.added = added
            .map(|(name, tensor)| (name.to_owned(), tensor))
            .collect();
        network
    }

    /// f [B, d] of normalised images [B, 3, s, s]. `prompts` are the added prompts as they enter,
    /// after dropout.
    pub fn features(&self, images: &Tensor) -> Tensor {
        let tokens = self.weights.embedding.tokens(images);
        let (batch, num_tokens, _) = tokens.size3().expect("three axes");
        let rest = |from: i64, x: &Tensor| x.narrow(1, from, x.size()[1] - from);
        let insert = |x: &Tensor, from: i64, prompt: &Tensor| {
            let prompt = prompt.expand([batch, -1, -1], false);
            Tensor::cat(&[&x.narrow(1, 0, 1), &prompt, &rest(from, x)], 1)
        };
        let mut x = match self.added.get("prompt_embeddings") {
            Some(prompt) => insert(&tokens, 1, prompt),
            None => tokens,
        };
        let behind_prompt = x.size()[1] - num_tokens + 1;
        let deep = self.added.get("deep_prompt_embeddings");
        for (l, block) in self.weights.blocks.iter().enumerate() {
            if let Some(deep) = deep.filter(|_| l > 0) {
                // The previous block's output at the prompt's places is dropped.
                x = insert(&x, behind_prompt, &deep.get(l as i64 - 1));
            }
            x = block.forward_through(&x, |hidden| self.adapted(l, hidden));
        }
        let f = self.weights.norm.forward(&x).select(1, 0);
        match self.added.get("side.mix") {
            Some(mix) => {
                let share = mix.sigmoid();
                f * &share + self.beside(images) * (share.ones_like() - &share)
            }
            None => f,
        }
    }

    /// Applies the adapter after block `l`'s MLP, if there is one.
    fn adapted(&self, l: usize, x: Tensor) -> Tensor {
        let part = |name: &str| self.added.get(&format!("adapters.{l}.{name}"));
        let (Some(down), Some(up)) = (part("down.weight"), part("up.weight")) else {
            return x;
        };
        let inner = x.linear(down, part("down.bias")).gelu("none");
        x + inner.linear(up, part("up.bias"))
    }

    /// The side network's output W g(x), [B, d].
    fn beside(&self, images: &Tensor) -> Tensor {
        let part = |name: &str| &self.added[&format!("side.{name}")];
        let mut x = images.shallow_clone();
        for (i, (_, kernel)) in SIDE_LAYERS.iter().enumerate() {
            let weight = part(&format!("conv.{i}.weight"));
            let bias = part(&format!("conv.{i}.bias"));
            let (stride, padding) = ([2, 2], [kernel / 2, kernel / 2]);
            x = x
                .conv2d(weight, Some(bias), stride, padding, [1, 1], 1)
                .relu();
        }
        let pooled = x.mean_dim([2i64, 3].as_slice(), false, None::<Kind>);
        pooled.linear(part("project.weight"), None::<Tensor>)
    }
}

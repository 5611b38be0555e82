//! The definition, as it is written: every prompt with every image, whole blocks, automatic
//! differentiation. The faster paths are measured against it, and `--reference-path` composes with
//! it.

use std::ops::Range;

use tch::Tensor;

use crate::error::EngineError;
use crate::vit::weights::{Block, Weights};
use crate::vit::{FeatureGradient, Pass};

impl Weights {
    /// The features f [B, d] from the tokens of images [B, t, d] and a prompt, one copy for each
    /// sample [B, m, d].
    ///
    /// Token sequence (VPT-shallow): `[cls + pos₀ ; P ; patch₁ + pos₁ … patch_g² + pos_g²]`.
    /// Prompts come after CLS and before the patches, and get no position embedding. The feature
    /// f_P(x) is the CLS token after the final LayerNorm.
    pub fn features(&self, images: &Tensor, prompt: &Tensor) -> Tensor {
        let patches = images.narrow(1, 1, images.size()[1] - 1);
        let mut tokens = Tensor::cat(&[&images.narrow(1, 0, 1), prompt, &patches], 1);
        for block in &self.blocks {
            tokens = block.forward(&tokens);
        }
        self.norm.forward(&tokens).select(1, 0)
    }
}

impl Block {
    /// Pre-norm block, [B, n, d] → [B, n, d]: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.forward_through(x, |hidden| hidden)
    }

    /// The same block, with `between` applied between the MLP and its residual.
    pub fn forward_through(&self, x: &Tensor, between: impl FnOnce(Tensor) -> Tensor) -> Tensor {
        let (batch, n, d) = x.size3().expect("three axes");
        let qkv = self.qkv.forward(&self.norm1.forward(x));
        let qkv = qkv
            .view([batch, n, 3, self.num_heads, d / self.num_heads])
            .permute([2, 0, 3, 1, 4]);
        let (q, k, v) = (qkv.get(0), qkv.get(1), qkv.get(2));
        let attended = attention(&q, &k, &v).transpose(1, 2).reshape([batch, n, d]);
        let x = x + scaled(self.proj.forward(&attended), self.ls1.as_ref());
        let hidden = self.fc1.forward(&self.norm2.forward(&x)).gelu("none");
        &x + between(scaled(self.fc2.forward(&hidden), self.ls2.as_ref()))
    }
}

/// softmax(q kᵀ/√(d/h)) v, [B, h, n, d/h].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, None::<Tensor>, 0.0, false, None, false)
}

/// Applies LayerScale, if the model has it.
pub fn scaled(x: Tensor, gamma: Option<&Tensor>) -> Tensor {
    match gamma {
        Some(gamma) => x * gamma,
        None => x,
    }
}

/// [`Weights::features`] as a pass.
pub struct Plain {
    weights: Weights,
    prompts: Vec<Tensor>,
    /// The images' tokens, [B, t, d].
    images: Tensor,
}

impl Plain {
    pub fn new(weights: Weights) -> Self {
        Self {
            weights,
            prompts: Vec::new(),
            images: Tensor::new(),
        }
    }

    fn copies(&self, prompt: usize) -> Tensor {
        let batch = self.images.size()[0];
        self.prompts[prompt].expand([batch, -1, -1], false)
    }
}

impl Pass for Plain {
    fn take_prompts(&mut self, prompts: &[Tensor]) {
        self.prompts = prompts.iter().map(Tensor::shallow_clone).collect();
    }

    fn take_images(&mut self, images: &Tensor) {
        self.images = tch::no_grad(|| self.weights.embedding.tokens(images));
    }

    fn features(&mut self, prompts: Range<usize>) -> Tensor {
        let of = |i| tch::no_grad(|| self.weights.features(&self.images, &self.copies(i)));
        Tensor::stack(&prompts.map(of).collect::<Vec<_>>(), 0)
    }

    fn gradients(
        &mut self,
        prompts: Range<usize>,
        slope: &mut FeatureGradient<'_>,
    ) -> Result<Tensor, EngineError> {
        let gradients = prompts.map(|i| {
            let leaf = self.copies(i).contiguous().set_requires_grad(true);
            let features = self.weights.features(&self.images, &leaf);
            let by_features = slope(i, &features.detach())?;
            Ok(back(&features, &by_features, &leaf))
        });
        let gradients: Vec<Tensor> = gradients.collect::<Result<_, EngineError>>()?;
        Ok(Tensor::stack(&gradients, 0))
    }
}

/// The derivative by `leaf` of ⟨features, by_features⟩.
pub fn back(features: &Tensor, by_features: &Tensor, leaf: &Tensor) -> Tensor {
    let inner = (features * by_features).sum(features.kind());
    Tensor::run_backward(&[inner], &[leaf], false, false).swap_remove(0)
}

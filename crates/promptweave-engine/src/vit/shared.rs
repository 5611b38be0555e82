//! The fast path on a GPU. What prompts have in common is computed once, and prompts × images go
//! through the blocks on one batch axis.
//!
//! norm1 and q, k, v of the first block are computed once for each image (CLS and patches), and
//! once for each prompt (its tokens). The last block computes keys and values of all tokens, and
//! the rest for CLS alone. Nothing below the prompt's own tokens is differentiated. Matrix products
//! run in the kind of the weights (bfloat16 too), the residual stream, norms and sums in f32 (f64
//! with f64 weights).

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::error::EngineError;
use crate::vit::plain::{attention, back, scaled};
use crate::vit::weights::{Block, Embedding, LayerNorm, Weights};
use crate::vit::{FeatureGradient, Pass};

pub struct Shared {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
    /// The kind of the matrix products.
    kind: Kind,
    prompts: Vec<Tensor>,
    /// Tokens [B, t, d], and their q, k, v in the first block [B, t, 3d].
    images: Tensor,
    images_qkv: Tensor,
}

impl Shared {
    /// A pass with `weights` in f32 or f64, and products in `kind`.
    pub fn new(weights: Weights, kind: Kind) -> Self {
        let Weights {
            embedding,
            mut blocks,
            norm,
        } = weights;
        for block in &mut blocks {
            let Block {
                qkv,
                proj,
                fc1,
                fc2,
                ..
            } = block;
            for linear in [qkv, proj, fc1, fc2] {
                *linear = linear.to_kind(kind);
            }
        }
        Self {
            embedding,
            blocks,
            norm,
            kind,
            prompts: Vec::new(),
            images: Tensor::new(),
            images_qkv: Tensor::new(),
        }
    }

    /// f [G · B, d] of G prompts, from one copy for each sample: [G · B, m, d].
    fn forward(&self, leaf: &Tensor) -> Tensor {
        let groups = leaf.size()[0] / self.images.size()[0].max(1);
        let again = |x: &Tensor| x.repeat([groups, 1, 1]);
        let (first, last) = (&self.blocks[0], self.blocks.len() - 1);
        let mut x = Tensor::cat(&[&again(&self.images), leaf], 1);
        let qkv = self.qkv(first, leaf);
        let mut qkv = Tensor::cat(&[&again(&self.images_qkv), &qkv], 1).chunk(3, -1);
        for (i, block) in self.blocks.iter().enumerate() {
            if i > 0 && i < last {
                qkv = self.qkv(block, &x).chunk(3, -1);
            }
            if i > 0 && i == last {
                // Keys and values of all tokens. Nothing else of tokens other than CLS is read
                // later.
                let d = x.size()[2];
                let normed = block.norm1.forward(&x).to_kind(self.kind);
                let q = block.qkv.rows(0, d).forward(&normed.narrow(1, 0, 1));
                let kv = block.qkv.rows(d, 2 * d).forward(&normed);
                qkv = vec![q, kv.narrow(2, 0, d), kv.narrow(2, d, d)];
            }
            if i == last {
                qkv[0] = qkv[0].narrow(1, 0, 1);
                x = x.narrow(1, 0, 1);
            }
            x = self.rest(block, &x, &qkv);
        }
        self.norm.forward(&x).squeeze_dim(1)
    }

    fn qkv(&self, block: &Block, x: &Tensor) -> Tensor {
        block
            .qkv
            .forward(&block.norm1.forward(x).to_kind(self.kind))
    }

    /// The rest of a block after its q, k and v.
    fn rest(&self, block: &Block, x: &Tensor, qkv: &[Tensor]) -> Tensor {
        let heads = |t: &Tensor| {
            let (batch, n, d) = t.size3().expect("three axes");
            t.reshape([batch, n, block.num_heads, d / block.num_heads])
                .transpose(1, 2)
        };
        let attended = attention(&heads(&qkv[0]), &heads(&qkv[1]), &heads(&qkv[2]));
        let attended = attended.transpose(1, 2).reshape(x.size());
        let real = x.kind();
        let added = |y: Tensor, gamma: &Option<Tensor>| scaled(y.to_kind(real), gamma.as_ref());
        let x = x + added(block.proj.forward(&attended), &block.ls1);
        let normed = block.norm2.forward(&x).to_kind(self.kind);
        let hidden = block.fc1.forward(&normed).gelu("none");
        &x + added(block.fc2.forward(&hidden), &block.ls2)
    }

    /// Copies of some prompts, one for each sample: [G · B, m, d].
    fn copies(&self, prompts: Range<usize>) -> Tensor {
        let batch = self.images.size()[0];
        let copies: Vec<Tensor> = self.prompts[prompts]
            .iter()
            .map(|prompt| prompt.expand([batch, -1, -1], false))
            .collect();
        Tensor::cat(&copies, 0)
    }

    fn by_prompt(&self, rows: &Tensor) -> Tensor {
        let mut shape = rows.size();
        shape[0] = self.images.size()[0];
        shape.insert(0, -1);
        rows.view(shape.as_slice())
    }
}

impl Pass for Shared {
    fn take_prompts(&mut self, prompts: &[Tensor]) {
        self.prompts = prompts.iter().map(Tensor::shallow_clone).collect();
    }

    fn take_images(&mut self, images: &Tensor) {
        let _no_grad = tch::no_grad_guard();
        self.images = self.embedding.tokens(images);
        self.images_qkv = self.qkv(&self.blocks[0], &self.images);
    }

    fn features(&mut self, prompts: Range<usize>) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let features = self.forward(&self.copies(prompts));
        self.by_prompt(&features)
    }

    fn gradients(
        &mut self,
        prompts: Range<usize>,
        slope: &mut FeatureGradient<'_>,
    ) -> Result<Tensor, EngineError> {
        let leaf = self.copies(prompts.clone()).set_requires_grad(true);
        let features = self.forward(&leaf);
        let of_prompts = self.by_prompt(&features.detach());
        let slopes = prompts
            .enumerate()
            .map(|(row, i)| slope(i, &of_prompts.get(row as i64)))
            .collect::<Result<Vec<Tensor>, EngineError>>()?;
        let gradients = back(&features, &Tensor::cat(&slopes, 0), &leaf);
        Ok(self.by_prompt(&gradients))
    }
}

//! The fast path on a CPU: a ViT's forward pass with a prompt, and the way back to it, on one thread.
//!
//! ```text
//! tokens of images, of a prompt ─► Start: norm1, q k v of the first block (once an image, once a prompt)
//! both ─► [attention ─► proj ─► norm2 ─► fc1 ─► GELU ─► fc2 ─► norm1 ─► q k v] × L ─► norm ─► f   (last block: CLS alone)
//! ∂ℓ/∂f ─► the same backwards, by products with the weights alone ─► ∂ℓ/∂P of every image  (first block: prompt rows)
//! ```
//!
//! It leaves out only what no result depends on. What [`crate::vit::fold_weights`] puts into the
//! weights is not computed for each token. The rest is matrix products, and the passes of
//! [`crate::vit::kernels`] between them, over buffers that are allocated once. The derivative of these
//! few functions is written by hand. It keeps about half of the values that automatic differentiation
//! would. The results must equal those of [`crate::vit::plain`].

use std::ops::Range;

use tch::Tensor;

use crate::error::EngineError;
use crate::vit::attention::Heads;
use crate::vit::buffers::{Buffer, Shape, Widths, Workspace};
use crate::vit::flops;
use crate::vit::flops::Part;
use crate::vit::fold_weights::FoldedBlock;
use crate::vit::kernels;
use crate::vit::kernels::Element;
use crate::vit::weights::{Embedding, LayerNorm, Weights};
use crate::vit::{FeatureGradient, Pass};

pub struct Fused<E: Element> {
    embedding: Embedding,
    blocks: Vec<FoldedBlock<E>>,
    norm: LayerNorm,
    widths: Widths,
    prompts: Vec<Start<E>>,
    images: Option<(usize, Start<E>)>,
    space: Option<Workspace<E>>,
}

/// Token rows prepared for the first block.
struct Start<E: Element> {
    /// The tokens, [r, d].
    tokens: Buffer<E::Real>,
    normed: Buffer<E>,
    inverse: Vec<E::Real>,
    /// Their queries, keys and values, [r, 3d].
    qkv: Buffer<E>,
}

impl<E: Element> Start<E> {
    fn num_rows(&self) -> usize {
        self.inverse.len()
    }
}

impl<E: Element> Fused<E> {
    /// The pass of a model with at least two blocks.
    pub fn new(weights: &Weights) -> Self {
        let first = &weights.blocks[0];
        Self {
            widths: Widths {
                depth: weights.blocks.len(),
                d: weights.norm.weight.size()[0] as usize,
                hidden: first.fc1.bias.size()[0] as usize,
                num_heads: first.num_heads as usize,
            },
            embedding: weights.embedding.clone(),
            blocks: weights.blocks.iter().map(FoldedBlock::new).collect(),
            norm: weights.norm.clone(),
            prompts: Vec::new(),
            images: None,
            space: None,
        }
    }

    /// The pass of another stream: the same weights, with its own buffers.
    pub fn another(&self) -> Self {
        Self {
            embedding: self.embedding.clone(),
            blocks: self.blocks.clone(),
            norm: self.norm.clone(),
            widths: self.widths,
            prompts: Vec::new(),
            images: None,
            space: None,
        }
    }

    /// Computes norm1, queries, keys and values of the first block for token rows [r, d].
    fn start(&self, tokens: &Tensor) -> Start<E> {
        let (d, first) = (self.widths.d, &self.blocks[0]);
        let mut tokens = Buffer::copy_of(tokens);
        let rows = tokens.num_rows();
        let mut start = Start {
            normed: Buffer::new(rows, d),
            inverse: vec![E::Real::default(); rows],
            qkv: Buffer::new(rows, 3 * d),
            tokens: Buffer::new(0, d),
        };
        kernels::add_and_normalise(
            tokens.values_mut(rows),
            None,
            start.normed.values_mut(rows),
            &mut start.inverse,
            self.norm.eps,
        );
        product(&start.normed.tensor, &first.qkv.0.tr(), &start.qkv.tensor);
        kernels::add_to_rows(start.qkv.values_mut(rows), 3 * d, &first.query_bias);
        Start { tokens, ..start }
    }

    fn heads(&self, shape: Shape, queries: usize) -> Heads {
        Heads {
            shape,
            queries,
            num_heads: self.widths.num_heads,
            d: self.widths.d,
        }
    }

    /// Runs `work` on the buffers for the current images with this prompt.
    fn with_space<T>(
        &mut self,
        prompt: usize,
        backward: bool,
        work: impl FnOnce(&Self, &Start<E>, &Start<E>, &mut Workspace<E>) -> T,
    ) -> T {
        let (count, images) = self.images.take().expect("images were taken up");
        let shape = Shape {
            images: count,
            t: images.num_rows() / count,
            m: self.prompts[prompt].num_rows(),
        };
        let space = self.space.take().filter(|space| space.shape == shape);
        let mut space = space.unwrap_or_else(|| Workspace::new(self.widths, shape));
        if backward {
            space = space.and_back(self.widths);
        }
        let done = work(self, &images, &self.prompts[prompt], &mut space);
        self.images = Some((count, images));
        self.space = Some(space);
        done
    }

    /// The features f, [B, d].
    fn forward(&self, images: &Start<E>, prompt: &Start<E>, space: &mut Workspace<E>) -> Tensor {
        let (shape, widths, eps) = (space.shape, self.widths, self.norm.eps);
        let (rows, last) = (shape.rows(), widths.depth - 1);
        take_up(images, prompt, widths.d, space);
        for (i, block) in self.blocks.iter().enumerate() {
            let (queries, count) = match i == last {
                true => (1, shape.images),
                false => (shape.n(), rows),
            };
            let at = i.min(space.kept.len() - 1);
            let Workspace {
                kept,
                x,
                x_cls,
                y,
                wide,
                normed,
                ..
            } = &mut *space;
            let kept = &mut kept[at];
            if i > 0 {
                kernels::add_and_normalise(
                    x.values_mut(rows),
                    Some((y.values(rows), &self.blocks[i - 1].fc2_bias)),
                    kept.normed1.values_mut(rows),
                    &mut kept.inverse1,
                    eps,
                );
                let (normed, qkv) = (&kept.normed1.tensor, &kept.qkv.tensor);
                if i < last {
                    product(normed, &block.qkv.0.tr(), qkv);
                    kernels::add_to_rows(
                        kept.qkv.values_mut(rows),
                        3 * widths.d,
                        &block.query_bias,
                    );
                } else {
                    // Only keys and values of all tokens and the query of CLS are read later.
                    let d = widths.d as i64;
                    let (query, rest) =
                        (block.qkv.0.narrow(0, 0, d), block.qkv.0.narrow(0, d, 2 * d));
                    product(normed, &rest.tr(), &qkv.narrow(1, d, 2 * d));
                    product(
                        &cls(normed, shape),
                        &query.tr(),
                        &cls(qkv, shape).narrow(1, 0, d),
                    );
                    let stride = shape.n() * 3 * widths.d;
                    kernels::add_to_rows(kept.qkv.values_mut(rows), stride, &block.query_bias);
                }
            }
            let heads = self.heads(shape, queries);
            flops::timed(Part::Attention, 2 * heads.operations(shape.n()), || {
                heads.attend(kept, &normed.rows(count));
            });
            product(&normed.rows(count), &block.proj.0.tr(), &y.rows(count));
            let x = match i == last {
                true => {
                    x_cls.tensor.copy_(&cls(&x.tensor, shape));
                    x_cls
                }
                false => x,
            };
            kernels::add_and_normalise(
                x.values_mut(count),
                Some((y.values(count), &block.proj_bias)),
                kept.normed2.values_mut(count),
                &mut kept.inverse2[..count],
                eps,
            );
            let hidden = kept.slope.rows(count);
            product(&kept.normed2.rows(count), &block.fc1.0.tr(), &hidden);
            kernels::gelu_with_slope(
                kept.slope.values_mut(count),
                &block.fc1_bias,
                wide.values_mut(count),
            );
            product(&wide.rows(count), &block.fc2.0.tr(), &y.rows(count));
        }
        let count = shape.images;
        kernels::add_and_normalise(
            space.x_cls.values_mut(count),
            Some((space.y.values(count), &self.blocks[last].fc2_bias)),
            space.normed.values_mut(count),
            &mut space.inverse[..count],
            eps,
        );
        space.normed.rows(count).to_kind(E::Real::KIND) * &self.norm.weight + &self.norm.bias
    }

    /// ∂ℓ/∂P [B, m, d] after [`Self::forward`], from ∂ℓ/∂f [B, d].
    fn backward(
        &self,
        by_features: &Tensor,
        prompt: &Start<E>,
        space: &mut Workspace<E>,
    ) -> Tensor {
        let (shape, widths) = (space.shape, self.widths);
        let (last, count) = (widths.depth - 1, shape.images);
        let by_normed = by_features.to_kind(E::Real::KIND) * &self.norm.weight;
        space.y.rows(count).copy_(&by_normed);
        space.x_cls.values_mut(count).fill(E::Real::default());
        // `normed` and `inverse` still belong to the last norm.
        let normed = Buffer::<E>::copy_of(&space.normed.rows(count));
        kernels::add_normalise_backward(
            space.x_cls.values_mut(count),
            space.y.values(count),
            normed.values(count),
            &space.inverse[..count],
            space.normed.values_mut(count),
        );

        self.mlp_backward(last, count, space);
        self.attention_backward(last, 1, space);
        let (d, block) = (widths.d as i64, &self.blocks[last]);
        let (query, rest) = (block.qkv.0.narrow(0, 0, d), block.qkv.0.narrow(0, d, 2 * d));
        product(
            &space.by_qkv.tensor.narrow(1, d, 2 * d),
            &rest,
            &space.y.tensor,
        );
        let by_query = cls(&space.by_qkv.tensor, shape).narrow(1, 0, d);
        let _ = cls(&space.y.tensor, shape).addmm_(&by_query, &query);
        let _ = space.x.tensor.zero_();
        cls(&space.x.tensor, shape).copy_(&space.x_cls.tensor);
        self.norm1_backward(last, space);

        for i in (0..last).rev() {
            self.mlp_backward(i, shape.rows(), space);
            self.attention_backward(i, shape.n(), space);
            if i > 0 {
                product(&space.by_qkv.tensor, &self.blocks[i].qkv.0, &space.y.tensor);
                self.norm1_backward(i, space);
            }
        }
        self.to_prompt(prompt, space)
    }

    /// Goes back through a block's MLP. Before, `x` (`x_cls` in the last block) has the derivative
    /// by the block's output, and `normed` has it rounded for products. After, they have the
    /// derivative by the output of its attention.
    fn mlp_backward(&self, i: usize, rows: usize, space: &mut Workspace<E>) {
        let block = &self.blocks[i];
        let Workspace {
            kept,
            x,
            x_cls,
            y,
            wide,
            normed,
            ..
        } = space;
        let x = if i + 1 == self.blocks.len() { x_cls } else { x };
        product(&normed.rows(rows), &block.fc2.0, &wide.rows(rows));
        kernels::multiply(wide.values_mut(rows), kept[i].slope.values(rows));
        product(&wide.rows(rows), &block.fc1.0, &y.rows(rows));
        kernels::add_normalise_backward(
            x.values_mut(rows),
            y.values(rows),
            kept[i].normed2.values(rows),
            &kept[i].inverse2[..rows],
            normed.values_mut(rows),
        );
    }

    /// Goes back through a block's attention, to `by_qkv`; in the first block for the prompt's rows
    /// alone.
    fn attention_backward(&self, i: usize, queries: usize, space: &mut Workspace<E>) {
        let shape = space.shape;
        let count = shape.images * queries;
        let Workspace {
            kept,
            y,
            normed,
            by_weights,
            by_qkv,
            ..
        } = space;
        product(&normed.rows(count), &self.blocks[i].proj.0, &y.rows(count));
        let heads = self.heads(shape, queries);
        // ∂ℓ/∂weights of all tokens. In the first block, of queries, keys and values only the
        // prompt's.
        let tokens = shape.n() + 3 * if i == 0 { shape.m } else { shape.n() };
        flops::timed(Part::Attention, heads.operations(tokens), || {
            heads.backward(&y.rows(count), &kept[i], by_weights, &by_qkv.tensor, i == 0);
        });
    }

    /// Goes back through a block's norm1. `y` has the derivative by its output.
    fn norm1_backward(&self, i: usize, space: &mut Workspace<E>) {
        let rows = space.shape.rows();
        let Workspace {
            kept, x, y, normed, ..
        } = space;
        kernels::add_normalise_backward(
            x.values_mut(rows),
            y.values(rows),
            kept[i].normed1.values(rows),
            &kept[i].inverse1,
            normed.values_mut(rows),
        );
    }

    /// Goes back through the first block's q, k, v and norm1, for the prompt's rows alone: [B, m,
    /// d].
    fn to_prompt(&self, prompt: &Start<E>, space: &Workspace<E>) -> Tensor {
        let Shape { images, t, m } = space.shape;
        let n = space.shape.n() as i64;
        let of_prompt = |matrix: &Tensor| {
            let width = matrix.size()[1];
            matrix
                .view([images as i64, n, width])
                .narrow(1, t as i64, m as i64)
                .reshape([(images * m) as i64, width])
        };
        let by_normed = Buffer::<E>::new(images * m, self.widths.d);
        product(
            &of_prompt(&space.by_qkv.tensor),
            &self.blocks[0].qkv.0,
            &by_normed.tensor,
        );
        let mut by_prompt = Buffer::<E::Real>::copy_of(&of_prompt(&space.x.tensor));
        let mut rounded = Buffer::<E>::new(m, self.widths.d);
        let of_image = m * self.widths.d;
        let by_images = by_prompt.values_mut(images * m).chunks_exact_mut(of_image);
        let by_normed = by_normed.values(images * m).chunks_exact(of_image);
        for (by_image, by_normed) in by_images.zip(by_normed) {
            kernels::add_normalise_backward(
                by_image,
                by_normed,
                prompt.normed.values(m),
                &prompt.inverse,
                rounded.values_mut(m),
            );
        }
        by_prompt.tensor.view([images as i64, m as i64, -1])
    }
}

impl<E: Element> Pass for Fused<E> {
    fn take_prompts(&mut self, prompts: &[Tensor]) {
        let _no_grad = tch::no_grad_guard();
        self.prompts = prompts.iter().map(|prompt| self.start(prompt)).collect();
    }

    fn take_images(&mut self, images: &Tensor) {
        let _no_grad = tch::no_grad_guard();
        let start = flops::timed(Part::Pass, 0, || {
            self.start(&self.embedding.tokens(images).flatten(0, 1))
        });
        self.images = Some((images.size()[0] as usize, start));
    }

    fn features(&mut self, prompts: Range<usize>) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let of = |i| {
            self.with_space(i, false, |pass, images, prompt, space| {
                flops::timed(Part::Pass, 0, || pass.forward(images, prompt, space))
            })
        };
        Tensor::stack(&prompts.map(of).collect::<Vec<_>>(), 0)
    }

    fn gradients(
        &mut self,
        prompts: Range<usize>,
        slope: &mut FeatureGradient<'_>,
    ) -> Result<Tensor, EngineError> {
        let _no_grad = tch::no_grad_guard();
        let of = |i| {
            self.with_space(i, true, |pass, images, prompt, space| {
                let features = flops::timed(Part::Pass, 0, || pass.forward(images, prompt, space));
                let by_features = tch::with_grad(|| slope(i, &features))?;
                Ok(flops::timed(Part::Pass, 0, || {
                    pass.backward(&by_features, prompt, space)
                }))
            })
        };
        let gradients = prompts.map(of).collect::<Result<Vec<_>, EngineError>>()?;
        Ok(Tensor::stack(&gradients, 0))
    }
}

/// Fills `x` and the first block's q, k, v with every image's rows, each followed by the prompt's.
fn take_up<E: Element>(images: &Start<E>, prompt: &Start<E>, d: usize, space: &mut Workspace<E>) {
    let Shape { t, m, .. } = space.shape;
    let rows = space.shape.rows();
    let (of_images, of_prompt) = (images.num_rows(), prompt.num_rows());
    interleave(
        (images.tokens.values(of_images), t * d),
        (prompt.tokens.values(of_prompt), m * d),
        space.x.values_mut(rows),
    );
    interleave(
        (images.qkv.values(of_images), 3 * t * d),
        (prompt.qkv.values(of_prompt), 3 * m * d),
        space.kept[0].qkv.values_mut(rows),
    );
}

/// Writes the chunks of `a`, each followed by `b`.
fn interleave<T: Copy>((a, of_a): (&[T], usize), (b, of_b): (&[T], usize), to: &mut [T]) {
    for (a, to) in a.chunks_exact(of_a).zip(to.chunks_exact_mut(of_a + of_b)) {
        to[..of_a].copy_from_slice(a);
        to[of_a..].copy_from_slice(b);
    }
}

/// The CLS rows [B, w] of a matrix [B · n, w], sharing memory.
fn cls(matrix: &Tensor, shape: Shape) -> Tensor {
    let width = matrix.size()[1];
    matrix
        .view([shape.images as i64, shape.n() as i64, width])
        .select(1, 0)
}

/// out = a · b, where one of them is a weight.
fn product(a: &Tensor, b: &Tensor, out: &Tensor) {
    let (rows, inner) = a.size2().expect("a matrix");
    let operations = 2 * rows * inner * b.size()[1];
    flops::timed(Part::Linear, operations as u64, || {
        let _ = a.mm_out(out, b);
    });
}

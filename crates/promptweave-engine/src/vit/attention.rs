//! Softmax attention over buffers, and the way back through it. Its two products for each head are
//! small. They go to the matrix library image by image, all heads at once, on views, so that
//! nothing is copied.

use tch::Tensor;

use crate::vit::buffers::{Buffer, Kept, Shape};
use crate::vit::kernels;
use crate::vit::kernels::Element;

/// The layout of the heads' rows.
#[derive(Clone, Copy)]
pub struct Heads {
    pub shape: Shape,
    /// Number of first tokens of every image that attend: all tokens, or CLS alone.
    pub queries: usize,
    pub num_heads: usize,
    pub d: usize,
}

impl Heads {
    /// Number of rows of attention weights.
    fn count(self) -> usize {
        self.shape.images * self.num_heads * self.queries
    }

    /// Floating-point operations of one product of every query with this number of tokens.
    pub fn operations(self, tokens: usize) -> u64 {
        (2 * self.shape.images * self.queries * tokens * self.d) as u64
    }

    /// Views attention weights as [B, heads, queries, n].
    fn of_weights(self, weights: &Tensor) -> Tensor {
        let (images, n) = (self.shape.images as i64, self.shape.n() as i64);
        weights.narrow(0, 0, self.count() as i64).view([
            images,
            self.num_heads as i64,
            self.queries as i64,
            n,
        ])
    }

    /// Views a matrix [B · queries, d] as [B, heads, queries, d/heads].
    fn of_rows(self, rows: &Tensor) -> Tensor {
        let heads = self.num_heads as i64;
        let shape = [
            self.shape.images as i64,
            self.queries as i64,
            heads,
            self.d as i64 / heads,
        ];
        rows.view(shape).transpose(1, 2)
    }

    /// Views queries, keys and values of image b, [heads, n, d/heads] each, in a matrix [B · n,
    /// 3d].
    fn of_qkv(self, qkv: &Tensor, b: i64) -> [Tensor; 3] {
        let (heads, n) = (self.num_heads as i64, self.shape.n() as i64);
        let of_image = qkv
            .narrow(0, b * n, n)
            .view([n, 3, heads, self.d as i64 / heads]);
        [0, 1, 2].map(|part| of_image.select(1, part).transpose(0, 1))
    }

    /// Computes `out` [B · queries, d] from `kept.qkv`, whose queries are scaled already. The
    /// weights are kept.
    pub fn attend<E: Element>(self, kept: &mut Kept<E>, out: &Tensor) {
        let (n, queries) = (self.shape.n(), self.queries as i64);
        let weights = self.of_weights(&kept.weights.tensor);
        for b in 0..self.shape.images as i64 {
            let [q, k, _] = self.of_qkv(&kept.qkv.tensor, b);
            product(
                &q.narrow(1, 0, queries),
                &k.transpose(1, 2),
                &weights.get(b),
            );
        }
        kernels::softmax(kept.weights.values_mut(self.count()), n);
        let out = self.of_rows(out);
        for b in 0..self.shape.images as i64 {
            let [_, _, v] = self.of_qkv(&kept.qkv.tensor, b);
            product(&weights.get(b), &v, &out.get(b));
        }
    }

    /// From ∂ℓ/∂out [B · queries, d] to `by_qkv` [B · n, 3d]: all rows of keys and values, and the
    /// attending rows of queries. With `prompt_only` it is the prompt's rows and no others.
    pub fn backward<E: Element>(
        self,
        by_out: &Tensor,
        kept: &Kept<E>,
        by_weights: &mut Buffer<E>,
        by_qkv: &Tensor,
        prompt_only: bool,
    ) {
        let (n, queries) = (self.shape.n(), self.queries as i64);
        let by_out = self.of_rows(by_out);
        let weights = self.of_weights(&kept.weights.tensor);
        let by_scores = self.of_weights(&by_weights.tensor);
        for b in 0..self.shape.images as i64 {
            let [_, _, v] = self.of_qkv(&kept.qkv.tensor, b);
            product(&by_out.get(b), &v.transpose(1, 2), &by_scores.get(b));
        }
        kernels::softmax_backward(
            by_weights.values_mut(self.count()),
            kept.weights.values(self.count()),
            n,
        );
        let (from, length) = match prompt_only {
            true => (self.shape.t as i64, self.shape.m as i64),
            false => (0, n as i64),
        };
        for b in 0..self.shape.images as i64 {
            let [q, k, _] = self.of_qkv(&kept.qkv.tensor, b);
            let [by_q, by_k, by_v] = self
                .of_qkv(by_qkv, b)
                .map(|part| part.narrow(1, from, length));
            let (weights, by_scores) = (weights.get(b), by_scores.get(b));
            let keys = |x: &Tensor| x.narrow(2, from, length).transpose(1, 2);
            product(&keys(&weights), &by_out.get(b), &by_v);
            product(&keys(&by_scores), &q.narrow(1, 0, queries), &by_k);
            let attending = length.min(queries);
            product(
                &by_scores.narrow(1, from, attending),
                &k,
                &by_q.narrow(1, 0, attending),
            );
        }
    }
}

/// out\[h] = a\[h] · b\[h].
fn product(a: &Tensor, b: &Tensor, out: &Tensor) {
    let _ = a.bmm_out(out, b);
}

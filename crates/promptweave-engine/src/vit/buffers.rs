//! Memory of the fast path on a CPU. It is allocated once for each stream, and read by both
//! libtorch and [`crate::vit::kernels`].

use std::marker::PhantomData;

use tch::{Device, Tensor};

use crate::vit::kernels::Element;

/// A matrix on the CPU with direct access to its entries.
pub struct Buffer<E: Element> {
    pub tensor: Tensor,
    width: usize,
    _of: PhantomData<E>,
}

impl<E: Element> Buffer<E> {
    /// A buffer whose entries are not initialised.
    pub fn new(rows: usize, width: usize) -> Self {
        let shape = [rows as i64, width as i64];
        Self {
            tensor: Tensor::empty(shape, (E::KIND, Device::Cpu)),
            width,
            _of: PhantomData,
        }
    }

    /// A copy of a matrix [rows, width].
    pub fn copy_of(matrix: &Tensor) -> Self {
        let (rows, width) = matrix.size2().expect("a matrix");
        let mut buffer = Self::new(rows as usize, width as usize);
        buffer.tensor.copy_(matrix);
        buffer
    }

    pub fn num_rows(&self) -> usize {
        self.tensor.size()[0] as usize
    }

    /// The first rows, sharing memory.
    pub fn rows(&self, count: usize) -> Tensor {
        self.tensor.narrow(0, 0, count as i64)
    }

    /// The entries of the first rows.
    #[expect(
        unsafe_code,
        reason = "contiguous, on the CPU and of this kind since `new`; so many rows are there"
    )]
    pub fn values(&self, rows: usize) -> &[E] {
        assert!(rows <= self.num_rows());
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast(), rows * self.width) }
    }

    #[expect(
        unsafe_code,
        reason = "as above; libtorch reads and writes nothing while a pass of ours runs"
    )]
    pub fn values_mut(&mut self, rows: usize) -> &mut [E] {
        assert!(rows <= self.num_rows());
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast(), rows * self.width) }
    }
}

/// The number of rows and their layout: B images of t tokens, each followed by the m tokens of a
/// prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub images: usize,
    pub t: usize,
    pub m: usize,
}

impl Shape {
    pub fn n(self) -> usize {
        self.t + self.m
    }

    pub fn rows(self) -> usize {
        self.images * self.n()
    }
}

/// The sizes of a model's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    pub depth: usize,
    pub d: usize,
    /// Width of the MLP's hidden layer.
    pub hidden: usize,
    pub num_heads: usize,
}

/// The values of a block's forward pass that the way back needs.
pub struct Kept<E: Element> {
    pub normed1: Buffer<E>,
    pub inverse1: Vec<E::Real>,
    pub qkv: Buffer<E>,
    /// Attention weights, [B · heads · queries, n].
    pub weights: Buffer<E>,
    pub normed2: Buffer<E>,
    pub inverse2: Vec<E::Real>,
    /// The input of GELU, and later its derivative there.
    pub slope: Buffer<E>,
}

/// A stream's buffers for one shape.
pub struct Workspace<E: Element> {
    pub shape: Shape,
    /// One for each block, or a single one for all if there is no way back.
    pub kept: Vec<Kept<E>>,
    /// The residual stream [B · n, d], and later the derivative by it.
    pub x: Buffer<E::Real>,
    /// The residual stream of CLS alone, [B, d], in the last block.
    pub x_cls: Buffer<E::Real>,
    /// Outputs of matrix products, and inputs of the passes between them.
    pub y: Buffer<E>,
    pub normed: Buffer<E>,
    pub inverse: Vec<E::Real>,
    pub wide: Buffer<E>,
    pub by_qkv: Buffer<E>,
    pub by_weights: Buffer<E>,
}

impl<E: Element> Kept<E> {
    fn new(widths: Widths, shape: Shape) -> Self {
        let Widths {
            d,
            hidden,
            num_heads,
            ..
        } = widths;
        let rows = shape.rows();
        let inverse = || vec![E::Real::default(); rows];
        Self {
            normed1: Buffer::new(rows, d),
            inverse1: inverse(),
            qkv: Buffer::new(rows, 3 * d),
            weights: Buffer::new(num_heads * rows, shape.n()),
            normed2: Buffer::new(rows, d),
            inverse2: inverse(),
            slope: Buffer::new(rows, hidden),
        }
    }
}

impl<E: Element> Workspace<E> {
    /// Buffers for the forward pass alone.
    pub fn new(widths: Widths, shape: Shape) -> Self {
        let (d, rows) = (widths.d, shape.rows());
        Self {
            shape,
            kept: vec![Kept::new(widths, shape)],
            x: Buffer::new(rows, d),
            x_cls: Buffer::new(shape.images, d),
            y: Buffer::new(rows, d),
            normed: Buffer::new(rows, d),
            inverse: vec![E::Real::default(); rows],
            wide: Buffer::new(rows, widths.hidden),
            by_qkv: Buffer::new(0, 3 * d),
            by_weights: Buffer::new(0, shape.n()),
        }
    }

    /// Adds the buffers for the way back.
    pub fn and_back(mut self, widths: Widths) -> Self {
        let (rows, n) = (self.shape.rows(), self.shape.n());
        while self.kept.len() < widths.depth {
            self.kept.push(Kept::new(widths, self.shape));
        }
        if self.by_qkv.num_rows() == 0 {
            self.by_qkv = Buffer::new(rows, 3 * widths.d);
            self.by_weights = Buffer::new(widths.num_heads * rows, n);
        }
        self
    }
}

/// Approximate bytes for each token in a [`Workspace`] with the way back.
pub fn bytes_a_token(widths: Widths, n: usize, element: usize) -> usize {
    let Widths {
        d,
        hidden,
        num_heads,
        depth,
    } = widths;
    let kept = 5 * d + hidden + num_heads * n;
    (kept * (depth + 1) + 3 * d) * element
}

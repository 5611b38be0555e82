//! A small dense tensor in plain memory, read from and written to safetensors.
//!
//! Prompt files and backbone digests are checked where no libtorch is linked, so the registry knows
//! no other tensor.

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, View};
use std::borrow::Cow;

/// Row-major values with their shape; `values.len()` is the product of `shape`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<T> {
    pub shape: Vec<usize>,
    pub values: Vec<T>,
}

impl<T> Tensor<T> {
    /// Makes a tensor of a shape and its values.
    ///
    /// # Panics
    /// If `values` does not have as many entries as `shape` says.
    pub fn new(shape: impl Into<Vec<usize>>, values: Vec<T>) -> Self {
        let shape = shape.into();
        assert_eq!(
            shape.iter().product::<usize>(),
            values.len(),
            "shape {shape:?}"
        );
        Self { shape, values }
    }
}

/// The values of a stored floating-point tensor as f32; `None` when it holds another dtype.
/// f16 and bf16 widen without loss.
pub fn read_f32(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let bytes = view.data();
    Some(match view.dtype() {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::F16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f16::from_le_bytes(*b).to_f32())
            .collect(),
        Dtype::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| bf16::from_le_bytes(*b).to_f32())
            .collect(),
        _ => return None,
    })
}

/// The values of a stored i64 tensor; `None` when it holds another dtype.
pub fn read_i64(view: &TensorView<'_>) -> Option<Vec<i64>> {
    (view.dtype() == Dtype::I64).then(|| {
        view.data()
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect()
    })
}

/// The values of a stored f64 tensor; `None` when it holds another dtype.
pub fn read_f64(view: &TensorView<'_>) -> Option<Vec<f64>> {
    (view.dtype() == Dtype::F64).then(|| {
        view.data()
            .as_chunks()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b))
            .collect()
    })
}

/// A number type that safetensors stores.
pub trait Element: Copy {
    const DTYPE: Dtype;
    fn bytes(values: &[Self]) -> Vec<u8>;
}

macro_rules! element {
    ($type:ty, $dtype:expr) => {
        impl Element for $type {
            const DTYPE: Dtype = $dtype;
            fn bytes(values: &[Self]) -> Vec<u8> {
                values.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
        }
    };
}
element!(f32, Dtype::F32);
element!(f64, Dtype::F64);
element!(i64, Dtype::I64);

/// A tensor ready to be written as safetensors. Tensors of several dtypes can go into one file.
pub struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl<T: Element> From<&Tensor<T>> for Stored {
    fn from(tensor: &Tensor<T>) -> Self {
        Self {
            dtype: T::DTYPE,
            shape: tensor.shape.clone(),
            bytes: T::bytes(&tensor.values),
        }
    }
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

//! The number type of matrix products.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The number type of the backbone's matrix products. In all cases statistics, heads and the solver
/// use f64, residual streams and sums at least f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32; on CUDA with TensorFloat-32.
    #[default]
    F32,
    /// bfloat16, with sums in f32: about twice as fast on processors that have it.
    Bf16,
    /// f64, for checking the others.
    F64,
}

#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a precision; use f32, bf16 or f64")]
pub struct UnknownPrecision(String);

impl Precision {
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F64];

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F64 => "f64",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = UnknownPrecision;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|precision| precision.name() == name)
            .ok_or_else(|| UnknownPrecision(name.to_owned()))
    }
}

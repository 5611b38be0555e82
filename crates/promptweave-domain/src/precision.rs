//! What matrix products are computed in.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Statistics, heads and the solver are in f64 whichever it is, residual streams and sums in f32 at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// On CUDA with TensorFloat-32.
    #[default]
    F32,
    /// Products of bfloat16 numbers, summed in f32: about twice as fast where the processor has it.
    Bf16,
    /// To check the others by.
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

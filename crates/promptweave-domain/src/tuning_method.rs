//! What is trained on a target: a prompt, or one of the alternatives that prompts are compared
//! with.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// The part of the model that is trained on a target. Every method also trains the linear head, and
/// everything not named stays frozen. As text: `vpt-shallow`, `partial-2`, `adapter-8`; without its
/// number a method has its usual one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum TuningMethod {
    /// A prompt [m, d] at the first block's input (Jia et al. 2022).
    #[default]
    VptShallow,
    /// A prompt [m, d] at the first block's input, and one for every later block, which replaces it
    /// there.
    VptDeep,
    /// Nothing but the head, on the backbone's own features.
    Linear,
    /// Nothing but a head with this number of hidden layers: linear, ReLU, batch normalisation,
    /// dropout 0.1.
    Mlp(usize),
    /// This number of last blocks, and the final normalisation.
    Partial(usize),
    /// All biases.
    Bias,
    /// A bottleneck of d/r channels, x + W_up GELU(W_down x), after every block's MLP and before
    /// its residual (Pfeiffer et al. 2021).
    Adapter(usize),
    /// σ(a) f + (1 - σ(a)) W g(x): a small network g beside the frozen backbone (Zhang et al. 2020).
    Sidetune,
    /// The whole backbone.
    Full,
}

impl TuningMethod {
    /// The methods that a job may use, since a job publishes a prompt.
    const PROMPTS: [Self; 2] = [Self::VptShallow, Self::VptDeep];

    /// Whether the method's result is a prompt file.
    pub fn makes_prompt(self) -> bool {
        Self::PROMPTS.contains(&self)
    }

    /// The usual learning rate with AdamW of everything that is trained beside the head. It is
    /// small if the backbone itself moves.
    pub fn usual_learning_rate(self) -> f64 {
        match self {
            Self::Partial(_) | Self::Full => 1e-4,
            _ => 2e-3,
        }
    }
}

impl fmt::Display for TuningMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VptShallow => f.write_str("vpt-shallow"),
            Self::VptDeep => f.write_str("vpt-deep"),
            Self::Linear => f.write_str("linear"),
            Self::Mlp(layers) => write!(f, "mlp-{layers}"),
            Self::Partial(blocks) => write!(f, "partial-{blocks}"),
            Self::Bias => f.write_str("bias"),
            Self::Adapter(reduction) => write!(f, "adapter-{reduction}"),
            Self::Sidetune => f.write_str("sidetune"),
            Self::Full => f.write_str("full"),
        }
    }
}

impl FromStr for TuningMethod {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, number) = match text.rsplit_once('-') {
            Some((name, number)) if number.starts_with(|c: char| c.is_ascii_digit()) => {
                let number = number
                    .parse()
                    .ok()
                    .filter(|number| (1..=1024).contains(number));
                (name, Some(number.ok_or("the number must lie in 1..=1024")?))
            }
            _ => (text, None),
        };
        let method = match name {
            "mlp" => Self::Mlp(number.unwrap_or(3)),
            "partial" => Self::Partial(number.unwrap_or(1)),
            "adapter" => Self::Adapter(number.unwrap_or(8)),
            _ if number.is_some() => return Err(format!("`{name}` has no number")),
            "vpt-shallow" => Self::VptShallow,
            "vpt-deep" => Self::VptDeep,
            "linear" => Self::Linear,
            "bias" => Self::Bias,
            "sidetune" => Self::Sidetune,
            "full" => Self::Full,
            _ => {
                let known = "vpt-shallow, vpt-deep, linear, mlp-K, partial-K, bias, adapter-R, sidetune, full";
                return Err(format!("expected one of {known}"));
            }
        };
        Ok(method)
    }
}

impl TryFrom<String> for TuningMethod {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<TuningMethod> for String {
    fn from(method: TuningMethod) -> Self {
        method.to_string()
    }
}

/// The schema in the API's document lists the methods that make a prompt.
impl PartialSchema for TuningMethod {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("What is trained beside the head"))
            .enum_values(Some(Self::PROMPTS.map(String::from)))
            .into()
    }
}

impl ToSchema for TuningMethod {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_is_what_its_text_says() {
        for text in [
            "vpt-shallow",
            "vpt-deep",
            "linear",
            "mlp-2",
            "partial-12",
            "bias",
            "adapter-64",
            "sidetune",
            "full",
        ] {
            assert_eq!(text.parse::<TuningMethod>().unwrap().to_string(), text);
        }
        assert_eq!("partial".parse(), Ok(TuningMethod::Partial(1)));
        for (text, why) in [
            ("partial-0", "1..=1024"),
            ("mlp-3x", "1..=1024"),
            ("full-2", "`full` has no number"),
            ("lora", "expected one of vpt-shallow"),
        ] {
            let error = text.parse::<TuningMethod>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}

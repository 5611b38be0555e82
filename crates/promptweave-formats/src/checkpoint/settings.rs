//! The settings that a checkpoint's tensors do not contain: heads, epsilon, preprocessing.
//!
//! The request's settings take precedence over the files beside the checkpoint: the `config.json`
//! of timm's or transformers' models, and the latter's `preprocessor_config.json`.

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::backbone::BackboneError;
use crate::checkpoint::ImportError;
use crate::checkpoint::naming::{Naming, Sizes, known_heads};
use promptweave_domain::backbone::{BackboneConfig, Filter, Preprocessing};

/// The part of `config.json` that tensors do not contain. Omitted settings are taken from the files
/// beside the checkpoint, if they have them.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// timm-style name. Default: the files' name, otherwise one made from the sizes.
    #[schema(example = "vit_base_patch16_224")]
    pub architecture: Option<String>,
    /// Number of heads of each attention.
    #[schema(example = 12)]
    pub num_heads: Option<usize>,
    /// LayerNorm's epsilon. Default: the files' value, otherwise the library's default for its
    /// models.
    #[schema(example = 1e-6)]
    pub norm_eps: Option<f64>,
    pub preprocessing: Option<Preprocessing>,
}

impl Settings {
    pub fn or(self, other: Self) -> Self {
        Self {
            architecture: self.architecture.or(other.architecture),
            num_heads: self.num_heads.or(other.num_heads),
            norm_eps: self.norm_eps.or(other.norm_eps),
            preprocessing: self.preprocessing.or(other.preprocessing),
        }
    }

    /// The settings in `config.json` and `preprocessor_config.json`. A setting that promptweave
    /// cannot honour (another activation, say) is an error; an unknown one is ignored.
    pub fn of_files(config: &Value, preprocessor: &Value) -> Result<Self, ImportError> {
        if let Some(activation) = config["hidden_act"].as_str()
            && activation != "gelu"
        {
            return Err(ImportError::Unsupported {
                setting: "hidden_act",
                found: activation.to_owned(),
                expected: "`gelu`",
            });
        }
        let size = |name: &str| config[name].as_u64().map(|n| n as usize);
        Ok(Self {
            architecture: config["architecture"].as_str().map(str::to_owned),
            num_heads: size("num_attention_heads").or_else(|| {
                let architecture = config["architecture"].as_str()?;
                known_heads(architecture, size("num_features")?)
            }),
            norm_eps: config["layer_norm_eps"].as_f64(),
            preprocessing: of_timm(&config["pretrained_cfg"]).or_else(|| of_hf(preprocessor)),
        })
    }

    pub fn complete(self, naming: Naming, sizes: &Sizes) -> Result<BackboneConfig, ImportError> {
        let Sizes {
            embed_dim,
            depth,
            patch_size,
            pos_grid,
            ..
        } = *sizes;
        if let (Some(given), Some(told)) = (self.num_heads, sizes.num_heads)
            && given != told
        {
            return Err(ImportError::Unsupported {
                setting: "num_heads",
                found: given.to_string(),
                expected: "as many as the attention kernels have",
            });
        }
        let missing = |setting| ImportError::MissingSetting { setting };
        let config = BackboneConfig {
            architecture: self
                .architecture
                .unwrap_or_else(|| format!("vit_{depth}x{embed_dim}_patch{patch_size}")),
            embed_dim,
            depth,
            num_heads: (sizes.num_heads.or(self.num_heads)).ok_or(missing("num_heads"))?,
            patch_size,
            pos_grid,
            norm_eps: self.norm_eps.unwrap_or(match naming {
                Naming::HfVit => 1e-12,
                _ => 1e-6,
            }),
            preprocessing: self.preprocessing.ok_or(missing("preprocessing"))?,
        };
        config.check().map_err(BackboneError::Inconsistent)?;
        Ok(config)
    }
}

fn of_timm(config: &Value) -> Option<Preprocessing> {
    let size = config["input_size"].as_array()?;
    preprocessing(
        size.get(1)? == size.get(2)?,
        size.get(1)?,
        &config["interpolation"],
        &config["mean"],
        &config["std"],
    )
}

fn of_hf(config: &Value) -> Option<Preprocessing> {
    // The library crops to this size, or resizes to it. Here an image is resized to it either way.
    let size = match config["do_center_crop"].as_bool() {
        Some(true) => &config["crop_size"],
        _ => &config["size"],
    };
    let (height, width) = match size.is_object() {
        true => (&size["height"], &size["width"]),
        false => (size, size),
    };
    preprocessing(
        height == width,
        height,
        &config["resample"],
        &config["image_mean"],
        &config["image_std"],
    )
}

fn preprocessing(
    square: bool,
    size: &Value,
    filter: &Value,
    mean: &Value,
    std: &Value,
) -> Option<Preprocessing> {
    let channels = |value: &Value| -> Option<[f64; 3]> {
        let values: Vec<f64> = value.as_array()?.iter().flat_map(Value::as_f64).collect();
        values.try_into().ok()
    };
    let filter = match (filter.as_str(), filter.as_u64()) {
        // These are Pillow's numbers.
        (Some("bicubic"), _) | (_, Some(3)) => Filter::Bicubic,
        (Some("bilinear"), _) | (_, Some(2)) => Filter::Bilinear,
        _ => return None,
    };
    square.then_some(())?;
    Some(Preprocessing {
        size: size.as_u64()? as usize,
        filter,
        // Both libraries shrink with Pillow, which always antialiases.
        antialias: true,
        mean: channels(mean)?,
        std: channels(std)?,
    })
}

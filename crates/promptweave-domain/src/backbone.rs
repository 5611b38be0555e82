//! A backbone's description beside its tensors: its architecture and its preprocessing.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::digest::Digest;

/// The contents of `config.json`: what the tensors alone do not say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackboneConfig {
    /// timm-style name, e.g. `vit_small_patch14_dinov2`.
    pub architecture: String,
    /// d, the width of tokens and features.
    pub embed_dim: usize,
    /// Number of transformer blocks.
    pub depth: usize,
    pub num_heads: usize,
    /// Edge of a patch in pixels.
    pub patch_size: usize,
    /// Edge of the stored position-embedding grid, in patches.
    pub pos_grid: usize,
    /// LayerNorm epsilon; timm's ViTs have 1e-6.
    #[serde(default = "default_norm_eps")]
    pub norm_eps: f64,
    pub preprocessing: Preprocessing,
}

fn default_norm_eps() -> f64 {
    1e-6
}

/// How an image becomes the backbone's input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Preprocessing {
    /// Edge of the square input in pixels; a multiple of the patch size.
    pub size: usize,
    pub filter: Filter,
    /// Whether the filter's support grows when shrinking (Pillow's rule).
    pub antialias: bool,
    /// Mean of each channel (RGB), on a scale of 0..=1.
    #[schema(min_items = 3, max_items = 3)]
    pub mean: [f64; 3],
    #[schema(min_items = 3, max_items = 3)]
    pub std: [f64; 3],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    Bicubic,
    Bilinear,
}

impl Preprocessing {
    /// A readable name, e.g. `98-bicubic-imagenet`. Equal names mean equal preprocessing.
    pub fn id(&self) -> String {
        let filter = match self.filter {
            Filter::Bicubic => "bicubic",
            Filter::Bilinear => "bilinear",
        };
        let antialias = if self.antialias { "" } else { "-no-antialias" };
        let normalisation = match (self.mean, self.std) {
            ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) => "imagenet".to_owned(),
            ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]) => "half".to_owned(),
            (mean, std) => {
                let digest = Digest::of(format!("{mean:?}{std:?}").as_bytes());
                digest.hex()[..8].to_owned()
            }
        };
        format!("{}-{filter}{antialias}-{normalisation}", self.size)
    }
}

impl BackboneConfig {
    /// Checks the description, and says what is inconsistent.
    pub fn check(&self) -> Result<(), String> {
        let fail = |text: String| Err(text);
        let Preprocessing {
            size, mean, std, ..
        } = self.preprocessing;
        if [
            self.embed_dim,
            self.depth,
            self.num_heads,
            self.patch_size,
            self.pos_grid,
        ]
        .contains(&0)
        {
            return fail("every size must be at least 1".into());
        }
        // These bounds lie far beyond any existing ViT, and keep everything below from overflowing.
        let largest = [
            self.embed_dim,
            self.num_heads,
            self.patch_size,
            self.pos_grid,
            size,
        ];
        if self.depth > 1000 || largest.iter().any(|size| *size > 65_536) {
            return fail("depth is at most 1000, every other size at most 65536".into());
        }
        if !self.embed_dim.is_multiple_of(self.num_heads) {
            return fail(format!(
                "embed_dim {} is not a multiple of num_heads {}",
                self.embed_dim, self.num_heads
            ));
        }
        if size == 0 || !size.is_multiple_of(self.patch_size) {
            return fail(format!(
                "preprocessing.size {size} is not a multiple of patch_size {}",
                self.patch_size
            ));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return fail("norm_eps must be finite and at least 0".into());
        }
        if mean.iter().any(|m| !m.is_finite()) {
            return fail("preprocessing.mean must be finite".into());
        }
        if std.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
            return fail("preprocessing.std must be positive".into());
        }
        Ok(())
    }
}

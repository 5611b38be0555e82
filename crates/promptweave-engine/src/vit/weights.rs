//! A ViT's tensors, field by field as timm names its keys.

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::vit::checkpoint::Checkpoint;
use promptweave_domain::backbone::BackboneConfig;
use promptweave_formats::backbone::Backbone;

/// A ViT's weights. Clones share the tensors, which never change.
pub struct Weights {
    pub embedding: Embedding,
    pub blocks: Vec<Block>,
    pub norm: LayerNorm,
}

/// The map from images to tokens.
pub struct Embedding {
    patch_size: i64,
    /// The CLS token with its position embedding added, [1, 1, d].
    cls_token: Tensor,
    /// The patches' position embeddings [1, g², d], resampled to the grid of the configured input
    /// size.
    pos_embed: Tensor,
    patch_embed: Linear,
}

pub struct Block {
    pub norm1: LayerNorm,
    pub qkv: Linear,
    pub proj: Linear,
    /// LayerScale, if the model has it.
    pub ls1: Option<Tensor>,
    pub norm2: LayerNorm,
    pub fc1: Linear,
    pub fc2: Linear,
    pub ls2: Option<Tensor>,
    pub num_heads: i64,
}

pub struct Linear {
    pub weight: Tensor,
    pub bias: Tensor,
}

pub struct LayerNorm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub eps: f64,
}

impl Weights {
    pub fn load(backbone: &Backbone, device: Device, kind: Kind) -> Result<Self, EngineError> {
        let config = &backbone.config;
        let mut checkpoint = Checkpoint::load(backbone, device, kind)?;
        Ok(Self {
            embedding: Embedding::take(&mut checkpoint, config)?,
            blocks: (0..config.depth)
                .map(|i| Block::take(&mut checkpoint, &format!("blocks.{i}"), config))
                .collect::<Result<_, _>>()?,
            norm: LayerNorm::take(&mut checkpoint, "norm", config)?,
        })
    }
}

impl Weights {
    /// Visits every tensor with its name. The names are timm's, but `cls_token` includes its
    /// position, and `pos_embed` is of the patches alone, on this grid.
    pub fn each(&mut self, visit: &mut dyn FnMut(&str, &mut Tensor)) {
        let Embedding {
            cls_token,
            pos_embed,
            patch_embed,
            ..
        } = &mut self.embedding;
        visit("cls_token", cls_token);
        visit("pos_embed", pos_embed);
        let mut pair = |name: &str, weight: &mut Tensor, bias: &mut Tensor| {
            visit(&format!("{name}.weight"), weight);
            visit(&format!("{name}.bias"), bias);
        };
        pair(
            "patch_embed.proj",
            &mut patch_embed.weight,
            &mut patch_embed.bias,
        );
        pair("norm", &mut self.norm.weight, &mut self.norm.bias);
        for (i, block) in self.blocks.iter_mut().enumerate() {
            for (name, norm) in [("norm1", &mut block.norm1), ("norm2", &mut block.norm2)] {
                pair(
                    &format!("blocks.{i}.{name}"),
                    &mut norm.weight,
                    &mut norm.bias,
                );
            }
            for (name, linear) in [
                ("attn.qkv", &mut block.qkv),
                ("attn.proj", &mut block.proj),
                ("mlp.fc1", &mut block.fc1),
                ("mlp.fc2", &mut block.fc2),
            ] {
                pair(
                    &format!("blocks.{i}.{name}"),
                    &mut linear.weight,
                    &mut linear.bias,
                );
            }
        }
        for (i, block) in self.blocks.iter_mut().enumerate() {
            for (name, gamma) in [("ls1", &mut block.ls1), ("ls2", &mut block.ls2)] {
                if let Some(gamma) = gamma {
                    visit(&format!("blocks.{i}.{name}.gamma"), gamma);
                }
            }
        }
    }
}

impl Embedding {
    fn take(checkpoint: &mut Checkpoint, config: &BackboneConfig) -> Result<Self, EngineError> {
        let pos_embed = checkpoint.take("pos_embed")?;
        let cls_token = checkpoint.take("cls_token")? + pos_embed.narrow(1, 0, 1);
        let grid = config.preprocessing.size / config.patch_size;
        let pos_embed = resample_grid(&pos_embed.narrow(1, 1, pos_embed.size()[1] - 1), grid);
        let mut patch_embed = Linear::take(checkpoint, "patch_embed.proj")?;
        patch_embed.weight = patch_embed.weight.flatten(1, -1);
        Ok(Self {
            patch_size: config.patch_size as i64,
            cls_token,
            pos_embed,
            patch_embed,
        })
    }

    /// Tokens of CLS and patches with their positions: normalised images [B, 3, s, s] → [B, 1 + g²,
    /// d]. They are the same for every prompt.
    pub fn tokens(&self, images: &Tensor) -> Tensor {
        let patch = self.patch_size;
        let (batch, size) = (images.size()[0], images.size()[2]);
        let grid = size / patch;
        // A convolution whose stride is its kernel is a matrix product over cut-out patches.
        let patches = images
            .view([batch, 3, grid, patch, grid, patch])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([batch, grid * grid, 3 * patch * patch]);
        let patches = self.patch_embed.forward(&patches) + &self.pos_embed;
        let cls = self.cls_token.expand([batch, -1, -1], false);
        Tensor::cat(&[&cls, &patches], 1)
    }
}

/// Resamples a square grid of position embeddings [1, G², d] to [1, g², d]: bicubic with a = -0.75,
/// half-pixel centres, scale G/g, no antialias. timm antialiases here and gives other values.
fn resample_grid(grid: &Tensor, to: usize) -> Tensor {
    let (cells, d) = (grid.size()[1], grid.size()[2]);
    let (from, to) = (cells.isqrt(), to as i64);
    if from == to {
        return grid.shallow_clone();
    }
    grid.view([1, from, from, d])
        .permute([0, 3, 1, 2])
        .upsample_bicubic2d([to, to], false, None, None)
        .permute([0, 2, 3, 1])
        .reshape([1, to * to, d])
}

impl Block {
    fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        config: &BackboneConfig,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            norm1: LayerNorm::take(checkpoint, &format!("{name}.norm1"), config)?,
            qkv: Linear::take(checkpoint, &format!("{name}.attn.qkv"))?,
            proj: Linear::take(checkpoint, &format!("{name}.attn.proj"))?,
            ls1: checkpoint.take_optional(&format!("{name}.ls1.gamma"))?,
            norm2: LayerNorm::take(checkpoint, &format!("{name}.norm2"), config)?,
            fc1: Linear::take(checkpoint, &format!("{name}.mlp.fc1"))?,
            fc2: Linear::take(checkpoint, &format!("{name}.mlp.fc2"))?,
            ls2: checkpoint.take_optional(&format!("{name}.ls2.gamma"))?,
            num_heads: config.num_heads as i64,
        })
    }
}

impl Linear {
    fn take(checkpoint: &mut Checkpoint, name: &str) -> Result<Self, EngineError> {
        Ok(Self {
            weight: checkpoint.take(&format!("{name}.weight"))?,
            bias: checkpoint.take(&format!("{name}.bias"))?,
        })
    }

    /// The part of the map that gives outputs `start..start + length`; it shares memory.
    pub fn rows(&self, start: i64, length: i64) -> Self {
        Self {
            weight: self.weight.narrow(0, start, length),
            bias: self.bias.narrow(0, start, length),
        }
    }

    pub fn to_kind(&self, kind: Kind) -> Self {
        Self {
            weight: self.weight.to_kind(kind),
            bias: self.bias.to_kind(kind),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }
}

impl LayerNorm {
    fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        config: &BackboneConfig,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            weight: checkpoint.take(&format!("{name}.weight"))?,
            bias: checkpoint.take(&format!("{name}.bias"))?,
            eps: config.norm_eps,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        let d = self.weight.size()[0];
        x.layer_norm([d], Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}

impl Clone for Weights {
    fn clone(&self) -> Self {
        Self {
            embedding: self.embedding.clone(),
            blocks: self.blocks.clone(),
            norm: self.norm.clone(),
        }
    }
}

impl Clone for Embedding {
    fn clone(&self) -> Self {
        Self {
            patch_size: self.patch_size,
            cls_token: self.cls_token.shallow_clone(),
            pos_embed: self.pos_embed.shallow_clone(),
            patch_embed: self.patch_embed.clone(),
        }
    }
}

impl Clone for Block {
    fn clone(&self) -> Self {
        let shared = |scale: &Option<Tensor>| scale.as_ref().map(Tensor::shallow_clone);
        Self {
            norm1: self.norm1.clone(),
            qkv: self.qkv.clone(),
            proj: self.proj.clone(),
            ls1: shared(&self.ls1),
            norm2: self.norm2.clone(),
            fc1: self.fc1.clone(),
            fc2: self.fc2.clone(),
            ls2: shared(&self.ls2),
            num_heads: self.num_heads,
        }
    }
}

impl Clone for Linear {
    fn clone(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.shallow_clone(),
        }
    }
}

impl Clone for LayerNorm {
    fn clone(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.shallow_clone(),
            eps: self.eps,
        }
    }
}

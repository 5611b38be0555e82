//! A frozen Vision Transformer with prompt insertion, field by field as timm names its keys.
//!
//! Token sequence (VPT-shallow): `[cls + pos₀ ; P ; patch₁ + pos₁ … patch_g² + pos_g²]`. Prompts come
//! after CLS and before the patches and get no position embedding. The feature f_P(x) is the CLS
//! token after the final LayerNorm.

use tch::{Device, Kind, Tensor};

use super::EngineError;
use super::checkpoint::Checkpoint;
use crate::domain::backbone::{Backbone, BackboneConfig};

pub struct Vit {
    pub config: BackboneConfig,
    pub device: Device,
    pub kind: Kind,
    /// [1, 1, d], its position embedding added.
    cls_token: Tensor,
    /// [1, g², d], resampled to the grid of the configured input size.
    pos_embed: Tensor,
    patch_embed: Linear,
    blocks: Vec<Block>,
    norm: LayerNorm,
    /// Whatever [`Self::micro_batch`] would choose; at least 1.
    pub largest_micro_batch: usize,
}

impl Vit {
    pub fn load(backbone: &Backbone, device: Device, kind: Kind) -> Result<Self, EngineError> {
        let config = backbone.config.clone();
        let mut checkpoint = Checkpoint::load(backbone, device, kind)?;
        let pos_embed = checkpoint.take("pos_embed")?;
        let cls_token = checkpoint.take("cls_token")? + pos_embed.narrow(1, 0, 1);
        let grid = config.preprocessing.size / config.patch_size;
        let pos_embed = resample_grid(&pos_embed.narrow(1, 1, pos_embed.size()[1] - 1), grid);
        let blocks = (0..config.depth)
            .map(|i| Block::take(&mut checkpoint, &format!("blocks.{i}"), &config))
            .collect::<Result<_, _>>()?;
        let mut patch_embed = Linear::take(&mut checkpoint, "patch_embed.proj")?;
        patch_embed.weight = patch_embed.weight.flatten(1, -1);
        Ok(Self {
            cls_token,
            pos_embed,
            patch_embed,
            blocks,
            norm: LayerNorm::take(&mut checkpoint, "norm", &config)?,
            config,
            device,
            kind,
            largest_micro_batch: usize::MAX,
        })
    }

    /// d
    pub fn embed_dim(&self) -> i64 {
        self.config.embed_dim as i64
    }

    /// How many samples to pass forward and backward at once: about a second of work, so that a stop is
    /// noticed in time, and no more activations than a modest machine holds. It depends on the model
    /// and the kind of device alone, so that equal inputs are cut equally everywhere.
    pub fn micro_batch(&self, prompts: &[Tensor]) -> usize {
        let (work_a_second, memory) = match self.device {
            // Multiply-adds of two CPU cores; bytes.
            Device::Cpu => (50_000_000_000, 256 << 20),
            _ => (5_000_000_000_000, 8 << 30),
        };
        let BackboneConfig {
            embed_dim: d,
            depth,
            patch_size,
            ..
        } = self.config;
        let grid = self.config.preprocessing.size / patch_size;
        let num_tokens = prompts
            .first()
            .map_or(0, |prompt| prompt.size()[0] as usize);
        let n = 1 + num_tokens + grid * grid;
        // A block's forward pass is 12nd² + 2n²d multiply-adds, its backward pass 12nd² + 4n²d; the
        // backward pass keeps about 34 bytes a token and channel.
        let work = depth * (24 * n * d * d + 6 * n * n * d);
        let bytes = depth * 34 * n * d;
        (work_a_second / work)
            .min(memory / bytes)
            .clamp(1, 256)
            .min(self.largest_micro_batch)
    }

    /// Patch embeddings with positions of normalised images: [B, 3, s, s] → [B, g², d]. They are the
    /// same for every prompt.
    pub fn patch_tokens(&self, images: &Tensor) -> Tensor {
        let patch = self.config.patch_size as i64;
        let (batch, size) = (images.size()[0], images.size()[2]);
        let grid = size / patch;
        // A convolution whose stride is its kernel is a matrix product over cut-out patches.
        let patches = images
            .view([batch, 3, grid, patch, grid, patch])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([batch, grid * grid, 3 * patch * patch]);
        self.patch_embed.forward(&patches) + &self.pos_embed
    }

    /// Prompt-induced features: patch tokens [B, g², d] and a prompt [m, d], or one prompt a sample
    /// [B, m, d], → [B, d]. `None` is the backbone without a prompt.
    pub fn features(&self, patch_tokens: &Tensor, prompt: Option<&Tensor>) -> Tensor {
        let batch = patch_tokens.size()[0];
        let cls = self.cls_token.expand([batch, -1, -1], false);
        let mut tokens = match prompt {
            None => Tensor::cat(&[&cls, patch_tokens], 1),
            Some(prompt) => {
                let prompt = prompt.expand([batch, -1, -1], false);
                Tensor::cat(&[&cls, &prompt, patch_tokens], 1)
            }
        };
        let (last, rest) = self.blocks.split_last().expect("depth is at least 1");
        for block in rest {
            tokens = block.forward(&tokens);
        }
        self.norm.forward(&last.forward_cls(&tokens)).squeeze_dim(1)
    }
}

/// Resamples a square grid of position embeddings [1, G², d] to [1, g², d]: bicubic with a = -0.75,
/// half-pixel centres, scale G/g, no antialias. timm antialiases here and does not agree.
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

/// Pre-norm block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).
struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    ls1: Option<Tensor>,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    ls2: Option<Tensor>,
    num_heads: i64,
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

    /// [B, n, d] → [B, n, d]
    fn forward(&self, x: &Tensor) -> Tensor {
        let normed = self.norm1.forward(x);
        let qkv = self.qkv.forward(&normed).chunk(3, -1);
        self.finish(x, &qkv[0], &qkv[1], &qkv[2])
    }

    /// The last block for the CLS token alone, [B, n, d] → [B, 1, d]: keys and values of all tokens,
    /// and nothing else of the others is read after it.
    fn forward_cls(&self, x: &Tensor) -> Tensor {
        let d = x.size()[2];
        let normed = self.norm1.forward(x);
        let q = self.qkv.rows(0, d).forward(&normed.narrow(1, 0, 1));
        let kv = self.qkv.rows(d, 2 * d).forward(&normed).chunk(2, -1);
        self.finish(&x.narrow(1, 0, 1), &q, &kv[0], &kv[1])
    }

    fn finish(&self, x: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let heads = |t: &Tensor| {
            let (batch, n, d) = t.size3().expect("three axes");
            t.view([batch, n, self.num_heads, d / self.num_heads])
                .transpose(1, 2)
        };
        let attended = Tensor::scaled_dot_product_attention(
            &heads(q),
            &heads(k),
            &heads(v),
            None::<Tensor>,
            0.0,
            false,
            None,
            false,
        );
        let attended = attended.transpose(1, 2).reshape(x.size());
        let x = x + scaled(self.proj.forward(&attended), self.ls1.as_ref());
        let hidden = self.fc1.forward(&self.norm2.forward(&x)).gelu("none");
        &x + scaled(self.fc2.forward(&hidden), self.ls2.as_ref())
    }
}

/// LayerScale, where the model has it.
fn scaled(x: Tensor, gamma: Option<&Tensor>) -> Tensor {
    match gamma {
        Some(gamma) => x * gamma,
        None => x,
    }
}

struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn take(checkpoint: &mut Checkpoint, name: &str) -> Result<Self, EngineError> {
        Ok(Self {
            weight: checkpoint.take(&format!("{name}.weight"))?,
            bias: checkpoint.take(&format!("{name}.bias"))?,
        })
    }

    /// The part of the map that makes outputs `start..start + length`; shares memory.
    fn rows(&self, start: i64, length: i64) -> Self {
        Self {
            weight: self.weight.narrow(0, start, length),
            bias: self.bias.narrow(0, start, length),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
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

    fn forward(&self, x: &Tensor) -> Tensor {
        let d = self.weight.size()[0];
        x.layer_norm([d], Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::image;
    use crate::engine::images;
    use crate::engine::testing::{D, TOKENS, noise_tensor, tiny_vit};
    use std::path::Path;

    fn largest(difference: &Tensor) -> f64 {
        f64::try_from(difference.abs().max()).unwrap()
    }

    #[test]
    fn the_order_of_a_prompts_tokens_changes_no_feature() {
        let dir = tempfile::tempdir().unwrap();
        let vit = tiny_vit(dir.path(), Kind::Double);
        let tokens = vit.patch_tokens(&noise_tensor(&[2, 3, 16, 16], 1));
        let prompt = noise_tensor(&[TOKENS as i64, D as i64], 2);
        let features = vit.features(&tokens, Some(&prompt));
        assert_eq!(features.size(), [2, D as i64]);
        let turned = vit.features(&tokens, Some(&prompt.flip([0])));
        assert!(largest(&(&features - turned)) < 1e-12);
        assert!(largest(&(features - vit.features(&tokens, None))) > 1e-3);
    }

    #[test]
    fn a_batch_gives_what_its_samples_give_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let vit = tiny_vit(dir.path(), Kind::Double);
        let images = noise_tensor(&[3, 3, 16, 16], 1);
        let prompt = noise_tensor(&[TOKENS as i64, D as i64], 2);
        let batch = vit.features(&vit.patch_tokens(&images), Some(&prompt));
        for i in 0..3 {
            let one = vit.features(&vit.patch_tokens(&images.narrow(0, i, 1)), Some(&prompt));
            assert!(largest(&(batch.narrow(0, i, 1) - one)) < 1e-12);
        }
    }

    #[test]
    fn the_last_block_for_cls_alone_equals_the_whole_block() {
        let dir = tempfile::tempdir().unwrap();
        let vit = tiny_vit(dir.path(), Kind::Double);
        let tokens = noise_tensor(&[2, 7, D as i64], 3);
        let block = vit.blocks.last().unwrap();
        let whole = block.forward(&tokens).narrow(1, 0, 1);
        assert!(largest(&(whole - block.forward_cls(&tokens))) < 1e-12);
    }

    /// The demo backbone against onnxruntime on the graph its weights came from, and against a numpy
    /// forward pass with a prompt (scripts/reference/vit_features.py made the numbers). It reads the
    /// real weights, which `make setup` puts under .assets.
    #[test]
    fn the_demo_backbone_agrees_with_its_original_graph() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let backbone = Backbone::open(&root.join(".assets/vit_s14_focus"))
            .expect("`make setup` makes the demo backbone");
        let vit = Vit::load(&backbone, Device::Cpu, Kind::Float).unwrap();
        let fixtures = root.join("tests/fixtures/vit_s14_focus");
        let read =
            |name: &str| image::decode(&std::fs::read(fixtures.join(name)).unwrap()).unwrap();

        let preprocessing = &backbone.config.preprocessing;
        let pixels = image::resize(&read("image.png"), preprocessing);
        let by_pillow = read("resized.png").into_raw();
        let off = pixels
            .iter()
            .zip(&by_pillow)
            .map(|(a, b)| a.abs_diff(*b))
            .max()
            .unwrap();
        assert!(
            off <= 1,
            "resized pixels differ from Pillow's by up to {off} levels"
        );

        #[derive(serde::Deserialize)]
        struct Reference {
            features: Vec<f64>,
            prompted: Vec<f64>,
        }
        let json = std::fs::read(fixtures.join("features.json")).unwrap();
        let reference: Reference = serde_json::from_slice(&json).unwrap();
        let input = images::to_tensor(&[&by_pillow], preprocessing, Device::Cpu, Kind::Float);
        let tokens = vit.patch_tokens(&input);
        let prompt: Vec<f32> = (0..2 * 384)
            .map(|i| (1.0 + i as f32).sin() / 16.0)
            .collect();
        let prompt = Tensor::from_slice(&prompt).view([2, 384]);
        // About a second of work and far less than a gigabyte, on the demo's backbone.
        let prompts = [prompt.shallow_clone()];
        assert!((8..=32).contains(&vit.micro_batch(&prompts)));
        for (expected, prompt) in [
            (reference.features, None),
            (reference.prompted, Some(&prompt)),
        ] {
            let features = vit.features(&tokens, prompt).squeeze_dim(0);
            let expected = Tensor::from_slice(&expected);
            assert!(largest(&(features.to_kind(Kind::Double) - expected)) < 1e-4);
        }
    }
}

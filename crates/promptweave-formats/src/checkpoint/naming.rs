//! Other libraries' names for a ViT's tensors, and their layouts.
//!
//! Each tensor under timm's name is made of one or three of theirs. A row of the tables below is a
//! tensor; `{}` stands for the number of the block.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::backbone::BackboneError;
use crate::checkpoint::ImportError;
use crate::tensor_file::TensorFile;

/// The library whose names a checkpoint's tensors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Naming {
    /// `blocks.0.attn.qkv.weight`
    Timm,
    /// The original DINOv2: timm's names, and a mask token.
    Dinov2,
    /// Hugging Face ViT: `encoder.layer.0.attention.attention.query.weight`
    HfVit,
    /// Hugging Face DINOv2: like `HfVit`, with `norm1`, `mlp.fc1` and `layer_scale1.lambda1`.
    HfDinov2,
    /// The original `.npz`: `Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel`
    Google,
}

/// The naming of a checkpoint, and the prefix of each name (`vit.` if a classifier is on top).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    pub naming: Naming,
    pub prefix: &'static str,
}

/// A tensor of another library that is one of ours, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub name: String,
    /// The shape that it must have.
    pub shape: Vec<usize>,
    /// Its axes in our order.
    pub axes: Vec<usize>,
}

/// The sizes that the tensors' shapes give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub embed_dim: usize,
    pub depth: usize,
    pub patch_size: usize,
    pub pos_grid: usize,
    pub mlp_dim: usize,
    pub layer_scale: bool,
    /// Number of heads. Only `.npz` files give it: their kernels have an axis for it.
    pub num_heads: Option<usize>,
}

/// Hugging Face's names, without the start of a block's (`encoder.layer.{}.`).
const HF: &[(&str, &str)] = &[
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("norm", "layernorm"),
    ("attn.proj", "attention.output.dense"),
];
const HF_VIT: &[(&str, &str)] = &[
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
];
const HF_DINOV2: &[(&str, &str)] = &[
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
];
/// Google's names, without the start of a block's (`Transformer/encoderblock_{}/`).
const GOOGLE: &[(&str, &str)] = &[
    ("cls_token", "cls"),
    ("pos_embed", "Transformer/posembed_input/pos_embedding"),
    ("patch_embed.proj", "embedding"),
    ("norm", "Transformer/encoder_norm"),
    ("norm1", "LayerNorm_0"),
    ("attn.proj", "MultiHeadDotProductAttention_1/out"),
    ("norm2", "LayerNorm_2"),
    ("mlp.fc1", "MlpBlock_3/Dense_0"),
    ("mlp.fc2", "MlpBlock_3/Dense_1"),
];

fn translated(tables: &[&[(&str, &'static str)]], name: &str) -> Option<&'static str> {
    let mut rows = tables.iter().copied().flatten();
    rows.find(|(ours, _)| *ours == name)
        .map(|(_, theirs)| *theirs)
}

impl Names {
    /// Recognises a checkpoint by its tensors' names.
    pub fn of(file: &TensorFile) -> Result<Self, ImportError> {
        let has = |name: &str| file.shape(name).is_some();
        let names = |naming, prefix| Ok(Self { naming, prefix });
        if has("patch_embed.proj.weight") {
            return match has("mask_token") {
                true => names(Naming::Dinov2, ""),
                false => names(Naming::Timm, ""),
            };
        }
        for prefix in ["", "vit.", "dinov2."] {
            if has(&format!(
                "{prefix}embeddings.patch_embeddings.projection.weight"
            )) {
                return match has(&format!("{prefix}encoder.layer.0.norm1.weight")) {
                    true => names(Naming::HfDinov2, prefix),
                    false => names(Naming::HfVit, prefix),
                };
            }
        }
        if has("embedding/kernel") {
            return names(Naming::Google, "");
        }
        let some = file.shapes().keys().take(3).map(|name| format!("`{name}`"));
        Err(ImportError::UnknownNaming(
            some.collect::<Vec<_>>().join(", "),
        ))
    }

    /// Their name for a tensor of ours that is one tensor for them too.
    fn name(&self, ours: &str) -> String {
        let prefix = self.prefix;
        let (block, rest) = match ours.strip_prefix("blocks.").and_then(|r| r.split_once('.')) {
            Some((block, rest)) => (Some(block), rest),
            None => (None, ours),
        };
        let (stem, last) = rest.rsplit_once('.').unwrap_or((rest, ""));
        let translate = |tables: &[&[(&str, &'static str)]]| match translated(tables, rest) {
            Some(whole) => whole.to_owned(),
            None => format!("{}.{last}", translated(tables, stem).unwrap_or(stem)),
        };
        let start = |text: &str| block.map(|n| text.replace("{}", n)).unwrap_or_default();
        match self.naming {
            Naming::Timm | Naming::Dinov2 => ours.to_owned(),
            Naming::HfVit => {
                let start = start("encoder.layer.{}.");
                format!("{prefix}{start}{}", translate(&[HF, HF_VIT]))
            }
            Naming::HfDinov2 => {
                let start = start("encoder.layer.{}.");
                format!("{prefix}{start}{}", translate(&[HF, HF_DINOV2]))
            }
            Naming::Google => {
                let start = start("Transformer/encoderblock_{}/");
                if let Some(whole) = translated(&[GOOGLE], rest) {
                    return format!("{start}{whole}");
                }
                let last = match (last, stem.contains("norm")) {
                    ("weight", true) => "scale",
                    ("weight", false) => "kernel",
                    (last, _) => last,
                };
                format!(
                    "{start}{}/{last}",
                    translated(&[GOOGLE], stem).unwrap_or(stem)
                )
            }
        }
    }

    /// The tensors from which a tensor of ours of this shape is made, stacked along the first axis.
    pub fn sources(&self, ours: &str, shape: &[usize], heads: usize) -> Vec<Source> {
        let qkv = ours.contains(".attn.qkv.");
        if matches!(self.naming, Naming::Timm | Naming::Dinov2) {
            return vec![as_is(ours.to_owned(), shape)];
        }
        let parts = match (qkv, self.naming) {
            (false, _) => vec![self.name(ours)],
            (true, Naming::Google) => self.thirds(ours, "MultiHeadDotProductAttention_1"),
            (true, _) => self.thirds(ours, "attention.attention"),
        };
        let mut shape = shape.to_vec();
        if qkv {
            shape[0] /= 3;
        }
        parts
            .into_iter()
            .map(|name| match self.naming {
                Naming::Google => google(name, ours, &shape, heads),
                _ => as_is(name, &shape),
            })
            .collect()
    }

    /// Names of query, key and value, which are one tensor in timm.
    fn thirds(&self, ours: &str, inside: &str) -> Vec<String> {
        let separator = if inside.contains('.') { '.' } else { '/' };
        ["query", "key", "value"]
            .into_iter()
            .map(|part| {
                let stem = format!("{inside}{separator}{part}");
                let name = self.name(ours);
                name.replace("attn.qkv", &stem)
            })
            .collect()
    }

    /// Whether a tensor does not affect the features: a classifier, a pooler, a mask token.
    pub fn is_left_out(&self, name: &str) -> bool {
        let starts: &[&str] = match self.naming {
            Naming::Timm => &["head.", "pre_logits."],
            Naming::Dinov2 => &["head.", "mask_token"],
            Naming::HfVit | Naming::HfDinov2 => {
                let inner = name.strip_prefix(self.prefix).unwrap_or("");
                let inside = ["pooler.", "embeddings.mask_token"];
                return ["classifier.", "decoder."]
                    .iter()
                    .any(|s| name.starts_with(s))
                    || inside.iter().any(|start| inner.starts_with(start));
            }
            Naming::Google => &["head/", "pre_logits/"],
        };
        starts.iter().any(|start| name.starts_with(start))
    }

    /// The sizes, from the shapes of some tensors. The others are checked against them.
    pub fn sizes(&self, file: &TensorFile) -> Result<Sizes, ImportError> {
        let shape = |ours: &str| {
            let name = self.name(ours);
            match file.shape(&name) {
                Some(shape) => Ok((name, shape)),
                None => Err(BackboneError::MissingTensor(name)),
            }
        };
        let odd = |(name, shape): (String, &[usize]), expected| ImportError::Layout {
            tensor: name,
            shape: shape.to_vec(),
            expected,
        };
        let patches = shape("patch_embed.proj.weight")?;
        let (embed_dim, patch_size) = match (self.naming, patches.1) {
            (Naming::Google, &[p, _, 3, d]) | (_, &[d, 3, p, _]) => (d, p),
            (Naming::Google, _) => return Err(odd(patches, "[patch, patch, 3, d]")),
            _ => return Err(odd(patches, "[d, 3, patch, patch]")),
        };
        let positions = shape("pos_embed")?;
        let pos_grid = match positions.1 {
            &[1, tokens, _] if tokens > 1 && (tokens - 1).isqrt().pow(2) == tokens - 1 => {
                (tokens - 1).isqrt()
            }
            _ => return Err(odd(positions, "[1, 1 + a square, d]")),
        };
        let hidden = shape("blocks.0.mlp.fc1.bias")?;
        let &[mlp_dim] = hidden.1 else {
            return Err(odd(hidden, "[hidden]"));
        };
        let num_heads = match self.naming {
            Naming::Google => {
                let name =
                    &self.thirds("blocks.0.attn.qkv.bias", "MultiHeadDotProductAttention_1")[0];
                match file.shape(name) {
                    Some(&[heads, _]) => Some(heads),
                    Some(shape) => return Err(odd((name.clone(), shape), "[heads, d / heads]")),
                    None => return Err(BackboneError::MissingTensor(name.clone()).into()),
                }
            }
            _ => None,
        };
        Ok(Sizes {
            embed_dim,
            depth: self.depth(file),
            patch_size,
            pos_grid,
            mlp_dim,
            layer_scale: file.shape(&self.name("blocks.0.ls1.gamma")).is_some(),
            num_heads,
        })
    }

    /// One more than the largest block number. A missing block shows as a missing tensor.
    fn depth(&self, file: &TensorFile) -> usize {
        let first = self.name("blocks.0.norm1.bias");
        let start = first.split('0').next().unwrap_or_default();
        let numbers = file.shapes().keys().filter_map(|name| {
            let digits = name.strip_prefix(start)?;
            let end = digits.find(|c: char| !c.is_ascii_digit())?;
            digits[..end].parse::<usize>().ok()
        });
        numbers.max().map_or(0, |last| last.saturating_add(1))
    }
}

fn as_is(name: String, shape: &[usize]) -> Source {
    Source {
        name,
        shape: shape.to_vec(),
        axes: (0..shape.len()).collect(),
    }
}

/// Flax puts a kernel's inputs first, and attention's kernels have an axis for the heads.
fn google(name: String, ours: &str, shape: &[usize], heads: usize) -> Source {
    let per_head = |d: usize| [heads, d / heads];
    let (shape, axes) = match (shape, ours) {
        (&[d, channels, p, _], _) => (vec![p, p, channels, d], vec![3, 2, 0, 1]),
        (&[out, d], name) if name.contains(".attn.qkv.") => {
            let [h, w] = per_head(out);
            (vec![d, h, w], vec![1, 2, 0])
        }
        (&[out, d], name) if name.contains(".attn.proj.") => {
            let [h, w] = per_head(d);
            (vec![h, w, out], vec![2, 0, 1])
        }
        (&[out, d], _) => (vec![d, out], vec![1, 0]),
        (&[d], name) if name.contains(".attn.qkv.") => (per_head(d).to_vec(), vec![0, 1]),
        (shape, _) => return as_is(name, shape),
    };
    Source { name, shape, axes }
}

/// Number of heads by the name of a published architecture: heads are not always 64 wide.
pub fn known_heads(architecture: &str, embed_dim: usize) -> Option<usize> {
    let known = BTreeMap::from([
        ("vit_tiny_", (192, 3)),
        ("vit_small_", (384, 6)),
        ("vit_base_", (768, 12)),
        ("vit_large_", (1024, 16)),
        ("vit_huge_", (1280, 16)),
    ]);
    let mut rows = known.into_iter();
    rows.find(|(start, (d, _))| architecture.starts_with(start) && *d == embed_dim)
        .map(|(_, (_, heads))| heads)
}

//! A backbone: a frozen, pre-trained Vision Transformer in a folder of its own.
//!
//! The folder holds `config.json` ([`BackboneConfig`]) and `model.safetensors` with timm's names.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::tensor_file::{TensorFile, TensorFileError};
use promptweave_domain::backbone::BackboneConfig;
use promptweave_domain::compatibility::BackboneFacts;
use promptweave_domain::digest::{Digest, DigestBuilder};
use promptweave_domain::tensor::Element;

pub const CONFIG_FILE: &str = "config.json";
pub const MODEL_FILE: &str = "model.safetensors";

#[derive(Debug, thiserror::Error)]
pub enum BackboneError {
    #[error("cannot read `{path}`")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{path}` is not a backbone's config.json")]
    Config {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("cannot take tensors from `{path}`")]
    Model {
        path: PathBuf,
        source: TensorFileError,
    },
    #[error("config.json: {0}")]
    Inconsistent(String),
    #[error("tensor `{0}` is missing")]
    MissingTensor(String),
    #[error("tensor `{0}` is not part of this architecture")]
    UnknownTensor(String),
    #[error("tensor `{tensor}` has shape {shape:?}, expected {expected:?}")]
    Shape {
        tensor: String,
        shape: Vec<usize>,
        expected: Vec<usize>,
    },
}

/// A backbone folder whose two files were read and agree with each other.
#[derive(Clone, Debug)]
pub struct Backbone {
    pub dir: PathBuf,
    pub config: BackboneConfig,
    /// sha256 over (name, shape, f32 bytes) of the tensors in name order, without the head.
    pub digest: Digest,
    /// Number of values in the model's tensors.
    pub num_weights: u64,
}

impl Backbone {
    /// Reads the folder and checks every tensor's name, shape and dtype against `config.json`.
    pub fn open(dir: &Path) -> Result<Self, BackboneError> {
        let read = |name: &str| {
            let path = dir.join(name);
            match fs::read(&path) {
                Ok(bytes) => Ok((path, bytes)),
                Err(source) => Err(BackboneError::Read { path, source }),
            }
        };
        let (path, json) = read(CONFIG_FILE)?;
        let config: BackboneConfig = serde_json::from_slice(&json)
            .map_err(|source| BackboneError::Config { path, source })?;
        config.check().map_err(BackboneError::Inconsistent)?;
        let path = dir.join(MODEL_FILE);
        let failed = |source| BackboneError::Model {
            path: path.clone(),
            source,
        };
        let mut model = TensorFile::open(&path).map_err(failed)?;
        check_tensors(&config, &model)?;
        Ok(Self {
            dir: dir.to_owned(),
            digest: digest(&mut model).map_err(failed)?,
            num_weights: (model.shapes().values())
                .map(|shape| shape.iter().product::<usize>() as u64)
                .sum(),
            config,
        })
    }

    /// The facts that decide which prompts fit.
    pub fn facts(&self) -> BackboneFacts<'_> {
        BackboneFacts {
            name: None,
            digest: self.digest,
            embed_dim: self.config.embed_dim,
            preprocessing_id: self.config.preprocessing.id(),
        }
    }

    pub fn model_path(&self) -> PathBuf {
        self.dir.join(MODEL_FILE)
    }
}

fn is_head(name: &str) -> bool {
    name.starts_with("head.") || name.starts_with("pre_logits.")
}

fn digest(model: &mut TensorFile) -> Result<Digest, TensorFileError> {
    let mut digest = DigestBuilder::default();
    for (name, shape) in model.shapes().clone() {
        if !is_head(&name) {
            digest.update(format!("{name}{shape:?}").as_bytes());
            digest.update(&f32::bytes(&model.read(&name)?));
        }
    }
    Ok(digest.finish())
}

/// Every tensor of a ViT of this configuration, with its shape. LayerScale (`ls1`, `ls2`) is the
/// one optional part: it is present in all blocks or in none.
pub fn expected_tensors(
    config: &BackboneConfig,
    mlp_dim: usize,
    layer_scale: bool,
) -> BTreeMap<String, Vec<usize>> {
    let d = config.embed_dim;
    let mut expected = BTreeMap::from([
        ("cls_token".to_owned(), vec![1, 1, d]),
        (
            "pos_embed".to_owned(),
            vec![1, 1 + config.pos_grid.pow(2), d],
        ),
        (
            "patch_embed.proj.weight".to_owned(),
            vec![d, 3, config.patch_size, config.patch_size],
        ),
        ("patch_embed.proj.bias".to_owned(), vec![d]),
        ("norm.weight".to_owned(), vec![d]),
        ("norm.bias".to_owned(), vec![d]),
    ]);
    for block in 0..config.depth {
        let mut insert = |name: &str, shape: Vec<usize>| {
            expected.insert(format!("blocks.{block}.{name}"), shape);
        };
        for norm in ["norm1", "norm2"] {
            insert(&format!("{norm}.weight"), vec![d]);
            insert(&format!("{norm}.bias"), vec![d]);
        }
        for (linear, rows, columns) in [
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("mlp.fc1", mlp_dim, d),
            ("mlp.fc2", d, mlp_dim),
        ] {
            insert(&format!("{linear}.weight"), vec![rows, columns]);
            insert(&format!("{linear}.bias"), vec![rows]);
        }
        if layer_scale {
            insert("ls1.gamma", vec![d]);
            insert("ls2.gamma", vec![d]);
        }
    }
    expected
}

fn check_tensors(config: &BackboneConfig, model: &TensorFile) -> Result<(), BackboneError> {
    // The MLP's width is taken from the file. All blocks must then agree with it.
    let mlp_dim = model
        .shape("blocks.0.mlp.fc1.weight")
        .and_then(|shape| shape.first().copied())
        .ok_or_else(|| BackboneError::MissingTensor("blocks.0.mlp.fc1.weight".into()))?;
    let layer_scale = model.shape("blocks.0.ls1.gamma").is_some();
    let expected = expected_tensors(config, mlp_dim, layer_scale);
    for (name, shape) in &expected {
        check_shape(model, name, shape)?;
    }
    let mut extra = model.shapes().keys();
    match extra.find(|name| !is_head(name) && !expected.contains_key(*name)) {
        Some(name) => Err(BackboneError::UnknownTensor(name.clone())),
        None => Ok(()),
    }
}

/// Checks that a tensor is present and has this shape.
pub(crate) fn check_shape(
    model: &TensorFile,
    name: &str,
    expected: &[usize],
) -> Result<(), BackboneError> {
    match model.shape(name) {
        None => Err(BackboneError::MissingTensor(name.to_owned())),
        Some(shape) if shape != expected => Err(BackboneError::Shape {
            tensor: name.to_owned(),
            shape: shape.to_vec(),
            expected: expected.to_vec(),
        }),
        Some(_) => Ok(()),
    }
}

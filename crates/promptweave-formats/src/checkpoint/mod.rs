//! Import of a ViT checkpoint from another library into a backbone folder.
//!
//! ```text
//! file ─► names: which library's? ─► sizes ─► config.json ─► each tensor, checked and laid out ─► model.safetensors
//! ```
//! A backbone's digest is over timm's names and f32 values. So one model is one backbone, whichever
//! library wrote its checkpoint.

mod naming;
mod settings;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use self::naming::Naming;
use self::naming::{Names, Source};
pub use self::settings::Settings;
use crate::backbone::{
    Backbone, BackboneError, CONFIG_FILE, MODEL_FILE, check_shape, expected_tensors,
};
use crate::tensor_file::{TensorFile, TensorFileError, permute, write_f32};
use promptweave_domain::backbone::BackboneConfig;

pub const PREPROCESSOR_FILE: &str = "preprocessor_config.json";
/// Largest `config.json` read, in bytes.
const MAX_JSON: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error(transparent)]
    File(#[from] TensorFileError),
    #[error("cannot read or write `{path}`")]
    Io { path: PathBuf, source: io::Error },
    #[error("`{path}` is not JSON")]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error(
        "`{}` has neither `{MODEL_FILE}` nor another `.safetensors` or `.npz` checkpoint", .dir.display()
    )]
    NoCheckpoint { dir: PathBuf },
    #[error("`{}` has {count} checkpoints; call the one you mean `{MODEL_FILE}`", .dir.display())]
    ManyCheckpoints { dir: PathBuf, count: usize },
    #[error(
        "the tensors' names are those of no ViT known here (timm, Hugging Face ViT and DINOv2, \
         DINOv2, Google's .npz); there are {0}, …"
    )]
    UnknownNaming(String),
    #[error("tensor `{tensor}` has shape {shape:?}, expected {expected}")]
    Layout {
        tensor: String,
        shape: Vec<usize>,
        expected: &'static str,
    },
    #[error("neither the checkpoint nor a file beside it says `{setting}`; give it in `config`")]
    MissingSetting { setting: &'static str },
    #[error("`{setting}` is {found}, expected {expected}")]
    Unsupported {
        setting: &'static str,
        found: String,
        expected: &'static str,
    },
    #[error("the backbone has {bytes} bytes of weights, more than the {limit} allowed")]
    TooLarge { bytes: u64, limit: u64 },
    #[error("tensor `{tensor}` holds {value}; every value must be finite")]
    NotFinite { tensor: String, value: f32 },
}

/// A checkpoint and the files that describe it.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub file: PathBuf,
    pub config: Option<PathBuf>,
    pub preprocessor: Option<PathBuf>,
}

impl Checkpoint {
    /// A checkpoint file, with the files that lie beside it.
    pub fn beside(file: PathBuf) -> Self {
        let beside = |name| Some(file.with_file_name(name)).filter(|path| path.is_file());
        Self {
            config: beside(CONFIG_FILE),
            preprocessor: beside(PREPROCESSOR_FILE),
            file,
        }
    }

    /// The checkpoint of a folder: `model.safetensors`, otherwise the only `.safetensors` or
    /// `.npz`.
    pub fn in_folder(dir: &Path) -> Result<Self, ImportError> {
        let usual = dir.join(MODEL_FILE);
        if usual.is_file() {
            return Ok(Self::beside(usual));
        }
        let entries = fs::read_dir(dir).map_err(|source| ImportError::Io {
            path: dir.to_owned(),
            source,
        })?;
        let mut found: Vec<_> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.extension()
                    .is_some_and(|e| e == "safetensors" || e == "npz")
            })
            .collect();
        match (found.pop(), found.len()) {
            (Some(file), 0) => Ok(Self::beside(file)),
            (None, _) => Err(ImportError::NoCheckpoint {
                dir: dir.to_owned(),
            }),
            (Some(_), more) => Err(ImportError::ManyCheckpoints {
                dir: dir.to_owned(),
                count: more + 1,
            }),
        }
    }
}

/// Whether a folder is already a backbone folder, and not another library's.
pub fn is_ours(dir: &Path) -> bool {
    let config = fs::read(dir.join(CONFIG_FILE)).unwrap_or_default();
    // The `config.json` of other libraries has other fields. A broken one of ours is refused as
    // ours.
    let json: Value = serde_json::from_slice(&config).unwrap_or_default();
    json.get("preprocessing").is_some()
}

/// The result of an import.
#[derive(Clone, Debug)]
pub struct Imported {
    pub backbone: Backbone,
    pub naming: Naming,
    /// Names of the tensors that do not affect the features: heads, poolers, mask tokens.
    pub left_out: Vec<String>,
}

/// Writes the backbone folder of a checkpoint into `out`, an empty folder. The weights may take at
/// most `limit` bytes there, as f32.
pub fn import(
    checkpoint: &Checkpoint,
    given: Settings,
    limit: u64,
    out: &Path,
) -> Result<Imported, ImportError> {
    let mut file = TensorFile::open(&checkpoint.file)?;
    let names = Names::of(&file)?;
    let sizes = names.sizes(&file)?;
    let told = Settings::of_files(
        &read_json(checkpoint.config.as_deref())?,
        &read_json(checkpoint.preprocessor.as_deref())?,
    )?;
    let config = given.or(told).complete(names.naming, &sizes)?;

    let expected = expected_tensors(&config, sizes.mlp_dim, sizes.layer_scale);
    let sources = |ours: &str| names.sources(ours, &expected[ours], config.num_heads);
    let mut taken = BTreeSet::new();
    for source in expected.keys().flat_map(|ours| sources(ours)) {
        check_shape(&file, &source.name, &source.shape)?;
        taken.insert(source.name);
    }
    let left_out = left_out(&file, &names, &taken)?;
    let numbers = expected
        .values()
        .map(|s| s.iter().product::<usize>() as u64);
    let bytes = 4 * numbers.sum::<u64>();
    if bytes > limit {
        return Err(ImportError::TooLarge { bytes, limit });
    }

    write_f32(&out.join(MODEL_FILE), &expected, |ours| {
        let mut values = Vec::new();
        for source in sources(ours) {
            values.extend(read(&mut file, &source)?);
        }
        Ok::<_, ImportError>(values)
    })?;
    write_config(&config, &out.join(CONFIG_FILE))?;
    Ok(Imported {
        backbone: Backbone::open(out)?,
        naming: names.naming,
        left_out,
    })
}

fn left_out(
    file: &TensorFile,
    names: &Names,
    taken: &BTreeSet<String>,
) -> Result<Vec<String>, BackboneError> {
    let rest = file.shapes().keys().filter(|name| !taken.contains(*name));
    rest.map(|name| match names.is_left_out(name) {
        true => Ok(name.clone()),
        false => Err(BackboneError::UnknownTensor(name.clone())),
    })
    .collect()
}

fn read(file: &mut TensorFile, source: &Source) -> Result<Vec<f32>, ImportError> {
    let values = file.read(&source.name)?;
    if let Some(value) = values.iter().copied().find(|value| !value.is_finite()) {
        return Err(ImportError::NotFinite {
            tensor: source.name.clone(),
            value,
        });
    }
    Ok(permute(values, &source.shape, &source.axes))
}

fn read_json(path: Option<&Path>) -> Result<Value, ImportError> {
    use io::Read;
    let Some(path) = path else {
        return Ok(Value::Null);
    };
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_JSON).read_to_end(&mut bytes))
        .map_err(|source| ImportError::Io {
            path: path.to_owned(),
            source,
        })?;
    serde_json::from_slice(&bytes).map_err(|source| ImportError::Json {
        path: path.to_owned(),
        source,
    })
}

fn write_config(config: &BackboneConfig, path: &Path) -> Result<(), ImportError> {
    let json = serde_json::to_vec_pretty(config).expect("plain data");
    fs::write(path, json).map_err(|source| ImportError::Io {
        path: path.to_owned(),
        source,
    })
}

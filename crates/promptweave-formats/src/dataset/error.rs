//! Why images and labels do not form a dataset.

use std::path::PathBuf;

use crate::dataset::listing::MAX_CLASSES;
use crate::error::FileError;
use crate::files::Files;
use promptweave_domain::split::Split;

#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("cannot read `{path}`")]
    Read { path: PathBuf, source: FileError },
    #[error("`{0}` is not text")]
    NotText(PathBuf),
    #[error("`{path}` is not a dataset's meta.json")]
    Meta {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{file}:{line}: expected `path label`, found `{text}`")]
    Line {
        file: String,
        line: usize,
        text: String,
    },
    #[error("{file}:{line}: label {label} is outside the {classes} classes (0..={})", classes - 1)]
    Label {
        file: String,
        line: usize,
        label: usize,
        classes: usize,
    },
    #[error("{file}:{line}: path `{path}` leaves the dataset's folder")]
    Outside {
        file: String,
        line: usize,
        path: String,
    },
    #[error(
        "`{0}` holds no training images: expected train800val200.txt or train.txt with \
         `path label` lines, folders of images named by class, images with a `.cls` beside each, or \
         Parquet files"
    )]
    Empty(PathBuf),
    #[error("`{path}` names {classes} classes; at most {MAX_CLASSES} are accepted")]
    TooManyClasses { path: PathBuf, classes: usize },
    #[error("sample `{sample}` {rule}")]
    Sample { sample: String, rule: String },
    #[error("the dataset has no split `{}`; it has {}", .wanted.name(), names(.present))]
    NoSplit { wanted: Split, present: Vec<Split> },
}

fn names(splits: &[Split]) -> String {
    splits
        .iter()
        .map(|s| format!("`{}`", s.name()))
        .collect::<Vec<_>>()
        .join(", ")
}

pub(crate) fn read_error(files: &dyn Files, path: &str, source: FileError) -> DatasetError {
    DatasetError::Read {
        path: files.shown(path),
        source,
    }
}

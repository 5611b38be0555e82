//! VTAB-1k's layout: a list file for each split, with a path and a label on each line.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::dataset::error::{DatasetError, read_error};
use crate::dataset::listing::{LabelledImage, Listing, MAX_CLASSES};
use crate::files::{Files, stays_inside};
use promptweave_domain::split::Split;

/// The possible list files of a split; the first that exists is read.
fn list_files(split: Split) -> [&'static str; 2] {
    match split {
        Split::Train => ["train800val200.txt", "train.txt"],
        Split::Val => ["val200.txt", "val.txt"],
        Split::Test => ["test.txt", "test.txt"],
    }
}

/// Largest list file or `meta.json` accepted, in bytes.
const MAX_LIST_BYTES: u64 = 64 << 20;

#[derive(Deserialize)]
struct Meta {
    classes: Vec<String>,
}

fn read_class_names(files: &dyn Files) -> Result<Option<Vec<String>>, DatasetError> {
    const META: &str = "meta.json";
    let path = files.shown(META);
    match files.read(META, MAX_LIST_BYTES) {
        Ok(json) => match serde_json::from_slice::<Meta>(&json) {
            Ok(meta) if meta.classes.len() > MAX_CLASSES => Err(DatasetError::TooManyClasses {
                path,
                classes: meta.classes.len(),
            }),
            Ok(meta) => Ok(Some(meta.classes)),
            Err(source) => Err(DatasetError::Meta { path, source }),
        },
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(read_error(files, META, error)),
    }
}

fn read_list(
    files: &dyn Files,
    file: &str,
    classes: usize,
) -> Result<Vec<LabelledImage>, DatasetError> {
    let text = files
        .read(file, MAX_LIST_BYTES)
        .map_err(|error| read_error(files, file, error))?;
    let text = String::from_utf8(text).map_err(|_| DatasetError::NotText(files.shown(file)))?;
    let mut images = Vec::new();
    for (index, text) in text
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim().is_empty())
    {
        let (file, line) = (file.to_owned(), index + 1);
        let parsed = text
            .trim()
            .rsplit_once(char::is_whitespace)
            .and_then(|(path, label)| Some((path.trim_end(), label.parse::<usize>().ok()?)));
        let Some((path, label)) = parsed else {
            return Err(DatasetError::Line {
                file,
                line,
                text: text.to_owned(),
            });
        };
        if !stays_inside(path) {
            return Err(DatasetError::Outside {
                file,
                line,
                path: path.to_owned(),
            });
        }
        if label >= classes {
            return Err(DatasetError::Label {
                file,
                line,
                label,
                classes,
            });
        }
        images.push(LabelledImage {
            path: path.to_owned(),
            label,
        });
    }
    Ok(images)
}

/// Lists the files; `None` without a list of training images.
pub fn read(files: &dyn Files) -> Result<Option<Listing>, DatasetError> {
    let list_of = |split: Split| {
        let is_there = |file: &&str| files.is_file(file);
        list_files(split).into_iter().find(is_there)
    };
    if list_of(Split::Train).is_none() {
        return Ok(None);
    }
    let mut splits = BTreeMap::new();
    let classes = read_class_names(files)?;
    let num_classes = classes.as_ref().map_or(MAX_CLASSES, Vec::len);
    for split in Split::ALL {
        if let Some(file) = list_of(split) {
            splits.insert(split, read_list(files, file, num_classes)?);
        }
    }
    let classes = classes.unwrap_or_else(|| {
        let largest = splits.values().flatten().map(|image| image.label).max();
        (0..=largest.unwrap_or(0))
            .map(|label| label.to_string())
            .collect()
    });
    Ok(Some(Listing { classes, splits }))
}

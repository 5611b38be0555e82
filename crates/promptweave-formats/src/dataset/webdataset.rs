//! WebDataset's layout: the files of a sample share the part of their names before the first dot.
//!
//! `000012.jpg` is an image. Its label, a number or a class name, is in `000012.cls`, or in
//! `000012.json` as `label` or `cls`. The files lie together, or in `train/`, `val/` and `test/`.
//! `classnames.txt` names the numbers, one on each line; without it they name themselves.
//! (<https://github.com/webdataset/webdataset>, "The WebDataset Format")

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::dataset::error::{DatasetError, read_error};
use crate::dataset::labels::{Classes, Label, NoClass};
use crate::dataset::listing::{LabelledImage, Listing};
use crate::files::Files;
use crate::files::is_image_name;
use promptweave_domain::split::Split;

/// Largest label file, in bytes.
const MAX_LABEL_BYTES: u64 = 1 << 20;
const MAX_NAMES_BYTES: u64 = 16 << 20;
const CLASS_NAMES: &str = "classnames.txt";

#[derive(Default)]
struct Sample {
    image: Option<String>,
    label: Option<Label>,
}

#[derive(Deserialize)]
struct Fields {
    label: Option<Label>,
    cls: Option<Label>,
}

/// Lists the files; `None` if no image has a label file beside it.
pub(crate) fn read(files: &dyn Files) -> Result<Option<Listing>, DatasetError> {
    let mut folders: Vec<_> = Split::ALL
        .into_iter()
        .filter(|split| files.is_folder(split.name()))
        .map(|split| (split, split.name()))
        .collect();
    if folders.is_empty() {
        folders.push((Split::Train, ""));
    }
    let mut found = BTreeMap::new();
    for (split, folder) in folders {
        match samples(files, folder)? {
            Some(samples) => found.insert(split, samples),
            None => return Ok(None),
        };
    }
    let classes = Classes::of(
        named(files)?,
        found.values().flatten().map(|(_, label)| label),
    );
    let mut splits = BTreeMap::new();
    for (split, samples) in found {
        let labelled = samples.into_iter().map(|(path, label)| {
            let label = classes.index(&label).map_err(|it| refuse(&path, &it))?;
            Ok(LabelledImage { path, label })
        });
        splits.insert(split, labelled.collect::<Result<_, DatasetError>>()?);
    }
    let classes = classes.names;
    Ok(Some(Listing { classes, splits }))
}

fn refuse(path: &str, no_class: &NoClass) -> DatasetError {
    match no_class {
        NoClass::Negative(label) => {
            let rule =
                format!("has the label {label}, which says that there is none; leave it out");
            broken(path, &rule)
        }
        NoClass::Outside { label, classes } => unknown(path, label, *classes),
        NoClass::Unknown { label, classes } => unknown(path, label, *classes),
    }
}

fn unknown(path: &str, label: &dyn std::fmt::Display, classes: usize) -> DatasetError {
    let rule = format!("has the label `{label}`, which is none of the {classes} classes");
    broken(path, &rule)
}

/// The images of a folder by path, with their labels; `None` if no image has a label.
fn samples(files: &dyn Files, folder: &str) -> Result<Option<Vec<(String, Label)>>, DatasetError> {
    let inside = |name: &str| match folder {
        "" => name.to_owned(),
        folder => format!("{folder}/{name}"),
    };
    let names = files
        .files(folder)
        .map_err(|error| read_error(files, folder, error.into()))?;
    let parts = |name: &'_ str| -> Option<(String, String)> {
        let (key, kind) = name.split_once('.')?;
        Some((key.to_owned(), kind.to_ascii_lowercase()))
    };
    let images: BTreeSet<_> = names
        .iter()
        .filter(|name| is_image_name(name))
        .filter_map(|name| Some(parts(name)?.0))
        .collect();
    let is_label = |(key, kind): &(String, String)| {
        ["cls", "json"].contains(&kind.as_str()) && images.contains(key)
    };
    if !names
        .iter()
        .filter_map(|name| parts(name))
        .any(|it| is_label(&it))
    {
        return Ok(None);
    }
    let mut samples: BTreeMap<String, Sample> = BTreeMap::new();
    for name in &names {
        let Some((key, kind)) = parts(name) else {
            continue;
        };
        let path = inside(name);
        let refuse = |rule: &str| Err(broken(&inside(&key), rule));
        // `000012.seg.png` belongs to the sample, but is not its image.
        if is_image_name(&format!("x.{kind}")) && !kind.contains('.') {
            let before = samples.entry(key.clone()).or_default().image.replace(path);
            if before.is_some() {
                return refuse("has two images");
            }
        } else if kind == "cls" || kind == "json" {
            let Some(label) = read_label(files, &path, &kind)? else {
                continue;
            };
            let before = samples.entry(key.clone()).or_default().label.replace(label);
            if before.is_some() {
                return refuse("has two labels");
            }
        }
    }
    let whole = samples.into_iter().map(|(key, sample)| match sample {
        Sample {
            image: Some(image),
            label: Some(label),
        } => Ok((image, label)),
        Sample { image: None, .. } => Err(broken(&inside(&key), "has a label and no image")),
        Sample { label: None, .. } => {
            let rule = "has no label: expected a file beside it that ends with `.cls`, or a `.json` with `label`";
            Err(broken(&inside(&key), rule))
        }
    });
    Ok(Some(whole.collect::<Result<_, _>>()?))
}

/// Reads a label; `None` for JSON without a label.
fn read_label(files: &dyn Files, path: &str, kind: &str) -> Result<Option<Label>, DatasetError> {
    let bytes = files
        .read(path, MAX_LABEL_BYTES)
        .map_err(|error| read_error(files, path, error))?;
    if kind == "json" {
        let Ok(Fields { label, cls }) = serde_json::from_slice(&bytes) else {
            return Ok(None);
        };
        if label.is_some() && cls.is_some() && label != cls {
            return Err(broken(path, "has a `label` and another one as `cls`"));
        }
        return Ok(label.or(cls));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| DatasetError::NotText(files.shown(path)))?;
    match Label::of_text(text) {
        Some(label) => Ok(Some(label)),
        None => Err(broken(path, "is neither a number nor a class name")),
    }
}

/// The names of numeric labels.
fn named(files: &dyn Files) -> Result<Option<Vec<String>>, DatasetError> {
    match files.read(CLASS_NAMES, MAX_NAMES_BYTES) {
        Ok(bytes) => {
            let text = String::from_utf8(bytes);
            let text = text.map_err(|_| DatasetError::NotText(files.shown(CLASS_NAMES)))?;
            Ok(Some(
                text.lines().map(|line| line.trim().to_owned()).collect(),
            ))
        }
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(read_error(files, CLASS_NAMES, error)),
    }
}

fn broken(sample: &str, rule: &str) -> DatasetError {
    DatasetError::Sample {
        sample: sample.to_owned(),
        rule: rule.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::dataset::LabelledImages;

    fn read(files: &[(&str, &str)]) -> Result<Listing, String> {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let read = LabelledImages::read(dir.path());
        read.map(|it| it.listing).map_err(|error| error.to_string())
    }

    fn labels(listing: &Listing, split: Split) -> Vec<(&str, usize)> {
        let images = listing.split(split).unwrap().iter();
        images.map(|it| (it.path.as_str(), it.label)).collect()
    }

    #[test]
    fn numbers_are_indices_of_the_names_there_are() {
        let files = [
            ("1.jpg", ""),
            ("1.cls", "2\n"),
            ("0.PNG", ""),
            ("0.cls", "0"),
            ("0.txt", "a cat"),
            ("0.seg.png", ""),
        ];
        let listing = read(&files).unwrap();
        assert_eq!(listing.classes, ["0", "1", "2"]);
        assert_eq!(labels(&listing, Split::Train), [("0.PNG", 0), ("1.jpg", 2)]);
        let named = [&files[..], &[("classnames.txt", "cat\n7\ndog\n")]].concat();
        let listing = read(&named).unwrap();
        assert_eq!(listing.classes, ["cat", "7", "dog"]);
        assert_eq!(labels(&listing, Split::Train), [("0.PNG", 0), ("1.jpg", 2)]);
        let short = [&files[..], &[("classnames.txt", "cat")]].concat();
        let refusal = read(&short).unwrap_err();
        assert_eq!(
            refusal,
            "sample `1.jpg` has the label `2`, which is none of the 1 classes"
        );
    }

    #[test]
    fn names_are_classes_and_a_number_among_them_is_one() {
        let listing = read(&[
            ("train/a.jpg", ""),
            ("train/a.cls", "dog"),
            ("train/b.jpg", ""),
            ("train/b.json", r#"{"label": 9, "x": 1}"#),
            ("test/c.webp", ""),
            ("test/c.json", r#"{"cls": "cat"}"#),
        ]);
        let listing = listing.unwrap();
        assert_eq!(listing.classes, ["9", "cat", "dog"]);
        assert_eq!(
            labels(&listing, Split::Train),
            [("train/a.jpg", 2), ("train/b.jpg", 0)]
        );
        assert_eq!(labels(&listing, Split::Test), [("test/c.webp", 1)]);
    }

    #[test]
    fn a_sample_that_is_not_whole_is_named() {
        let whole = [("0.jpg", ""), ("0.cls", "0")];
        for (more, refusal) in [
            ([("1.jpg", "")], "sample `1` has no label"),
            ([("1.cls", "0")], "sample `1` has a label and no image"),
            ([("0.png", "")], "sample `0` has two images"),
            ([("0.json", r#"{"label": 1}"#)], "sample `0` has two labels"),
            (
                [("1.json", r#"{"label": 1, "cls": "b"}"#)],
                "sample `1.json` has a `label` and another one as `cls`",
            ),
        ] {
            let error = read(&[&whole[..], &more[..]].concat()).unwrap_err();
            assert!(error.starts_with(refusal), "{error}");
        }
        let error = read(&[("0.jpg", ""), ("0.cls", "-1")]).unwrap_err();
        assert!(
            error.starts_with("sample `0.jpg` has the label -1"),
            "{error}"
        );
        let both = read(&[("0.jpg", ""), ("0.json", r#"{"label": 1, "cls": 1}"#)]);
        assert_eq!(both.unwrap().classes, ["0", "1"]);
        let error = read(&[("0.jpg", ""), ("0.cls", " \n")]).unwrap_err();
        assert_eq!(error, "sample `0.cls` is neither a number nor a class name");
        let error = read(&[("0.jpg", ""), ("0.cls", "1000000")]).unwrap_err();
        assert!(error.contains("none of the 100000 classes"), "{error}");
    }

    #[test]
    fn other_layouts_are_left_to_themselves() {
        let listing = read(&[("cat/1.jpg", ""), ("cat/1.cls", "7"), ("cat/2.jpg", "")]).unwrap();
        assert_eq!(listing.classes, ["cat"]);
        // JSON notes beside images are not labels, and images alone are not samples.
        let error = read(&[("1.jpg", ""), ("notes.json", "{}")]).unwrap_err();
        assert!(error.contains("holds no training images"), "{error}");
    }
}

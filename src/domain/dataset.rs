//! Labelled images in a folder or an archive, in the layouts people have, as one listing.
//!
//! * **VTAB-1k list files**: `train800val200.txt` (or `train.txt`), `val200.txt` (or `val.txt`),
//!   `test.txt`; each line is a path relative to the folder, white space, and a label. Class names
//!   come from `meta.json` (`{"classes": [...]}`); without it a class is named by its number.
//! * **Image folder**: `train/<class>/<image>`, `val/…`, `test/…`; without those sub-folders,
//!   `<class>/<image>` is all `train`.
//! * **WebDataset**: [`webdataset`](super::webdataset).
//!
//! Parquet files are no listing of files: see [`parquet`](super::parquet).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::digest::Digest;
use super::files::{Directory, FileError, Files};
use super::webdataset;

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    Train,
    Val,
    Test,
}

impl Split {
    pub const ALL: [Self; 3] = [Self::Train, Self::Val, Self::Test];

    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }

    /// The list files that hold this split; the first that exists is read.
    fn list_files(self) -> [&'static str; 2] {
        match self {
            Self::Train => ["train800val200.txt", "train.txt"],
            Self::Val => ["val200.txt", "val.txt"],
            Self::Test => ["test.txt", "test.txt"],
        }
    }
}

/// Most classes a dataset may have; a label without class names sizes nothing beyond it.
pub const MAX_CLASSES: usize = 100_000;

/// One image and what it shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledImage {
    /// Relative to the dataset's folder, with `/` between parts; never leaves the folder.
    pub path: String,
    /// Index into [`LabelledImages::classes`].
    pub label: usize,
}

/// Which images there are and what they show. Every label is within `classes`; `train` is never
/// empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    pub classes: Vec<String>,
    pub splits: BTreeMap<Split, Vec<LabelledImage>>,
}

/// The listing of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledImages {
    pub root: PathBuf,
    pub listing: Listing,
}

impl Deref for LabelledImages {
    type Target = Listing;

    fn deref(&self) -> &Listing {
        &self.listing
    }
}

/// Largest list file or `meta.json` accepted, in bytes.
const MAX_LIST_BYTES: u64 = 64 << 20;

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

#[derive(Deserialize)]
struct Meta {
    classes: Vec<String>,
}

impl LabelledImages {
    /// Lists a folder in any layout. Images are not opened.
    pub fn read(root: &Path) -> Result<Self, DatasetError> {
        Ok(Self {
            root: root.to_owned(),
            listing: Listing::read(&Directory::new(root))?,
        })
    }

    pub fn image_path(&self, image: &LabelledImage) -> PathBuf {
        self.root.join(&image.path)
    }
}

impl Listing {
    /// Lists files in any layout. Images are not opened.
    pub fn read(files: &dyn Files) -> Result<Self, DatasetError> {
        let listed = if let Some(listed) = Self::read_lists(files)? {
            listed
        } else if let Some(listed) = webdataset::read(files)? {
            listed
        } else {
            Self::read_folders(files)?
        };
        match listed.splits.get(&Split::Train) {
            Some(train) if !train.is_empty() => Ok(listed),
            _ => Err(DatasetError::Empty(files.shown(""))),
        }
    }

    /// The images of a split, in the order of the list file or sorted by path.
    pub fn split(&self, split: Split) -> Result<&[LabelledImage], DatasetError> {
        self.splits
            .get(&split)
            .map(Vec::as_slice)
            .ok_or_else(|| DatasetError::NoSplit {
                wanted: split,
                present: self.splits.keys().copied().collect(),
            })
    }

    /// None without a list of training images.
    fn read_lists(files: &dyn Files) -> Result<Option<Self>, DatasetError> {
        let list_of = |split: Split| {
            let is_there = |file: &&str| files.is_file(file);
            split.list_files().into_iter().find(is_there)
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
        Ok(Some(Self { classes, splits }))
    }

    fn read_folders(files: &dyn Files) -> Result<Self, DatasetError> {
        let mut folders: Vec<(Split, String)> = Split::ALL
            .into_iter()
            .filter(|split| files.is_folder(split.name()))
            .map(|split| (split, format!("{}/", split.name())))
            .collect();
        if folders.is_empty() {
            folders.push((Split::Train, String::new()));
        }
        let mut found: BTreeMap<Split, Vec<(String, String)>> = BTreeMap::new();
        let mut classes = BTreeSet::new();
        for (split, prefix) in folders {
            let images = found.entry(split).or_default();
            let folder = prefix.trim_end_matches('/');
            let failed = |folder: &str, error: io::Error| read_error(files, folder, error.into());
            for class in files.folders(folder).map_err(|e| failed(folder, e))? {
                let folder = format!("{prefix}{class}");
                for name in files.files(&folder).map_err(|e| failed(&folder, e))? {
                    if is_image_name(&name) {
                        images.push((format!("{prefix}{class}/{name}"), class.clone()));
                        classes.insert(class.clone());
                    }
                }
            }
        }
        let classes: Vec<String> = classes.into_iter().collect();
        let label = |class: &String| classes.binary_search(class).expect("collected above");
        let splits = found
            .into_iter()
            .map(|(split, images)| {
                let labelled = images
                    .into_iter()
                    .map(|(path, class)| LabelledImage {
                        label: label(&class),
                        path,
                    })
                    .collect();
                (split, labelled)
            })
            .collect();
        Ok(Self { classes, splits })
    }
}

pub(super) fn read_error(files: &dyn Files, path: &str, source: FileError) -> DatasetError {
    DatasetError::Read {
        path: files.shown(path),
        source,
    }
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

/// Whether a relative path names something under its root, by its text alone.
pub fn stays_inside(path: &str) -> bool {
    use std::path::Component::Normal;
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Normal(_)))
}

/// Whether a name ends as those of images do.
pub fn is_image_name(name: &str) -> bool {
    let extension = Path::new(name)
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or("");
    ["jpg", "jpeg", "png", "bmp", "gif", "webp"]
        .iter()
        .any(|known| extension.eq_ignore_ascii_case(known))
}

/// A seeded, stratified choice of at most `max_samples` of `labels`, as sorted positions.
///
/// Classes keep their share (largest remainder) and every class keeps at least one sample where
/// `max_samples` allows. Within a class the samples with the smallest sha256(seed, position) are
/// taken, so that the choice depends on no random generator's version, and a larger `max_samples`
/// only adds samples to a class.
pub fn stratified_subset(labels: &[usize], max_samples: usize, seed: u64) -> Vec<usize> {
    if labels.len() <= max_samples {
        return (0..labels.len()).collect();
    }
    let mut by_class: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (position, label) in labels.iter().enumerate() {
        by_class.entry(*label).or_default().push(position);
    }
    let key = |position: usize| {
        let mut text = seed.to_le_bytes().to_vec();
        text.extend((position as u64).to_le_bytes());
        Digest::of(&text)
    };
    let sizes: Vec<usize> = by_class.values().map(Vec::len).collect();
    let mut chosen: Vec<usize> = by_class
        .into_values()
        .zip(shares(&sizes, max_samples))
        .flat_map(|(mut positions, share)| {
            positions.sort_by_cached_key(|p| key(*p));
            positions.truncate(share);
            positions
        })
        .collect();
    chosen.sort_unstable();
    chosen
}

/// Splits `total` (less than the sum of `sizes`) in proportion to `sizes`: floor of the exact share
/// (but 1 where that is 0), then one more for the largest remainders; what the ones cost is taken
/// from the largest shares.
fn shares(sizes: &[usize], total: usize) -> Vec<usize> {
    let all: usize = sizes.iter().sum();
    let mut shares: Vec<usize> = sizes.iter().map(|s| (s * total / all).max(1)).collect();
    let mut by_remainder: Vec<usize> = (0..sizes.len()).collect();
    by_remainder.sort_by_key(|&c| (std::cmp::Reverse(sizes[c] * total % all), c));
    for &class in by_remainder.iter().cycle().take(sizes.len() * 2) {
        if shares.iter().sum::<usize>() < total && shares[class] < sizes[class] {
            shares[class] += 1;
        }
    }
    while shares.iter().sum::<usize>() > total {
        let largest = (0..shares.len())
            .rev()
            .max_by_key(|&c| shares[c])
            .expect("not empty");
        shares[largest] -= 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        dir
    }

    #[test]
    fn list_files_are_read_with_their_class_names() {
        let dir = folder(&[
            ("meta.json", r#"{"classes": ["cat", "dog"], "source": "x"}"#),
            (
                "train800val200.txt",
                "images/a b.png 1\nimages/c.png\t0\n\n",
            ),
            ("test.txt", "images/d.png 1\n"),
        ]);
        let set = LabelledImages::read(dir.path()).unwrap();
        assert_eq!(set.classes, ["cat", "dog"]);
        let train = set.split(Split::Train).unwrap();
        assert_eq!(
            (train[0].path.as_str(), train[0].label),
            ("images/a b.png", 1)
        );
        assert_eq!(
            (train[1].path.as_str(), train[1].label),
            ("images/c.png", 0)
        );
        assert_eq!(set.split(Split::Test).unwrap().len(), 1);
        assert_eq!(
            set.split(Split::Val).unwrap_err().to_string(),
            "the dataset has no split `val`; it has `train`, `test`"
        );
    }

    #[test]
    fn image_folders_are_read_with_and_without_splits() {
        let dir = folder(&[("dog/2.jpg", ""), ("cat/1.PNG", ""), ("cat/notes.txt", "")]);
        let set = LabelledImages::read(dir.path()).unwrap();
        assert_eq!(set.classes, ["cat", "dog"]);
        assert_eq!(set.split(Split::Train).unwrap()[1].path, "dog/2.jpg");

        let dir = folder(&[("train/dog/2.jpg", ""), ("test/cat/1.png", "")]);
        let set = LabelledImages::read(dir.path()).unwrap();
        assert_eq!(set.classes, ["cat", "dog"]);
        assert_eq!(set.split(Split::Test).unwrap()[0].label, 0);
    }

    #[test]
    fn a_bad_listing_names_the_line() {
        let refusal = |list: &str| {
            let dir = folder(&[
                ("meta.json", r#"{"classes": ["cat", "dog"]}"#),
                ("train.txt", list),
            ]);
            LabelledImages::read(dir.path()).unwrap_err().to_string()
        };
        assert_eq!(
            refusal("a.png 0\nb.png 2\n"),
            "train.txt:2: label 2 is outside the 2 classes (0..=1)"
        );
        assert_eq!(
            refusal("../../etc/passwd 0\n"),
            "train.txt:1: path `../../etc/passwd` leaves the dataset's folder"
        );
        assert!(refusal("b.png\n").starts_with("train.txt:1: expected `path label`"));
        assert!(refusal("\n").contains("holds no training images"));

        let dir = folder(&[("train.txt", "a.png 1000000000000\n")]);
        let refusal = LabelledImages::read(dir.path()).unwrap_err().to_string();
        assert!(
            refusal.contains("is outside the 100000 classes"),
            "{refusal}"
        );
    }

    #[test]
    fn the_subset_keeps_every_class_and_its_share() {
        let labels: Vec<usize> = (0..1000).map(|i| if i < 5 { 2 } else { i % 2 }).collect();
        let subset = stratified_subset(&labels, 100, 7);
        assert_eq!(subset.len(), 100);
        assert!(subset.is_sorted());
        let count = |class| subset.iter().filter(|&&i| labels[i] == class).count();
        assert_eq!(count(2), 1);
        assert!(count(0).abs_diff(count(1)) <= 1);
        assert_eq!(subset, stratified_subset(&labels, 100, 7));
        assert_ne!(subset, stratified_subset(&labels, 100, 8));
        assert_eq!(
            stratified_subset(&labels[..10], 100, 7),
            (0..10).collect::<Vec<_>>()
        );
    }
}

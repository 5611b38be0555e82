//! Labelled images in a folder or an archive, in the layouts people have, as one listing.
//!
//! * **VTAB-1k list files**: `train800val200.txt` (or `train.txt`), `val200.txt` (or `val.txt`),
//!   `test.txt`; each line is a path relative to the folder, white space, and a label. Class names
//!   come from `meta.json` (`{"classes": [...]}`); without it a class is named by its number.
//! * **Image folder**: `train/<class>/<image>`, `val/…`, `test/…`; without those sub-folders,
//!   `<class>/<image>` is all `train`.
//! * **WebDataset**: [`webdataset`].
//!
//! Parquet files are no listing of files: see [`parquet`](crate::parquet).

mod error;
mod folders;
pub mod labels;
mod listing;
mod lists;
mod webdataset;

use std::path::{Path, PathBuf};

use promptweave_domain::split::Split;

pub use self::error::DatasetError;
pub use self::listing::{LabelledImage, LabelledImages, Listing, MAX_CLASSES};
use crate::files::{Directory, Files};

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
        let listed = if let Some(listed) = lists::read(files)? {
            listed
        } else if let Some(listed) = webdataset::read(files)? {
            listed
        } else {
            folders::read(files)?
        };
        match listed.splits.get(&Split::Train) {
            Some(train) if !train.is_empty() => Ok(listed),
            _ => Err(DatasetError::Empty(files.shown(""))),
        }
    }
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
}

//! The images of a dataset with their labels.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;

use crate::dataset::error::DatasetError;
use promptweave_domain::split::Split;

/// The most classes that a dataset may have. Without class names, a large label must not make the
/// list of classes larger.
pub const MAX_CLASSES: usize = 100_000;

/// One image with its label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledImage {
    /// Path relative to the dataset's folder, with `/` between parts. It never leaves the folder.
    pub path: String,
    /// Index into the dataset's `classes`.
    pub label: usize,
}

/// The images of a dataset with their labels. Every label is within `classes`, and `train` is never
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

impl Listing {
    /// The images of a split, in the order of the list file, or sorted by path.
    pub fn split(&self, split: Split) -> Result<&[LabelledImage], DatasetError> {
        self.splits
            .get(&split)
            .map(Vec::as_slice)
            .ok_or_else(|| DatasetError::NoSplit {
                wanted: split,
                present: self.splits.keys().copied().collect(),
            })
    }
}

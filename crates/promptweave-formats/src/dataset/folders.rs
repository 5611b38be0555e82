//! The image folder layout: `train/<class>/<image>`, or `<class>/<image>` alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use promptweave_domain::split::Split;

use crate::dataset::error::{DatasetError, read_error};
use crate::dataset::listing::{LabelledImage, Listing};
use crate::files::{Files, is_image_name};

/// Lists an image folder. Its classes are the folders' names, sorted.
pub fn read(files: &dyn Files) -> Result<Listing, DatasetError> {
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
    Ok(Listing { classes, splits })
}

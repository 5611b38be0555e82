//! Which files belong to a dataset, and to which split.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::files::{Directory, Files as _};
use promptweave_domain::split::Split;

/// The folder in which repositories keep their files.
const DATA: &str = "data";

/// A file to be read, with the split of its images.
#[derive(Debug)]
pub struct Shard {
    pub split: Split,
    /// The name in errors.
    pub name: String,
    pub file: File,
}

/// The Parquet files of a folder that form a dataset; empty if there are none.
pub fn shards(dir: &Path) -> io::Result<Vec<Shard>> {
    let files = Directory::new(dir);
    let mut names = files.files("")?;
    for folder in files.folders("")? {
        let inside = |name: String| format!("{folder}/{name}");
        names.extend(files.files(&folder)?.into_iter().map(inside));
        if folder == DATA {
            for inner in files.folders(&folder)? {
                let inner = format!("{folder}/{inner}");
                let names_inside = files.files(&inner)?.into_iter();
                names.extend(names_inside.map(|name| format!("{inner}/{name}")));
            }
        }
    }
    let opened = choose(&names).into_iter().map(|(split, name)| {
        let file = File::open(files.shown(&name))?;
        Ok(Shard { split, name, file })
    });
    opened.collect()
}

/// Chooses the files that belong to the dataset: those in the outermost folder or in its folder
/// `data`, and in folders of splits there. Files of unknown splits are ignored. If no file names a
/// split, all are `train`.
pub fn choose(names: &[String]) -> Vec<(Split, String)> {
    let of = |base: &str| -> Vec<(Option<Split>, String)> {
        let parquet = names.iter().filter(|name| name.ends_with(".parquet"));
        let found = parquet.filter_map(|name| match name.strip_prefix(base)?.split_once('/') {
            None => Some((split(&name[base.len()..]), name.clone())),
            Some((folder, inner)) if !inner.contains('/') => {
                Some((Some(split(folder)?), name.clone()))
            }
            Some(_) => None,
        });
        found.collect()
    };
    let mut found = of("");
    if found.is_empty() {
        found = of(&format!("{DATA}/"));
    }
    let any = found.iter().any(|(split, _)| split.is_some());
    let of_a_split = |(split, name)| match split {
        None if !any => Some((Split::Train, name)),
        split => split.map(|split| (split, name)),
    };
    found.into_iter().filter_map(of_a_split).collect()
}

/// The split that a file's or folder's name tells.
fn split(name: &str) -> Option<Split> {
    let word = name.split(['-', '.', '_']).next()?;
    match word.to_ascii_lowercase().as_str() {
        "train" | "training" => Some(Split::Train),
        "validation" | "valid" | "val" | "dev" => Some(Split::Val),
        "test" | "testing" => Some(Split::Test),
        _ => None,
    }
}

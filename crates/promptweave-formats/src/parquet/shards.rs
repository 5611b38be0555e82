//! Which files are a dataset, and what the images of each are for.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::files::{Directory, Files as _};
use promptweave_domain::split::Split;

/// Where repositories keep their files.
const DATA: &str = "data";

/// A file to be read, and what its images are for.
#[derive(Debug)]
pub struct Shard {
    pub split: Split,
    /// In errors.
    pub name: String,
    pub file: File,
}

/// The files of a folder that are a dataset of this kind; none where there are none.
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

/// Which of these files are the dataset: those of the outermost folder, or of its folder `data`, and in
/// folders of splits there. Files of other splits than ours are left alone; where no file is of any, all are
/// `train`.
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

/// What a file's or folder's name says that it is for.
fn split(name: &str) -> Option<Split> {
    let word = name.split(['-', '.', '_']).next()?;
    match word.to_ascii_lowercase().as_str() {
        "train" | "training" => Some(Split::Train),
        "validation" | "valid" | "val" | "dev" => Some(Split::Val),
        "test" | "testing" => Some(Split::Test),
        _ => None,
    }
}

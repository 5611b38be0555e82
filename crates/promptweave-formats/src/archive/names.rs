//! The names in an archive, checked one by one, and the folders that they make.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::{Component, Path};

use crate::error::ArchiveError;
use crate::error::{MAX_ENTRIES, MAX_NAME};
use crate::files::{is_image_name, stays_inside};
use promptweave_domain::split::Split;

/// The place of a file's bytes: an offset in a tar, or a position in a zip's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub at: u64,
    /// The size in bytes.
    pub size: u64,
}

#[derive(Debug, Default)]
pub struct Names {
    files: BTreeMap<String, Place>,
    /// Number of entries, including folders and those passed over.
    entries: usize,
}

const ARCHIVES: [&str; 9] = ["zip", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar", "tar"];

impl Names {
    /// Counts an entry, before anything else of it is looked at.
    pub fn count(&mut self) -> Result<(), ArchiveError> {
        self.entries += 1;
        match self.entries > MAX_ENTRIES {
            true => Err(ArchiveError::TooManyEntries),
            false => Ok(()),
        }
    }

    /// Adds a file under a name that [`checked`] has accepted.
    pub fn add(&mut self, name: String, place: Place) -> Result<(), ArchiveError> {
        let extension = Path::new(&name).extension().and_then(|e| e.to_str());
        if extension.is_some_and(|e| ARCHIVES.iter().any(|known| e.eq_ignore_ascii_case(known))) {
            return Err(ArchiveError::Nested(name));
        }
        // File managers leave such files behind.
        if name
            .split('/')
            .any(|part| part.starts_with('.') || part == "__MACOSX")
        {
            return Ok(());
        }
        if self.files.contains_key(&name) {
            return Err(ArchiveError::Twice(name));
        }
        self.files.insert(name, place);
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<Place> {
        self.files.get(name).copied()
    }

    pub fn is_folder(&self, name: &str) -> bool {
        let prefix = format!("{name}/");
        let first = self.files.range(prefix.clone()..).next();
        first.is_some_and(|(name, _)| name.starts_with(&prefix))
    }

    /// Names of the folders directly in a folder, sorted.
    pub fn folders(&self, folder: &str) -> Vec<String> {
        self.sorted(folder, true)
    }

    /// Names of the files directly in a folder, sorted.
    pub fn files(&self, folder: &str) -> Vec<String> {
        self.sorted(folder, false)
    }

    /// Sorts by names alone, as a directory does, without the `/` that follows them here.
    fn sorted(&self, folder: &str, folders: bool) -> Vec<String> {
        let parts = self.parts(folder).into_iter();
        let mut names: Vec<String> = parts
            .filter_map(|(part, is_folder)| (is_folder == folders).then_some(part))
            .collect();
        names.sort_unstable();
        names
    }

    /// The folder that contains everything, with a `/` at the end; people pack a dataset together
    /// with its folder. It is not a folder that holds images itself, nor one named like a split.
    pub fn top(&self) -> String {
        let mut top = String::new();
        loop {
            let parts = self.parts(&top);
            let [(only, true)] = parts.as_slice() else {
                return top;
            };
            let is_split = Split::ALL.iter().any(|split| split.name() == only);
            let inner = format!("{top}{only}/");
            if is_split || self.files(&inner).iter().any(|name| is_image_name(name)) {
                return top;
            }
            top = inner;
        }
    }

    /// The entries directly in a folder, and whether each is a folder. A name may be both.
    fn parts(&self, folder: &str) -> Vec<(String, bool)> {
        let prefix = match folder.trim_end_matches('/') {
            "" => String::new(),
            folder => format!("{folder}/"),
        };
        let mut parts = Vec::new();
        let mut from = Bound::Included(prefix.clone());
        while let Some((name, _)) = self.files.range((from, Bound::Unbounded)).next() {
            let Some(rest) = name.strip_prefix(&prefix) else {
                break;
            };
            from = match rest.split_once('/') {
                // Skips everything in the folder: `0` comes after `/`.
                Some((part, _)) => {
                    parts.push((part.to_owned(), true));
                    Bound::Included(format!("{prefix}{part}0"))
                }
                None => {
                    parts.push((rest.to_owned(), false));
                    Bound::Excluded(name.clone())
                }
            };
        }
        parts
    }
}

/// A name as errors show it.
pub fn shown(raw: &[u8]) -> String {
    let text = String::from_utf8_lossy(raw);
    text.chars()
        .take(256)
        .flat_map(char::escape_debug)
        .collect()
}

/// Checks an entry's name, and returns its normal form; empty for the outermost folder.
pub fn checked(raw: &[u8]) -> Result<String, ArchiveError> {
    if raw.len() > MAX_NAME {
        return Err(ArchiveError::NameTooLong(shown(raw)));
    }
    let Ok(name) = std::str::from_utf8(raw) else {
        return Err(ArchiveError::NotUtf8(shown(raw)));
    };
    let mut rest = name;
    while let Some(inner) = rest.strip_prefix("./") {
        rest = inner.trim_start_matches('/');
    }
    if rest.is_empty() && !name.is_empty() || rest == "." {
        return Ok(String::new());
    }
    if !stays_inside(rest) || rest.contains('\\') || rest.contains(char::is_control) {
        return Err(ArchiveError::Outside(shown(raw)));
    }
    Ok(normal(rest))
}

/// The normal form of a name: `a//b/./c/` is `a/b/c`.
pub fn normal(name: &str) -> String {
    let parts: Vec<&str> = Path::new(name)
        .components()
        .filter_map(|part| match part {
            Component::Normal(part) => part.to_str(),
            _ => None,
        })
        .collect();
    parts.join("/")
}

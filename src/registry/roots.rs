//! Directories that the operator opened for registration.
//!
//! A client's name is compared, part by part, with the server's own listing; it is never joined to a path. `..`, an
//! absolute path or any encoding of them is in no listing, so nothing needs to be filtered.

use std::fs;
use std::path::{Path, PathBuf};

/// The operator's roots (`--dataset-root`, `--backbone-root`).
#[derive(Clone, Debug, Default)]
pub struct AllowedRoots(Vec<PathBuf>);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownDirectory {
    #[error("the operator opened no directory to register from")]
    NoRoots,
    #[error("there is no directory `{name}` to register from; there are {}", listed(.there))]
    NotListed { name: String, there: Vec<String> },
}

fn listed(names: &[String]) -> String {
    const SHOWN: usize = 20;
    match names {
        [] => "none".to_owned(),
        _ => {
            let shown: Vec<_> = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect();
            let more = if names.len() > SHOWN { ", …" } else { "" };
            format!("{}{more}", shown.join(", "))
        }
    }
}

impl AllowedRoots {
    pub fn new(roots: Vec<PathBuf>) -> Self {
        Self(roots)
    }

    /// The directory that `name` (`food`, `vtab/dtd`) names under the first root that has it.
    pub fn find(&self, name: &str) -> Result<PathBuf, UnknownDirectory> {
        if self.0.is_empty() {
            return Err(UnknownDirectory::NoRoots);
        }
        let found = self.0.iter().find_map(|root| {
            name.split('/').try_fold(root.clone(), |dir, part| {
                directories(&dir)
                    .into_iter()
                    .find_map(|(name, path)| (name == part).then_some(path))
            })
        });
        found.ok_or_else(|| {
            let mut there: Vec<String> = self
                .0
                .iter()
                .flat_map(|root| directories(root))
                .map(|(name, _)| name)
                .collect();
            there.sort_unstable();
            UnknownDirectory::NotListed {
                name: name.to_owned(),
                there,
            }
        })
    }
}

/// The directories in `dir`; an operator's link to a directory counts as one.
fn directories(dir: &Path) -> Vec<(String, PathBuf)> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_directories_are_found() {
        let base = tempfile::tempdir().unwrap();
        let root = base.path().join("root");
        fs::create_dir_all(root.join("vtab/dtd")).unwrap();
        fs::create_dir_all(base.path().join("secret")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        let roots = AllowedRoots::new(vec![root.clone()]);
        assert_eq!(roots.find("vtab"), Ok(root.join("vtab")));
        assert_eq!(roots.find("vtab/dtd"), Ok(root.join("vtab/dtd")));
        let absolute = base.path().join("secret");
        for name in [
            "../secret",
            "vtab/../../secret",
            "%2e%2e/secret",
            "..",
            ".",
            "",
            "vtab//dtd",
            "/vtab",
            "file",
            "vtab\0",
            absolute.to_str().unwrap(),
        ] {
            let error = roots.find(name).unwrap_err().to_string();
            assert!(error.ends_with("there are `vtab`"), "{name}: {error}");
        }
        assert_eq!(
            AllowedRoots::default().find("vtab"),
            Err(UnknownDirectory::NoRoots)
        );
    }
}

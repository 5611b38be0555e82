//! The tar that contains an adapter. Nothing is unpacked. Files are found by their names, the
//! folders they lie in do not matter, and the result refers to the archive's own bytes.

use std::io;
use std::ops::Range;

use tar::EntryType;

use crate::peft::{Adapter, CONFIG_FILE, MODEL_FILE};
use promptweave_domain::foreign_format;
use promptweave_domain::foreign_format::ForeignFormat;

/// The most entries looked at; an adapter's folder has three or four.
const MAX_ENTRIES: usize = 64;
const PICKLED: &str = "adapter_model.bin";

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("the body is {}, expected a tar archive of an adapter's folder (`tar -c -C DIR .`)", .0.name)]
    Foreign(ForeignFormat),
    #[error("the body is not a tar archive")]
    NotTar(#[source] io::Error),
    #[error("the archive has more than {MAX_ENTRIES} entries; send an adapter's folder alone")]
    TooManyEntries,
    #[error("`{0}` is neither a file nor a folder; an adapter has no links")]
    NotAFile(String),
    #[error("the archive has `{0}` more than once; send one adapter's folder alone")]
    Twice(&'static str),
    #[error("the archive has no `{0}`")]
    Missing(&'static str),
    #[error(
        "the archive has its weights in `{PICKLED}`, a pickle, which runs code when it is loaded; \
         save the adapter with `save_pretrained(…, safe_serialization=True)`"
    )]
    Pickled,
}

/// The places of an adapter's two files in the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub config: Range<usize>,
    pub model: Range<usize>,
}

/// Finds the two files of an adapter.
pub fn find(bytes: &[u8]) -> Result<Found, ArchiveError> {
    let mut archive = tar::Archive::new(bytes);
    let (mut config, mut model, mut pickled) = (None, None, false);
    let not_tar = |error| match foreign_format::recognise(bytes) {
        Some(format) if format.name != "a tar archive" => ArchiveError::Foreign(format),
        _ => ArchiveError::NotTar(error),
    };
    for (index, entry) in archive.entries().map_err(not_tar)?.enumerate() {
        let entry = entry.map_err(not_tar)?;
        if index == MAX_ENTRIES {
            return Err(ArchiveError::TooManyEntries);
        }
        let path = entry.path_bytes();
        let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
        match entry.header().entry_type() {
            EntryType::Directory => continue,
            EntryType::Regular => {}
            _ => {
                let path = String::from_utf8_lossy(&path).chars().take(256).collect();
                return Err(ArchiveError::NotAFile(path));
            }
        }
        let start = entry.raw_file_position();
        let range = start as usize..start.saturating_add(entry.size()) as usize;
        if bytes.get(range.clone()).is_none() {
            return Err(not_tar(io::ErrorKind::UnexpectedEof.into()));
        }
        let (wanted, file) = match name {
            name if name == CONFIG_FILE.as_bytes() => (&mut config, CONFIG_FILE),
            name if name == MODEL_FILE.as_bytes() => (&mut model, MODEL_FILE),
            name => {
                pickled |= name == PICKLED.as_bytes();
                continue;
            }
        };
        if wanted.replace(range).is_some() {
            return Err(ArchiveError::Twice(file));
        }
    }
    match (config, model) {
        (Some(config), Some(model)) => Ok(Found { config, model }),
        (_, None) if pickled => Err(ArchiveError::Pickled),
        (_, None) => Err(ArchiveError::Missing(MODEL_FILE)),
        (None, _) => Err(ArchiveError::Missing(CONFIG_FILE)),
    }
}

/// Packs an adapter's folder as a tar. The same adapter gives the same bytes.
pub fn pack(adapter: &Adapter) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in [(CONFIG_FILE, &adapter.config), (MODEL_FILE, &adapter.model)] {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        tar.append_data(&mut header, name, bytes.as_slice())
            .expect("memory takes everything");
    }
    tar.into_inner().expect("memory takes everything")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(entries: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, kind, bytes) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_size(bytes.len() as u64);
            // A hostile archive has such names; the crate's own setters refuse them.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            tar.append(&header, *bytes).unwrap();
        }
        tar.into_inner().unwrap()
    }

    #[test]
    fn what_is_packed_is_found() {
        let adapter = Adapter {
            config: b"{}".to_vec(),
            model: vec![7; 1000],
        };
        let bytes = pack(&adapter);
        assert_eq!(bytes, pack(&adapter));
        let found = find(&bytes).unwrap();
        assert_eq!(bytes[found.config], adapter.config);
        assert_eq!(bytes[found.model], adapter.model);
    }

    #[test]
    fn names_count_and_folders_do_not() {
        use EntryType::{Directory, Regular};
        let bytes = tar_of(&[
            ("./", Directory, b""),
            ("/etc/adapter_config.json", Regular, b"{}"),
            ("../../._adapter_config.json", Regular, b"resource fork"),
            ("a/README.md", Regular, b"readme"),
            ("../a/adapter_model.safetensors", Regular, b"model"),
        ]);
        let found = find(&bytes).unwrap();
        assert_eq!(&bytes[found.config], b"{}");
        assert_eq!(&bytes[found.model], b"model");
    }

    #[test]
    fn what_is_no_adapter_is_refused() {
        use ArchiveError as E;
        use EntryType::{Fifo, GNUSparse, Link, Regular, Symlink};
        let (config, model) = ("adapter_config.json", "adapter_model.safetensors");
        for kind in [Symlink, Link, Fifo, GNUSparse] {
            let refused = find(&tar_of(&[(config, Regular, b"{}"), (model, kind, b"")]));
            assert!(
                matches!(refused, Err(E::NotAFile(_) | E::NotTar(_))),
                "{refused:?}"
            );
        }
        let twice = [
            (config, Regular, &b"{}"[..]),
            ("b/adapter_config.json", Regular, b"{}"),
        ];
        assert!(matches!(find(&tar_of(&twice)), Err(E::Twice(name)) if name == config));
        let pickled = [
            (config, Regular, &b"{}"[..]),
            (PICKLED, Regular, b"\x80\x02"),
        ];
        assert!(matches!(find(&tar_of(&pickled)), Err(E::Pickled)));
        let one = tar_of(&[(config, Regular, b"{}")]);
        assert!(matches!(find(&one), Err(E::Missing(name)) if name == model));
        let many = vec![("x", Regular, &b""[..]); MAX_ENTRIES + 1];
        assert!(matches!(find(&tar_of(&many)), Err(E::TooManyEntries)));
        assert!(matches!(find(b"\x1f\x8b\x08"), Err(E::Foreign(f)) if f.name == "gzip data"));
        assert!(matches!(find(b"{}"), Err(E::NotTar(_) | E::Missing(_))));
    }

    #[test]
    fn a_file_that_ends_early_is_refused() {
        let whole = tar_of(&[
            ("adapter_config.json", EntryType::Regular, b"{}"),
            ("adapter_model.safetensors", EntryType::Regular, &[1; 600]),
        ]);
        for length in [1100, 1600, 2000] {
            assert!(find(&whole[..length]).is_err(), "{length}");
        }
    }
}

//! The entries of a tar, read header by header. Long names and attributes are read here from their
//! own entries, with limits that the crate does not have.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use tar::{Archive, EntryType, PaxExtensions};

use crate::archive::names;

use crate::archive::names::{Names, Place};
use crate::error::ArchiveError;
use crate::error::MAX_NAME;

/// Largest entry, in bytes, that describes the next one.
const MAX_ATTRIBUTES: u64 = 64 << 10;

/// What earlier entries said about the entry to come.
#[derive(Default)]
struct Coming {
    name: Option<Vec<u8>>,
    /// The kinds of entries that described it; each kind may occur once.
    seen: Vec<EntryType>,
}

pub fn index(file: &File) -> Result<Names, ArchiveError> {
    let length = file.metadata().map_err(ArchiveError::Read)?.len();
    let mut archive = Archive::new(Skipping::new(file).map_err(ArchiveError::Read)?);
    let mut found = Names::default();
    let mut coming = Coming::default();
    for entry in archive.entries_with_seek().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        let kind = entry.header().entry_type();
        let raw = match &coming.name {
            Some(name) => name.clone(),
            None => entry.path_bytes().into_owned(),
        };
        let (at, size) = (entry.raw_file_position(), entry.size());
        if at.saturating_add(size) > length {
            let name = names::shown(&raw);
            return Err(ArchiveError::Truncated { name, size });
        }
        match kind {
            EntryType::GNULongName | EntryType::XHeader | EntryType::GNULongLink => {
                if size > MAX_ATTRIBUTES || coming.seen.contains(&kind) {
                    return Err(ArchiveError::Attributes(names::shown(&raw)));
                }
                let mut bytes = Vec::with_capacity(size as usize);
                entry.read_to_end(&mut bytes).map_err(damaged)?;
                coming.seen.push(kind);
                coming.take(kind, bytes, &raw)?;
                continue;
            }
            EntryType::XGlobalHeader => {
                found.count()?;
                continue;
            }
            _ => {}
        }
        found.count()?;
        coming = Coming::default();
        match kind {
            EntryType::Regular => {
                let name = names::checked(&raw)?;
                if name.is_empty() {
                    return Err(ArchiveError::Outside(names::shown(&raw)));
                }
                found.add(name, Place { at, size })?;
            }
            EntryType::Directory => {
                names::checked(&raw)?;
            }
            kind => {
                let (name, kind) = (names::shown(&raw), said(kind));
                return Err(ArchiveError::NotAFile { name, kind });
            }
        }
    }
    Ok(found)
}

/// A reader that reads ahead, and keeps what it read if little is skipped. `BufReader` would read
/// it again, which takes most of the time for small files.
struct Skipping<'a> {
    buffer: BufReader<&'a File>,
    at: u64,
}

impl<'a> Skipping<'a> {
    fn new(mut file: &'a File) -> io::Result<Self> {
        file.rewind()?;
        let buffer = BufReader::with_capacity(64 << 10, file);
        Ok(Self { buffer, at: 0 })
    }
}

impl Read for Skipping<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.buffer.read(into)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Skipping<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = match to {
            SeekFrom::Current(by) => {
                self.buffer.seek_relative(by)?;
                let to = self.at.checked_add_signed(by);
                to.ok_or(io::ErrorKind::InvalidInput)?
            }
            to => self.buffer.seek(to)?,
        };
        Ok(self.at)
    }
}

impl Coming {
    fn take(
        &mut self,
        kind: EntryType,
        mut bytes: Vec<u8>,
        raw: &[u8],
    ) -> Result<(), ArchiveError> {
        match kind {
            EntryType::GNULongName => {
                while bytes.last() == Some(&0) {
                    bytes.pop();
                }
                self.name = Some(bytes);
            }
            EntryType::XHeader => {
                for attribute in PaxExtensions::new(&bytes) {
                    let attribute = attribute.map_err(damaged)?;
                    let (key, value) = (attribute.key_bytes(), attribute.value_bytes());
                    if key == b"path" {
                        self.name = Some(value.to_owned());
                    } else if key == b"size" || key.starts_with(b"GNU.sparse") {
                        return Err(ArchiveError::Attributes(names::shown(raw)));
                    }
                }
            }
            _ => {}
        }
        if let Some(name) = &self.name
            && name.len() > MAX_NAME
        {
            return Err(ArchiveError::NameTooLong(names::shown(name)));
        }
        Ok(())
    }
}

fn damaged(error: io::Error) -> ArchiveError {
    ArchiveError::Damaged(error.into())
}

fn said(kind: EntryType) -> &'static str {
    match kind {
        EntryType::Link => "a hard link",
        EntryType::Symlink => "a symbolic link",
        EntryType::Char | EntryType::Block => "a device",
        EntryType::Fifo => "a pipe",
        EntryType::GNUSparse => "a sparse file",
        _ => "of a kind that is not known",
    }
}

//! An uploaded archive as [`Files`], with an index of the places of its files. It is never unpacked, and
//! no name in it becomes a path.
//!
//! ```text
//! tar, zip ─────────────────────────► index of names ─► one file's bytes at a time
//! tar.gz ─► its tar beside it, with ▲
//!           a limit on what it grows to
//! ```
//! The archive's maker may be hostile. Names that leave the archive, links, devices, entries that hold
//! more than they declare, and archives that grow without end are refused before any image is read. The
//! error has the entry's name and the rule.

mod names;
mod tarball;
mod zipfile;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use self::names::{Names, Place};
use self::zipfile::ZipFile;
use crate::error::{ArchiveError, FileError, MAX_RATIO};

use crate::files::Files;

pub const RATIO_SLACK: u64 = 64 << 20;

/// The format of an upload, recognised by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Tar,
    Gzip,
    Zip,
}

impl Format {
    /// Number of bytes that [`recognise`](Self::recognise) looks at.
    pub const MAGIC_BYTES: usize = 512;

    pub fn recognise(start: &[u8]) -> Option<Self> {
        if start.get(257..262) == Some(b"ustar") {
            Some(Self::Tar)
        } else if start.starts_with(b"\x1f\x8b\x08") {
            Some(Self::Gzip)
        } else if start.starts_with(b"PK\x03\x04") || start.starts_with(b"PK\x05\x06") {
            Some(Self::Zip)
        } else {
            None
        }
    }
}

/// An archive whose every entry has been checked.
pub struct Archive {
    names: Names,
    /// The folder that contains all names, and is left out of them: `""`, or it ends with `/`.
    top: String,
    store: Store,
}

enum Store {
    Tar(File),
    Zip(ZipFile),
}

impl Archive {
    /// Opens a tar, tar.gz or zip that unpacks to at most `max_bytes`. A tar.gz is unpacked into an
    /// unnamed file in `scratch_dir`.
    pub fn open(file: File, max_bytes: u64, scratch_dir: &Path) -> Result<Self, ArchiveError> {
        let file = match format_of(&file)? {
            Format::Gzip => {
                let inflated = inflate(&file, max_bytes, scratch_dir)?;
                match format_of(&inflated)? {
                    Format::Tar => inflated,
                    _ => return Err(ArchiveError::Unrecognised),
                }
            }
            _ => file,
        };
        let (names, store) = match format_of(&file)? {
            Format::Zip => {
                let (names, zip) = ZipFile::open(file, max_bytes)?;
                (names, Store::Zip(zip))
            }
            _ => (tarball::index(&file)?, Store::Tar(file)),
        };
        Ok(Self {
            top: names.top(),
            names,
            store,
        })
    }

    /// Writes a file's bytes to `out`, at most `max` of them, piece by piece.
    pub fn copy(&self, path: &str, max: u64, out: &mut File) -> Result<(), FileError> {
        let (name, place) = self.place(path, max)?;
        match &self.store {
            Store::Tar(file) => {
                let mut buffer = vec![0; 1 << 20];
                let mut copied = 0;
                while copied < place.size {
                    let piece = (place.size - copied).min(buffer.len() as u64) as usize;
                    file.read_exact_at(&mut buffer[..piece], place.at + copied)?;
                    out.write_all(&buffer[..piece])?;
                    copied += piece as u64;
                }
                Ok(())
            }
            Store::Zip(zip) => zip.copy(&name, place, out),
        }
    }

    /// The place of a file with at most `max` bytes, and its normal name.
    fn place(&self, path: &str, max: u64) -> Result<(String, Place), FileError> {
        let name = names::normal(&self.full(path));
        let place = self.names.get(&name).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, "the archive has no such file")
        })?;
        let size = place.size;
        if size > max {
            return Err(FileError::TooLarge { size, max });
        }
        Ok((name, place))
    }

    fn full(&self, path: &str) -> String {
        format!("{}{path}", self.top)
    }
}

impl Files for Archive {
    fn is_file(&self, path: &str) -> bool {
        self.names.get(&self.full(path)).is_some()
    }

    fn is_folder(&self, path: &str) -> bool {
        self.names.is_folder(&self.full(path))
    }

    fn folders(&self, folder: &str) -> io::Result<Vec<String>> {
        Ok(self.names.folders(&self.full(folder)))
    }

    fn files(&self, folder: &str) -> io::Result<Vec<String>> {
        Ok(self.names.files(&self.full(folder)))
    }

    fn read(&self, path: &str, max: u64) -> Result<Vec<u8>, FileError> {
        let (name, place) = self.place(path, max)?;
        match &self.store {
            Store::Tar(file) => {
                let mut bytes = vec![0; place.size as usize];
                file.read_exact_at(&mut bytes, place.at)?;
                Ok(bytes)
            }
            Store::Zip(zip) => zip.read(&name, place),
        }
    }

    fn shown(&self, path: &str) -> PathBuf {
        match path {
            "" => "the archive".into(),
            path => path.into(),
        }
    }
}

fn format_of(file: &File) -> Result<Format, ArchiveError> {
    let mut start = [0; Format::MAGIC_BYTES];
    let mut filled = 0;
    while filled < start.len() {
        match file.read_at(&mut start[filled..], filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) => return Err(ArchiveError::Read(error)),
        }
    }
    Format::recognise(&start[..filled]).ok_or(ArchiveError::Unrecognised)
}

/// A reader that counts the bytes taken from it.
struct Counted<R> {
    reader: R,
    count: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.count += read as u64;
        Ok(read)
    }
}

/// Unpacks a gzip file. The ratio is checked on the way, so that a bomb is recognised by its first
/// part.
fn inflate(file: &File, max_bytes: u64, scratch_dir: &Path) -> Result<File, ArchiveError> {
    let packed = Counted {
        reader: file,
        count: 0,
    };
    let mut unpacking = MultiGzDecoder::new(packed);
    let mut out = tempfile::tempfile_in(scratch_dir).map_err(ArchiveError::Read)?;
    let mut buffer = vec![0; 1 << 18];
    let mut size = 0;
    loop {
        let read = match unpacking.read(&mut buffer) {
            Ok(0) => return Ok(out),
            Ok(read) => read,
            Err(error) => return Err(ArchiveError::Damaged(error.into())),
        };
        size += read as u64;
        if size > max_bytes {
            return Err(ArchiveError::TooLarge(max_bytes));
        }
        if grows_too_much(size, unpacking.get_ref().count) {
            return Err(ArchiveError::Ratio);
        }
        out.write_all(&buffer[..read]).map_err(ArchiveError::Read)?;
    }
}

fn grows_too_much(unpacked: u64, packed: u64) -> bool {
    unpacked > packed.saturating_mul(MAX_RATIO).saturating_add(RATIO_SLACK)
}

//! The entries of a zip, from its central directory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Read as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use crate::archive::names;

use crate::archive::grows_too_much;
use crate::archive::names::{Names, Place};
use crate::error::ArchiveError;
use crate::error::FileError;
use crate::error::MAX_ENTRIES;

pub struct ZipFile(Mutex<ZipArchive<BufReader<File>>>);

impl ZipFile {
    pub fn open(file: File, max_bytes: u64) -> Result<(Names, Self), ArchiveError> {
        // The crate keeps all entries in memory, so they are counted before it sees them.
        let declared = declared_entries(&file).map_err(ArchiveError::Read)?;
        if declared > MAX_ENTRIES as u64 {
            return Err(ArchiveError::TooManyEntries);
        }
        let length = file.metadata().map_err(ArchiveError::Read)?.len();
        let zip = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
        // The crate's map has one entry for each name.
        if zip.metadata().has_duplicate_names() {
            let start = zip.offset() + zip.central_directory_start();
            return Err(ArchiveError::Twice(twice(zip.into_inner(), start)));
        }
        let metadata = zip.metadata();
        let mut found = Names::default();
        let mut unpacked = 0u64;
        for index in 0..zip.len() {
            found.count()?;
            let entry = metadata.entry(index).map_err(damaged)?;
            let raw = entry.name_raw().to_owned();
            let shown = || names::shown(&raw);
            let (size, is_dir) = (entry.size(), entry.is_dir());
            if let Some(kind) = irregular(entry.unix_mode()) {
                let name = shown();
                return Err(ArchiveError::NotAFile { name, kind });
            }
            if entry.encrypted() {
                return Err(ArchiveError::Encrypted(shown()));
            }
            let known = [CompressionMethod::Stored, CompressionMethod::Deflated];
            if !known.contains(&entry.compression()) {
                return Err(ArchiveError::Compression(shown()));
            }
            if entry.compressed_size() > length {
                let (name, size) = (shown(), entry.compressed_size());
                return Err(ArchiveError::Truncated { name, size });
            }
            unpacked = unpacked.saturating_add(size);
            if unpacked > max_bytes {
                return Err(ArchiveError::TooLarge(max_bytes));
            }
            if grows_too_much(unpacked, length) {
                return Err(ArchiveError::Ratio);
            }
            let name = names::checked(&raw)?;
            if !is_dir {
                if name.is_empty() {
                    return Err(ArchiveError::Outside(shown()));
                }
                let at = index as u64;
                found.add(name, Place { at, size })?;
            }
        }
        Ok((found, Self(Mutex::new(zip))))
    }

    pub fn read(&self, name: &str, place: Place) -> Result<Vec<u8>, FileError> {
        // No memory is reserved for a size that an entry merely declares.
        let mut bytes = Vec::new();
        self.copy(name, place, &mut bytes)?;
        Ok(bytes)
    }

    pub fn copy(&self, name: &str, place: Place, out: &mut impl Write) -> Result<(), FileError> {
        let mut zip = self.0.lock().expect("nobody panics with the lock held");
        let entry = zip.by_index(place.at as usize).map_err(damaged)?;
        // One byte more than declared is one too many.
        let mut entry = entry.take(place.size + 1);
        let mut buffer = vec![0; 1 << 16];
        let mut copied = 0;
        loop {
            match entry.read(&mut buffer) {
                Ok(0) if copied == place.size => return Ok(()),
                Ok(read) if read > 0 => {
                    out.write_all(&buffer[..read])?;
                    copied += read as u64;
                }
                Ok(_) | Err(_) => {
                    let (name, size) = (name.to_owned(), place.size);
                    return Err(ArchiveError::Lies { name, size }.into());
                }
            }
        }
    }
}

fn damaged(error: ZipError) -> ArchiveError {
    ArchiveError::Damaged(Box::new(error))
}

/// The number of entries that the end of a zip declares, in its own record or that of zip64. If
/// there are several it is the largest, since the crate may take any.
fn declared_entries(file: &File) -> io::Result<u64> {
    /// Length of the longest comment, and of the records before it.
    const TAIL: u64 = (64 << 10) + 256;
    let length = file.metadata()?.len();
    let start = length.saturating_sub(TAIL);
    let mut tail = vec![0; (length - start) as usize];
    file.read_exact_at(&mut tail, start)?;
    let mut declared = 0;
    for at in 0..tail.len() {
        let record = &tail[at..];
        declared = declared.max(match record {
            [b'P', b'K', 5, 6, ..] => number(record, 10, 2),
            [b'P', b'K', 6, 6, ..] => number(record, 32, 8),
            // The place of the zip64 record, if it is not here.
            [b'P', b'K', 6, 7, ..] => {
                let mut record = [0; 40];
                let there = number(&tail[at..], 8, 8);
                match file.read_exact_at(&mut record, there) {
                    Ok(()) => number(&record, 32, 8),
                    Err(_) => 0,
                }
            }
            _ => 0,
        });
    }
    Ok(declared)
}

/// A little-endian number in a record; 0 if the record ends before.
fn number(record: &[u8], at: usize, bytes: usize) -> u64 {
    let digits = record.get(at..at + bytes).unwrap_or_default();
    digits
        .iter()
        .rev()
        .fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// The first name that occurs twice in a central directory.
fn twice(mut reader: BufReader<File>, start: u64) -> String {
    let mut seen = BTreeSet::new();
    if reader.seek(SeekFrom::Start(start)).is_err() {
        return String::new();
    }
    let mut next = || -> io::Result<Vec<u8>> {
        let mut header = [0; 46];
        reader.read_exact(&mut header)?;
        let mut name = vec![0; number(&header, 28, 2) as usize];
        reader.read_exact(&mut name)?;
        reader.seek_relative((number(&header, 30, 2) + number(&header, 32, 2)) as i64)?;
        Ok(name)
    };
    while let Ok(name) = next() {
        if !seen.insert(name.clone()) {
            return names::shown(&name);
        }
    }
    String::new()
}

/// What an entry is by its Unix mode, if it is neither file nor folder.
fn irregular(mode: Option<u32>) -> Option<&'static str> {
    match mode.unwrap_or(0) & 0o170_000 {
        0 | 0o100_000 | 0o040_000 => None,
        0o120_000 => Some("a symbolic link"),
        0o020_000 | 0o060_000 => Some("a device"),
        0o010_000 => Some("a pipe"),
        _ => Some("of a kind that is not known"),
    }
}

//! Archives to upload, valid and hostile, made in memory: none of them is kept as a file.

use std::io::{Cursor, Write as _};

use flate2::Compression;
use flate2::write::GzEncoder;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// One entry of a tar, whose name is written unchanged.
pub fn entry(name: &[u8], kind: tar::EntryType, bytes: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    // A hostile archive has such a name, which the crate's own setters refuse.
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_cksum();
    let mut entry = header.as_bytes().to_vec();
    entry.extend(bytes);
    entry.resize(entry.len().next_multiple_of(512), 0);
    entry
}

pub fn tar_of(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut tar = entries.concat();
    tar.resize(tar.len() + 1024, 0);
    tar
}

pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let entries: Vec<_> = files
        .iter()
        .map(|(name, bytes)| entry(name.as_bytes(), tar::EntryType::Regular, bytes))
        .collect();
    tar_of(&entries)
}

/// A tar of so many empty files, each with its own name.
pub fn tar_of_many(count: usize) -> Vec<u8> {
    const DIGITS: std::ops::Range<usize> = 4..11;
    let template = entry(b"cat/0000000", tar::EntryType::Regular, b"");
    let checksum = template[148..155]
        .iter()
        .fold(0, |sum, digit| 8 * sum + u32::from(digit - b'0'));
    let mut tar = Vec::with_capacity(count * template.len());
    for number in 0..count {
        let at = tar.len();
        tar.extend_from_slice(&template);
        let (mut rest, mut sum) = (number, checksum);
        for place in DIGITS.rev() {
            tar[at + place] += (rest % 10) as u8;
            sum += (rest % 10) as u32;
            rest /= 10;
        }
        tar[at + 148..at + 155].copy_from_slice(format!("{sum:07o}").as_bytes());
    }
    tar
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

pub fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in files {
        zip.start_file(*name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// Replaces equal bytes everywhere, because a zip has every name twice.
pub fn replaced(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    for at in 0..=bytes.len() - from.len() {
        if &bytes[at..at + from.len()] == from {
            bytes[at..at + from.len()].copy_from_slice(to);
        }
    }
    bytes
}

/// A zip whose central directory claims `size` for every entry.
pub fn zip_that_declares(files: &[(&str, &[u8])], size: u32) -> Vec<u8> {
    let mut bytes = zip(files);
    for at in 0..bytes.len() - 28 {
        if bytes[at..].starts_with(b"PK\x01\x02") {
            bytes[at + 24..at + 28].copy_from_slice(&size.to_le_bytes());
        }
    }
    bytes
}

/// A PNG that claims to have `edge` × `edge` pixels, and has none.
pub fn huge_png(edge: u32) -> Vec<u8> {
    let chunk = |kind: &[u8], data: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(kind);
        crc.update(data);
        let length = (data.len() as u32).to_be_bytes();
        [&length, kind, data, &crc.sum().to_be_bytes()].concat()
    };
    let mut header = [edge.to_be_bytes(), edge.to_be_bytes()].concat();
    header.extend([8, 2, 0, 0, 0]);
    [
        b"\x89PNG\r\n\x1a\n".to_vec(),
        chunk(b"IHDR", &header),
        chunk(b"IDAT", &[]),
        chunk(b"IEND", &[]),
    ]
    .concat()
}

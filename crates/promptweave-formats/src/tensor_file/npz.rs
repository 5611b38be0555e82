//! A numpy archive: a zip of `.npy` files, each an array behind a short header.
//!
//! The header is the `repr` of a Python dict (numpy.lib.format). Only the forms that `np.savez`
//! writes are read, and nothing is evaluated.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};

use safetensors::Dtype;
use zip::ZipArchive;
use zip::read::Config;
use zip::unstable::read::ZipIterable;

use crate::tensor_file::TensorFileError;

/// The most files in an archive; a ViT-H has some 600.
pub const MAX_ENTRIES: usize = 10_000;
/// Longest header, in bytes; numpy's own are 128.
const MAX_HEADER: usize = 10_000;

#[derive(Debug)]
pub struct Npz(ZipArchive<BufReader<File>>);

/// `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }`
#[derive(Debug, PartialEq)]
struct Header {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Whether the array is in Fortran's order, which numpy keeps for transposed arrays.
    by_columns: bool,
}

/// An array in its file, little-endian.
#[derive(Debug)]
pub struct Array {
    pub dtype: Dtype,
    pub by_columns: bool,
    pub bytes: Vec<u8>,
}

impl Npz {
    /// Whether a file with this beginning is a zip whose first file is an array.
    pub fn starts(bytes: &[u8]) -> bool {
        let length = |at: usize| {
            let bytes = bytes.get(at..at + 2)?;
            Some(usize::from(u16::from_le_bytes([bytes[0], bytes[1]])))
        };
        let name = length(26).and_then(|length| bytes.get(30..30 + length));
        bytes.starts_with(b"PK\x03\x04") && name.is_some_and(|name| name.ends_with(b".npy"))
    }

    pub fn open(
        file: BufReader<File>,
    ) -> Result<(Self, BTreeMap<String, Vec<usize>>), TensorFileError> {
        // The files are counted before an index of them is built.
        let again = BufReader::new(file.get_ref().try_clone()?);
        let count = ZipIterable::try_new(again, Config::default())?.len();
        if count > MAX_ENTRIES {
            return Err(TensorFileError::TooManyEntries(count));
        }
        let mut zip = ZipArchive::new(file)?;
        let mut shapes = BTreeMap::new();
        for index in 0..zip.len() {
            let mut entry = zip.by_index(index)?;
            let file_name = entry.name()?.into_owned();
            let Some(name) = file_name.strip_suffix(".npy") else {
                return Err(TensorFileError::OtherFormat(
                    "a zip archive of more than numpy arrays",
                ));
            };
            let header = read_header(&mut entry, &file_name)?;
            shapes.insert(name.to_owned(), header.shape);
        }
        Ok((Self(zip), shapes))
    }

    pub fn read(&mut self, name: &str) -> Result<Array, TensorFileError> {
        let file_name = format!("{name}.npy");
        let mut entry = self.0.by_name(&file_name)?;
        let Header {
            dtype,
            shape,
            by_columns,
        } = read_header(&mut entry, &file_name)?;
        let size = byte_size(dtype, &shape, &file_name)?;
        let mut bytes = Vec::new();
        entry.take(size as u64).read_to_end(&mut bytes)?;
        if bytes.len() != size {
            return Err(broken(&file_name, "it ends too early"));
        }
        Ok(Array {
            dtype,
            by_columns,
            bytes,
        })
    }
}

fn broken(entry: &str, reason: &'static str) -> TensorFileError {
    TensorFileError::Npy {
        entry: entry.to_owned(),
        reason,
    }
}

fn byte_size(dtype: Dtype, shape: &[usize], entry: &str) -> Result<usize, TensorFileError> {
    let numbers = shape
        .iter()
        .try_fold(1usize, |n, axis| n.checked_mul(*axis));
    numbers
        .and_then(|numbers| numbers.checked_mul(dtype.bitsize() / 8))
        .ok_or_else(|| broken(entry, "its shape is too large"))
}

fn read_header(entry: &mut impl Read, name: &str) -> Result<Header, TensorFileError> {
    let short = |_| broken(name, "it ends within its header");
    let mut start = [0; 8];
    entry.read_exact(&mut start).map_err(short)?;
    if &start[..6] != b"\x93NUMPY" {
        return Err(broken(name, "it has another magic number"));
    }
    let length = match start[6] {
        1 => {
            let mut length = [0; 2];
            entry.read_exact(&mut length).map_err(short)?;
            u16::from_le_bytes(length) as usize
        }
        2 | 3 => {
            let mut length = [0; 4];
            entry.read_exact(&mut length).map_err(short)?;
            u32::from_le_bytes(length) as usize
        }
        _ => return Err(broken(name, "its format version is unknown")),
    };
    if length > MAX_HEADER {
        return Err(broken(name, "its header is too long"));
    }
    let mut header = vec![0; length];
    entry.read_exact(&mut header).map_err(short)?;
    let header = std::str::from_utf8(&header).map_err(|_| broken(name, "its header is no text"))?;
    parse_header(header, name)
}

fn parse_header(header: &str, name: &str) -> Result<Header, TensorFileError> {
    let unreadable = || broken(name, "its header is not one that numpy writes");
    let value = |key: &str| {
        let (_, rest) = header.split_once(&format!("'{key}':"))?;
        Some(rest.trim_start())
    };
    let descr = value("descr").ok_or_else(unreadable)?;
    // The descr of a structured array is a list.
    let descr = descr
        .strip_prefix('\'')
        .and_then(|rest| rest.split('\'').next())
        .ok_or_else(|| broken(name, "it is no array of plain numbers"))?;
    let dtype = match descr {
        "|O" | "O" => return Err(TensorFileError::ObjectArray(name.to_owned())),
        "<f4" => Dtype::F32,
        "<f2" => Dtype::F16,
        "<f8" => Dtype::F64,
        "<i8" => Dtype::I64,
        "<i4" => Dtype::I32,
        _ => return Err(broken(name, "its numbers are not little-endian f4 or f2")),
    };
    let order = value("fortran_order").ok_or_else(unreadable)?;
    let by_columns = match (order.starts_with("True"), order.starts_with("False")) {
        (true, _) => true,
        (_, true) => false,
        _ => return Err(unreadable()),
    };
    let shape = value("shape")
        .and_then(|rest| rest.strip_prefix('('))
        .and_then(|rest| rest.split_once(')'))
        .ok_or_else(unreadable)?
        .0;
    let axes = shape.split(',').map(str::trim).filter(|a| !a.is_empty());
    let shape = axes
        .map(|axis| axis.parse().map_err(|_| unreadable()))
        .collect::<Result<Vec<_>, _>>()?;
    byte_size(dtype, &shape, name)?;
    Ok(Header {
        dtype,
        shape,
        by_columns,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_as_numpy_writes_them_are_read_and_others_refused() {
        let read = |text: &str| parse_header(text, "a.npy").map_err(|error| error.to_string());
        for (shape, expected) in [
            ("(2, 3)", vec![2, 3]),
            ("(3,)", vec![3]),
            ("()", vec![]),
            ("(0, 5)", vec![0, 5]),
        ] {
            let text =
                format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}  \n");
            let header = Header {
                dtype: Dtype::F32,
                shape: expected,
                by_columns: false,
            };
            assert_eq!(read(&text), Ok(header));
        }
        for (text, reason) in [
            (
                "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
                "objects",
            ),
            (
                "{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }",
                "little-endian",
            ),
            (
                "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
                "plain numbers",
            ),
            (
                "{'descr': '<f4', 'fortran_order': 1, 'shape': (2, 2), }",
                "numpy writes",
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
                "numpy writes",
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 9), }",
                "too large",
            ),
            ("{'descr': '<f4', 'fortran_order': False, }", "numpy writes"),
            ("", "numpy writes"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.to_lowercase().contains(reason), "{text}: {error}");
        }
    }
}

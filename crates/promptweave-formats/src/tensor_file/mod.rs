//! Tensors in a file, read one at a time: safetensors, or a numpy archive (`.npz`).
//!
//! A checkpoint of a gigabyte is checked, converted and digested in the memory of its largest
//! tensor. Pickles are recognised by their first bytes and never parsed.

mod npz;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensorError};

use self::npz::Npz;
use promptweave_domain::foreign_format;
use promptweave_domain::foreign_format::MAX_HEADER_BYTES;
use promptweave_domain::tensor::{Element, read_f32};

#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    #[error("cannot read the file")]
    Io(#[from] io::Error),
    /// The format is refused by its first bytes: such files can run code when they are loaded.
    #[error("the file is {0}; only safetensors and plain .npz are accepted")]
    OtherFormat(&'static str),
    #[error("the file is not safetensors")]
    NotSafetensors(#[from] SafeTensorError),
    #[error("the file's header is {0} bytes long, more than {MAX_HEADER_BYTES}")]
    HeaderTooLong(u64),
    #[error("the file is cut off: it has {found} bytes, and its header says {expected}")]
    CutOff { found: u64, expected: u64 },
    #[error("the file is not a readable zip archive")]
    Zip(#[from] zip::result::ZipError),
    #[error("the archive has {0} files, more than {max}", max = npz::MAX_ENTRIES)]
    TooManyEntries(usize),
    #[error("`{entry}` in the archive is not a readable numpy array: {reason}")]
    Npy { entry: String, reason: &'static str },
    /// The array is refused by its header: loading it would unpickle.
    #[error("`{0}` in the archive is a numpy array of Python objects, which is a pickle")]
    ObjectArray(String),
    #[error("tensor `{tensor}` has dtype {dtype}, expected f32, f16 or bf16")]
    Dtype { tensor: String, dtype: String },
}

/// An open file. The names and shapes of its tensors are known; the values are still in the file.
#[derive(Debug)]
pub struct TensorFile {
    shapes: BTreeMap<String, Vec<usize>>,
    values: Values,
}

#[derive(Debug)]
enum Values {
    Safetensors {
        file: File,
        header: Metadata,
        /// Offset of the first tensor.
        start: u64,
    },
    Npz(Npz),
}

impl TensorFile {
    pub fn open(path: &Path) -> Result<Self, TensorFileError> {
        let mut file = File::open(path)?;
        let mut first = Vec::new();
        (&file).take(512).read_to_end(&mut first)?;
        file.rewind()?;
        if Npz::starts(&first) {
            let (npz, shapes) = Npz::open(BufReader::new(file))?;
            return Ok(Self {
                shapes,
                values: Values::Npz(npz),
            });
        }
        match foreign_format::recognise(&first) {
            Some(format) => Err(TensorFileError::OtherFormat(format.name)),
            None if first.get(8).is_some_and(|brace| *brace != b'{') => {
                Err(TensorFileError::OtherFormat("of an unknown kind"))
            }
            None => Self::safetensors(file),
        }
    }

    fn safetensors(mut file: File) -> Result<Self, TensorFileError> {
        let found = file.metadata()?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length)
            .map_err(|_| SafeTensorError::HeaderTooSmall)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES {
            return Err(TensorFileError::HeaderTooLong(length));
        }
        let mut json = vec![0; length as usize];
        file.read_exact(&mut json)
            .map_err(|_| SafeTensorError::InvalidHeaderLength)?;
        let header: Metadata =
            serde_json::from_slice(&json).map_err(SafeTensorError::InvalidHeaderDeserialization)?;
        let start = 8 + length;
        let expected = start.saturating_add(header.data_len() as u64);
        if found != expected {
            return Err(TensorFileError::CutOff { found, expected });
        }
        let shapes = header.tensors().into_iter();
        Ok(Self {
            shapes: shapes
                .map(|(name, info)| (name, info.shape.clone()))
                .collect(),
            values: Values::Safetensors {
                file,
                header,
                start,
            },
        })
    }

    /// The tensors' shapes by name.
    pub fn shapes(&self) -> &BTreeMap<String, Vec<usize>> {
        &self.shapes
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.shapes.get(name).map(Vec::as_slice)
    }

    /// The values of a tensor that [`shapes`](Self::shapes) names, row by row.
    ///
    /// # Panics
    /// If there is no tensor of that name.
    pub fn read(&mut self, name: &str) -> Result<Vec<f32>, TensorFileError> {
        let mut shape = self.shapes[name].clone();
        let mut by_columns = false;
        let (dtype, bytes) = match &mut self.values {
            Values::Safetensors {
                file,
                header,
                start,
            } => {
                let info = header.info(name).expect("it has a shape");
                let (from, to) = info.data_offsets;
                file.seek(SeekFrom::Start(*start + from as u64))?;
                let mut bytes = vec![0; to - from];
                file.read_exact(&mut bytes)?;
                (info.dtype, bytes)
            }
            Values::Npz(npz) => {
                let array = npz.read(name)?;
                by_columns = array.by_columns;
                (array.dtype, array.bytes)
            }
        };
        // Column by column is the same as row by row with the axes reversed.
        if by_columns {
            shape.reverse();
        }
        let view = TensorView::new(dtype, shape.clone(), &bytes)?;
        let values = read_f32(&view).ok_or_else(|| TensorFileError::Dtype {
            tensor: name.to_owned(),
            dtype: format!("{dtype:?}").to_lowercase(),
        })?;
        Ok(match by_columns {
            true => permute(values, &shape, &(0..shape.len()).rev().collect::<Vec<_>>()),
            false => values,
        })
    }
}

/// Writes f32 tensors as safetensors in the order of their names. `values` is called for one tensor
/// at a time. (safetensors' own writer takes views that cannot fail.)
///
/// # Panics
/// If `values` does not return as many numbers as the shape says.
pub fn write_f32<E: From<TensorFileError>>(
    path: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    mut values: impl FnMut(&str) -> Result<Vec<f32>, E>,
) -> Result<(), E> {
    let mut end = 0;
    let infos = shapes.iter().map(|(name, shape)| {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let info = TensorInfo {
            dtype: Dtype::F32,
            shape: shape.clone(),
            data_offsets: (start, end),
        };
        (name.clone(), info)
    });
    let infos = infos.collect();
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = Metadata::new(Some(about), infos).map_err(TensorFileError::from)?;
    let mut header = serde_json::to_vec(&header).expect("plain data");
    header.resize(header.len().next_multiple_of(8), b' ');
    let io = |result: io::Result<()>| result.map_err(TensorFileError::from);

    let mut file = BufWriter::new(File::create(path).map_err(TensorFileError::from)?);
    io(file.write_all(&(header.len() as u64).to_le_bytes()))?;
    io(file.write_all(&header))?;
    for (name, shape) in shapes {
        let values = values(name)?;
        assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
        io(file.write_all(&f32::bytes(&values)))?;
    }
    io(file.flush())?;
    Ok(())
}

/// The values of a tensor of this shape with its axis `axes[0]` outermost, then `axes[1]`, …
pub fn permute(values: Vec<f32>, shape: &[usize], axes: &[usize]) -> Vec<f32> {
    if axes.is_sorted() {
        return values;
    }
    let stride = |axis: usize| shape[axis + 1..].iter().product::<usize>();
    // The offsets of the outer axes so far. Each axis multiplies their number.
    let offsets = axes.iter().fold(vec![0], |offsets, &axis| {
        let step = stride(axis);
        offsets
            .iter()
            .flat_map(|offset| (0..shape[axis]).map(move |i| offset + i * step))
            .collect()
    });
    offsets.into_iter().map(|offset| values[offset]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn fixture(path: &str) -> PathBuf {
        let fixtures =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/checkpoints");
        fixtures.join(path)
    }

    #[test]
    fn pickles_are_refused_wherever_they_hide() {
        let open = |path| TensorFile::open(&fixture(path)).unwrap_err().to_string();
        assert_eq!(
            open("pickled.npz"),
            "`cls.npy` in the archive is a numpy array of Python objects, which is a pickle"
        );
        assert_eq!(
            open("pickled.pth"),
            "the file is a PyTorch checkpoint (a zip of pickles); only safetensors and plain .npz \
             are accepted"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for (bytes, detail) in [
            (
                &b"\x80\x04\x95\x10\x00\x00\x00\x00."[..],
                "a pickle (protocol 4)",
            ),
            (b"\x93NUMPY\x01\x00v\x00{'descr'", "a NumPy array"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = TensorFile::open(&path).unwrap_err();
            assert!(
                matches!(error, TensorFileError::OtherFormat(found) if found == detail),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_header_that_lies_is_refused_before_anything_is_reserved() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut bytes = std::fs::read(fixture("timm/model.safetensors")).unwrap();
        bytes.pop();
        std::fs::write(&path, &bytes).unwrap();
        let error = TensorFile::open(&path).unwrap_err();
        assert!(matches!(error, TensorFileError::CutOff { .. }), "{error:?}");
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let error = TensorFile::open(&path).unwrap_err();
        assert!(
            matches!(error, TensorFileError::HeaderTooLong(_)),
            "{error:?}"
        );
        std::fs::write(&path, b"").unwrap();
        let error = TensorFile::open(&path).unwrap_err();
        assert!(
            matches!(
                error,
                TensorFileError::NotSafetensors(SafeTensorError::HeaderTooSmall)
            ),
            "{error:?}"
        );
    }

    #[test]
    fn what_is_written_reads_back_here_and_in_safetensors_own_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let shapes = BTreeMap::from([
            ("a".to_owned(), vec![2, 3]),
            ("b".to_owned(), vec![]),
            ("c".to_owned(), vec![0]),
        ]);
        let values = |name: &str| match name {
            "a" => vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "b" => vec![7.5],
            _ => vec![],
        };
        write_f32(&path, &shapes, |name| {
            Ok::<_, TensorFileError>(values(name))
        })
        .unwrap();
        let mut file = TensorFile::open(&path).unwrap();
        assert_eq!(*file.shapes(), shapes);
        let bytes = std::fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for name in shapes.keys() {
            assert_eq!(file.read(name).unwrap(), values(name));
            assert_eq!(
                read_f32(&theirs.tensor(name).unwrap()).unwrap(),
                values(name)
            );
        }
    }

    #[test]
    fn permuting_is_transposing_in_any_number_of_axes() {
        let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
        assert_eq!(
            permute(values.clone(), &[2, 3], &[1, 0]),
            [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
        );
        // [2, 1, 3] with the last axis first.
        assert_eq!(
            permute(values, &[2, 1, 3], &[2, 0, 1]),
            [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
        );
    }
}

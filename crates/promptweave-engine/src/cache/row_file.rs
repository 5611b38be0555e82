//! A tensor on disk, with one row for each sample. Micro-batches are written and read in any order
//! and by several streams, so that the whole tensor is never in memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use tch::{Device, Kind, Tensor};

/// The layout of a safetensors file with one tensor: everything but the numbers, which is known
/// beforehand.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The bytes before the numbers.
    header: Vec<u8>,
    num_rows: usize,
    /// Number of values in a row.
    width: usize,
    kind: Kind,
}

impl Layout {
    /// The layout of `num_rows` rows of shape `row`. Values are stored in f64 if `kind` is,
    /// otherwise in f32.
    pub fn new(name: &str, num_rows: usize, row: &[usize], kind: Kind) -> Self {
        let (dtype, kind) = match kind {
            Kind::Double => (Dtype::F64, Kind::Double),
            _ => (Dtype::F32, Kind::Float),
        };
        let width: usize = row.iter().product();
        let info = TensorInfo {
            dtype,
            shape: [&[num_rows], row].concat(),
            data_offsets: (0, num_rows * width * kind.elt_size_in_bytes()),
        };
        let metadata = Metadata::new(None, vec![(name.to_owned(), info)])
            .expect("one tensor leaves no room for a mistake");
        let mut json = serde_json::to_vec(&metadata).expect("plain data");
        // The values start at a multiple of 8, as safetensors' own writer does it.
        json.resize(json.len().next_multiple_of(8), b' ');
        let header = [&(json.len() as u64).to_le_bytes()[..], &json].concat();
        Self {
            header,
            num_rows,
            width,
            kind,
        }
    }

    fn row_bytes(&self) -> usize {
        self.width * self.kind.elt_size_in_bytes()
    }

    fn position(&self, row: usize) -> u64 {
        (self.header.len() + row * self.row_bytes()) as u64
    }
}

#[derive(Debug)]
pub struct RowFile {
    file: File,
    layout: Layout,
}

impl RowFile {
    /// Makes an empty file that is to have this layout.
    pub fn create(file: File, layout: Layout) -> io::Result<Self> {
        file.write_all_at(&layout.header, 0)?;
        Ok(Self { file, layout })
    }

    /// Opens a file; `None` unless it has this layout to the byte.
    pub fn open(file: File, layout: Layout) -> io::Result<Option<Self>> {
        if file.metadata()?.len() != layout.position(layout.num_rows) {
            return Ok(None);
        }
        let mut header = vec![0; layout.header.len()];
        file.read_exact_at(&mut header, 0)?;
        Ok((header == layout.header).then_some(Self { file, layout }))
    }

    /// Writes rows [B, …] from row `start` on.
    pub fn write(&self, start: usize, rows: &Tensor) -> io::Result<()> {
        let count = rows.size()[0] as usize;
        let numbers = rows
            .f_to_device(Device::Cpu)
            .and_then(|rows| rows.f_to_kind(self.layout.kind))
            .and_then(|rows| rows.f_contiguous())
            .map_err(io::Error::other)?;
        let mut bytes = vec![0; count * self.layout.row_bytes()];
        numbers
            .f_copy_data_u8(&mut bytes, count * self.layout.width)
            .map_err(io::Error::other)?;
        self.file.write_all_at(&bytes, self.layout.position(start))
    }

    /// Reads `count` rows from row `start` on: [count, width] on the CPU.
    pub fn read(&self, start: usize, count: usize) -> io::Result<Tensor> {
        let mut bytes = vec![0; count * self.layout.row_bytes()];
        self.file
            .read_exact_at(&mut bytes, self.layout.position(start))?;
        let shape = [count as i64, self.layout.width as i64];
        Tensor::f_from_data_size(&bytes, &shape, self.layout.kind).map_err(io::Error::other)
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn num_rows(&self) -> usize {
        self.layout.num_rows
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};

    use super::*;
    use crate::testing::noise_tensor;

    #[test]
    fn rows_written_in_any_order_are_a_safetensors_file_and_read_back_bit_by_bit() {
        for kind in [Kind::Float, Kind::Double] {
            let tensor = noise_tensor(&[7, 2, 3], 4).to_kind(kind);
            let layout = Layout::new("gradients", 7, &[2, 3], kind);
            let rows = RowFile::create(tempfile::tempfile().unwrap(), layout.clone()).unwrap();
            for (start, count) in [(5, 2), (0, 1), (1, 4)] {
                rows.write(start as usize, &tensor.narrow(0, start, count))
                    .unwrap();
            }
            let whole = rows.read(0, 7).unwrap();
            assert_eq!(whole, tensor.view([7, 6]));
            assert_eq!(rows.read(3, 2).unwrap(), whole.narrow(0, 3, 2));

            let mut file = rows.file;
            file.rewind().unwrap();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let view = read.tensor("gradients").unwrap();
            assert_eq!(view.shape(), [7, 2, 3]);
            let numbers = Tensor::from_data_size(view.data(), &[7, 2, 3], kind);
            assert_eq!(numbers, tensor);

            // The file opens only with its own shape, number type and size.
            let open = |file: &File, layout| RowFile::open(file.try_clone().unwrap(), layout);
            assert!(open(&file, layout.clone()).unwrap().is_some());
            let other = Layout::new("gradients", 7, &[3, 2], kind);
            assert!(open(&file, other).unwrap().is_none());
            file.set_len(bytes.len() as u64 - 1).unwrap();
            assert!(open(&file, layout).unwrap().is_none());
        }
    }
}

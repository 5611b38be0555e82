//! The library's reader, with the checks that it does not make itself.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parquet::errors::ParquetError as LibraryError;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};

use crate::parquet::pages;
use crate::parquet::pages::MAX_PAGE;
use crate::parquet::{MAGIC, ParquetError};

/// The most pages of the columns that are read, over all row groups.
const MAX_PAGES: usize = 1_000_000;
/// The largest metadata at a file's end, in bytes.
const MAX_FOOTER: u64 = 16 << 20;

/// Opens a file. `name` is the file's name in errors.
pub(super) fn open(file: &File, name: &str) -> Result<SerializedFileReader<File>, ParquetError> {
    check_footer(file, name)?;
    guarded(name, || reader(file))
}

fn reader(file: &File) -> Result<SerializedFileReader<File>, LibraryError> {
    SerializedFileReader::new(file.try_clone()?)
}

/// One column, row by row.
pub(super) fn rows(
    file: &File,
    name: &str,
    column: &TypePtr,
) -> Result<impl Iterator<Item = Result<Field, ParquetError>>, ParquetError> {
    let mut rows = guarded(name, || {
        let reader = reader(file)?;
        // The projected schema must have the name of the whole one.
        let root = reader.metadata().file_metadata().schema().name().to_owned();
        let schema = Type::group_type_builder(&root).with_fields(vec![Arc::clone(column)]);
        let rows = RowIter::from_file_into(Box::new(reader));
        // The batch size is the number of images that it reads ahead.
        Ok(rows.project(Some(schema.build()?))?.with_batch_size(1))
    })?;
    let name = name.to_owned();
    Ok(std::iter::from_fn(move || {
        let row = guarded(&name, || rows.next().transpose());
        let field = |row: Row| row.into_columns().into_iter().next();
        match row.transpose()? {
            Ok(row) => field(row).map(|(_, field)| Ok(field)),
            Err(error) => Some(Err(error)),
        }
    }))
}

/// Turns a panic of the library into an error. It panics over some files that it should refuse.
fn guarded<T>(
    file: &str,
    read: impl FnOnce() -> Result<T, LibraryError>,
) -> Result<T, ParquetError> {
    let damaged = |rule: String| ParquetError::Damaged {
        file: file.to_owned(),
        rule,
    };
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) => Err(damaged(error.to_string())),
        Err(_) => Err(damaged("it contradicts itself".to_owned())),
    }
}

/// Checks the footer's size. The library reads all of it into memory, and builds more than its size
/// from it.
fn check_footer(file: &File, name: &str) -> Result<(), ParquetError> {
    use std::os::unix::fs::FileExt as _;
    let read = || -> io::Result<Option<u64>> {
        let length = file.metadata()?.len();
        let mut tail = [0; 8];
        let Some(at) = length.checked_sub(8) else {
            return Ok(None);
        };
        file.read_exact_at(&mut tail, at)?;
        let size = u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
        Ok((&tail[4..] == MAGIC).then_some(size.into()))
    };
    let damaged = |rule: &str| ParquetError::Damaged {
        file: name.to_owned(),
        rule: rule.to_owned(),
    };
    match read() {
        Ok(Some(size)) if size <= MAX_FOOTER => Ok(()),
        Ok(Some(size)) => Err(damaged(&format!(
            "its description has {size} bytes, more than {MAX_FOOTER}"
        ))),
        Ok(None) => Err(damaged("it does not end with `PAR1`; it may be cut off")),
        Err(source) => {
            let file = name.to_owned();
            Err(ParquetError::Read { file, source })
        }
    }
}

pub(super) fn check_pages(
    reader: &SerializedFileReader<File>,
    file: &File,
    name: &str,
    columns: [&str; 2],
) -> Result<(), ParquetError> {
    let mut left = MAX_PAGES;
    for group in reader.metadata().row_groups() {
        for chunk in group.columns() {
            let column = chunk.column_path().parts().first();
            if !column.is_some_and(|column| columns.contains(&column.as_str())) {
                continue;
            }
            let (start, length) = guarded(name, || Ok(chunk.byte_range()))?;
            let sizes = pages::sizes(file, start, length, left);
            let Ok(Some(sizes)) = sizes else {
                return Err(ParquetError::Damaged {
                    file: name.to_owned(),
                    rule: format!(
                        "the pages of column `{}` are not where it says",
                        chunk.column_path()
                    ),
                });
            };
            if sizes.largest > MAX_PAGE {
                let (file, size) = (name.to_owned(), sizes.largest);
                return Err(ParquetError::LargePage { file, size });
            }
            left -= sizes.pages;
            if left == 0 {
                let file = name.to_owned();
                return Err(ParquetError::TooManyPages { file });
            }
        }
    }
    Ok(())
}

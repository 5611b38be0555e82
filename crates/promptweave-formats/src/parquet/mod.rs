//! Labelled images in Parquet files, as Hugging Face keeps them.
//!
//! A row has an image (`image: {bytes, path}`, or the bytes themselves) and a label: a name, or a
//! number that the file's metadata names. A file is a split or a shard of one, by its own name or
//! its folder's: `train-00000-of-00002.parquet`, `data/validation-….parquet`, `test/0000.parquet`.
//! (<https://huggingface.co/docs/datasets/image_dataset>; metadata key `huggingface`)

mod columns;
mod pages;
mod reading;
mod shards;

use std::fs::File;
use std::io;

use parquet::file::reader::FileReader as _;
use parquet::record::{Field, Row};
use parquet::schema::types::TypePtr;

use crate::dataset::labels::{Classes, Label, NoClass};
use columns::Columns;
pub use pages::MAX_PAGE;
use promptweave_domain::split::Split;
pub use shards::{Shard, choose, shards};

/// The first and the last bytes of a Parquet file.
pub const MAGIC: &[u8] = b"PAR1";
/// The most rows of all files together.
pub const MAX_ROWS: usize = 250_000;

#[derive(Debug, thiserror::Error)]
pub enum ParquetError {
    #[error("`{file}` cannot be read")]
    Read { file: String, source: io::Error },
    #[error("`{file}` is no sound Parquet file: {rule}")]
    Damaged { file: String, rule: String },
    #[error(
        "`{file}` has no column of images: expected `image` as bytes or as a structure with `bytes`; it has {there}"
    )]
    NoImages { file: String, there: String },
    #[error(
        "`{file}` has no column of labels: expected `label`, of whole numbers or names; it has {there}"
    )]
    NoLabels { file: String, there: String },
    #[error("row {row} of `{file}` {rule}")]
    Row {
        file: String,
        row: usize,
        rule: String,
    },
    #[error(
        "row {row} of `{file}`: label {label} is outside the {classes} classes (0..={})",
        classes - 1
    )]
    Label {
        file: String,
        row: usize,
        label: i64,
        classes: usize,
    },
    #[error("`{file}` names other classes than `{first}`")]
    OtherClasses { file: String, first: String },
    #[error("the files have more than {MAX_ROWS} rows, which is the most taken")]
    TooManyRows,
    #[error(
        "`{file}` has a page of {size} bytes, more than {MAX_PAGE}; write it with smaller row groups"
    )]
    LargePage { file: String, size: u64 },
    #[error("`{file}` has too many pages; write it with larger ones")]
    TooManyPages { file: String },
}

/// Files whose metadata and labels were read, but not their images.
pub struct ParquetImages {
    /// Class names in label order.
    pub classes: Vec<String>,
    /// The files in the order of splits, then of names.
    pub shards: Vec<LabelledShard>,
}

pub struct LabelledShard {
    pub split: Split,
    pub name: String,
    /// The label of each row, as an index into [`ParquetImages::classes`].
    pub labels: Vec<usize>,
    file: File,
    images: TypePtr,
}

impl ParquetImages {
    /// Checks the files and reads their labels. Images are not looked at.
    pub fn open(mut shards: Vec<Shard>) -> Result<Self, ParquetError> {
        shards.sort_by(|a, b| (a.split, &a.name).cmp(&(b.split, &b.name)));
        let mut named: Option<(Vec<String>, String)> = None;
        let mut read = Vec::new();
        let mut rows = 0;
        for shard in shards {
            let opened = Opened::new(&shard, &mut rows)?;
            match (&named, opened.classes) {
                (None, Some(classes)) => named = Some((classes, shard.name.clone())),
                (Some((before, first)), Some(classes)) if *before != classes => {
                    let (file, first) = (shard.name, first.clone());
                    return Err(ParquetError::OtherClasses { file, first });
                }
                _ => {}
            }
            read.push((shard, opened.images, opened.labels));
        }
        let named = named.map(|(classes, _)| classes);
        let classes = Classes::of(named, read.iter().flat_map(|(_, _, labels)| labels));
        let shards = read.into_iter().map(|(shard, images, labels)| {
            let labels = labels.iter().enumerate();
            let labels = labels.map(|(row, label)| {
                let index = classes.index(label);
                index.map_err(|it| no_class(&shard.name, row, it))
            });
            Ok(LabelledShard {
                split: shard.split,
                labels: labels.collect::<Result<_, _>>()?,
                name: shard.name,
                file: shard.file,
                images,
            })
        });
        Ok(Self {
            shards: shards.collect::<Result<_, _>>()?,
            classes: classes.names,
        })
    }
}

impl LabelledShard {
    /// The bytes of each row's image, in order: as many as labels.
    pub fn images(
        &self,
    ) -> Result<impl Iterator<Item = Result<Vec<u8>, ParquetError>> + '_, ParquetError> {
        let rows = reading::rows(&self.file, &self.name, &self.images)?;
        Ok(rows.enumerate().map(|(row, found)| match found? {
            Field::Bytes(bytes) => Ok(bytes.data().to_vec()),
            Field::Group(image) => match named(&image, "bytes") {
                Some(Field::Bytes(bytes)) => Ok(bytes.data().to_vec()),
                _ => Err(self.broken(row, "has no bytes of an image; embed them in the file")),
            },
            _ => Err(self.broken(row, "has no image")),
        }))
    }

    fn broken(&self, row: usize, rule: &str) -> ParquetError {
        broken(&self.name, row, rule)
    }
}

/// What a file's metadata and labels contain.
struct Opened {
    classes: Option<Vec<String>>,
    images: TypePtr,
    labels: Vec<Label>,
}

impl Opened {
    /// Opens a shard. `rows` counts the rows of all files.
    fn new(shard: &Shard, rows: &mut usize) -> Result<Self, ParquetError> {
        let Shard { name, file, .. } = shard;
        let reader = reading::open(file, name)?;
        let metadata = reader.metadata().file_metadata();
        *rows = rows.saturating_add(usize::try_from(metadata.num_rows()).unwrap_or(usize::MAX));
        if *rows > MAX_ROWS || reader.num_row_groups() > MAX_ROWS {
            return Err(ParquetError::TooManyRows);
        }
        let Columns {
            images,
            labels,
            classes,
        } = Columns::of(metadata, name)?;
        reading::check_pages(&reader, file, name, [images.name(), labels.name()])?;
        let mut read = Vec::with_capacity(metadata.num_rows() as usize);
        for (row, field) in reading::rows(file, name, &labels)?.enumerate() {
            read.push(label(field?).ok_or_else(|| broken(name, row, "has no label"))?);
        }
        Ok(Self {
            classes,
            images,
            labels: read,
        })
    }
}

fn label(field: Field) -> Option<Label> {
    Some(match field {
        Field::Byte(number) => Label::Number(number.into()),
        Field::Short(number) => Label::Number(number.into()),
        Field::Int(number) => Label::Number(number.into()),
        Field::Long(number) => Label::Number(number),
        Field::UByte(number) => Label::Number(number.into()),
        Field::UShort(number) => Label::Number(number.into()),
        Field::UInt(number) => Label::Number(number.into()),
        Field::ULong(number) => Label::Number(i64::try_from(number).ok()?),
        Field::Str(name) => Label::Name(name),
        _ => return None,
    })
}

fn no_class(file: &str, row: usize, no_class: NoClass) -> ParquetError {
    match no_class {
        NoClass::Negative(-1) => {
            let rule = "has the label -1, which says that there is none; leave its file away";
            broken(file, row, rule)
        }
        NoClass::Negative(label) => broken(file, row, &format!("has the label {label}, below 0")),
        NoClass::Outside { label, classes } => ParquetError::Label {
            file: file.to_owned(),
            row,
            label,
            classes: classes.max(1),
        },
        NoClass::Unknown { label, .. } => {
            let rule = format!("has the label `{label}`, which is no class");
            broken(file, row, &rule)
        }
    }
}

fn broken(file: &str, row: usize, rule: &str) -> ParquetError {
    ParquetError::Row {
        file: file.to_owned(),
        row,
        rule: rule.to_owned(),
    }
}

fn named<'a>(row: &'a Row, name: &str) -> Option<&'a Field> {
    let mut columns = row.get_column_iter();
    columns.find_map(|(column, field)| (column == name).then_some(field))
}

#[cfg(test)]
mod tests;

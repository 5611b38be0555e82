//! Labelled images in Parquet files, as Hugging Face keeps them.
//!
//! A row has an image (`image: {bytes, path}`, or the bytes themselves) and a label: a number that the
//! file's metadata names, or a name. A file is a split or a shard of one, by its own name or its folder's:
//! `train-00000-of-00002.parquet`, `data/validation-….parquet`, `test/0000.parquet`.
//! (<https://huggingface.co/docs/datasets/image_dataset>; metadata key `huggingface`)

mod pages;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Repetition, Type as PhysicalType};
use parquet::errors::ParquetError as LibraryError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use serde::Deserialize;

use super::dataset::{MAX_CLASSES, Split};
use super::files::{Directory, Files as _};
pub use pages::MAX_PAGE;

/// The first and the last bytes of such a file.
pub const MAGIC: &[u8] = b"PAR1";
/// Where repositories keep their files.
const DATA: &str = "data";
/// Most rows of all files together.
pub const MAX_ROWS: usize = 250_000;
/// Most pages of the columns that are read, of all row groups together.
const MAX_PAGES: usize = 1_000_000;
/// Largest description at a file's end, in bytes.
const MAX_FOOTER: u64 = 16 << 20;

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

/// A file to be read, and what its images are for.
#[derive(Debug)]
pub struct Shard {
    pub split: Split,
    /// In errors.
    pub name: String,
    pub file: File,
}

/// Files that have been looked through, all but their images.
pub struct ParquetImages {
    /// Class names in label order.
    pub classes: Vec<String>,
    /// In the order of splits, then of names.
    pub shards: Vec<LabelledShard>,
}

pub struct LabelledShard {
    pub split: Split,
    pub name: String,
    /// Of each row, within [`ParquetImages::classes`].
    pub labels: Vec<usize>,
    file: File,
    images: TypePtr,
}

/// The files of a folder that are a data set of this kind; none where there are none.
pub fn shards(dir: &Path) -> io::Result<Vec<Shard>> {
    let files = Directory::new(dir);
    let mut names = files.files("")?;
    for folder in files.folders("")? {
        let inside = |name: String| format!("{folder}/{name}");
        names.extend(files.files(&folder)?.into_iter().map(inside));
        if folder == DATA {
            for inner in files.folders(&folder)? {
                let inner = format!("{folder}/{inner}");
                let names_inside = files.files(&inner)?.into_iter();
                names.extend(names_inside.map(|name| format!("{inner}/{name}")));
            }
        }
    }
    let opened = choose(&names).into_iter().map(|(split, name)| {
        let file = File::open(files.shown(&name))?;
        Ok(Shard { split, name, file })
    });
    opened.collect()
}

/// Which of these files are the data set: those of the outermost folder, or of its folder `data`, and in
/// folders of splits there. Files of other splits than ours are left alone; where no file is of any, all are
/// `train`.
pub fn choose(names: &[String]) -> Vec<(Split, String)> {
    let of = |base: &str| -> Vec<(Option<Split>, String)> {
        let parquet = names.iter().filter(|name| name.ends_with(".parquet"));
        let found = parquet.filter_map(|name| match name.strip_prefix(base)?.split_once('/') {
            None => Some((split(&name[base.len()..]), name.clone())),
            Some((folder, inner)) if !inner.contains('/') => {
                Some((Some(split(folder)?), name.clone()))
            }
            Some(_) => None,
        });
        found.collect()
    };
    let mut found = of("");
    if found.is_empty() {
        found = of(&format!("{DATA}/"));
    }
    let any = found.iter().any(|(split, _)| split.is_some());
    let of_a_split = |(split, name)| match split {
        None if !any => Some((Split::Train, name)),
        split => split.map(|split| (split, name)),
    };
    found.into_iter().filter_map(of_a_split).collect()
}

/// What a file's or folder's name says that it is for.
fn split(name: &str) -> Option<Split> {
    let word = name.split(['-', '.', '_']).next()?;
    match word.to_ascii_lowercase().as_str() {
        "train" | "training" => Some(Split::Train),
        "validation" | "valid" | "val" | "dev" => Some(Split::Val),
        "test" | "testing" => Some(Split::Test),
        _ => None,
    }
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
            let labels = labels.map(|(row, label)| classes.index(label, &shard.name, row));
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
        let rows = rows(&self.file, &self.name, &self.images)?;
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

/// What a file's description and its labels say.
struct Opened {
    classes: Option<Vec<String>>,
    images: TypePtr,
    labels: Vec<Label>,
}

impl Opened {
    /// `rows` counts those of all files.
    fn new(shard: &Shard, rows: &mut usize) -> Result<Self, ParquetError> {
        let Shard { name, file, .. } = shard;
        check_footer(file, name)?;
        let reader = guarded(name, || reader(file))?;
        let metadata = reader.metadata().file_metadata();
        *rows = rows.saturating_add(usize::try_from(metadata.num_rows()).unwrap_or(usize::MAX));
        if *rows > MAX_ROWS || reader.num_row_groups() > MAX_ROWS {
            return Err(ParquetError::TooManyRows);
        }
        let noted = metadata.key_value_metadata().into_iter().flatten();
        let features = noted
            .filter(|pair| pair.key == "huggingface")
            .find_map(|pair| serde_json::from_str::<Noted>(pair.value.as_deref()?).ok())
            .map(|noted| noted.info.features)
            .unwrap_or_default();
        let columns = metadata.schema_descr().root_schema().get_fields().to_vec();
        let there = || {
            let names: Vec<_> = columns
                .iter()
                .map(|it| format!("`{}`", it.name()))
                .collect();
            names.join(", ")
        };
        let file_name = || name.clone();
        let images = pick(
            &columns,
            &features,
            "Image",
            &["image", "img"],
            holds_images,
        )
        .ok_or_else(|| ParquetError::NoImages {
            file: file_name(),
            there: there(),
        })?;
        let labels = pick(
            &columns,
            &features,
            "ClassLabel",
            &["label", "labels"],
            holds_labels,
        )
        .ok_or_else(|| ParquetError::NoLabels {
            file: file_name(),
            there: there(),
        })?;
        check_pages(&reader, file, name, [images.name(), labels.name()])?;
        let mut read = Vec::with_capacity(metadata.num_rows() as usize);
        for (row, field) in self::rows(file, name, &labels)?.enumerate() {
            let label = Label::of(field?);
            read.push(label.ok_or_else(|| broken(name, row, "has no label"))?);
        }
        Ok(Self {
            classes: features.get(labels.name()).and_then(|it| it.names.clone()),
            images,
            labels: read,
        })
    }
}

/// What Hugging Face's library notes of the columns.
#[derive(Deserialize)]
struct Noted {
    info: Info,
}

#[derive(Deserialize)]
struct Info {
    features: BTreeMap<String, Feature>,
}

#[derive(Deserialize)]
struct Feature {
    #[serde(rename = "_type")]
    kind: Option<String>,
    names: Option<Vec<String>>,
}

/// The column that has one of the names; otherwise the only one that is noted to be of that kind.
fn pick(
    columns: &[TypePtr],
    features: &BTreeMap<String, Feature>,
    kind: &str,
    names: &[&str],
    fits: fn(&Type) -> bool,
) -> Option<TypePtr> {
    let column = |name: &str| columns.iter().find(|it| it.name() == name && fits(it));
    if let Some(named) = names.iter().find_map(|name| column(name)) {
        return Some(named.clone());
    }
    let is_kind = |feature: &Feature| feature.kind.as_deref() == Some(kind);
    let mut noted = features.iter().filter(|(_, it)| is_kind(it));
    match (noted.next(), noted.next()) {
        (Some((name, _)), None) => column(name).cloned(),
        _ => None,
    }
}

fn repeats(column: &Type) -> bool {
    let info = column.get_basic_info();
    info.has_repetition() && info.repetition() == Repetition::REPEATED
}

fn holds_bytes(column: &Type) -> bool {
    column.is_primitive()
        && column.get_physical_type() == PhysicalType::BYTE_ARRAY
        && !repeats(column)
}

fn holds_images(column: &Type) -> bool {
    let flat = |field: &TypePtr| field.is_primitive() && !repeats(field);
    let has_bytes = |field: &TypePtr| field.name() == "bytes" && holds_bytes(field);
    holds_bytes(column)
        || column.is_group()
            && !repeats(column)
            && column.get_fields().iter().all(flat)
            && column.get_fields().iter().any(has_bytes)
}

fn holds_labels(column: &Type) -> bool {
    let whole = [PhysicalType::INT32, PhysicalType::INT64];
    let is_whole = column.is_primitive() && whole.contains(&column.get_physical_type());
    (is_whole && !repeats(column)) || holds_bytes(column)
}

enum Label {
    Number(i64),
    Name(String),
}

impl Label {
    fn of(field: Field) -> Option<Self> {
        Some(match field {
            Field::Byte(number) => Self::Number(number.into()),
            Field::Short(number) => Self::Number(number.into()),
            Field::Int(number) => Self::Number(number.into()),
            Field::Long(number) => Self::Number(number),
            Field::UByte(number) => Self::Number(number.into()),
            Field::UShort(number) => Self::Number(number.into()),
            Field::UInt(number) => Self::Number(number.into()),
            Field::ULong(number) => Self::Number(i64::try_from(number).ok()?),
            Field::Str(name) => Self::Name(name),
            _ => return None,
        })
    }

    fn text(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Name(name) => name.clone(),
        }
    }
}

/// Names, and the place of each.
struct Classes {
    names: Vec<String>,
    places: HashMap<String, usize>,
}

impl Classes {
    /// As they are noted; or as the labels are: the names in order, or each number up to the largest.
    fn of<'a>(noted: Option<Vec<String>>, labels: impl Iterator<Item = &'a Label>) -> Self {
        let names = noted.unwrap_or_else(|| {
            let (mut names, mut largest) = (BTreeSet::new(), None);
            for label in labels {
                match label {
                    Label::Number(number) => largest = largest.max(Some(*number)),
                    Label::Name(name) => drop(names.insert(name.clone())),
                }
            }
            // One beyond that is not named, and so refused.
            let numbers = 0..largest
                .map_or(0, |it| it.saturating_add(1))
                .min(MAX_CLASSES as i64);
            match names.is_empty() {
                true => numbers.map(|number| number.to_string()).collect(),
                false => names.into_iter().collect(),
            }
        });
        let places = names.iter().cloned().enumerate();
        Self {
            places: places.map(|(place, name)| (name, place)).collect(),
            names,
        }
    }

    fn index(&self, label: &Label, file: &str, row: usize) -> Result<usize, ParquetError> {
        let classes = self.names.len();
        match label {
            Label::Number(number) => match usize::try_from(*number) {
                Ok(place) if place < classes => Ok(place),
                _ if *number == -1 => {
                    let rule =
                        "has the label -1, which says that there is none; leave its file away";
                    Err(broken(file, row, rule))
                }
                _ => Err(ParquetError::Label {
                    file: file.to_owned(),
                    row,
                    label: *number,
                    classes: classes.max(1),
                }),
            },
            Label::Name(name) => self.places.get(name).copied().ok_or_else(|| {
                let rule = format!("has the label `{}`, which is no class", label.text());
                broken(file, row, &rule)
            }),
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

fn reader(file: &File) -> Result<SerializedFileReader<File>, LibraryError> {
    SerializedFileReader::new(file.try_clone()?)
}

/// One column, row by row.
fn rows(
    file: &File,
    name: &str,
    column: &TypePtr,
) -> Result<impl Iterator<Item = Result<Field, ParquetError>>, ParquetError> {
    let mut rows = guarded(name, || {
        let reader = reader(file)?;
        // What is read must be named as the whole is.
        let root = reader.metadata().file_metadata().schema().name().to_owned();
        let schema = Type::group_type_builder(&root).with_fields(vec![Arc::clone(column)]);
        let rows = RowIter::from_file_into(Box::new(reader));
        // It reads that many images ahead.
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

/// The library panics over some files that it should refuse.
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

/// All of the footer is read into memory, and more than its size made of it.
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

fn check_pages(
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

#[cfg(test)]
mod tests;

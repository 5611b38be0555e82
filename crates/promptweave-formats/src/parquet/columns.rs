//! Finding the columns of images and labels.

use std::collections::BTreeMap;

use parquet::basic::{Repetition, Type as PhysicalType};
use parquet::file::metadata::FileMetaData;
use parquet::schema::types::{Type, TypePtr};
use serde::Deserialize;

use crate::parquet::ParquetError;

pub(super) struct Columns {
    pub images: TypePtr,
    pub labels: TypePtr,
    /// Class names in label order, if the file has them.
    pub classes: Option<Vec<String>>,
}

impl Columns {
    /// Finds the columns. `file` is the name in errors.
    pub fn of(metadata: &FileMetaData, file: &str) -> Result<Self, ParquetError> {
        let noted = metadata.key_value_metadata().into_iter().flatten();
        let mut features = noted
            .filter(|pair| pair.key == "huggingface")
            .find_map(|pair| serde_json::from_str::<Noted>(pair.value.as_deref()?).ok())
            .map(|noted| noted.info.features)
            .unwrap_or_default();
        let columns = metadata.schema_descr().root_schema().get_fields();
        let there = || {
            let names: Vec<_> = columns
                .iter()
                .map(|it| format!("`{}`", it.name()))
                .collect();
            names.join(", ")
        };
        let names = ["image", "img"];
        let images = pick(columns, &features, "Image", &names, holds_images);
        let images = images.ok_or_else(|| ParquetError::NoImages {
            file: file.to_owned(),
            there: there(),
        })?;
        let names = ["label", "labels"];
        let labels = pick(columns, &features, "ClassLabel", &names, holds_labels);
        let labels = labels.ok_or_else(|| ParquetError::NoLabels {
            file: file.to_owned(),
            there: there(),
        })?;
        Ok(Self {
            classes: features.remove(labels.name()).and_then(|it| it.names),
            images,
            labels,
        })
    }
}

/// The notes of Hugging Face's library about the columns.
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

/// The column with one of the names; otherwise the only one that is noted to be of that kind.
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

//! Predictions as a table: CSV, JSON Lines or Parquet, all with the same columns.
//!
//! | column | |
//! |---|---|
//! | `image` | the image's path |
//! | `label` | its class, where it is known |
//! | `class`, `probability` | the most probable class |
//! | `class_2`, `probability_2`, … | the next ones, down to the k-th |

use std::io;
use std::io::Write;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, DoubleType};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Map, json};

use promptweave_domain::prediction::TableFormat;

/// The predictions for some images.
#[derive(Clone, Debug, PartialEq)]
pub struct PredictionTable {
    pub rows: Vec<PredictionRow>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct PredictionRow {
    pub image: String,
    /// The image's class. Either all rows have one or none.
    pub label: Option<String>,
    /// The most probable classes with their probabilities, at least one, as many in every row.
    pub top: Vec<(String, f64)>,
}

#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the Parquet file cannot be written")]
    Parquet(#[from] ParquetError),
}

/// One column's name and values.
enum Column<'a> {
    Text(String, Vec<&'a str>),
    Number(String, Vec<f64>),
}

impl PredictionTable {
    pub fn write(&self, format: TableFormat, out: impl Write + Send) -> Result<(), TableError> {
        match format {
            TableFormat::Csv => self.write_csv(out),
            TableFormat::Jsonl => self.write_jsonl(out),
            TableFormat::Parquet => self.write_parquet(out),
        }
    }

    fn columns(&self) -> Vec<Column<'_>> {
        let rows = || self.rows.iter();
        let mut columns = vec![Column::Text(
            "image".to_owned(),
            rows().map(|row| row.image.as_str()).collect(),
        )];
        if self.rows.iter().any(|row| row.label.is_some()) {
            let labels = rows().map(|row| row.label.as_deref().unwrap_or_default());
            columns.push(Column::Text("label".to_owned(), labels.collect()));
        }
        for place in 0..self.rows.first().map_or(1, |row| row.top.len()) {
            let name = |of: &str| match place {
                0 => of.to_owned(),
                _ => format!("{of}_{}", place + 1),
            };
            let classes = rows().map(|row| row.top[place].0.as_str());
            columns.push(Column::Text(name("class"), classes.collect()));
            let probabilities = rows().map(|row| row.top[place].1);
            columns.push(Column::Number(name("probability"), probabilities.collect()));
        }
        columns
    }

    fn write_csv(&self, out: impl Write) -> Result<(), TableError> {
        let columns = self.columns();
        let mut csv = csv::Writer::from_writer(out);
        let written = (|| {
            csv.write_record(columns.iter().map(Column::name))?;
            for row in 0..self.rows.len() {
                for column in &columns {
                    match column {
                        Column::Text(_, values) => csv.write_field(values[row])?,
                        Column::Number(_, values) => csv.write_field(values[row].to_string())?,
                    }
                }
                csv.write_record(None::<&[u8]>)?;
            }
            Ok(csv.flush()?)
        })();
        written.map_err(|error: csv::Error| TableError::Io(error.into()))
    }

    fn write_jsonl(&self, mut out: impl Write) -> Result<(), TableError> {
        let columns = self.columns();
        for row in 0..self.rows.len() {
            let fields = columns.iter().map(|column| match column {
                Column::Text(name, values) => (name.clone(), json!(values[row])),
                Column::Number(name, values) => (name.clone(), json!(values[row])),
            });
            let object: Map<_, _> = fields.collect();
            writeln!(out, "{}", serde_json::Value::Object(object))?;
        }
        Ok(out.flush()?)
    }

    fn write_parquet(&self, out: impl Write + Send) -> Result<(), TableError> {
        let columns = self.columns();
        let fields = columns.iter().map(|column| match column {
            Column::Text(name, _) => format!("required binary {name} (utf8);"),
            Column::Number(name, _) => format!("required double {name};"),
        });
        let fields = fields.collect::<String>();
        let schema = parse_message_type(&format!("message predictions {{ {fields} }}"))?;
        let properties = Arc::new(WriterProperties::new());
        let mut writer = SerializedFileWriter::new(out, Arc::new(schema), properties)?;
        let mut group = writer.next_row_group()?;
        for column in &columns {
            let mut writer = group.next_column()?.expect("as many as in the schema");
            match column {
                Column::Text(_, values) => {
                    let values: Vec<_> = values.iter().map(|it| ByteArray::from(*it)).collect();
                    let typed = writer.typed::<ByteArrayType>();
                    typed.write_batch(&values, None, None)?;
                }
                Column::Number(_, values) => {
                    let typed = writer.typed::<DoubleType>();
                    typed.write_batch(values, None, None)?;
                }
            }
            writer.close()?;
        }
        group.close()?;
        writer.close()?;
        Ok(())
    }
}

impl Column<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Text(name, _) | Self::Number(name, _) => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::Field;

    fn table(labels: bool) -> PredictionTable {
        let row = |image: &str, top: [(&str, f64); 2]| PredictionRow {
            image: image.to_owned(),
            label: labels.then(|| "dog".to_owned()),
            top: top.map(|(class, p)| (class.to_owned(), p)).to_vec(),
        };
        PredictionTable {
            rows: vec![
                row("a.png", [("dog", 0.75), ("cat", 0.25)]),
                row("b,\"c\".png", [("cat", 0.5), ("a\nhorse", 0.125)]),
            ],
        }
    }

    fn written(labels: bool, format: TableFormat) -> Vec<u8> {
        let mut bytes = Vec::new();
        table(labels).write(format, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn csv_quotes_what_it_must() {
        let text = String::from_utf8(written(true, TableFormat::Csv)).unwrap();
        assert_eq!(
            text,
            "image,label,class,probability,class_2,probability_2\n\
             a.png,dog,dog,0.75,cat,0.25\n\
             \"b,\"\"c\"\".png\",dog,cat,0.5,\"a\nhorse\",0.125\n"
        );
    }

    #[test]
    fn json_lines_and_parquet_have_the_same_fields() {
        for labels in [false, true] {
            let text = String::from_utf8(written(labels, TableFormat::Jsonl)).unwrap();
            let lines: Vec<serde_json::Value> = text
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
            let bytes = bytes::Bytes::from(written(labels, TableFormat::Parquet));
            let parquet = SerializedFileReader::new(bytes).unwrap();
            let rows: Vec<serde_json::Value> = parquet
                .get_row_iter(None)
                .unwrap()
                .map(|row| {
                    let row = row.unwrap();
                    let fields = row.get_column_iter().map(|(name, field)| match field {
                        Field::Str(text) => (name.clone(), json!(text)),
                        Field::Double(number) => (name.clone(), json!(number)),
                        other => panic!("{other:?}"),
                    });
                    serde_json::Value::Object(fields.collect())
                })
                .collect();
            assert_eq!(rows, lines);
            assert_eq!(lines[1]["class_2"], "a\nhorse");
            assert_eq!(lines[0].get("label").is_some(), labels);
        }
    }
}

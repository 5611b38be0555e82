use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;

fn fixtures() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../tests/fixtures/parquet"]
        .iter()
        .collect()
}

fn shard(bytes: &[u8]) -> Shard {
    let mut file = tempfile::tempfile().unwrap();
    io::Write::write_all(&mut file, bytes).unwrap();
    Shard {
        split: Split::Train,
        name: "it".to_owned(),
        file,
    }
}

enum Column<'a> {
    Bytes(&'a [&'a str]),
    Numbers(&'a [i64]),
}

/// A file made by the library's own writer.
fn written(schema: &str, columns: &[Column<'_>]) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let properties = Arc::new(WriterProperties::new());
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for column in columns {
        let mut out = group.next_column().unwrap().unwrap();
        match column {
            Column::Bytes(values) => {
                let values: Vec<_> = values.iter().map(|it| ByteArray::from(*it)).collect();
                let typed = out.typed::<ByteArrayType>();
                typed.write_batch(&values, None, None).unwrap();
            }
            Column::Numbers(values) => {
                let typed = out.typed::<Int64Type>();
                typed.write_batch(values, None, None).unwrap();
            }
        }
        out.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    match ParquetImages::open(vec![shard(bytes)]) {
        Ok(_) => panic!("it was taken"),
        Err(error) => error.to_string(),
    }
}

const FLAT: &str = "message m { required binary image; required int64 label; }";

#[test]
fn what_the_datasets_library_writes_is_read_in_order() {
    let read = ParquetImages::open(shards(&fixtures()).unwrap()).unwrap();
    assert_eq!(read.classes, ["cat", "dog", "owl"]);
    let found: Vec<_> = read
        .shards
        .iter()
        .map(|it| (it.split, &it.labels[..]))
        .collect();
    let expected: [(Split, &[usize]); 3] = [
        (Split::Train, &[0, 1, 2, 0]),
        (Split::Train, &[1, 2]),
        (Split::Test, &[0, 1, 2]),
    ];
    assert_eq!(found, expected);
    let mut number = 0;
    for shard in &read.shards {
        let images: Vec<_> = shard.images().unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(images.len(), shard.labels.len());
        for image in images {
            let image = crate::image::decode(&image).unwrap();
            assert_eq!(image.get_pixel(3, 2).0, [number * 20, 0, 99]);
            number += 1;
        }
    }
}

#[test]
fn names_of_files_and_folders_tell_the_split() {
    let dir = tempfile::tempdir().unwrap();
    let found = |names: &[&str]| {
        let dir = dir.path().join(names.join("+").replace('/', "_"));
        for name in names {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let found = shards(&dir).unwrap().into_iter();
        found
            .map(|it| (it.split.name(), it.name))
            .collect::<Vec<_>>()
    };
    let owned = |list: &[(&'static str, &str)]| -> Vec<_> {
        list.iter()
            .map(|(split, name)| (*split, (*name).to_owned()))
            .collect()
    };
    assert_eq!(
        found(&[
            "data/train-0-of-1.parquet",
            "data/extra-0-of-1.parquet",
            "README.md"
        ]),
        owned(&[("train", "data/train-0-of-1.parquet")])
    );
    assert_eq!(
        found(&["validation/0.parquet", "train/0.parquet", "other/0.parquet"]),
        owned(&[
            ("train", "train/0.parquet"),
            ("val", "validation/0.parquet")
        ])
    );
    assert_eq!(
        found(&["0000.parquet"]),
        owned(&[("train", "0000.parquet")])
    );
    assert_eq!(found(&["train.csv"]), []);
}

#[test]
fn labels_are_numbers_or_names() {
    let classes = |bytes: &[u8]| {
        let read = ParquetImages::open(vec![shard(bytes)]).unwrap();
        (read.classes, read.shards[0].labels.clone())
    };
    let numbers = written(
        FLAT,
        &[Column::Bytes(&["a", "b"]), Column::Numbers(&[2, 0])],
    );
    let names: Vec<String> = ["0", "1", "2"].map(str::to_owned).to_vec();
    assert_eq!(classes(&numbers), (names, vec![2, 0]));
    let schema = "message m { required binary img; required binary label (UTF8); }";
    let named = written(
        schema,
        &[Column::Bytes(&["a", "b"]), Column::Bytes(&["owl", "cat"])],
    );
    let names: Vec<String> = ["cat", "owl"].map(str::to_owned).to_vec();
    assert_eq!(classes(&named), (names, vec![1, 0]));
}

#[test]
fn what_is_no_data_set_is_told_by_row_and_column() {
    let unlabelled = written(
        FLAT,
        &[Column::Bytes(&["a", "b"]), Column::Numbers(&[0, -1])],
    );
    assert!(refusal(&unlabelled).starts_with("row 1 of `it` has the label -1"));
    let far = written(FLAT, &[Column::Bytes(&["a"]), Column::Numbers(&[i64::MAX])]);
    assert!(refusal(&far).contains("outside the 100000 classes"));
    let schema = "message m { required binary picture; required int64 label; }";
    let other = written(schema, &[Column::Bytes(&["a"]), Column::Numbers(&[0])]);
    let error = refusal(&other);
    assert!(error.ends_with("it has `picture`, `label`"), "{error}");
    let schema = "message m { required binary image; required int64 kind; }";
    let other = written(schema, &[Column::Bytes(&["a"]), Column::Numbers(&[0])]);
    assert!(refusal(&other).contains("no column of labels"));

    let fixture = |name: &str| shard(&fs::read(fixtures().join(name)).unwrap());
    let plain = shard(&far);
    let error = ParquetImages::open(vec![fixture("test-00000-of-00001.parquet"), plain]);
    assert!(matches!(error, Err(ParquetError::Label { classes: 3, .. })));
}

#[test]
fn a_damaged_file_is_refused_and_nothing_else_happens() {
    let whole = fs::read(fixtures().join("test-00000-of-00001.parquet")).unwrap();
    assert!(refusal(&whole[..whole.len() - 1]).contains("cut off"));
    assert!(refusal(b"PAR1PAR1").contains("no sound Parquet file"));
    // Whichever byte is changed, no panic of the library gets out.
    for at in 0..whole.len() {
        for flip in [1, 0x80] {
            let mut broken = whole.clone();
            broken[at] ^= flip;
            if let Ok(read) = ParquetImages::open(vec![shard(&broken)])
                && let Ok(images) = read.shards[0].images()
            {
                assert!(images.take(4).count() <= 4);
            }
        }
    }
}

#[test]
fn a_page_that_declares_too_much_is_not_unpacked() {
    // The header has type 0, the unpacked size, a packed size of 1 byte and an end; then the byte.
    let page = |unpacked: u64| {
        let mut header = vec![0x15, 0, 0x15];
        let mut rest = unpacked << 1;
        while rest > 0x7f {
            header.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        header.extend([rest as u8, 0x15, 2, 0, 7]);
        header
    };
    let bytes = [page(9), page(MAX_PAGE + 1)].concat();
    let file = shard(&bytes).file;
    let found = pages::sizes(&file, 0, bytes.len() as u64, 9)
        .unwrap()
        .unwrap();
    assert_eq!((found.pages, found.largest), (2, MAX_PAGE + 1));
    // A page that is cut off, and bytes that are no page.
    assert_eq!(
        pages::sizes(&file, 0, bytes.len() as u64 - 3, 9).unwrap(),
        None
    );
    assert_eq!(
        pages::sizes(&shard(&[0xff; 64]).file, 0, 64, 9).unwrap(),
        None
    );
}

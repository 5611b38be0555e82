//! A dataset as one file: a tar that [`Listing::read`] understands once it is unpacked.
//!
//! It holds the original bytes of the images under `images/`, then those of `train.txt`, `val.txt` and `test.txt` that
//! exist, and `meta.json` with the class names. Order, times, owners and modes are fixed, so equal datasets have equal
//! bytes: the pack's sha256 is the version's digest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Component, Path, PathBuf};

use serde_json::json;

use promptweave_domain::split::Split;
use promptweave_formats::dataset::{DatasetError, Listing};
use promptweave_formats::error::ArchiveError;
use promptweave_formats::error::FileError;
use promptweave_formats::files::stays_inside;
use promptweave_formats::files::{Directory, Files};
use promptweave_formats::image::{UnreadableImage, decode};
use promptweave_formats::parquet;
use promptweave_formats::parquet::{ParquetError, ParquetImages, Shard};

/// The largest image file accepted, in bytes; images are read one at a time.
const MAX_IMAGE_BYTES: u64 = 64 << 20;

/// The contents of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Class names in label order.
    pub classes: Vec<String>,
    /// Images of each split by class, in label order.
    pub class_counts: BTreeMap<Split, Vec<u64>>,
    /// Paths of the unreadable images that were left out.
    pub skipped: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error(transparent)]
    Listing(#[from] DatasetError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("image `{path}` is {size} bytes large, more than {MAX_IMAGE_BYTES}")]
    TooLarge { path: String, size: u64 },
    #[error("image `{path}` cannot be opened")]
    Missing { path: String, source: io::Error },
    #[error("image `{path}` cannot be decoded")]
    Unreadable {
        path: String,
        source: UnreadableImage,
    },
    /// A list file could not name this path.
    #[error("image path {0:?} holds a control character")]
    ControlCharacter(String),
    #[error(transparent)]
    Parquet(#[from] ParquetError),
    #[error("no training image is left: {0} cannot be read")]
    NothingLeft(usize),
    #[error("the images have more than {0} bytes together")]
    PackTooLarge(u64),
    #[error("the pack holds `{0}`, which is no file inside it")]
    Foreign(PathBuf),
    #[error("cannot read or write the pack")]
    Io(#[from] io::Error),
}

impl PackError {
    /// The image that could not be read, if it is one that `skip_unreadable` may leave out.
    pub fn bad_image(&self) -> Option<&str> {
        match self {
            Self::TooLarge { path, .. }
            | Self::Missing { path, .. }
            | Self::Unreadable { path, .. } => Some(path),
            _ => None,
        }
    }
}

/// [`pack_files`] of a folder, or [`pack_parquet`] of the files in it.
pub fn pack(root: &Path, skip_unreadable: bool, out: &Path) -> Result<Packed, PackError> {
    match pack_files(&Directory::new(root), skip_unreadable, out) {
        Err(PackError::Listing(DatasetError::Empty(_))) if !parquet::shards(root)?.is_empty() => {
            pack_parquet(parquet::shards(root)?, skip_unreadable, u64::MAX, out)
        }
        packed => packed,
    }
}

/// Lists files, decodes every image once and writes the pack to `out`. An image that cannot be read is an error that
/// names it; with `skip_unreadable` it is left out instead.
pub fn pack_files(
    files: &dyn Files,
    skip_unreadable: bool,
    out: &Path,
) -> Result<Packed, PackError> {
    let listed = Listing::read(files)?;
    let mut packer = Packer::new(out, listed.classes, skip_unreadable, u64::MAX)?;
    // One image may be in several lists; it is read and stored once.
    let mut stored = BTreeMap::new();
    for (split, images) in &listed.splits {
        packer.begin(*split);
        for image in images {
            let path = normal(&image.path)?;
            let is_good = match stored.get(&path) {
                Some(is_good) => *is_good,
                None => {
                    let is_good = packer.store(&path, read_image(files, &image.path))?;
                    stored.insert(path.clone(), is_good);
                    is_good
                }
            };
            if is_good {
                packer.list(*split, &path, image.label);
            }
        }
    }
    packer.finish()
}

/// Packs the images of Parquet files, numbered within their split. The pack may have at most `max_bytes`.
pub fn pack_parquet(
    shards: Vec<Shard>,
    skip_unreadable: bool,
    max_bytes: u64,
    out: &Path,
) -> Result<Packed, PackError> {
    let ParquetImages { classes, shards } = ParquetImages::open(shards)?;
    let mut packer = Packer::new(out, classes, skip_unreadable, max_bytes)?;
    let mut numbers = BTreeMap::new();
    for shard in &shards {
        packer.begin(shard.split);
        let number = numbers.entry(shard.split).or_insert(0);
        for (row, (image, label)) in shard.images()?.zip(&shard.labels).enumerate() {
            let path = format!("{IMAGES}{}/{number:06}", shard.split.name());
            *number += 1;
            let image = checked(image?, &format!("row {row} of {}", shard.name));
            if packer.store(&path, image)? {
                packer.list(shard.split, &path, *label);
            }
        }
    }
    packer.finish()
}

/// Writes a pack: images first, lists and class names at the end.
struct Packer {
    tar: tar::Builder<BufWriter<File>>,
    classes: Vec<String>,
    skip_unreadable: bool,
    skipped: BTreeSet<String>,
    /// For each split so far, its list file, and the number of its images by class.
    splits: BTreeMap<Split, (String, Vec<u64>)>,
    max_bytes: u64,
    written: u64,
}

impl Packer {
    fn new(
        out: &Path,
        classes: Vec<String>,
        skip_unreadable: bool,
        max_bytes: u64,
    ) -> Result<Self, PackError> {
        Ok(Self {
            tar: tar::Builder::new(BufWriter::new(File::create(out)?)),
            classes,
            skip_unreadable,
            skipped: BTreeSet::new(),
            splits: BTreeMap::new(),
            max_bytes,
            written: 0,
        })
    }

    fn begin(&mut self, split: Split) {
        let classes = self.classes.len();
        let begun = self.splits.entry(split);
        begun.or_insert_with(|| (String::new(), vec![0; classes]));
    }

    /// Stores an image and returns `true`, or leaves it out and returns `false`.
    fn store(&mut self, path: &str, image: Result<Vec<u8>, PackError>) -> Result<bool, PackError> {
        let bytes = match image {
            Ok(bytes) => bytes,
            Err(error) => match error.bad_image() {
                Some(image) if self.skip_unreadable => {
                    self.skipped.insert(image.to_owned());
                    return Ok(false);
                }
                _ => return Err(error),
            },
        };
        self.written += bytes.len() as u64;
        if self.written > self.max_bytes {
            return Err(PackError::PackTooLarge(self.max_bytes));
        }
        append(&mut self.tar, path, &bytes)?;
        Ok(true)
    }

    fn list(&mut self, split: Split, path: &str, label: usize) {
        let (list, counts) = self.splits.get_mut(&split).expect("the split was begun");
        writeln!(list, "{path} {label}").expect("a String takes everything");
        counts[label] += 1;
    }

    fn finish(mut self) -> Result<Packed, PackError> {
        let train = self.splits.get(&Split::Train);
        if train.is_none_or(|(list, _)| list.is_empty()) {
            return Err(PackError::NothingLeft(self.skipped.len()));
        }
        for (split, (list, _)) in &self.splits {
            let name = format!("{}.txt", split.name());
            append(&mut self.tar, &name, list.as_bytes())?;
        }
        let meta = json!({ "classes": self.classes }).to_string();
        append(&mut self.tar, "meta.json", meta.as_bytes())?;
        self.tar.into_inner()?.flush()?;
        let counts = |(split, (_, counts))| (split, counts);
        Ok(Packed {
            classes: self.classes,
            class_counts: self.splits.into_iter().map(counts).collect(),
            skipped: self.skipped.into_iter().collect(),
        })
    }
}

/// Writes the files of a pack into the existing folder `dir`.
pub fn unpack(pack: &Path, dir: &Path) -> Result<(), PackError> {
    let mut tar = tar::Archive::new(io::BufReader::new(File::open(pack)?));
    for entry in tar.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let inside = path.to_str().is_some_and(stays_inside);
        if !inside || entry.header().entry_type() != tar::EntryType::Regular {
            return Err(PackError::Foreign(path));
        }
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        io::copy(&mut entry, &mut File::create(path)?)?;
    }
    Ok(())
}

const IMAGES: &str = "images/";

/// The normal form of a path in the pack: each file has one spelling, which differs from the list files' names.
fn normal(path: &str) -> Result<String, PackError> {
    if path.contains(char::is_control) {
        return Err(PackError::ControlCharacter(path.to_owned()));
    }
    let parts: Vec<_> = Path::new(path)
        .components()
        .filter_map(|part| match part {
            Component::Normal(part) => part.to_str(),
            _ => None,
        })
        .collect();
    Ok(format!("{IMAGES}{}", parts.join("/")))
}

fn read_image(files: &dyn Files, path: &str) -> Result<Vec<u8>, PackError> {
    let bytes = files.read(path, MAX_IMAGE_BYTES).map_err(|error| {
        let path = path.to_owned();
        match error {
            FileError::TooLarge { size, .. } => PackError::TooLarge { path, size },
            FileError::Io(source) => PackError::Missing { path, source },
            FileError::Archive(error) => error.into(),
        }
    })?;
    checked(bytes, path)
}

/// An image file, checked that it can be decoded; `path` is its name in errors.
fn checked(bytes: Vec<u8>, path: &str) -> Result<Vec<u8>, PackError> {
    let (path, size) = (path.to_owned(), bytes.len() as u64);
    if size > MAX_IMAGE_BYTES {
        return Err(PackError::TooLarge { path, size });
    }
    match decode(&bytes) {
        Ok(_) => Ok(bytes),
        Err(source) => Err(PackError::Unreadable { path, source }),
    }
}

fn append<W: io::Write>(tar: &mut tar::Builder<W>, path: &str, bytes: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    tar.append_data(&mut header, path, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use promptweave_domain::digest::Digest;
    use promptweave_formats::dataset::LabelledImages;

    fn png(value: u8) -> Vec<u8> {
        let mut bytes = io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(3, 2, image::Rgb([value, 0, 0]))
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, bytes) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        dir
    }

    /// Packs and unpacks; returns the listing and each image's bytes, in order.
    fn round_trip(root: &Path, skip_unreadable: bool) -> (Packed, Vec<(Split, usize, Vec<u8>)>) {
        let dir = tempfile::tempdir().unwrap();
        let tar = dir.path().join("pack.tar");
        let packed = pack(root, skip_unreadable, &tar).unwrap();
        let again = dir.path().join("again.tar");
        pack(root, skip_unreadable, &again).unwrap();
        assert_eq!(
            Digest::of(&fs::read(&tar).unwrap()),
            Digest::of(&fs::read(&again).unwrap())
        );
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        unpack(&tar, &out).unwrap();
        let listed = LabelledImages::read(&out).unwrap();
        assert_eq!(listed.classes, packed.classes);
        (packed, contents(&listed))
    }

    fn contents(listed: &LabelledImages) -> Vec<(Split, usize, Vec<u8>)> {
        let mut all = Vec::new();
        for (split, images) in &listed.splits {
            for image in images {
                let bytes = fs::read(listed.image_path(image)).unwrap_or_default();
                all.push((*split, image.label, bytes));
            }
        }
        all
    }

    #[test]
    fn an_image_folder_comes_back_in_order() {
        let long = format!("train/dog/{}.png", "n".repeat(150));
        let dir = folder(&[
            ("train/cat/b c.png", &png(1)),
            ("train/cat/a.png", &png(2)),
            (&long, &png(3)),
            ("test/dog/1.png", &png(4)),
        ]);
        let (packed, unpacked) = round_trip(dir.path(), false);
        assert_eq!(
            unpacked,
            contents(&LabelledImages::read(dir.path()).unwrap())
        );
        assert_eq!(packed.classes, ["cat", "dog"]);
        assert_eq!(packed.class_counts[&Split::Train], [2, 1]);
        assert_eq!(packed.class_counts[&Split::Test], [0, 1]);
    }

    #[test]
    fn list_files_come_back_in_order_with_shared_images_and_other_spellings() {
        let dir = folder(&[
            ("meta.json", br#"{"classes": ["x", "y", "z"]}"#),
            ("train800val200.txt", b"p/./1.png 2\ntrain.txt 0\n"),
            ("val200.txt", b"p//1.png 2\n"),
            ("p/1.png", &png(1)),
            // An image named like a list file stays apart from the list.
            ("train.txt", &png(2)),
        ]);
        let (packed, unpacked) = round_trip(dir.path(), false);
        assert_eq!(
            unpacked,
            contents(&LabelledImages::read(dir.path()).unwrap())
        );
        assert_eq!(packed.class_counts[&Split::Val], [0, 0, 1]);
    }

    #[test]
    fn a_bad_image_is_named_or_left_out() {
        let dir = folder(&[
            ("cat/1.png", &png(1)),
            ("cat/2.png", b"not an image"),
            ("dog/3.png", &png(3)),
        ]);
        let out = dir.path().join("pack.tar");
        let error = pack(dir.path(), false, &out).unwrap_err();
        assert_eq!(error.to_string(), "image `cat/2.png` cannot be decoded");
        let (packed, unpacked) = round_trip(dir.path(), true);
        assert_eq!(packed.skipped, ["cat/2.png"]);
        assert_eq!(unpacked.len(), 2);

        let dir = folder(&[("cat/2.png", b"not an image")]);
        let error = pack(dir.path(), true, &out).unwrap_err();
        assert!(matches!(error, PackError::NothingLeft(1)));
    }

    #[test]
    fn a_foreign_archive_does_not_leave_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let tar_path = dir.path().join("evil.tar");
        // `append_data` refuses `..` itself, so the name is written into the raw header.
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..7].copy_from_slice(b"../evil");
        header.set_size(4);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        let mut tar = tar::Builder::new(File::create(&tar_path).unwrap());
        tar.append(&header, &b"evil"[..]).unwrap();
        tar.into_inner().unwrap();
        assert!(matches!(
            unpack(&tar_path, &out),
            Err(PackError::Foreign(_))
        ));
        assert!(!dir.path().join("evil").exists());

        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        let mut tar = tar::Builder::new(File::create(&tar_path).unwrap());
        tar.append_link(&mut header, "link", "/etc").unwrap();
        tar.into_inner().unwrap();
        assert!(matches!(
            unpack(&tar_path, &out),
            Err(PackError::Foreign(_))
        ));
    }
}

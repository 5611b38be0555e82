//! A data set as one file: a tar whose files [`Listing::read`] understands once it is unpacked.
//!
//! It holds the original bytes of the images under `images/`, then `train.txt`, `val.txt`,
//! `test.txt` (those that there are) and `meta.json` with the class names. Order, times, owners and
//! modes are fixed, so equal data sets are equal bytes: the pack's sha256 is the version's digest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Component, Path, PathBuf};

use serde_json::json;

use crate::domain::archive::ArchiveError;
use crate::domain::dataset::{DatasetError, Listing, Split, stays_inside};
use crate::domain::files::{Directory, FileError, Files};
use crate::domain::image::{UnreadableImage, decode};

/// Largest image file accepted, in bytes; the images are read one at a time.
const MAX_IMAGE_BYTES: u64 = 64 << 20;

/// What a pack holds.
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
    /// A list file could not name it.
    #[error("image path {0:?} holds a control character")]
    ControlCharacter(String),
    #[error("none of the {0} training images can be read")]
    NothingLeft(usize),
    #[error("the pack holds `{0}`, which is no file inside it")]
    Foreign(PathBuf),
    #[error("cannot read or write the pack")]
    Io(#[from] io::Error),
}

impl PackError {
    /// The image at fault, where it is one that `skip_bad` may leave out.
    pub fn bad_image(&self) -> Option<&str> {
        match self {
            Self::TooLarge { path, .. }
            | Self::Missing { path, .. }
            | Self::Unreadable { path, .. } => Some(path),
            _ => None,
        }
    }
}

/// [`pack_files`] of a folder.
pub fn pack(root: &Path, skip_bad: bool, out: &Path) -> Result<Packed, PackError> {
    pack_files(&Directory::new(root), skip_bad, out)
}

/// Lists files, decodes every image once and writes the pack to `out`. An image that cannot be read
/// is an error that names it, or with `skip_bad` is left out.
pub fn pack_files(files: &dyn Files, skip_bad: bool, out: &Path) -> Result<Packed, PackError> {
    pack_listed(Listing::read(files)?, files, skip_bad, out)
}

fn pack_listed(
    listed: Listing,
    files: &dyn Files,
    skip_bad: bool,
    out: &Path,
) -> Result<Packed, PackError> {
    let mut tar = tar::Builder::new(BufWriter::new(File::create(out)?));
    // One image may be in several lists; it is read and stored once.
    let mut stored = BTreeSet::new();
    let mut skipped = BTreeSet::new();
    let mut class_counts = BTreeMap::new();
    let mut lists = Vec::new();
    for (split, images) in &listed.splits {
        let mut counts = vec![0; listed.classes.len()];
        let mut list = String::new();
        for image in images {
            let path = normal(&image.path)?;
            if skipped.contains(&path) {
                continue;
            }
            if !stored.contains(&path) {
                match read_image(files, &image.path) {
                    Ok(bytes) => append(&mut tar, &path, &bytes)?,
                    Err(error) if skip_bad && error.bad_image().is_some() => {
                        skipped.insert(path);
                        continue;
                    }
                    Err(error) => return Err(error),
                }
                stored.insert(path.clone());
            }
            counts[image.label] += 1;
            writeln!(list, "{path} {}", image.label).expect("a String takes everything");
        }
        if *split == Split::Train && list.is_empty() {
            return Err(PackError::NothingLeft(images.len()));
        }
        class_counts.insert(*split, counts);
        lists.push((format!("{}.txt", split.name()), list));
    }
    for (name, list) in lists {
        append(&mut tar, &name, list.as_bytes())?;
    }
    let meta = json!({ "classes": listed.classes }).to_string();
    append(&mut tar, "meta.json", meta.as_bytes())?;
    tar.into_inner()?.flush()?;
    Ok(Packed {
        classes: listed.classes,
        class_counts,
        skipped: skipped.into_iter().map(original).collect(),
    })
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

/// The path in the pack: one spelling per file, apart from the list files' names.
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

fn original(path: String) -> String {
    path[IMAGES.len()..].to_owned()
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
    match decode(&bytes) {
        Ok(_) => Ok(bytes),
        Err(source) => Err(PackError::Unreadable {
            path: path.to_owned(),
            source,
        }),
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
    use crate::domain::dataset::LabelledImages;
    use crate::domain::digest::Digest;

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

    /// Packs and unpacks; the listing and each image's bytes, in order.
    fn round_trip(root: &Path, skip_bad: bool) -> (Packed, Vec<(Split, usize, Vec<u8>)>) {
        let dir = tempfile::tempdir().unwrap();
        let tar = dir.path().join("pack.tar");
        let packed = pack(root, skip_bad, &tar).unwrap();
        let again = dir.path().join("again.tar");
        pack(root, skip_bad, &again).unwrap();
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
            // An image that has a list file's name stays apart from the list.
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

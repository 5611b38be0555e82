//! Files by name, in a folder or in an archive, which is never unpacked.

use std::fs::{self, FileType};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::error::FileError;

/// A collection of files. Names have `/` between their parts; the outermost folder is `""`.
pub trait Files {
    fn is_file(&self, path: &str) -> bool;

    fn is_folder(&self, path: &str) -> bool;

    /// Names of the folders directly in `folder`, sorted.
    fn folders(&self, folder: &str) -> io::Result<Vec<String>>;

    /// Names of the files directly in `folder`, sorted.
    fn files(&self, folder: &str) -> io::Result<Vec<String>>;

    /// A file's bytes. A file with more than `max` bytes is refused.
    fn read(&self, path: &str, max: u64) -> Result<Vec<u8>, FileError>;

    /// The name of a file or folder in errors.
    fn shown(&self, path: &str) -> PathBuf;
}

/// A folder on the operator's disk. Names that are not UTF-8 count as absent.
#[derive(Clone, Debug)]
pub struct Directory(PathBuf);

impl Directory {
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    fn names(&self, folder: &str, keep: fn(&FileType) -> bool) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.shown(folder))? {
            let entry = entry?;
            if keep(&entry.file_type()?)
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

impl Files for Directory {
    fn is_file(&self, path: &str) -> bool {
        self.shown(path).is_file()
    }

    fn is_folder(&self, path: &str) -> bool {
        self.shown(path).is_dir()
    }

    fn folders(&self, folder: &str) -> io::Result<Vec<String>> {
        self.names(folder, FileType::is_dir)
    }

    fn files(&self, folder: &str) -> io::Result<Vec<String>> {
        self.names(folder, FileType::is_file)
    }

    fn read(&self, path: &str, max: u64) -> Result<Vec<u8>, FileError> {
        let file = fs::File::open(self.0.join(path))?;
        let size = file.metadata()?.len();
        if size > max {
            return Err(FileError::TooLarge { size, max });
        }
        let mut bytes = Vec::with_capacity(size as usize);
        file.take(max).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn shown(&self, path: &str) -> PathBuf {
        match path {
            "" => self.0.clone(),
            path => self.0.join(path),
        }
    }
}

/// Whether a relative path stays under its root, by its text alone.
pub fn stays_inside(path: &str) -> bool {
    use std::path::Component::Normal;
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Normal(_)))
}

/// Whether a name has the extension of an image.
pub fn is_image_name(name: &str) -> bool {
    let extension = Path::new(name)
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or("");
    ["jpg", "jpeg", "png", "bmp", "gif", "webp"]
        .iter()
        .any(|known| extension.eq_ignore_ascii_case(known))
}

//! Why a file or an archive cannot be read.

use std::io;

/// The most entries, folders included.
pub const MAX_ENTRIES: usize = 250_000;

/// Longest name of an entry, in bytes.
pub const MAX_NAME: usize = 1024;

/// How many times larger than itself an archive may be when unpacked, plus a constant. Images
/// hardly shrink.
pub const MAX_RATIO: u64 = 100;

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("it is no archive that can be read: expected tar, tar.gz or zip")]
    Unrecognised,
    #[error("the archive is damaged")]
    Damaged(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    #[error("the archive has more than {MAX_ENTRIES} entries; register it from a directory")]
    TooManyEntries,
    #[error("the archive unpacks to more than {0} bytes")]
    TooLarge(u64),
    #[error(
        "the archive unpacks to more than {MAX_RATIO} times its size, which images do not; send it \
         uncompressed"
    )]
    Ratio,
    #[error("entry `{0}`: a name must be UTF-8")]
    NotUtf8(String),
    #[error("entry `{0}`: a name has at most {MAX_NAME} bytes")]
    NameTooLong(String),
    #[error(
        "entry `{0}`: a name is relative, has `/` between its parts, and no `..`, `\\` or control \
         character"
    )]
    Outside(String),
    #[error("entry `{name}` is {kind}; only files and folders are taken")]
    NotAFile { name: String, kind: &'static str },
    #[error("entry `{0}` is there more than once")]
    Twice(String),
    #[error("entry `{0}` is an archive in the archive; unpack it first")]
    Nested(String),
    #[error("entry `{0}` is encrypted")]
    Encrypted(String),
    #[error("entry `{0}` is compressed in a way that is not supported; use deflate")]
    Compression(String),
    #[error("entry `{name}` declares {size} bytes, more than the archive has")]
    Truncated { name: String, size: u64 },
    #[error("entry `{name}` is damaged: it holds other than the {size} bytes it declares")]
    Lies { name: String, size: u64 },
    #[error("entry `{0}` has attributes that change its size or place")]
    Attributes(String),
}

impl ArchiveError {
    /// The entry at fault.
    pub fn entry(&self) -> Option<&str> {
        match self {
            Self::NotUtf8(name)
            | Self::NameTooLong(name)
            | Self::Outside(name)
            | Self::NotAFile { name, .. }
            | Self::Twice(name)
            | Self::Nested(name)
            | Self::Encrypted(name)
            | Self::Compression(name)
            | Self::Truncated { name, .. }
            | Self::Lies { name, .. }
            | Self::Attributes(name) => Some(name),
            _ => None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("it is {size} bytes large, more than {max}")]
    TooLarge { size: u64, max: u64 },
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

impl FileError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

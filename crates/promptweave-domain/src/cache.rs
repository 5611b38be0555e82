//! The cache of single source prompts' results, kept between compositions: the interface between
//! engine and blob store.

use std::fs::File;

use crate::digest::Digest;

/// A store of files by key. A key covers everything that the file's content depends on. Files may
/// be large: they are read and written by position, never whole in memory.
///
/// No method fails. A file that cannot be read counts as absent, and a file that cannot be kept is
/// dropped; the implementation logs the reason.
pub trait Cache: Send {
    /// The file kept under `key`, if it is whole and unchanged; it stays readable while it is open.
    fn get(&mut self, key: &Digest) -> Option<File>;

    /// An empty file for a result in the making. The file is deleted when it is closed.
    fn scratch(&mut self) -> Option<File>;

    /// Keeps a file under `key`, and replaces an earlier one.
    fn put(&mut self, key: &Digest, file: &File);
}

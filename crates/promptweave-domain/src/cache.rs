//! Results of single source prompts, kept between compositions; the seam between engine and blob store.

use std::fs::File;

use crate::digest::Digest;

/// Files by a key that says all their content depends on. They may be large, so they are read and written by
/// position and never whole in memory.
///
/// Nothing here fails: what cannot be read is not there, and what cannot be kept is not kept. Why, the
/// implementation logs.
pub trait Cache: Send {
    /// The file kept under `key`, if it is whole and unchanged; it stays readable while it is open.
    fn get(&mut self, key: &Digest) -> Option<File>;

    /// An empty file for a result in the making. It goes away when it is closed.
    fn scratch(&mut self) -> Option<File>;

    /// Keeps a file under `key`, in place of what is there.
    fn put(&mut self, key: &Digest, file: &File);
}

//! The files of single prompts' results, kept between compositions in a cache on disk.
//!
//! An entry is the directory `ab/<key>` with one file, whose name is the sha256 of its content. It
//! is found by the key of everything its content depends on, and checked by the content's digest,
//! so that a torn or damaged file counts as absent. Workers may share the cache.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use promptweave_domain::digest::{Digest, DigestBuilder};
use promptweave_domain::error_chain::chain;
use promptweave_formats::directory_cache::DirectoryCache;

/// Size of the pieces in which files pass through memory, in bytes.
const CHUNK: usize = 8 << 20;

#[derive(Debug, thiserror::Error)]
#[error("the directory of a cache, `{}`, cannot be used", .dir.display())]
pub struct UnusableDirectory {
    dir: PathBuf,
    source: io::Error,
}

/// Files by key. A key covers everything that the file's content depends on. Files may be large:
/// they are read and written by position, never whole in memory.
///
/// No method fails. A file that cannot be read counts as absent, and a file that cannot be kept is
/// dropped; the log has the reason.
pub struct ResultFiles {
    entries: DirectoryCache,
}

impl ResultFiles {
    /// The files in a directory of their own, which is created if it does not exist, with at most
    /// `max_bytes` in all.
    pub fn new(dir: &Path, max_bytes: u64) -> Result<Self, UnusableDirectory> {
        fs::create_dir_all(dir).map_err(|source| UnusableDirectory {
            dir: dir.to_owned(),
            source,
        })?;
        let entries = DirectoryCache::new(dir.to_owned(), max_bytes);
        Ok(Self { entries })
    }

    /// The file kept under `key`, if it is whole and unchanged; it stays readable while it is open.
    pub fn get(&self, key: &Digest) -> Option<File> {
        self.find(key)
            .inspect_err(|error| {
                tracing::warn!(error = chain(error), "the cache cannot be read");
            })
            .ok()
            .flatten()
    }

    /// An empty file for a result in the making. The file is deleted when it is closed.
    pub fn scratch(&self) -> Option<File> {
        tempfile::tempfile_in(self.entries.dir())
            .inspect_err(|error| {
                tracing::warn!(error = chain(error), "the cache cannot be written");
            })
            .ok()
    }

    /// Keeps a copy of a file under `key`, and replaces an earlier one.
    pub fn put(&self, key: &Digest, file: &File) {
        if let Err(error) = self.keep(key, file) {
            tracing::warn!(error = chain(&error), "a result was not kept in the cache");
        }
    }

    fn find(&self, key: &Digest) -> io::Result<Option<File>> {
        let key = key.hex();
        let Some(entry) = self.entries.find(group(&key), &key)? else {
            return Ok(None);
        };
        match open(&entry.dir) {
            Ok(file) => Ok(Some(file)),
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(key, error, "an entry of the cache is unusable and removed");
                entry.discard()?;
                Ok(None)
            }
        }
    }

    fn keep(&self, key: &Digest, file: &File) -> io::Result<()> {
        let key = key.hex();
        let (size, limit) = (file.metadata()?.len(), self.entries.max_bytes());
        if size > limit {
            tracing::info!(key, size, limit, "larger than the whole cache, not kept");
            return Ok(());
        }
        let new = self.entries.make(group(&key), &key)?;
        // Without fsync, unlike the blobs: a file torn by a power cut is detected and computed
        // again.
        let copied = new.aside.path().join("copy");
        let copy = File::create_new(&copied)?;
        let mut content = DigestBuilder::default();
        for_each_chunk(file, |bytes, at| {
            content.update(bytes);
            copy.write_all_at(bytes, at)
        })?;
        fs::rename(copied, new.unfinished.join(content.finish().hex()))?;
        if let Some(earlier) = self.entries.find(group(&key), &key)? {
            earlier.discard()?;
        }
        new.keep()?;
        Ok(())
    }
}

/// Keys are grouped by their first digits, so that no directory grows too large.
fn group(key: &str) -> &str {
    &key[..2]
}

/// The file of an entry, or an error if it does not have the bytes that its name says.
fn open(dir: &Path) -> io::Result<File> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Ok(content) = format!("sha256:{}", name.display()).parse::<Digest>() else {
            continue;
        };
        let file = File::open(entry.path())?;
        let mut found = DigestBuilder::default();
        for_each_chunk(&file, |bytes, _| {
            found.update(bytes);
            Ok(())
        })?;
        if found.finish() == content {
            return Ok(file);
        }
    }
    Err(io::Error::other(
        "it has no file with the bytes of its name",
    ))
}

/// Calls `work` on a file's bytes, in pieces, with the position of each.
fn for_each_chunk(
    file: &File,
    mut work: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at)? {
            0 => return Ok(()),
            read => {
                work(&buffer[..read], at)?;
                at += read as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::testing::cache_files as files;

    fn key(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn put(cache: &ResultFiles, name: &str, bytes: &[u8]) {
        let file = cache.scratch().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        cache.put(&key(name), &file);
    }

    fn get(cache: &ResultFiles, name: &str) -> Option<Vec<u8>> {
        let file = cache.get(&key(name))?;
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        Some(bytes)
    }

    /// Sets an entry's time of last use to so many seconds after 1970.
    fn used_at(dir: &Path, name: &str, seconds: u64) {
        let key = key(name).hex();
        let entry = File::open(dir.join(group(&key)).join(&key)).unwrap();
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        entry.set_modified(time).unwrap();
    }

    #[test]
    fn what_is_put_comes_back_and_the_newest_of_a_key_alone() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ResultFiles::new(dir.path(), 100 << 20).unwrap();
        assert_eq!(get(&cache, "a"), None);
        put(&cache, "a", b"first");
        put(&cache, "b", b"other");
        let large: Vec<u8> = (0..CHUNK + 5).map(|i| (i % 251) as u8).collect();
        put(&cache, "a", &large);
        assert!(get(&cache, "a").unwrap() == large);
        assert_eq!(get(&cache, "b").unwrap(), b"other");
        assert_eq!(files(dir.path()).len(), 2);
        // Another cache on the same directory sees the entry too, and scratch files leave nothing.
        drop(cache.scratch());
        let another = ResultFiles::new(dir.path(), 100 << 20).unwrap();
        assert_eq!(get(&another, "b").unwrap(), b"other");
        assert_eq!(files(dir.path()).len(), 2);
    }

    #[test]
    fn torn_and_changed_entries_are_absent_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ResultFiles::new(dir.path(), 1 << 20).unwrap();
        for damaged in [&b"dat"[..], b"date", b""] {
            put(&cache, "a", b"data");
            let path = files(dir.path()).pop().unwrap();
            fs::write(path, damaged).unwrap();
            assert_eq!(get(&cache, "a"), None);
            assert!(files(dir.path()).is_empty());
        }
        // Files that are no entries do no harm.
        put(&cache, "a", b"data");
        let file = files(dir.path()).pop().unwrap();
        fs::write(file.with_file_name("stray"), "?").unwrap();
        fs::write(dir.path().join("stray"), "?").unwrap();
        assert_eq!(get(&cache, "a").unwrap(), b"data");
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ResultFiles::new(dir.path(), 25).unwrap();
        put(&cache, "a", &[1; 10]);
        put(&cache, "b", &[2; 10]);
        used_at(dir.path(), "a", 1);
        used_at(dir.path(), "b", 2);
        assert!(get(&cache, "a").is_some());
        put(&cache, "c", &[3; 10]);
        assert!(get(&cache, "a").is_some());
        assert!(get(&cache, "b").is_none());
        // Even an entry dated in the future makes room for a new one.
        used_at(dir.path(), "a", u64::from(u32::MAX));
        put(&cache, "d", &[4; 25]);
        assert_eq!(files(dir.path()).len(), 1);
        assert_eq!(get(&cache, "d").unwrap(), [4; 25]);
        // A file that could never fit evicts nothing.
        put(&cache, "e", &[5; 26]);
        assert!(get(&cache, "e").is_none() && get(&cache, "d").is_some());
    }

    #[test]
    fn an_open_entry_outlives_its_eviction() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ResultFiles::new(dir.path(), 10).unwrap();
        put(&cache, "a", &[1; 10]);
        let file = cache.get(&key("a")).unwrap();
        put(&cache, "b", &[2; 10]);
        assert!(cache.get(&key("a")).is_none());
        let mut bytes = [0; 10];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [1; 10]);
    }

    #[test]
    fn workers_may_put_and_evict_at_once() {
        let dir = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for worker in 0..4u8 {
                let dir = dir.path();
                scope.spawn(move || {
                    let cache = ResultFiles::new(dir, 40).unwrap();
                    for i in 0..30u8 {
                        let name = format!("{}", (worker + i) % 10);
                        put(&cache, &name, &[(worker + i) % 10; 9]);
                        // Whatever is found is correct.
                        if let Some(bytes) = get(&cache, &name) {
                            assert_eq!(bytes, [(worker + i) % 10; 9]);
                        }
                    }
                    let file = cache.scratch().unwrap();
                    file.write_all_at(&[worker; 9], 0).unwrap();
                    let key = key("last");
                    cache.keep(&key, &file).unwrap();
                });
            }
        });
        let size: u64 = files(dir.path())
            .iter()
            .map(|path| path.metadata().unwrap().len())
            .sum();
        assert!(size <= 40, "{size}");
    }

    #[test]
    fn a_cache_that_cannot_be_used_fails_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ResultFiles::new(&dir.path().join("here"), 1 << 20).unwrap();
        let file = cache.scratch().unwrap();
        fs::remove_dir_all(dir.path()).unwrap();
        fs::write(dir.path(), "a file where the directory was").unwrap();
        cache.put(&key("a"), &file);
        assert!(cache.get(&key("a")).is_none());
        assert!(cache.scratch().is_none());
        fs::remove_file(dir.path()).unwrap();
    }
}

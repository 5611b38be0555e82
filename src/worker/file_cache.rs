//! A cache of directories on this machine's disk, keyed by content: a worker's copies of backbones and datasets.
//!
//! Several workers may share one. A worker locks what its job uses, so that nobody evicts it. The system releases the
//! locks of a killed worker, which shows that its unfinished entries are abandoned.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use promptweave_domain::clock::file_time;
use promptweave_domain::error_chain::chain;

const UNFINISHED: &str = ".unfinished-";

#[derive(Clone, Debug)]
pub struct FileCache {
    dir: PathBuf,
    max_bytes: u64,
}

/// A directory that is not evicted while this is held.
#[derive(Debug)]
pub struct InUse {
    pub dir: PathBuf,
    _lock: File,
}

pub enum Entry {
    There(InUse),
    Missing(NewEntry),
}

/// An unfinished entry; it appears complete, or not at all.
pub struct NewEntry {
    cache: FileCache,
    /// The entry's final place.
    dir: PathBuf,
    /// The directory that becomes `dir`; it is locked already.
    pub unfinished: PathBuf,
    content: File,
    /// A temporary directory for files that are needed only while the entry is made.
    pub aside: TempDir,
    _lock: File,
}

impl FileCache {
    /// Opens a cache, and removes what killed workers left. What cannot be removed now stays until the next start.
    pub fn new(dir: PathBuf, max_bytes: u64) -> Self {
        let cache = Self { dir, max_bytes };
        if let Err(error) = cache.clean() {
            tracing::warn!(error = chain(&error), "the cache directory was not cleaned");
        }
        cache
    }

    /// The entry `<dir>/<kind>/<key>`, or a place to make it.
    pub fn entry(&self, kind: &str, key: &str) -> io::Result<Entry> {
        let parent = self.dir.join(kind);
        let dir = parent.join(key);
        if let Some(in_use) = take(&dir)? {
            return Ok(Entry::There(in_use));
        }
        fs::create_dir_all(&parent)?;
        let aside = aside(&parent)?;
        let lock = File::open(aside.path())?;
        lock.lock()?;
        let unfinished = aside.path().join("content");
        fs::create_dir(&unfinished)?;
        let content = File::open(&unfinished)?;
        content.lock_shared()?;
        Ok(Entry::Missing(NewEntry {
            cache: self.clone(),
            dir,
            unfinished,
            content,
            aside,
            _lock: lock,
        }))
    }

    fn clean(&self) -> io::Result<()> {
        for path in self.paths()? {
            // If it is locked, a worker is making it.
            if is_unfinished(&path) && File::open(&path)?.try_lock().is_ok() {
                fs::remove_dir_all(&path)?;
            }
        }
        Ok(())
    }

    /// Removes entries that are not in use, the least recently used first, until the rest is within the limit.
    fn evict(&self) -> io::Result<()> {
        let mut entries = Vec::new();
        for path in self.paths()? {
            if !is_unfinished(&path) {
                entries.push((fs::metadata(&path)?.modified()?, size(&path)?, path));
            }
        }
        entries.sort();
        let mut total: u64 = entries.iter().map(|(_, size, _)| size).sum();
        for (_, size, path) in entries {
            if total <= self.max_bytes {
                break;
            }
            if remove(&path)? {
                total -= size;
            }
        }
        Ok(())
    }

    /// The entries of all kinds, finished or not.
    fn paths(&self) -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for kind in list(&self.dir)?.into_iter().filter(|kind| kind.is_dir()) {
            paths.extend(list(&kind)?.into_iter().filter(|path| path.is_dir()));
        }
        Ok(paths)
    }
}

impl NewEntry {
    /// Moves the entry to its final place, and evicts others if the cache is too large.
    pub fn keep(self) -> io::Result<InUse> {
        let in_use = match fs::rename(&self.unfinished, &self.dir) {
            Ok(()) => InUse {
                dir: self.dir,
                _lock: self.content,
            },
            // Another worker was faster, with the same bytes.
            Err(error) => take(&self.dir)?.ok_or(error)?,
        };
        if let Err(error) = self.cache.evict() {
            // Eviction failed, but the job has what it needs.
            tracing::warn!(
                error = chain(&error),
                "nothing was evicted from the cache directory"
            );
        }
        Ok(in_use)
    }
}

/// Takes a directory into use, if it exists and is not being removed.
fn take(dir: &Path) -> io::Result<Option<InUse>> {
    let lock = match File::open(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match lock.try_lock_shared() {
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
        Ok(()) => {}
    }
    // It may have been removed, and even made again, between opening and locking.
    let (locked, there) = (lock.metadata()?, fs::metadata(dir));
    if !there.is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino())) {
        return Ok(None);
    }
    // The time records the use, for eviction; if it cannot be set, the entry counts as old.
    let _ = lock.set_modified(file_time());
    Ok(Some(InUse {
        dir: dir.to_owned(),
        _lock: lock,
    }))
}

/// Removes an entry unless it is in use. It disappears at once, even if deleting its files takes long.
fn remove(dir: &Path) -> io::Result<bool> {
    let lock = match File::open(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        opened => opened?,
    };
    if lock.try_lock().is_err() {
        return Ok(false);
    }
    let aside = aside(dir.parent().expect("an entry is in a directory"))?;
    fs::rename(dir, aside.path().join("content"))?;
    aside.close()?;
    tracing::info!(dir = %dir.display(), "evicted");
    Ok(true)
}

fn aside(parent: &Path) -> io::Result<TempDir> {
    tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(parent)
}

fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    name.starts_with(UNFINISHED)
}

/// The entries of a directory; none if it does not exist.
fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.path())).collect(),
    }
}

/// Bytes of all files under a directory.
fn size(dir: &Path) -> io::Result<u64> {
    let mut total = 0;
    for path in list(dir)? {
        let metadata = fs::symlink_metadata(&path)?;
        total += if metadata.is_dir() {
            size(&path)?
        } else {
            metadata.len()
        };
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    /// Makes or finds an entry of so many bytes.
    fn entry(cache: &FileCache, kind: &str, key: &str, bytes: usize) -> (InUse, bool) {
        match cache.entry(kind, key).unwrap() {
            Entry::There(in_use) => (in_use, true),
            Entry::Missing(new) => {
                fs::create_dir(new.unfinished.join("images")).unwrap();
                fs::write(new.unfinished.join("images/a"), vec![0; bytes]).unwrap();
                (new.keep().unwrap(), false)
            }
        }
    }

    fn used_at(cache: &FileCache, kind: &str, key: &str, seconds: u64) {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let dir = File::open(cache.dir.join(kind).join(key)).unwrap();
        dir.set_modified(time).unwrap();
    }

    #[test]
    fn what_was_used_longest_ago_goes_first_and_what_is_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = FileCache::new(dir.path().join("cache"), 25);
        let (in_use, found) = entry(&cache, "backbones", "a", 10);
        assert!(!found && in_use.dir.join("images/a").exists());
        drop(entry(&cache, "datasets", "b", 10));
        used_at(&cache, "backbones", "a", 1);
        used_at(&cache, "datasets", "b", 2);
        // `a` is the oldest, but it is in use.
        drop(entry(&cache, "datasets", "c", 10));
        drop(in_use);
        assert!(entry(&cache, "backbones", "a", 10).1);
        assert!(!cache.dir.join("datasets/b").exists());
        // Finding an entry counts as a use, so now `c` is the oldest.
        used_at(&cache, "datasets", "c", 3);
        assert!(!entry(&cache, "datasets", "b", 10).1);
        assert!(!cache.dir.join("datasets/c").exists());
        assert!(entry(&cache, "backbones", "a", 10).1);
        // An entry larger than the whole cache stays for its job only.
        let (large, _) = entry(&cache, "datasets", "d", 100);
        assert!(large.dir.exists());
        assert_eq!(cache.paths().unwrap(), std::slice::from_ref(&large.dir));
    }

    #[test]
    fn what_a_killed_worker_left_goes_at_the_next_start_and_what_is_in_the_making_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = FileCache::new(dir.path().to_owned(), 100);
        let (kept, _) = entry(&cache, "datasets", "a", 10);
        let left = dir.path().join("datasets/.unfinished-left/content");
        fs::create_dir_all(&left).unwrap();
        let Entry::Missing(new) = cache.entry("datasets", "b").unwrap() else {
            panic!("nobody made it");
        };
        let another = FileCache::new(dir.path().to_owned(), 100);
        assert!(!left.exists() && new.unfinished.exists() && kept.dir.exists());
        // Two workers make the same entry at once: there is one place, and both may use it.
        let (first, found) = entry(&another, "datasets", "b", 10);
        assert!(!found);
        let second = new.keep().unwrap();
        assert_eq!(first.dir, second.dir);
        assert_eq!(cache.paths().unwrap().len(), 2);
    }
}

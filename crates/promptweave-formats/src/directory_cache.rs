//! A cache of directories on this machine's disk: a worker's copies of backbones and datasets, and
//! the engine's results.
//!
//! Several workers may share one. A worker locks what it uses, so that nobody evicts it. The system
//! releases the locks of a killed worker, which shows that its unfinished entries are abandoned.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use promptweave_domain::clock::file_time;
use promptweave_domain::error_chain::chain;

const UNFINISHED: &str = ".unfinished-";

/// A cache whose entries are the directories `<dir>/<group>/<key>`. Nothing else may lie in `dir`.
#[derive(Clone, Debug)]
pub struct DirectoryCache {
    dir: PathBuf,
    max_bytes: u64,
}

/// An entry that is not evicted while this is held.
#[derive(Debug)]
pub struct InUse {
    pub dir: PathBuf,
    lock: File,
}

pub enum Entry {
    There(InUse),
    Missing(NewEntry),
}

/// An unfinished entry; it appears complete, or not at all.
pub struct NewEntry {
    cache: DirectoryCache,
    /// The entry's final place.
    dir: PathBuf,
    /// The directory that becomes `dir`; it is locked already.
    pub unfinished: PathBuf,
    content: File,
    /// A temporary directory for files that are needed only while the entry is made.
    pub aside: Aside,
}

impl DirectoryCache {
    /// Opens a cache, and removes what killed workers left. What cannot be removed now stays until
    /// the next start.
    pub fn new(dir: PathBuf, max_bytes: u64) -> Self {
        let cache = Self { dir, max_bytes };
        if let Err(error) = cache.clean() {
            tracing::warn!(error = chain(&error), "the cache directory was not cleaned");
        }
        cache
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// The entry `<dir>/<group>/<key>`, or a place to make it.
    pub fn entry(&self, group: &str, key: &str) -> io::Result<Entry> {
        Ok(match self.find(group, key)? {
            Some(in_use) => Entry::There(in_use),
            None => Entry::Missing(self.make(group, key)?),
        })
    }

    /// The entry `<dir>/<group>/<key>`, if it exists.
    pub fn find(&self, group: &str, key: &str) -> io::Result<Option<InUse>> {
        take(&self.dir.join(group).join(key))
    }

    /// A place to make the entry `<dir>/<group>/<key>`.
    pub fn make(&self, group: &str, key: &str) -> io::Result<NewEntry> {
        let parent = self.dir.join(group);
        fs::create_dir_all(&parent)?;
        let aside = Aside::new(&parent)?;
        let unfinished = aside.path().join("content");
        fs::create_dir(&unfinished)?;
        let content = File::open(&unfinished)?;
        content.lock_shared()?;
        Ok(NewEntry {
            cache: self.clone(),
            dir: parent.join(key),
            unfinished,
            content,
            aside,
        })
    }

    fn clean(&self) -> io::Result<()> {
        for path in self.paths()? {
            // If it is locked, a worker is making it.
            if is_unfinished(&path)
                && let Some(lock) = if_there(File::open(&path))?
                && lock.try_lock().is_ok()
            {
                if_there(fs::remove_dir_all(&path))?;
            }
        }
        Ok(())
    }

    /// Removes entries that are not in use, the least recently used first, until the rest is within
    /// the limit.
    fn evict(&self) -> io::Result<()> {
        let mut entries = Vec::new();
        for path in self.paths()? {
            // Another worker may remove entries meanwhile.
            if !is_unfinished(&path)
                && let Some(metadata) = if_there(fs::metadata(&path))?
            {
                entries.push((metadata.modified()?, size(&path)?, path));
            }
        }
        entries.sort();
        let mut total: u64 = entries.iter().map(|(_, size, _)| size).sum();
        for (_, size, path) in entries {
            if total <= self.max_bytes {
                break;
            }
            let removed = match if_there(File::open(&path))? {
                Some(lock) => remove(&path, lock)?,
                None => true,
            };
            if removed {
                tracing::debug!(dir = %path.display(), "evicted");
                total -= size;
            }
        }
        Ok(())
    }

    /// The entries of all groups, finished or not.
    fn paths(&self) -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for group in list(&self.dir)?.into_iter().filter(|group| group.is_dir()) {
            paths.extend(list(&group)?.into_iter().filter(|path| path.is_dir()));
        }
        Ok(paths)
    }
}

impl InUse {
    /// Removes the entry, unless another worker uses it at this moment.
    pub fn discard(self) -> io::Result<()> {
        remove(&self.dir, self.lock)?;
        Ok(())
    }
}

impl NewEntry {
    /// Moves the entry to its final place, and evicts others if the cache is too large.
    pub fn keep(self) -> io::Result<InUse> {
        let in_use = loop {
            match fs::rename(&self.unfinished, &self.dir) {
                Ok(()) => {
                    break InUse {
                        dir: self.dir,
                        lock: self.content,
                    };
                }
                // Another worker was faster. Its entry is as good, unless it is removed just now.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    if let Some(in_use) = take(&self.dir)? {
                        break in_use;
                    }
                }
                Err(error) => return Err(error),
            }
        };
        if let Err(error) = self.cache.evict() {
            // Eviction failed, but the caller has what it needs.
            tracing::warn!(
                error = chain(&error),
                "nothing was evicted from the cache directory"
            );
        }
        Ok(in_use)
    }
}

/// A temporary directory, locked so that no other worker takes it for abandoned.
pub struct Aside {
    dir: TempDir,
    _lock: File,
}

impl Aside {
    fn new(parent: &Path) -> io::Result<Self> {
        loop {
            let dir = tempfile::Builder::new()
                .prefix(UNFINISHED)
                .tempdir_in(parent)?;
            // A worker that starts may have removed it before it was locked.
            if let Some(lock) = if_there(File::open(dir.path()))? {
                lock.lock()?;
                if is_at(&lock, dir.path())? {
                    return Ok(Self { dir, _lock: lock });
                }
            }
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Takes an entry into use, if it exists and is not being removed.
fn take(dir: &Path) -> io::Result<Option<InUse>> {
    let Some(lock) = if_there(File::open(dir))? else {
        return Ok(None);
    };
    // It waits for a moment at most: while another worker moves the entry away.
    lock.lock_shared()?;
    if !is_at(&lock, dir)? {
        return Ok(None);
    }
    // The time records the use, for eviction; if it cannot be set, the entry counts as old.
    let _ = lock.set_modified(file_time());
    Ok(Some(InUse {
        dir: dir.to_owned(),
        lock,
    }))
}

/// Removes an entry, and returns false if it is in use. It disappears at once, even if deleting its
/// files takes long.
fn remove(dir: &Path, lock: File) -> io::Result<bool> {
    if lock.try_lock().is_err() {
        return Ok(false);
    }
    if is_at(&lock, dir)? {
        let aside = Aside::new(dir.parent().expect("an entry is in a directory"))?;
        fs::rename(dir, aside.path().join("content"))?;
        drop(lock);
        aside.dir.close()?;
    }
    Ok(true)
}

/// Whether an open directory is still at this place. It may have been removed, and even made again,
/// between opening and locking.
fn is_at(open: &File, dir: &Path) -> io::Result<bool> {
    let (open, there) = (open.metadata()?, if_there(fs::metadata(dir))?);
    Ok(there.is_some_and(|there| (there.dev(), there.ino()) == (open.dev(), open.ino())))
}

fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    name.starts_with(UNFINISHED)
}

/// `None` if the file does not exist.
fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// The entries of a directory; none if it does not exist.
fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    Ok(if_there(entries)?.unwrap_or_default())
}

/// Bytes of all files under a directory.
fn size(dir: &Path) -> io::Result<u64> {
    let mut total = 0;
    for path in list(dir)? {
        let Some(metadata) = if_there(fs::symlink_metadata(&path))? else {
            continue;
        };
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
    fn entry(cache: &DirectoryCache, group: &str, key: &str, bytes: usize) -> (InUse, bool) {
        match cache.entry(group, key).unwrap() {
            Entry::There(in_use) => (in_use, true),
            Entry::Missing(new) => {
                fs::create_dir(new.unfinished.join("images")).unwrap();
                fs::write(new.unfinished.join("images/a"), vec![0; bytes]).unwrap();
                (new.keep().unwrap(), false)
            }
        }
    }

    fn used_at(cache: &DirectoryCache, group: &str, key: &str, seconds: u64) {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let dir = File::open(cache.dir.join(group).join(key)).unwrap();
        dir.set_modified(time).unwrap();
    }

    #[test]
    fn what_was_used_longest_ago_goes_first_and_what_is_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DirectoryCache::new(dir.path().join("cache"), 25);
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
        let cache = DirectoryCache::new(dir.path().to_owned(), 100);
        let (kept, _) = entry(&cache, "datasets", "a", 10);
        let left = dir.path().join("datasets/.unfinished-left/content");
        fs::create_dir_all(&left).unwrap();
        let Entry::Missing(new) = cache.entry("datasets", "b").unwrap() else {
            panic!("nobody made it");
        };
        let another = DirectoryCache::new(dir.path().to_owned(), 100);
        assert!(!left.exists() && new.unfinished.exists() && kept.dir.exists());
        // Two workers make the same entry at once: there is one place, and both may use it.
        let (first, found) = entry(&another, "datasets", "b", 10);
        assert!(!found);
        let second = new.keep().unwrap();
        assert_eq!(first.dir, second.dir);
        assert_eq!(cache.paths().unwrap().len(), 2);
    }

    #[test]
    fn a_discarded_entry_is_gone_unless_another_uses_it() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DirectoryCache::new(dir.path().to_owned(), 100);
        let (first, _) = entry(&cache, "datasets", "a", 10);
        let (second, found) = entry(&cache, "datasets", "a", 10);
        assert!(found);
        first.discard().unwrap();
        assert!(second.dir.exists());
        second.discard().unwrap();
        assert!(cache.find("datasets", "a").unwrap().is_none());
        assert!(cache.paths().unwrap().is_empty());
        // An entry that was made anew is not the one to discard.
        let (old, _) = entry(&cache, "datasets", "a", 10);
        fs::rename(&old.dir, dir.path().join("moved")).unwrap();
        let (new, found) = entry(&cache, "datasets", "a", 10);
        assert!(!found);
        old.discard().unwrap();
        assert!(new.dir.exists());
    }
}

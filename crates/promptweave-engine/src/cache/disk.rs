//! The cache of single prompts' results, stored beside the blobs in the blob store.
//!
//! A file lies at `cache/ab/<key>-<sha256 of the content>`. It is found by the key of everything
//! its content depends on and checked by the content's digest, so that a torn or damaged file
//! counts as absent. Workers may share the cache. Each `put` evicts the files used longest ago.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{
    GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt as _, WriteMultipart,
};
use tokio::runtime::{Builder, Runtime};

use promptweave_domain::cache::Cache;
use promptweave_domain::clock::file_time;
use promptweave_domain::digest::{Digest, DigestBuilder};
use promptweave_domain::error_chain::chain;

/// Size of the pieces in which files pass through memory, in bytes.
const CHUNK: usize = 8 << 20;
const PREFIX: &str = "cache";

#[derive(Debug, thiserror::Error)]
pub enum BlobCacheError {
    #[error("the blob store failed")]
    Store(#[from] object_store::Error),
    #[error("a file of the cache cannot be read or written")]
    File(#[from] io::Error),
    #[error("the cache's {0} holds other bytes")]
    Corrupt(Key),
    #[error("the directory of a cache, `{}`, cannot be used", .dir.display())]
    Directory { dir: PathBuf, source: io::Error },
}

/// A cache in the blob store. Use it on one thread that runs no async task: its calls block, on a
/// small runtime of their own.
pub struct BlobCache {
    store: Arc<dyn ObjectStore>,
    /// Directory for unnamed files, on the same disk.
    scratch_dir: PathBuf,
    /// The largest total size in bytes.
    limit: u64,
    runtime: Runtime,
}

impl BlobCache {
    /// A cache of at most `limit` bytes in the blob store of a directory, which is created if it
    /// does not exist.
    pub fn directory(dir: &Path, limit: u64) -> Result<Self, BlobCacheError> {
        let failed = |source| BlobCacheError::Directory {
            dir: dir.to_owned(),
            source,
        };
        let scratch_dir = dir.join(PREFIX);
        std::fs::create_dir_all(&scratch_dir).map_err(failed)?;
        Ok(Self {
            // Without fsync, unlike the blobs: a file torn by a power cut is detected and computed
            // again.
            store: Arc::new(LocalFileSystem::new_with_prefix(dir)?),
            scratch_dir,
            limit,
            runtime: Builder::new_current_thread().build().map_err(failed)?,
        })
    }

    async fn find(&self, key: &Digest) -> Result<Option<File>, BlobCacheError> {
        for (place, content) in self.under(key).await? {
            match self.open(&place, &content).await {
                Ok(file) => return Ok(Some(file)),
                // The entry was evicted since it was listed.
                Err(BlobCacheError::Store(object_store::Error::NotFound { .. })) => {}
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(error, "an entry of the cache is unusable and removed");
                    self.remove(&place).await?;
                }
            }
        }
        Ok(None)
    }

    /// Places and digests of the contents under a key. There is one, except after two workers put
    /// at once.
    async fn under(&self, key: &Digest) -> Result<Vec<(Key, Digest)>, BlobCacheError> {
        let mut found = Vec::new();
        let mut listed = self.store.list(Some(&folder(key)));
        while let Some(entry) = listed.try_next().await? {
            let content = entry.location.filename().and_then(|name| {
                let digits = name.strip_prefix(&key.hex())?.strip_prefix('-')?;
                format!("sha256:{digits}").parse().ok()
            });
            if let Some(content) = content {
                found.push((entry.location, content));
            }
        }
        Ok(found)
    }

    /// The file with this content, or an error.
    async fn open(&self, place: &Key, content: &Digest) -> Result<File, BlobCacheError> {
        let file = match self.store.get(place).await?.payload {
            // The open file stays readable after an eviction.
            GetResultPayload::File(file, _) => {
                // The file's time is set to now, for the order of eviction. If that is not allowed,
                // it keeps its age.
                let _ = file.set_modified(file_time());
                file
            }
            GetResultPayload::Stream(mut chunks) => {
                let file = tempfile::tempfile_in(&self.scratch_dir)?;
                let mut at = 0;
                while let Some(chunk) = chunks.next().await.transpose()? {
                    file.write_all_at(&chunk, at)?;
                    at += chunk.len() as u64;
                }
                file
            }
        };
        let mut found = DigestBuilder::default();
        read_through(&file, |bytes| found.update(bytes))?;
        if found.finish() == *content {
            Ok(file)
        } else {
            Err(BlobCacheError::Corrupt(place.clone()))
        }
    }

    async fn keep(&self, key: &Digest, file: &File) -> Result<(), BlobCacheError> {
        let size = file.metadata()?.len();
        if size > self.limit {
            let (limit, key) = (self.limit, key.hex());
            tracing::info!(key, size, limit, "larger than the whole cache, not kept");
            return Ok(());
        }
        let mut content = DigestBuilder::default();
        read_through(file, |bytes| content.update(bytes))?;
        let content = content.finish();
        let name = format!("{}-{}", key.hex(), content.hex());
        let place = folder(key).join(name);
        let upload = self.store.put_multipart(&place).await?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, CHUNK);
        let mut at = 0;
        while let Some(bytes) = read_chunk(file, at)? {
            at += bytes.len() as u64;
            // One part in flight at a time bounds memory to two chunks.
            upload.wait_for_capacity(1).await?;
            upload.put(bytes);
        }
        upload.finish().await?;
        for (other, found) in self.under(key).await? {
            if found != content {
                self.remove(&other).await?;
            }
        }
        self.evict(&place).await
    }

    /// Removes the entries used longest ago until the rest is within the limit; `kept` stays.
    async fn evict(&self, kept: &Key) -> Result<(), BlobCacheError> {
        let all = self.store.list(Some(&Key::from(PREFIX)));
        let mut all: Vec<ObjectMeta> = all.try_collect().await?;
        let mut total: u64 = all.iter().map(|entry| entry.size).sum();
        all.sort_by_key(|entry| entry.last_modified);
        for entry in all.iter().filter(|entry| entry.location != *kept) {
            if total <= self.limit {
                break;
            }
            self.remove(&entry.location).await?;
            total -= entry.size;
        }
        Ok(())
    }

    /// Removes an entry. Another worker may have removed it already.
    async fn remove(&self, place: &Key) -> Result<(), BlobCacheError> {
        match self.store.delete(place).await {
            Err(object_store::Error::NotFound { .. }) => Ok(()),
            other => Ok(other?),
        }
    }
}

impl Cache for BlobCache {
    fn get(&mut self, key: &Digest) -> Option<File> {
        self.runtime
            .block_on(self.find(key))
            .inspect_err(|error| {
                tracing::warn!(error = chain(error), "the cache cannot be read");
            })
            .ok()
            .flatten()
    }

    fn scratch(&mut self) -> Option<File> {
        tempfile::tempfile_in(&self.scratch_dir)
            .inspect_err(|error| {
                tracing::warn!(error = chain(error), "the cache cannot be written");
            })
            .ok()
    }

    fn put(&mut self, key: &Digest, file: &File) {
        if let Err(error) = self.runtime.block_on(self.keep(key, file)) {
            tracing::warn!(error = chain(&error), "a result was not kept in the cache");
        }
    }
}

/// The folder of a key. There are two levels, so that no directory grows too large.
fn folder(key: &Digest) -> Key {
    Key::from_iter([PREFIX, &key.hex()[..2]])
}

/// The bytes from `at` on, at most one chunk; `None` at the end.
fn read_chunk(file: &File, at: u64) -> io::Result<Option<Bytes>> {
    let mut buffer = vec![0; CHUNK];
    let read = file.read_at(&mut buffer, at)?;
    buffer.truncate(read);
    Ok((read > 0).then(|| buffer.into()))
}

fn read_through(file: &File, mut of_chunk: impl FnMut(&[u8])) -> io::Result<()> {
    let mut at = 0;
    while let Some(bytes) = read_chunk(file, at)? {
        of_chunk(&bytes);
        at += bytes.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::SystemTime;

    use super::*;

    fn key(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn put(cache: &mut BlobCache, name: &str, bytes: &[u8]) {
        let file = cache.scratch().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        cache.put(&key(name), &file);
    }

    fn get(cache: &mut BlobCache, name: &str) -> Option<Vec<u8>> {
        let file = cache.get(&key(name))?;
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        Some(bytes)
    }

    /// The files of a cache in this directory.
    fn entries(dir: &Path) -> Vec<PathBuf> {
        let folders = std::fs::read_dir(dir.join(PREFIX)).unwrap();
        let folders = folders.map(|entry| entry.unwrap().path());
        folders
            .flat_map(|dir| std::fs::read_dir(dir).unwrap())
            .map(|entry| entry.unwrap().path())
            .collect()
    }

    /// Sets a file's time of last use to so many seconds after 1970.
    fn used_at(dir: &Path, name: &str, seconds: u64) {
        let is_of_key = |path: &&PathBuf| path.to_string_lossy().contains(&key(name).hex());
        let path = entries(dir).iter().find(is_of_key).cloned().unwrap();
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        File::open(path).unwrap().set_modified(time).unwrap();
    }

    #[test]
    fn what_is_put_comes_back_and_the_newest_of_a_key_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = BlobCache::directory(dir.path(), 100 << 20).unwrap();
        assert_eq!(get(&mut cache, "a"), None);
        put(&mut cache, "a", b"first");
        put(&mut cache, "b", b"other");
        let large: Vec<u8> = (0..CHUNK + 5).map(|i| (i % 251) as u8).collect();
        put(&mut cache, "a", &large);
        assert!(get(&mut cache, "a").unwrap() == large);
        assert_eq!(get(&mut cache, "b").unwrap(), b"other");
        assert_eq!(entries(dir.path()).len(), 2);
        // Another cache on the same directory sees the entry too, and scratch files leave nothing.
        drop(cache.scratch());
        let mut another = BlobCache::directory(dir.path(), 100 << 20).unwrap();
        assert_eq!(get(&mut another, "b").unwrap(), b"other");
        assert_eq!(entries(dir.path()).len(), 2);
    }

    #[test]
    fn torn_and_changed_entries_are_absent_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = BlobCache::directory(dir.path(), 1 << 20).unwrap();
        for damaged in [&b"dat"[..], b"date", b""] {
            put(&mut cache, "a", b"data");
            let path = entries(dir.path()).pop().unwrap();
            std::fs::write(path, damaged).unwrap();
            assert_eq!(get(&mut cache, "a"), None);
            assert!(entries(dir.path()).is_empty());
        }
        // Files that are no entries do no harm.
        put(&mut cache, "a", b"data");
        let stray = entries(dir.path())[0].with_file_name("stray");
        std::fs::write(stray, "?").unwrap();
        assert_eq!(get(&mut cache, "a").unwrap(), b"data");
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = BlobCache::directory(dir.path(), 25).unwrap();
        put(&mut cache, "a", &[1; 10]);
        put(&mut cache, "b", &[2; 10]);
        used_at(dir.path(), "a", 1);
        used_at(dir.path(), "b", 2);
        assert!(get(&mut cache, "a").is_some());
        put(&mut cache, "c", &[3; 10]);
        assert!(get(&mut cache, "a").is_some());
        assert!(get(&mut cache, "b").is_none());
        // Even an entry dated in the future makes room for a new one.
        used_at(dir.path(), "a", u64::from(u32::MAX));
        put(&mut cache, "d", &[4; 25]);
        assert_eq!(entries(dir.path()).len(), 1);
        assert_eq!(get(&mut cache, "d").unwrap(), [4; 25]);
        // A file that could never fit evicts nothing.
        put(&mut cache, "e", &[5; 26]);
        assert!(get(&mut cache, "e").is_none() && get(&mut cache, "d").is_some());
    }

    #[test]
    fn an_open_entry_outlives_its_eviction() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = BlobCache::directory(dir.path(), 10).unwrap();
        put(&mut cache, "a", &[1; 10]);
        let file = cache.get(&key("a")).unwrap();
        put(&mut cache, "b", &[2; 10]);
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
                    let mut cache = BlobCache::directory(dir, 40).unwrap();
                    for i in 0..30u8 {
                        let name = format!("{}", (worker + i) % 10);
                        put(&mut cache, &name, &[(worker + i) % 10; 9]);
                        // Whatever is found is correct.
                        if let Some(bytes) = get(&mut cache, &name) {
                            assert_eq!(bytes, [(worker + i) % 10; 9]);
                        }
                    }
                    let file = cache.scratch().unwrap();
                    file.write_all_at(&[worker; 9], 0).unwrap();
                    let key = key("last");
                    cache.runtime.block_on(cache.keep(&key, &file)).unwrap();
                });
            }
        });
        let size: u64 = entries(dir.path())
            .iter()
            .map(|path| path.metadata().unwrap().len())
            .sum();
        assert!(size <= 40, "{size}");
    }

    #[test]
    fn a_cache_that_cannot_be_used_fails_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = BlobCache::directory(&dir.path().join("here"), 1 << 20).unwrap();
        let file = cache.scratch().unwrap();
        std::fs::remove_dir_all(dir.path()).unwrap();
        std::fs::write(dir.path(), "a file where the directory was").unwrap();
        cache.put(&key("a"), &file);
        assert!(cache.get(&key("a")).is_none());
        assert!(cache.scratch().is_none());
        std::fs::remove_file(dir.path()).unwrap();
    }
}

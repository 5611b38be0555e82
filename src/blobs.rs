//! The blob store: large immutable files, addressed by the sha256 of their bytes.
//!
//! Backbones, packed datasets and statistics live here (prompt files are small and live in Postgres). A key is made
//! only from a digest, so no name that a client sends ever becomes part of a path. A file appears under its key
//! completely or not at all.

use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{
    GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart,
};
use time::OffsetDateTime;

use promptweave_domain::digest::{Digest, DigestBuilder, digest_of_file};

/// Files pass through memory in pieces of this size.
const CHUNK: usize = 8 << 20;

#[derive(Clone, Debug)]
pub struct BlobStore {
    store: Arc<dyn ObjectStore>,
}

/// A blob after it was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredBlob {
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("the blob store failed")]
    Store(#[from] object_store::Error),
    #[error("cannot read or write `{path}`")]
    File { path: PathBuf, source: io::Error },
    #[error("the blob store has no {0}")]
    Missing(Digest),
    #[error("the blob store's {expected} holds other bytes, {found}")]
    Corrupt { expected: Digest, found: Digest },
    #[error("`{}` changed while it was stored", .0.display())]
    Changed(PathBuf),
    #[error("a thread of the blob store stopped")]
    Stopped,
}

impl BlobStore {
    /// A store in a directory, which is created if it does not exist.
    pub fn directory(dir: &Path) -> Result<Self, BlobError> {
        let failed = |source| BlobError::File {
            path: dir.to_owned(),
            source,
        };
        std::fs::create_dir_all(dir).map_err(failed)?;
        // Uses fsync: what a row in the database points to must survive a power cut.
        let store = LocalFileSystem::new_with_prefix(dir)?.with_fsync(true);
        Ok(Self {
            store: Arc::new(store),
        })
    }

    /// A store on an existing object store, for example S3.
    pub fn over(store: Arc<dyn ObjectStore>) -> Self {
        Self { store }
    }

    pub async fn put_bytes(&self, bytes: impl Into<Bytes>) -> Result<StoredBlob, BlobError> {
        let bytes: Bytes = bytes.into();
        let stored = StoredBlob {
            digest: Digest::of(&bytes),
            size: bytes.len() as u64,
        };
        if !self.exists(&stored.digest).await? {
            let payload = PutPayload::from(bytes);
            self.store.put(&key(&stored.digest), payload).await?;
        }
        Ok(stored)
    }

    /// Stores a file, which must not change meanwhile: it is read twice, first for its digest.
    pub async fn put_file(&self, path: &Path) -> Result<StoredBlob, BlobError> {
        let stored = {
            let path = path.to_owned();
            blocking(move || match digest_of_file(&path) {
                Ok((digest, size)) => Ok(StoredBlob { digest, size }),
                Err(source) => Err(BlobError::File { path, source }),
            })
            .await?
        };
        if !self.exists(&stored.digest).await? {
            self.put_as(&stored.digest, path).await?;
        }
        Ok(stored)
    }

    /// Stores a file, if it has this digest.
    async fn put_as(&self, digest: &Digest, path: &Path) -> Result<(), BlobError> {
        let upload = self.store.put_multipart(&key(digest)).await?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, CHUNK);
        let refused = match copy_in(path, &mut upload).await {
            Ok(found) if found == *digest => {
                upload.finish().await?;
                return Ok(());
            }
            Ok(_) => BlobError::Changed(path.to_owned()),
            Err(error) => error,
        };
        upload.abort().await?;
        Err(refused)
    }

    /// Writes a blob to `path`, and checks its digest. The file appears completely or not at all, so several processes
    /// may fetch into one cache directory.
    pub async fn get_to_file(&self, digest: &Digest, path: &Path) -> Result<(), BlobError> {
        let failed = |source| BlobError::File {
            path: path.to_owned(),
            source,
        };
        let mut chunks = self.open(digest, None).await?.into_stream();
        let dir = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
        let mut found = DigestBuilder::default();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk?;
            found.update(&chunk);
            file.write_all(&chunk).map_err(failed)?;
        }
        check(digest, found)?;
        file.persist(path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// A blob in pieces, and its size in bytes. The last piece comes only if the digest is right; until then the pieces
    /// must not be trusted.
    pub async fn stream(
        &self,
        digest: &Digest,
    ) -> Result<(u64, impl Stream<Item = Result<Bytes, BlobError>> + use<>), BlobError> {
        let opened = self.open(digest, None).await?;
        let size = opened.meta.size;
        let checked = Checked {
            chunks: opened.into_stream(),
            held: Bytes::new(),
            found: DigestBuilder::default(),
            expected: *digest,
        };
        let pieces = futures::stream::try_unfold(Some(checked), |checked| async {
            match checked {
                Some(checked) => checked.next().await,
                None => Ok(None),
            }
        });
        Ok((size, pieces))
    }

    /// These bytes of a blob, in pieces. The digest of a part cannot be checked; whoever joins the parts checks the whole.
    pub async fn stream_range(
        &self,
        digest: &Digest,
        range: Range<u64>,
    ) -> Result<impl Stream<Item = Result<Bytes, BlobError>> + use<>, BlobError> {
        let opened = self.open(digest, Some(range)).await?;
        Ok(opened.into_stream().map_err(BlobError::from))
    }

    /// A whole blob in memory.
    pub async fn get_bytes(&self, digest: &Digest) -> Result<Bytes, BlobError> {
        let bytes = self.open(digest, None).await?.bytes().await?;
        let mut found = DigestBuilder::default();
        found.update(&bytes);
        check(digest, found)?;
        Ok(bytes)
    }

    /// The size of a blob in bytes.
    pub async fn size(&self, digest: &Digest) -> Result<u64, BlobError> {
        match self.store.head(&key(digest)).await {
            Ok(meta) => Ok(meta.size),
            Err(object_store::Error::NotFound { .. }) => Err(BlobError::Missing(*digest)),
            Err(error) => Err(error.into()),
        }
    }

    pub async fn exists(&self, digest: &Digest) -> Result<bool, BlobError> {
        match self.size(digest).await {
            Ok(_) => Ok(true),
            Err(BlobError::Missing(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The blobs stored before a time, in no particular order.
    pub fn stored_before(
        &self,
        moment: OffsetDateTime,
    ) -> impl Stream<Item = Result<StoredBlob, BlobError>> + use<> {
        let moment = moment.unix_timestamp();
        self.store
            .list(Some(&Key::from(ROOT)))
            .err_into()
            .try_filter_map(move |meta| async move {
                let old = meta.last_modified.timestamp() < moment;
                // A file with another kind of name does not belong to the store.
                let digest = meta
                    .location
                    .filename()
                    .and_then(|name| format!("sha256:{name}").parse().ok());
                Ok(digest.filter(|_| old).map(|digest| StoredBlob {
                    digest,
                    size: meta.size,
                }))
            })
    }

    /// Deletes a blob; it is no error if it does not exist.
    pub async fn delete(&self, digest: &Digest) -> Result<(), BlobError> {
        match self.store.delete(&key(digest)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn open(
        &self,
        digest: &Digest,
        range: Option<Range<u64>>,
    ) -> Result<GetResult, BlobError> {
        let options = GetOptions {
            range: range.map(GetRange::from),
            ..GetOptions::default()
        };
        match self.store.get_opts(&key(digest), options).await {
            Err(object_store::Error::NotFound { .. }) => Err(BlobError::Missing(*digest)),
            other => Ok(other?),
        }
    }
}

/// A blob that is being read, with one piece held back.
struct Checked {
    chunks: BoxStream<'static, object_store::Result<Bytes>>,
    held: Bytes,
    found: DigestBuilder,
    expected: Digest,
}

impl Checked {
    /// Reads the next piece and returns the one held back. The last one is returned only if the digest is right.
    async fn next(mut self) -> Result<Option<(Bytes, Option<Self>)>, BlobError> {
        while let Some(chunk) = self.chunks.next().await.transpose()? {
            self.found.update(&chunk);
            let released = std::mem::replace(&mut self.held, chunk);
            if !released.is_empty() {
                return Ok(Some((released, Some(self))));
            }
        }
        check(&self.expected, self.found)?;
        Ok(Some((self.held, None)))
    }
}

const ROOT: &str = "sha256";

/// `sha256/ab/ab12…`: two levels, so that no directory grows too large.
fn key(digest: &Digest) -> Key {
    let hex = digest.hex();
    Key::from_iter([ROOT, &hex[..2], &hex])
}

fn check(expected: &Digest, found: DigestBuilder) -> Result<(), BlobError> {
    let found = found.finish();
    if found == *expected {
        Ok(())
    } else {
        Err(BlobError::Corrupt {
            expected: *expected,
            found,
        })
    }
}

/// Uploads a file's bytes, and returns the digest of the bytes sent.
async fn copy_in(path: &Path, upload: &mut WriteMultipart) -> Result<Digest, BlobError> {
    use tokio::io::AsyncReadExt;
    let failed = |source| BlobError::File {
        path: path.to_owned(),
        source,
    };
    let mut file = tokio::fs::File::open(path).await.map_err(failed)?;
    let mut sent = DigestBuilder::default();
    loop {
        let mut buffer = Vec::with_capacity(CHUNK);
        let read = (&mut file).take(CHUNK as u64);
        if tokio::io::BufReader::new(read)
            .read_to_end(&mut buffer)
            .await
            .map_err(failed)?
            == 0
        {
            return Ok(sent.finish());
        }
        sent.update(&buffer);
        // One part in flight at a time bounds memory to two chunks.
        upload.wait_for_capacity(1).await?;
        upload.put(buffer.into());
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, BlobError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| BlobError::Stopped)?
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;

    use super::*;

    #[tokio::test]
    async fn bytes_and_files_come_back_by_their_digest() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::directory(&dir.path().join("blobs")).unwrap();
        let stored = blobs.put_bytes("abc").await.unwrap();
        assert_eq!((stored.digest, stored.size), (Digest::of(b"abc"), 3));
        assert_eq!(
            blobs.get_bytes(&stored.digest).await.unwrap(),
            "abc".as_bytes()
        );

        // The file is larger than a chunk. It is stored twice: the second time it exists already.
        let source = dir.path().join("large");
        let bytes: Vec<u8> = (0..CHUNK + 5).map(|i| (i % 251) as u8).collect();
        std::fs::write(&source, &bytes).unwrap();
        let stored = blobs.put_file(&source).await.unwrap();
        assert_eq!(blobs.put_file(&source).await.unwrap(), stored);
        let copy = dir.path().join("copy");
        blobs.get_to_file(&stored.digest, &copy).await.unwrap();
        assert!(std::fs::read(&copy).unwrap() == bytes);
        let (size, pieces) = blobs.stream(&stored.digest).await.unwrap();
        let pieces: Vec<Bytes> = pieces.try_collect().await.unwrap();
        assert_eq!(size, bytes.len() as u64);
        assert!(pieces.len() > 2 && pieces.concat() == bytes);
    }

    #[tokio::test]
    async fn a_file_that_changes_while_it_is_stored_is_not_stored() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::directory(&dir.path().join("blobs")).unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "abd").unwrap();
        // This stands for a file that held `abc` when its digest was taken.
        let before = Digest::of(b"abc");
        let error = blobs.put_as(&before, &path).await.unwrap_err();
        assert!(matches!(error, BlobError::Changed(changed) if changed == path));
        assert!(!blobs.exists(&before).await.unwrap());
    }

    #[tokio::test]
    async fn missing_and_corrupt_blobs_are_told_apart_and_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::directory(dir.path()).unwrap();
        let copy = dir.path().join("copy");
        let missing = Digest::of(b"never stored");
        let error = blobs.get_to_file(&missing, &copy).await.unwrap_err();
        assert!(matches!(error, BlobError::Missing(d) if d == missing));

        let stored = blobs.put_bytes("abc").await.unwrap();
        let path = dir.path().join(key(&stored.digest).to_string());
        std::fs::write(path, "abd").unwrap();
        let error = blobs.get_to_file(&stored.digest, &copy).await.unwrap_err();
        assert!(matches!(error, BlobError::Corrupt { .. }));
        assert!(!copy.exists());
        let (_, pieces) = blobs.stream(&stored.digest).await.unwrap();
        let pieces: Vec<_> = pieces.collect().await;
        let came: usize = pieces.iter().flatten().map(Bytes::len).sum();
        assert!(came < 3, "a corrupt blob is never whole");
        assert!(matches!(
            pieces.last(),
            Some(Err(BlobError::Corrupt { .. }))
        ));
    }
}

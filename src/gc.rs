//! Garbage collection of files that nothing refers to. `promptweave gc` does it on demand, a server once a day.
//!
//! An interrupted upload, a registration that was refused late and expired statistics leave files in the blob store. A
//! file younger than the grace time is left alone, because its row may still be inserted; for older files,
//! [`references`] prevents races.

use std::time::Duration;

use futures::TryStreamExt;
use sqlx::{Connection, PgConnection, PgPool};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use crate::blobs::{BlobStore, StoredBlob};
use crate::cli::GcArgs;
use crate::config::RetentionOptions;
use crate::jobs::retention;
use crate::registry::{RegistryError, references};
use promptweave_domain::clock::{Clock as _, SystemClock};
use promptweave_domain::error_chain::chain;

/// How many digests are looked up at once.
const BATCH: usize = 500;
const FIRST: Duration = Duration::from_secs(3600);
const EVERY: Duration = Duration::from_secs(24 * 3600);

/// How long things are kept.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// How long a file without a reference is kept.
    pub grace: Duration,
    /// How long the statistics of an ended ensemble are kept; None for ever.
    pub statistics: Option<Duration>,
}

impl From<&RetentionOptions> for Retention {
    fn from(options: &RetentionOptions) -> Self {
        const HOUR: u64 = 3600;
        Self {
            grace: Duration::from_secs(u64::from(options.gc_grace_hours) * HOUR),
            statistics: (options.statistics_days)
                .map(|days| Duration::from_secs(u64::from(days) * 24 * HOUR)),
        }
    }
}

/// Counts of what was deleted; with `dry_run`, of what would be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Ensembles whose statistics were deleted.
    pub ensembles: u64,
    pub files: u64,
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum GcError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The database most likely belongs to another data directory, or is empty.
    #[error(
        "the database refers to none of the files in the blob store; nothing was deleted, since the two do not \
         seem to belong together: look at DATABASE_URL and the data directory"
    )]
    Strangers,
}

/// Runs `promptweave gc`.
pub async fn run(args: GcArgs) -> anyhow::Result<()> {
    let pool = args.database.pool()?;
    let blobs = args.storage.blobs()?;
    let retention = Retention::from(&args.retention);
    let collected = collect(&pool, &blobs, retention, args.dry_run).await?;
    let Collected {
        ensembles,
        files,
        bytes,
    } = collected;
    if ensembles > 0 {
        println!("let go of the statistics of {ensembles} ensembles");
    }
    let what = if args.dry_run {
        "nothing refers to"
    } else {
        "deleted"
    };
    println!("{what} {files} files, {}", indicatif::HumanBytes(bytes));
    Ok(())
}

/// Collects once a day until `stop`.
pub async fn run_daily(
    pool: PgPool,
    blobs: BlobStore,
    options: RetentionOptions,
    stop: CancellationToken,
) {
    let mut pause = FIRST;
    while stop
        .run_until_cancelled(tokio::time::sleep(pause))
        .await
        .is_some()
    {
        pause = EVERY;
        match collect(&pool, &blobs, Retention::from(&options), false).await {
            Ok(Collected {
                ensembles,
                files,
                bytes,
            }) => tracing::info!(ensembles, files, bytes, "collected garbage"),
            Err(error) => tracing::warn!(error = chain(&error), "cannot collect garbage"),
        }
    }
}

/// Deletes what nothing refers to. With `dry_run` it only counts, and leaves out statistics that are due.
pub async fn collect(
    pool: &PgPool,
    blobs: &BlobStore,
    retention: Retention,
    dry_run: bool,
) -> Result<Collected, GcError> {
    let now = SystemClock.now();
    let before = now - retention.grace;
    let mut conn = pool.acquire().await.map_err(RegistryError::from)?;
    if !belong_together(&mut conn, blobs, now).await? {
        return Err(GcError::Strangers);
    }
    let mut collected = Collected::default();
    if let Some(kept) = retention.statistics.filter(|_| !dry_run) {
        let let_go = retention::let_statistics_go(&mut conn, now - kept).await;
        collected.ensembles = let_go.map_err(RegistryError::from)?;
    }
    let (rows, bytes) = references::collect_rows(&mut conn, before, dry_run).await?;
    collected.files += rows;
    collected.bytes += bytes;
    let mut old = std::pin::pin!(blobs.stored_before(before).try_chunks(BATCH));
    loop {
        let batch = match old.try_next().await {
            Ok(Some(batch)) => batch,
            Ok(None) => return Ok(collected),
            Err(error) => return Err(RegistryError::from(error.1).into()),
        };
        let digests: Vec<_> = batch.iter().map(|blob| blob.digest).collect();
        let free = references::unreferenced(&mut conn, &digests).await?;
        for blob in batch.iter().filter(|blob| free.contains(&blob.digest)) {
            if dry_run || delete(&mut conn, blobs, blob).await? {
                collected.files += 1;
                collected.bytes += blob.size;
            }
        }
    }
}

/// Whether the database refers to a file of the blob store, or the store is empty.
async fn belong_together(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    now: OffsetDateTime,
) -> Result<bool, RegistryError> {
    let mut all = std::pin::pin!(blobs.stored_before(now).try_chunks(BATCH));
    let mut empty = true;
    while let Some(batch) = all.try_next().await.map_err(|error| error.1)? {
        let digests: Vec<_> = batch.iter().map(|blob| blob.digest).collect();
        if references::unreferenced(conn, &digests).await?.len() < digests.len() {
            return Ok(true);
        }
        empty = false;
    }
    Ok(empty)
}

/// Deletes one blob, unless something refers to it by now.
async fn delete(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    blob: &StoredBlob,
) -> Result<bool, RegistryError> {
    let mut tx = conn.begin().await?;
    references::lock_alone(&mut tx, &blob.digest).await?;
    let free = references::unreferenced(&mut tx, &[blob.digest]).await?;
    if free.is_empty() {
        return Ok(false);
    }
    blobs.delete(&blob.digest).await?;
    tx.commit().await?;
    tracing::debug!(blob = %blob.digest, size = blob.size, "deleted");
    Ok(true)
}

//! The shards of this worker's job, as its engine sees them. This lives on the engine's thread, which may block.

use std::ops::ControlFlow;
use std::time::Duration;

use bytes::Bytes;
use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tokio::runtime::Handle;

use crate::blobs::{BlobError, BlobStore};
use crate::db::DbError;
use crate::jobs::queue::QueueError;
use crate::jobs::shards;
use crate::jobs::shards::Owner;
use crate::registry::RegistryError;
use crate::worker::composer_thread::{Stop, StopReason};
use promptweave_domain::digest::Digest;
use promptweave_domain::error_chain::chain;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::{Estimate, Next, Shard, ShardingError, Shards};

/// The time between two looks for a shard that a helper computes, and between two tries while the database is
/// unreachable.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(200);

pub struct JobShards {
    pub runtime: Handle,
    pub pool: PgPool,
    pub blobs: BlobStore,
    pub owner: Owner,
    pub stop: Stop,
    pub min_shard_pairs: u64,
    /// The current phase, and how many of its shards the engine has got.
    pub merged: (Phase, usize),
    /// The progress as last seen.
    pub done: f64,
}

impl Shards for JobShards {
    fn min_shard_pairs(&self) -> u64 {
        self.min_shard_pairs
    }

    fn lay_out(&mut self, phase: Phase, count: usize) -> Result<usize, ShardingError> {
        self.merged = (phase, 0);
        let laid_out = self.until_done(async || {
            shards::lay_out(&mut *self.pool.acquire().await?, &self.owner, phase, count).await
        });
        // If the work must stop, the engine learns that at its next sign of life.
        Ok(laid_out?.unwrap_or(1))
    }

    fn next(&mut self, phase: Phase) -> Result<(Next, f64), ShardingError> {
        let (next, done) = self
            .until_done(async || self.look(phase).await)?
            .unwrap_or((Next::Wait, self.done));
        self.done = done;
        match next {
            Next::There(_) => self.merged.1 += 1,
            Next::Compute(_) => {}
            // The engine itself asks whether to stop.
            Next::Wait => _ = self.runtime.block_on(self.pause()),
        }
        Ok((next, done))
    }

    fn give(&mut self, shard: Shard, bytes: Vec<u8>) -> Result<(), ShardingError> {
        let bytes = Bytes::from(bytes);
        self.until_done(async || {
            let (file, mut conn) = self.stored(&bytes).await?;
            shards::put(&mut conn, &self.blobs, &self.owner, shard, &file).await
        })?;
        Ok(())
    }

    fn give_whole(&mut self, phase: Phase, bytes: Vec<u8>) -> Result<(), ShardingError> {
        let bytes = Bytes::from(bytes);
        self.until_done(async || {
            let (file, mut conn) = self.stored(&bytes).await?;
            shards::put_whole(&mut conn, &self.blobs, &self.owner, phase, &file).await
        })?;
        Ok(())
    }

    fn end(&mut self, phase: Phase) -> Result<(), ShardingError> {
        self.until_done(async || {
            shards::end(&mut *self.pool.acquire().await?, self.owner.lease, phase).await
        })?;
        Ok(())
    }

    fn estimate(&mut self, estimate: &Estimate) {
        let write = async {
            shards::estimate(&mut *self.pool.acquire().await?, self.owner.lease, estimate).await
        };
        // The estimate is for people; the renewal decides whether the job is still this worker's.
        if let Err(error) = self.runtime.block_on(write) {
            let error = chain(&error);
            tracing::warn!(job.id = %self.owner.lease.job_id, error, "an estimate was not stored");
        }
    }
}

impl JobShards {
    async fn look(&self, phase: Phase) -> Result<(Next, f64), QueueError> {
        let mut conn = self.pool.acquire().await?;
        let there = shards::there(&mut conn, self.owner.lease.job_id, phase).await?;
        let (_, merged) = self.merged;
        if let Some(Some(file)) = there.files.get(merged) {
            match self.blobs.get_bytes(file).await {
                Ok(bytes) => return Ok((Next::There(bytes.into()), there.done)),
                Err(error @ (BlobError::Missing(_) | BlobError::Corrupt { .. })) => {
                    let error = chain(&error);
                    tracing::warn!(job.id = %self.owner.lease.job_id, error, "a shard is computed again");
                    shards::discard(&mut conn, &self.owner, phase, merged).await?;
                }
                Err(error) => return Err(RegistryError::from(error).into()),
            }
        }
        let next = match shards::take(&mut conn, &self.owner, phase).await? {
            Some(index) => Next::Compute(Shard {
                phase,
                index,
                count: there.files.len(),
            }),
            None => Next::Wait,
        };
        Ok((next, there.done))
    }

    /// Stores a file in the blob store, and returns a connection to record it.
    async fn stored(
        &self,
        bytes: &Bytes,
    ) -> Result<(Digest, PoolConnection<Postgres>), QueueError> {
        let file = self.blobs.put_bytes(bytes.clone()).await;
        let file = file.map_err(RegistryError::from)?;
        Ok((file.digest, self.pool.acquire().await?))
    }

    /// Waits for a moment; `Break` if the work was asked to stop.
    async fn pause(&self) -> ControlFlow<()> {
        let asked = tokio::time::timeout(LOOK_AGAIN_AFTER, self.stop.asked());
        match asked.await {
            Ok(()) => ControlFlow::Break(()),
            Err(_) => ControlFlow::Continue(()),
        }
    }

    /// Runs `work`, and again while the database is unreachable. None if the work must stop.
    fn until_done<T>(
        &self,
        work: impl AsyncFn() -> Result<T, QueueError>,
    ) -> Result<Option<T>, ShardingError> {
        self.runtime.block_on(async {
            loop {
                match work().await {
                    Ok(done) => return Ok(Some(done)),
                    Err(QueueError::LeaseLost(_)) => {
                        self.stop.because(StopReason::LeaseLost);
                        return Ok(None);
                    }
                    Err(
                        QueueError::Db(DbError::Unavailable(_))
                        | QueueError::Registry(RegistryError::Db(DbError::Unavailable(_))),
                    ) => {}
                    Err(error) => return Err(ShardingError(Box::new(error))),
                }
                if self.pause().await.is_break() {
                    return Ok(None);
                }
            }
        })
    }
}

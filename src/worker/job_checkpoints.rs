//! The checkpoints of this worker's job, as its engine sees them. This lives on the engine's thread, which may block.

use bytes::Bytes;
use sqlx::PgPool;
use tokio::runtime::Handle;

use crate::blobs::BlobStore;
use crate::jobs::checkpoints;
use crate::jobs::lease::Lease;
use crate::jobs::queue::QueueError;
use crate::registry::RegistryError;
use crate::worker::composer_thread::{Stop, StopReason};
use crate::worker::inputs::InputError;
use promptweave_domain::error_chain::chain;
use promptweave_domain::tuning::{CheckpointUnavailable, Checkpoints, Epoch};

#[derive(Clone)]
pub struct JobCheckpoints {
    pub runtime: Handle,
    pub pool: PgPool,
    pub blobs: BlobStore,
    pub lease: Lease,
    pub stop: Stop,
    /// Name of the tuning within the job.
    pub name: String,
    /// Epochs that are not yet reported as events.
    pub untold: Vec<Epoch>,
}

impl Checkpoints for JobCheckpoints {
    fn last(&mut self) -> Result<Option<Vec<u8>>, CheckpointUnavailable> {
        let read = async {
            let mut conn = self.pool.acquire().await.map_err(RegistryError::from)?;
            let there = checkpoints::last(&mut conn, self.lease.job_id, &self.name).await?;
            let Some(file) = there else {
                return Ok(None);
            };
            Ok(Some(self.blobs.get_bytes(&file).await?.into()))
        };
        let read: Result<_, RegistryError> = self.runtime.block_on(read);
        read.or_else(|error| {
            let error = InputError::from(error);
            if error.is_transient() {
                return Err(CheckpointUnavailable(chain(&error)));
            }
            // The checkpoint is lost for good, and the tuning starts again.
            let error = chain(&error);
            tracing::warn!(job.id = %self.lease.job_id, error, "a checkpoint was not read");
            Ok(None)
        })
    }

    fn keep(&mut self, epoch: &Epoch, bytes: &[u8]) {
        // The pairs of a grid are reported at the end, as candidates.
        if !self.name.starts_with(PAIR) {
            self.untold.push(*epoch);
        }
        let write = async {
            let stored = self.blobs.put_bytes(Bytes::copy_from_slice(bytes)).await;
            let file = match &stored {
                Ok(stored) => Some(&stored.digest),
                Err(error) => {
                    let error = chain(error);
                    tracing::warn!(job.id = %self.lease.job_id, error, "a checkpoint was not kept");
                    None
                }
            };
            let mut conn = self.pool.acquire().await?;
            let Self {
                blobs,
                lease,
                name,
                untold,
                ..
            } = self;
            checkpoints::keep(&mut conn, blobs, *lease, name, file, untold).await
        };
        match self.runtime.block_on(write) {
            Ok(()) => self.untold.clear(),
            Err(QueueError::LeaseLost(_)) => self.stop.because(StopReason::LeaseLost),
            // The epochs are reported with the next checkpoint; this one would only serve another attempt.
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(job.id = %self.lease.job_id, error, "an epoch was not stored");
            }
        }
    }

    fn of_pair(&mut self, place: usize) -> Box<dyn Checkpoints + '_> {
        Box::new(Self {
            name: format!("{PAIR}{place}"),
            ..self.clone()
        })
    }
}

const PAIR: &str = "pair-";

//! Reaping, every second, in whatever process runs: a lost lease needs no particular one to notice.
//! Answers kept for clients that ask again go when their day is over.

use std::time::Duration;

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::jobs::queue::{QueueError, Reaped, reap};
use crate::jobs::shards;
use crate::registry::idempotency;

const EVERY: Duration = Duration::from_secs(1);

/// Reaps until `stop`. A database that is gone is not news here: whoever has work with it says so.
pub async fn run(pool: PgPool, stop: CancellationToken) {
    while stop
        .run_until_cancelled(tokio::time::sleep(EVERY))
        .await
        .is_some()
    {
        match once(&pool).await {
            Ok(reaped) => {
                for Reaped { job_id, state } in reaped {
                    let state = state.name();
                    tracing::warn!(job.id = %job_id, job.state = state, "a lease ran out");
                }
            }
            Err(error) => tracing::debug!(
                error = promptweave_domain::error_chain::chain(&error),
                "cannot reap"
            ),
        }
    }
}

async fn once(pool: &PgPool) -> Result<Vec<Reaped>, QueueError> {
    let mut conn = pool.acquire().await?;
    idempotency::reap(&mut conn).await?;
    let reaped = reap(&mut conn).await?;
    let shards = shards::reap(&mut conn).await?;
    if shards > 0 {
        tracing::warn!(shards, "leases of shards ran out");
    }
    Ok(reaped)
}

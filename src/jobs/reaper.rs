//! Reaping, every second, in every process: a lost lease does not depend on one particular process. It also deletes
//! answers that were kept for clients that ask again, once their day is over.

use std::time::Duration;

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::jobs::queue::{QueueError, Reaped, reap};
use crate::jobs::shards;
use crate::registry::idempotency;

const EVERY: Duration = Duration::from_secs(1);

/// Reaps until `stop`. Database failures are not logged here; whoever has work for the database logs them.
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

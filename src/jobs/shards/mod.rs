//! Shards: parts of a job's work that idle workers, the helpers, take while the job's owner works on others.
//!
//! ```text
//!           take (who has the job), claim (who helps)          give
//!   queued ───────────────────────────────────────► running ─────────► succeeded, with its file
//!     ▲                                                │
//!     └──── lease ran out, given back, job lost ───────┘
//! ```
//!
//! Shards that succeeded outlast the attempt that computed them, so a crash loses only the shards in progress. They are
//! deleted when the job is over. Whoever changes shards of a job and records an event of it locks the job's row first.

mod helper;
mod owner;

use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

pub use helper::{ClaimedShard, GivenBack, claim, give, give_back, reap};
pub use owner::{Owner, There, discard, end, estimate, lay_out, put, put_whole, take, there};

use crate::db::DbError;
use crate::jobs::events::record;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::Shard;
use promptweave_domain::words::EventKind;

/// A shard that this many helpers lost or failed at is left to the owner, whose attempts are counted.
const MAX_HELPERS: i32 = 3;

async fn record_shard(
    conn: &mut PgConnection,
    job_id: Uuid,
    kind: EventKind,
    shard: Shard,
    worker_id: Uuid,
) -> Result<(), DbError> {
    let Shard {
        phase,
        index,
        count,
    } = shard;
    let data = json!({"phase": phase, "index": index, "count": count, "worker": worker_id});
    record(conn, job_id, kind, data).await
}

fn phase(name: &str) -> Result<Phase, DbError> {
    let found = Phase::ALL.into_iter().find(|phase| phase.name() == name);
    found.ok_or_else(|| DbError::unreadable("job_shard", "phase", name))
}

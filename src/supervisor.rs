//! Keeps one worker running for `up`: restarts it when it dies, with growing pauses, and records in the database what
//! happened to it, which a dead process cannot do.
//!
//! A start has failed if the process ends within a minute without having claimed a job. After three failures in a row
//! the worker is `defunct` in `/v1/workers`: from then on it is started once a minute, and a successful start ends the
//! state. A worker that ends with status 0 was asked to (drained, say) and is not started again.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::process::{Child, Command};
use uuid::Uuid;

use crate::jobs::workers;
use crate::jobs::workers::{End, NewWorker};
use crate::shutdown::Shutdown;
use crate::worker::hostname;
use promptweave_domain::clock::new_id;
use promptweave_domain::error_chain::chain;

/// The variable that tells a worker its id.
pub const WORKER_ID: &str = "PROMPTWEAVE_WORKER_ID";

/// A worker that lived this long has started well, so its next failure is the first in a row.
const STARTED_WELL: Duration = Duration::from_secs(60);
/// The number of failed starts in a row after which a worker is defunct.
const DEFUNCT_AFTER: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Supervisor {
    pub program: Command,
    pub pool: PgPool,
    /// The device that was asked for; a worker that does not start cannot report the actual one.
    pub device: String,
    pub shutdown: Shutdown,
}

/// A process that ended by itself.
struct Ended {
    pid: u32,
    /// None if the system does not tell the status.
    status: Option<ExitStatus>,
    reason: String,
}

impl Supervisor {
    /// Runs until `shutdown`, or until the worker is drained; then the process has ended.
    pub async fn run(mut self) {
        // The worker has its own process group: Ctrl-C in a terminal is meant for `up`, which stops the worker itself.
        self.program
            .stdin(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut id = new_id();
        let (mut failed_starts, mut pause) = (0, FIRST_PAUSE);
        loop {
            self.program.env(WORKER_ID, id.to_string());
            let started = Instant::now();
            let Some(ended) = self.run_one().await else {
                return;
            };
            if ended.status.is_some_and(|status| status.success()) {
                tracing::warn!(worker.id = %id, "the worker has ended as it was asked to; start `up` anew for another");
                return;
            }
            let lived = started.elapsed() > STARTED_WELL;
            let worked = lived || self.has_worked(id).await;
            failed_starts = if worked { 0 } else { failed_starts + 1 };
            let defunct = failed_starts >= DEFUNCT_AFTER;
            self.tell(id, &ended, defunct).await;
            if lived {
                pause = FIRST_PAUSE;
            }
            if defunct {
                pause = LONGEST_PAUSE;
                tracing::error!(
                    worker.id = %id, reason = ended.reason, failed_starts,
                    "the worker does not start; `promptweave doctor` says what the engine finds on this \
                     machine. Trying once a minute"
                );
            } else {
                tracing::error!(worker.id = %id, reason = ended.reason, "the worker has ended, starting another");
            }
            if worked {
                id = new_id();
            }
            let sleep = tokio::time::sleep(pause);
            if self
                .shutdown
                .soft
                .run_until_cancelled(sleep)
                .await
                .is_none()
            {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Starts a worker and waits until it ends by itself; None if it was asked to stop and has ended.
    async fn run_one(&mut self) -> Option<Ended> {
        let child = match self.program.spawn() {
            Ok(child) => child,
            Err(error) => {
                return Some(Ended {
                    pid: 0,
                    status: None,
                    reason: format!("the worker cannot be started: {error}"),
                });
            }
        };
        let pid = child.id().unwrap_or_default();
        let (status, reason) = match self.wait(child).await? {
            Ok(status) => (Some(status), format!("the process ended ({status})")),
            Err(error) => (None, format!("the process is lost: {error}")),
        };
        Some(Ended {
            pid,
            status,
            reason,
        })
    }

    async fn wait(&self, mut child: Child) -> Option<io::Result<ExitStatus>> {
        // `child.wait()` alone would close stdin, which asks the worker to stop.
        let stdin = child.stdin.take();
        tokio::select! {
            status = child.wait() => return Some(status),
            () = self.shutdown.soft.cancelled() => {}
        }
        drop(stdin);
        tokio::select! {
            _ = child.wait() => {}
            () = self.shutdown.hard.cancelled() => {
                tracing::warn!("the worker did not stop in time, killing it");
                // The worker may have ended just now.
                let _ = child.kill().await;
            }
        }
        None
    }

    /// Whether the worker ever claimed a job. False without a database, because then it cannot have claimed one lately.
    async fn has_worked(&self, id: Uuid) -> bool {
        let ask = async { workers::has_worked(&mut *self.pool.acquire().await?, id).await };
        ask.await.unwrap_or(false)
    }

    /// Records the end of a worker that has not recorded it itself.
    async fn tell(&self, id: Uuid, ended: &Ended, defunct: bool) {
        let worker = NewWorker {
            id,
            host: &hostname(),
            pid: ended.pid,
            device: &self.device,
            ..NewWorker::default()
        };
        let end = End {
            defunct,
            reason: &ended.reason,
            // A worker that a signal ended had no time to store a reason.
            unless_said: ended.status.is_some_and(|status| status.code().is_some()),
        };
        let write = async { workers::ended(&mut *self.pool.acquire().await?, &worker, end).await };
        if let Err(error) = write.await {
            tracing::warn!(worker.id = %id, error = chain(&error), "the worker's end was not stored");
        }
    }
}

//! Renews a lease on its own thread and connection, because neither a busy pool nor a busy runtime may cost a job. A
//! missed renewal is only logged. After 80 % of the lease without any, the worker gives the job up, while no other
//! worker can have it yet.

use std::thread;
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, PgConnection};
use tokio_util::sync::CancellationToken;

use crate::failpoints;
use crate::jobs::lease::{Lease, RenewOutcome};
use crate::jobs::queue::QueueError;
use crate::worker::composer_thread::{Stop, StopReason};
use promptweave_domain::error_chain::chain;

/// The part of the lease after which a worker that could not renew gives up.
const GIVE_UP_AT: f64 = 0.8;

/// Renews until dropped.
#[derive(Debug)]
pub struct Renewal {
    done: CancellationToken,
    lost: CancellationToken,
}

impl Renewal {
    /// Starts renewing. `claimed_at` is the time before the claim was sent, so that the lease ends later than assumed.
    pub fn start(
        options: PgConnectOptions,
        lease: Lease,
        length: Duration,
        claimed_at: Instant,
        stop: Stop,
    ) -> Self {
        let renewal = Self {
            done: CancellationToken::new(),
            lost: CancellationToken::new(),
        };
        let (done, lost) = (renewal.done.clone(), renewal.lost.clone());
        let keeper = Keeper {
            options,
            lease,
            length,
            renewed_at: claimed_at,
            stop,
            connection: None,
        };
        let body = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime needs an epoll and a timer, no more");
            if runtime
                .block_on(done.run_until_cancelled(keeper.keep()))
                .is_some()
            {
                lost.cancel();
            }
        };
        thread::Builder::new()
            .name("lease".to_owned())
            .spawn(body)
            .expect("the system lets a process start one thread");
        renewal
    }

    /// Waits until the lease is lost, or so near its end that it counts as lost.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        self.done.cancel();
    }
}

struct Keeper {
    options: PgConnectOptions,
    lease: Lease,
    length: Duration,
    renewed_at: Instant,
    stop: Stop,
    connection: Option<PgConnection>,
}

impl Keeper {
    /// Returns when the lease is lost.
    async fn keep(mut self) {
        loop {
            // The lease is renewed at every third of its length; after a failure sooner, as there is less time left.
            let pause = if self.connection.is_some() || self.renewed_at.elapsed() < self.length / 3
            {
                (self.length / 3).saturating_sub(self.renewed_at.elapsed())
            } else {
                self.length / 15
            };
            tokio::time::sleep(pause).await;
            let left = self
                .length
                .mul_f64(GIVE_UP_AT)
                .saturating_sub(self.renewed_at.elapsed());
            let asked_at = Instant::now();
            let job_id = self.lease.job_id;
            match tokio::time::timeout(left, self.renew()).await {
                Ok(Ok(answer)) => {
                    self.renewed_at = asked_at;
                    if answer == RenewOutcome::CancelRequested {
                        self.stop.because(StopReason::Cancelled);
                    }
                    continue;
                }
                Ok(Err(QueueError::LeaseLost(_))) => {
                    tracing::warn!(job.id = %job_id, "the lease is lost");
                }
                Ok(Err(error)) => {
                    let error = chain(&error);
                    tracing::warn!(job.id = %job_id, error, "cannot renew the lease, trying again");
                    self.connection = None;
                    continue;
                }
                Err(_) => {
                    tracing::warn!(job.id = %job_id, "no renewal came through, giving the job up");
                }
            }
            self.stop.because(StopReason::LeaseLost);
            return;
        }
    }

    async fn renew(&mut self) -> Result<RenewOutcome, QueueError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(self.options.connect().await?),
        };
        failpoints::reach("renewing", self.lease.job_id);
        let renewed = self.lease.renew(connection, self.length).await;
        failpoints::reach("renewed", self.lease.job_id);
        renewed
    }
}

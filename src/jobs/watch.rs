//! Requests that wait for something to happen to a job, on one connection to the database together.
//!
//! A notification is a hint: whoever waits looks again after a second all the same.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgListener;
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::jobs::events::EVENT_CHANNEL;

/// Longest wait between two looks. Progress is not told, so this is also how often that is seen.
const POLL: Duration = Duration::from_secs(1);
/// Jobs named between two looks of one who waits; where there are more, they look.
const CAPACITY: usize = 256;

#[derive(Clone, Debug)]
pub struct JobWatch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    pool: PgPool,
    stop: CancellationToken,
    /// There while somebody waits.
    jobs: Mutex<Option<broadcast::Sender<Uuid>>>,
    left: Notify,
}

/// Somebody who waits for one job.
#[derive(Debug)]
pub struct Waiting {
    job_id: Uuid,
    /// None once it is dropped.
    jobs: Option<broadcast::Receiver<Uuid>>,
    shared: Arc<Shared>,
}

impl JobWatch {
    /// Nobody waits any longer after `stop`.
    pub fn new(pool: PgPool, stop: CancellationToken) -> Self {
        Self(Arc::new(Shared {
            pool,
            stop,
            jobs: Mutex::default(),
            left: Notify::new(),
        }))
    }

    /// What happens from here on is noticed. The first who waits opens the connection.
    pub fn wait_for(&self, job_id: Uuid) -> Waiting {
        let mut jobs = self.0.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let receiver = match &*jobs {
            Some(sender) => sender.subscribe(),
            None => {
                let (sender, receiver) = broadcast::channel(CAPACITY);
                *jobs = Some(sender.clone());
                tokio::spawn(listen(Arc::clone(&self.0), sender));
                receiver
            }
        };
        Waiting {
            job_id,
            jobs: Some(receiver),
            shared: Arc::clone(&self.0),
        }
    }
}

impl Waiting {
    /// Until there may be something new, a second at the longest. False: the server stops.
    pub async fn look_again(&mut self) -> bool {
        let Some(jobs) = &mut self.jobs else {
            return false;
        };
        let told = async {
            loop {
                match jobs.recv().await {
                    Ok(job_id) if job_id != self.job_id => {}
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => return,
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        let stop = &self.shared.stop;
        let waited = stop.run_until_cancelled(tokio::time::timeout(POLL, told));
        waited.await.is_some()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        drop(self.jobs.take());
        self.shared.left.notify_one();
    }
}

/// Passes notifications on until nobody waits.
async fn listen(shared: Arc<Shared>, jobs: broadcast::Sender<Uuid>) {
    let passing = async {
        loop {
            if let Err(error) = pass_on(&shared.pool, &jobs).await {
                tracing::debug!(%error, "no notifications of jobs for a moment");
            }
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::pin!(passing);
    loop {
        tokio::select! {
            () = &mut passing => {}
            () = shared.left.notified() => {}
            () = shared.stop.cancelled() => {}
        }
        // Under the lock, so that nobody joins a channel that has no listener.
        let mut there = shared.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.receiver_count() == 0 || shared.stop.is_cancelled() {
            *there = None;
            return;
        }
    }
}

/// Until the connection breaks.
async fn pass_on(pool: &PgPool, jobs: &broadcast::Sender<Uuid>) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(EVENT_CHANNEL).await?;
    while let Some(notification) = listener.try_recv().await? {
        if let Ok(job_id) = notification.payload().parse() {
            // Nobody may wait just now.
            let _ = jobs.send(job_id);
        }
    }
    Ok(())
}

//! Requests that wait for events of a job, sharing one connection to the database.
//!
//! A notification is a hint: every waiting request looks again after a second anyway.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgListener;
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::jobs::events::EVENT_CHANNEL;

/// The longest wait between two looks. Progress is not notified, so this is also how often it is seen.
const POLL: Duration = Duration::from_secs(1);
/// How many notifications a waiting request may fall behind; if it misses some, it looks.
const CAPACITY: usize = 256;

#[derive(Clone, Debug)]
pub struct JobWatch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    pool: PgPool,
    stop: CancellationToken,
    /// The channel to waiting requests; None if nobody waits.
    jobs: Mutex<Option<broadcast::Sender<Uuid>>>,
    left: Notify,
}

/// A request that waits for one job.
#[derive(Debug)]
pub struct Waiting {
    job_id: Uuid,
    /// None once it is dropped.
    jobs: Option<broadcast::Receiver<Uuid>>,
    shared: Arc<Shared>,
}

impl JobWatch {
    /// Makes a watch whose waits all end at `stop`.
    pub fn new(pool: PgPool, stop: CancellationToken) -> Self {
        Self(Arc::new(Shared {
            pool,
            stop,
            jobs: Mutex::default(),
            left: Notify::new(),
        }))
    }

    /// Begins to watch a job: events from now on are noticed. The first waiting request opens the connection.
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
    /// Waits until there may be something new, at most a second. False if the server stops.
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
        // This is under the lock, so that no request joins a channel that nobody feeds.
        let mut there = shared.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.receiver_count() == 0 || shared.stop.is_cancelled() {
            *there = None;
            return;
        }
    }
}

/// Passes on notifications until the connection breaks.
async fn pass_on(pool: &PgPool, jobs: &broadcast::Sender<Uuid>) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(EVENT_CHANNEL).await?;
    while let Some(notification) = listener.try_recv().await? {
        if let Ok(job_id) = notification.payload().parse() {
            // This fails harmlessly if nobody waits just now.
            let _ = jobs.send(job_id);
        }
    }
    Ok(())
}

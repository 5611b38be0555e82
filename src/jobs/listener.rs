//! Waking idle workers: a notification is a hint, and polling covers lost ones.

use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgListener;

use crate::jobs::queue::WORK_CHANNEL;

/// The longest wait between two looks at the queue. Retries become due without a notification, so one may start this
/// late.
const POLL: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct WorkListener {
    pool: PgPool,
    /// The connection that listens; None while there is none.
    listener: Option<PgListener>,
}

impl WorkListener {
    pub fn new(pool: PgPool) -> Self {
        Self {
            pool,
            listener: None,
        }
    }

    /// Returns when there may be work, after a second at the latest.
    pub async fn wait(&mut self) {
        // Without the database, this too ends with the second.
        let _ = tokio::time::timeout(POLL, self.hint()).await;
    }

    async fn hint(&mut self) {
        let Some(listener) = &mut self.listener else {
            match self.connect().await {
                // Notifications since the last look at the queue were missed, so look again now.
                Ok(listener) => self.listener = Some(listener),
                Err(_) => std::future::pending().await,
            }
            return;
        };
        if !matches!(listener.try_recv().await, Ok(Some(_))) {
            // The connection broke: look at the queue once by polling, then listen again.
            self.listener = None;
            std::future::pending().await
        }
    }

    async fn connect(&self) -> Result<PgListener, sqlx::Error> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(WORK_CHANNEL).await?;
        Ok(listener)
    }
}

//! The wake-up: a notification is a hint, the poll beside it makes sure.

use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgListener;

use crate::jobs::queue::WORK_CHANNEL;

/// Longest wait between two looks at the queue. Retries become due without a notification, so this
/// is also how late one may start.
const POLL: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct WorkListener {
    pool: PgPool,
    /// None while there is no connection.
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
        // Without the database this too ends with the second.
        let _ = tokio::time::timeout(POLL, self.hint()).await;
    }

    async fn hint(&mut self) {
        let Some(listener) = &mut self.listener else {
            match self.connect().await {
                // Of what came since the last look at the queue nothing was heard: look again, now.
                Ok(listener) => self.listener = Some(listener),
                Err(_) => std::future::pending().await,
            }
            return;
        };
        if !matches!(listener.try_recv().await, Ok(Some(_))) {
            // The connection broke: look at the queue once by the poll, then listen anew.
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

//! Stop softly, then hard: the first SIGTERM or SIGINT asks, a second or the grace period insists.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Take nothing new; finish or hand back what is at hand.
    pub soft: CancellationToken,
    /// Drop everything now.
    pub hard: CancellationToken,
}

impl Shutdown {
    /// Listens for signals from now on. Must be called within a tokio runtime.
    pub fn on_signals(grace: Duration) -> std::io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        let shutdown = Self::default();
        tokio::spawn(shutdown.clone().follow(terminate, interrupt, grace));
        Ok(shutdown)
    }

    async fn follow(self, mut terminate: Signal, mut interrupt: Signal, grace: Duration) {
        // Either a signal, or something in the process asked for the end itself.
        tokio::select! {
            _ = terminate.recv() => tracing::info!("stopping on SIGTERM"),
            _ = interrupt.recv() => tracing::info!("stopping on SIGINT; once more to stop at once"),
            () = self.soft.cancelled() => {}
        }
        self.soft.cancel();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = tokio::time::sleep(grace) => {
                tracing::warn!(grace_s = grace.as_secs(), "grace period is over, stopping at once");
            }
        }
        self.hard.cancel();
    }
}

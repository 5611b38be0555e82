//! Soft, then hard shutdown: the first SIGTERM, SIGINT or SIGHUP is soft; a second signal or the grace period's end is
//! hard.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Soft: take nothing new, and finish or hand back current work.
    pub soft: CancellationToken,
    /// Hard: drop everything now.
    pub hard: CancellationToken,
}

impl Shutdown {
    /// Listens for signals from now on. It must be called within a tokio runtime.
    pub fn on_signals(grace: Duration) -> std::io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        // SIGHUP stays ignored under `nohup`, which exists so that a process outlives its terminal.
        let hang_up = match hang_up_is_ignored() {
            true => None,
            false => Some(signal(SignalKind::hangup())?),
        };
        let shutdown = Self::default();
        tokio::spawn(
            shutdown
                .clone()
                .follow(terminate, interrupt, hang_up, grace),
        );
        Ok(shutdown)
    }

    async fn follow(
        self,
        mut terminate: Signal,
        mut interrupt: Signal,
        mut hang_up: Option<Signal>,
        grace: Duration,
    ) {
        // The soft stop is a signal, or something in the process asked for it.
        tokio::select! {
            _ = terminate.recv() => tracing::info!("stopping on SIGTERM"),
            _ = interrupt.recv() => tracing::info!("stopping on SIGINT; once more to stop at once"),
            () = received(&mut hang_up) => tracing::info!("stopping on SIGHUP"),
            () = self.soft.cancelled() => {}
        }
        self.soft.cancel();
        // SIGHUP does not force a hard stop: a terminal that closes may send it more than once.
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

async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether this process was started with SIGHUP ignored.
fn hang_up_is_ignored() -> bool {
    const HANG_UP: u64 = 1; // bit 0, as the signal's number is 1
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & HANG_UP != 0)
}

//! Progress of a file or an ensemble: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::client::ensemble::Progress;
use crate::client::table::plain;

/// The time between two lines of progress if there is no bar.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A bar on stderr for a transfer; it disappears when it is finished and cleared.
pub fn bytes(what: &str, size: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        eprintln!("{what} ({})", HumanBytes(size));
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "{prefix} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}",
    )
    .expect("the template is a constant");
    ProgressBar::new(size)
        .with_style(style)
        .with_prefix(what.to_owned())
}

/// An ensemble's phases, one after the other, on stderr.
#[derive(Default)]
pub struct Phases {
    /// The bar of the current phase, on a terminal.
    bar: Option<ProgressBar>,
    phase: String,
    /// When the last line of progress was written, if there is no terminal.
    written: Option<Instant>,
}

impl Phases {
    pub fn event(&mut self, kind: &str, data: &Value) {
        let line = match data.as_object() {
            Some(fields) if !fields.is_empty() => format!("{kind} {data}"),
            _ => kind.to_owned(),
        };
        let line = plain(&line);
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    pub fn progress(&mut self, progress: &Progress) {
        if !std::io::stderr().is_terminal() {
            return self.line(progress);
        }
        if self.phase != progress.phase {
            self.finish();
            self.phase.clone_from(&progress.phase);
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{prefix:10} {bar:40} {pos}/{len} {msg}")
                .expect("the template is a constant");
            ProgressBar::new(progress.total)
                .with_style(style)
                .with_prefix(plain(&progress.phase))
        });
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(speed(progress));
    }

    fn line(&mut self, progress: &Progress) {
        if self.written.is_some_and(|at| at.elapsed() < LINE_EVERY) {
            return;
        }
        self.written = Some(Instant::now());
        let Progress {
            phase, done, total, ..
        } = progress;
        eprintln!("{} {done}/{total} {}", plain(phase), speed(progress));
    }

    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn speed(progress: &Progress) -> String {
    match (progress.per_second, progress.eta_seconds) {
        (Some(per_second), Some(left)) => format!("{per_second:.1}/s, {left:.0} s left"),
        _ => String::new(),
    }
}

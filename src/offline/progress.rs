//! Progress: bars on a terminal, one line per phase elsewhere.

use std::io::IsTerminal as _;
use std::ops::ControlFlow;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use promptweave_domain::composer::Observer;
use promptweave_domain::phase::Phase;

/// A bar on standard error.
pub fn bar(name: &str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:10} {bar:40} {pos}/{len} {per_sec:.0} ETA {eta} {msg}",
    )
    .expect("the template is a constant");
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        eprintln!("{name} ({total})");
        ProgressDrawTarget::hidden()
    };
    ProgressBar::with_draw_target(Some(total), target)
        .with_style(style)
        .with_prefix(name.to_owned())
}

/// Progress bars, one phase after another.
#[derive(Default)]
pub struct Bars(Option<(Phase, ProgressBar)>);

impl Observer for Bars {
    fn progress(&mut self, phase: Phase, done: u64, total: u64) -> ControlFlow<()> {
        if self.0.as_ref().is_none_or(|(current, _)| *current != phase) {
            if let Some((_, finished)) = self.0.take() {
                finished.finish();
            }
            self.0 = Some((phase, bar(phase.name(), total)));
        }
        if let Some((_, bar)) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
        ControlFlow::Continue(())
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        if let Some((_, bar)) = self.0.take() {
            bar.finish();
        }
    }
}

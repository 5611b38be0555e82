//! How far a file is: a bar on a terminal, one line elsewhere.

use std::io::IsTerminal;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// On stderr; gone when it is finished and cleared.
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

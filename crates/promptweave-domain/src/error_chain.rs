//! An error and its causes as one line.

use std::error::Error;
use std::fmt::Write as _;

/// Formats an error and all its causes on one line. Errors in this project never print their own
/// source.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        write!(text, ": {error}").expect("writing to a String");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_chain_names_every_cause_once() {
        let error = anyhow::anyhow!("disk full")
            .context("cannot write `x`")
            .context("job 7 failed");
        let text = super::chain(error.as_ref());
        assert_eq!(text, "job 7 failed: cannot write `x`: disk full");
    }
}

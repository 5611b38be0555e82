//! An error with all that is behind it, as one line.

use std::error::Error;
use std::fmt::Write as _;

/// An error and what is behind it, on one line: errors here never print their own source.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        write!(text, ": {error}").expect("writing to a String");
        source = error.source();
    }
    text
}

//! Output for people, on stdout.

use std::io::{ErrorKind, Write};

pub fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // A reader like `head` in `ls | head` may stop early.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// Formats a table whose columns are as wide as their widest cell.
pub fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(head.map(str::to_owned))
        .chain(rows.map(|row| row.map(|cell| plain(&cell))))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line += &format!("{cell:width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Makes text from the registry safe to print: it must not move a terminal's cursor or begin a line.
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_what_is_in_them_stays_in_its_line() {
        let rows = [["a", "1"], ["long\u{1b}[2J\nname", "22"]];
        let rows = rows.map(|row| row.map(str::to_owned));
        let text = table(["NAME", "N"], rows.into_iter());
        assert_eq!(
            text,
            "NAME           N\na              1\nlong\u{fffd}[2J\u{fffd}name  22\n"
        );
    }
}

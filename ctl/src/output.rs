//! What people and programs read: tables, JSON, colours on terminals, progress.

use std::io::{IsTerminal, Write};
use std::time::{Duration, SystemTime};

use protobuf::well_known_types::timestamp::Timestamp;
use serde_json::Value;

use crate::error::{Error, Result};

/// How results are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// Writes to standard output.
///
/// # Errors
/// [`Error::Closed`] when nobody reads any more.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        std::io::ErrorKind::BrokenPipe => Error::Closed,
        _ => Error::Io { what: "write to standard output".into(), source: error },
    })
}

/// Writes a value as JSON, indented.
///
/// # Errors
/// As [`print()`].
pub fn json(value: &Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

/// Writes a value as one line of JSON.
///
/// # Errors
/// As [`print()`].
pub fn json_line(value: &Value) -> Result<()> {
    print(&format!("{value}\n"))
}

/// Says something on standard error that is no result.
pub fn note(text: &str) {
    // Nothing better can be done when even that fails.
    let _ = writeln!(std::io::stderr(), "kuasar-ctl: {}", clean(text));
}

/// A text from outside without what would steer a terminal.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '?' } else { c }).collect()
}

/// A table whose columns are as wide as their widest cell.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these headings.
    pub fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|h| (*h).to_owned()).collect()] }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.iter().map(|cell| clean(cell).replace(['\n', '\t'], " ")).collect());
    }

    /// The text.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |n: usize| {
            self.rows.iter().filter_map(|r| Some(r.get(n)?.chars().count())).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:width$}  "));
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// Colours, where standard output is a terminal and nobody objects (`NO_COLOR`).
#[derive(Debug, Clone, Copy)]
pub struct Colours(bool);

impl Colours {
    /// As standard output is.
    pub fn detect() -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        Self(wanted && std::io::stdout().is_terminal())
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// What is well.
    pub fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// What is not as good as it could be.
    pub fn warn(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// What is wrong.
    pub fn bad(self, text: &str) -> String {
        self.paint("31", text)
    }
}

/// Says on standard error what takes longer than a second, until it is dropped.
#[derive(Debug)]
pub struct Progress(tokio::task::JoinHandle<()>);

impl Progress {
    /// `what` goes on from now.
    pub fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        Self(tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let terminal = std::io::stderr().is_terminal();
            let begun = std::time::Instant::now();
            loop {
                let seconds = begun.elapsed().as_secs() + 1;
                let mut err = std::io::stderr();
                let _ = if terminal {
                    write!(err, "\r\x1b[K{what} … {seconds} s").and_then(|()| err.flush())
                } else {
                    writeln!(err, "{what} …")
                };
                let next = if terminal { 1 } else { 10 };
                tokio::time::sleep(Duration::from_secs(next)).await;
            }
        }))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.abort();
        if std::io::stderr().is_terminal() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// The moment of a message, if it has one.
pub fn moment(at: Option<&Timestamp>) -> Option<SystemTime> {
    let at = at?;
    let seconds = u64::try_from(at.seconds).ok()?;
    let nanos = u32::try_from(at.nanos).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

/// RFC 3339, or nothing.
pub fn rfc3339(at: Option<SystemTime>) -> Option<String> {
    let at = time::OffsetDateTime::from(at?);
    at.format(&time::format_description::well_known::Rfc3339).ok()
}

/// How long ago, in one or two units.
pub fn age(at: Option<SystemTime>) -> String {
    match at.map(|at| at.elapsed().unwrap_or_default()) {
        Some(past) => span(past),
        None => "-".into(),
    }
}

/// A duration in one or two units.
pub fn span(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// Bytes in the unit that fits.
pub fn bytes(n: u64) -> String {
    let (mut value, mut unit) = (n as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") }
}

/// The first characters of an id, as people tell them apart.
pub fn short(id: &str) -> String {
    id.chars().take(13).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_cells_steer_no_terminal() {
        let mut table = Table::new(&["A", "BB"]);
        table.row(["long cell".into(), "x\x1b[31m\ny".into()]);
        assert_eq!(table.text(), "A          BB\nlong cell  x?[31m y\n");
    }

    #[test]
    fn units_are_those_of_people() {
        assert_eq!(span(Duration::from_secs(59)), "59s");
        assert_eq!(span(Duration::from_secs(3661)), "1h01m");
        assert_eq!(span(Duration::from_secs(90_000)), "1d01h");
        assert_eq!(
            (bytes(1023), bytes(1536), bytes(5 << 30)),
            ("1023 B".into(), "1.5 KiB".into(), "5.0 GiB".into())
        );
        assert_eq!(short("0123456789abcdef"), "0123456789abc");
    }
}

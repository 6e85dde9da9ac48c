//! The log: lines to `/dev/kmsg`, so that they are in order with the kernel's own on the console.
//!
//! A subscriber of our own instead of tracing-subscriber: it has no spans, no filters and no
//! formats, and costs neither start time nor memory. The kernel limits how many lines it takes.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

/// Longest line, in bytes; the kernel takes a little less than 1024.
const LINE: usize = 900;

/// Writes events to a file, one write each.
pub struct Kmsg {
    file: File,
    level: Level,
}

impl Kmsg {
    /// Events of `level` and graver ones go to `file`.
    pub fn new(file: File, level: Level) -> Self {
        Self { file, level }
    }
}

/// A text that stops to grow at a length.
struct Line(String);

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if self.0.len() >= LINE {
                return Err(fmt::Error);
            }
            self.0.push(if c.is_control() { ' ' } else { c });
        }
        Ok(())
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // A line that is full is cut.
        let _ = match field.name() {
            "message" => write!(self, " {value:?}"),
            name => write!(self, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

fn priority(level: Level) -> u8 {
    // <linux/kern_levels.h>, with the facility of a daemon (3) above the three bits.
    24 + match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

impl Subscriber for Kmsg {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }
    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(self.level.into())
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = Line(format!("<{}>vmm-task:", priority(*event.metadata().level())));
        event.record(&mut line);
        line.0.push('\n');
        // A log that cannot be written cannot be complained about.
        let _ = (&self.file).write_all(line.0.as_bytes());
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// From now on a panic is a line of the kernel's log as well, gravest priority.
pub fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        let mut line = Line("<25>vmm-task: panic:".into());
        let _ = write!(line, " {info}");
        line.0.push('\n');
        if let Ok(mut file) = std::fs::OpenOptions::new().write(true).open("/dev/kmsg") {
            let _ = file.write_all(line.0.as_bytes());
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn an_event_is_one_line_of_bounded_length() {
        let mut file = tempfile::tempfile().unwrap();
        let subscriber = Kmsg::new(file.try_clone().unwrap(), Level::INFO);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(container = "c1", "two\nlines");
            tracing::debug!("not this one");
            tracing::error!("{}", "x".repeat(5000));
        });
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "<30>vmm-task: two lines container=c1");
        assert!(lines[1].starts_with("<27>vmm-task: xxx") && lines[1].len() <= LINE);
        assert_eq!(lines.len(), 2);
    }
}

//! Logs: lines on stderr, with journald's priority prefixes under systemd, or JSON.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, reload};

use crate::common::LogFormat;

/// Longest line, in bytes; values from containers and engines may be long.
const MAX_LINE: usize = 4096;

/// Changes the level of a running daemon.
#[derive(Clone)]
pub struct LevelHandle(reload::Handle<EnvFilter, tracing_subscriber::Registry>);

fn filter(level: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(level).map_err(|e| format!("log_level {level:?}: {e}"))
}

/// What is wrong with a level or filter.
///
/// # Errors
/// A text that names it.
pub fn check(level: &str) -> Result<(), String> {
    filter(level).map(drop)
}

impl LevelHandle {
    /// Sets a new level or filter.
    ///
    /// # Errors
    /// A text that says what is wrong with it.
    pub fn set(&self, level: &str) -> Result<(), String> {
        self.0.reload(filter(level)?).map_err(|e| e.to_string())
    }
}

/// Starts logging as text, with priorities under systemd.
///
/// # Errors
/// A text that says what is wrong with the level.
pub fn init(level: &str) -> Result<LevelHandle, String> {
    init_as(level, LogFormat::Text)
}

/// Starts logging in a format.
///
/// # Errors
/// A text that says what is wrong with the level.
pub fn init_as(level: &str, format: LogFormat) -> Result<LevelHandle, String> {
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let format = match format {
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => LogFormat::Journal,
        other => other,
    };
    let lines =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).event_format(Lines(format));
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|e| e.to_string())?;
    Ok(LevelHandle(handle))
}

struct Lines(LogFormat);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = *event.metadata().level();
        let target = event.metadata().target();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let (seconds, micros) = (now.as_secs(), now.subsec_micros());
        if self.0 == LogFormat::Json {
            let mut fields = JsonFields { out: String::new(), room: MAX_LINE };
            event.record(&mut fields);
            return writeln!(
                out,
                "{{\"time\":{seconds}.{micros:06},\"level\":\"{level}\",\"target\":\"{target}\"{}}}",
                fields.out
            );
        }
        if self.0 == LogFormat::Journal {
            let priority = match level {
                Level::ERROR => 3,
                Level::WARN => 4,
                Level::INFO => 6,
                _ => 7,
            };
            write!(out, "<{priority}>")?;
        } else {
            write!(out, "{seconds}.{micros:06} {level:5} ")?;
        }
        let mut line = String::new();
        ctx.field_format().format_fields(Writer::new(&mut line), event)?;
        writeln!(out, "{} ({target})", clean(&line, MAX_LINE))
    }
}

/// At most `room` bytes of a text, without control characters: values may come from a container,
/// and must not forge lines or drive a terminal. Nor may characters that turn text around.
fn clean(text: &str, mut room: usize) -> String {
    let mut out = String::with_capacity(text.len().min(room));
    for c in text.chars() {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        let c = if c.is_control() || turns { ' ' } else { c };
        if room < c.len_utf8() {
            out.push('…');
            break;
        }
        room -= c.len_utf8();
        out.push(c);
    }
    out
}

/// Fields of an event as members of a JSON object.
struct JsonFields {
    out: String,
    room: usize,
}

impl JsonFields {
    fn text(&mut self, name: &str, value: &str) {
        let value = clean(value, self.room);
        self.room = self.room.saturating_sub(value.len());
        let value = value.replace('\\', "\\\\").replace('"', "\\\"");
        self.out.push_str(&format!(",\"{name}\":\"{value}\""));
    }
}

impl tracing::field::Visit for JsonFields {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        self.text(field.name(), &format!("{value:?}"));
    }
    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        self.text(field.name(), value);
    }
    fn record_error(
        &mut self,
        field: &tracing::field::Field,
        value: &(dyn std::error::Error + 'static),
    ) {
        self.text(field.name(), &value.to_string());
    }
    fn record_u64(&mut self, field: &tracing::field::Field, value: u64) {
        self.out.push_str(&format!(",\"{}\":{value}", field.name()));
    }
    fn record_i64(&mut self, field: &tracing::field::Field, value: i64) {
        self.out.push_str(&format!(",\"{}\":{value}", field.name()));
    }
    fn record_bool(&mut self, field: &tracing::field::Field, value: bool) {
        self.out.push_str(&format!(",\"{}\":{value}", field.name()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// The bytes that a subscriber has written.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Sink {
        fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(b)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, log: impl FnOnce()) -> String {
        use tracing_subscriber::layer::SubscriberExt;
        let sink = Sink::default();
        let writer = sink.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .event_format(Lines(format));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        String::from_utf8(sink.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_container_cannot_forge_a_line() {
        let evil = "x\n<0>forged \u{1b}[2J \u{202e}\"\\";
        for format in [LogFormat::Text, LogFormat::Journal, LogFormat::Json] {
            let text = logged(format, || tracing::warn!(id = evil, n = 7, "exit: {evil}"));
            assert_eq!(text.lines().count(), 1, "{text}");
            assert!(!text.contains('\u{1b}') && !text.contains('\u{202e}'), "{text}");
            assert!(text.contains("forged"), "{text}");
        }
        let text = logged(LogFormat::Journal, || tracing::error!("x"));
        assert!(text.starts_with("<3>x ("), "{text}");
    }

    #[test]
    fn json_lines_are_json_and_bounded() {
        let long = "\"é".repeat(100_000);
        let text = logged(LogFormat::Json, || tracing::info!(long, n = 7, "m {}", 1));
        assert!(text.len() < 3 * MAX_LINE, "{}", text.len());
        let v: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((v["n"].as_u64(), v["level"].as_str()), (Some(7), Some("INFO")));
        let text = logged(LogFormat::Text, || tracing::info!("{}", "é".repeat(100_000)));
        assert!(text.len() < MAX_LINE + 200, "{}", text.len());
    }
}

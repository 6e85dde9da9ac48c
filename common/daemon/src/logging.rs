//! Logs: lines on stderr, with journald's priority prefixes under systemd.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, reload};

/// Longest line, in bytes; values from containers and engines may be long.
const MAX_LINE: usize = 4096;

/// Changes the level of a running daemon.
pub struct LevelHandle(reload::Handle<EnvFilter, tracing_subscriber::Registry>);

impl LevelHandle {
    /// Sets a new level or filter.
    ///
    /// # Errors
    /// A text that says what is wrong with it.
    pub fn set(&self, level: &str) -> Result<(), String> {
        let filter = EnvFilter::try_new(level).map_err(|e| format!("log_level {level:?}: {e}"))?;
        self.0.reload(filter).map_err(|e| e.to_string())
    }
}

/// Starts logging.
///
/// # Errors
/// A text that says what is wrong with the level.
pub fn init(level: &str) -> Result<LevelHandle, String> {
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    let filter = EnvFilter::try_new(level).map_err(|e| format!("log_level {level:?}: {e}"))?;
    let (filter, handle) = reload::Layer::new(filter);
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .event_format(Lines { journal });
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|e| e.to_string())?;
    Ok(LevelHandle(handle))
}

struct Lines {
    journal: bool,
}

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
        if self.journal {
            let priority = match level {
                Level::ERROR => 3,
                Level::WARN => 4,
                Level::INFO => 6,
                _ => 7,
            };
            write!(out, "<{priority}>")?;
        } else {
            let now = std::time::SystemTime::now()
                .duration_since(std::time::SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            write!(out, "{}.{:06} {level:5} ", now.as_secs(), now.subsec_micros())?;
        }
        let mut line = String::new();
        ctx.field_format().format_fields(Writer::new(&mut line), event)?;
        // Values may come from a container: they must not forge lines or drive a terminal.
        let clean = line.chars().map(|c| if c.is_control() { ' ' } else { c });
        let mut room = MAX_LINE;
        for c in clean {
            room = room.saturating_sub(c.len_utf8());
            if room == 0 {
                out.write_str("…")?;
                break;
            }
            out.write_char(c)?;
        }
        writeln!(out, " ({})", event.metadata().target())
    }
}

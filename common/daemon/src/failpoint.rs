//! Named points at which a test can kill or fail the daemon.
//!
//! `KUASAR_FAILPOINT=name:kill` makes the daemon send itself SIGKILL at that point, once: the
//! stamp `<dir>/failpoint.done` keeps it from happening again after the restart.
//! `KUASAR_FAILPOINT=name:error` makes the operation fail there, each time. `name:delay=250` stops
//! the thread there for that many milliseconds, each time. Without the variable a point costs one
//! load.

use std::path::PathBuf;
use std::sync::OnceLock;

struct Armed {
    name: String,
    action: String,
    stamp: PathBuf,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

/// Reads the environment; call once, early. Answers the point that is armed.
pub fn arm(dir: &std::path::Path) -> Option<&'static str> {
    let armed = ARMED.get_or_init(|| {
        let text = std::env::var("KUASAR_FAILPOINT").ok()?;
        let (name, action) = text.split_once(':')?;
        let stamp = dir.join("failpoint.done");
        Some(Armed { name: name.into(), action: action.into(), stamp })
    });
    armed.as_ref().map(|a| a.name.as_str())
}

/// Passes a point.
///
/// # Errors
/// When the point is armed with `error`.
pub fn hit(name: &str) -> Result<(), String> {
    let Some(Some(a)) = ARMED.get() else { return Ok(()) };
    if a.name != name {
        return Ok(());
    }
    match a.action.as_str() {
        "kill" => {
            let new = std::fs::OpenOptions::new().write(true).create_new(true).open(&a.stamp);
            if new.is_ok() {
                // SAFETY: ends this process at once, which is what the point is for.
                unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            }
            Ok(())
        }
        "error" => Err(format!("failpoint {name} is armed to fail")),
        other => {
            let ms = other.strip_prefix("delay=").and_then(|v| v.parse().ok());
            // At most ten minutes: a misprint must not look like a hang.
            let ms: u64 = ms.unwrap_or(0).min(600_000);
            std::thread::sleep(std::time::Duration::from_millis(ms));
            Ok(())
        }
    }
}

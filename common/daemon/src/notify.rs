//! systemd's notify protocol (sd_notify(3)), without systemd's library.

use std::future::Future;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Sends a state such as `READY=1`; without a service manager nothing happens.
pub fn send(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|a| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &a));
    if let Err(e) = sent {
        tracing::warn!("cannot notify the service manager: {e}");
    }
}

/// Tells that a reload has begun; [`send`]`("READY=1")` ends it.
pub fn reloading() {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|t| t.tv_sec() * 1_000_000 + t.tv_nsec() / 1000)
        .unwrap_or_default();
    send(&format!("RELOADING=1\nMONOTONIC_USEC={now}"));
}

/// Shows a line in `systemctl status`.
pub fn status(text: &str) {
    // The protocol is lines: a text of several would set other variables.
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    send(&format!("STATUS={line}"));
}

/// Half of the interval in which the service manager wants to hear from this process.
fn watchdog_interval() -> Option<Duration> {
    let var = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if var("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    var("WATCHDOG_USEC").filter(|u| *u > 0).map(|u| Duration::from_micros(u / 2))
}

/// Pings the watchdog at half its interval, but only while `alive` answers true within a quarter
/// of it: a daemon that hangs is to be restarted. Runs on the runtime, so one that is stuck stops
/// pinging by itself.
pub async fn watchdog<F: Future<Output = bool>>(alive: impl Fn() -> F) {
    let Some(half) = watchdog_interval() else { return };
    let mut ticks = tokio::time::interval(half);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if matches!(tokio::time::timeout(half / 2, alive()).await, Ok(true)) {
            send("WATCHDOG=1");
        } else {
            tracing::error!("not alive: the watchdog is not told");
        }
    }
}

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

/// Pings the watchdog at half its interval, but only while `alive` answers true in time: a daemon
/// that hangs is to be restarted.
pub async fn watchdog<F: Future<Output = bool>>(alive: impl Fn() -> F) {
    let interval = std::env::var("WATCHDOG_USEC").ok().and_then(|v| v.parse::<u64>().ok());
    let Some(usec) = interval.filter(|u| *u > 0) else { return };
    let half = Duration::from_micros(usec / 2);
    loop {
        if matches!(tokio::time::timeout(half, alive()).await, Ok(true)) {
            send("WATCHDOG=1");
        } else {
            tracing::error!("not alive: the watchdog is not told");
        }
        tokio::time::sleep(half).await;
    }
}

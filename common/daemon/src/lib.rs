//! What every sandboxer's `main()` shares: arguments, configuration with drop-ins, logs, metrics,
//! systemd's notify protocol, signals, the listening socket, failpoints.

pub mod args;
pub mod common;
pub mod config;
pub mod failpoint;
pub mod listen;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod notify;
pub mod peer;
pub mod registry;
pub mod signals;

//! `sandbox-parent`: the process that must not die, and how daemons talk to it.
//!
//! One small process per daemon forks, reaps, keeps descriptors and relays the pods' sockets, so
//! that a daemon may be killed at any moment and nothing is lost. The process is the binary of
//! this crate (`main.rs`); [`protocol`] is shared; [`client`] is the daemons' side.

#[cfg(feature = "client")]
pub mod client;
pub mod frame;
pub mod protocol;

//! Containers of an engine behind an OCI command line (`runc`, `crun`, `runsc`, …), and an engine
//! of our own that has the same command line.
//!
//! * [`command`] runs a command of whatever engine to its end.
//! * [`engine`] is what commands an engine has; [`runtime::Containers`] is containerd's Task API on
//!   top of that, for the containers of one [`pod::Pod`].
//! * [`processes::Processes`] is who forks and reaps: sandbox-parent on a host (feature
//!   `parent`), the init process itself in a guest. [`place`] is for one that makes containers' processes
//!   itself, without a command.
//! * `execs` (feature `builtin`) runs execs of the built-in engine without a command each.
//! * [`control::Control`] is how running containers are signalled, listed, frozen, measured: by
//!   us on their host cgroups, unless an engine needs its own way.
//! * `builtin` (feature `builtin`) is the built-in engine: a program calls `builtin::main` for its
//!   `oci` command.
//!
//! Neither a daemon's configuration nor its metrics are known here: they come as
//! [`engine::Settings`] and [`observer::Observer`].

#[cfg(feature = "builtin")]
pub mod builtin;
pub mod checkpoint;
pub mod command;
pub mod console;
pub mod control;
pub mod engine;
#[cfg(feature = "builtin")]
pub mod execs;
mod mapping;
pub mod observer;
pub mod packets;
pub mod payloads;
pub mod place;
pub mod pod;
pub mod processes;
pub mod runtime;
pub mod selfexe;
pub mod spec;

//! What every sandboxer's `main()` shares: arguments, configuration with drop-ins, logs, metrics,
//! systemd's notify protocol, signals, failpoints; and the resident daemon itself.
//!
//! | module | its one idea |
//! |---|---|
//! | [`args`], [`common`], [`config`] | what an operator can set, and where |
//! | [`diagnosis`] | what is wrong around a daemon, in the words of `kuasar-ctl check` |
//! | [`program`] | what `main()` does around the daemon |
//! | [`resident`] | what a daemon starts in which order, and how it ends |
//! | [`sockets`] | sockets that sandbox-parent keeps: the pods', and the daemon's own |
//! | [`admin`] | what an operator's tool asks beyond what engines ask |
//! | [`tasks`] | the Task servers of all pods |
//! | [`logging`], [`metrics`], [`registry`], [`traces`] | what an operator can see |
//! | [`notify`], [`signals`], [`peer`], [`memory`], [`failpoint`] | the small things |

pub mod admin;
pub mod args;
pub mod common;
pub mod config;
pub mod diagnosis;
pub mod failpoint;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod notify;
pub mod peer;
pub mod program;
pub mod registry;
pub mod resident;
pub mod signals;
pub mod sockets;
pub mod tasks;
pub mod traces;

//! PID 1 of a microVM pod's guest.
//!
//! The guest *is* the pod: its network, IPC and UTS namespaces are the pod's, so that host name,
//! sysctls and interfaces are set where PID 1 itself lives, and containers are given mount, PID
//! and cgroup namespaces only. What is here:
//!
//! * [`boot`]: from the kernel's hand-over to a machine that containers can run on, with [`modules`]
//!   where the kernel is a distribution's;
//! * [`channel`]: who may speak to us. Nobody, until the host that only the host can be (CID 2)
//!   has given the token of this boot;
//! * [`containers`]: the Task API's runtime, over the built-in OCI engine, with a storage of its
//!   own for each container;
//! * [`engine`]: the Task API for engines that call the guest themselves;
//! * [`debug`]: programs beside the containers, in guests whose kernel was told so;
//! * [`guest`]: the guest API, with [`network`], [`storage`], [`files`], [`clock`], [`hotplug`], [`power`];
//! * [`reaper`]: forks and reaps, everything, with no exit lost.
//!
//! One thread runs everything that waits; only mounts and the like are done on others.
//!
//! # What may not happen
//! PID 1 must not end, or the kernel panics. No input makes it panic: not the host's, which is
//! trusted but may be wrong, and not a container's. Whatever a peer can make grow has a bound
//! ([`limits`]).

pub mod agent;
pub mod boot;
pub mod channel;
pub mod clock;
pub mod cmdline;
pub mod containers;
pub mod debug;
pub mod devices;
pub mod engine;
pub mod events;
pub mod files;
pub mod forward;
pub mod guest;
pub mod hotplug;
pub mod hugepages;
pub mod init;
pub mod kmsg;
pub mod limits;
pub mod modules;
pub mod network;
pub mod power;
pub mod reaper;
pub mod serial;
pub mod spans;
pub mod storage;
pub mod trim;
pub mod uevent;

#[cfg(test)]
mod testing;

//! What a container's process may become instead of a program of its image.
//!
//! A program that already runs what containers are made for (a WebAssembly engine) calls
//! [`super::main_as`] in a process that it has forked. Everything is done as for any container:
//! namespaces, cgroup, file system, user, seccomp. Only the last step differs: nothing is
//! executed, the process goes on with its own memory.
//!
//! So nothing is closed by an execve, and nothing of the caller's memory is gone: the caller holds
//! no secrets and no descriptors, and its workload closes whatever it does not use.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

pub use super::direct::seccomp::Filter;

/// The container as its process finds it.
#[derive(Debug)]
pub struct Container<'a> {
    /// `process.args`.
    pub args: &'a [String],
    /// `process.env`.
    pub env: &'a [String],
    /// `process.cwd`; it is the working directory already.
    pub cwd: &'a str,
    /// The spec's annotations.
    pub annotations: Option<&'a BTreeMap<String, String>>,
    /// Descriptors that have to stay open until [`Workload::run`]. All others from 3 on are the
    /// workload's, to use or to close.
    pub kept: &'a [BorrowedFd<'a>],
}

/// See the module. Both run in the container, with its user and without privileges.
pub trait Workload {
    /// The seccomp filter that takes the place of the spec's: loaded before [`Self::prepare`], which
    /// takes `noNewPrivileges`.
    fn filter(&self) -> Option<&Filter> {
        None
    }

    /// Gets ready, between the answer to Create and that to Start. A spec's seccomp filter is loaded
    /// already when it has `noNewPrivileges`.
    ///
    /// # Errors
    /// Why the container cannot be started, for its user; `exec: …` when it is the image's fault.
    fn prepare(&mut self, container: &Container<'_>) -> Result<(), String>;

    /// Runs, after Start, and ends the process itself. Returns only the reason why it cannot.
    fn run(self: Box<Self>) -> String;
}

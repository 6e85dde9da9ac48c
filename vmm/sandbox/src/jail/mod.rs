//! The jail of VMMs and their helpers.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a jailed program is: decides its privileges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A VMM.
    Vmm,
    /// virtiofsd.
    FileServer,
    /// `vhost-device-vsock`.
    VsockDevice,
}

/// What a jailed program sees of the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct View {
    /// What it is.
    pub role: Role,
    /// Files and directories that it may read. Those that are missing are left out.
    pub readable: Vec<PathBuf>,
    /// Directories that it may write.
    pub writable: Vec<PathBuf>,
    /// Devices, beside `null`, `zero`, `urandom`. Those that are missing are left out.
    pub devices: Vec<PathBuf>,
    /// A directory that it serves, with what is mounted below it, now and later.
    pub shared_tree: Option<PathBuf>,
}

impl View {
    /// Nothing but what each program needs.
    pub fn new(role: Role) -> Self {
        Self {
            role,
            readable: Vec::new(),
            writable: Vec::new(),
            devices: Vec::new(),
            shared_tree: None,
        }
    }
}

/// How programs are jailed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JailConfig {
    /// User id of VMMs and vsock helpers.
    pub uid: u32,
    /// Group id of them.
    pub gid: u32,
    /// How long the jailer may take.
    pub timeout: Duration,
}

/// What the jailer is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Number of descriptors that the program gets.
    pub fds: i32,
    /// `cgroup.procs` files to enter.
    pub cgroups: Vec<PathBuf>,
    /// What it sees.
    pub view: View,
}

/// A configuration in a sealed memfd.
#[derive(Debug)]
pub struct Sealed(File);

impl Sealed {
    /// Writes it.
    ///
    /// # Errors
    /// Those of memfd_create(2).
    pub fn new(request: &Request, config: &JailConfig) -> io::Result<Self> {
        let _ = (request, config);
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl AsFd for Sealed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The jailer's command line.
pub fn command_line(config: &JailConfig, fds: usize, netns: bool) -> Vec<String> {
    let _ = (config, fds, netns);
    Vec::new()
}

//! The jail of VMMs and their helpers.
//!
//! `vmm-sandboxer jail --config FD --pid FD [--netns FD] -- program arguments…` builds a jail
//! around itself, runs the program in it, writes the program's pid and ends, as an OCI engine
//! does; sandbox-parent adopts the program. It is the daemon's own executable: small, synchronous,
//! one thread from start to end, so that it may fork and change its namespaces.
//!
//! What a jailed program has:
//!
//! | | |
//! |---|---|
//! | root directory | a read-only tmpfs with the program, its libraries, the files that its [`View`] names and the devices it needs; no path of the host besides (`root`) |
//! | namespaces | mount, PID, IPC, UTS, cgroup of its own; network: the pod's for a VMM, an empty one for a helper |
//! | user | an unprivileged one, without groups; virtiofsd stays root, see below |
//! | capabilities | none in any of the five sets; `no_new_privs` (`privileges`) |
//! | system calls | a deny-list of what only administrators need, beneath the program's own filter (`seccomp`) |
//! | limits | descriptors; no core dumps; `oom_score_adj` as configured |
//! | descriptors | those that it was given; all others are closed |
//!
//! **virtiofsd** has to act for every user of the guest on files of every owner. It keeps user 0
//! and what that takes: `CHOWN`, `DAC_OVERRIDE`, `FOWNER`, `FSETID`, `SETGID`, `SETUID`, `MKNOD`,
//! `SETFCAP`, and `SYS_CHROOT` and `SETPCAP` for its own sandbox, which it gives up before it
//! serves. It sees the share and nothing else, has no network, and never has `SYS_ADMIN`.
//!
//! **A VMM that serves a share itself** (QEMU's 9p, which the configuration has to ask for) acts for
//! every user of the guest, too, and keeps `CHOWN`, `DAC_OVERRIDE`, `FOWNER` and `FSETID`: as the
//! machine's own user, who has no file of the host's in that root but the share's.
//!
//! Each step that fails ends the jailer with status 1 and one line on standard error that names
//! the step.

mod privileges;
mod root;
mod run;
mod seccomp;
mod users;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

pub use run::main;
pub(crate) use users::Users;

/// What a jailed program is: decides its privileges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A VMM.
    Vmm,
    /// A VMM that serves a share itself.
    ServingVmm,
    /// virtiofsd.
    FileServer,
    /// `vhost-device-vsock`, or the relay of a serial channel.
    VsockDevice,
}

/// What a jailed program sees of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// What it is.
    pub role: Role,
    /// Files and directories that it may read, at their own paths.
    pub readable: Vec<PathBuf>,
    /// Directories that it may write. Its user must own them.
    pub writable: Vec<PathBuf>,
    /// Devices, beside `null`, `zero` and `urandom`. They belong to its user in the jail.
    pub devices: Vec<PathBuf>,
    /// A directory that it serves, with what is mounted below it, now and later.
    pub shared_tree: Option<PathBuf>,
}

impl View {
    /// Nothing but what every program needs.
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

/// How programs are jailed: the keys of the configuration file's `[jail]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JailConfig {
    /// The jailer: this program and its subcommand. Set by the daemon, not by the file.
    #[serde(skip)]
    pub jailer: Vec<String>,
    /// First user id of machines, and how many there are. Each machine has one for its VMM and its
    /// vsock helper, with the group of the same number: one that is taken over reaches nothing of
    /// another's. A count of 0 gives all of them `uid` and `gid`.
    pub uid_range: (u32, u32),
    /// User id of all VMMs and vsock helpers without a `uid_range`. Not 0.
    pub uid: u32,
    /// Group id of them. Not 0.
    pub gid: u32,
    /// Files and directories that dynamically linked programs need, shown read-only. Those that
    /// a host does not have are left out.
    pub libraries: Vec<PathBuf>,
    /// Open descriptors of a program, at most. virtiofsd holds one for each file that its guest
    /// knows. Not more than the daemon itself may have.
    pub files: u64,
    /// What is added to a VMM's badness when memory runs out, -1000 to 1000. Lowering it below
    /// the daemon's needs `CAP_SYS_RESOURCE`, and is left out without it.
    pub oom_score_adj: i32,
    /// Our deny-list of system calls.
    pub seccomp: bool,
    /// How long the jailer may take, in milliseconds.
    pub timeout_ms: u64,
}

impl Default for JailConfig {
    fn default() -> Self {
        Self {
            jailer: Vec::new(),
            // Nobody's: systemd's table of numbers has no use for those from here to 2^31.
            uid_range: (1_879_048_192, 65_536),
            // Nobody's: Debian's policy gives out none of 65000 to 65533, and systemd's dynamic users
            // end at 65519.
            uid: 65_530,
            gid: 65_530,
            libraries: ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
                .map(PathBuf::from)
                .to_vec(),
            files: 65_536,
            oom_score_adj: 0,
            seccomp: true,
            timeout_ms: 10_000,
        }
    }
}

impl JailConfig {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// Whether the configuration makes sense.
    ///
    /// # Errors
    /// Says which key does not.
    pub fn check(&self) -> Result<(), String> {
        if self.uid == 0 || self.gid == 0 {
            return Err("jail: uid and gid of a VMM may not be those of root".into());
        }
        let (first, count) = self.uid_range;
        // The last number of all means "no user" to the kernel.
        if count > 0 && (first == 0 || first.checked_add(count).is_none()) {
            return Err("jail: uid_range is [first, count]: first is not 0, which is root, and \
                        first + count is below 4294967296"
                .into());
        }
        if !(-1000..=1000).contains(&self.oom_score_adj) {
            return Err("jail: oom_score_adj is between -1000 and 1000".into());
        }
        if self.files < 64 {
            return Err("jail: files is 64 or more".into());
        }
        Ok(())
    }
}

/// What the jailer is told, beside the command.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Number of descriptors that the program gets: 0 to this.
    pub fds: u32,
    /// `cgroup.procs` files to enter.
    pub cgroups: Vec<PathBuf>,
    /// What it sees.
    pub view: View,
    /// How.
    pub config: JailConfig,
}

impl Plan {
    /// Writes it into a memfd that nobody can change any more.
    pub(crate) fn seal(&self) -> io::Result<Sealed> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create(c"jail", flags)?);
        file.write_all(&serde_json::to_vec(self)?)?;
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(Sealed(file))
    }
}

/// A [`Plan`] in a sealed memfd.
#[derive(Debug)]
pub(crate) struct Sealed(File);

impl AsFd for Sealed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The jailer's command line. The program's descriptors are the first `fds`; behind them come
/// the plan, the file for the pid and the network namespace.
pub(crate) fn command_line(
    config: &JailConfig,
    fds: usize,
    netns: bool,
    program: Vec<String>,
) -> Vec<String> {
    let mut argv = config.jailer.clone();
    argv.extend(["--config".into(), fds.to_string(), "--pid".into(), (fds + 1).to_string()]);
    if netns {
        argv.extend(["--netns".into(), (fds + 2).to_string()]);
    }
    argv.push("--".into());
    argv.extend(program);
    argv
}

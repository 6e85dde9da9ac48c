//! From the kernel's hand-over to a machine on which containers can run.
//!
//! Nothing but `/init` needs to be in the image: directories are made where the root can be
//! written, and must exist where it cannot (an EROFS image has them).
//!
//! An initramfs is the kernel's own `rootfs`, which has no parent mount, and `pivot_root(2)`, with
//! which containers get their root, refuses such a root (pivot_root(2), EINVAL). So there the
//! root is bound onto itself first, as switch_root(8) does, without copying a byte.

use std::fs;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use kuasar_host::{Context, Result};
use nix::mount::{MsFlags, mount};

/// Where everything of ours is.
pub const DIR: &str = "/run/kuasar";
/// cgroup below which all containers are.
pub const POD_CGROUP: &str = "/sys/fs/cgroup/pod";
/// The same, from the root of the hierarchy.
pub const POD_NAME: &str = "/pod";

const QUIET: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Filesystem, directory, flags, data.
const MOUNTS: [(&str, &str, MsFlags, &str); 6] = [
    ("proc", "/proc", QUIET, ""),
    ("sysfs", "/sys", QUIET, ""),
    ("tmpfs", "/run", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=755"),
    (
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "mode=620,gid=5,ptmxmode=666",
    ),
    ("tmpfs", "/dev/shm", QUIET, "mode=1777,size=64m"),
    ("cgroup2", "/sys/fs/cgroup", QUIET, ""),
];

/// Mounts everything, and makes the standard streams harmless.
///
/// # Errors
/// The first mount that failed: without them no container can run.
pub fn mounts() -> Result<()> {
    own_root()?;
    one("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755")?;
    standard_streams();
    for (kind, at, flags, data) in MOUNTS {
        one(kind, at, flags, data)?;
    }
    for (link, to) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        // Programs of containers have their own; these are for people.
        let _ = std::os::unix::fs::symlink(to, link);
    }
    fs::DirBuilder::new().mode(0o700).create(DIR).context(|| format!("cannot make {DIR}"))
}

fn one(kind: &str, at: &str, flags: MsFlags, data: &str) -> Result<()> {
    if !Path::new(at).exists() {
        fs::create_dir(at).context(|| format!("cannot make {at}"))?;
    }
    let data = (!data.is_empty()).then_some(data);
    match mount(Some(kind), at, Some(kind), flags, data) {
        // The kernel has done it (CONFIG_DEVTMPFS_MOUNT).
        Ok(()) | Err(nix::Error::EBUSY) => Ok(()),
        Err(e) => Err(e).context(|| format!("cannot mount {kind} on {at}")),
    }
}

/// Gives an initramfs a parent mount.
fn own_root() -> Result<()> {
    use nix::sys::statfs::{TMPFS_MAGIC, statfs};
    let what = || "cannot make the initramfs a root that can be pivoted";
    let kind = statfs("/").context(what)?.filesystem_type();
    // RAMFS_MAGIC of linux/magic.h.
    if kind != TMPFS_MAGIC && kind != nix::sys::statfs::FsType(0x8584_58f6) {
        return Ok(());
    }
    let none = None::<&str>;
    let dir = "/.root";
    let _ = fs::create_dir(dir);
    mount(Some("/"), dir, none, MsFlags::MS_BIND, none).context(what)?;
    nix::unistd::chdir(dir).context(what)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).context(what)?;
    nix::unistd::chroot(".").context(what)?;
    nix::unistd::chdir("/").context(what)?;
    let _ = fs::remove_dir(dir);
    Ok(())
}

/// A kernel without an initial console leaves descriptors 0 to 2 closed, and the next file opened
/// would be taken for one of them.
fn standard_streams() {
    use nix::fcntl::OFlag;
    let mode = nix::sys::stat::Mode::empty();
    if let Ok(null) = nix::fcntl::open("/dev/null", OFlag::O_RDWR, mode) {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
        if std::os::fd::AsRawFd::as_raw_fd(&null) <= 2 {
            // It is one of them now.
            let _ = std::os::fd::IntoRawFd::into_raw_fd(null);
        }
    }
    if let Ok(kmsg) = nix::fcntl::open("/dev/kmsg", OFlag::O_WRONLY | OFlag::O_CLOEXEC, mode) {
        let _ = nix::unistd::dup2_stderr(&kmsg);
    }
}

/// Mask and limits of our own process.
pub fn limits(debug: bool) {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let files = 1 << 20;
    for (limit, value) in [
        (nix::sys::resource::Resource::RLIMIT_NOFILE, files),
        (nix::sys::resource::Resource::RLIMIT_CORE, 0),
    ] {
        // Hard and soft for ourselves; containers bring their own limits.
        if let Err(error) = nix::sys::resource::setrlimit(limit, value, value) {
            tracing::warn!(%error, ?limit, "cannot set a limit");
        }
    }
    if debug {
        // The kernel otherwise drops lines of a program that writes many.
        let _ = fs::write("/proc/sys/kernel/printk_devkmsg", "on\n");
    }
}

/// What containers need and the agent does not: `lo`, memory that may be reserved, controllers.
/// Nearly all of it is code of the kernel that runs for the first time.
pub fn settings() {
    if let Err(error) = kuasar_host::netlink::Netlink::open().and_then(|n| n.set_lo_up()) {
        tracing::warn!(%error, "lo is not up");
    }
    // As kubelet has it on a node: programs that reserve much and touch little may start.
    let _ = fs::write("/proc/sys/vm/overcommit_memory", "1\n");
    if let Err(error) = controllers() {
        tracing::error!(%error, "containers have no limits");
    }
}

/// Passes every controller on to the pod's cgroup, and from there to the containers'.
fn controllers() -> std::io::Result<()> {
    fs::create_dir_all(POD_CGROUP)?;
    for group in ["/sys/fs/cgroup", POD_CGROUP] {
        let has = fs::read_to_string(format!("{group}/cgroup.controllers"))?;
        let wanted: Vec<String> =
            has.split_ascii_whitespace().map(|name| format!("+{name}")).collect();
        let path = format!("{group}/cgroup.subtree_control");
        let mut file = fs::OpenOptions::new().write(true).open(&path)?;
        if file.write_all(wanted.join(" ").as_bytes()).is_ok() {
            continue;
        }
        // All or nothing: find the one that cannot.
        for name in wanted {
            if let Err(error) = file.write_all(name.as_bytes()) {
                tracing::warn!(%error, name, group, "a controller cannot be used");
            }
        }
    }
    Ok(())
}

/// What it took from the kernel's hand-over until everything is served, step by step.
#[derive(Debug)]
pub struct Steps {
    /// Name, nanoseconds of processor time, and of all.
    pub done: Vec<(&'static str, u64, u64)>,
    last: (u64, u64),
}

impl Default for Steps {
    fn default() -> Self {
        Self { done: Vec::with_capacity(8), last: (cpu_ns(), now_ns()) }
    }
}

impl Steps {
    /// A step has ended here.
    pub fn end_of(&mut self, name: &'static str) {
        let now = (cpu_ns(), now_ns());
        let (cpu, wall) = (now.0.saturating_sub(self.last.0), now.1.saturating_sub(self.last.1));
        self.done.push((name, cpu, wall));
        self.last = now;
    }
}

/// Nanoseconds of processor time that this process has taken. For PID 1 the kernel's own start is in
/// it, so only differences say something.
fn cpu_ns() -> u64 {
    nanoseconds(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

/// Nanoseconds since the kernel began to run.
pub fn now_ns() -> u64 {
    nanoseconds(nix::time::ClockId::CLOCK_BOOTTIME)
}

fn nanoseconds(clock: nix::time::ClockId) -> u64 {
    let now = nix::time::clock_gettime(clock);
    now.ok()
        .and_then(|t| {
            let secs = u64::try_from(t.tv_sec()).ok()?;
            secs.checked_mul(1_000_000_000)?.checked_add(u64::try_from(t.tv_nsec()).ok()?)
        })
        .unwrap_or_default()
}

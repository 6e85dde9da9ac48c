//! Compiles one module: standard input to standard output, and then the process ends.
//!
//! A module comes from an image, and the compiler is large. So whatever it can be made to do, it
//! can do with two descriptors alone: no file system, no network, no other process, no privileges,
//! a bound on time and memory, and the few system calls that computing takes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use libseccomp::{ScmpAction, ScmpFilterContext, ScmpSyscall};
use nix::sched::CloneFlags;
use nix::sys::resource::{Resource, setrlimit};
use wasm_common::kind::{Detected, Kind, detect};

use crate::engine::{explain, single};

/// What compiling takes from the kernel: memory, time, the two descriptors, and to end.
const ALLOWED: [&str; 26] = [
    "brk",
    "clock_gettime",
    "close",
    "exit",
    "exit_group",
    "fstat",
    "futex",
    "getpid",
    "getrandom",
    "gettid",
    "lseek",
    "madvise",
    "membarrier",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "read",
    "readv",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sigaltstack",
    "write",
    "writev",
];
/// Everything that is new for this process alone.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// `BYTES,SECONDS,UID`: most memory, most processor time, and who to be.
#[derive(Debug, PartialEq, Eq)]
struct Limits {
    memory: u64,
    seconds: u64,
    uid: u32,
}

impl Limits {
    fn parse(text: &str) -> Option<Self> {
        let (memory, rest) = text.split_once(',')?;
        let (seconds, uid) = rest.split_once(',')?;
        Some(Self {
            memory: memory.parse().ok()?,
            seconds: seconds.parse().ok()?,
            uid: uid.parse().ok()?,
        })
    }
}

/// Reads the module, gives everything up, compiles.
pub fn run(limits: &str) -> Result<(), String> {
    let limits = Limits::parse(limits).ok_or("limits are BYTES,SECONDS,UID")?;
    // Standard output of std would buffer by lines. Not later: nothing can be duplicated then.
    let out = std::io::stdout().as_fd().try_clone_to_owned();
    let mut out = out.map(File::from).map_err(|error| format!("standard output: {error}"))?;
    confine(&limits)?;
    let mut module = Vec::new();
    std::io::stdin()
        .lock()
        .read_to_end(&mut module)
        .map_err(|error| format!("read the module: {error}"))?;
    let engine = single().map_err(|error| explain(&error))?;
    let code = match detect(&module) {
        Detected::Wasm(Kind::Module) => engine.precompile_module(&module),
        Detected::Wasm(Kind::Component) => engine.precompile_component(&module),
        other => return Err(format!("not a module: {other:?}")),
    };
    let code = code.map_err(|error| explain(&error))?;
    out.write_all(&code).map_err(|error| format!("write the compiled code: {error}"))
}

fn confine(limits: &Limits) -> Result<(), String> {
    let wrap = |what: &'static str| move |error: nix::Error| format!("{what}: {error}");
    setrlimit(Resource::RLIMIT_AS, limits.memory, limits.memory).map_err(wrap("limit memory"))?;
    setrlimit(Resource::RLIMIT_CPU, limits.seconds, limits.seconds).map_err(wrap("limit time"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(wrap("limit cores"))?;
    setrlimit(Resource::RLIMIT_NPROC, 0, 0).map_err(wrap("limit processes"))?;
    nix::sched::unshare(NAMESPACES).map_err(wrap("new namespaces"))?;
    hide_files()?;
    nix::unistd::setgroups(&[]).map_err(wrap("setgroups"))?;
    let (uid, gid) = (limits.uid.into(), limits.uid.into());
    nix::unistd::setresgid(gid, gid, gid).map_err(wrap("setresgid"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(wrap("setresuid"))?;
    // SAFETY: plain system call.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(format!("no_new_privs: {}", std::io::Error::last_os_error()));
    }
    filter().map_err(|error| format!("seccomp: {error}"))
}

/// The root becomes an empty, read-only file system that nothing else knows.
fn hide_files() -> Result<(), String> {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let wrap = |error: nix::Error| format!("hide the file system: {error}");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(wrap)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    // Any directory will do: it is covered in this namespace alone.
    mount(Some("none"), "/proc", Some("tmpfs"), flags, Some("size=4k,nr_inodes=2"))
        .map_err(wrap)?;
    nix::unistd::chdir("/proc").map_err(wrap)?;
    nix::unistd::pivot_root(".", ".").map_err(wrap)?;
    umount2(".", MntFlags::MNT_DETACH).map_err(wrap)?;
    nix::unistd::chdir("/").map_err(wrap)
}

fn filter() -> Result<(), libseccomp::error::SeccompError> {
    let mut filter = ScmpFilterContext::new(ScmpAction::Errno(libc::EPERM))?;
    for name in ALLOWED {
        filter.add_rule(ScmpAction::Allow, ScmpSyscall::from_name(name)?)?;
    }
    filter.load()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_three_numbers() {
        let limits = Limits { memory: 1, seconds: 2, uid: 3 };
        assert_eq!(Limits::parse("1,2,3"), Some(limits));
        assert_eq!(Limits::parse("1,2"), None);
        assert_eq!(Limits::parse("1,2,-3"), None);
    }
}

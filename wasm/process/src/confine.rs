//! Compiles one module: standard input to standard output, and then the process ends.
//!
//! A module comes from an image, and the compiler is large. So whatever it can be made to do, it
//! can do with two descriptors alone: no file system, no network, no other process, no privileges,
//! a bound on time and memory, and the few system calls that computing takes. A compiler that works
//! through files and threads gets an empty file system of its own ([`Needs::Scratch`]), and the
//! calls for those.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sched::CloneFlags;
use nix::sys::resource::{Resource, setrlimit};

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
/// What files of its own and threads take beside.
const SCRATCH: [&str; 31] = [
    "access",
    "clock_nanosleep",
    "dup",
    "faccessat",
    "faccessat2",
    "fallocate",
    "fcntl",
    "fdatasync",
    "fsync",
    "ftruncate",
    "getcwd",
    "getdents64",
    "getrusage",
    "ioctl",
    "newfstatat",
    "openat",
    "pread64",
    "prlimit64",
    "pwrite64",
    "readlink",
    "rename",
    "restart_syscall",
    "rseq",
    "sched_yield",
    "set_robust_list",
    "stat",
    "statfs",
    "fstatfs",
    "umask",
    "uname",
    "unlink",
];
/// Everything that is new for this process alone.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// What a compiler works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Memory alone.
    Memory,
    /// An empty directory, which is `/`, and threads.
    Scratch,
}

/// `BYTES,SECONDS,UID`: most memory, most processor time, and who to be.
#[derive(Debug, PartialEq, Eq)]
pub struct Limits {
    memory: u64,
    seconds: u64,
    uid: u32,
}

impl Limits {
    /// From the text that the sandboxer passes on.
    pub fn parse(text: &str) -> Option<Self> {
        let (memory, rest) = text.split_once(',')?;
        let (seconds, uid) = rest.split_once(',')?;
        Some(Self {
            memory: memory.parse().ok()?,
            seconds: seconds.parse().ok()?,
            uid: uid.parse().ok()?,
        })
    }
}

/// Gives everything up, reads the module from standard input, has it compiled, and writes the
/// code to standard output.
///
/// # Errors
/// The compiler's, or what has kept this process from giving something up.
pub fn run(
    limits: &str,
    needs: Needs,
    compile: impl FnOnce(&[u8]) -> Result<Vec<u8>, String>,
) -> Result<(), String> {
    let limits = Limits::parse(limits).ok_or("limits are BYTES,SECONDS,UID")?;
    // Standard output of std would buffer by lines. Not later: nothing can be duplicated then.
    let out = std::io::stdout().as_fd().try_clone_to_owned();
    let mut out = out.map(File::from).map_err(|error| format!("standard output: {error}"))?;
    confine(&limits, needs)?;
    let mut module = Vec::new();
    std::io::stdin()
        .lock()
        .read_to_end(&mut module)
        .map_err(|error| format!("read the module: {error}"))?;
    let code = compile(&module)?;
    out.write_all(&code).map_err(|error| format!("write the compiled code: {error}"))
}

fn confine(limits: &Limits, needs: Needs) -> Result<(), String> {
    let wrap = |what: &'static str| move |error: nix::Error| format!("{what}: {error}");
    setrlimit(Resource::RLIMIT_AS, limits.memory, limits.memory).map_err(wrap("limit memory"))?;
    setrlimit(Resource::RLIMIT_CPU, limits.seconds, limits.seconds).map_err(wrap("limit time"))?;
    // Code that is larger than what it was made in would fill a disk.
    setrlimit(Resource::RLIMIT_FSIZE, limits.memory, limits.memory).map_err(wrap("limit files"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(wrap("limit cores"))?;
    if needs == Needs::Memory {
        // It counts threads, too: those of all processes of this user.
        setrlimit(Resource::RLIMIT_NPROC, 0, 0).map_err(wrap("limit processes"))?;
    }
    nix::sched::unshare(NAMESPACES).map_err(wrap("new namespaces"))?;
    hide_files(limits, needs)?;
    // Nothing stays in the bounding set: no capability can come back.
    kuasar_host::capability::bound(0).map_err(|(_, errno)| wrap("drop capabilities")(errno))?;
    nix::unistd::setgroups(&[]).map_err(wrap("setgroups"))?;
    let (uid, gid) = (limits.uid.into(), limits.uid.into());
    nix::unistd::setresgid(gid, gid, gid).map_err(wrap("setresgid"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(wrap("setresuid"))?;
    // SAFETY: plain system call.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(format!("no_new_privs: {}", std::io::Error::last_os_error()));
    }
    filter(needs).map_err(|error| format!("seccomp: {error}"))
}

/// The root becomes an empty file system that nothing else knows: read-only, or the compiler's own.
fn hide_files(limits: &Limits, needs: Needs) -> Result<(), String> {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let wrap = |error: nix::Error| format!("hide the file system: {error}");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(wrap)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let (flags, options) = match needs {
        Needs::Memory => (flags | MsFlags::MS_RDONLY, "size=4k,nr_inodes=2".to_owned()),
        Needs::Scratch => {
            // A few files at the same time, none larger than what may be compiled.
            let (size, uid) = (limits.memory / 4, limits.uid);
            (flags, format!("size={size},nr_inodes=64,mode=0700,uid={uid},gid={uid}"))
        }
    };
    // Any directory will do: it is covered in this namespace alone.
    mount(Some("none"), "/proc", Some("tmpfs"), flags, Some(options.as_str())).map_err(wrap)?;
    nix::unistd::chdir("/proc").map_err(wrap)?;
    nix::unistd::pivot_root(".", ".").map_err(wrap)?;
    umount2(".", MntFlags::MNT_DETACH).map_err(wrap)?;
    nix::unistd::chdir("/").map_err(wrap)
}

fn filter(needs: Needs) -> Result<(), libseccomp::error::SeccompError> {
    let mut filter = ScmpFilterContext::new(ScmpAction::Errno(libc::EPERM))?;
    for name in ALLOWED {
        filter.add_rule(ScmpAction::Allow, ScmpSyscall::from_name(name)?)?;
    }
    if needs == Needs::Scratch {
        for name in SCRATCH {
            filter.add_rule(ScmpAction::Allow, ScmpSyscall::from_name(name)?)?;
        }
        // Threads and no processes: the flags of `clone` can be read, those of `clone3` cannot.
        let clone3 = ScmpSyscall::from_name("clone3")?;
        filter.add_rule(ScmpAction::Errno(libc::ENOSYS), clone3)?;
        let thread = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;
        let thread = ScmpArgCompare::new(0, ScmpCompareOp::MaskedEqual(thread), thread);
        let clone = ScmpSyscall::from_name("clone")?;
        filter.add_rule_conditional(ScmpAction::Allow, clone, &[thread])?;
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

//! The seccomp profile of WebAssembly containers.
//!
//! It takes the place of the pod's: what such a process needs is known, whatever the image, and is
//! much less than a container runtime's default profile allows. No program can be executed, no
//! process made (threads can), nothing mounted, traced, or changed in its identity. What is not
//! named fails with EPERM; `clone3` with ENOSYS, so that the C library takes `clone`, whose flags
//! a filter can read.
//!
//! It is the same for all containers, so that it is compiled once, in the zygote.

use kuasar_oci::builtin::workload::Filter;
use serde_json::{Value, json};

/// System calls that Wasmtime, tokio and WASI's host functions make.
const ALLOWED: &[&str] = &[
    // Memory.
    "brk",
    "madvise",
    "membarrier",
    "memfd_create",
    "mincore",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    // Time, threads, signals, the end.
    "clock_getres",
    "clock_gettime",
    "clock_nanosleep",
    "exit",
    "exit_group",
    "futex",
    "getcpu",
    "gettimeofday",
    "nanosleep",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "set_robust_list",
    "setitimer",
    "sigaltstack",
    "tgkill",
    "time",
    "uname",
    "sysinfo",
    // Who it is.
    "getegid",
    "geteuid",
    "getgid",
    "getpid",
    "getppid",
    "gettid",
    "getuid",
    "getrandom",
    "prlimit64",
    "getrlimit",
    // Descriptors.
    "close",
    "close_range",
    "dup",
    "dup2",
    "dup3",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_pwait2",
    "epoll_wait",
    "eventfd2",
    "fcntl",
    "ioctl",
    "lseek",
    "pipe2",
    "poll",
    "ppoll",
    "pread64",
    "preadv",
    "preadv2",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "read",
    "readv",
    "select",
    "pselect6",
    "timerfd_create",
    "timerfd_settime",
    "write",
    "writev",
    // Files below the container's root.
    "access",
    "faccessat",
    "faccessat2",
    "fadvise64",
    "fallocate",
    "fchdir",
    "fdatasync",
    "flock",
    "fstat",
    "fstatfs",
    "fsync",
    "ftruncate",
    "getcwd",
    "getdents64",
    "linkat",
    "mkdirat",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "readlink",
    "readlinkat",
    "renameat",
    "renameat2",
    "stat",
    "lstat",
    "statfs",
    "statx",
    "symlinkat",
    "sync_file_range",
    "unlinkat",
    "utimensat",
    "copy_file_range",
    "sendfile",
    "splice",
    // The pod's network.
    "accept",
    "accept4",
    "bind",
    "connect",
    "getpeername",
    "getsockname",
    "getsockopt",
    "listen",
    "recvfrom",
    "recvmmsg",
    "recvmsg",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shutdown",
    "socketpair",
];
/// Families of sockets: Unix, IPv4, IPv6. Netlink is asked by the C library's resolver.
const FAMILIES: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// The filter.
///
/// # Errors
/// When this system's libseccomp cannot make it.
pub fn filter() -> Result<Filter, String> {
    Filter::compile(&profile()).map_err(|error| format!("the seccomp profile: {error}"))
}

/// The profile, as `linux.seccomp` of a spec.
fn profile() -> Value {
    let thread = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;
    let mut rules = vec![
        json!({ "names": ALLOWED, "action": "SCMP_ACT_ALLOW" }),
        json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS }),
        json!({ "names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
            { "index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": thread, "valueTwo": thread },
        ]}),
        // Names of threads and of memory.
        json!({ "names": ["prctl"], "action": "SCMP_ACT_ALLOW", "args": [
            { "index": 0, "op": "SCMP_CMP_EQ", "value": libc::PR_SET_NAME },
        ]}),
        json!({ "names": ["prctl"], "action": "SCMP_ACT_ALLOW", "args": [
            { "index": 0, "op": "SCMP_CMP_EQ", "value": libc::PR_SET_VMA },
        ]}),
    ];
    rules.extend(FAMILIES.map(|family| {
        json!({ "names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
            { "index": 0, "op": "SCMP_CMP_EQ", "value": family },
        ]})
    }));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": libc::EPERM,
        "architectures": [architecture()],
        "syscalls": rules,
    })
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "SCMP_ARCH_AARCH64" } else { "SCMP_ARCH_X86_64" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_can_be_compiled() {
        filter().unwrap();
    }

    #[test]
    fn what_makes_a_container_dangerous_is_not_allowed() {
        for name in [
            "execve",
            "execveat",
            "fork",
            "vfork",
            "clone",
            "clone3",
            "ptrace",
            "mount",
            "setns",
            "unshare",
            "bpf",
            "keyctl",
            "init_module",
            "setuid",
            "capset",
            "io_uring_setup",
            "process_vm_writev",
            "perf_event_open",
            "userfaultfd",
            "open_by_handle_at",
            "chroot",
            "pivot_root",
            "fchmod",
            "fchown",
            "mknodat",
            "kill",
            "seccomp",
        ] {
            assert!(!ALLOWED.contains(&name), "{name}");
        }
    }
}

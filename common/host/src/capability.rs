//! Capabilities of Linux by name and number, and the bounding set of a thread.

use nix::errno::Errno;

/// Capabilities are numbered below this in any kernel: a set of them has 64 bits.
const END: u32 = u64::BITS;

/// Names of capabilities in the order of their numbers (linux/capability.h), without `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The number of a capability that is named as a spec names it, such as `CAP_KILL`.
pub fn number(name: &str) -> Option<usize> {
    let name = name.strip_prefix("CAP_")?;
    NAMES.iter().position(|known| known.eq_ignore_ascii_case(name))
}

/// Drops every capability from this thread's bounding set but those whose bits are set in `keep`:
/// no other comes back, whatever is executed.
///
/// Allocates nothing and takes no lock, so it may be called between fork and exec.
///
/// # Errors
/// The number of the capability that the kernel did not let go, and why.
pub fn bound(keep: u64) -> std::result::Result<(), (u32, Errno)> {
    for number in (0..END).filter(|number| keep & 1 << number == 0) {
        // SAFETY: integer arguments.
        let r = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        match Errno::result(r) {
            Ok(_) => {}
            // This kernel has no such capability, nor any with a higher number.
            Err(Errno::EINVAL) => break,
            Err(error) => return Err((number, error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bounding set of the thread that asks.
    fn bounding() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let set = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap();
        u64::from_str_radix(set.trim(), 16).unwrap()
    }

    #[test]
    fn a_thread_keeps_what_it_names_of_its_bounding_set_and_gets_nothing_new() {
        let before = bounding();
        // The set is the thread's own: others of this process keep theirs.
        let dropped = std::thread::spawn(move || {
            // CHOWN, KILL, SETPCAP, and a bit that no kernel has a capability for.
            let keep = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 63;
            let some = bound(keep).map(|()| bounding());
            (keep, some, bound(0).map(|()| bounding()))
        });
        let (keep, some, none) = dropped.join().unwrap();
        if let Err((number, error)) = some {
            assert_eq!(error, Errno::EPERM, "capability {number}");
            eprintln!("skipped: needs root (CAP_SETPCAP)");
            return;
        }
        assert_eq!(some, Ok(before & keep));
        assert_eq!(none, Ok(0));
        assert_eq!(bounding(), before);
    }

    #[test]
    fn numbers_are_the_kernels() {
        for (name, expected) in [("CAP_CHOWN", 0), ("CAP_NET_RAW", 13), ("CAP_SYS_ADMIN", 21)] {
            assert_eq!(number(name), Some(expected), "{name}");
        }
        assert_eq!(number("CAP_CHECKPOINT_RESTORE"), Some(40));
        assert_eq!(number("KILL"), None);
        assert_eq!(number("CAP_NONE"), None);
    }
}

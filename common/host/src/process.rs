//! Processes by pidfd, and what identifies a process across a restart.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::{Context, Result};

/// Opens a pidfd (close-on-exec).
///
/// # Errors
/// [`crate::Error::Io`] with `ESRCH` when there is no such process.
pub fn pidfd_open(pid: u32) -> Result<OwnedFd> {
    // SAFETY: integer arguments; a non-negative result is a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context(|| format!("no process {pid}"));
    }
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sends a signal (0 only probes).
///
/// # Errors
/// [`crate::Error::Io`]: `ESRCH` when it has ended, `EINVAL` for an unknown signal.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed.
    let r = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0)
    };
    if r < 0 {
        return Err(std::io::Error::last_os_error())
            .context(|| format!("cannot send signal {signal}"));
    }
    Ok(())
}

/// Start time of a process in clock ticks since boot (`/proc/<pid>/stat`, field 22): with the pid
/// it names one process for good. `None` when it has ended; zombies count as ended.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command may contain anything, so count from behind its closing bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn we_exist() {
        let me = std::process::id();
        assert!(start_time(me).unwrap() > 0);
        let fd = pidfd_open(me).unwrap();
        pidfd_signal(fd.as_fd(), 0).unwrap();
        assert!(pidfd_signal(fd.as_fd(), 9999).is_err());
        assert!(start_time(u32::MAX / 4).is_none());
    }
}

//! Processes by pidfd, and what identifies a process across a restart.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::{Context, Result};

/// Where distributions put programs that nobody calls by hand, such as virtiofsd: Debian, Fedora and openEuler
/// in the first, Arch in the last.
const HELPERS: [&str; 3] = ["/usr/libexec", "/usr/lib/qemu", "/usr/lib"];

/// A program by absolute path; or by name in `PATH`, then where helper programs are.
pub fn find_program(name: &Path) -> Option<PathBuf> {
    if name.is_absolute() {
        return name.is_file().then(|| name.to_owned());
    }
    let default = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into();
    let path = std::env::var_os("PATH").unwrap_or(default);
    find_in(name, std::env::split_paths(&path).chain(HELPERS.map(PathBuf::from)))
}

fn find_in(name: &Path, mut dirs: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    dirs.find_map(|dir| Some(dir.join(name)).filter(|path| path.is_file()))
}

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
    let r =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) };
    if r < 0 {
        return Err(std::io::Error::last_os_error())
            .context(|| format!("cannot send signal {signal}"));
    }
    Ok(())
}

/// Whether the process has ended (a zombie has), waiting up to `patience`.
///
/// # Errors
/// [`crate::Error::Io`] when the descriptor cannot be polled.
pub fn pidfd_ended(pidfd: BorrowedFd<'_>, patience: std::time::Duration) -> Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let until = std::time::Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(n) => return Ok(n > 0),
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e).context(|| "cannot poll a process"),
        }
    }
}

/// One process, told apart from a later one with the same pid: what a record keeps of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    /// Pid in our namespace.
    pub pid: u32,
    /// [`start_time`] of it.
    pub start: u64,
}

impl Identity {
    /// The identity of a living process.
    pub fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, start: start_time(pid)? })
    }

    /// A pidfd of exactly this process, or `None` when it has ended.
    pub fn open(self) -> Option<OwnedFd> {
        // The descriptor first: what is then found under the pid is what it refers to.
        let fd = pidfd_open(self.pid).ok()?;
        (start_time(self.pid)? == self.start).then_some(fd)
    }

    /// Kills exactly this process. Nothing is to be done about one that has ended meanwhile, nor
    /// about one that cannot be killed.
    pub fn kill(self) {
        if let Some(pidfd) = self.open() {
            let _ = pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        }
    }
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

/// Children of process `pid` that live, those that it has adopted as a subreaper included.
///
/// The kernel passes over some while others end (proc(5), `/proc/PID/task/TID/children`): so it is asked
/// until it says the same twice.
///
/// # Errors
/// When there is no such process, or its kernel does not list children (`CONFIG_PROC_CHILDREN`).
pub fn children(pid: u32) -> Result<Vec<Identity>> {
    const TURNS: usize = 100;
    let mut last = listed_children(pid)?;
    for _ in 0..TURNS {
        let now = listed_children(pid)?;
        if now == last {
            break;
        }
        last = now;
    }
    Ok(last.into_iter().filter_map(Identity::of).collect())
}

fn listed_children(pid: u32) -> Result<Vec<u32>> {
    let tasks = format!("/proc/{pid}/task");
    let mut found = Vec::new();
    for task in std::fs::read_dir(&tasks).context(|| format!("cannot list {tasks}"))?.flatten() {
        let file = task.path().join("children");
        match std::fs::read_to_string(&file) {
            Ok(text) => found.extend(text.split_ascii_whitespace().flat_map(str::parse::<u32>)),
            // A thread that has ended.
            Err(_) if !task.path().exists() => {}
            Err(error) => return Err(error).context(|| format!("cannot read {}", file.display())),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Whether a word of the command line of process `pid` is `dir`, or a path below it, also behind the
/// `=` of an option.
pub fn names_dir(pid: u32, dir: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    text.split(|byte| *byte == 0).any(|word| {
        let value = word.splitn(2, |byte| *byte == b'=').last().unwrap_or_default();
        [word, value]
            .iter()
            .any(|path| Path::new(std::ffi::OsStr::from_bytes(path)).starts_with(dir))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_the_first_file_of_its_name_and_no_directory() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = ["a", "b", "c"].map(|name| dir.path().join(name));
        dirs.iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
        let find = || find_in(Path::new("helper"), dirs.clone().into_iter());
        assert_eq!(find(), None);
        std::fs::create_dir(dirs[0].join("helper")).unwrap();
        std::fs::write(dirs[2].join("helper"), "").unwrap();
        assert_eq!(find(), Some(dirs[2].join("helper")));
        std::fs::write(dirs[1].join("helper"), "").unwrap();
        assert_eq!(find(), Some(dirs[1].join("helper")));
    }

    #[test]
    fn a_child_is_found_by_the_directory_that_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let script = "read never";
        let mut command = std::process::Command::new("sh");
        command.args(["-c", script, "sh"]).stdin(std::process::Stdio::piped());
        let inside = dir.path().join("a/log");
        let mut child = command.arg(format!("--log={}", inside.display())).spawn().unwrap();
        let found = children(std::process::id()).unwrap();
        assert!(found.iter().any(|found| found.pid == child.id()));
        let other = dir.path().with_extension("x");
        assert!(names_dir(child.id(), dir.path()) && names_dir(child.id(), &dir.path().join("a")));
        assert!(!names_dir(child.id(), &dir.path().join("b")) && !names_dir(child.id(), &other));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!names_dir(child.id(), dir.path()));
    }

    #[test]
    fn we_exist() {
        let me = std::process::id();
        assert!(start_time(me).unwrap() > 0);
        let fd = pidfd_open(me).unwrap();
        pidfd_signal(fd.as_fd(), 0).unwrap();
        assert!(pidfd_signal(fd.as_fd(), 9999).is_err());
        assert!(start_time(u32::MAX / 4).is_none());
    }

    #[test]
    fn an_end_is_seen_and_a_reused_pid_is_not_mistaken() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let id = Identity::of(child.id()).unwrap();
        let fd = id.open().unwrap();
        let patience = std::time::Duration::from_secs(10);
        assert!(!pidfd_ended(fd.as_fd(), std::time::Duration::ZERO).unwrap());
        pidfd_signal(fd.as_fd(), libc::SIGKILL).unwrap();
        assert!(pidfd_ended(fd.as_fd(), patience).unwrap());
        assert!(id.open().is_none());
        child.wait().unwrap();
        assert!(
            Identity { start: 1, ..Identity::of(std::process::id()).unwrap() }.open().is_none()
        );
    }
}

//! Paths below a directory that a container can write are opened with `openat2(2)`: beneath the
//! directory, without symlinks and without magic links (`/proc/*/fd`), so that whatever the
//! container plants there cannot lead out.

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::{Context, Error, Result};

/// Opens `path` below `root`; it must not be absolute, leave `root`, or cross a symlink.
///
/// # Errors
/// [`Error::Io`]: `ELOOP` for a symlink, `EXDEV` for a path that leads out.
pub fn open_beneath(root: BorrowedFd<'_>, path: &Path, flags: i32, mode: u32) -> Result<OwnedFd> {
    let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
    openat2(root, path, flags, mode, resolve)
}

/// Opens `path` as a process whose root is `root` would: symlinks are followed but stay inside.
///
/// # Errors
/// [`Error::Io`].
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: i32) -> Result<OwnedFd> {
    openat2(root, path, flags, 0, libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS)
}

fn openat2(root: BorrowedFd<'_>, path: &Path, flags: i32, mode: u32, resolve: u64) -> Result<OwnedFd> {
    let c = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::Invalid("a path contains a null byte".into()))?;
    // SAFETY: all-zero is a valid open_how.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = resolve;
    let size = std::mem::size_of::<libc::open_how>();
    // SAFETY: path and `how` are valid for the call; a non-negative result is a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_openat2, root.as_raw_fd(), c.as_ptr(), &how, size) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error())
            .context(|| format!("cannot open {} safely", path.display()));
    }
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether a descriptor refers to a file of procfs: checked before anything is written below
/// `/proc` (CVE-2019-16884).
pub fn is_procfs(fd: BorrowedFd<'_>) -> bool {
    nix::sys::statfs::fstatfs(fd)
        .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn nothing_leads_out_of_the_root() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ok"), "x").unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
        let root = File::open(dir.path()).unwrap();
        let open = |p: &str| open_beneath(root.as_fd(), Path::new(p), libc::O_RDONLY, 0);
        assert!(open("ok").is_ok());
        for bad in ["link", "link/passwd", "../x", "/etc/passwd"] {
            assert!(open(bad).is_err(), "{bad}");
        }
        assert!(open_in_root(root.as_fd(), Path::new("link/passwd"), libc::O_RDONLY).is_err());
        assert!(open_in_root(root.as_fd(), Path::new("/ok"), libc::O_RDONLY).is_ok());
    }

    #[test]
    fn procfs_is_recognised() {
        assert!(is_procfs(File::open("/proc/self/stat").unwrap().as_fd()));
        assert!(!is_procfs(File::open("/").unwrap().as_fd()));
    }
}

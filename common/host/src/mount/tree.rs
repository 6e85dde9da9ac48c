//! Detached copies of mounts: made, given their flags, and only then attached.
//!
//! A bind mount that is first made and then made read-only is writable for a moment, and for ever
//! in other mount namespaces that got it by propagation in that moment. A detached tree has its
//! flags before anybody sees it (open_tree(2), mount_setattr(2), move_mount(2); Linux 5.12).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::{Context, Error, Result};

/// What a copy is given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags {
    /// With what is mounted below.
    pub recursive: bool,
    /// Read-only, with everything below when `recursive`.
    pub read_only: bool,
    /// Devices in it are no devices.
    pub no_devices: bool,
}

fn tree(at: i32, path: &CString, flags: Flags, how: u32) -> io::Result<OwnedFd> {
    let deep = if flags.recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let open = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | deep | how;
    // SAFETY: a valid path and integer arguments.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, at, path.as_ptr(), open) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor.
    let tree = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut attr_set = 0;
    if flags.read_only {
        attr_set |= libc::MOUNT_ATTR_RDONLY;
    }
    if flags.no_devices {
        attr_set |= libc::MOUNT_ATTR_NODEV;
    }
    if attr_set == 0 {
        return Ok(tree);
    }
    let attr = libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: an empty path for the descriptor itself; `attr` and its size belong together.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH as u32 | deep,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(tree) }
}

/// A detached copy of what is at `source`; links are followed, as for a bind mount.
///
/// # Errors
/// [`Error::Io`].
pub fn copy(source: &Path, flags: Flags) -> Result<OwnedFd> {
    let path = CString::new(source.as_os_str().as_bytes())
        .map_err(|_| Error::Invalid("a mount contains a null byte".into()))?;
    tree(libc::AT_FDCWD, &path, flags, 0)
        .context(|| format!("cannot copy the mount at {}", source.display()))
}

/// The same of an open file or directory (`O_PATH` does).
///
/// # Errors
/// [`Error::Io`].
pub fn copy_of(source: BorrowedFd<'_>, flags: Flags) -> Result<OwnedFd> {
    let how = libc::AT_EMPTY_PATH as u32;
    tree(source.as_raw_fd(), &CString::default(), flags, how).context(|| "cannot copy a mount")
}

/// Sets how mounts get from and to a detached tree and everything in it: `MS_PRIVATE` or
/// `MS_SLAVE`.
///
/// # Errors
/// [`Error::Io`].
pub fn set_propagation(tree: &OwnedFd, kind: libc::c_ulong) -> Result<()> {
    let attr = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: kind, userns_fd: 0 };
    // SAFETY: an empty path for the descriptor itself; `attr` and its size belong together.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH as u32 | libc::AT_RECURSIVE as u32,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error()).context(|| "cannot set a mount's propagation");
    }
    Ok(())
}

/// Attaches a detached tree at an open file or directory of the same kind.
///
/// # Errors
/// [`Error::Io`].
pub fn attach(tree: &OwnedFd, target: BorrowedFd<'_>) -> Result<()> {
    super::overlay::attach(tree, &target).context(|| "cannot attach a mount")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_copy_is_read_only_before_it_is_seen() {
        crate::testing::apart(|path| {
            for name in ["from", "from/below", "to"] {
                std::fs::create_dir(path.join(name)).unwrap();
            }
            crate::mount::mount_shm(&path.join("from/below"), 4096 * 16).unwrap();
            let flags = Flags { recursive: true, read_only: true, no_devices: true };
            let tree = copy(&path.join("from"), flags).unwrap();
            let target = std::fs::File::open(path.join("to")).unwrap();
            attach(&tree, target.as_fd()).unwrap();
            let errno = |at: &str| {
                std::fs::write(path.join(at), "x").map_err(|e| e.raw_os_error()).err().flatten()
            };
            assert_eq!(errno("to/file"), Some(libc::EROFS));
            assert_eq!(errno("to/below/file"), Some(libc::EROFS));
            assert_eq!(errno("from/below/file"), None);
        });
    }
}

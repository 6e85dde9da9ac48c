//! Id-mapped mounts (mount_setattr(2), Linux 5.12; overlay layers 5.19).
//!
//! A pod in a user namespace sees files of its image and volumes as if they belonged to its own
//! users, though on disk they belong to the host's. The mapping is that of the pod's user
//! namespace itself, which the caller holds.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What id-mapped mounts are made with.
#[derive(Debug, Clone, Copy)]
pub struct IdMap<'a> {
    /// The user namespace whose mapping counts.
    pub userns: BorrowedFd<'a>,
    /// A private directory on the host in which layers are mounted for a moment.
    pub scratch: &'a Path,
}

/// A detached, id-mapped copy of the mount at `source`, with what is mounted below if `recursive`.
///
/// # Errors
/// `EINVAL` when the filesystem cannot be mapped, `ENOSYS` on kernels without.
pub fn clone_mapped(source: &Path, userns: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(source.as_os_str().as_bytes())?;
    let deep = if recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | deep;
    // SAFETY: a valid path and integer arguments.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor.
    let tree = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    apply(tree.as_fd(), userns, recursive)?;
    Ok(tree)
}

/// Maps a detached mount that is not mapped yet, with what is mounted below if `recursive`.
///
/// # Errors
/// As [`clone_mapped`].
pub fn apply(tree: BorrowedFd<'_>, userns: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let deep = if recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: userns.as_raw_fd() as u64,
    };
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
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Layers of an overlay that are mounted, id-mapped, in the scratch directory; unmounted when
/// dropped, which an overlay made of them does not mind.
pub(super) struct Layers(Vec<PathBuf>);

impl Layers {
    /// Maps the layers of a `lowerdir` value; answers them, and the value that names them.
    pub(super) fn mount(lower: &str, map: &IdMap<'_>) -> io::Result<(Self, String)> {
        let mut layers = Self(Vec::new());
        for (i, layer) in super::overlay::plain_layers(lower)?.into_iter().enumerate() {
            let at = map.scratch.join(format!("l{i}"));
            std::fs::create_dir_all(&at)?;
            layers.0.push(at.clone());
            let tree = clone_mapped(Path::new(layer), map.userns, false)?;
            let place = std::fs::File::open(&at)?;
            super::overlay::attach(&tree, &place)?;
        }
        let names: Vec<_> = layers.0.iter().map(|p| p.display().to_string()).collect();
        Ok((layers, names.join(":")))
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        for at in self.0.iter().rev() {
            // A layer that stays is found below the sandbox' directory when that is removed.
            let _ = super::unmount(at);
            let _ = std::fs::remove_dir(at);
        }
    }
}

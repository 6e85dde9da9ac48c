//! Paths below a directory that a container can write are opened with `openat2(2)`: beneath the
//! directory, without symlinks and without magic links (`/proc/*/fd`), so that whatever the
//! container plants there cannot lead out.
//!
//! [`Root`] holds the directory by descriptor; every operation names a path relative to it and
//! answers a descriptor. Use the descriptor (or [`proc_path`] of it) from then on, never the path
//! again: between two look-ups of one path the container may have changed what it means
//! (CVE-2021-30465, CVE-2024-45310, CVE-2025-31133).

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::{Context, Error, Result};

/// Deepest tree that [`Root::remove_tree`] enters.
pub const MAX_DEPTH: usize = 256;

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

fn openat2(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: i32,
    mode: u32,
    resolve: u64,
) -> Result<OwnedFd> {
    let c = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::Invalid("a path contains a null byte".into()))?;
    // SAFETY: all-zero is a valid open_how.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = resolve;
    let size = std::mem::size_of::<libc::open_how>();
    // The kernel answers EAGAIN when a rename elsewhere made it unsure: asking again is right.
    for _ in 0..64 {
        // SAFETY: path and `how` are valid for the call; a non-negative result is a new descriptor.
        let fd =
            unsafe { libc::syscall(libc::SYS_openat2, root.as_raw_fd(), c.as_ptr(), &how, size) };
        if fd >= 0 {
            // SAFETY: the kernel has just given us this descriptor.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        }
        if !matches!(Errno::last(), Errno::EAGAIN | Errno::EINTR) {
            break;
        }
    }
    Err(std::io::Error::last_os_error())
        .context(|| format!("cannot open {} safely", path.display()))
}

/// Whether a descriptor refers to a file of procfs: checked before anything is written below
/// `/proc` (CVE-2019-16884).
pub fn is_procfs(fd: BorrowedFd<'_>) -> bool {
    nix::sys::statfs::fstatfs(fd)
        .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC)
}

/// As [`is_procfs`], as an error.
///
/// # Errors
/// [`Error::Invalid`] when something else has been put in procfs' place.
pub fn verify_procfs(fd: BorrowedFd<'_>) -> Result<()> {
    if is_procfs(fd) {
        return Ok(());
    }
    Err(Error::Invalid("what is mounted there is not procfs: refusing to write to it".into()))
}

/// A path that names what `fd` refers to, for calls that take no descriptor (`mount(2)`).
pub fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Makes a directory that only its owner may enter, 0700 from creation; an existing one must be
/// ours. The same as [`crate::record::private_dir`].
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] when somebody else owns it or it is no directory.
pub fn create_private_dir(path: &Path) -> Result<()> {
    crate::record::private_dir(path)
}

/// A directory by descriptor, below which paths are resolved safely.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

impl Root {
    /// Opens the directory `path`, which is ours to trust; its last component may be no symlink.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty())
            .context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { fd })
    }

    /// Takes a descriptor of a directory.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Opens `path` for `O_*` flags: no symlink anywhere, nothing outside.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open_file(&self, path: &Path, flags: i32) -> Result<OwnedFd> {
        open_beneath(self.fd.as_fd(), path, flags, 0)
    }

    /// Opens `path` (`O_PATH`) as a process with this root would: symlinks stay inside.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn resolve(&self, path: &Path) -> Result<OwnedFd> {
        open_in_root(self.fd.as_fd(), path, libc::O_PATH)
    }

    /// Creates a new regular file and opens it for writing; it must not exist.
    ///
    /// # Errors
    /// [`Error::Io`], `EEXIST` for anything that is there, a dangling link too.
    pub fn create_file(&self, path: &Path, mode: u32) -> Result<OwnedFd> {
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
        open_beneath(self.fd.as_fd(), path, flags, mode)
    }

    /// Makes the directories of `path` that are missing, and opens the last one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] for `..` or an absolute path.
    pub fn mkdir_all(&self, path: &Path, mode: u32) -> Result<Self> {
        let context = || format!("cannot make {} safely", path.display());
        let mut at = self.try_clone()?;
        for part in path.components() {
            let name = match part {
                Component::Normal(name) => Path::new(name),
                Component::CurDir => continue,
                _ => {
                    return Err(Error::Invalid(format!("path {path:?} must stay below its root")));
                }
            };
            match mkdirat(&at.fd, name, Mode::from_bits_truncate(mode)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(e).context(context),
            }
            let fd = open_beneath(at.fd.as_fd(), name, libc::O_PATH | libc::O_DIRECTORY, 0)?;
            at = Self { fd };
        }
        Ok(at)
    }

    /// A second handle on the same directory.
    ///
    /// # Errors
    /// [`Error::Io`] without free descriptors.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.fd.try_clone().context(|| "cannot duplicate a directory")?;
        Ok(Self { fd })
    }

    /// Removes `path` and all below it, by descriptor. Links are removed, never followed; another
    /// filesystem mounted below is never entered. Nothing there is no error.
    ///
    /// # Errors
    /// [`Error::Io`]: `EBUSY` at a mount point; [`Error::Invalid`] beyond [`MAX_DEPTH`].
    pub fn remove_tree(&self, path: &Path) -> Result<()> {
        let context = || format!("cannot remove {}", path.display());
        let name = path.file_name().ok_or_else(|| {
            Error::Invalid(format!("path {path:?} names nothing that could be removed"))
        })?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let dir = match parent.map(|p| open_beneath(self.fd.as_fd(), p, flags, 0)).transpose() {
            Ok(dir) => dir.unwrap_or(self.try_clone()?.fd),
            Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(()),
            Err(e) => return Err(e),
        };
        let device = match fstatat(&dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat.st_dev,
            Err(Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(e).context(context),
        };
        if fstat(&dir).context(context)?.st_dev != device {
            return Err(Errno::EBUSY).context(context);
        }
        let c = CString::new(name.as_bytes())
            .map_err(|_| Error::Invalid("a path contains a null byte".into()))?;
        remove_entry(dir.as_fd(), &c, device, 0)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn remove_entry(dir: BorrowedFd<'_>, name: &CStr, device: u64, depth: usize) -> Result<()> {
    let shown = || OsStr::from_bytes(name.to_bytes()).display().to_string();
    let context = || format!("cannot remove {}", shown());
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Err(e) => return Err(e).context(context),
    }
    if depth >= MAX_DEPTH {
        return Err(Error::Invalid(format!("{} is deeper than {MAX_DEPTH} levels", shown())));
    }
    let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_XDEV;
    let path = Path::new(OsStr::from_bytes(name.to_bytes()));
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let fd = match openat2(dir, path, flags, 0, resolve) {
        Ok(fd) => fd,
        // Gone, or turned into something that is no directory, while we looked: once more.
        Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(()),
        // RESOLVE_NO_XDEV answers so at a mount point.
        Err(e) if e.errno() == Some(libc::EXDEV) => return Err(Errno::EBUSY).context(context),
        Err(e) => return Err(e),
    };
    let stat: FileStat = fstat(&fd).context(context)?;
    if stat.st_dev != device {
        return Err(Errno::EBUSY).context(context);
    }
    // Names first, then removal: a directory that changes under the reading may skip entries.
    let names: Vec<CString> = std::fs::read_dir(proc_path(fd.as_fd()))
        .context(context)?
        .filter_map(|e| CString::new(e.ok()?.file_name().as_bytes()).ok())
        .collect();
    for name in &names {
        remove_entry(fd.as_fd(), name, device, depth + 1)?;
    }
    match unlinkat(dir, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(e).context(context),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_leads_out_of_the_root() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ok"), "x").unwrap();
        symlink("/etc", dir.path().join("link")).unwrap();
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
    fn directories_are_made_inside_only() {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = Root::open(dir.path()).unwrap();
        root.mkdir_all(Path::new("a/b/c"), 0o700).unwrap();
        assert!(dir.path().join("a/b/c").is_dir());
        symlink(out.path(), dir.path().join("a/out")).unwrap();
        assert!(root.mkdir_all(Path::new("a/out/x"), 0o700).is_err());
        assert!(root.mkdir_all(Path::new("../x"), 0o700).is_err());
        assert!(fs::read_dir(out.path()).unwrap().next().is_none());
        symlink(out.path().join("new"), dir.path().join("dangling")).unwrap();
        assert!(root.create_file(Path::new("dangling"), 0o600).is_err());
        assert!(!out.path().join("new").exists());
        root.create_file(Path::new("a/f"), 0o600).unwrap();
    }

    #[test]
    fn a_tree_is_removed_without_following_links() {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(out.path().join("keep"), "x").unwrap();
        fs::create_dir_all(dir.path().join("t/a/b")).unwrap();
        fs::write(dir.path().join("t/a/f"), "x").unwrap();
        symlink(out.path(), dir.path().join("t/a/out")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        root.remove_tree(Path::new("t")).unwrap();
        root.remove_tree(Path::new("t")).unwrap();
        root.remove_tree(Path::new("no/such")).unwrap();
        assert!(!dir.path().join("t").exists() && out.path().join("keep").exists());
        assert!(root.remove_tree(Path::new("..")).is_err());
        symlink(out.path(), dir.path().join("l")).unwrap();
        assert!(root.remove_tree(Path::new("l/keep")).is_err());
        root.remove_tree(Path::new("l")).unwrap();
        assert!(out.path().join("keep").exists());
    }

    #[test]
    fn a_tree_too_deep_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let deep: PathBuf = std::iter::repeat_n("d", MAX_DEPTH + 3).collect();
        fs::create_dir_all(dir.path().join(deep)).unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert!(matches!(root.remove_tree(Path::new("d")), Err(Error::Invalid(_))));
    }

    #[test]
    fn procfs_is_recognised() {
        assert!(verify_procfs(File::open("/proc/self/stat").unwrap().as_fd()).is_ok());
        assert!(verify_procfs(File::open("/").unwrap().as_fd()).is_err());
    }
}

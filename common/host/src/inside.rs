//! Places inside a rootfs, which an image has filled and other containers may be changing.
//!
//! A path is resolved inside the rootfs (`openat2`, `RESOLVE_IN_ROOT`), so that a link leads where
//! it would lead a process in the container, and the descriptor that comes out is what is used:
//! the path is never looked at again (CVE-2021-30465). What is missing is made one name at a time
//! below the descriptor of its parent, following nothing (CVE-2024-45310).

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::fchownat;

use crate::safe_path::{open_beneath, open_in_root};

/// What is to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// A directory.
    Directory,
    /// A file; what is there may be any kind of file.
    File,
}

/// Opens (`O_PATH`) what `path` names inside `root`; `None` when it does not exist.
///
/// # Errors
/// A text that names the path.
pub fn existing(root: &impl AsFd, path: &Path) -> Result<Option<OwnedFd>, String> {
    match open_in_root(root.as_fd(), path, libc::O_PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(words(path, &error)),
    }
}

fn words(path: &Path, error: &crate::Error) -> String {
    let reason = std::error::Error::source(error);
    let reason = reason.map_or_else(|| error.to_string(), ToString::to_string);
    format!("{} in the rootfs: {reason}", path.display())
}

/// Opens (`O_PATH`) what `path`, absolute and without `..`, names inside `root`, and makes what
/// is missing of it.
///
/// # Errors
/// A text that names the path; a link that leads nowhere is one, too.
pub fn target(root: &impl AsFd, path: &Path, want: Want) -> Result<OwnedFd, String> {
    target_of(root, path, want, None)
}

/// The same; what is made belongs to `owner`, a user and a group of the host's, or to this process.
///
/// # Errors
/// As [`target`].
pub fn target_of(
    root: &impl AsFd,
    path: &Path,
    want: Want,
    owner: Option<(u32, u32)>,
) -> Result<OwnedFd, String> {
    let open = |path: &Path| open_in_root(root.as_fd(), path, libc::O_PATH);
    match open(path) {
        Ok(fd) => return Ok(fd),
        Err(error) if error.errno() == Some(libc::ENOENT) => {}
        Err(error) => return Err(words(path, &error)),
    }
    let names: Vec<&OsStr> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let mut walked = PathBuf::from("/");
    let mut at = open(&walked).map_err(|error| words(path, &error))?;
    let mut fresh = false;
    for (i, name) in names.iter().enumerate() {
        let name = Path::new(name);
        walked.push(name);
        if !fresh {
            match open(&walked) {
                Ok(fd) => {
                    at = fd;
                    continue;
                }
                Err(error) if error.errno() == Some(libc::ENOENT) => fresh = true,
                Err(error) => return Err(words(path, &error)),
            }
        }
        let last = i + 1 == names.len();
        let mut made = true;
        let flags = if last && want == Want::File {
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
            // A link to nowhere has the name: neither it nor what it points at is touched.
            open_beneath(at.as_fd(), name, flags, 0o644).map_err(|error| words(path, &error))?;
            libc::O_PATH | libc::O_NOFOLLOW
        } else {
            match mkdirat(&at, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) => {}
                // Another container may have been faster; what it made is opened as a directory.
                Err(Errno::EEXIST) => made = false,
                Err(error) => {
                    return Err(format!("make {} in the rootfs: {error}", path.display()));
                }
            }
            libc::O_PATH | libc::O_NOFOLLOW | libc::O_DIRECTORY
        };
        at = open_beneath(at.as_fd(), name, flags, 0).map_err(|error| words(path, &error))?;
        if let Some((uid, gid)) = owner.filter(|_| made) {
            fchownat(&at, "", Some(uid.into()), Some(gid.into()), AtFlags::AT_EMPTY_PATH)
                .map_err(|error| format!("give {} in the rootfs: {error}", path.display()))?;
        }
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_lead_inside_and_never_out() {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = std::fs::File::open(dir.path()).unwrap();
        let make = |path: &str, want| target(&root, Path::new(path), want);
        make("/a/b", Want::Directory).unwrap();
        make("/a/b/f", Want::File).unwrap();
        make("/a/b/f", Want::File).unwrap();
        assert!(dir.path().join("a/b/f").is_file());
        // An absolute link is one of the container's.
        symlink("/a/b", dir.path().join("abs")).unwrap();
        make("/abs/new/g", Want::File).unwrap();
        assert!(dir.path().join("a/b/new/g").is_file());
        symlink("../../../../a", dir.path().join("up")).unwrap();
        make("/up/h", Want::File).unwrap();
        assert!(dir.path().join("a/h").is_file());
        // What leads nowhere is not followed, nor made.
        let nowhere = out.path().join("new");
        symlink(&nowhere, dir.path().join("dangling")).unwrap();
        for want in [Want::File, Want::Directory] {
            make("/dangling", want).unwrap_err();
            make("/dangling/x", want).unwrap_err();
        }
        assert!(std::fs::read_dir(out.path()).unwrap().next().is_none());
        make("/a/b/f/x", Want::File).unwrap_err();
    }

    #[test]
    fn what_is_made_belongs_to_whom_it_is_made_for_and_what_was_there_does_not() {
        use std::os::unix::fs::MetadataExt;
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("skipped: needs root");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("there")).unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let owner = Some((100_000, 100_001));
        target_of(&root, Path::new("/there/new/f"), Want::File, owner).unwrap();
        target_of(&root, Path::new("/there"), Want::Directory, owner).unwrap();
        let of = |path: &str| {
            let meta = dir.path().join(path).symlink_metadata().unwrap();
            (meta.uid(), meta.gid())
        };
        assert_eq!(of("there"), (0, 0));
        assert_eq!([of("there/new"), of("there/new/f")], [(100_000, 100_001); 2]);
    }
}

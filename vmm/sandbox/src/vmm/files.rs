//! Files of snapshots: written by a VMM where it may write, kept where only we may, and shown to
//! VMMs that start from them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::error::{Doing, Error, Result};

/// Bytes of a regular file; a link is none.
///
/// # Errors
/// [`Error::Io`], [`Error::State`].
pub(super) fn length(path: &Path) -> Result<u64> {
    let meta = fs::symlink_metadata(path).doing(|| format!("look at {}", path.display()))?;
    if meta.is_file() {
        Ok(meta.len())
    } else {
        Err(Error::State(format!("{} is no file", path.display())))
    }
}

/// Moves a file that a VMM has written to where only we can change it.
///
/// # Errors
/// As [`length`].
pub(super) fn take_over(from: &Path, to: &Path) -> Result<()> {
    length(from)?;
    if fs::rename(from, to).is_err() {
        // Another file system.
        fs::copy(from, to).doing(|| format!("copy {}", from.display()))?;
        super::core::remove(from);
    }
    // The name was the VMM's until now: what came with it has to be a file still.
    length(to)?;
    std::os::unix::fs::lchown(to, Some(nix::unistd::geteuid().as_raw()), None)
        .doing(|| format!("take {}", to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o600))
        .doing(|| format!("close {}", to.display()))
}

/// Lets the user of jailed VMMs read a file, through a read-only mount of a jail.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn lend(path: &Path, owner: Option<(u32, u32)>) -> Result<()> {
    let Some((uid, gid)) = owner else { return Ok(()) };
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
        .doing(|| format!("give {} to user {uid}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o400))
        .doing(|| format!("close {}", path.display()))
}

/// Makes a directory, empty, in which a VMM may write.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn fresh_dir(path: &Path, owner: Option<(u32, u32)>) -> Result<()> {
    let _ = fs::remove_dir_all(path);
    fs::create_dir(path).doing(|| format!("make {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
        .doing(|| format!("close {}", path.display()))?;
    let Some((uid, gid)) = owner else { return Ok(()) };
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
        .doing(|| format!("give {} to user {uid}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_in_place_of_a_file_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::os::unix::fs::symlink("/etc/passwd", &from).unwrap();
        assert!(matches!(take_over(&from, &to), Err(Error::State(_))));
        fs::remove_file(&from).unwrap();
        fs::write(&from, "state").unwrap();
        take_over(&from, &to).unwrap();
        assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!from.exists());
    }
}

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

/// Lets jailed VMMs read a file, through a read-only mount of a jail. Each has a user of its own, and
/// several may start from it at a time: so the file lets everybody read it, and its directory, which is
/// ours alone, nobody in. Done once: a file that does not change need not be looked at again.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn lend(path: &Path, owner: Option<(u32, u32)>) -> Result<()> {
    let mode = fs::metadata(path).doing(|| format!("look at {}", path.display()))?.permissions();
    if owner.is_none() || mode.mode() & 0o777 == 0o444 {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o444))
        .doing(|| format!("open {} to VMMs", path.display()))
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
    fn a_file_that_one_vmm_starts_from_is_not_touched_for_another() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        fs::write(&path, "memory").unwrap();
        let look = || {
            let meta = fs::metadata(&path).unwrap();
            (meta.mode() & 0o777, meta.uid(), (meta.ctime(), meta.ctime_nsec()))
        };
        let before = look();
        lend(&path, None).unwrap();
        assert_eq!(look(), before);
        lend(&path, Some((70_001, 70_001))).unwrap();
        let lent = look();
        assert_eq!((lent.0, lent.1), (0o444, before.1));
        // Another user's: the first one reads it still, and nobody computes its digest again.
        lend(&path, Some((70_002, 70_002))).unwrap();
        assert_eq!(look(), lent);
    }

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

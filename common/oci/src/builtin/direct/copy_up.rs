//! `tmpcopyup`: a tmpfs that begins with what the image has in its place.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, fstatat};

/// Deepest tree that is copied.
const MAX_DEPTH: usize = 64;

/// Copies what is in `from` into `to`: files, directories and links with owner and mode; other
/// kinds are left out. Nothing is followed.
pub fn copy(from: &impl AsFd, to: &impl AsFd) -> Result<(), String> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::openat(from.as_fd(), ".", flags, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|from| tree(from, to, 0))
        .map_err(|error| format!("tmpcopyup: {error}"))
}

fn tree(from: OwnedFd, to: &impl AsFd, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!("deeper than {MAX_DEPTH} levels")));
    }
    // procfs is still the host's.
    for entry in std::fs::read_dir(kuasar_host::safe_path::proc_path(from.as_fd()))? {
        let name = entry?.file_name();
        let stat = fstatat(&from, Path::new(&name), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        one(&from, to, Path::new(&name), &stat, depth)?;
    }
    Ok(())
}

fn one(
    from: &OwnedFd,
    to: &impl AsFd,
    name: &Path,
    stat: &FileStat,
    depth: usize,
) -> io::Result<()> {
    let mode = Mode::from_bits_truncate(stat.st_mode);
    let read = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFDIR => {
            nix::sys::stat::mkdirat(to.as_fd(), name, Mode::S_IRWXU)?;
            let below = nix::fcntl::openat(from, name, read | OFlag::O_DIRECTORY, Mode::empty())?;
            let flags = read | OFlag::O_DIRECTORY;
            let made = nix::fcntl::openat(to.as_fd(), name, flags, Mode::empty())?;
            tree(below, &made, depth + 1)?;
        }
        libc::S_IFREG => {
            let source = nix::fcntl::openat(from, name, read, Mode::empty())?;
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
            let made = nix::fcntl::openat(to.as_fd(), name, flags, Mode::S_IRUSR)?;
            io::copy(&mut std::fs::File::from(source), &mut std::fs::File::from(made))?;
        }
        libc::S_IFLNK => {
            let text = nix::fcntl::readlinkat(from, name)?;
            nix::unistd::symlinkat(Path::new(&text), to.as_fd(), name)?;
        }
        _ => return Ok(()),
    }
    let (uid, gid) = (stat.st_uid.into(), stat.st_gid.into());
    let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
    nix::unistd::fchownat(to.as_fd(), name, Some(uid), Some(gid), flags)?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFLNK {
        // After the owner, which takes set-id bits away.
        nix::sys::stat::fchmodat(to.as_fd(), name, mode, FchmodatFlags::FollowSymlink)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_tree_is_copied_as_it_is() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir_all(a.path().join("d/e")).unwrap();
        std::fs::write(a.path().join("d/e/f"), "text").unwrap();
        std::fs::set_permissions(a.path().join("d/e/f"), PermissionsExt::from_mode(0o4711))
            .unwrap();
        symlink("/no/where", a.path().join("l")).unwrap();
        let open = |path: &Path| std::fs::File::open(path).unwrap();
        copy(&open(a.path()), &open(b.path())).unwrap();
        assert_eq!(std::fs::read_to_string(b.path().join("d/e/f")).unwrap(), "text");
        let mode = std::fs::metadata(b.path().join("d/e/f")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o4711);
        assert_eq!(std::fs::read_link(b.path().join("l")).unwrap(), Path::new("/no/where"));
    }
}

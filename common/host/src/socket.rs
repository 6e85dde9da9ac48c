//! Unix sockets that nobody else can reach, not even for a moment, and that outlive a daemon.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
    socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};

/// Longest path of a unix socket: `sun_path` without its final NUL, see unix(7).
pub const MAX_PATH: usize = 107;

/// `SIOCUNIXFILE` (linux/un.h): a path descriptor of the file that a socket is bound to.
const SIOCUNIXFILE: libc::c_ulong = 0x89e0;

fn stream() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

/// Binds a listening socket, mode 0600 from its first moment, replacing a stale one. Non-blocking
/// and close-on-exec. The caller makes sure that its directory is private.
///
/// # Errors
/// Those of bind(2); `AddrInUse` when something else than a socket is there.
pub fn bind_private(path: &Path) -> io::Result<OwnedFd> {
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            let text = format!("{} is no socket: remove it or choose another path", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        std::fs::remove_file(path)?;
    }
    let fd = stream()?;
    // The inode that bind makes takes the mode of the socket: no moment of another mode.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(fd)
}

/// Whether somebody listens at `path`; a full queue is an answer too. Never blocks.
///
/// # Errors
/// When that cannot be told.
pub fn is_served(path: &Path) -> io::Result<bool> {
    let fd = stream()?;
    match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) | Err(nix::Error::EAGAIN) => Ok(true),
        Err(nix::Error::ECONNREFUSED | nix::Error::ENOENT | nix::Error::ENOTSOCK) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Whether this is a listening socket, and whoever dials `path` gets to it: the file there is the
/// one that it is bound to, also when it was renamed since. False when it cannot be told.
pub fn listens_at(listener: &impl AsFd, path: &Path) -> bool {
    let listener = listener.as_fd();
    if !getsockopt(&listener, sockopt::AcceptConn).unwrap_or(false) {
        return false;
    }
    // SAFETY: takes no argument; a non-negative result is a new, close-on-exec descriptor.
    let fd = unsafe { libc::ioctl(listener.as_raw_fd(), SIOCUNIXFILE) };
    if fd < 0 {
        return false;
    }
    // SAFETY: the kernel has just given us this descriptor.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(bound), Ok(named)) => (bound.dev(), bound.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_socket_is_private_and_a_stale_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(bind_private(&path).unwrap());
        assert!(!is_served(&path).unwrap());
        let held = bind_private(&path).unwrap();
        assert!(is_served(&path).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(held);
        let file = dir.path().join("f");
        std::fs::write(&file, "x").unwrap();
        assert_eq!(bind_private(&file).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn a_listener_knows_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("s"), dir.path().join("t"));
        let first = bind_private(&path).unwrap();
        if !listens_at(&first, &path) {
            // SIOCUNIXFILE wants CAP_NET_ADMIN: without it every answer is no.
            return;
        }
        std::fs::rename(&path, &moved).unwrap();
        assert!(listens_at(&first, &moved));
        let second = bind_private(&path).unwrap();
        assert!(listens_at(&second, &path) && !listens_at(&first, &path));
        assert!(!listens_at(&std::fs::File::open(dir.path()).unwrap(), &path));
    }
}

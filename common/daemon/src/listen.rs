//! The daemon's own socket.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// Binds a unix socket that only its owner may use (0600 from creation). A socket that nobody
/// answers on is replaced; anything else at that path is left alone.
///
/// The socket is made in a private directory and renamed, so that nobody can connect before its
/// mode is set. (A umask would do so too, but it belongs to all threads.)
///
/// # Errors
/// `AddrInUse` when another daemon answers there; `AlreadyExists` when the path is no socket.
pub fn bind(path: &Path) -> io::Result<OwnedFd> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !dir.exists() {
        std::fs::DirBuilder::new().mode(0o700).recursive(true).create(dir)?;
    }
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
        Ok(meta) if !meta.file_type().is_socket() => {
            let text = format!("{} exists and is no socket: remove it", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Ok(_) if answers(path)? => {
            let text = format!("another daemon serves {}: stop it or use --listen", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        Ok(_) => {}
    }
    let context =
        |e: io::Error| io::Error::new(e.kind(), format!("cannot listen on {}: {e}", path.display()));
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    // Short: a socket's path holds 107 bytes.
    let private = dir.join(format!(".{}.{number}", std::process::id()));
    // Left by a daemon with the same pid that was killed just here.
    let _ = std::fs::remove_dir_all(&private);
    std::fs::DirBuilder::new().mode(0o700).create(&private).map_err(context)?;
    let bound = (|| {
        let new = private.join("s");
        let listener = UnixListener::bind(&new)?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&new, path)?;
        Ok(listener.into())
    })();
    // Empty after success; after a failure the error matters more.
    let _ = std::fs::remove_dir_all(&private);
    bound.map_err(context)
}

/// Whether somebody accepts connections; a full queue is an answer too. Never blocks.
fn answers(path: &Path) -> io::Result<bool> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) | Err(nix::Error::EAGAIN) => Ok(true),
        Err(nix::Error::ECONNREFUSED | nix::Error::ENOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_private_and_a_stale_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/s.sock");
        let first = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        bind(&path).unwrap();
    }

    #[test]
    fn a_file_in_the_sockets_place_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "x").unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
        // Nothing of a failed attempt stays.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

//! Unix sockets that nobody else can reach, not even for a moment.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

use crate::error::{Error, Result};

/// Name of the socket in the pod's directory.
pub(super) const NAME: &str = "task.sock";

/// Longest path of a unix socket: `sun_path` without its final NUL, see unix(7).
const MAX_PATH: usize = 107;

/// Where a pod's socket goes: below its id when that fits, else below a hash of it.
pub(super) fn path(dir: &Path, pod: &str) -> Result<PathBuf> {
    let readable = dir.join(pod).join(NAME);
    if readable.as_os_str().len() <= MAX_PATH && pod != "-" {
        return Ok(readable);
    }
    let short = dir.join(format!("{:016x}", fnv1a(pod.as_bytes()))).join(NAME);
    if short.as_os_str().len() <= MAX_PATH {
        return Ok(short);
    }
    Err(Error::FailedPrecondition(format!(
        "{} has {} bytes, and a unix socket's path at most {MAX_PATH}: choose a shorter state \
         directory",
        short.display(),
        short.as_os_str().len()
    )))
}

/// 64-bit FNV-1a; the names only have to differ, and to be the same after a restart.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| {
        (hash ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Binds a listening socket, mode 0600 from its first moment, replacing a stale one. The caller
/// makes sure that its directory is private.
///
/// # Errors
/// Those of bind(2); `AddrInUse` when something else than a socket is there.
pub fn bind_private(path: &Path) -> io::Result<OwnedFd> {
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "a file is in the way"));
        }
        std::fs::remove_file(path)?;
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The inode that bind makes takes the mode of the socket: no moment of another mode.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(fd)
}

/// Removes a pod's socket and its directory, as far as they exist.
pub(super) fn remove(path: &Path) {
    let _ = std::fs::remove_file(path); // Absent is fine.
    if let Some(dir) = path.parent() {
        let _ = std::fs::remove_dir(dir); // Only when empty.
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_long_directory_gets_short_names_and_a_too_long_one_a_clear_error() {
        let id = "f".repeat(64);
        let short = path(Path::new("/run/kuasar/pods"), &id).unwrap();
        assert!(short.ends_with(format!("{id}/task.sock")));
        let dir = PathBuf::from(format!("/{}", "d".repeat(70)));
        let hashed = path(&dir, &id).unwrap();
        assert!(hashed.as_os_str().len() <= MAX_PATH);
        assert_ne!(hashed, path(&dir, &"e".repeat(64)).unwrap());
        let e = path(Path::new(&format!("/{}", "d".repeat(100))), &id).unwrap_err();
        assert!(e.to_string().contains("shorter state directory"), "{e}");
    }

    #[test]
    fn a_socket_is_private_and_a_stale_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(bind_private(&path).unwrap());
        let _held = bind_private(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let file = dir.path().join("f");
        std::fs::write(&file, "x").unwrap();
        assert_eq!(bind_private(&file).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}

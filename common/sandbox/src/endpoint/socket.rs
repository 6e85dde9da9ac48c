//! Where the pods' sockets are.

use std::path::{Path, PathBuf};

use kuasar_host::socket::MAX_PATH;

use crate::error::{Error, Result};

/// Name of the socket in the pod's directory.
pub(super) const NAME: &str = "task.sock";

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

/// Removes a pod's socket and its directory, as far as they exist.
pub(super) fn remove(path: &Path) {
    let _ = std::fs::remove_file(path); // Absent is fine.
    if let Some(dir) = path.parent() {
        let _ = std::fs::remove_dir(dir); // Only when empty.
    }
}

#[cfg(test)]
mod tests {
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
}

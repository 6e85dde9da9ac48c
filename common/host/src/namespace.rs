//! Namespaces by descriptor.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use crate::{Context, Error, Result};

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Opens a namespace file.
///
/// # Errors
/// [`Error::Io`] when it is gone; [`Error::Invalid`] when the path is no namespace (for example
/// the plain file that is left of an unmounted one).
pub fn open(path: &Path) -> Result<OwnedFd> {
    let file = File::open(path)
        .context(|| format!("namespace {} cannot be opened", path.display()))?;
    let fs = nix::sys::statfs::fstatfs(file.as_fd())
        .context(|| format!("namespace {} cannot be examined", path.display()))?;
    #[allow(clippy::unnecessary_cast)] // the type differs between platforms
    let magic = fs.filesystem_type().0 as i64;
    if magic != NSFS_MAGIC {
        return Err(Error::Invalid(format!(
            "{} is no namespace any more: it was removed, create a new pod",
            path.display()
        )));
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_file_is_no_namespace() {
        assert!(open(Path::new("/proc/self/ns/net")).is_ok());
        assert!(matches!(open(Path::new("/etc/passwd")), Err(Error::Invalid(_))));
        assert!(matches!(open(Path::new("/nowhere")), Err(Error::Io { .. })));
    }
}

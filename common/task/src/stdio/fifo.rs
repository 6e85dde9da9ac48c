//! FIFOs and files of the engine.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::Which;
use crate::error::{Error, Result};

/// An opened path.
#[derive(Debug)]
pub struct Opened {
    /// For the process, or for our relay.
    pub end: OwnedFd,
    /// The opposite end of a FIFO, to be held.
    pub hold: Option<OwnedFd>,
}

/// Opens a path for a process: blocking, as programs expect.
///
/// # Errors
/// [`Error::InvalidArgument`] when it cannot be opened, [`Error::Unimplemented`] for `binary://`.
pub fn open(path: &str, which: Which) -> Result<Opened> {
    let opened = open_ours(path, which)?;
    fcntl(opened.end.as_fd(), FcntlArg::F_SETFL(OFlag::empty()))
        .map_err(|e| Error::internal("cannot change a FIFO", e))?;
    Ok(opened)
}

/// Opens a path for a relay of ours: non-blocking.
///
/// The opposite end is opened first and without blocking, which always succeeds for reading and
/// makes the second open succeed at once. So nobody who does not read can hold us up.
///
/// # Errors
/// As [`open`].
pub fn open_ours(path: &str, which: Which) -> Result<Opened> {
    if path.starts_with("binary://") {
        return Err(Error::Unimplemented(
            "binary:// logging is not supported: let containerd write logs (FIFO or streaming)"
                .into(),
        ));
    }
    let path = path.strip_prefix("file://").unwrap_or(path);
    let bad = |e: std::io::Error| {
        Error::InvalidArgument(format!("cannot open {} {path:?}: {e}", which.name()))
    };
    let fifo = fs::metadata(path).map(|m| m.file_type().is_fifo());
    let nonblock = libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY;
    let read = || OpenOptions::new().read(true).custom_flags(nonblock).open(path).map_err(bad);
    let write = || OpenOptions::new().write(true).custom_flags(nonblock).open(path).map_err(bad);
    if matches!(fifo, Ok(true)) {
        let (r, w): (File, File) = (read()?, write()?);
        let (end, hold) = if which == Which::Stdin { (r, w) } else { (w, r) };
        return Ok(Opened { end: end.into(), hold: Some(hold.into()) });
    }
    let file = if which == Which::Stdin {
        read()?
    } else {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .custom_flags(nonblock)
            .open(path)
            .map_err(bad)?
    };
    Ok(Opened { end: file.into(), hold: None })
}

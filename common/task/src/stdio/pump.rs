//! Joins a terminal with FIFOs.
//!
//! `splice(2)` moves bytes between a pty and a FIFO inside the kernel: at any moment a byte is in
//! one or the other, so that a killed daemon loses none.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::error::{Error, Result};

const CHUNK: usize = 64 << 10;

/// Makes a descriptor non-blocking and registers it with the runtime.
pub(crate) fn register(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>> {
    let failed = |e: Errno| Error::internal("cannot change a descriptor", e);
    let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFL).map_err(failed)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags)).map_err(failed)?;
    // SAFETY: an OwnedFd always answers the same descriptor and closes it only when dropped.
    unsafe { AsyncFd::register(fd) }
        .map_err(|e| Error::internal("cannot poll a descriptor", std::io::Error::from(e)))
}

fn is_ready(fd: &OwnedFd, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}

/// Moves bytes from `from` to `to` until the end of input or until `to` has no reader.
///
/// # Errors
/// When a descriptor cannot be registered.
pub fn splice(from: OwnedFd, to: OwnedFd) -> Result<JoinHandle<()>> {
    let (from, to) = (register(from)?, register(to)?);
    Ok(tokio::spawn(async move {
        loop {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
            let moved = nix::fcntl::splice(from.get_ref(), None, to.get_ref(), None, CHUNK, flags);
            match moved {
                // End of input; EIO is a pty whose last user has gone.
                Ok(0) | Err(Errno::EIO | Errno::EPIPE) => return,
                Ok(_) => continue,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {}
                Err(e) => {
                    tracing::warn!(fd = from.get_ref().as_raw_fd(), "terminal relay ends: {e}");
                    return;
                }
            }
            // Either there is nothing to read or no room to write: wait for the one that lacks.
            if is_ready(from.get_ref(), PollFlags::POLLIN) {
                let Ok(mut guard) = to.writable().await else { return };
                if !is_ready(to.get_ref(), PollFlags::POLLOUT) {
                    guard.clear_ready();
                }
            } else {
                let Ok(mut guard) = from.readable().await else { return };
                if !is_ready(from.get_ref(), PollFlags::POLLIN) {
                    guard.clear_ready();
                }
            }
        }
    }))
}

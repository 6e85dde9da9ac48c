//! [`kuasar_host::packet`] for tasks: sockets that do not wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kuasar_host::packet::{self, Error};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

/// Sends one packet, when there is room for it.
///
/// # Errors
/// See [`Error`].
pub async fn send<T: Serialize>(
    socket: &AsyncFd<OwnedFd>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    loop {
        let mut ready = socket.writable().await.map_err(|_| Error::Closed)?;
        match packet::send(socket.get_ref().as_fd(), message, fds) {
            Err(Error::Os(nix::Error::EAGAIN)) => ready.clear_ready(),
            sent => return sent,
        }
    }
}

/// Waits for one packet of at most `size` bytes.
///
/// # Errors
/// See [`Error`].
pub async fn receive<T: for<'de> Deserialize<'de>>(
    socket: &AsyncFd<OwnedFd>,
    size: usize,
) -> Result<(T, Vec<OwnedFd>), Error> {
    let mut buffer = vec![0; size];
    loop {
        let mut ready = socket.readable().await.map_err(|_| Error::Closed)?;
        match packet::receive(socket.get_ref().as_fd(), &mut buffer) {
            Err(Error::Os(nix::Error::EAGAIN)) => ready.clear_ready(),
            received => return received,
        }
    }
}

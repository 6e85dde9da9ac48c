//! Port-forwarding into a sandbox with a network stack of its own.
//!
//! gVisor's stack has taken the addresses off the pod's network namespace, and nobody listens in
//! it: a [`kuasar_host::loopback::Gate`] takes the connections to its loopback addresses. The port
//! that was dialled is the connection's local one; the sentry connects it inside and gets one end
//! of a socket pair.
//!
//! sandbox-parent keeps listener and program, so that connections wait while no daemon runs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{SockFlag, SockaddrIn, SockaddrIn6, accept4, getsockname};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;

use crate::sentry::Sentry;

/// Serves forwarded connections until it is aborted; `limit` at the same time.
pub async fn serve(listener: OwnedFd, sentry: Sentry, container: String, limit: usize) {
    // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
    let Ok(listener) = (unsafe { AsyncFd::register(listener) }) else { return };
    let places = Arc::new(Semaphore::new(limit));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let accept = |fd: &OwnedFd| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            accept4(fd.as_raw_fd(), flags).map_err(io::Error::from)
        };
        let fd = match listener.async_io(Interest::READABLE, accept).await {
            // SAFETY: accept4(2) has just answered this descriptor.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => continue,
            Err(error) => {
                tracing::warn!(%error, "forwarded connections are not accepted");
                return;
            }
        };
        let (sentry, container) = (sentry.clone(), container.clone());
        tokio::spawn(async move {
            if let Err(error) = forward(fd, &sentry, &container).await {
                tracing::debug!(%error, "a forwarded connection ended");
            }
            drop(place);
        });
    }
}

fn port_of(fd: &OwnedFd) -> io::Result<u16> {
    if let Ok(address) = getsockname::<SockaddrIn6>(fd.as_raw_fd()) {
        return Ok(address.port());
    }
    Ok(getsockname::<SockaddrIn>(fd.as_raw_fd())?.port())
}

async fn forward(fd: OwnedFd, sentry: &Sentry, container: &str) -> io::Result<()> {
    let port = port_of(&fd)?;
    let mut outside = TcpStream::from_std(std::net::TcpStream::from(fd))?;
    let (mut ours, theirs) = UnixStream::pair()?;
    // The sentry gets a descriptor of its own and waits on it in its own way.
    let theirs = OwnedFd::from(theirs.into_std()?);
    sentry.forward(container, port, theirs.as_fd()).await.map_err(io::Error::other)?;
    drop(theirs);
    tokio::io::copy_bidirectional(&mut outside, &mut ours).await.map(drop)
}

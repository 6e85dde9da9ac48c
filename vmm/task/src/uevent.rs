//! Waiting for devices: the kernel says when one appears (netlink(7), `NETLINK_KOBJECT_UEVENT`),
//! so nobody looks again and again.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use containerd_task::error::{Error, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

/// A subscription.
struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    fn open() -> std::io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let fd = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
        // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
        Ok(Self(unsafe { AsyncFd::register(fd) }.map_err(std::io::Error::from)?))
    }

    /// Waits until something has happened. What it was does not matter: the caller looks itself,
    /// and so an event that was lost in a flood is none that is missed.
    async fn next(&self) -> std::io::Result<()> {
        let mut guard = self.0.readable().await?;
        let mut sink = [0u8; 64];
        loop {
            match recv(self.0.as_raw_fd(), &mut sink, MsgFlags::empty()) {
                Ok(_) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        guard.clear_ready();
        Ok(())
    }
}

/// Answers what `find` does as soon as it answers something.
///
/// # Errors
/// [`Error::DeadlineExceeded`] naming `what`; what `find` answers.
pub async fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut find: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    if let Some(found) = find()? {
        return Ok(found);
    }
    let failed = |error| Error::internal("listen to the kernel's device events", error);
    let events = Uevents::open().map_err(failed)?;
    let found = async {
        loop {
            // After subscribing, so that nothing falls in between.
            if let Some(found) = find()? {
                return Ok(found);
            }
            events.next().await.map_err(failed)?;
        }
    };
    tokio::time::timeout(deadline, found).await.unwrap_or_else(|_| {
        Err(Error::DeadlineExceeded(format!("{what} did not appear within {deadline:?}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_there_is_answered_and_what_never_comes_is_an_error() {
        let soon = Duration::from_millis(50);
        assert_eq!(wait_for("x", soon, || Ok(Some(1))).await.unwrap(), 1);
        let error = wait_for("disk 7", soon, || Ok(None::<()>)).await.unwrap_err();
        assert!(
            matches!(&error, Error::DeadlineExceeded(text) if text.contains("disk 7")),
            "{error}"
        );
        let error = wait_for("x", soon, || Err::<Option<()>, _>(Error::NotFound("n".into()))).await;
        assert!(matches!(error, Err(Error::NotFound(_))));
    }
}

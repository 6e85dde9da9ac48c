//! Packets with descriptors, over a `SOCK_SEQPACKET` socket.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use super::{Answer, Inner, ParentError, Result};
use crate::protocol::{MAX_FDS, MAX_MESSAGE};

impl Inner {
    pub(super) async fn send(&self, data: &[u8], fds: &[RawFd]) -> Result<()> {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        loop {
            let mut guard = self.socket.writable().await.map_err(|_| ParentError::Lost)?;
            let sent = guard.try_io(|s| {
                let control = [ControlMessage::ScmRights(fds)];
                let control: &[_] = if fds.is_empty() { &[] } else { &control };
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                let iov = [io::IoSlice::new(data)];
                sendmsg::<()>(s.as_raw_fd(), &iov, control, flags, None).map_err(io::Error::from)
            });
            match sent {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(e)) if e.raw_os_error() == Some(libc::EMSGSIZE) => {
                    return Err(ParentError::TooLarge);
                }
                Ok(Err(_)) => return Err(ParentError::Lost),
                Err(_would_block) => {}
            }
        }
    }

    pub(super) async fn receive(&self) -> Result<Answer> {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        loop {
            let mut guard = self.socket.readable().await.map_err(|_| ParentError::Lost)?;
            let got = guard.try_io(|s| {
                // Ask for the size first: a buffer of the largest size per event would be waste.
                let peek = (libc::MSG_PEEK | libc::MSG_TRUNC | libc::MSG_DONTWAIT) as libc::c_int;
                // SAFETY: a null buffer of length 0 is allowed.
                let n = unsafe { libc::recv(s.as_raw_fd(), std::ptr::null_mut(), 0, peek) };
                if n < 0 {
                    return Err(io::Error::last_os_error());
                }
                let mut data = vec![0u8; (n as usize).min(MAX_MESSAGE)];
                let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
                let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
                let mut iov = [io::IoSliceMut::new(&mut data)];
                let m = recvmsg::<()>(s.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
                let mut fds = Vec::new();
                for c in m.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(raw) = c {
                        // SAFETY: the kernel has just installed these descriptors for us.
                        fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                Ok((data, fds))
            });
            match got {
                Ok(Ok((data, _))) if data.is_empty() => return Err(ParentError::Lost),
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(_)) => return Err(ParentError::Lost),
                Err(_would_block) => {}
            }
        }
    }
}

/// Connects; a full queue of the listener is waited for.
pub(super) async fn reach(path: &Path, timeout: Duration) -> io::Result<OwnedFd> {
    let end = tokio::time::Instant::now() + timeout;
    loop {
        match connect(path) {
            Err(e)
                if e.kind() == io::ErrorKind::WouldBlock && tokio::time::Instant::now() < end =>
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            other => return other,
        }
    }
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

//! Messages as JSON over sockets that keep their borders (`SOCK_SEQPACKET`), with descriptors beside
//! them: how a process is asked that waits for requests.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

/// Most bytes of one packet.
pub const MAX: usize = 128 << 10;
/// Most descriptors with one packet.
pub const MAX_FDS: usize = 32;

/// Why a packet could not be sent or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system's reason.
    #[error("socket")]
    Os(#[from] nix::Error),
    /// The other end is closed.
    #[error("the other end is closed")]
    Closed,
    /// The other end was closed before it had read what was sent to it.
    #[error("the other end was closed before it had read everything")]
    Unread,
    /// Too many bytes or descriptors, for a packet or for who receives it.
    #[error(
        "a packet has at most {MAX} bytes and {MAX_FDS} descriptors, and less where less is expected"
    )]
    TooLarge,
    /// It cannot be understood.
    #[error("packet")]
    Format(#[from] serde_json::Error),
}

/// Sends one packet.
///
/// # Errors
/// See [`Error`]; `EAGAIN` when the socket does not wait and is full.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX || fds.len() > MAX_FDS {
        return Err(Error::TooLarge);
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let parts = [IoSlice::new(&bytes)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, control, flags, None) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => return Err(Error::Closed),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one packet, no larger than `buffer`, with its descriptors, which are close-on-exec.
///
/// # Errors
/// See [`Error`]; `EAGAIN` when the socket does not wait and has nothing.
pub fn receive<T: for<'de> Deserialize<'de>>(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> Result<(T, Vec<OwnedFd>), Error> {
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut fds = Vec::new();
    let (length, whole) = loop {
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(message) => {
                for part in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(raw) = part {
                        // SAFETY: the kernel has just made these descriptors for us.
                        fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
                break (message.bytes, !message.flags.intersects(cut));
            }
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::ECONNRESET) => return Err(Error::Unread),
            Err(error) => return Err(error.into()),
        }
    };
    if length == 0 {
        return Err(Error::Closed);
    }
    if !whole {
        return Err(Error::TooLarge);
    }
    Ok((serde_json::from_slice(buffer.get(..length).unwrap_or_default())?, fds))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn a_packet_arrives_with_its_descriptors() {
        let (a, b) = pair();
        let (reader, writer) = std::io::pipe().unwrap();
        let words = vec!["create".to_owned(), "c".into()];
        send(a.as_fd(), &words, &[writer.as_fd(), reader.as_fd()]).unwrap();
        let (got, fds) = receive::<Vec<String>>(b.as_fd(), &mut [0; 64]).unwrap();
        assert_eq!((got, fds.len()), (words, 2));
    }

    #[test]
    fn the_other_end_is_known_to_be_closed() {
        let (a, b) = pair();
        drop(a);
        let error = receive::<Vec<String>>(b.as_fd(), &mut [0; 64]).unwrap_err();
        assert!(matches!(error, Error::Closed));
        assert!(matches!(send(b.as_fd(), &"hello", &[]).unwrap_err(), Error::Closed));
        let (a, b) = pair();
        send(a.as_fd(), &"hello", &[]).unwrap();
        drop(b);
        let error = receive::<String>(a.as_fd(), &mut [0; 64]).unwrap_err();
        assert!(matches!(error, Error::Unread), "{error}");
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_sent() {
        let (a, b) = pair();
        assert!(matches!(send(a.as_fd(), &"x".repeat(MAX), &[]).unwrap_err(), Error::TooLarge));
        send(a.as_fd(), &"x".repeat(64), &[]).unwrap();
        let error = receive::<String>(b.as_fd(), &mut [0; 64]).unwrap_err();
        assert!(matches!(error, Error::TooLarge), "{error}");
    }
}

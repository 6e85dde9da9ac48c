//! How the sandboxer asks a warm worker for a process: packets over a pair of sockets.
//!
//! 1. The worker sends one [`Greeting`]: a [`Hello`] when it is warm, or why it cannot be.
//! 2. The sandboxer sends a [`Request`]: arguments, and descriptors beside it. The last descriptor
//!    is the writing end of a pipe; the one before it is what [`Entry`] says, if there is one.
//! 3. The new process writes its pid (four bytes, little endian) to the pipe, and at its end its
//!    exit status (one byte). A pipe that ends earlier is a process that was killed. The process
//!    of a container has no end then: it says 0 when it waits for Start.
//!
//! The worker never answers by itself: it is the only process that must not wait. When the
//! sandboxer's end is closed, it ends.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

/// Most bytes of one packet.
pub const MAX: usize = 128 << 10;
/// Most descriptors with one packet.
pub const MAX_FDS: usize = 32;
/// Variable of the warm process's environment: milliseconds without a request before it makes a spare
/// process. Not an argument: workers of another build start all the same.
pub const SPARE_AFTER: &str = "KUASAR_SPARE_AFTER";
/// The milliseconds, where nobody says.
pub const SPARE_AFTER_MS: u16 = 5;

/// What both ends have to be of: the two programs are installed together.
pub const PROTOCOL: u32 = 2;

/// First words of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`] of the worker.
    #[serde(default)]
    pub protocol: u32,
    /// Engine's name, such as `wasmtime`.
    pub engine: String,
    /// Its version.
    pub version: String,
    /// Stands for the engine's version and everything that compiled code depends on.
    pub settings: String,
}

/// First packet of a worker; the error is for people who install things.
pub type Greeting = std::result::Result<Hello, String>;

/// A process is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Arguments, without the program.
    pub argv: Vec<String>,
    /// Which of its descriptors, from 0 on, come with the packet; the others are `/dev/null`.
    pub given: Vec<bool>,
    /// The process is the container's itself, not one that makes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<Entry>,
}

/// How the process of a container is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its new namespaces: bits of clone(2).
    pub namespaces: i32,
    /// Whether the further descriptor is its cgroup's directory, in which it is from the start.
    /// Otherwise it is a pipe that says when the cgroup is there, which it then enters.
    pub grouped: bool,
}

/// Why a packet could not be sent or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system's reason.
    #[error("socket")]
    Os(#[from] nix::Error),
    /// The other end is closed.
    #[error("the other end is closed")]
    Closed,
    /// Too many bytes or descriptors.
    #[error("a packet has at most {MAX} bytes and {MAX_FDS} descriptors")]
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

/// Receives one packet with its descriptors, which are close-on-exec.
///
/// # Errors
/// See [`Error`]; `EAGAIN` when the socket does not wait and has nothing.
pub fn receive<T: for<'de> Deserialize<'de>>(
    socket: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
) -> Result<(T, Vec<OwnedFd>), Error> {
    buffer.resize(MAX, 0);
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
            Err(nix::Error::ECONNRESET) => return Err(Error::Closed),
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
        let request =
            Request { argv: vec!["create".into()], given: vec![true, false], entry: None };
        send(a.as_fd(), &request, &[writer.as_fd(), reader.as_fd()]).unwrap();
        let (got, fds) = receive::<Request>(b.as_fd(), &mut Vec::new()).unwrap();
        assert_eq!((got, fds.len()), (request, 2));
    }

    #[test]
    fn the_other_end_is_known_to_be_closed() {
        let (a, b) = pair();
        drop(a);
        let error = receive::<Request>(b.as_fd(), &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Error::Closed));
        let (engine, version, settings) = (String::new(), String::new(), String::new());
        let hello = Hello { protocol: PROTOCOL, engine, version, settings };
        assert!(matches!(send(b.as_fd(), &hello, &[]).unwrap_err(), Error::Closed));
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_sent() {
        let (a, _b) = pair();
        let request = Request { argv: vec!["x".repeat(MAX)], given: Vec::new(), entry: None };
        assert!(matches!(send(a.as_fd(), &request, &[]).unwrap_err(), Error::TooLarge));
    }
}

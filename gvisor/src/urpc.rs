//! gVisor's control protocol, as far as a client needs it.
//!
//! A sentry listens on a stream socket. A call is one JSON object, `{"method", "arg"}`, an answer
//! another one, `{"success", "err", "result"}`; nothing frames them but JSON itself. Descriptors
//! go beside the first byte of a call. One connection carries one call at a time: the server
//! reads ahead, so that a second call sent before the first is answered may be lost.
//!
//! Facts from gVisor's `pkg/urpc` and `runsc/boot/controller.go`, the same from release 20240729
//! to release 20260817.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg,
    socket,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Longest answer that is read, in bytes: a sentry is not trusted.
const MAX_ANSWER: usize = 1 << 20;
/// How often a full queue of the sentry's socket is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// Why a call was not answered with success.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is no sentry (any more).
    #[error("the sandbox has ended")]
    Gone,
    /// The sentry refused; its words, cleaned.
    #[error("{0}")]
    Refused(String),
    /// It did not answer in time.
    #[error("the sandbox did not answer within {0:?}")]
    Late(Duration),
    /// What came is no answer.
    #[error("the sandbox answered with something that is no answer: {0}")]
    Garbled(String),
    /// The socket failed.
    #[error("talk to the sandbox")]
    Io(#[from] io::Error),
}

#[derive(Serialize)]
struct Call<'a, A> {
    method: &'a str,
    arg: A,
}

#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    success: bool,
    #[serde(default)]
    err: String,
    #[serde(default)]
    result: Value,
}

/// A connection to a sentry.
#[derive(Debug)]
pub struct Connection(AsyncFd<OwnedFd>);

impl Connection {
    /// Connects. A queue that is full is waited for, at most `limit`.
    ///
    /// # Errors
    /// [`CallError::Gone`] when nobody listens.
    pub async fn dial(path: &Path, limit: Duration) -> Result<Self, CallError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd =
            socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(io::Error::from)?;
        let address = UnixAddr::new(path).map_err(io::Error::from)?;
        let dial = async {
            loop {
                match connect(fd.as_raw_fd(), &address) {
                    Ok(()) => return Ok(()),
                    Err(nix::Error::EAGAIN) => tokio::time::sleep(RETRY).await,
                    Err(nix::Error::ECONNREFUSED | nix::Error::ENOENT) => {
                        return Err(CallError::Gone);
                    }
                    Err(error) => return Err(io::Error::from(error).into()),
                }
            }
        };
        tokio::time::timeout(limit, dial).await.map_err(|_| CallError::Late(limit))??;
        Self::from_fd(fd)
    }

    /// Takes a connection up again.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, CallError> {
        // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
        let fd = unsafe { AsyncFd::register(fd) }.map_err(|error| {
            let (_, error) = error.into_parts();
            error
        })?;
        Ok(Self(fd))
    }

    /// Its descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }

    /// Sends a call.
    ///
    /// # Errors
    /// [`CallError::Gone`] when the sentry has ended.
    pub async fn send(
        &self,
        method: &str,
        arg: impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), CallError> {
        let text = serde_json::to_vec(&Call { method, arg })
            .map_err(|error| CallError::Garbled(error.to_string()))?;
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut sent = 0;
        while sent < text.len() {
            let rest = text.get(sent..).unwrap_or_default();
            let control = [ControlMessage::ScmRights(&raw)];
            let control = if sent == 0 && !raw.is_empty() { &control[..] } else { &[] };
            let write = |fd: &OwnedFd| {
                let parts = [io::IoSlice::new(rest)];
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                sendmsg::<()>(fd.as_raw_fd(), &parts, control, flags, None).map_err(io::Error::from)
            };
            sent += self.0.async_io(Interest::WRITABLE, write).await.map_err(gone)?;
        }
        Ok(())
    }

    /// Waits for the answer to the call that was sent and takes it off the socket.
    ///
    /// # Errors
    /// [`CallError::Refused`] when the sentry did not do it.
    pub async fn receive(&self) -> Result<Value, CallError> {
        let answer = self.answer(true).await?;
        Ok(answer)
    }

    /// Waits for the answer, which stays in the socket: whoever takes the descriptor up after us
    /// finds it again.
    ///
    /// # Errors
    /// As [`Connection::receive`].
    pub async fn peek(&self) -> Result<Value, CallError> {
        self.answer(false).await
    }

    async fn answer(&self, take: bool) -> Result<Value, CallError> {
        let mut buffer = vec![0; 512];
        let mut filled = 0;
        loop {
            // A peek always starts at the first byte; taking goes on where it was.
            let from = if take { filled } else { 0 };
            let known = filled;
            let read = |fd: &OwnedFd| {
                let flags = MsgFlags::MSG_DONTWAIT
                    | if take { MsgFlags::empty() } else { MsgFlags::MSG_PEEK };
                let space = buffer.get_mut(from..).unwrap_or_default();
                let n = recv(fd.as_raw_fd(), space, flags).map_err(io::Error::from)?;
                // Nothing new since the last look: wait for the next.
                if !take && n != 0 && n == known {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(n)
            };
            let n = self.0.async_io(Interest::READABLE, read).await.map_err(gone)?;
            if n == 0 {
                return Err(CallError::Gone);
            }
            filled = from + n;
            let seen = buffer.get(..filled).unwrap_or_default();
            match serde_json::Deserializer::from_slice(seen).into_iter::<Answer>().next() {
                Some(Ok(answer)) if answer.success => return Ok(answer.result),
                Some(Ok(answer)) => return Err(CallError::Refused(clean(&answer.err))),
                Some(Err(error)) if !error.is_eof() => {
                    return Err(CallError::Garbled(clean(&error.to_string())));
                }
                _ => {}
            }
            if filled == buffer.len() {
                if filled >= MAX_ANSWER {
                    return Err(CallError::Garbled(format!("more than {MAX_ANSWER} bytes")));
                }
                buffer.resize(filled * 2, 0);
            }
        }
    }
}

fn gone(error: io::Error) -> CallError {
    match error.kind() {
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::NotConnected => CallError::Gone,
        _ => CallError::Io(error),
    }
}

/// Words of a sentry for a log or an error: one line, bounded.
pub fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(1000).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    async fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Connection::from_fd(ours.into()).unwrap(), theirs)
    }

    #[tokio::test]
    async fn a_call_is_one_json_object_and_so_is_its_answer() {
        let (ours, mut theirs) = pair().await;
        ours.send("containerManager.Wait", "c1", &[]).await.unwrap();
        let mut text = [0; 100];
        let n = theirs.read(&mut text).unwrap();
        assert_eq!(&text[..n], br#"{"method":"containerManager.Wait","arg":"c1"}"#);
        theirs.write_all(br#"{"success":true,"err":"","result":256}"#).unwrap();
        assert_eq!(ours.receive().await.unwrap(), 256);
        theirs.write_all(br#"{"success":false,"err":"no\nway","result":null}"#).unwrap();
        let error = ours.receive().await.unwrap_err();
        assert!(matches!(error, CallError::Refused(text) if text == "noway"));
        drop(theirs);
        assert!(matches!(ours.receive().await, Err(CallError::Gone)));
    }

    #[tokio::test]
    async fn an_answer_in_parts_is_peeked_at_whole_and_is_still_there_for_the_next() {
        let (ours, mut theirs) = pair().await;
        theirs.write_all(br#"{"success":true,"er"#).unwrap();
        let second = ours.as_fd().try_clone_to_owned().unwrap();
        let looks = tokio::spawn(async move { ours.peek().await });
        tokio::task::yield_now().await;
        theirs.write_all(br#"r":"","result":7}"#).unwrap();
        assert_eq!(tokio::time::timeout(LIMIT, looks).await.unwrap().unwrap().unwrap(), 7);
        // The first one is gone, as with a daemon that was killed.
        let again = Connection::from_fd(second).unwrap();
        assert_eq!(again.peek().await.unwrap(), 7);
        assert_eq!(again.receive().await.unwrap(), 7);
    }

    #[tokio::test]
    async fn an_answer_without_end_and_rubbish_are_refused() {
        let (ours, mut theirs) = pair().await;
        theirs.write_all(b"rubbish").unwrap();
        assert!(matches!(ours.receive().await, Err(CallError::Garbled(_))));
        let (ours, mut theirs) = pair().await;
        let writer = std::thread::spawn(move || {
            let _ = theirs.write_all(br#"{"success":true,"err":""#);
            let _ = theirs.write_all(&vec![b'a'; 2 * MAX_ANSWER]);
        });
        assert!(matches!(ours.receive().await, Err(CallError::Garbled(_))));
        drop(ours);
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn nobody_at_the_socket_is_a_sandbox_that_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(matches!(Connection::dial(&path, LIMIT).await, Err(CallError::Gone)));
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(Connection::dial(&path, LIMIT).await, Err(CallError::Gone)));
    }
}

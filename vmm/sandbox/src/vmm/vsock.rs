//! Hybrid vsock: AF_VSOCK of a guest as unix sockets of the host, the way Firecracker made it up
//! and Cloud Hypervisor and `vhost-device-vsock` took it over.
//!
//! The host dials the socket `<uds>`, writes `CONNECT <port>\n` and reads `OK <n>\n`; from then on
//! it is the stream. What a guest dials to context id 2, port p arrives at `<uds>_<p>`.
//!
//! Nobody dials a guest before it has said that it listens: with `vhost-device-vsock` a refused
//! connection can wedge the device for good (measured).

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::error::{Doing, Error, Result};

/// Longest answer to `CONNECT`: `OK ` and ten digits.
const ANSWER: usize = 14;

/// Where the guest's connections to `port` arrive.
pub fn port_path(uds: &Path, port: u32) -> PathBuf {
    let mut name = uds.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}

/// Makes the directory of a channel's sockets: for `owner` alone, who makes `<uds>` there and dials
/// the sockets of the guest's ports. [`bind`] and the drivers call it; calling it again does no
/// harm.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] when somebody else owns it or it is no directory.
pub fn prepare(uds: &Path, owner: Option<(u32, u32)>) -> Result<()> {
    let dir = uds.parent().filter(|dir| dir.is_absolute()).ok_or_else(|| {
        Error::Invalid(format!("{} is no absolute path of a socket", uds.display()))
    })?;
    let Some((uid, gid)) = owner else {
        return Ok(kuasar_host::record::private_dir(dir)?);
    };
    let there = std::fs::symlink_metadata(dir);
    if !there.is_ok_and(|meta| meta.is_dir() && meta.uid() == uid) {
        kuasar_host::record::private_dir(dir)?;
    }
    std::os::unix::fs::lchown(dir, Some(uid), Some(gid))
        .doing(|| format!("give {} to user {uid}", dir.display()))
}

/// Listens for what the guest dials to `port`. Bind before the machine starts. `owner` is who has
/// to be able to connect, see [`super::Launcher::owner`].
///
/// # Errors
/// [`Error::Io`].
pub fn bind(uds: &Path, port: u32, owner: Option<(u32, u32)>) -> Result<UnixListener> {
    prepare(uds, owner)?;
    let path = port_path(uds, port);
    let fd = private(&path, owner)?;
    let listener = std::os::unix::net::UnixListener::from(fd);
    UnixListener::from_std(listener).doing(|| format!("listen at {}", path.display()))
}

/// A listening socket that only its owner can reach.
pub(crate) fn private(path: &Path, owner: Option<(u32, u32)>) -> Result<OwnedFd> {
    let fd = kuasar_host::socket::bind_private(path)
        .doing(|| format!("make the socket {}", path.display()))?;
    if let Some((uid, gid)) = owner {
        // The directory is ours or the jailed helper's; a link in place of the socket is not
        // followed.
        std::os::unix::fs::lchown(path, Some(uid), Some(gid))
            .doing(|| format!("give {} to user {uid}", path.display()))?;
    }
    Ok(fd)
}

/// Dials `port` of the guest.
///
/// # Errors
/// [`Error::Deadline`]; [`Error::Io`] with `ConnectionReset` when nobody listens there.
pub async fn dial(uds: &Path, port: u32, limit: Duration) -> Result<UnixStream> {
    let what = || format!("dial port {port} of the guest through {}", uds.display());
    match tokio::time::timeout(limit, connect(uds, port)).await {
        Ok(stream) => stream.doing(what),
        Err(_) => Err(Error::Deadline { what: what(), limit }),
    }
}

async fn connect(uds: &Path, port: u32) -> std::io::Result<UnixStream> {
    use std::io::{Error, ErrorKind};
    let mut stream = UnixStream::connect(uds).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // Byte by byte: what follows the line is the guest's and must not be swallowed here.
    let mut line = Vec::with_capacity(ANSWER);
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) if line.len() < ANSWER => line.push(byte),
            Ok(_) => return Err(Error::new(ErrorKind::InvalidData, "the answer is too long")),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                return Err(Error::new(ErrorKind::ConnectionReset, "nobody listens there"));
            }
            Err(e) => return Err(e),
        }
    }
    let good = line
        .strip_prefix(b"OK ")
        .is_some_and(|n| !n.is_empty() && n.iter().all(u8::is_ascii_digit));
    if good { Ok(stream) } else { Err(Error::new(ErrorKind::InvalidData, "the answer is not OK")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answered(answer: &'static [u8]) -> Result<UnixStream> {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("v");
        let listener = UnixListener::bind(&uds).unwrap();
        tokio::spawn(async move {
            let (mut peer, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            peer.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            peer.write_all(answer).await.unwrap();
            // Held open for the unanswered case.
            tokio::time::sleep(Duration::from_secs(5)).await;
        });
        dial(&uds, 1024, Duration::from_millis(200)).await
    }

    #[tokio::test]
    async fn the_guests_first_bytes_are_not_swallowed_with_the_answer() {
        let mut stream = answered(b"OK 1073741824\nhello").await.unwrap();
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"hello");
    }

    #[tokio::test]
    async fn a_bad_endless_or_missing_answer_is_an_error() {
        for answer in [&b"NO\n"[..], b"OK \n", b"OK 12x\n", b"OK 99999999999999999999999\n"] {
            assert!(matches!(answered(answer).await, Err(Error::Io { .. })), "{answer:?}");
        }
        assert!(matches!(answered(b"OK 1").await, Err(Error::Deadline { .. })));
    }
}

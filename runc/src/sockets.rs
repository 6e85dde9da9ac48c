//! The pods' task sockets: sandbox-parent owns them, and hands every connection over.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_sandbox::{Endpoints, PodSockets};
use sandbox_parent::client::{Connections, Parent, ParentError};

use crate::sandboxer::RuncSandboxer;

/// How long a new connection may say nothing.
const HELLO: Duration = Duration::from_secs(30);

/// [`PodSockets`] by sandbox-parent.
pub struct ParentSockets {
    parent: Parent,
    fresh: bool,
}

impl ParentSockets {
    /// `fresh`: it was started by this daemon, and holds no socket of an earlier one.
    pub fn new(parent: Parent, fresh: bool) -> Self {
        Self { parent, fresh }
    }
}

fn error(error: ParentError) -> io::Error {
    match error.failure() {
        Some((errno, _)) => io::Error::from_raw_os_error(errno),
        None => io::Error::other(error),
    }
}

#[async_trait]
impl PodSockets for ParentSockets {
    async fn listen(&self, pod: &str, listener: OwnedFd) -> io::Result<()> {
        self.parent.listen(pod, listener.as_fd()).await.map_err(error)
    }

    async fn unlisten(&self, pod: &str) -> io::Result<()> {
        match self.parent.unlisten(pod).await.map_err(error) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    async fn is_listening(&self, _pod: &str) -> io::Result<bool> {
        Ok(!self.fresh)
    }

    async fn retain(&self, _known: &[String]) -> io::Result<()> {
        Ok(())
    }

    async fn ready(&self) -> io::Result<()> {
        self.parent.ready().await.map_err(error)
    }
}

/// Passes connections on until sandbox-parent is gone: stdio streams to the pod's Task server,
/// which reads them with its own framing, everything else to the pod's ttrpc server.
pub async fn pump(mut connections: Connections, endpoints: Endpoints, sandboxer: Arc<RuncSandboxer>) {
    while let Some(connection) = connections.recv().await {
        let (endpoints, sandboxer) = (endpoints.clone(), sandboxer.clone());
        tokio::spawn(async move {
            let pod = connection.pod;
            match sandboxer.tasks(&pod) {
                Some(tasks) => match is_stdio(connection.stream).await {
                    Ok((stream, true)) => tasks.0.connection(stream).await,
                    Ok((stream, false)) => match stream.into_std() {
                        Ok(stream) => endpoints.connection(&pod, stream),
                        Err(error) => tracing::debug!(sandbox = pod, %error, "a connection was lost"),
                    },
                    Err(error) => tracing::debug!(sandbox = pod, %error, "a connection said nothing"),
                },
                None => endpoints.connection(&pod, connection.stream),
            }
        });
    }
}

/// Looks at the first request without taking it.
async fn is_stdio(stream: UnixStream) -> io::Result<(tokio::net::UnixStream, bool)> {
    stream.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    let mut first = [0u8; 64];
    let count = tokio::time::timeout(HELLO, async {
        loop {
            stream.readable().await?;
            let peek = stream.try_io(tokio::io::Interest::READABLE, || {
                let (at, len) = (first.as_mut_ptr().cast(), first.len());
                // SAFETY: pointer and length describe `first`.
                let count = unsafe { libc::recv(stream.as_raw_fd(), at, len, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
                usize::try_from(count).map_err(|_| io::Error::last_os_error())
            });
            match peek {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    })
    .await
    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    // Header of ten bytes, then field 1 of the request: the service's name.
    let seen = first.get(..count).unwrap_or_default();
    let name = b"containerd.services.streaming";
    Ok((stream, seen.windows(name.len()).any(|window| window == name)))
}

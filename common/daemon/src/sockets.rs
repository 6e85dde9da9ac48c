//! Sockets that sandbox-parent keeps while no daemon runs: the pods', and the daemon's own.
//!
//! sandbox-parent accepts on the pods' sockets itself and hands every connection over ([`pump`]).
//! On the daemon's own socket only the daemon accepts; its descriptor is kept all the same, so
//! that an engine that dials while a daemon is being restarted waits for the next one instead of
//! being refused. (A gRPC client that is refused backs off for seconds.)

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_sandbox::{Endpoints, PodSockets};
use sandbox_parent::client::{Connections, Parent, ParentError};

use crate::tasks::TaskServers;

/// Name of the daemon's own listening socket at sandbox-parent. No sandbox's id begins with a dot.
const OWN: &str = ".daemon/listener";
/// First part of the names of what sandbox-parent keeps for the daemon itself.
pub const OWN_GROUP: &str = ".daemon";

/// [`PodSockets`] by sandbox-parent.
pub struct ParentSockets {
    parent: Parent,
    /// Pods whose sockets it held when this daemon came.
    held: Vec<String>,
}

impl ParentSockets {
    /// Asks it which pods it knows.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn new(parent: Parent) -> Result<Self, ParentError> {
        let held = parent.pods().await?;
        Ok(Self { parent, held })
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

    async fn is_listening(&self, pod: &str) -> io::Result<bool> {
        Ok(self.held.iter().any(|held| held == pod))
    }

    async fn retain(&self, known: &[String]) -> io::Result<()> {
        for pod in self.held.iter().filter(|held| !known.contains(held)) {
            tracing::info!(sandbox = pod, "giving up the socket of a pod that nobody knows");
            self.unlisten(pod).await?;
        }
        Ok(())
    }

    async fn ready(&self) -> io::Result<()> {
        self.parent.ready().await.map_err(error)
    }
}

/// The daemon's own socket: the one that sandbox-parent has kept for this path, or a new one.
///
/// # Errors
/// `AddrInUse` when somebody else serves this path, or a file is there.
pub async fn own(parent: &Parent, path: &Path) -> io::Result<tokio::net::UnixListener> {
    let kept = parent.fetch(OWN).await.map_err(error)?;
    let listener = match kept.filter(|kept| kuasar_host::socket::listens_at(kept, path)) {
        Some(kept) => {
            tracing::debug!(path = %path.display(), "the socket was kept");
            kept
        }
        None => {
            // One that was kept for another path must not answer for us any more.
            give_up(parent).await;
            if kuasar_host::socket::is_served(path)? {
                let problem = crate::diagnosis::served_by_another(path);
                return Err(io::Error::new(io::ErrorKind::AddrInUse, problem.to_string()));
            }
            if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
                use std::os::unix::fs::DirBuilderExt;
                std::fs::DirBuilder::new().mode(0o700).recursive(true).create(dir)?;
            }
            let new = kuasar_host::socket::bind_private(path)?;
            parent.keep(OWN, new.as_fd()).await.map_err(error)?;
            new
        }
    };
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

/// Has sandbox-parent forget the daemon's own socket: from now on clients are refused.
pub async fn give_up(parent: &Parent) {
    // A parent that does not answer keeps nothing either.
    let _ = parent.forget(OWN).await;
}

/// Passes connections on until sandbox-parent is gone: stdio streams to the pod's Task server,
/// which reads them with its own framing, everything else to the pod's ttrpc server.
pub async fn pump(
    mut connections: Connections,
    endpoints: Endpoints,
    servers: Arc<TaskServers>,
    hello: Duration,
) {
    while let Some(connection) = connections.recv().await {
        let (endpoints, servers) = (endpoints.clone(), servers.clone());
        tokio::spawn(async move {
            let pod = connection.pod;
            let Some(tasks) = servers.get(&pod) else {
                return endpoints.connection(&pod, connection.stream);
            };
            match is_stdio(connection.stream, hello).await {
                Ok((stream, true)) => tasks.server().connection(stream).await,
                Ok((stream, false)) => match stream.into_std() {
                    Ok(stream) => endpoints.connection(&pod, stream),
                    Err(error) => tracing::debug!(sandbox = pod, %error, "a connection was lost"),
                },
                Err(error) => tracing::debug!(sandbox = pod, %error, "a connection said nothing"),
            }
        });
    }
}

/// Looks at the first request without taking it.
async fn is_stdio(
    stream: UnixStream,
    hello: Duration,
) -> io::Result<(tokio::net::UnixStream, bool)> {
    stream.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    let mut first = [0u8; 64];
    let count = tokio::time::timeout(hello, async {
        loop {
            stream.readable().await?;
            let peek = stream.try_io(tokio::io::Interest::READABLE, || {
                let (at, len) = (first.as_mut_ptr().cast(), first.len());
                let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
                // SAFETY: pointer and length describe `first`.
                let count = unsafe { libc::recv(stream.as_raw_fd(), at, len, flags) };
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

//! Port-forward: a stream of the host joined with a port of the pod's loopback interface.
//!
//! `Guest.Forward` names a port; the stream that the host then dials under the call's id is
//! joined with a connection to it. A call that no stream follows is forgotten.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use containerd_task::error::{Error, Result};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::channel::Stream;
use crate::limits;

/// Calls that wait for their stream.
pub struct Forwards {
    waiting: Mutex<HashMap<String, (u16, Instant)>>,
    slots: Arc<Semaphore>,
}

impl Default for Forwards {
    fn default() -> Self {
        Self { waiting: Mutex::default(), slots: Arc::new(Semaphore::new(limits::FORWARDS)) }
    }
}

impl Forwards {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (u16, Instant)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream with this id may come for this port.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], [`Error::AlreadyExists`], [`Error::ResourceExhausted`].
    pub fn expect(&self, id: &str, port: u32) -> Result<()> {
        let port = u16::try_from(port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| Error::InvalidArgument("there is no such port".into()))?;
        if id.is_empty() || id.len() > 128 || id.contains(['/', ' ', '\n']) {
            return Err(Error::InvalidArgument("the forward's id is no plain word".into()));
        }
        let mut waiting = self.lock();
        waiting.retain(|_, (_, since)| since.elapsed() < limits::FORWARD_TIME);
        if waiting.contains_key(id) {
            return Err(Error::AlreadyExists(format!("forward {id} waits for its stream")));
        }
        if waiting.len() >= limits::FORWARDS {
            return Err(Error::ResourceExhausted("too many forwards wait for streams".into()));
        }
        waiting.insert(id.into(), (port, Instant::now()));
        Ok(())
    }

    /// Connects to the port of the call with this id. IPv4 first, as containerd does.
    ///
    /// # Errors
    /// [`Error::NotFound`] without such a call, [`Error::Unavailable`] when nobody listens.
    pub async fn connect(&self, id: &str) -> Result<(OwnedSemaphorePermit, TcpStream)> {
        let (port, _) = self
            .lock()
            .remove(id)
            .ok_or_else(|| Error::NotFound("no forward waits for this stream".into()))?;
        let slot = self
            .slots
            .clone()
            .try_acquire_owned()
            .map_err(|_| Error::ResourceExhausted("too many ports are forwarded".into()))?;
        let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
        let dial = async {
            match TcpStream::connect(v4).await {
                Ok(stream) => Ok(stream),
                Err(error) => TcpStream::connect(v6).await.map_err(|_| error),
            }
        };
        match tokio::time::timeout(limits::GREETING_TIME, dial).await {
            Ok(Ok(stream)) => Ok((slot, stream)),
            Ok(Err(error)) => Err(Error::Unavailable(format!("port {port} of the pod: {error}"))),
            Err(_) => Err(Error::Unavailable(format!("port {port} of the pod does not answer"))),
        }
    }
}

/// Copies both ways until the pod's side has ended. The host's end is passed on as a half-close;
/// the pod's closes the whole stream, since a vsock that ends in a unix socket passes no half of
/// it on and the host would wait for ever.
pub async fn join(slot: OwnedSemaphorePermit, stream: impl Stream, socket: TcpStream) {
    // The buffers of `copy` are half of what may be written to a vsock device at once.
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let (mut from_pod, mut to_pod) = socket.into_split();
    let inwards = async {
        let copied = tokio::io::copy(&mut from_host, &mut to_pod).await;
        let _ = to_pod.shutdown().await;
        if copied.is_ok() {
            // The answer may still come.
            std::future::pending::<()>().await;
        }
    };
    let outwards = async {
        let _ = tokio::io::copy(&mut from_pod, &mut to_host).await;
        let _ = to_host.shutdown().await;
    };
    tokio::select! {
        () = inwards => {}
        () = outwards => {}
    }
    drop(slot);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, UnixStream};

    #[tokio::test]
    async fn a_stream_reaches_the_port_that_was_named() {
        let forwards = Forwards::default();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address).await else {
                eprintln!("skipped: no {address}");
                continue;
            };
            let port = u32::from(listener.local_addr().unwrap().port());
            forwards.expect("f1", port).unwrap();
            assert!(matches!(forwards.expect("f1", port), Err(Error::AlreadyExists(_))));
            let (slot, socket) = forwards.connect("f1").await.unwrap();
            assert!(matches!(forwards.connect("f1").await, Err(Error::NotFound(_))));
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            tokio::spawn(join(slot, ours, socket));
            let (mut server, _) = listener.accept().await.unwrap();
            theirs.write_all(b"ping").await.unwrap();
            theirs.shutdown().await.unwrap();
            let mut text = String::new();
            server.read_to_string(&mut text).await.unwrap();
            server.write_all(b"pong").await.unwrap();
            drop(server);
            theirs.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "pingpong");
        }
    }

    #[tokio::test]
    async fn wrong_ports_and_nobody_listening_are_errors() {
        let forwards = Forwards::default();
        for (id, port) in [("a", 0), ("a", 65_536), ("", 80), ("a/b", 80)] {
            assert!(matches!(forwards.expect(id, port), Err(Error::InvalidArgument(_))));
        }
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        forwards.expect("f", u32::from(free)).unwrap();
        assert!(matches!(forwards.connect("f").await, Err(Error::Unavailable(_))));
        for n in 0..limits::FORWARDS {
            forwards.expect(&format!("w{n}"), 1).unwrap();
        }
        assert!(matches!(forwards.expect("one-more", 1), Err(Error::ResourceExhausted(_))));
    }
}

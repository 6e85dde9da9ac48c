//! One unix socket for gRPC and ttrpc.
//!
//! The first byte tells which: an HTTP/2 connection begins with `PRI * HTTP/2.0`, and a ttrpc
//! frame with its length, at most 4 MiB and thus 0 in its highest byte. It is peeked at, so both
//! servers read the stream from its beginning. Whoever says neither, or nothing in time, is
//! dropped; so is every connection over the limit.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kuasar_ttrpc::Services;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::controller::Controller;
use crate::endpoint::PodSockets;
use crate::error::{Error, Result};
use crate::options::ControllerOptions;
use crate::sandboxer::Sandboxer;
use crate::{grpc, open, ttrpc_service};

/// Recovers, listens, calls `on_ready`, and serves until `shutdown` becomes true (or its sender
/// is dropped). For a daemon that needs [`Controller::endpoints`] before, see
/// [`Controller::serve`].
///
/// # Errors
/// When the state directory or the socket cannot be used.
pub async fn serve(
    options: ControllerOptions,
    sandboxer: Arc<dyn Sandboxer>,
    sockets: Arc<dyn PodSockets>,
    on_ready: impl FnOnce(),
    shutdown: watch::Receiver<bool>,
) -> Result<()> {
    Controller::new(options, sandboxer, sockets)?.serve(on_ready, shutdown).await
}

impl Controller {
    /// Recovers, listens on `options.socket`, calls `on_ready`, and serves until `shutdown`.
    ///
    /// # Errors
    /// When the state directory or the socket cannot be used.
    pub async fn serve(
        &self,
        on_ready: impl FnOnce(),
        shutdown: watch::Receiver<bool>,
    ) -> Result<()> {
        // Nobody may dial before everything is recovered: an engine that finds a sandbox unknown
        // takes it for dead.
        self.recover().await?;
        let path = &self.core.options.socket;
        let failed = |e| Error::internal(format!("cannot listen on {}", path.display()), e);
        let bound = kuasar_host::socket::bind_private(path).map_err(failed)?;
        let listener = std::os::unix::net::UnixListener::from(bound);
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        on_ready();
        self.serve_on(listener, shutdown).await;
        Ok(())
    }

    /// Serves on a listener that somebody else made, after [`Controller::recover`].
    pub async fn serve_on(&self, listener: UnixListener, shutdown: watch::Receiver<bool>) {
        self.serve_with(listener, Services::default(), shutdown).await;
    }

    /// The same with further ttrpc services beside those of this crate.
    pub async fn serve_with(
        &self,
        listener: UnixListener,
        more: Services,
        mut shutdown: watch::Receiver<bool>,
    ) {
        let (cut, _) = watch::channel(false);
        let slots = Arc::new(Semaphore::new(self.core.options.max_connections));
        let ttrpc =
            ttrpc_service::services(self.clone()).and(open::services(self.clone())).and(more);
        let options = &self.core.options;
        let period = options.open_timeout.min(options.unstarted_timeout).min(TICK);
        // A timeout of nothing is allowed; a period of nothing is not.
        let period = period.max(std::time::Duration::from_millis(1));
        let mut tick = tokio::time::interval(period);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let stream = tokio::select! {
                biased;
                () = turned_on(&mut shutdown) => break,
                _ = tick.tick() => {
                    let controller = self.clone();
                    tokio::spawn(async move { controller.collect().await });
                    continue;
                }
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(e) => {
                        // Out of descriptors: let some be closed first.
                        tracing::error!("cannot accept a connection: {e}");
                        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                tracing::warn!("too many connections: one was refused");
                continue;
            };
            let connection = Connection {
                controller: self.clone(),
                stream,
                _slot: slot,
                ttrpc: ttrpc.clone(),
                cut: cut.subscribe(),
            };
            tokio::spawn(connection.serve());
        }
        // First cut, so that nothing that ends now looks like an answer; then let operations end.
        drop(listener);
        cut.send_replace(true);
        self.core.endpoints.cut_all();
        self.drain().await;
    }
}

/// Waits until a switch is on; one that is gone counts as on.
pub(crate) async fn turned_on(switch: &mut watch::Receiver<bool>) {
    drop(switch.wait_for(|on| *on).await);
}

/// Most time between two looks for what nobody came back for.
const TICK: std::time::Duration = std::time::Duration::from_secs(30);

struct Connection {
    controller: Controller,
    stream: UnixStream,
    /// Its place among the connections.
    _slot: OwnedSemaphorePermit,
    ttrpc: Services,
    cut: watch::Receiver<bool>,
}

impl Connection {
    async fn serve(mut self) {
        let options = &self.controller.core.options;
        match self.stream.peer_cred() {
            Ok(peer) if may_connect(options, &peer) => {}
            Ok(peer) => {
                let (uid, pid) = (peer.uid(), peer.pid());
                return tracing::warn!(uid, pid, "a client without permission was refused");
            }
            Err(e) => return tracing::warn!("a client without credentials was refused: {e}"),
        }
        let first = tokio::select! {
            first = first_byte(&self.stream) => first,
            () = tokio::time::sleep(options.hello_timeout) => None,
            () = turned_on(&mut self.cut) => None,
        };
        match first {
            Some(b'P') => {
                let mut cut = self.cut;
                tokio::select! {
                    // Dropping the connection is abrupt on purpose: an orderly HTTP/2 end would
                    // reset each Wait, which engines read as its answer.
                    () = turned_on(&mut cut) => {}
                    ended = grpc::serve(self.controller, self.stream) => {
                        if let Err(e) = ended {
                            tracing::debug!("a gRPC connection ended: {e}");
                        }
                    }
                }
            }
            Some(0) => {
                let mut cut = self.cut;
                let cut = async move { turned_on(&mut cut).await };
                Box::pin(kuasar_ttrpc::serve(self.stream, self.ttrpc, cut)).await;
            }
            Some(_) => tracing::warn!("a client spoke neither gRPC nor ttrpc and was dropped"),
            None => tracing::debug!("a client said nothing and was dropped"),
        }
    }
}

fn may_connect(options: &ControllerOptions, peer: &tokio::net::unix::UCred) -> bool {
    match &options.peer_check {
        Some(check) => check(peer),
        None => peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw(),
    }
}

/// The first byte, left where it is; nothing at the end of the stream.
async fn first_byte(stream: &UnixStream) -> Option<u8> {
    use nix::sys::socket::{MsgFlags, recv};
    let mut byte = [0u8; 1];
    let peek = || {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(stream.as_raw_fd(), &mut byte, flags).map_err(std::io::Error::from)
    };
    let n = stream.async_io(Interest::READABLE, peek).await.ok()?;
    (n == 1).then(|| byte[0])
}

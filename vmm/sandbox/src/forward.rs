//! Port-forward: connections to the loopback addresses of the pod's network namespace
//! ([`kuasar_host::loopback`]) go to the guest, where the programs are.
//!
//! While no daemon runs, connections are refused, as they are for a program that has ended; those
//! under way end with the daemon.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kuasar_host::loopback::Gate;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use vmm_common::guest as wire;
use vmm_common::handshake::StreamKind;

use crate::guest::{Guest, GuestError, service};

/// Forwarded connections of a pod at the same time.
const MAX: usize = 256;

/// Begins to forward; ends when the task is aborted.
///
/// # Errors
/// On a kernel without `sk_lookup` programs, or without the right to load them.
pub fn start(netns: BorrowedFd<'_>, guest: Arc<Guest>) -> io::Result<tokio::task::JoinHandle<()>> {
    let Gate { listener, link } = Gate::open(netns)?;
    let listener = TcpListener::from_std(std::net::TcpListener::from(listener))?;
    Ok(tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(MAX));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { break };
            let Ok((stream, _)) = listener.accept().await else { continue };
            let guest = guest.clone();
            tokio::spawn(async move {
                if let Err(error) = forward(&guest, stream).await {
                    tracing::debug!(%error, "a forwarded connection");
                }
                drop(slot);
            });
        }
        drop(link);
    }))
}

async fn forward(guest: &Guest, mut stream: TcpStream) -> crate::guest::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let broken = |error: io::Error| GuestError::Broken(error.to_string());
    let port = stream.local_addr().map_err(broken)?.port();
    let id = format!("forward-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    let question = wire::ForwardRequest {
        id: id.clone(),
        port: u32::from(port),
        ..wire::ForwardRequest::default()
    };
    let _: wire::ForwardResponse = guest.call(service::GUEST, "Forward", &question).await?;
    let other = guest.stream(&id, "", StreamKind::Forward).await?;
    let other = std::os::unix::net::UnixStream::from(other);
    let mut other = tokio::net::UnixStream::from_std(other).map_err(broken)?;
    tokio::select! {
        () = guest.gone() => {}
        done = tokio::io::copy_bidirectional(&mut stream, &mut other) => drop(done.map_err(broken)?),
    }
    Ok(())
}

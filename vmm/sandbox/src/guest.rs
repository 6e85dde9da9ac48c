//! The guest, as the host talks to it.
//!
//! One ttrpc connection carries every call ([`kuasar_forward::client`]); streams are connections of
//! their own. What is here is a machine's: the handshake on each connection, and the word with
//! which a guest reports that it serves. Lines are bounded.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use tokio::net::UnixStream;
use tokio::sync::watch;
use vmm_common::handshake::{self, HandshakeError, Purpose, Ready, StreamKind, Welcome};
use vmm_common::port;

use crate::channel::Listener;

pub use kuasar_forward::{Client, GuestError, Limits, Result, clean};

/// Service names.
pub mod service {
    /// containerd's Task API.
    pub const TASK: &str = kuasar_forward::task::V3;
    /// The guest API.
    pub const GUEST: &str = "kuasar.vmm.v1.Guest";
}

/// Dials ports of a guest.
#[async_trait]
pub trait Dial: Send + Sync + std::fmt::Debug {
    /// A connection to `port`, within `limit`.
    async fn dial(&self, port: u32, limit: Duration) -> std::io::Result<UnixStream>;
}

/// Random bytes in hex, from the kernel.
///
/// # Errors
/// When the kernel has none.
pub fn random_hex(bytes: usize) -> std::io::Result<String> {
    let mut all = vec![0_u8; bytes];
    // At most 256 bytes come whole.
    for part in all.chunks_mut(256) {
        // SAFETY: pointer and length describe `part`.
        let n = unsafe { libc::getrandom(part.as_mut_ptr().cast(), part.len(), 0) };
        if n != part.len() as isize {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(kuasar_host::hex(&all))
}

/// Nanoseconds since 1970.
pub fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// An agent that has said that it serves, and waits for its token.
#[derive(Debug)]
pub struct Waiting {
    stream: UnixStream,
    ready: Ready,
}

impl Waiting {
    /// Waits for the guest to say that it serves. One connection is taken: the first process of
    /// the guest has the port before any container exists.
    ///
    /// # Errors
    /// [`GuestError::Nonsense`] for a guest that says something else, or is of another version.
    pub async fn accept(listener: &Listener) -> Result<Self> {
        let mut stream = listener.accept().await.map_err(|e| GuestError::Broken(e.to_string()))?;
        let ready: Ready = handshake::read_json(&mut stream).await.map_err(greeting)?;
        if ready.protocol != handshake::PROTOCOL {
            return Err(GuestError::Nonsense(format!(
                "its agent speaks version {} of the protocol, this daemon {}: use the guest image \
                 that came with it",
                ready.protocol,
                handshake::PROTOCOL
            )));
        }
        Ok(Self { stream, ready })
    }

    /// Gives the agent its sandbox, a token, the time and entropy, all of this moment.
    ///
    /// # Errors
    /// [`GuestError`]; an agent that was not answered for long has gone, and dials again.
    pub async fn welcome(mut self, sandbox: &str) -> Result<(Ready, String)> {
        let random =
            |n| random_hex(n).map_err(|e| GuestError::Broken(format!("no random bytes: {e}")));
        let (token, entropy) = (random(32)?, random(64)?);
        let welcome = Welcome {
            token: token.clone(),
            now_ns: now_ns(),
            entropy,
            sandbox_id: sandbox.to_owned(),
        };
        let stream = &mut self.stream;
        handshake::write_json(stream, &welcome).await.map_err(greeting)?;
        let answer: serde_json::Value = handshake::read_json(stream).await.map_err(greeting)?;
        if answer.get("ok") != Some(&serde_json::Value::Bool(true)) {
            return Err(GuestError::Nonsense("it did not accept its token".into()));
        }
        let ready = Ready {
            protocol: self.ready.protocol,
            agent_version: clean(&self.ready.agent_version),
            kernel_release: clean(&self.ready.kernel_release),
            boot_id: clean(&self.ready.boot_id),
        };
        Ok((ready, token))
    }
}

/// Waits for the guest to say that it serves, and gives it its token.
///
/// # Errors
/// [`GuestError::Deadline`], and as [`Waiting`]'s.
pub async fn welcome(
    listener: &Listener,
    sandbox: &str,
    limit: Duration,
) -> Result<(Ready, String)> {
    let talk = async { Waiting::accept(listener).await?.welcome(sandbox).await };
    let late = |_| GuestError::Deadline { what: "after its boot".into(), limit };
    tokio::time::timeout(limit, talk).await.map_err(late)?
}

fn greeting(error: HandshakeError) -> GuestError {
    match error {
        HandshakeError::Io(error) => GuestError::Broken(error.to_string()),
        HandshakeError::Ended => GuestError::Broken("it hung up within the handshake".into()),
        HandshakeError::Refused(why) => {
            GuestError::Refused { code: ttrpc::Code::PERMISSION_DENIED, message: clean(&why) }
        }
        other => GuestError::Nonsense(clean(&other.to_string())),
    }
}

/// How connections to a guest are made.
struct Link {
    dial: Arc<dyn Dial>,
    token: String,
}

impl std::fmt::Debug for Link {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("dial", &self.dial).finish_non_exhaustive()
    }
}

impl Link {
    async fn connect(&self, to: u32, purpose: &Purpose, limit: Duration) -> Result<UnixStream> {
        let dialled = self.dial.dial(to, limit).await;
        let mut stream = dialled.map_err(|error| GuestError::Broken(clean(&error.to_string())))?;
        handshake::greet(&mut stream, &self.token, purpose).await.map_err(greeting)?;
        Ok(stream)
    }
}

#[async_trait]
impl kuasar_forward::Connect for Link {
    async fn connect(&self, limit: Duration) -> Result<UnixStream> {
        Link::connect(self, port::CONTROL, &Purpose::Control, limit).await
    }

    fn traced(&self, client: Client, call: kuasar_forward::TracedCall) {
        crate::trace::collect(client, call);
    }
}

/// A guest that has been welcomed: a [`Client`] that also connects to streams.
#[derive(Debug)]
pub struct Guest {
    link: Arc<Link>,
    client: Client,
}

impl std::ops::Deref for Guest {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Guest {
    /// A guest with this token; `gone` becomes true when its machine has ended.
    pub fn new(
        dial: Arc<dyn Dial>,
        token: String,
        limits: Limits,
        gone: watch::Receiver<bool>,
    ) -> Self {
        let link = Arc::new(Link { dial, token });
        let client = Client::new(link.clone(), limits, gone);
        Self { link, client }
    }

    /// Connects to one stream of one process.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn stream(&self, container: &str, exec: &str, kind: StreamKind) -> Result<OwnedFd> {
        let purpose = Purpose::Stream { container: container.into(), exec: exec.into(), kind };
        let limit = self.limits().connect;
        let stream = self.reach(self.link.connect(port::STREAM, &purpose, limit)).await?;
        let stream = stream.into_std().map_err(|e| GuestError::Broken(e.to_string()))?;
        Ok(stream.into())
    }
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;

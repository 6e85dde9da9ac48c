//! The guest, as the host talks to it.
//!
//! One ttrpc connection carries every call; it is dialled when the first call needs it, and again
//! after it broke. A call that the guest may have got before the connection broke is repeated
//! only where that does no harm ([`Guest::call_again`]). Streams are connections of their own.
//!
//! Whatever comes from a guest is hostile: lines are bounded, frames are bounded by ttrpc (4 MiB),
//! every call has a deadline, texts are cut and cleaned before they get into an error or a log,
//! and answers are checked by whoever asked. A guest that answers nonsense harms its own pod.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use protobuf::Message;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use vmm_common::handshake::{self, HandshakeError, Purpose, Ready, StreamKind, Welcome};
use vmm_common::port;

/// Service names.
pub mod service {
    /// containerd's Task API.
    pub const TASK: &str = "containerd.task.v3.Task";
    /// The same in version 2, whose statistics are those of cgroup v1.
    pub const TASK_V2: &str = "containerd.task.v2.Task";
    /// The guest API.
    pub const GUEST: &str = "kuasar.vmm.v1.Guest";
}

/// Most characters of a guest's text that get into an error or a log.
const QUOTED: usize = 300;

/// Why a guest did not do something.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The connection could not be made, or broke. The call may have been done.
    #[error("the guest cannot be reached: {0}")]
    Broken(String),
    /// The guest answered an error.
    #[error("{message}")]
    Refused {
        /// Its code.
        code: ttrpc::Code,
        /// Its words, bounded and cleaned.
        message: String,
    },
    /// The answer makes no sense.
    #[error("the guest answered nonsense: {0}")]
    Nonsense(String),
    /// No answer in time.
    #[error("the guest did not answer {what} within {limit:?}")]
    Deadline {
        /// What was asked.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// The machine has ended.
    #[error("the machine has ended")]
    Gone,
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, GuestError>;

impl GuestError {
    /// Whether the guest does not know what was asked for.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: ttrpc::Code::NOT_FOUND, .. })
    }
}

impl From<GuestError> for containerd_task::error::Error {
    fn from(error: GuestError) -> Self {
        use ttrpc::Code;
        match error {
            GuestError::Refused { code, message } => match code {
                Code::NOT_FOUND => Self::NotFound(message),
                Code::ALREADY_EXISTS => Self::AlreadyExists(message),
                Code::INVALID_ARGUMENT => Self::InvalidArgument(message),
                Code::FAILED_PRECONDITION => Self::FailedPrecondition(message),
                Code::RESOURCE_EXHAUSTED => Self::ResourceExhausted(message),
                Code::UNIMPLEMENTED => Self::Unimplemented(message),
                Code::DEADLINE_EXCEEDED => Self::DeadlineExceeded(message),
                Code::UNAVAILABLE => Self::Unavailable(message),
                _ => Self::internal("in the guest", message),
            },
            GuestError::Deadline { .. } => Self::DeadlineExceeded(error.to_string()),
            GuestError::Broken(_) => Self::Unavailable(error.to_string()),
            GuestError::Gone => Self::NotFound(error.to_string()),
            GuestError::Nonsense(_) => Self::internal("ask the guest", error),
        }
    }
}

impl From<GuestError> for containerd_sandbox::error::Error {
    fn from(error: GuestError) -> Self {
        use ttrpc::Code;
        match error {
            GuestError::Refused { code, message } => match code {
                Code::INVALID_ARGUMENT => Self::InvalidArgument(message),
                Code::FAILED_PRECONDITION => Self::FailedPrecondition(message),
                Code::RESOURCE_EXHAUSTED => Self::ResourceExhausted(message),
                Code::UNIMPLEMENTED => Self::Unimplemented(message),
                _ => Self::internal("in the guest", message),
            },
            GuestError::Deadline { .. } => Self::DeadlineExceeded(error.to_string()),
            other => Self::internal("ask the guest", other),
        }
    }
}

/// A guest's words, fit to be shown.
pub fn clean(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let mut cut: String = text.chars().take(QUOTED).map(plain).collect();
    if text.chars().nth(QUOTED).is_some() {
        cut.push('…');
    }
    cut
}

/// Dials ports of a guest.
#[async_trait]
pub trait Dial: Send + Sync + std::fmt::Debug {
    /// A connection to `port`, within `limit`.
    async fn dial(&self, port: u32, limit: Duration) -> std::io::Result<UnixStream>;
}

/// How long a guest may take, by what it is asked.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A connection and its greeting.
    pub connect: Duration,
    /// A call.
    pub call: Duration,
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
    Ok(all.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Nanoseconds since 1970.
pub fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Waits for the guest to say that it serves, and gives it its token. One connection is taken:
/// the first process of the guest has the port before any container exists.
///
/// # Errors
/// [`GuestError::Deadline`]; [`GuestError::Nonsense`] for a guest that says something else, or is
/// of another version.
pub async fn welcome(
    listener: &UnixListener,
    sandbox: &str,
    limit: Duration,
) -> Result<(Ready, String)> {
    let random = |n| random_hex(n).map_err(|e| GuestError::Broken(format!("no random bytes: {e}")));
    let (token, entropy) = (random(32)?, random(64)?);
    let talk = async {
        let (mut stream, _) =
            listener.accept().await.map_err(|e| GuestError::Broken(e.to_string()))?;
        let ready: Ready = handshake::read_json(&mut stream).await.map_err(greeting)?;
        if ready.protocol != handshake::PROTOCOL {
            return Err(GuestError::Nonsense(format!(
                "its agent speaks version {} of the protocol, this daemon {}: use the guest image \
                 that came with it",
                ready.protocol,
                handshake::PROTOCOL
            )));
        }
        let welcome = Welcome {
            token: token.clone(),
            now_ns: now_ns(),
            entropy,
            sandbox_id: sandbox.to_owned(),
        };
        handshake::write_json(&mut stream, &welcome).await.map_err(greeting)?;
        let answer: serde_json::Value =
            handshake::read_json(&mut stream).await.map_err(greeting)?;
        if answer.get("ok") != Some(&serde_json::Value::Bool(true)) {
            return Err(GuestError::Nonsense("it did not accept its token".into()));
        }
        Ok(Ready {
            protocol: ready.protocol,
            agent_version: clean(&ready.agent_version),
            kernel_release: clean(&ready.kernel_release),
            boot_id: clean(&ready.boot_id),
        })
    };
    match tokio::time::timeout(limit, talk).await {
        Ok(ready) => ready.map(|ready| (ready, token)),
        Err(_) => Err(GuestError::Deadline { what: "after its boot".into(), limit }),
    }
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

/// A guest that has been welcomed.
pub struct Guest {
    dial: Arc<dyn Dial>,
    token: String,
    limits: Limits,
    /// The connection, and its number.
    control: tokio::sync::Mutex<(u64, Option<ttrpc::r#async::Client>)>,
    /// Becomes true when the machine has ended: nobody waits for it any longer.
    gone: watch::Receiver<bool>,
}

impl std::fmt::Debug for Guest {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("dial", &self.dial).finish_non_exhaustive()
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
        Self { dial, token, limits, control: tokio::sync::Mutex::new((0, None)), gone }
    }

    /// How long it may take.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether its machine has ended.
    pub fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Resolves when its machine has ended.
    pub async fn gone(&self) {
        let mut gone = self.gone.clone();
        if gone.wait_for(|gone| *gone).await.is_err() {
            // Whoever watched the machine has gone without a word: it is not ended yet.
            std::future::pending::<()>().await;
        }
    }

    async fn connect(&self, to: u32, purpose: &Purpose) -> Result<UnixStream> {
        let limit = self.limits.connect;
        let work = async {
            let mut stream = self
                .dial
                .dial(to, limit)
                .await
                .map_err(|error| GuestError::Broken(clean(&error.to_string())))?;
            handshake::greet(&mut stream, &self.token, purpose).await.map_err(greeting)?;
            Ok(stream)
        };
        tokio::select! {
            biased;
            () = self.gone() => Err(GuestError::Gone),
            made = tokio::time::timeout(limit, work) => made
                .unwrap_or_else(|_| Err(GuestError::Deadline { what: "a connection".into(), limit })),
        }
    }

    async fn client(&self) -> Result<(u64, ttrpc::r#async::Client)> {
        let mut control = self.control.lock().await;
        if let (number, Some(client)) = &*control {
            return Ok((*number, client.clone()));
        }
        let stream = self.connect(port::CONTROL, &Purpose::Control).await?;
        let socket = ttrpc::asynchronous::transport::Socket::new(stream);
        let client = ttrpc::r#async::Client::new(socket);
        let number = control.0 + 1;
        *control = (number, Some(client.clone()));
        Ok((number, client))
    }

    async fn broke(&self, number: u64) {
        let mut control = self.control.lock().await;
        if control.0 == number {
            control.1 = None;
        }
    }

    /// A call, within `limit`; with none it may last as long as the machine does.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn call_for<A: Message>(
        &self,
        service: &str,
        method: &str,
        question: &impl Message,
        limit: Option<Duration>,
    ) -> Result<A> {
        let (number, client) = self.client().await?;
        let payload = question
            .write_to_bytes()
            .map_err(|error| GuestError::Nonsense(format!("request: {error}")))?;
        let request = ttrpc::proto::Request {
            service: service.into(),
            method: method.into(),
            // The client's own deadline comes later than ours, whose error says more.
            timeout_nano: limit.map_or(0, |limit| {
                i64::try_from((limit + Duration::from_secs(1)).as_nanos()).unwrap_or(i64::MAX)
            }),
            payload,
            ..Default::default()
        };
        let asked = client.request(request);
        let answered = async {
            match limit {
                Some(limit) => tokio::time::timeout(limit, asked)
                    .await
                    .map_err(|_| GuestError::Deadline { what: method.into(), limit }),
                None => Ok(asked.await),
            }
        };
        let answer = tokio::select! {
            biased;
            () = self.gone() => return Err(GuestError::Gone),
            answer = answered => answer?,
        };
        match answer {
            Ok(response) => A::parse_from_bytes(&response.payload)
                .map_err(|error| GuestError::Nonsense(format!("{method}: {error}"))),
            Err(ttrpc::Error::RpcStatus(status)) => {
                let code = status.code.enum_value().unwrap_or(ttrpc::Code::UNKNOWN);
                match limit {
                    Some(limit) if code == ttrpc::Code::DEADLINE_EXCEEDED => {
                        Err(GuestError::Deadline { what: method.into(), limit })
                    }
                    _ => Err(GuestError::Refused { code, message: clean(&status.message) }),
                }
            }
            Err(error) => {
                self.broke(number).await;
                Err(GuestError::Broken(clean(&error.to_string())))
            }
        }
    }

    /// A call within the usual limit.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn call<A: Message>(
        &self,
        service: &str,
        method: &str,
        question: &impl Message,
    ) -> Result<A> {
        self.call_for(service, method, question, Some(self.limits.call)).await
    }

    /// The same for calls that may be done twice: repeated once on a new connection.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn call_again<A: Message>(
        &self,
        service: &str,
        method: &str,
        question: &impl Message,
    ) -> Result<A> {
        match self.call(service, method, question).await {
            Err(GuestError::Broken(_)) => self.call(service, method, question).await,
            other => other,
        }
    }

    /// Connects to one stream of one process.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn stream(&self, container: &str, exec: &str, kind: StreamKind) -> Result<OwnedFd> {
        let purpose = Purpose::Stream { container: container.into(), exec: exec.into(), kind };
        let stream = self.connect(port::STREAM, &purpose).await?;
        let stream = stream.into_std().map_err(|e| GuestError::Broken(e.to_string()))?;
        Ok(stream.into())
    }
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;

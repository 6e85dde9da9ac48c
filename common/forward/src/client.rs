//! One ttrpc connection that carries every call to a guest.
//!
//! It is dialled when the first call needs it, and again after it broke. A call that the guest may
//! have got before the connection broke is repeated only where that does no harm
//! ([`Client::call_again`]). When the guest has ended, every call ends at once.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::error::{GuestError, Result, clean};

/// Makes connections for calls.
#[async_trait]
pub trait Connect: Send + Sync + std::fmt::Debug {
    /// A connection on which the guest serves ttrpc, within `limit`.
    async fn connect(&self, limit: Duration) -> Result<UnixStream>;

    /// A call with a trace was answered: the place to ask what the guest has done for it.
    fn traced(&self, client: Client, call: TracedCall) {
        let _ = (client, call);
    }
}

/// A call that carried a trace.
#[derive(Debug, Clone, Copy)]
pub struct TracedCall {
    /// Its span.
    pub context: kuasar_trace::Context,
    /// When it began.
    pub start: SystemTime,
    /// When it was answered.
    pub end: SystemTime,
}

/// How long a guest may take, by what it is asked.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A connection and its greeting.
    pub connect: Duration,
    /// A call.
    pub call: Duration,
}

/// Calls a guest. Clones share the connection.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    connect: Arc<dyn Connect>,
    limits: Limits,
    /// The connection, and its number.
    control: tokio::sync::Mutex<(u64, Option<ttrpc::r#async::Client>)>,
    /// Becomes true when the guest has ended: nobody waits for it any longer.
    gone: watch::Receiver<bool>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("connect", &self.inner.connect).finish_non_exhaustive()
    }
}

impl Client {
    /// Calls whoever `connect` reaches; `gone` becomes true when the guest has ended.
    pub fn new(connect: Arc<dyn Connect>, limits: Limits, gone: watch::Receiver<bool>) -> Self {
        let control = tokio::sync::Mutex::new((0, None));
        Self { inner: Arc::new(Inner { connect, limits, control, gone }) }
    }

    /// How long the guest may take.
    pub fn limits(&self) -> Limits {
        self.inner.limits
    }

    /// Whether the guest has ended.
    pub fn is_gone(&self) -> bool {
        *self.inner.gone.borrow()
    }

    /// Resolves when the guest has ended.
    pub async fn gone(&self) {
        let mut gone = self.inner.gone.clone();
        if gone.wait_for(|gone| *gone).await.is_err() {
            // Whoever watched the guest has gone without a word: it is not ended yet.
            std::future::pending::<()>().await;
        }
    }

    /// The result of `work`, which connects to the guest in some way: within the limit for that,
    /// and not longer than the guest is there.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn reach<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let limit = self.inner.limits.connect;
        tokio::select! {
            biased;
            () = self.gone() => Err(GuestError::Gone),
            made = tokio::time::timeout(limit, work) => made
                .unwrap_or_else(|_| Err(GuestError::Deadline { what: "a connection".into(), limit })),
        }
    }

    async fn client(&self) -> Result<(u64, ttrpc::r#async::Client)> {
        let mut control = self.inner.control.lock().await;
        if let (number, Some(client)) = &*control {
            return Ok((*number, client.clone()));
        }
        let stream = self.reach(self.inner.connect.connect(self.inner.limits.connect)).await?;
        let socket = ttrpc::asynchronous::transport::Socket::new(stream);
        let client = ttrpc::r#async::Client::new(socket);
        let number = control.0 + 1;
        *control = (number, Some(client.clone()));
        Ok((number, client))
    }

    async fn broke(&self, number: u64) {
        let mut control = self.inner.control.lock().await;
        if control.0 == number {
            control.1 = None;
        }
    }

    /// A call, within `limit`; with none it may last as long as the guest does.
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
        let mut request = ttrpc::proto::Request {
            service: service.into(),
            method: method.into(),
            // The client's own deadline comes later than ours, whose error says more.
            timeout_nano: limit.map_or(0, |limit| {
                i64::try_from((limit + Duration::from_secs(1)).as_nanos()).unwrap_or(i64::MAX)
            }),
            payload,
            ..Default::default()
        };
        let span = (limit.is_some() && kuasar_trace::enabled())
            .then(|| {
                let name = format!("{service}/{method}");
                kuasar_trace::child(&name, kuasar_trace::Kind::Client)
            })
            .flatten();
        if let Some(span) = &span {
            let value = span.scope().traceparent();
            let key = kuasar_trace::TRACEPARENT.into();
            request.metadata.push(ttrpc::proto::KeyValue { key, value, ..Default::default() });
        }
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
        if let Some(span) = span {
            let (context, start) = (span.scope().context(), span.start());
            if let Err(error) = &answer {
                span.scope().failed(&clean(&error.to_string()));
            }
            drop(span);
            let call = TracedCall { context, start, end: SystemTime::now() };
            self.inner.connect.traced(self.clone(), call);
        }
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
        self.call_for(service, method, question, Some(self.inner.limits.call)).await
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
}

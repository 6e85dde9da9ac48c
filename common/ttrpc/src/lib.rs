//! A ttrpc server for sockets on which little happens.
//!
//! Every pod has a socket, every container a connection to it, and on most of them a Wait is open
//! and nothing else for days. The ttrpc crate's server has, for each of them, a table of methods,
//! two tasks and a queue of a hundred messages: some 20 kB. Here a connection is one task with a
//! header's ten bytes, a call is one more, and methods are found by whatever the [`Service`]
//! likes, such as a `match`. Messages, statuses and the generated code stay the crate's.
//!
//! Only unary calls are served; a call that opens a stream is answered Unimplemented.
//!
//! A connection ends, and every call on it with it and without an answer, when the client hangs
//! up, and when the caller of [`serve`] says so. (The crate's server would let calls in flight
//! finish and answer them, which for a Wait is wrong: an answer means that the pod has ended.)

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::BufMut as _;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use ttrpc::r#async::TtrpcContext;
use ttrpc::proto::{Codec as _, MessageHeader, Request, Response};
use ttrpc::{Code, get_status};

/// Bytes of a frame's header: `length: u32 BE, stream: u32 BE, type: u8, flags: u8`.
const HEADER: usize = 10;
/// ttrpc's limit for a body, in bytes.
const MAX_BODY: usize = 4 << 20;
/// A body's memory grows by this much with what has come, whatever its header promises.
const STEP: usize = 64 << 10;
/// Calls that one connection may have open; more are read when some have ended.
const MAX_CALLS: usize = 4096;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// An open call.
pub type Answer<'a> = BoxFuture<'a, ttrpc::Result<Response>>;

/// What answers calls.
pub trait Service: Send + Sync + 'static {
    /// Whether it answers for this service (`package.Name`).
    fn serves(&self, service: &str) -> bool;

    /// Calls the method that the request names; nothing when there is none.
    fn call(&self, context: TtrpcContext, request: Request) -> Option<Answer<'_>>;
}

/// Several [`Service`]s. Cheap to clone.
#[derive(Clone, Default)]
pub struct Services(Vec<Arc<dyn Service>>);

impl Services {
    /// One service.
    pub fn new(service: Arc<dyn Service>) -> Self {
        Self(vec![service])
    }

    /// These and `others`; whoever comes first answers.
    #[must_use]
    pub fn and(mut self, others: impl Into<Self>) -> Self {
        self.0.extend(others.into().0);
        self
    }

    /// The one that answers for `service`.
    pub fn find(&self, service: &str) -> Option<&Arc<dyn Service>> {
        self.0.iter().find(|s| s.serves(service))
    }
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Services({})", self.0.len())
    }
}

/// Tables of the generated code. A table is some 3 kB: make it once, not per pod.
impl From<HashMap<String, ttrpc::r#async::Service>> for Services {
    fn from(tables: HashMap<String, ttrpc::r#async::Service>) -> Self {
        if tables.is_empty() { Self::default() } else { Self::new(Arc::new(Tables(tables))) }
    }
}

struct Tables(HashMap<String, ttrpc::r#async::Service>);

impl Service for Tables {
    fn serves(&self, service: &str) -> bool {
        self.0.contains_key(service)
    }

    fn call(&self, context: TtrpcContext, request: Request) -> Option<Answer<'_>> {
        let method = self.0.get(&request.service)?.methods.get(&request.method)?;
        Some(method.handler(context, request))
    }
}

/// A frame as it came.
enum Frame {
    Whole(MessageHeader, Vec<u8>),
    /// Its body was over the limit and is thrown away.
    TooLong(MessageHeader),
}

/// Reads frames; a read that is given up is gone on with by the next one.
#[derive(Default)]
struct Frames {
    header: [u8; HEADER],
    have: usize,
    body: Vec<u8>,
    /// Bytes of a body over the limit that were thrown away.
    wasted: usize,
}

impl Frames {
    fn parsed(&self) -> MessageHeader {
        let [a, b, c, d, e, f, g, h, type_, flags] = self.header;
        MessageHeader {
            length: u32::from_be_bytes([a, b, c, d]),
            stream_id: u32::from_be_bytes([e, f, g, h]),
            type_,
            flags,
        }
    }

    /// The next one; none at the end of the connection.
    async fn next(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
        while let Some(rest) = self.header.get_mut(self.have..).filter(|rest| !rest.is_empty()) {
            match from.read(rest).await? {
                0 => return Ok(None),
                n => self.have += n,
            }
        }
        let header = self.parsed();
        let length = header.length as usize;
        while self.wasted + self.body.len() < length {
            let step = (length - self.wasted - self.body.len()).min(STEP);
            self.body.reserve(step);
            if from.read_buf(&mut (&mut self.body).limit(step)).await? == 0 {
                return Ok(None);
            }
            if length > MAX_BODY {
                self.wasted += self.body.len();
                self.body.clear();
            }
        }
        (self.have, self.wasted) = (0, 0);
        let body = std::mem::take(&mut self.body);
        let long = length > MAX_BODY;
        Ok(Some(if long { Frame::TooLong(header) } else { Frame::Whole(header, body) }))
    }
}

/// Serves one connection until it ends, or `cut` does.
pub async fn serve<S>(stream: S, services: Services, cut: impl Future<Output = ()>)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut reader, writer) = tokio::io::split(stream);
    let writer = Arc::new(Mutex::new(writer));
    // Ends them when it is dropped.
    let mut calls = JoinSet::new();
    let mut frames = Frames::default();
    tokio::pin!(cut);
    loop {
        let frame = tokio::select! {
            biased;
            () = &mut cut => return,
            Some(_) = calls.join_next(), if !calls.is_empty() => continue,
            frame = frames.next(&mut reader), if calls.len() < MAX_CALLS => frame,
        };
        let (header, body) = match frame {
            Ok(Some(Frame::Whole(header, body))) => (header, Ok(body)),
            Ok(Some(Frame::TooLong(header))) => {
                let text = format!("message of {} bytes, {MAX_BODY} are allowed", header.length);
                (header, Err(get_status(Code::INVALID_ARGUMENT, text)))
            }
            Ok(None) => return,
            Err(error) => return tracing::debug!("a ttrpc connection is lost: {error}"),
        };
        // What belongs to a stream is for one that was answered Unimplemented.
        if header.type_ != REQUEST {
            continue;
        }
        let (services, writer) = (services.clone(), writer.clone());
        calls.spawn(async move {
            let answer = match body {
                Ok(body) => answer(&services, header, body).await,
                Err(status) => failed(status),
            };
            let frame = encode(header.stream_id, &answer);
            // If it cannot be written, the client is gone: the reader sees it, too.
            let _ = writer.lock().await.write_all(&frame).await;
        });
    }
}

fn failed(status: ttrpc::proto::Status) -> Response {
    let mut response = Response::new();
    response.set_status(status);
    response
}

/// A response's frame. One over the limit becomes an error.
fn encode(stream: u32, response: &Response) -> Vec<u8> {
    let body = match response.encode() {
        Ok(body) if body.len() <= MAX_BODY => body,
        Ok(body) => {
            let text = format!("an answer of {} bytes, {MAX_BODY} are allowed", body.len());
            failed(get_status(Code::RESOURCE_EXHAUSTED, text)).encode().unwrap_or_default()
        }
        Err(error) => {
            failed(get_status(Code::INTERNAL, error.to_string())).encode().unwrap_or_default()
        }
    };
    let mut frame = Vec::with_capacity(HEADER + body.len());
    frame.put_u32(body.len() as u32); // at most MAX_BODY
    frame.put_u32(stream);
    frame.put_u8(RESPONSE);
    frame.put_u8(0);
    frame.extend_from_slice(&body);
    frame
}

async fn answer(services: &Services, header: MessageHeader, body: Vec<u8>) -> Response {
    if header.stream_id.is_multiple_of(2) {
        return failed(get_status(Code::INVALID_ARGUMENT, "stream id must be odd"));
    }
    let request = match Request::decode(&body) {
        Ok(request) => request,
        Err(error) => return failed(get_status(Code::INVALID_ARGUMENT, error.to_string())),
    };
    drop(body);
    let Some(service) = services.find(&request.service) else {
        let text = format!("service {:.200} is not served here", request.service);
        return failed(get_status(Code::UNIMPLEMENTED, text));
    };
    let method = request.method.clone();
    let metadata = ttrpc::context::from_pb(&request.metadata);
    let span = span(&request.service, &method, &metadata).map(Box::new);
    let scope = span.as_ref().map(|span| span.scope().clone());
    let limit = u64::try_from(request.timeout_nano).unwrap_or(0);
    let context = TtrpcContext {
        mh: header,
        metadata,
        timeout_nano: request.timeout_nano,
        ..TtrpcContext::default()
    };
    let call = kuasar_trace::carry(scope.clone(), || service.call(context, request));
    let Some(call) = call else {
        let text = format!("method {method:.200} is not served here");
        return failed(get_status(Code::UNIMPLEMENTED, text));
    };
    let call = AssertUnwindSafe(kuasar_trace::within(scope, call)).catch_unwind();
    let done = if limit == 0 {
        call.await
    } else {
        match tokio::time::timeout(Duration::from_nanos(limit), call).await {
            Ok(done) => done,
            Err(_) => return failed(get_status(Code::DEADLINE_EXCEEDED, "timeout")),
        }
    };
    let response = match done {
        Ok(Ok(response)) => response,
        Ok(Err(ttrpc::Error::RpcStatus(status))) => failed(status),
        Ok(Err(error)) => failed(get_status(Code::UNKNOWN, error.to_string())),
        Err(_) => failed(get_status(Code::INTERNAL, format!("{method:.200} panicked"))),
    };
    if let Some(span) = span {
        judge(&span, &response);
    }
    response
}

/// The span of a call, when it is to be followed.
pub fn span(
    service: &str,
    method: &str,
    metadata: &HashMap<String, Vec<String>>,
) -> Option<kuasar_trace::Span> {
    let caller = metadata.get(kuasar_trace::TRACEPARENT).and_then(|all| all.first());
    kuasar_trace::server(service, method, caller.map(String::as_str))
}

/// Tells a call's span when the answer is an error.
pub fn judge(span: &kuasar_trace::Span, answer: &Response) {
    let status = answer.status();
    if status.code() != Code::OK {
        span.scope().failed(&format!("{:?}: {}", status.code(), status.message()));
    }
}

#[cfg(test)]
mod tests;

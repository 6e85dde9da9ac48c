//! HTTP/1.1 over a unix socket: what Cloud Hypervisor and Firecracker are told what to do by.
//!
//! One connection for each request: their servers keep few of them, a connection of a daemon that
//! was killed must not be in the way of the next one's, and a connect to a unix socket is nothing
//! beside the request. A request may carry descriptors (`SCM_RIGHTS`), which travel with its first
//! bytes. An answer has a greatest size and a deadline, whatever a broken-out guest makes the VMM
//! send.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

use super::Kind;
use super::error::{Error, Result, clean};

/// Largest answer that is read. The longest real ones, the whole description of a machine with its
/// devices, have some ten kB.
const MAX_ANSWER: usize = 1 << 20;
/// Room for an answer's head; the smallest that hyper takes.
const MAX_HEAD: usize = 8192;
/// Characters of a VMM's error text that are passed on.
const REASON: usize = 400;

/// A VMM's API.
#[derive(Debug, Clone)]
pub struct Http {
    kind: Kind,
    socket: PathBuf,
    prefix: &'static str,
    limit: Duration,
}

impl Http {
    /// The API at `socket`; paths of requests come behind `prefix`. `limit` is the deadline of a
    /// request.
    pub fn new(kind: Kind, socket: PathBuf, prefix: &'static str, limit: Duration) -> Self {
        Self { kind, socket, prefix, limit }
    }

    /// The same API with another deadline.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        Self { limit, ..self.clone() }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks for something.
    ///
    /// # Errors
    /// [`Error::Refused`] with the VMM's words, [`Error::Deadline`], [`Error::Gone`] when nobody
    /// serves, [`Error::Protocol`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let answer = self.request(Method::GET, path, None, Vec::new()).await?;
        serde_json::from_slice(&answer).map_err(|error| self.protocol(&error))
    }

    /// Orders something that has no arguments.
    ///
    /// # Errors
    /// As [`Http::get`].
    pub async fn order(&self, path: &str) -> Result<()> {
        self.request(Method::PUT, path, None, Vec::new()).await.map(drop)
    }

    /// Orders something.
    ///
    /// # Errors
    /// As [`Http::get`].
    pub async fn put<B: Serialize + Sync>(&self, path: &str, body: &B) -> Result<()> {
        self.send(Method::PUT, path, body, Vec::new()).await
    }

    /// Changes something.
    ///
    /// # Errors
    /// As [`Http::get`].
    pub async fn patch<B: Serialize + Sync>(&self, path: &str, body: &B) -> Result<()> {
        self.send(Method::PATCH, path, body, Vec::new()).await
    }

    /// Orders something that descriptors belong to.
    ///
    /// # Errors
    /// As [`Http::get`].
    pub async fn put_with<B: Serialize + Sync>(
        &self,
        path: &str,
        body: &B,
        fds: Vec<Arc<OwnedFd>>,
    ) -> Result<()> {
        self.send(Method::PUT, path, body, fds).await
    }

    async fn send<B: Serialize + Sync>(
        &self,
        method: Method,
        path: &str,
        body: &B,
        fds: Vec<Arc<OwnedFd>>,
    ) -> Result<()> {
        let body = serde_json::to_vec(body).map_err(|error| self.protocol(&error))?;
        self.request(method, path, Some(body), fds).await.map(drop)
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        fds: Vec<Arc<OwnedFd>>,
    ) -> Result<Bytes> {
        let answered = tokio::time::timeout(self.limit, self.exchange(method, path, body, fds));
        let (status, answer) = answered.await.map_err(|_| Error::Deadline {
            what: format!("{}'s answer to {path}", self.kind),
            limit: self.limit,
        })??;
        if status.is_success() {
            return Ok(answer);
        }
        Err(Error::Refused {
            vmm: self.kind,
            command: path.into(),
            reason: reason(status, &answer),
        })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        fds: Vec<Arc<OwnedFd>>,
    ) -> Result<(StatusCode, Bytes)> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|_| Error::Gone)?;
        let io = TokioIo::new(WithFds { stream, fds });
        let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_buf_size(MAX_HEAD)
            .handshake(io)
            .await
            .map_err(|error| self.failed(&error))?;
        let _connection = Ends(tokio::spawn(connection).abort_handle());
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header(header::HOST, "localhost")
            .header(header::ACCEPT, "application/json");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default()));
        let request = request.body(body).map_err(|error| self.protocol(&error))?;
        let answer = sender.send_request(request).await.map_err(|error| self.failed(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| self.protocol(&*error))?;
        Ok((status, body.to_bytes()))
    }

    /// A connection that breaks is a VMM that ends; anything else is not HTTP.
    fn failed(&self, error: &hyper::Error) -> Error {
        if error.is_parse() || error.is_user() { self.protocol(error) } else { Error::Gone }
    }

    fn protocol(&self, error: &(dyn std::error::Error + '_)) -> Error {
        let mut text = error.to_string();
        if let Some(cause) = error.source() {
            text = format!("{text}: {cause}");
        }
        Error::Protocol { vmm: self.kind, reason: clean(text.as_bytes(), REASON) }
    }
}

/// What a VMM says of a refusal: Firecracker an object with `fault_message`, Cloud Hypervisor a
/// list of causes; other answers as they are.
fn reason(status: StatusCode, answer: &[u8]) -> String {
    let text = match serde_json::from_slice::<Value>(answer) {
        Ok(Value::Array(causes)) => {
            let causes: Vec<&str> = causes.iter().filter_map(Value::as_str).collect();
            Some(causes.join(": "))
        }
        Ok(Value::Object(map)) => {
            map.get("fault_message").and_then(Value::as_str).map(str::to_owned)
        }
        _ => None,
    };
    let text = text.filter(|text| !text.is_empty());
    let said = clean(text.as_deref().map_or(answer, str::as_bytes), REASON);
    if said.is_empty() { format!("status {}", status.as_u16()) } else { said }
}

struct Ends(tokio::task::AbortHandle);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A stream that sends descriptors with its first bytes.
struct WithFds {
    stream: UnixStream,
    fds: Vec<Arc<OwnedFd>>,
}

impl AsyncRead for WithFds {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for WithFds {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.fds.is_empty() {
            return Pin::new(&mut this.stream).poll_write(cx, bytes);
        }
        loop {
            ready!(this.stream.poll_write_ready(cx))?;
            let sent = this.stream.try_io(Interest::WRITABLE, || {
                let raw: Vec<i32> = this.fds.iter().map(|fd| fd.as_raw_fd()).collect();
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                let rights = [ControlMessage::ScmRights(&raw)];
                let data = [IoSlice::new(bytes)];
                Ok(sendmsg::<()>(this.stream.as_raw_fd(), &data, &rights, flags, None)?)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(n) => {
                    this.fds.clear();
                    return Poll::Ready(Ok(n));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;

//! Images that containerd has, by its own services: where an image's name leads, and blobs by digest.
//!
//! For the command line, and for what a verbose Status says of images: no pod and no container waits for it.

use std::io::Read;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_sandbox::codec::MessageCodec;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kuasar_protos::content::{ReadContentRequest, ReadContentResponse};
use kuasar_protos::images::{GetImageRequest, GetImageResponse};
use protobuf::Message;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::codegen::http::{Request, Response, Uri};
use tonic::{Code, Status, Streaming};
use wasm_image::layout::Blobs;

/// How long containerd may take for the next part of an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// One connection, as tonic wants it.
#[derive(Clone)]
struct Connection(SendRequest<Body>);

type Answer = Pin<Box<dyn Future<Output = hyper::Result<Response<Incoming>>> + Send>>;

impl tower_service::Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        Box::pin(self.0.send_request(request))
    }
}

/// containerd's images of one namespace.
pub struct Store {
    client: Grpc<Connection>,
    namespace: String,
    handle: Handle,
    until: Option<Instant>,
}

impl Store {
    /// Connects to containerd's socket. Everything that is asked for is answered before `until`, or not at all.
    ///
    /// # Errors
    /// When nobody answers there.
    pub async fn connect(
        address: &Path,
        namespace: &str,
        until: Option<Instant>,
    ) -> Result<Self, String> {
        let wrap = |error: String| format!("{}: {error}", address.display());
        let socket = UnixStream::connect(address).await.map_err(|error| wrap(error.to_string()))?;
        let shaken = http2::handshake(TokioExecutor::new(), TokioIo::new(socket));
        let (sender, connection) = shaken.await.map_err(|error| wrap(error.to_string()))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to containerd");
            }
        });
        // No name is looked up: the connection is there.
        let client = Grpc::with_origin(Connection(sender), Uri::from_static("http://containerd"));
        Ok(Self { client, namespace: namespace.to_owned(), handle: Handle::current(), until })
    }

    fn request<Q>(&self, message: Q) -> Result<tonic::Request<Q>, Status> {
        let mut request = tonic::Request::new(message);
        let namespace = self.namespace.parse();
        let namespace = namespace.map_err(|_| Status::invalid_argument("a strange namespace"))?;
        request.metadata_mut().insert("containerd-namespace", namespace);
        Ok(request)
    }

    async fn ask<Q: Message, A: Message>(
        &self,
        path: &'static str,
        message: Q,
    ) -> Result<Streaming<A>, Status> {
        let request = self.request(message)?;
        let mut client = self.client.clone();
        let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
        let codec = MessageCodec::<Q, A>::default();
        let answer = async {
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            client.server_streaming(request, path, codec).await.map(tonic::Response::into_inner)
        };
        within(self.until, answer).await
    }

    /// The next message.
    async fn next<A>(&self, stream: &mut Streaming<A>) -> Result<Option<A>, Status> {
        within(self.until, stream.message()).await
    }

    /// Where the name of an image leads: the descriptor of an index or a manifest.
    ///
    /// # Errors
    /// When containerd has no such image.
    pub async fn image(&self, name: &str) -> Result<Value, String> {
        let q = GetImageRequest { name: name.to_owned(), ..Default::default() };
        let get = "/containerd.services.images.v1.Images/Get";
        let answer = async { self.next(&mut self.ask(get, q).await?).await }.await;
        let answer: Option<GetImageResponse> = answer.map_err(said)?;
        let target = answer.and_then(|answer| answer.image.into_option());
        let target = target.and_then(|image| image.target.into_option());
        let target = target.ok_or("containerd has told nothing of it")?;
        Ok(json!({ "mediaType": target.media_type, "digest": target.digest }))
    }
}

/// A part of an answer, within a bound.
async fn within<T>(
    until: Option<Instant>,
    part: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    tokio::time::timeout_at(until.unwrap_or_else(|| Instant::now() + PATIENCE), part)
        .await
        .map_err(|_| Status::deadline_exceeded("containerd does not answer"))?
}

fn said(status: Status) -> String {
    match status.code() {
        Code::NotFound => format!("containerd: {}", status.message()),
        code => format!("containerd: {code:?}: {}", status.message()),
    }
}

impl Blobs for Store {
    fn open(&self, digest: &str) -> Result<Box<dyn Read + '_>, String> {
        let q = ReadContentRequest { digest: digest.to_owned(), ..Default::default() };
        let read = "/containerd.services.content.v1.Content/Read";
        let opened: Result<_, Status> = self.handle.block_on(async {
            let mut stream = self.ask(read, q).await?;
            // Whether there is such a blob is told with the first part.
            let first: Option<ReadContentResponse> = self.next(&mut stream).await?;
            Ok((stream, first))
        });
        let (stream, first) = opened.map_err(said)?;
        let part = first.map(|part| part.data).unwrap_or_default();
        Ok(Box::new(Blob { store: self, stream, part, at: 0 }))
    }
}

/// A blob as it comes.
struct Blob<'a> {
    store: &'a Store,
    stream: Streaming<ReadContentResponse>,
    part: Vec<u8>,
    at: usize,
}

impl Read for Blob<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.at >= self.part.len() {
            let message = self.store.handle.block_on(self.store.next(&mut self.stream));
            let message = message.map_err(|status| std::io::Error::other(said(status)))?;
            let Some(message) = message else { return Ok(0) };
            (self.part, self.at) = (message.data, 0);
        }
        let n = self.part.get(self.at..).unwrap_or_default().read(buffer)?;
        self.at += n;
        Ok(n)
    }
}

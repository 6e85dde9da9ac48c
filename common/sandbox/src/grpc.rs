//! The Controller over gRPC: hyper's HTTP/2 and tonic's framing, without tonic's router, which
//! would cost memory that a daemon with one service of nine methods has no use for.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;

use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kuasar_protos::controller::{ControllerWaitRequest, ControllerWaitResponse};
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codec::{Codec as _, EncodeBody, SingleMessageCompressionOverride, Streaming};
use tonic::metadata::GRPC_CONTENT_TYPE;

use crate::codec::MessageCodec;
use crate::controller::{Call, Controller};
use crate::error::Result;
use crate::wire::{grpc_timeout, status};

const SERVICE: &str = "/containerd.services.sandbox.v1.Controller/";

/// Serves one connection to its end.
pub(crate) async fn serve(
    controller: Controller,
    stream: UnixStream,
) -> std::result::Result<(), hyper::Error> {
    let options = &controller.core.options;
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .max_concurrent_streams(options.max_streams)
        // A local socket needs no large windows, and they bound what a peer makes us hold.
        .initial_stream_window_size(64 << 10)
        .initial_connection_window_size(256 << 10)
        .max_frame_size(16 << 10)
        .max_header_list_size(16 << 10)
        .max_send_buf_size(64 << 10);
    let service = service_fn(move |request| {
        let controller = controller.clone();
        async move { Ok::<_, Infallible>(route(controller, request).await) }
    });
    builder.serve_connection(TokioIo::new(stream), service).await
}

async fn route(controller: Controller, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let span = path.strip_prefix(SERVICE).and_then(|method| {
        let caller = request.headers().get(kuasar_trace::TRACEPARENT);
        let caller = caller.and_then(|value| value.to_str().ok());
        kuasar_trace::server(SERVICE.trim_matches('/'), method, caller).map(Box::new)
    });
    let scope = span.as_ref().map(|span| span.scope().clone());
    macro_rules! rpc {
        ($name:literal, $method:ident) => {{
            // Boxed: a Wait, below, must not have the size of all.
            let work = Box::pin(unary(controller, request, |c, call, q| async move {
                c.run($name, &call, c.$method(&call, q)).await
            }));
            kuasar_trace::within(scope, work).await
        }};
    }
    match path.strip_prefix(SERVICE) {
        Some("Create") => rpc!("Create", create),
        Some("Start") => rpc!("Start", start),
        Some("Platform") => rpc!("Platform", platform),
        Some("Stop") => rpc!("Stop", stop),
        Some("Wait") => wait(controller, request).await,
        Some("Status") => rpc!("Status", status),
        Some("Shutdown") => rpc!("Shutdown", shutdown),
        Some("Metrics") => rpc!("Metrics", metrics),
        Some("Update") => rpc!("Update", update),
        _ => {
            let shown: String = path.chars().take(200).collect();
            tonic::Status::unimplemented(format!("{shown} is not served here")).into_http()
        }
    }
}

fn call_of(headers: &http::HeaderMap) -> Call {
    let text = |name| headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok());
    Call {
        namespace: text("containerd-namespace").unwrap_or_default().to_owned(),
        deadline: text("grpc-timeout")
            .and_then(grpc_timeout)
            .and_then(|d| Instant::now().checked_add(d)),
    }
}

/// One method as tonic wants it.
struct Unary<F>(Controller, Call, Option<F>);

impl<Q, A, F, W> tonic::server::UnaryService<Q> for Unary<F>
where
    F: FnOnce(Controller, Call, Q) -> W,
    W: Future<Output = Result<A>> + Send + 'static,
{
    type Response = A;
    type Future = Pin<
        Box<dyn Future<Output = std::result::Result<tonic::Response<A>, tonic::Status>> + Send>,
    >;

    fn call(&mut self, request: tonic::Request<Q>) -> Self::Future {
        let Some(method) = self.2.take() else {
            return Box::pin(async { Err(tonic::Status::internal("called twice")) });
        };
        let work = method(self.0.clone(), self.1.clone(), request.into_inner());
        Box::pin(async move { work.await.map(tonic::Response::new).map_err(|e| status(&e)) })
    }
}

async fn unary<Q, A, F, W>(
    controller: Controller,
    request: Request<Incoming>,
    method: F,
) -> Response<Body>
where
    Q: Message,
    A: Message,
    F: FnOnce(Controller, Call, Q) -> W,
    W: Future<Output = Result<A>> + Send + 'static,
{
    let most = controller.core.options.max_message;
    let call = call_of(request.headers());
    let mut response = tonic::server::Grpc::new(MessageCodec::<A, Q>::default())
        .max_decoding_message_size(most)
        .max_encoding_message_size(most)
        .unary(Unary(controller, call, Some(method)), request)
        .await;
    // Tonic says OutOfRange for a message over the limit; grpc-go and the gRPC specification
    // say ResourceExhausted. Nothing else here answers OutOfRange.
    if let Some(code) = response.headers_mut().get_mut("grpc-status")
        && code.as_bytes() == b"11"
    {
        *code = HeaderValue::from_static("8");
    }
    response
}

/// [`unary`] for Wait, which stays open as long as its sandbox: what tonic keeps of a request
/// until it is answered would be some 3 kB for each.
async fn wait(controller: Controller, request: Request<Incoming>) -> Response<Body> {
    let most = Some(controller.core.options.max_message);
    let mut codec = MessageCodec::<ControllerWaitResponse, ControllerWaitRequest>::default();
    let call = call_of(request.headers());
    let mut messages =
        Box::pin(Streaming::new_request(codec.decoder(), request.into_body(), None, most));
    let question = messages.message().await;
    drop(messages);
    let question = match question {
        Ok(Some(question)) => question,
        Ok(None) => return tonic::Status::internal("the request is empty").into_http(),
        Err(status) => return status.into_http(),
    };
    let work = controller.wait(&call, question);
    match Box::pin(controller.run("Wait", &call, work)).await {
        Ok(answer) => {
            let answer = futures::stream::once(std::future::ready(Ok(answer)));
            let compression = SingleMessageCompressionOverride::default();
            let body = EncodeBody::new_server(codec.encoder(), answer, None, compression, most);
            let mut response = Response::new(Body::new(body));
            response.headers_mut().insert(http::header::CONTENT_TYPE, GRPC_CONTENT_TYPE);
            response
        }
        Err(error) => status(&error).into_http(),
    }
}

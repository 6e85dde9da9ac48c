//! Components that answer requests (`wasi:http/proxy`): one instance for each request.
//!
//! The port is opened after Start, in the pod's network namespace. A request that traps, or that
//! is never answered, is its own end: the client gets 500, the container's log the reason.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use http_body_util::{BodyExt, Empty};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::io::TokioIo;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;

use crate::state::{Component, World};
use crate::wasip3;
use crate::workload::Bounds;

/// A component that answers, by the WASI that it is of.
pub enum Answering {
    /// 0.2.
    P2(ProxyPre<Component>),
    /// 0.3.
    P3(wasip3::ServicePre<Component>),
}

/// A component and where it is served.
pub struct Server {
    pre: Answering,
    port: u16,
    connections: u32,
}

impl Server {
    /// Serves `pre` on `port`, to so many connections at the same time.
    pub fn new(pre: Answering, port: u16, connections: u32) -> Self {
        Self { pre, port, connections }
    }
}

struct Shared {
    pre: Answering,
    world: World,
    bounds: Bounds,
}

/// Serves until the process is ended.
pub async fn run(server: Server, world: World, bounds: Bounds) -> wasmtime::Result<()> {
    let listener = listen(server.port).await?;
    let slots = Arc::new(Semaphore::new(usize::try_from(server.connections)?));
    let shared = Arc::new(Shared { pre: server.pre, world, bounds });
    loop {
        let slot = slots.clone().acquire_owned().await?;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // One connection's, or descriptors that come back when others end.
                eprintln!("accept: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                continue;
            }
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            connection(stream, shared).await;
            drop(slot);
        });
    }
}

/// Both families where there are both.
async fn listen(port: u16) -> wasmtime::Result<TcpListener> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    if let Ok(listener) = TcpListener::bind(any).await {
        return Ok(listener);
    }
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    TcpListener::bind(any)
        .await
        .map_err(|error| wasmtime::format_err!("cannot listen on port {port}: {error}"))
}

async fn connection(stream: TcpStream, shared: Arc<Shared>) {
    // A small answer is one packet.
    let _ = stream.set_nodelay(true);
    let answer = service_fn(move |request| {
        let shared = shared.clone();
        async move { Ok::<_, std::convert::Infallible>(respond(shared, request).await) }
    });
    // How a connection ends is the client's affair.
    let _ = http1::Builder::new()
        .keep_alive(true)
        .pipeline_flush(true)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
}

async fn respond(
    shared: Arc<Shared>,
    request: Request<hyper::body::Incoming>,
) -> Response<HyperOutgoingBody> {
    match handle(shared, request).await {
        Ok(response) => response,
        Err(error) => {
            eprintln!("Error: {error:?}");
            let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
            let mut response = Response::new(body);
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        }
    }
}

async fn handle(
    shared: Arc<Shared>,
    request: Request<hyper::body::Incoming>,
) -> wasmtime::Result<Response<HyperOutgoingBody>> {
    let pre = match &shared.pre {
        Answering::P2(pre) => pre.clone(),
        Answering::P3(pre) => {
            return wasip3::respond(pre.clone(), &shared.world, shared.bounds, request).await;
        }
    };
    let mut store = Component::store(pre.engine(), &shared.world, shared.bounds)?;
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let request = store.data_mut().http().new_incoming_request(Scheme::Http, request)?;
    let out = store.data_mut().http().new_response_outparam(sender)?;
    // It may go on after its answer has begun.
    let task = tokio::spawn(async move {
        let proxy = pre.instantiate_async(&mut store).await?;
        proxy.wasi_http_incoming_handler().call_handle(store, request, out).await
    });
    match receiver.await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => {
            let reason = match task.await {
                Ok(Ok(())) => wasmtime::format_err!("it has ended without an answer"),
                Ok(Err(error)) => error,
                Err(error) => error.into(),
            };
            Err(reason.context("a request was not answered"))
        }
    }
}

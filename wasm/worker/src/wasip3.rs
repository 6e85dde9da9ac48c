//! WASI 0.3, which Wasmtime 48 calls experimental: its functions are linked, and its types known, for
//! code alone that was compiled where `wasmtime.wasi_0_3` is on ([`crate::engine::Variant::p3`]).

use http_body_util::BodyExt;
use hyper::{Request, Response};
use tokio::sync::oneshot;
use wasmtime::component::Linker;
use wasmtime_wasi::I32Exit;
pub use wasmtime_wasi::p3::bindings::CommandPre;
pub use wasmtime_wasi_http::p3::bindings::ServicePre;
use wasmtime_wasi_http::{Error, WasiBody, WasiHttpView};

use crate::state::{Component, World};
use crate::workload::Bounds;

/// Links all of it.
///
/// # Errors
/// The engine's.
pub fn link(linker: &mut Linker<Component>) -> wasmtime::Result<()> {
    wasmtime_wasi::p3::add_to_linker(linker)?;
    wasmtime_wasi_http::p3::add_to_linker(linker)
}

/// A body, and what ends with it.
fn watched(body: WasiBody) -> (WasiBody, oneshot::Receiver<()>) {
    let (alive, ended) = oneshot::channel::<()>();
    let body = body.map_frame(move |frame| {
        // Dropped with the body, whether that was read to its end or not.
        let _ = &alive;
        frame
    });
    (body.boxed_unsync(), ended)
}

/// Runs a program.
///
/// # Errors
/// Its exit code, or what has ended it.
pub async fn command(
    pre: &CommandPre<Component>,
    world: &World,
    bounds: Bounds,
) -> wasmtime::Result<()> {
    let mut store = Component::store(pre.engine(), world, bounds)?;
    let command = pre.instantiate_async(&mut store).await?;
    let run = store.run_concurrent(async |store| command.wasi_cli_run().call_run(store).await);
    match run.await?? {
        Ok(()) => Ok(()),
        // The program itself says that it has failed, and no more.
        Err(()) => Err(I32Exit(1).into()),
    }
}

/// Answers one request. What its body comes from runs on behind the answer.
///
/// # Errors
/// Why there is no answer.
pub async fn respond(
    pre: ServicePre<Component>,
    world: &World,
    bounds: Bounds,
    request: Request<hyper::body::Incoming>,
) -> wasmtime::Result<Response<WasiBody>> {
    let mut store = Component::store(pre.engine(), world, bounds)?;
    let (sender, receiver) = oneshot::channel();
    let task = tokio::spawn(async move {
        let service = pre.instantiate_async(&mut store).await?;
        let request = request.map(|body| body.map_err(Error::from).boxed_unsync());
        let (request, io) = {
            let view = store.data_mut().http();
            wasmtime_wasi_http::p3::Request::from_http(view.hooks, request)
        };
        store
            .run_concurrent(async |store| {
                let response = service.handle(store, request).await??;
                let response = store.with(|store| response.into_http(store, io))?;
                // The end of its body is awaited here: it is made by this very store.
                let (parts, body) = response.into_parts();
                let (body, ended) = watched(body);
                if sender.send(Response::from_parts(parts, body)).is_ok() {
                    let _ = ended.await;
                }
                wasmtime::error::Ok(())
            })
            .await?
    });
    match receiver.await {
        Ok(response) => Ok(response),
        Err(_) => match task.await {
            Ok(Ok(())) => Err(wasmtime::format_err!("it has ended without an answer")),
            Ok(Err(error)) => Err(error),
            Err(error) => Err(error.into()),
        },
    }
}

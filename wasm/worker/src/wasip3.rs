//! WASI 0.3, which Wasmtime 48 calls experimental: its functions are linked, and its types known, for
//! code alone that was compiled where `wasmtime.wasi_0_3` is on ([`crate::engine::Variant::p3`]).

use http_body_util::BodyExt;
use hyper::{Request, Response};
use tokio::sync::oneshot;
use wasm_common::kind::{Detected, Kind, detect};
use wasmparser::{Parser, Payload};
use wasmtime::component::Linker;
use wasmtime_wasi::I32Exit;
pub use wasmtime_wasi::p3::bindings::CommandPre;
pub use wasmtime_wasi_http::p3::bindings::ServicePre;
use wasmtime_wasi_http::{Error, WasiBody, WasiHttpView};

use crate::state::{Component, World};
use crate::workload::Bounds;

/// How an interface of WASI 0.3 is named, behind `wasi:…/…`.
const VERSION: &str = "@0.3.";

/// Links all of it.
///
/// # Errors
/// The engine's.
pub fn link(linker: &mut Linker<Component>) -> wasmtime::Result<()> {
    wasmtime_wasi::p3::add_to_linker(linker)?;
    wasmtime_wasi_http::p3::add_to_linker(linker)
}

/// Refuses a component of WASI 0.3.
///
/// # Errors
/// With the key that has to be on. What is no component is somebody else's to explain.
pub fn refuse(bytes: &[u8]) -> Result<(), String> {
    if detect(bytes) != Detected::Wasm(Kind::Component) {
        return Ok(());
    }
    match interface(bytes) {
        Some(name) => Err(format!(
            "it is of WASI 0.3 ({name:.100}), which runs where wasmtime.wasi_0_3 is on"
        )),
        None => Ok(()),
    }
}

/// An interface of WASI 0.3 that a component imports or exports itself.
fn interface(bytes: &[u8]) -> Option<String> {
    let mut depth = 0_u32;
    for payload in Parser::new(0).parse_all(bytes) {
        // What cannot be read has an end here: the compiler says what is wrong with it.
        match payload.ok()? {
            // They may be called as they like inside.
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::ComponentImportSection(section) if depth == 0 => {
                if let Some(name) = wanted(section.into_iter().flatten().map(|it| it.name.name)) {
                    return Some(name);
                }
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                if let Some(name) = wanted(section.into_iter().flatten().map(|it| it.name.name)) {
                    return Some(name);
                }
            }
            _ => {}
        }
    }
    None
}

/// The first name of an interface of WASI 0.3.
fn wanted<'a>(mut names: impl Iterator<Item = &'a str>) -> Option<String> {
    names.find(|name| name.starts_with("wasi:") && name.contains(VERSION)).map(str::to_owned)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn component(text: &str) -> Vec<u8> {
        wat::parse_str(format!("(component {text})")).unwrap()
    }

    #[test]
    fn a_component_of_wasi_0_3_is_refused_with_the_key() {
        for text in [
            r#"(import "wasi:random/random@0.3.0" (instance))"#,
            r#"(instance $i) (export "wasi:cli/run@0.3.1" (instance $i))"#,
        ] {
            let error = refuse(&component(text)).unwrap_err();
            assert!(error.contains("wasmtime.wasi_0_3") && error.contains("@0.3."), "{error}");
        }
        for text in [
            r#"(import "wasi:random/random@0.2.3" (instance))"#,
            r#"(import "other:thing/x@0.3.0" (instance))"#,
            // What it calls its own parts inside.
            r#"(component (import "wasi:random/random@0.3.0" (instance)))"#,
        ] {
            refuse(&component(text)).unwrap();
        }
        refuse(&wat::parse_str("(module)").unwrap()).unwrap();
        refuse(b"\0asm\x0d\0\x01\0\xff").unwrap();
        refuse(b"").unwrap();
    }
}

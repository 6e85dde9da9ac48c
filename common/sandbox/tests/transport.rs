//! One socket for gRPC and ttrpc, and what bad clients do to it: nothing.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests

mod support;

use std::time::Duration;

use kuasar_protos::controller as api;
use protobuf::well_known_types::any::Any;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::Code;

fn ctx() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(10_000_000_000)
}

fn ttrpc_code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> ttrpc::Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        e => panic!("{e:?}"),
    }
}

#[tokio::test]
async fn ttrpc_and_grpc_clients_share_the_socket_and_the_sandboxes() {
    let bed = bed().await;
    let (g, t) = (bed.grpc().await, bed.ttrpc_controller().await);
    t.create(ctx(), &create_request("pod")).await.unwrap();
    assert_eq!(g.start("pod").await.unwrap().pid, 42);
    let q = api::ControllerStatusRequest { sandbox_id: "pod".into(), ..Default::default() };
    assert_eq!(t.status(ctx(), &q).await.unwrap().state, "SANDBOX_READY");
    let q = api::ControllerStatusRequest { sandbox_id: "other".into(), ..Default::default() };
    assert_eq!(ttrpc_code(t.status(ctx(), &q).await), ttrpc::Code::NOT_FOUND);
    assert_eq!(
        ttrpc_code(t.create(ctx(), &create_request("a/b")).await),
        ttrpc::Code::INVALID_ARGUMENT
    );
    let request = ttrpc::proto::Request {
        service: "containerd.services.sandbox.v1.Controller".into(),
        method: "Nonsense".into(),
        ..Default::default()
    };
    let unknown = bed.ttrpc().await.request(request).await;
    assert_eq!(ttrpc_code(unknown), ttrpc::Code::UNIMPLEMENTED);
    bed.sandboxer.panicking.lock().unwrap().insert("stop");
    let q = api::ControllerStopRequest { sandbox_id: "pod".into(), ..Default::default() };
    assert_eq!(ttrpc_code(t.stop(ctx(), &q).await), ttrpc::Code::INTERNAL);
}

#[tokio::test]
async fn a_message_over_the_limit_is_resource_exhausted() {
    let bed = bed().await;
    let c = bed.grpc().await;
    let mut q = create_request("pod");
    q.options.mut_or_insert_default().value = vec![0; 20 << 20];
    assert_eq!(code(c.create_with(q).await), Code::ResourceExhausted);
    // One that fits is read, though it is larger than every window.
    let mut q = create_request("pod");
    q.options =
        Some(Any { type_url: "x".into(), value: vec![0; 15 << 20], ..Default::default() }).into();
    assert_eq!(code(c.create_with(q).await), Code::InvalidArgument);
    c.up("pod").await;
}

#[tokio::test]
async fn silent_and_strange_clients_are_dropped() {
    let bed = bed_with(|o| o.hello_timeout = Duration::from_millis(50)).await;
    for hello in [&b""[..], b"\x7fELF", b"GET / HTTP/1.1\r\n\r\n", b"PRI nonsense, really !!!\r\n"]
    {
        let mut client = UnixStream::connect(&bed.options.socket).await.unwrap();
        client.write_all(hello).await.unwrap();
        let mut rest = Vec::new();
        let end = client.read_to_end(&mut rest);
        // A reset is an end as well.
        let _ = tokio::time::timeout(Duration::from_secs(5), end).await.unwrap();
    }
    bed.grpc().await.up("pod").await;
}

#[tokio::test]
async fn a_thousand_idle_connections_do_not_disturb_the_engine() {
    let bed = bed_with(|o| o.hello_timeout = Duration::from_millis(500)).await;
    let engine = bed.grpc().await;
    engine.up("pod").await;
    let mut idle = Vec::new();
    for _ in 0..1000 {
        idle.push(UnixStream::connect(&bed.options.socket).await.unwrap());
    }
    assert_eq!(engine.state("pod").await, "SANDBOX_READY");
    // All are closed: those over the limit at once, the others when they stay silent.
    for mut client in idle {
        let read = client.read_u8();
        let end = tokio::time::timeout(Duration::from_secs(5), read).await.unwrap();
        assert!(end.is_err());
    }
    bed.grpc().await.up("another").await;
}

#[tokio::test]
async fn only_permitted_peers_may_connect() {
    let bed =
        bed_with(|o| o.peer_check = Some(std::sync::Arc::new(|peer| peer.uid() == 4711))).await;
    let mut client = UnixStream::connect(&bed.options.socket).await.unwrap();
    let end = tokio::time::timeout(Duration::from_secs(5), client.read_u8()).await.unwrap();
    assert!(end.is_err());
}

#[tokio::test]
async fn wait_is_never_answered_by_a_daemon_that_ends() {
    let bed = bed().await;
    let (g, t) = (bed.grpc().await, bed.ttrpc_controller().await);
    let address = g.up("pod").await.address;
    let over_grpc = tokio::spawn(async move { g.wait("pod").await });
    let over_ttrpc = tokio::spawn(async move {
        let q = api::ControllerWaitRequest { sandbox_id: "pod".into(), ..Default::default() };
        t.wait(ttrpc::context::with_timeout(0), &q).await
    });
    // Both are under way once requests behind them on the same runtime have been answered.
    let probe = bed.grpc().await;
    until("waits are open", async || {
        probe.state("pod").await == "SANDBOX_READY" && !over_grpc.is_finished()
    })
    .await;
    let (_dir, _sockets, _) = bed.end().await;
    let limit = Duration::from_secs(5);
    let e = tokio::time::timeout(limit, over_grpc).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(e.code(), Code::Unavailable | Code::Unknown), "{e:?}");
    let e = tokio::time::timeout(limit, over_ttrpc).await.unwrap().unwrap().unwrap_err();
    assert!(!matches!(e, ttrpc::Error::RpcStatus(_)), "{e:?}");
    drop(address);
}

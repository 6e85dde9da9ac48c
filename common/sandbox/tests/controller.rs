//! The rules of engine-contract §1.3, over gRPC on a real socket.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests

mod support;

use std::sync::Arc;
use std::time::Duration;

use containerd_sandbox::sandboxer::SandboxExit;
use kuasar_protos::controller as api;
use kuasar_protos::cri::{PodSandboxConfig, PodSandboxMetadata};
use kuasar_protos::types::Sandbox;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use support::*;
use tonic::Code;

fn any(url: &str, value: Vec<u8>) -> Any {
    Any { type_url: url.into(), value, ..Default::default() }
}

fn config() -> PodSandboxConfig {
    let metadata = PodSandboxMetadata { name: "web".into(), attempt: 2, ..Default::default() };
    let mut config = PodSandboxConfig {
        metadata: MessageField::some(metadata),
        hostname: "web-0".into(),
        ..Default::default()
    };
    config.annotations.insert("a".into(), "".into());
    let options = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    options.namespace_options.mut_or_insert_default().pid =
        kuasar_protos::cri::NamespaceMode::NODE.into();
    config
}

#[tokio::test]
async fn a_pod_lives_its_life() {
    let bed = bed().await;
    let c = bed.grpc().await;
    let mut q = create_request("pod");
    q.options =
        MessageField::some(any("runtime.v1.PodSandboxConfig", config().write_to_bytes().unwrap()));
    assert_eq!(c.create_with(q).await.unwrap().sandbox_id, "pod");
    assert_eq!(c.state("pod").await, "SANDBOX_NOTREADY");

    let s = c.start("pod").await.unwrap();
    assert_eq!((s.pid, s.version), (42, 3));
    assert!(s.address.starts_with("ttrpc+unix:///") && s.address.ends_with("/pod/task.sock"));
    assert!(s.created_at.seconds > 1_600_000_000);
    assert_eq!(s.labels["selinux_label"], "straw_t");
    assert_eq!(s.spec.value, b"{\"ociVersion\":\"1.2.0\"}");
    assert_eq!(straw_task::connect(&s.address, "c").await.unwrap().task_pid, 7);

    let status = c.status("pod", true).await.unwrap();
    assert_eq!((&*status.state, status.pid), ("SANDBOX_READY", 42));
    assert_eq!((&status.address, status.version), (&s.address, 3));
    assert_eq!(status.created_at, s.created_at);
    assert_eq!(status.info["straw"], "1");
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    assert_eq!(info["pid"], 42);
    assert_eq!(info["processStatus"], "running");
    assert_eq!(info["runtimeSpec"]["ociVersion"], "1.2.0");
    let expected = serde_json::json!({
        "metadata": { "name": "web", "attempt": 2 },
        "hostname": "web-0",
        "annotations": { "a": "" },
        "linux": { "security_context": { "namespace_options": { "pid": 2 } } },
    });
    assert_eq!(info["config"], expected);

    let waiting = tokio::spawn({
        let c = c.clone();
        async move { c.wait("pod").await }
    });
    c.stop("pod", 0).await.unwrap();
    let exit = waiting.await.unwrap().unwrap();
    assert_eq!(exit.exit_status, 0);
    assert_eq!(c.state("pod").await, "SANDBOX_NOTREADY");
    assert_eq!(c.wait("pod").await.unwrap(), exit);

    c.shutdown("pod").await.unwrap();
    assert_eq!(c.state("pod").await, "NotFound");
    assert_eq!(code(c.wait("pod").await), Code::NotFound);
    assert!(!bed.sandbox_dir("pod").exists());
    assert!(bed.sandboxer.world.lock().unwrap().is_empty());
    assert!(bed.sockets.pods().is_empty());
    assert!(straw_task::connect(&s.address, "c").await.is_err());
}

#[tokio::test]
async fn create_takes_what_both_engines_send_and_names_what_it_expects() {
    let bed = bed().await;
    let c = bed.grpc().await;
    let mut isulad = create_request("isulad");
    isulad.options = MessageField::some(any("", config().write_to_bytes().unwrap()));
    c.create_with(isulad).await.unwrap();
    let seen = bed.sandboxer.seen.lock().unwrap().clone().unwrap().0;
    assert_eq!(seen.config.hostname, "web-0");

    for (url, value) in [("runtime.v1.Other", vec![]), ("runtime.v1.PodSandboxConfig", vec![255])] {
        let mut q = create_request("bad");
        q.options = MessageField::some(any(url, value));
        let e = c.create_with(q).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument);
        assert!(e.message().contains("runtime.v1.PodSandboxConfig"), "{e}");
    }
    for netns in ["relative", "/a/../b", "/does/not/exist"] {
        let mut q = create_request("bad");
        q.netns_path = netns.into();
        assert_eq!(code(c.create_with(q).await), Code::InvalidArgument, "{netns}");
    }
    for id in ["", "a/b", "..", "-a", &"x".repeat(10_000)] {
        let e = c.create(id).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument);
        assert!(e.message().len() < 400);
    }
    assert_eq!(bed.sandboxer.count("create"), 1);
    assert_eq!(code(c.create("isulad").await), Code::AlreadyExists);
    assert_eq!(c.state("isulad").await, "SANDBOX_NOTREADY");
}

#[tokio::test]
async fn the_namespace_and_the_sandbox_reach_the_sandboxer() {
    let bed = bed().await;
    let c = bed.grpc().await;
    let mut q = create_request("pod");
    let sandbox = q.sandbox.mut_or_insert_default();
    sandbox.runtime.mut_or_insert_default().name = "io.containerd.kuasar-runc.v1".into();
    sandbox.labels.insert("name".into(), "x".into());
    let metadata =
        br#"{"Version":"v1","Metadata":{"RuntimeHandler":"kuasar","CNIResult":{"a":1}}}"#;
    sandbox.extensions.insert("metadata".into(), any("m", metadata.to_vec()));
    let mut q = tonic::Request::new(q);
    q.metadata_mut().insert("containerd-namespace", "k8s.io".parse().unwrap());
    c.call::<_, api::ControllerCreateResponse>("Create", q).await.unwrap();
    let seen = bed.sandboxer.seen.lock().unwrap().clone().unwrap().0;
    assert_eq!((&*seen.namespace, &*seen.runtime), ("k8s.io", "io.containerd.kuasar-runc.v1"));
    assert_eq!(seen.labels["name"], "x");
    let status = c.status("pod", true).await.unwrap();
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    assert_eq!(info["runtimeHandler"], "kuasar");
    assert_eq!(info["cniResult"]["a"], 1);
}

#[tokio::test]
async fn unknown_sandboxes_are_answered_as_the_engine_needs_it() {
    let bed = bed().await;
    let c = bed.grpc().await;
    assert_eq!(code(c.start("x").await), Code::NotFound);
    assert_eq!(code(c.stop("x", 0).await), Code::NotFound);
    assert_eq!(code(c.wait("x").await), Code::NotFound);
    assert_eq!(code(c.metrics("x").await), Code::NotFound);
    assert_eq!(code(c.status("x", false).await), Code::NotFound);
    c.shutdown("x").await.unwrap();
    let platform = c.platform().await.platform;
    assert_eq!(platform.os, "linux");
    assert!(["amd64", "arm64", "riscv64"].contains(&&*platform.architecture));
    assert_eq!(
        code(c.call::<_, Any>("Nonsense", tonic::Request::new(Any::new())).await),
        Code::Unimplemented
    );
}

#[tokio::test]
async fn a_failed_or_panicking_create_or_start_leaves_nothing_and_may_be_tried_again() {
    let bed = bed().await;
    let c = bed.grpc().await;
    for what in ["create", "start", "services"] {
        for panics in [false, true] {
            let set = if panics { &bed.sandboxer.panicking } else { &bed.sandboxer.failing };
            set.lock().unwrap().insert(what);
            let result = match c.create("pod").await {
                Ok(()) => c.start("pod").await.map(drop),
                e => e,
            };
            assert_eq!(code(result), Code::Internal, "{what}");
            set.lock().unwrap().clear();
            assert_eq!(c.state("pod").await, "NotFound");
            assert!(!bed.sandbox_dir("pod").exists());
            assert!(bed.sandboxer.world.lock().unwrap().is_empty());
            assert!(bed.sockets.pods().is_empty());
        }
    }
    c.up("pod").await;
    assert_eq!(c.state("pod").await, "SANDBOX_READY");
    assert_eq!(code(c.start("pod").await), Code::FailedPrecondition);
    assert_eq!(c.state("pod").await, "SANDBOX_READY");
}

#[tokio::test]
async fn stop_is_idempotent_uses_the_default_timeout_and_may_be_tried_again() {
    let bed = bed_with(|o| o.stop_timeout = Duration::from_secs(33)).await;
    let c = bed.grpc().await;
    c.up("pod").await;
    bed.sandboxer.failing.lock().unwrap().insert("stop");
    assert_eq!(code(c.stop("pod", 0).await), Code::Internal);
    assert_eq!(c.state("pod").await, "SANDBOX_READY");
    bed.sandboxer.failing.lock().unwrap().clear();
    c.stop("pod", 7).await.unwrap();
    c.stop("pod", 0).await.unwrap();
    let secs = Duration::from_secs;
    assert_eq!(*bed.sandboxer.timeouts.lock().unwrap(), [secs(33), secs(7)]);
}

#[tokio::test]
async fn shutdown_works_without_stop_and_ends_the_waits() {
    let bed = bed().await;
    let c = bed.grpc().await;
    c.up("pod").await;
    let waiting = tokio::spawn({
        let c = c.clone();
        async move { c.wait("pod").await }
    });
    until("the Wait is open", async || c.state("pod").await == "SANDBOX_READY").await;
    bed.sandboxer.failing.lock().unwrap().insert("remove");
    assert_eq!(code(c.shutdown("pod").await), Code::Internal);
    bed.sandboxer.failing.lock().unwrap().clear();
    c.shutdown("pod").await.unwrap();
    // The Wait may have come after the Shutdown: then the sandbox was unknown.
    match waiting.await.unwrap() {
        Ok(exit) => assert_eq!(exit.exit_status, 137),
        Err(e) => assert_eq!(e.code(), Code::NotFound),
    }
    c.up("pod").await;
}

#[tokio::test]
async fn a_sandbox_that_dies_by_itself_is_stopped_with_its_status() {
    let bed = bed().await;
    let c = bed.grpc().await;
    c.up("pod").await;
    let handle = bed.sandboxer.handles.lock().unwrap()["pod"].clone();
    let at = std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    handle.exited(SandboxExit { status: 9, at });
    handle.exited(SandboxExit { status: 10, at });
    let exit = c.wait("pod").await.unwrap();
    assert_eq!((exit.exit_status, exit.exited_at.seconds), (9, 1_700_000_000));
    assert_eq!(c.state("pod").await, "SANDBOX_NOTREADY");
    // What is left of it is still cleared by the engine's Stop, once.
    c.stop("pod", 0).await.unwrap();
    c.stop("pod", 0).await.unwrap();
    assert_eq!(bed.sandboxer.count("stop"), 1);
    assert_eq!(c.wait("pod").await.unwrap().exit_status, 9);
}

#[tokio::test]
async fn a_caller_that_gives_up_leaves_no_half_state() {
    let bed = bed().await;
    let c = bed.grpc().await;
    for what in ["create", "start"] {
        let gate = bed.sandboxer.gate(what);
        if what == "start" {
            c.create("pod").await.unwrap();
        }
        let mut q = tonic::Request::new(api::ControllerCreateRequest {
            sandbox_id: "pod".into(),
            ..Default::default()
        });
        q.set_timeout(Duration::from_millis(50));
        let gave_up = if what == "create" {
            code(c.call::<_, api::ControllerCreateResponse>("Create", q).await)
        } else {
            let q = api::ControllerStartRequest { sandbox_id: "pod".into(), ..Default::default() };
            let mut q = tonic::Request::new(q);
            q.set_timeout(Duration::from_millis(50));
            code(c.call::<_, api::ControllerStartResponse>("Start", q).await)
        };
        assert!(matches!(gave_up, Code::DeadlineExceeded | Code::Cancelled), "{gave_up:?}");
        // A slow start never blocks Status of this pod.
        assert_eq!(c.state("pod").await, "SANDBOX_NOTREADY");
        gate.add_permits(1);
        until("rolled back", async || c.state("pod").await == "NotFound").await;
        assert!(!bed.sandbox_dir("pod").exists());
        bed.sandboxer.gates.lock().unwrap().clear();
    }
}

#[tokio::test]
async fn a_slow_start_does_not_block_another_pod() {
    let bed = bed().await;
    let c = bed.grpc().await;
    let gate = bed.sandboxer.gate("start");
    c.create("slow").await.unwrap();
    let slow = tokio::spawn({
        let c = c.clone();
        async move { c.start("slow").await }
    });
    until("start runs", async || bed.sandboxer.count("start") == 1).await;
    bed.sandboxer.gates.lock().unwrap().clear();
    c.up("quick").await;
    gate.add_permits(1);
    slow.await.unwrap().unwrap();
}

#[tokio::test]
async fn update_changes_what_is_named_and_is_durable() {
    let bed = bed().await;
    let c = bed.grpc().await;
    c.up("pod").await;
    let mut sandbox = Sandbox::new();
    sandbox.extensions.insert("tasks".into(), any("t", b"1".to_vec()));
    sandbox.extensions.insert("other".into(), any("o", b"2".to_vec()));
    let q = api::ControllerUpdateRequest {
        sandbox_id: "pod".into(),
        sandbox: MessageField::some(sandbox.clone()),
        fields: vec!["extensions.tasks".into()],
        ..Default::default()
    };
    c.update(q.clone()).await.unwrap();
    let spec = bed.sandboxer.seen.lock().unwrap().clone().unwrap().0;
    assert_eq!(spec.extensions["tasks"], ("t".into(), b"1".to_vec()));
    assert!(!spec.extensions.contains_key("other"));
    let bad = api::ControllerUpdateRequest { fields: vec!["spec".into()], ..q.clone() };
    assert_eq!(code(c.update(bad).await), Code::InvalidArgument);
    bed.sandboxer.failing.lock().unwrap().insert("update");
    let all = api::ControllerUpdateRequest { fields: vec!["extensions".into()], ..q };
    assert_eq!(code(c.update(all).await), Code::Internal);
    let bed = bed.restart(|_, _| {}).await;
    let spec = bed.sandboxer.seen.lock().unwrap().clone().unwrap().0;
    assert_eq!(spec.extensions.keys().collect::<Vec<_>>(), ["tasks"]);
}

#[tokio::test]
async fn metrics_info_and_their_failures() {
    let bed = bed().await;
    let c = bed.grpc().await;
    c.up("pod").await;
    let m = c.metrics("pod").await.unwrap().metrics;
    assert_eq!((&*m.id, &*m.data.type_url), ("pod", "io.containerd.cgroups.v2.Metrics"));
    assert!(m.timestamp.seconds > 0);
    bed.sandboxer.panicking.lock().unwrap().extend(["metrics", "info"]);
    assert_eq!(code(c.metrics("pod").await), Code::Internal);
    let status = c.status("pod", true).await.unwrap();
    assert_eq!(status.state, "SANDBOX_READY");
    assert!(status.info.contains_key("info") && !status.info.contains_key("straw"));
}

#[tokio::test]
async fn limits_hold() {
    let bed = bed_with(|o| {
        o.max_sandboxes = 1;
        o.max_spec = 1000;
    })
    .await;
    let c = bed.grpc().await;
    let mut large = create_request("large");
    large.sandbox.mut_or_insert_default().extensions.insert("x".into(), any("", vec![0; 2000]));
    assert_eq!(code(c.create_with(large).await), Code::ResourceExhausted);
    c.create("a").await.unwrap();
    assert_eq!(code(c.create("b").await), Code::ResourceExhausted);
    c.shutdown("a").await.unwrap();
    c.create("b").await.unwrap();
}

#[tokio::test]
async fn an_endpoint_of_the_sandboxers_own_is_passed_on() {
    let bed = bed().await;
    let c = bed.grpc().await;
    *bed.sandboxer.address.lock().unwrap() = Some("ttrpc+vsock://3:1024".into());
    assert_eq!(c.up("pod").await.address, "ttrpc+vsock://3:1024");
    assert!(bed.sockets.pods().is_empty());
    assert_eq!(bed.sandboxer.count("services"), 0);
}

#[tokio::test]
async fn what_was_created_and_never_started_is_collected() {
    let bed = bed_with(|o| {
        o.unstarted_timeout = Duration::ZERO;
        o.open_timeout = Duration::from_millis(20);
    })
    .await;
    let c = bed.grpc().await;
    c.create("pod").await.unwrap();
    until("collected", async || c.state("pod").await == "NotFound").await;
}

#[tokio::test]
async fn failpoints_and_the_observer_are_called() {
    let points = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (p, s) = (points.clone(), seen.clone());
    let bed = bed_with(move |o| {
        o.failpoint = Some(Arc::new(move |name| {
            p.lock().unwrap().push(name);
            if name == "sandbox.start.after" { Err("told to".into()) } else { Ok(()) }
        }));
        o.observer = Some(Arc::new(move |rpc, code, _| s.lock().unwrap().push((rpc, code))));
    })
    .await;
    let c = bed.grpc().await;
    c.create("pod").await.unwrap();
    let e = c.start("pod").await.unwrap_err();
    assert!(e.message().contains("told to"), "{e}");
    assert_eq!(c.state("pod").await, "NotFound");
    assert!(bed.sockets.pods().is_empty());
    let expected = [
        "sandbox.create.before",
        "sandbox.create.after",
        "sandbox.start.before",
        "sandbox.start.after",
        "sandbox.shutdown.before",
        "sandbox.shutdown.after",
    ];
    assert_eq!(*points.lock().unwrap(), expected);
    let expected = [("Create", Code::Ok), ("Start", Code::Internal), ("Status", Code::NotFound)];
    let mut seen = seen.lock().unwrap().clone();
    // The Controller's own look around comes at its own time.
    seen.retain(|(rpc, _)| *rpc != "Collect");
    assert_eq!(seen, expected);
}

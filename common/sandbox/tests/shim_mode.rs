//! `sandboxer = "shim"`: containerd without a proxy plugin (engine-contract §8.2).

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests

mod support;

use std::time::Duration;

use containerd_sandbox::TaskProbe;
use kuasar_protos::endpoint as api;
use kuasar_protos::endpoint_ttrpc::EndpointClient;
use kuasar_protos::shim::sandbox_api as rt;
use kuasar_protos::shim::sandbox_async::SandboxClient;
use support::*;

fn ctx() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(10_000_000_000)
}

fn rpc_code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> ttrpc::Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        e => panic!("{e:?}"),
    }
}

fn open(id: &str) -> api::OpenRequest {
    api::OpenRequest {
        sandbox_id: id.into(),
        bundle: "/bundle".into(),
        namespace: "k8s.io".into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_pod_lives_its_life_over_its_own_socket() {
    let bed = bed().await;
    let endpoint = EndpointClient::new(bed.ttrpc().await);
    let address = endpoint.open(ctx(), &open("pod")).await.unwrap().address;
    assert!(address.starts_with("unix:///"));
    assert_eq!(endpoint.open(ctx(), &open("pod")).await.unwrap().address, address);
    let client = ttrpc::r#async::Client::connect(&address).await.unwrap();
    let pod = SandboxClient::new(client);

    // containerd asks for the sandbox as if it were a task; real tasks come with Start.
    assert_ne!(straw_task::connect(&address, "pod").await.unwrap().task_pid, 0);
    let early = straw_task::connect(&address, "c").await;
    assert_eq!(rpc_code(early), ttrpc::Code::FAILED_PRECONDITION);

    let id = || "pod".to_owned();
    let q = rt::CreateSandboxRequest { sandbox_id: id(), ..Default::default() };
    pod.create_sandbox(ctx(), &q).await.unwrap();
    let seen = bed.sandboxer.seen.lock().unwrap().clone().unwrap().0;
    assert_eq!(seen.namespace, "k8s.io");
    let q = rt::StartSandboxRequest { sandbox_id: id(), ..Default::default() };
    let started = pod.start_sandbox(ctx(), &q).await.unwrap();
    assert_eq!(started.pid, 42);
    assert!(started.created_at.seconds > 0);
    assert_eq!(straw_task::connect(&address, "c").await.unwrap().task_pid, 7);
    assert_eq!(straw_task::connect(&address, "pod").await.unwrap().task_pid, 42);

    let q = rt::PlatformRequest { sandbox_id: id(), ..Default::default() };
    assert_eq!(pod.platform(ctx(), &q).await.unwrap().platform.os, "linux");
    let q = rt::PingRequest { sandbox_id: id(), ..Default::default() };
    pod.ping_sandbox(ctx(), &q).await.unwrap();
    let q = rt::PingRequest { sandbox_id: "other".into(), ..Default::default() };
    assert_eq!(rpc_code(pod.ping_sandbox(ctx(), &q).await), ttrpc::Code::NOT_FOUND);
    let q = rt::SandboxMetricsRequest { sandbox_id: id(), ..Default::default() };
    assert_eq!(pod.sandbox_metrics(ctx(), &q).await.unwrap().metrics.id, "pod");
    let status = rt::SandboxStatusRequest { sandbox_id: id(), verbose: true, ..Default::default() };
    let answer = pod.sandbox_status(ctx(), &status).await.unwrap();
    assert_eq!((&*answer.state, answer.pid), ("SANDBOX_READY", 42));
    assert!(answer.info.contains_key("info"));

    let q = rt::StopSandboxRequest { sandbox_id: id(), ..Default::default() };
    pod.stop_sandbox(ctx(), &q).await.unwrap();
    let q = rt::WaitSandboxRequest { sandbox_id: id(), ..Default::default() };
    assert_eq!(pod.wait_sandbox(ctx(), &q).await.unwrap().exit_status, 0);
    let q = rt::ShutdownSandboxRequest { sandbox_id: id(), ..Default::default() };
    pod.shutdown_sandbox(ctx(), &q).await.unwrap();
    // Still answered on the same connection, and harmless.
    pod.shutdown_sandbox(ctx(), &q).await.unwrap();
    assert_eq!(pod.sandbox_status(ctx(), &status).await.unwrap().state, "SANDBOX_NOTREADY");
    assert!(!bed.sandbox_dir("pod").exists());
    assert!(!std::path::Path::new(address.strip_prefix("unix://").unwrap()).exists());
    // The id is free at once.
    endpoint.open(ctx(), &open("pod")).await.unwrap();
}

#[tokio::test]
async fn a_failed_create_can_still_be_shut_down_over_the_socket() {
    let bed = bed().await;
    let endpoint = EndpointClient::new(bed.ttrpc().await);
    let address = endpoint.open(ctx(), &open("pod")).await.unwrap().address;
    let pod = SandboxClient::new(ttrpc::r#async::Client::connect(&address).await.unwrap());
    bed.sandboxer.failing.lock().unwrap().insert("create");
    let q = rt::CreateSandboxRequest { sandbox_id: "pod".into(), ..Default::default() };
    assert_eq!(rpc_code(pod.create_sandbox(ctx(), &q).await), ttrpc::Code::INTERNAL);
    let q = rt::ShutdownSandboxRequest { sandbox_id: "pod".into(), ..Default::default() };
    pod.shutdown_sandbox(ctx(), &q).await.unwrap();
    assert!(bed.sandboxer.world.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_restarted_daemon_answers_for_sandbox_and_tasks() {
    let bed = bed().await;
    let endpoint = EndpointClient::new(bed.ttrpc().await);
    let address = endpoint.open(ctx(), &open("pod")).await.unwrap().address;
    let pod = SandboxClient::new(ttrpc::r#async::Client::connect(&address).await.unwrap());
    let q = rt::CreateSandboxRequest { sandbox_id: "pod".into(), ..Default::default() };
    pod.create_sandbox(ctx(), &q).await.unwrap();
    let q = rt::StartSandboxRequest { sandbox_id: "pod".into(), ..Default::default() };
    pod.start_sandbox(ctx(), &q).await.unwrap();
    let bed = bed.restart(|_, _| {}).await;
    assert_eq!(straw_task::connect(&address, "pod").await.unwrap().task_pid, 43);
    assert_eq!(straw_task::connect(&address, "c").await.unwrap().task_pid, 7);
    let existing =
        api::OpenRequest { sandbox_id: "pod".into(), existing: true, ..Default::default() };
    let endpoint = EndpointClient::new(bed.ttrpc().await);
    assert_eq!(endpoint.open(ctx(), &existing).await.unwrap().address, address);
}

#[tokio::test]
async fn a_socket_that_was_opened_and_not_used_does_not_outlive_the_daemon() {
    let bed = bed().await;
    let endpoint = EndpointClient::new(bed.ttrpc().await);
    let address = endpoint.open(ctx(), &open("pod")).await.unwrap().address;
    let bed = bed.restart(|_, _| {}).await;
    assert!(bed.sockets.pods().is_empty());
    assert!(!std::path::Path::new(address.strip_prefix("unix://").unwrap()).exists());
}

#[tokio::test]
async fn sockets_that_nobody_used_are_closed_and_probe_tells_what_lives() {
    let bed = bed_with(|o| {
        o.open_timeout = Duration::from_millis(20);
        o.tasks = Some(std::sync::Arc::new(|id| {
            let exit = (id == "ended").then_some((3, std::time::UNIX_EPOCH));
            ["ended", "lives"].contains(&id).then_some(TaskProbe { pid: 7, exit })
        }));
    })
    .await;
    let endpoint = EndpointClient::new(bed.ttrpc().await);
    endpoint.open(ctx(), &open("unused")).await.unwrap();
    until("collected", async || bed.sockets.pods().is_empty()).await;
    let bad = api::OpenRequest { bundle: "relative".into(), ..open("x") };
    assert_eq!(rpc_code(endpoint.open(ctx(), &bad).await), ttrpc::Code::INVALID_ARGUMENT);
    assert_eq!(rpc_code(endpoint.open(ctx(), &open("a/b")).await), ttrpc::Code::INVALID_ARGUMENT);
    let absent = api::OpenRequest { existing: true, ..open("x") };
    assert_eq!(rpc_code(endpoint.open(ctx(), &absent).await), ttrpc::Code::NOT_FOUND);

    bed.grpc().await.up("pod").await;
    let probe = async |sandbox: &str, container: &str| {
        let q = api::ProbeRequest {
            sandbox_id: sandbox.into(),
            container_id: container.into(),
            ..Default::default()
        };
        endpoint.probe(ctx(), &q).await.unwrap()
    };
    assert!(probe("pod", "").await.alive);
    assert!(!probe("other", "").await.alive);
    assert!(probe("", "lives").await.alive);
    let ended = probe("", "ended").await;
    assert!(!ended.alive && ended.exit_status == 3 && ended.exited_at.is_some());
    let q = api::CloseRequest { sandbox_id: "pod".into(), ..Default::default() };
    endpoint.close(ctx(), &q).await.unwrap();
    assert!(probe("pod", "").await.alive);
}

/// A Task call, as an engine makes it that has no sandboxes.
async fn task<A: protobuf::Message>(
    client: &ttrpc::r#async::Client,
    method: &str,
    q: &impl protobuf::Message,
) -> ttrpc::Result<A> {
    let request = ttrpc::proto::Request {
        service: "containerd.task.v2.Task".into(),
        method: method.into(),
        payload: q.write_to_bytes().unwrap(),
        timeout_nano: 10_000_000_000,
        ..Default::default()
    };
    let response = client.request(request).await?;
    Ok(A::parse_from_bytes(&response.payload).unwrap())
}

#[tokio::test]
async fn a_pause_containers_life_is_the_pods() {
    use kuasar_protos::shim::api as t;
    use protobuf::well_known_types::empty::Empty;
    let bed = bed().await;
    let endpoint = EndpointClient::new(bed.ttrpc().await);
    let address = endpoint.open(ctx(), &open("pod")).await.unwrap().address;
    let client = ttrpc::r#async::Client::connect(&address).await.unwrap();
    let bundle = tempfile::tempdir().unwrap();
    let create = t::CreateTaskRequest {
        id: "pod".into(),
        bundle: bundle.path().display().to_string(),
        ..Default::default()
    };
    // A bundle that says nothing leaves nothing.
    let failed = task::<t::CreateTaskResponse>(&client, "Create", &create).await;
    assert_eq!(rpc_code(failed), ttrpc::Code::INVALID_ARGUMENT);
    let spec = r#"{"hostname":"web","annotations":{"io.kubernetes.cri.container-type":"sandbox",
        "io.kubernetes.cri.sandbox-name":"web-0"},"linux":{"namespaces":[{"type":"ipc"}]}}"#;
    std::fs::write(bundle.path().join("config.json"), spec).unwrap();
    let made: t::CreateTaskResponse = task(&client, "Create", &create).await.unwrap();
    assert_eq!(made.pid, 42);
    let seen = bed.sandboxer.seen.lock().unwrap().clone().unwrap().0;
    assert_eq!((seen.config.hostname.as_str(), seen.namespace.as_str()), ("web", "k8s.io"));
    assert_eq!(seen.config.metadata.name, "web-0");
    let start = t::StartRequest { id: "pod".into(), ..Default::default() };
    assert_eq!(task::<t::StartResponse>(&client, "Start", &start).await.unwrap().pid, 42);
    let exec = t::StartRequest { exec_id: "e".into(), ..start };
    let refused = task::<t::StartResponse>(&client, "Start", &exec).await;
    assert_eq!(rpc_code(refused), ttrpc::Code::UNIMPLEMENTED);
    // Containers are served beside it.
    assert_eq!(straw_task::connect(&address, "c").await.unwrap().task_pid, 7);
    let state = t::StateRequest { id: "pod".into(), ..Default::default() };
    let running: t::StateResponse = task(&client, "State", &state).await.unwrap();
    assert_eq!(running.status.enum_value_or_default(), t::Status::RUNNING);
    let delete = t::DeleteRequest { id: "pod".into(), ..Default::default() };
    let early = task::<t::DeleteResponse>(&client, "Delete", &delete).await;
    assert_eq!(rpc_code(early), ttrpc::Code::FAILED_PRECONDITION);
    let kill = |signal| t::KillRequest { id: "pod".into(), signal, ..Default::default() };
    task::<Empty>(&client, "Kill", &kill(0)).await.unwrap();
    assert!(bed.sandboxer.timeouts.lock().unwrap().is_empty(), "0 only asks");
    // A wait that was begun before is answered by the end.
    let wait = t::WaitRequest { id: "pod".into(), ..Default::default() };
    let waiting = client.clone();
    let waiting =
        tokio::spawn(async move { task::<t::WaitResponse>(&waiting, "Wait", &wait).await });
    task::<Empty>(&client, "Kill", &kill(9)).await.unwrap();
    assert!(waiting.await.unwrap().unwrap().exited_at.is_some());
    let twice = task::<Empty>(&client, "Kill", &kill(9)).await;
    assert_eq!(rpc_code(twice), ttrpc::Code::NOT_FOUND);
    task::<t::DeleteResponse>(&client, "Delete", &delete).await.unwrap();
    assert!(!bed.sandbox_dir("pod").exists());
    assert!(bed.sandboxer.world.lock().unwrap().is_empty());
}

//! One trace follows a pod's start through containerd, the sandboxer, sandbox-parent and the guest.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use kuasar_host::hex;
use kuasar_tests::collector::{Collector, Seen};
use kuasar_tests::cri::*;
use kuasar_tests::{bed, cri, kind, on, ours, switch, wait_for};

const CALLER: [u8; 8] = [7; 8];

/// containerd and the daemon send traces; as they were when dropped.
struct Traced {
    path: PathBuf,
    text: String,
}

impl Traced {
    fn to(endpoint: &str) -> Self {
        let path = bed().join(format!("etc/kuasar-{}.toml", kind()));
        let text = std::fs::read_to_string(&path).unwrap();
        let more = format!("{text}\n[tracing]\nendpoint = \"{endpoint}\"\ninterval = \"100ms\"\n");
        std::fs::write(&path, more).unwrap();
        let traced = Self { path, text };
        switch(&["daemon", "stop"], &[]);
        switch(&["daemon", "start"], &[]);
        switch(&["containerd", "kill"], &[]);
        let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint), ("OTEL_BSP_SCHEDULE_DELAY", "100")];
        switch(&["containerd", "start"], &env);
        traced
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.path, &self.text);
        switch(&["daemon", "stop"], &[]);
        switch(&["daemon", "start"], &[]);
        switch(&["containerd", "kill"], &[]);
        switch(&["containerd", "start"], &[]);
    }
}

/// A request of CRI as kubelet sends it when it traces.
fn traced<T>(message: T, trace: &[u8; 16]) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(Duration::from_secs(120));
    let value = format!("00-{}-{}-01", hex(trace), hex(&CALLER));
    request.metadata_mut().insert("traceparent", value.parse().unwrap());
    request
}

/// A pod with a container that has been started, all in one trace; answers the container's id.
fn start(pod: &mut Option<Pod>, name: &str, trace: &[u8; 16]) -> String {
    let config = pod_config(name);
    std::fs::create_dir_all(&config.log_directory).unwrap();
    runtime().block_on(async {
        let mut cri = connect().await;
        let run = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: kuasar_tests::handler(),
        };
        let id = cri.run_pod_sandbox(traced(run, trace)).await.unwrap().into_inner().pod_sandbox_id;
        *pod = Some(Pod { id: id.clone(), config: config.clone() });
        let create = CreateContainerRequest {
            pod_sandbox_id: id,
            config: Some(container_config(&config, &["sleep", "1000"])),
            sandbox_config: Some(config),
        };
        let made = cri.create_container(traced(create, trace)).await.unwrap().into_inner();
        let container_id = made.container_id;
        let start = StartContainerRequest { container_id: container_id.clone() };
        cri.start_container(traced(start, trace)).await.unwrap();
        container_id
    })
}

fn find<'a>(spans: &'a [Seen], service: &str, name: &str) -> Option<&'a Seen> {
    spans.iter().find(|s| s.service == service && s.span.name == name)
}

/// Spans above a span, the nearest first.
fn above<'a>(spans: &'a [Seen], of: &'a Seen) -> Vec<&'a Seen> {
    let mut all = Vec::new();
    let mut at = of;
    while let Some(next) = spans.iter().find(|s| s.span.span_id == at.span.parent_span_id) {
        assert!(all.len() < 100, "a ring");
        all.push(next);
        at = next;
    }
    assert_eq!(all.last().unwrap_or(&of).span.parent_span_id, CALLER, "of {}", of.span.name);
    all
}

fn below<'a>(spans: &'a [Seen], of: &Seen) -> Vec<&'a Seen> {
    spans.iter().filter(|s| s.span.parent_span_id == of.span.span_id).collect()
}

/// Names of the spans directly below one.
fn names(spans: &[Seen], of: &Seen) -> Vec<String> {
    below(spans, of).iter().map(|s| s.span.name.clone()).collect()
}

#[test]
fn one_trace_follows_a_pods_start_through_all_processes() {
    if !ours() {
        return;
    }
    let collector = Collector::start();
    let _traced = Traced::to(&format!("http://{}", collector.address));
    let trace: [u8; 16] = (unique() as u128 | 1 << 127).to_be_bytes();
    let daemon = format!("{}-sandboxer", kind());
    let mut pod = None;
    let container = start(&mut pod, "traced", &trace);
    let pod = pod.unwrap();
    let task = |method: &str| format!("containerd.task.v3.Task/{method}");
    wait_for("the spans of the start", Duration::from_secs(30), || {
        let spans = collector.of(&trace);
        find(&spans, "containerd", "runtime.v1.RuntimeService/StartContainer").is_some()
            && find(&spans, &daemon, &task("Start")).is_some()
    });
    let spans = collector.of(&trace);
    for method in ["Create", "Start"] {
        let span = find(&spans, &daemon, &task(method)).unwrap();
        assert_eq!(span.attribute("container.id"), Some(container.as_str()));
        assert_eq!(span.attribute("kuasar.sandbox.id"), Some(pod.id.as_str()));
        // Its parent is the call as containerd has seen it, and above that is kubelet's.
        let all = above(&spans, span);
        assert_eq!((all[0].service.as_str(), all[0].span.kind), ("containerd", 3), "{all:#?}");
        assert!(all.iter().any(|s| s.span.name.ends_with("StartContainer")), "{all:#?}");
        let (outer, inner) = (&all[0].span, &span.span);
        assert!(outer.start_time_unix_nano <= inner.start_time_unix_nano);
        assert!(outer.end_time_unix_nano >= inner.end_time_unix_nano);
    }
    let create = find(&spans, &daemon, &task("Create")).unwrap();
    let parts = names(&spans, create);
    for part in ["rootfs", "engine_create", "sandbox-parent spawn"] {
        assert!(parts.iter().any(|p| p == part), "no {part}: {parts:?}");
    }
    // Since 2.3 containerd passes its trace to the Controller, too. Without that, one of our own holds
    // the pod's Create and Start together.
    let controller = |method: &str| format!("containerd.services.sandbox.v1.Controller/{method}");
    let of_pod = |method: &str| {
        let all = collector.spans();
        let mut named = all.into_iter().filter(|s| s.span.name == controller(method));
        named.find(|s| s.service == daemon && s.attribute("kuasar.sandbox.id") == Some(&pod.id))
    };
    wait_for("the Controller's spans", Duration::from_secs(30), || of_pod("Start").is_some());
    let (made, started) = (of_pod("Create").unwrap(), of_pod("Start").unwrap());
    assert_eq!(made.span.trace_id, started.span.trace_id);
    if made.span.trace_id == trace {
        for span in [&made, &started] {
            assert_eq!(above(&spans, span)[0].service, "containerd");
        }
    } else {
        assert_eq!(started.span.parent_span_id, made.span.span_id);
        println!("this containerd passes no trace to the Controller: {}", version());
    }
    let own = collector.of(&started.span.trace_id);
    let parent = [names(&own, &made), names(&own, &started)].concat();
    assert!(parent.iter().any(|p| p == "sandbox-parent namespaces"), "{parent:?}");
    assert!(parent.iter().any(|p| p == "sandbox-parent listen"), "{parent:?}");
}

#[test]
fn a_trace_reaches_into_the_guest() {
    let Some(_on) = on("kuasar-vmm") else { return };
    let collector = Collector::start();
    let _traced = Traced::to(&format!("http://{}", collector.address));
    let trace: [u8; 16] = (unique() as u128 | 1 << 127).to_be_bytes();
    let mut pod = None;
    start(&mut pod, "traced-vm", &trace);
    let (create, start) = ("containerd.task.v3.Task/Create", "containerd.task.v3.Task/Start");
    let mut seen = 0;
    wait_for("the guest's spans", Duration::from_secs(60), || {
        let spans = collector.of(&trace);
        if spans.len() > seen {
            seen = spans.len();
            let names = spans.iter().map(|s| format!("{} {}", s.service, s.span.name));
            println!("{seen} spans: {}", names.collect::<Vec<_>>().join(", "));
        }
        [create, start].iter().all(|name| find(&spans, "vmm-task", name).is_some())
            && find(&spans, "vmm-sandboxer", start).is_some()
            && find(&spans, "containerd", "runtime.v1.RuntimeService/StartContainer").is_some()
    });
    let spans = collector.of(&trace);
    for name in [create, start] {
        let guest = find(&spans, "vmm-task", name).unwrap();
        // The daemon's call of the guest, the call of the daemon, and containerd's.
        let all = above(&spans, guest);
        let services: Vec<&str> = all.iter().map(|s| s.service.as_str()).collect();
        assert_eq!(services[..3], ["vmm-sandboxer", "vmm-sandboxer", "containerd"]);
        assert_eq!((all[0].span.kind, all[1].span.kind), (3, 2));
        assert!(guest.span.start_time_unix_nano >= all[0].span.start_time_unix_nano);
        assert!(guest.span.end_time_unix_nano <= all[0].span.end_time_unix_nano);
    }
    let guest = find(&spans, "vmm-task", create).unwrap();
    assert!(names(&spans, guest).iter().any(|n| n == "engine_create"), "{spans:#?}");
}

#[test]
fn pods_start_as_ever_when_the_collector_is_away_or_silent() {
    if !ours() {
        return;
    }
    // Nobody listens there in the bed's own network namespace.
    let _traced = Traced::to("http://127.0.0.1:9");
    let pod = Pod::run(pod_config("untraced"));
    let c = pod.start(&["sh", "-c", "exit 4"]);
    assert_eq!(c.wait(), 4);
    // Where the bed's configuration has it.
    let metrics = bed().join(format!("run/kuasar-{}-metrics.sock", kind()));
    wait_for("the loss is counted", Duration::from_secs(20), || {
        let mut socket = UnixStream::connect(&metrics).unwrap();
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        let lost = text.lines().find(|l| l.starts_with("kuasar_trace_spans_dropped_total"));
        lost.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).is_some_and(|n| n > 0.0)
    });
}

fn version() -> String {
    cri!(version, VersionRequest { version: String::new() }).unwrap().runtime_version
}

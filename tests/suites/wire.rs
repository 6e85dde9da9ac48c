//! Bad input that CRI cannot send, straight to the daemon's socket and the pods' task sockets.
//!
//! Each of these tests has a neighbour: a pod with a container that must not notice.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kuasar_protos::controller as api;
use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::wire::{self, Bundle, Direct, controller, create_request};
use kuasar_tests::{bed, daemon_pid, inside, leaks, ours, task, wait_for};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use tonic::{Code, Status};

/// A container that goes on, whatever happens to others; at the end nothing else is left.
struct Neighbour {
    before: leaks::Snapshot,
    pod: Pod,
    container: Container,
    pid: u32,
    daemon: u32,
}

impl Neighbour {
    /// `None` where the handler is not ours.
    fn new() -> Option<Self> {
        if !ours() {
            return None;
        }
        let before = leaks::snapshot();
        let pod = Pod::run(pod_config("neighbour"));
        let container = pod.start(&["sleep", "1000"]);
        let pid = container.pid();
        Some(Self { before, pod, container, pid, daemon: daemon_pid() })
    }

    /// It goes on, under the same daemon, and nothing is left of others.
    fn goes_on(self) {
        assert!(std::path::Path::new(&format!("/proc/{}/exe", self.daemon)).exists());
        assert!(self.container.is_running());
        assert_eq!(self.container.pid(), self.pid);
        assert_eq!(self.container.sh("echo on"), "on");
        self.pod.remove().unwrap();
        leaks::assert_none(&self.before);
    }
}

/// Asserts the code, and that the text has all of these words and is no flood.
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, words: &[&str]) {
    let e = answer.expect_err("this must not work");
    assert_eq!(e.code(), code, "{e}");
    for word in words {
        assert!(e.message().contains(word), "no {word:?} in {:?}", e.message());
    }
    assert!(e.message().len() < 1000, "{} bytes: {:.200}", e.message().len(), e.message());
}

fn create(q: api::ControllerCreateRequest) -> Result<api::ControllerCreateResponse, Status> {
    controller("Create", q)
}

#[test]
fn a_malformed_spec_is_explained_and_leaves_nothing() {
    let Some(neighbour) = Neighbour::new() else { return };
    {
        let pod = Direct::run("spec");
        let good = Bundle::new(&["true"]);
        let without = |pointer: &str, key: &str| {
            let mut spec = good.spec.clone();
            spec.pointer_mut(pointer).unwrap().as_object_mut().unwrap().remove(key);
            spec.to_string()
        };
        let with = |pointer: &str, key: &str, value: serde_json::Value| {
            let mut spec = good.spec.clone();
            spec.pointer_mut(pointer).unwrap()[key] = value;
            spec.to_string()
        };
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let bad: &[(&str, String, &str)] = &[
            ("no JSON", "{".into(), "config.json"),
            ("empty", String::new(), "config.json"),
            ("an array", "[]".into(), "config.json"),
            ("too deep", deep, "config.json"),
            ("too large", " ".repeat(5 << 20), "config.json"),
            ("no process", without("", "process"), "process"),
            ("no linux", with("", "linux", json!("x")), "linux"),
            ("args is a string", with("/process", "args", json!("true")), "args"),
            ("namespaces is a map", with("/linux", "namespaces", json!({})), "namespaces"),
            ("a mount is a number", with("", "mounts", json!([1])), "mounts"),
            ("relative cwd", with("/process", "cwd", json!("tmp")), "cwd"),
            (
                "unknown namespace",
                with("/linux", "namespaces", json!([{ "type": "moon" }])),
                "moon",
            ),
        ];
        for (name, text, word) in bad {
            let q = good.request("broken");
            std::fs::write(good.dir.join("config.json"), text).unwrap();
            println!("{name}");
            refused(task!(&pod.socket, create, q), Code::InvalidArgument, &[word]);
            let q = tasks::StateRequest { id: "broken".into(), ..Default::default() };
            refused(task!(&pod.socket, state, q), Code::NotFound, &["broken"]);
        }
        // What only the engine can find.
        let q = good.request("broken");
        std::fs::write(good.dir.join("config.json"), with("/process", "args", json!([]))).unwrap();
        let e = task!(&pod.socket, create, q).unwrap_err();
        assert!(matches!(e.code(), Code::Internal | Code::InvalidArgument), "{e}");
        std::fs::remove_file(good.dir.join("config.json")).unwrap();
        let q = tasks::CreateTaskRequest {
            id: "broken".into(),
            bundle: good.dir.to_string_lossy().into_owned(),
            ..Default::default()
        };
        let e = task!(&pod.socket, create, q).unwrap_err();
        assert!(e.message().contains("config.json"), "{e}");
        assert_eq!(pod.run_to_end(&good).unwrap(), 0, "the pod itself goes on");
    }
    neighbour.goes_on();
}

#[test]
fn a_missing_rootfs_is_named() {
    let Some(neighbour) = Neighbour::new() else { return };
    {
        for engine in crate::engines::available() {
            let pod = Direct::run_on("rootfs", engine);
            let bundle = Bundle::new(&["true"]);
            let mut q = bundle.request("c");
            q.rootfs = vec![wire::rootfs_mount("bind", "/no/such/snapshot", &["rbind", "rw"])];
            let e = task!(&pod.socket, create, q).unwrap_err();
            assert!(e.message().contains("/no/such/snapshot"), "{engine}: {e}");
            std::fs::remove_dir_all(bundle.rootfs()).unwrap();
            let made = task!(&pod.socket, create, bundle.request("c"));
            refused(made, Code::InvalidArgument, &["rootfs is no directory"]);
            let q = tasks::StateRequest { id: "c".into(), ..Default::default() };
            refused(task!(&pod.socket, state, q), Code::NotFound, &["c"]);
        }
    }
    neighbour.goes_on();
}

#[test]
fn a_network_namespace_that_is_gone_is_named() {
    let Some(neighbour) = Neighbour::new() else { return };
    let mut q = create_request("netns");
    q.netns_path = "/run/netns/no-such-namespace".into();
    refused(create(q), Code::InvalidArgument, &["no-such-namespace"]);
    let mut q = create_request("netns");
    q.netns_path = "/etc/passwd".into();
    refused(create(q), Code::FailedPrecondition, &["/etc/passwd", "network namespace"]);
    for bad in ["netns/relative", "/run/netns/../../etc"] {
        let mut q = create_request("netns");
        q.netns_path = bad.into();
        refused(create(q), Code::InvalidArgument, &["netns_path"]);
    }
    // Gone between Create and Start.
    let path = bed().join(format!("run/logs/netns-{}", unique()));
    std::fs::write(&path, "").unwrap();
    let path = path.to_string_lossy().into_owned();
    assert!(inside(&["unshare", &format!("--net={path}"), "true"]).status.success());
    let mut q = create_request("netns");
    q.netns_path.clone_from(&path);
    create(q).unwrap();
    inside(&["umount", &path]);
    std::fs::remove_file(&path).unwrap();
    let q = api::ControllerStartRequest { sandbox_id: "netns".into(), ..Default::default() };
    let answer: Result<api::ControllerStartResponse, _> = controller("Start", q);
    refused(answer, Code::FailedPrecondition, &[&path]);
    neighbour.goes_on();
}

#[test]
fn an_id_that_is_no_file_name_is_refused_everywhere() {
    let Some(neighbour) = Neighbour::new() else { return };
    {
        let pod = Direct::run("ids");
        let bundle = Bundle::new(&["sleep", "1000"]);
        task!(&pod.socket, create, bundle.request("good")).unwrap();
        let long = "x".repeat(10_000);
        for id in ["../../etc", "a/b", "", ".", "..", "a\0b", "-rf", "é", &long] {
            println!("{id:.20}");
            refused(create(create_request(id)), Code::InvalidArgument, &["id"]);
            refused(task!(&pod.socket, create, bundle.request(id)), Code::InvalidArgument, &["id"]);
            let spec = json!({ "args": ["true"], "cwd": "/" }).to_string();
            let q = tasks::ExecProcessRequest {
                id: "good".into(),
                exec_id: id.into(),
                spec: MessageField::some(any(wire::PROCESS, spec.as_bytes())),
                ..Default::default()
            };
            refused(task!(&pod.socket, exec, q), Code::InvalidArgument, &["id"]);
            let q = api::ControllerStatusRequest { sandbox_id: id.into(), ..Default::default() };
            let answer: Result<api::ControllerStatusResponse, _> = controller("Status", q);
            refused(answer, Code::NotFound, &["not known"]);
            let q = tasks::StateRequest { id: id.into(), ..Default::default() };
            refused(task!(&pod.socket, state, q), Code::NotFound, &["not known"]);
        }
        // What is there already is not made again.
        refused(create(create_request(&pod.id)), Code::AlreadyExists, &["exists"]);
        refused(task!(&pod.socket, create, bundle.request("good")), Code::AlreadyExists, &["good"]);
    }
    neighbour.goes_on();
}

fn any(type_url: &str, value: &[u8]) -> Any {
    Any { type_url: type_url.into(), value: value.to_vec(), ..Any::default() }
}

#[test]
fn an_any_of_a_wrong_type_is_named_with_the_right_one() {
    let Some(neighbour) = Neighbour::new() else { return };
    {
        let mut q = create_request("any");
        q.options = MessageField::some(any("example.com/Moon", b""));
        refused(create(q), Code::InvalidArgument, &["example.com/Moon", "PodSandboxConfig"]);
        let mut q = create_request("any");
        q.options = MessageField::some(any("runtime.v1.PodSandboxConfig", &[0xff; 40]));
        refused(create(q), Code::InvalidArgument, &["PodSandboxConfig"]);
        let mut q = create_request("any");
        q.options = MessageField::some(any(&"x".repeat(100_000), b""));
        refused(create(q), Code::InvalidArgument, &["PodSandboxConfig"]);

        let pod = Direct::run("any");
        let bundle = Bundle::new(&["sleep", "1000"]);
        // Options are runc's: they are ignored, whatever they are.
        let mut q = bundle.request("c");
        q.options = MessageField::some(any("example.com/Moon", &[0xff; 40]));
        task!(&pod.socket, create, q).unwrap();
        let q = tasks::StartRequest { id: "c".into(), ..Default::default() };
        task!(&pod.socket, start, q).unwrap();
        for spec in [
            MessageField::none(),
            MessageField::some(any("example.com/Moon", b"{}")),
            MessageField::some(any(wire::PROCESS, b"\xff\xfe")),
            MessageField::some(any(wire::PROCESS, b"[1, 2]")),
        ] {
            let q = tasks::ExecProcessRequest {
                id: "c".into(),
                exec_id: "e".into(),
                spec,
                ..Default::default()
            };
            refused(task!(&pod.socket, exec, q), Code::InvalidArgument, &["spec"]);
        }
        let q = tasks::UpdateTaskRequest {
            id: "c".into(),
            resources: MessageField::some(any("example.com/Moon", b"{}")),
            ..Default::default()
        };
        refused(
            task!(&pod.socket, update, q),
            Code::InvalidArgument,
            &["example.com/Moon", "LinuxResources"],
        );
        let resources = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
        for text in ["x", "[]", r#"{"memory":{"limit":"much"}}"#] {
            let q = tasks::UpdateTaskRequest {
                id: "c".into(),
                resources: MessageField::some(any(resources, text.as_bytes())),
                ..Default::default()
            };
            refused(task!(&pod.socket, update, q), Code::InvalidArgument, &["resources"]);
        }
    }
    neighbour.goes_on();
}

#[test]
fn an_unknown_container_or_exec_is_not_found_by_any_method() {
    let Some(neighbour) = Neighbour::new() else { return };
    {
        let pod = Direct::run("unknown");
        let id = || "nobody".to_owned();
        macro_rules! nobody {
            ($($method:ident $request:ident),*) => {$(
                let q = tasks::$request { id: id(), ..Default::default() };
                refused(task!(&pod.socket, $method, q), Code::NotFound, &["nobody"]);
            )*};
        }
        nobody!(start StartRequest, state StateRequest, wait WaitRequest, delete DeleteRequest,
            kill KillRequest, pids PidsRequest, pause PauseRequest, resume ResumeRequest,
            resize_pty ResizePtyRequest, checkpoint CheckpointTaskRequest, stats StatsRequest,
            connect ConnectRequest, update UpdateTaskRequest);
        // It is for the sandbox alone to end: containerd calls this for each container.
        let q = tasks::ShutdownRequest { id: id(), ..Default::default() };
        task!(&pod.socket, shutdown, q).unwrap();
        let bundle = Bundle::new(&["sleep", "1000"]);
        task!(&pod.socket, create, bundle.request("c")).unwrap();
        let q = tasks::StartRequest { id: "c".into(), exec_id: id(), ..Default::default() };
        refused(task!(&pod.socket, start, q), Code::NotFound, &["nobody"]);
        for signal in [65, 9999, u32::MAX] {
            let q = tasks::KillRequest { id: "c".into(), signal, ..Default::default() };
            refused(task!(&pod.socket, kill, q), Code::InvalidArgument, &["signal"]);
        }
    }
    neighbour.goes_on();
}

#[test]
fn a_message_of_twenty_mebibytes_is_refused() {
    let Some(neighbour) = Neighbour::new() else { return };
    {
        let mut q = create_request("large");
        q.options = MessageField::some(any("runtime.v1.PodSandboxConfig", &vec![0; 20 << 20]));
        refused(create(q), Code::ResourceExhausted, &["limit"]);
        // Within the limit of a message, but more than is kept of one sandbox.
        let q = wire::create_with("large", |config| {
            config.labels.insert("large".into(), "x".repeat(12 << 20));
        });
        refused(create(q), Code::ResourceExhausted, &["bytes"]);

        let pod = Direct::run("large");
        // ttrpc's clients refuse it themselves: so by hand, header and body.
        let mut stream = wire::connect(&pod.socket);
        stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut header = (20_u32 << 20).to_be_bytes().to_vec();
        header.extend([0, 0, 0, 1, 1, 0]);
        stream.write_all(&header).unwrap();
        // It need not take it all; it must end the connection or answer, and not hang.
        let _ = stream.write_all(&vec![0; 20 << 20]);
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        assert!(
            ended.is_ok()
                || ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset)
                || !answer.is_empty(),
            "neither an answer nor an end"
        );
        let bundle = Bundle::new(&["true"]);
        assert_eq!(pod.run_to_end(&bundle).unwrap(), 0, "the pod itself goes on");
    }
    neighbour.goes_on();
}

fn memory_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn silent_and_idle_connections_do_no_harm() {
    let Some(neighbour) = Neighbour::new() else { return };
    {
        let pod = Direct::run("idle");
        let bundle = Bundle::new(&["true"]);
        assert_eq!(pod.run_to_end(&bundle).unwrap(), 0);
        let daemon = daemon_pid();
        let (fds, memory) = (leaks::descriptors(daemon), memory_kib(daemon));
        let mut idle: Vec<UnixStream> = Vec::new();
        for i in 0..1000 {
            idle.push(UnixStream::connect(wire::daemon_socket()).unwrap());
            if i < 500 {
                idle.push(wire::connect(&pod.socket));
            }
        }
        // Some have said half a word.
        for stream in idle.iter_mut().step_by(3) {
            let _ = stream.write_all(b"PRI * HTTP/2.0\r\n");
        }
        assert_eq!(pod.run_to_end(&bundle).unwrap(), 0, "while they are there");
        let works = Pod::run(pod_config("works"));
        assert_eq!(works.start(&["sh", "-c", "exit 2"]).wait(), 2);
        drop(works);
        let grown = memory_kib(daemon).saturating_sub(memory);
        assert!(grown < 32 << 10, "the daemon has grown by {grown} KiB");
        drop(idle);
        wait_for("their descriptors are closed", Duration::from_secs(20), || {
            leaks::descriptors(daemon) <= fds + 16
        });
    }
    neighbour.goes_on();
}

#[test]
fn rubbish_on_a_socket_ends_that_connection_alone() {
    let Some(neighbour) = Neighbour::new() else { return };
    {
        let pod = Direct::run("rubbish");
        let rubbish: &[&[u8]] = &[
            b"GET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            &[0xff; 64],
            &[0; 64],
            &[0, 0, 0, 4, 0, 0, 0, 1, 1, 0, 9, 9, 9, 9],
            &[0, 0, 0, 0, 0, 0, 0, 2, 3, 5],
        ];
        for bytes in rubbish {
            for mut stream in
                [UnixStream::connect(wire::daemon_socket()).unwrap(), wire::connect(&pod.socket)]
            {
                stream.write_all(bytes).unwrap();
                stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
                // An answer, an end or silence: all are fine, as long as the others go on.
                let _ = stream.read(&mut [0; 64]);
            }
        }
        let bundle = Bundle::new(&["true"]);
        assert_eq!(pod.run_to_end(&bundle).unwrap(), 0);
    }
    neighbour.goes_on();
}

#[test]
fn state_is_private_and_no_socket_is_for_others() {
    if !ours() {
        return;
    }
    let pod = Direct::run("private");
    let bundle = Bundle::new(&["sleep", "1000"]);
    task!(&pod.socket, create, bundle.request("c")).unwrap();
    let dir = bed().join("run/kuasar-runc");
    let dir = dir.to_string_lossy();
    let list = |args: &[&str]| {
        let out =
            inside(&[&["find", &*dir, "-xdev"][..], args, &["-printf", "%m %p\n"][..]].concat());
        String::from_utf8(out.stdout).unwrap()
    };
    // `shm` is a pod's own /dev/shm, as open as every one is; what an engine makes is its own.
    let open =
        ["-path", "*/engine/*", "-prune", "-o", "-type", "d", "-perm", "/077", "!", "-name", "shm"];
    assert_eq!(list(&open), "", "directories");
    let open = ["-path", "*/engine/*", "-prune", "-o", "-type", "s", "-perm", "/077"];
    assert_eq!(list(&open), "", "sockets");
    assert!(list(&["-type", "s"]).contains("task.sock"));
    assert_eq!(list(&["-type", "f", "-perm", "/022"]), "", "files");
    let mode = |p: std::path::PathBuf| {
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(p).unwrap().permissions())
            & 0o777
    };
    assert_eq!(mode(wire::daemon_socket()), 0o600);
    assert_eq!(mode(bed().join("run/kuasar-runc-metrics.sock")), 0o600);
    // CVE-2020-15257: abstract sockets are reachable from a host-network container.
    let unix = String::from_utf8(inside(&["cat", "/proc/net/unix"]).stdout).unwrap();
    let ours: Vec<_> = unix
        .lines()
        .filter_map(|l| l.split_whitespace().nth(7))
        .filter(|p| p.starts_with('@') && (p.contains("kuasar") || p.contains("sandbox")))
        .collect();
    assert!(ours.is_empty(), "{ours:?}");
}

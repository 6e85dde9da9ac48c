//! iSulad, simulated: its calls in its order, as its source has them (sandboxer and shim v2 parts of
//! iSulad at fd0fcf85 and lib-shim-v2 at 2c27bc5). No iSulad was run.
//!
//! What differs from containerd: no namespace in the metadata, Create without `sandbox` and with an
//! `options` of no type, files and `/dev/shm` that the engine has made itself, a network that comes
//! after Start, containers that Update announces and a Create without rootfs, Task v2, metrics of
//! cgroup v1, signal 0, execs that are never deleted, and a Shutdown for each container.
//!
//! Here it drives pods of namespaces; [`crate::isulad_vmm`] has it drive machines.

use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_protos::controller as api;
use kuasar_protos::cri as pod;
use kuasar_protos::shim::api as task;
use kuasar_tests::cri::{cgroup_root, runtime, unique, within};
use kuasar_tests::wire::{Bundle, connect, controller_with, minute, refusal};
use kuasar_tests::{inside, leaks, on, root, switch, wait_for};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use tonic::{Code, Status};

/// A call of the Controller, without any metadata.
pub(crate) async fn controller<Q: Message, A: Message>(method: &str, q: Q) -> Result<A, Status> {
    controller_with(method, within(q, 60)).await
}

pub(crate) fn call<Q: Message, A: Message>(method: &str, q: Q) -> A {
    runtime().block_on(controller(method, q)).unwrap_or_else(|e| panic!("{method}: {e}"))
}

/// An exec's process is announced and sent as plain JSON.
pub(crate) fn process(args: &[&str]) -> Value {
    json!({ "user": { "uid": 0, "gid": 0 }, "args": args, "env": ["PATH=/bin"], "cwd": "/" })
}

/// A stream as iSulad makes it: a FIFO of which it holds the reading end.
pub(crate) struct Fifo {
    path: PathBuf,
    end: std::fs::File,
}

impl Fifo {
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let end = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        Self { path, end }
    }

    /// One for input: iSulad has it open both ways before its reader does.
    pub(crate) fn for_input(dir: &Path, name: &str) -> Self {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let mut how = std::fs::OpenOptions::new();
        let end = how.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        Self { path, end }
    }

    /// Writes all of it and closes.
    pub(crate) fn say(mut self, text: &str) {
        self.end.write_all(text.as_bytes()).unwrap();
    }

    pub(crate) fn text(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }

    /// Everything until its last writer has gone.
    pub(crate) fn read_to_end(&mut self) -> String {
        let mut all = Vec::new();
        wait_for("the end of the output", Duration::from_secs(60), || {
            self.end.read_to_end(&mut all).is_ok()
        });
        String::from_utf8(all).unwrap()
    }

    /// Everything up to this word, which comes last.
    pub(crate) fn read_until(&mut self, last: &str) -> String {
        let mut all = String::new();
        wait_for(last, Duration::from_secs(60), || {
            let mut some = [0; 4096];
            if let Ok(n) = self.end.read(&mut some) {
                all.push_str(&String::from_utf8_lossy(&some[..n]));
            }
            all.contains(last)
        });
        all
    }
}

/// Where the Task service is that Status has named, as lib-shim-v2 takes the address apart; it knows
/// no hybrid vsock.
#[derive(Clone)]
pub(crate) enum Endpoint {
    /// `ttrpc+unix://`
    Unix(PathBuf),
    /// `ttrpc+hvsock://`: a machine's unix socket, and a port behind it.
    Hybrid(PathBuf, u32),
}

impl Endpoint {
    fn of(address: &str) -> Self {
        if let Some(path) = address.strip_prefix("ttrpc+unix://") {
            return Self::Unix(path.into());
        }
        let hybrid = address.strip_prefix("ttrpc+hvsock://").and_then(|rest| rest.rsplit_once(':'));
        let (path, port) = hybrid.unwrap_or_else(|| panic!("{address}"));
        Self::Hybrid(path.into(), port.parse().unwrap())
    }

    /// A call on a connection of its own.
    pub(crate) fn call<Q: Message, A: Message>(
        &self,
        service: &str,
        method: &str,
        q: &Q,
    ) -> Result<A, Status> {
        let answer = runtime().block_on(async {
            let stream = self.dial();
            stream.set_nonblocking(true).unwrap();
            let stream = tokio::net::UnixStream::from_std(stream).unwrap();
            let socket = ttrpc::asynchronous::transport::Socket::new(stream);
            let client = ttrpc::r#async::Client::new(socket);
            let request = ttrpc::proto::Request {
                service: service.into(),
                method: method.into(),
                payload: q.write_to_bytes().unwrap(),
                timeout_nano: minute().timeout_nano,
                ..Default::default()
            };
            client.request(request).await
        });
        let answer = answer.map_err(refusal)?;
        if answer.status().code.value() != 0 {
            let status = answer.status();
            return Err(Status::new(Code::from(status.code.value()), status.message.clone()));
        }
        Ok(A::parse_from_bytes(&answer.payload).unwrap())
    }

    pub(crate) fn dial(&self) -> UnixStream {
        match self {
            Self::Unix(path) => connect(path),
            Self::Hybrid(path, port) => {
                let mut stream = connect(path);
                stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
                let mut answer = Vec::new();
                while answer.last() != Some(&b'\n') {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    answer.extend(byte);
                }
                assert!(answer.starts_with(b"OK "), "{:?}", String::from_utf8_lossy(&answer));
                stream
            }
        }
    }
}

/// The engine with one pod.
pub(crate) struct Isulad {
    pub(crate) id: String,
    pub(crate) endpoint: Endpoint,
    netns: String,
    /// Its own directory for the pod: files and FIFOs.
    pub(crate) dir: tempdir::Dir,
    /// What it has announced.
    pub(crate) tasks: Vec<Value>,
}

pub(crate) mod tempdir {
    /// A directory of the bed, which its mount namespace sees, too; removed when dropped.
    pub struct Dir(pub std::path::PathBuf);

    impl Dir {
        pub fn new() -> Self {
            let name = format!("run/logs/isulad-{}", kuasar_tests::cri::unique());
            let path = kuasar_tests::bed().join(name);
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// A command inside the bed.
fn run(args: &[&str]) {
    let out = inside(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn set_network_up(name: &str) {
    let host = format!("v{}", unique() % 1_000_000_000);
    run(&["ip", "link", "add", &host, "type", "veth", "peer", "name", "eth0", "netns", name]);
    run(&["ip", "-n", name, "addr", "add", "10.9.9.9/24", "dev", "eth0"]);
    run(&["ip", "-n", name, "link", "set", "eth0", "up"]);
}

impl Isulad {
    /// RunPodSandbox up to the network: files, Create, Start, Status.
    pub(crate) fn run_pod() -> Self {
        Self::run_pod_with(false)
    }

    /// The same; `network`: it is set up before Start, as an annotation asks of iSulad.
    pub(crate) fn run_pod_with(network: bool) -> Self {
        let (id, dir) = (format!("isulad{}", unique()), tempdir::Dir::new());
        for (name, text) in [
            ("hostname", "from-isulad\n"),
            ("hosts", "127.0.0.1 localhost\n10.9.9.9 from-isulad\n"),
            ("resolv.conf", "nameserver 10.9.9.53\n"),
        ] {
            std::fs::write(dir.0.join(name), text).unwrap();
        }
        let shm = dir.0.join("shm");
        std::fs::create_dir(&shm).unwrap();
        let path = shm.to_string_lossy();
        run(&["mount", "-t", "tmpfs", "-o", "mode=1777,size=65536k", "shm", &path]);
        let name = format!("isulad-{}", unique());
        run(&["ip", "netns", "add", &name]);
        let netns = format!("/run/netns/{name}");
        if network {
            set_network_up(&name);
        }

        let mut config = pod::PodSandboxConfig::new();
        config.hostname = "from-isulad".into();
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = format!("/{}/{id}", cgroup_root());
        let security = linux.security_context.mut_or_insert_default();
        let options = security.namespace_options.mut_or_insert_default();
        options.pid = pod::NamespaceMode::CONTAINER.into();
        let create = api::ControllerCreateRequest {
            sandbox_id: id.clone(),
            sandboxer: kuasar_tests::kind().into(),
            netns_path: netns.clone(),
            options: MessageField::some(Any {
                value: config.write_to_bytes().unwrap(),
                ..Any::default()
            }),
            ..Default::default()
        };
        let _: api::ControllerCreateResponse = call("Create", create);
        let q = api::ControllerStartRequest { sandbox_id: id.clone(), ..Default::default() };
        let started: api::ControllerStartResponse = call("Start", q);
        assert_eq!(started.sandbox_id, id);
        assert!(started.created_at.seconds > 0);
        let q = api::ControllerStatusRequest { sandbox_id: id.clone(), ..Default::default() };
        let status: api::ControllerStatusResponse = call("Status", q);
        assert_eq!(status.state, "SANDBOX_READY");
        let endpoint = Endpoint::of(&status.address);
        Self { id, endpoint, netns, dir, tasks: Vec::new() }
    }

    /// What CNI does, after Start.
    pub(crate) fn set_network_up(&self) {
        set_network_up(self.netns.rsplit('/').next().unwrap());
    }

    /// Task v2 on a connection of its own.
    pub(crate) fn v2<Q: Message, A: Message>(&self, method: &str, q: &Q) -> Result<A, Status> {
        self.endpoint.call("containerd.task.v2.Task", method, q)
    }

    fn announce(&self, tasks: &[u8]) -> Result<api::ControllerUpdateResponse, Status> {
        let mut sandbox = kuasar_protos::types::Sandbox {
            sandbox_id: self.id.clone(),
            labels: [("name".to_owned(), self.id.clone())].into(),
            sandboxer: kuasar_tests::kind().into(),
            ..Default::default()
        };
        let list = Any {
            type_url: "github.com/containerd/containerd/Tasks".into(),
            value: tasks.to_vec(),
            ..Any::default()
        };
        sandbox.extensions.insert("tasks".into(), list);
        runtime().block_on(controller(
            "Update",
            api::ControllerUpdateRequest {
                sandbox_id: self.id.clone(),
                sandboxer: kuasar_tests::kind().into(),
                sandbox: MessageField::some(sandbox),
                fields: vec!["extensions.tasks".into()],
                ..Default::default()
            },
        ))
    }

    pub(crate) fn update(&self) {
        let text = json!({ "tasks": self.tasks }).to_string();
        self.announce(text.as_bytes()).unwrap();
    }

    /// The spec as iSulad's oci_runtime_spec has it: an absolute root, its own files.
    fn spec(&self, bundle: &Bundle, base: &Path) -> Value {
        let mut spec = bundle.spec.clone();
        spec["root"]["path"] = json!(base);
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "network", "path": self.netns }));
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] }));
        for (name, to) in [
            ("hostname", "/etc/hostname"),
            ("hosts", "/etc/hosts"),
            ("resolv.conf", "/etc/resolv.conf"),
            ("shm", "/dev/shm"),
        ] {
            mounts.push(json!({ "destination": to, "type": "bind",
                "source": self.dir.0.join(name), "options": ["rbind", "rprivate"] }));
        }
        spec
    }

    /// StartContainer up to Task.Create.
    pub(crate) fn prepare(&mut self, id: &str, bundle: &Bundle) -> (PathBuf, Fifo, Fifo) {
        let base = bundle.rootfs();
        // The bundle proper, in which there is no rootfs.
        let dir = self.dir.0.join(format!("engines-{id}-{}", unique()));
        std::fs::create_dir(&dir).unwrap();
        let (out, err) = (Fifo::new(&dir, "stdout"), Fifo::new(&dir, "stderr"));
        let spec = self.spec(bundle, &base);
        std::fs::write(dir.join("config.json"), spec.to_string()).unwrap();
        self.tasks.push(json!({ "task_id": id, "spec": spec,
            "rootfs": [{ "type": "bind", "source": base }],
            "stdin": "", "stdout": out.text(), "stderr": err.text() }));
        self.update();
        (dir, out, err)
    }

    pub(crate) fn create(&self, id: &str, dir: &Path, out: &Fifo, err: &Fifo) -> u32 {
        let q = task::CreateTaskRequest {
            id: id.into(),
            bundle: dir.to_string_lossy().into_owned(),
            stdout: out.text(),
            stderr: err.text(),
            ..Default::default()
        };
        let created: task::CreateTaskResponse = self.v2("Create", &q).unwrap();
        created.pid
    }

    pub(crate) fn start(&self, id: &str, exec: &str) -> Result<u32, Status> {
        let q = task::StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.v2("Start", &q).map(|a: task::StartResponse| a.pid)
    }

    pub(crate) fn wait(&self, id: &str, exec: &str) -> u32 {
        let q = task::WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.v2::<_, task::WaitResponse>("Wait", &q).unwrap().exit_status
    }

    pub(crate) fn kill(&self, id: &str, signal: i32) -> Result<(), Status> {
        let signal = u32::try_from(signal).unwrap();
        let q = task::KillRequest { id: id.into(), signal, ..Default::default() };
        self.v2::<_, task::Empty>("Kill", &q).map(drop)
    }

    pub(crate) fn state(&self, id: &str, exec: &str) -> Result<task::StateResponse, Status> {
        let q = task::StateRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.v2("State", &q)
    }

    /// `isula stats`: every part is read.
    pub(crate) fn has_metrics_of_cgroup_v1(&self, id: &str) {
        let q = task::StatsRequest { id: id.into(), ..Default::default() };
        let stats: task::StatsResponse = self.v2("Stats", &q).unwrap();
        assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics =
            kuasar_protos::shim::cgroups::metrics::Metrics::parse_from_bytes(&stats.stats.value)
                .unwrap();
        assert!(metrics.cpu.usage.is_some() && metrics.memory.usage.is_some());
        assert!(metrics.pids.is_some() && metrics.blkio.is_some());
    }

    /// Exec: announced, made, started, waited for, taken off the list; never deleted.
    pub(crate) fn exec(&mut self, id: &str, exec: &str, args: &[&str]) -> (u32, String) {
        let mut out = Fifo::new(&self.dir.0, exec);
        let spec = process(args);
        let at = self.tasks.iter().position(|t| t["task_id"] == id).unwrap();
        self.tasks[at]["processes"] = json!([{ "exec_id": exec, "spec": spec,
            "stdin": "", "stdout": out.text(), "stderr": "" }]);
        self.update();
        let q = task::ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            stdout: out.text(),
            spec: MessageField::some(Any {
                value: spec.to_string().into_bytes(),
                ..Any::default()
            }),
            ..Default::default()
        };
        let _: task::Empty = self.v2("Exec", &q).unwrap();
        self.start(id, exec).unwrap();
        let status = self.wait(id, exec);
        let text = out.read_to_end();
        self.tasks[at].as_object_mut().unwrap().remove("processes");
        self.update();
        (status, text)
    }

    /// The container c1 ends by the signal of `isula stop`, and then its pod.
    pub(crate) fn ends(mut self, mut out: Fifo) {
        self.kill("c1", libc::SIGTERM).unwrap();
        assert_eq!(self.wait("c1", ""), 7);
        out.read_until("ended\n");
        assert!(self.kill("c1", 0).is_err(), "it is dead");
        self.clean("c1");
        assert_eq!(self.state("c1", "").unwrap_err().code(), Code::NotFound);
        self.remove_pod();
    }

    /// An exec with input, announced, made and started; answers both its FIFOs.
    fn interactive(&mut self, id: &str, exec: &str, spec: &Value) -> (Fifo, Fifo) {
        let input = Fifo::for_input(&self.dir.0, &format!("{exec}-in"));
        let out = Fifo::new(&self.dir.0, &format!("{exec}-out"));
        let at = self.tasks.iter().position(|t| t["task_id"] == id).unwrap();
        self.tasks[at]["processes"] = json!([{ "exec_id": exec, "spec": spec,
            "stdin": input.text(), "stdout": out.text(), "stderr": "" }]);
        self.update();
        let q = task::ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            terminal: spec["terminal"] == true,
            stdin: input.text(),
            stdout: out.text(),
            spec: MessageField::some(Any {
                value: spec.to_string().into_bytes(),
                ..Any::default()
            }),
            ..Default::default()
        };
        let _: task::Empty = self.v2("Exec", &q).unwrap();
        self.start(id, exec).unwrap();
        (input, out)
    }

    /// `isula exec -i` and `-it`. An input ends when iSulad closes its FIFO: it calls no CloseIO.
    pub(crate) fn input_and_terminal(&mut self, id: &str) {
        let (input, mut said) = self.interactive(id, "cat", &process(&["cat"]));
        input.say("through and through\n");
        assert_eq!(said.read_to_end(), "through and through\n");
        assert_eq!(self.wait(id, "cat"), 0);
        let mut shell = process(&["sh"]);
        shell["terminal"] = json!(true);
        let (input, mut said) = self.interactive(id, "tty", &shell);
        input.say("stty size; echo is-$((40 + 2)); exit 9\n");
        let said = said.read_until("is-42");
        assert!(!said.contains("not a tty"), "{said}");
        assert_eq!(self.wait(id, "tty"), 9);
        let at = self.tasks.iter().position(|t| t["task_id"] == id).unwrap();
        self.tasks[at].as_object_mut().unwrap().remove("processes");
        self.update();
    }

    /// What follows an exit: Delete, Shutdown, and the container is taken off the list.
    pub(crate) fn clean(&mut self, id: &str) {
        let q = task::DeleteRequest { id: id.into(), ..Default::default() };
        let _: task::DeleteResponse = self.v2("Delete", &q).unwrap();
        let q = task::ShutdownRequest { id: id.into(), ..Default::default() };
        let _: task::Empty = self.v2("Shutdown", &q).unwrap();
        self.tasks.retain(|t| t["task_id"] != id);
        self.update();
    }

    /// StopPodSandbox and RemovePodSandbox.
    pub(crate) fn remove_pod(self) {
        let q = api::ControllerStopRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let _: api::ControllerStopResponse = call("Stop", q);
        let q = api::ControllerWaitRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let _: api::ControllerWaitResponse = call("Wait", q);
        let q =
            api::ControllerShutdownRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let _: api::ControllerShutdownResponse = call("Shutdown", q);
    }
}

impl Drop for Isulad {
    fn drop(&mut self) {
        let q =
            api::ControllerShutdownRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let _: Result<api::ControllerShutdownResponse, _> =
            runtime().block_on(controller("Shutdown", q));
        inside(&["ip", "netns", "del", self.netns.rsplit('/').next().unwrap()]);
        inside(&["umount", &self.dir.0.join("shm").to_string_lossy()]);
    }
}

pub(crate) const SERVE: &str = "cat /etc/hostname /etc/hosts /etc/resolv.conf; echo mine > /dev/shm/mark; \
     echo ready; trap 'echo ended; exit 7' TERM; while :; do sleep 0.1; done";

#[test]
fn a_pod_of_namespaces_lives_as_isulad_drives_it() {
    let Some(_chosen) = on("kuasar-runc") else { return };
    let before = leaks::snapshot();
    {
        let bundle = Bundle::new(&["sh", "-c", SERVE]);
        let mut isulad = Isulad::run_pod();
        // A form that lib-shim-v2 can dial.
        assert!(matches!(isulad.endpoint, Endpoint::Unix(_)));
        isulad.set_network_up();
        let (dir, mut out, err) = isulad.prepare("c1", &bundle);
        assert_ne!(isulad.create("c1", &dir, &out, &err), 0);
        isulad.start("c1", "").unwrap();
        let said = out.read_until("ready\n");
        for own in ["from-isulad\n", "10.9.9.9 from-isulad", "nameserver 10.9.9.53"] {
            assert!(said.contains(own), "{own:?} is not in {said:?}");
        }
        let mark = isulad.dir.0.join("shm/mark");
        let mark = root().join(mark.strip_prefix("/").unwrap());
        assert_eq!(std::fs::read_to_string(mark).unwrap(), "mine\n");

        // Whether it lives is asked with signal 0.
        isulad.kill("c1", 0).unwrap();
        isulad.has_metrics_of_cgroup_v1("c1");

        let (status, text) = isulad.exec("c1", "probe", &["sh", "-c", "echo probed; exit 3"]);
        assert_eq!((status, text.as_str()), (3, "probed\n"));
        // iSulad never deletes it: taken off the list, it is gone, and its name is free again.
        assert_eq!(isulad.state("c1", "probe").unwrap_err().code(), Code::NotFound);
        std::fs::remove_file(isulad.dir.0.join("probe")).unwrap();
        let (status, text) = isulad.exec("c1", "probe", &["cat", "/proc/net/dev"]);
        assert_eq!(status, 0);
        assert!(text.contains("eth0"), "the network that came after Start: {text}");
        isulad.input_and_terminal("c1");

        isulad.ends(out);
    }
    leaks::assert_none(&before);
}

#[test]
fn what_isulad_has_announced_outlives_the_daemon() {
    let Some(_chosen) = on("kuasar-runc") else { return };
    let bundle = Bundle::new(&["sh", "-c", "echo here; exit 5"]);
    let mut isulad = Isulad::run_pod();
    let (dir, mut out, err) = isulad.prepare("c1", &bundle);
    switch(&["daemon", "kill"], &[]);
    switch(&["daemon", "start"], &[]);
    // A bundle without a spec: that of the list counts.
    std::fs::remove_file(dir.join("config.json")).unwrap();
    isulad.create("c1", &dir, &out, &err);
    isulad.start("c1", "").unwrap();
    out.read_until("here\n");
    assert_eq!(isulad.wait("c1", ""), 5);
    isulad.clean("c1");
    isulad.remove_pod();
}

#[test]
fn a_list_that_cannot_be_read_is_refused_and_the_last_one_counts() {
    let Some(_chosen) = on("kuasar-runc") else { return };
    let bundle = Bundle::new(&["sh", "-c", "exit 4"]);
    let mut isulad = Isulad::run_pod();
    let (dir, out, err) = isulad.prepare("c1", &bundle);
    for (text, word) in [("{\"tasks\":[{}]}", "task_id"), ("[[", "line 1")] {
        let refused = isulad.announce(text.as_bytes()).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(word), "{refused}");
    }
    isulad.create("c1", &dir, &out, &err);
    isulad.start("c1", "").unwrap();
    assert_eq!(isulad.wait("c1", ""), 4);
    isulad.clean("c1");
    isulad.remove_pod();
}

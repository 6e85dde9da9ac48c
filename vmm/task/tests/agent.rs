//! A real guest: QEMU with TCG boots the kernel and `vmm-task` as its init.
//!
//! Needs `KUASAR_QEMU`, `KUASAR_VMLINUX`, `KUASAR_VHOST_VSOCK`, `KUASAR_VIRTIOFSD`,
//! `KUASAR_VMM_TASK` (a static build) and `KUASAR_BUSYBOX` (static), and says `skipped` without.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests, outside of test functions

mod support;

use std::time::{Duration, Instant};

use kuasar_protos::shim::api;
use kuasar_protos::shim::shim_async::TaskClient;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;
use support::{Kind, Tools, Vm, address, all};
use tokio::io::AsyncWriteExt;
use ttrpc::context::{Context, with_duration};
use vmm_common::guest;
use vmm_common::guest_ttrpc::GuestClient;

fn soon() -> Context {
    with_duration(Duration::from_secs(180))
}

macro_rules! tools {
    () => {
        match Tools::find() {
            Ok(tools) => tools,
            Err(why) => {
                eprintln!("skipped: {why}");
                return;
            }
        }
    };
}

fn spec(args: &[&str], terminal: bool) -> serde_json::Value {
    let caps = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": terminal, "cwd": "/", "args": args, "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {
            "cgroupsPath": "/kubepods/x",
            "resources": {"memory": {"limit": 33_554_432}, "pids": {"limit": 64}},
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "network", "path": "/var/run/netns/x"},
            ],
        },
    })
}

fn create(id: &str, args: &[&str], terminal: bool) -> api::CreateTaskRequest {
    let container = guest::Container {
        spec: serde_json::to_vec(&spec(args, terminal)).unwrap(),
        rootfs: format!("/run/kuasar/share/{id}/rootfs"),
        ..Default::default()
    };
    let (stdin, stdout, stderr) = if terminal {
        let one = address(id, "", Kind::Terminal);
        (one.clone(), one, String::new())
    } else {
        let of = |kind| address(id, "", kind);
        (of(Kind::Stdin), of(Kind::Stdout), of(Kind::Stderr))
    };
    api::CreateTaskRequest {
        id: id.into(),
        terminal,
        stdin,
        stdout,
        stderr,
        options: MessageField::some(Any {
            type_url: vmm_common::CONTAINER_TYPE.into(),
            value: container.write_to_bytes().unwrap(),
            ..Any::default()
        }),
        ..Default::default()
    }
}

/// A Create with other contents.
fn changed(
    mut request: api::CreateTaskRequest,
    change: impl FnOnce(&mut guest::Container, &mut serde_json::Value),
) -> api::CreateTaskRequest {
    let mut container = guest::Container::parse_from_bytes(&request.options.value).unwrap();
    let mut spec = serde_json::from_slice(&container.spec).unwrap();
    change(&mut container, &mut spec);
    container.spec = serde_json::to_vec(&spec).unwrap();
    request.options.as_mut().unwrap().value = container.write_to_bytes().unwrap();
    request
}

fn start(id: &str, exec: &str) -> api::StartRequest {
    api::StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

fn exec_request(
    id: &str,
    exec: &str,
    stdout: &str,
    process: &serde_json::Value,
) -> api::ExecProcessRequest {
    api::ExecProcessRequest {
        id: id.into(),
        exec_id: exec.into(),
        stdout: stdout.into(),
        spec: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Any::default()
        }),
        ..Default::default()
    }
}

fn wait(id: &str, exec: &str) -> api::WaitRequest {
    api::WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

fn delete(id: &str, exec: &str) -> api::DeleteRequest {
    api::DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

fn setup(shared_pid: bool) -> guest::SetupRequest {
    guest::SetupRequest {
        sandbox_id: "pod1".into(),
        hostname: "web-0".into(),
        resolv_conf: b"nameserver 10.0.0.1\n".to_vec(),
        shared_pid,
        shm_bytes: 8 << 20,
        sysctls: vec![guest::Sysctl {
            name: "net.ipv4.ip_unprivileged_port_start".into(),
            value: "80".into(),
            ..Default::default()
        }],
        shares: vec![guest::Storage {
            id: "share".into(),
            kind: "virtiofs".into(),
            source: "kuasar".into(),
            target: "/run/kuasar/share".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

struct Pod {
    vm: Vm,
    task: TaskClient,
    guest: GuestClient,
}

impl Pod {
    async fn new(tools: &Tools, shared_pid: bool) -> Self {
        Self::of(tools, &[], setup(shared_pid)).await
    }

    async fn of(tools: &Tools, devices: &[&str], setup: guest::SetupRequest) -> Self {
        let options = std::env::var("KUASAR_OPTIONS").unwrap_or_default();
        let vm = Vm::boot_with(tools, &options, devices).await;
        let client = vm.control().await;
        let (task, guest) = (TaskClient::new(client.clone()), GuestClient::new(client));
        guest.setup(soon(), &setup).await.unwrap_or_else(|e| {
            panic!("setup: {e}; console:\n{}", vm.log());
        });
        Self { vm, task, guest }
    }

    /// Runs a container to its end; answers its exit status and output.
    async fn run(&self, tools: &Tools, id: &str, args: &[&str]) -> (u32, Vec<u8>) {
        self.vm.rootfs(tools, id);
        let created = self.task.create(soon(), &create(id, args, false)).await;
        created.unwrap_or_else(|e| panic!("create {id}: {e}; console:\n{}", self.vm.log()));
        let mut stdout = self.vm.stream(id, "", Kind::Stdout).await;
        let mut stderr = self.vm.stream(id, "", Kind::Stderr).await;
        self.task.start(soon(), &start(id, "")).await.unwrap();
        let wait = wait(id, "");
        let (status, output, errors) =
            tokio::join!(self.task.wait(soon(), &wait), all(&mut stdout), all(&mut stderr));
        assert_eq!(String::from_utf8_lossy(&errors), "", "{id}");
        self.task.delete(soon(), &delete(id, "")).await.unwrap();
        (status.unwrap().exit_status, output)
    }
}

#[tokio::test]
async fn a_guest_boots_and_runs_containers() {
    let tools = tools!();
    let pod = Pod::new(&tools, false).await;
    let Pod { vm, task, guest } = &pod;
    assert_eq!(vm.ready.protocol, vmm_common::handshake::PROTOCOL);
    let info = guest.info(soon(), &guest::InfoRequest::new()).await.unwrap();
    assert!(info.pod_ready && info.cpus == 1 && info.memory_bytes > 64 << 20);
    let usage = guest.usage(soon(), &guest::UsageRequest::new()).await.unwrap();
    println!(
        "figure: exec of QEMU to READY {:?}; vmm-task began at {} ms, served at {} ms ({} ms); \
         used {} KiB of {} KiB; PSS {} KiB",
        vm.booted,
        info.started_ns / 1_000_000,
        info.serving_ns / 1_000_000,
        (info.serving_ns - info.started_ns) / 1_000_000,
        (usage.memory_total - usage.memory_available) >> 10,
        usage.memory_total >> 10,
        usage.agent_pss >> 10,
    );
    let steps = info.steps.iter().map(|step| {
        let tenths = |ns: u64| format!("{}.{}", ns / 1_000_000, ns / 100_000 % 10);
        format!("{} {} ({})", step.name, tenths(step.cpu_ns), tenths(step.wall_ns))
    });
    let steps: Vec<String> = steps.collect();
    // What comes after it is done while the host answers.
    let serving = 1 + info.steps.iter().position(|step| step.name == "channel").unwrap();
    let cpu: u64 = info.steps[..serving].iter().map(|step| step.cpu_ns).sum();
    println!(
        "figure: vmm-task's start, ms of CPU (of all): {}; {} ms until it serves",
        steps.join("; "),
        cpu / 1_000_000
    );
    assert!(info.steps[serving..].iter().any(|step| step.name == "lo and cgroups"));
    let again = guest.setup(soon(), &setup(false)).await.unwrap_err();
    assert!(again.to_string().contains("already"), "{again}");
    // The host tells what is not there from what has failed by the code alone.
    let nobody = api::StateRequest { id: "nobody".into(), ..Default::default() };
    let unknown = task.state(soon(), &nobody).await.unwrap_err();
    let code = match &unknown {
        ttrpc::Error::RpcStatus(status) => status.code(),
        _ => ttrpc::Code::UNKNOWN,
    };
    assert_eq!(code, ttrpc::Code::NOT_FOUND, "{unknown}");

    // Exit code and output, to the last byte.
    let (status, output) = pod.run(&tools, "c1", &["sh", "-c", "echo hello; exit 7"]).await;
    assert_eq!((status, output.as_slice()), (7, b"hello\n".as_slice()));
    let script = "i=0; while [ $i -lt 64 ]; do head -c 16384 /dev/zero; i=$((i+1)); done";
    let (status, output) = pod.run(&tools, "c2", &["sh", "-c", script]).await;
    assert_eq!((status, output.len()), (0, 1 << 20));
    assert!(output.iter().all(|b| *b == 0));
    let (_, output) = pod.run(&tools, "c3", &["sh", "-c",
        "hostname; cat /etc/resolv.conf /proc/sys/net/ipv4/ip_unprivileged_port_start; echo $$"]).await;
    assert_eq!(String::from_utf8_lossy(&output), "web-0\nnameserver 10.0.0.1\n80\n1\n");

    // Input, exec, kill.
    vm.rootfs(&tools, "c4");
    task.create(soon(), &create("c4", &["cat"], false)).await.unwrap();
    let mut stdin = vm.stream("c4", "", Kind::Stdin).await;
    let mut stdout = vm.stream("c4", "", Kind::Stdout).await;
    task.start(soon(), &start("c4", "")).await.unwrap();
    let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let feed = async {
        stdin.write_all(&sent).await.unwrap();
        stdin.shutdown().await.unwrap();
    };
    let ((), got) = tokio::join!(feed, all(&mut stdout));
    assert!(got == sent);
    assert_eq!(task.wait(soon(), &wait("c4", "")).await.unwrap().exit_status, 0);
    task.delete(soon(), &delete("c4", "")).await.unwrap();

    vm.rootfs(&tools, "c5");
    task.create(soon(), &create("c5", &["sleep", "1000"], false)).await.unwrap();
    task.start(soon(), &start("c5", "")).await.unwrap();
    let process = |words: &[&str]| json!({"cwd": "/", "args": words, "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    let speaking = process(&["sh", "-c", "echo from exec; exit 3"]);
    let mut times = Vec::new();
    for n in 0..5 {
        let exec = format!("e{n}");
        let began = Instant::now();
        let stdout = address("c5", &exec, Kind::Stdout);
        task.exec(soon(), &exec_request("c5", &exec, &stdout, &speaking)).await.unwrap();
        let mut stdout = vm.stream("c5", &exec, Kind::Stdout).await;
        task.start(soon(), &start("c5", &exec)).await.unwrap();
        assert_eq!(all(&mut stdout).await, b"from exec\n");
        assert_eq!(task.wait(soon(), &wait("c5", &exec)).await.unwrap().exit_status, 3);
        task.delete(soon(), &delete("c5", &exec)).await.unwrap();
        times.push(began.elapsed());
    }
    times.sort();
    let quiet = process(&["/bin/true"]);
    // So many that the guest's processor has translated the code.
    let mut alone = Vec::new();
    for n in 0..100 {
        let exec = format!("t{n}");
        let began = Instant::now();
        task.exec(soon(), &exec_request("c5", &exec, "", &quiet)).await.unwrap();
        // As containerd does it: its Wait is there before the process.
        let waited = async { task.wait(soon(), &wait("c5", &exec)).await.unwrap().exit_status };
        let started = async { task.start(soon(), &start("c5", &exec)).await.map(drop).unwrap() };
        assert_eq!(tokio::join!(waited, started).0, 0);
        task.delete(soon(), &delete("c5", &exec)).await.unwrap();
        alone.push(began.elapsed());
    }
    alone.sort();
    // The same program, of a shell in a container.
    let script = "read a x </proc/uptime; i=0; while [ $i -lt 50 ]; do /bin/true; i=$((i+1)); done
        read b x </proc/uptime; echo $a $b";
    let (_, output) = pod.run(&tools, "c6", &["sh", "-c", script]).await;
    let output = String::from_utf8(output).unwrap();
    let (a, b) = output.trim().split_once(' ').unwrap();
    let plain = (b.parse::<f64>().unwrap() - a.parse::<f64>().unwrap()) * 1000.0 / 50.0;
    println!(
        "figure: exec with output {:.1?}; exec of true {:.1?}, by a shell in the guest {plain:.1} ms",
        times[2], alone[50],
    );
    let stats = api::StatsRequest { id: "c5".into(), ..Default::default() };
    let stats = task.stats(soon(), &stats).await.unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let kill = api::KillRequest { id: "c5".into(), signal: 9, ..Default::default() };
    task.kill(soon(), &kill).await.unwrap();
    // Nobody has come for its output: the exit is told all the same.
    assert_eq!(task.wait(soon(), &wait("c5", "")).await.unwrap().exit_status, 137);
    task.delete(soon(), &delete("c5", "")).await.unwrap();
    let state = api::StateRequest { id: "c5".into(), ..Default::default() };
    assert!(task.state(soon(), &state).await.is_err());

    // Nothing is left, and the guest ends by itself.
    let began = Instant::now();
    guest.shutdown(soon(), &guest::ShutdownRequest::new()).await.unwrap();
    assert!(pod.vm.ended().await.success());
    println!("figure: shutdown {:?}", began.elapsed());
}

#[tokio::test]
async fn a_nic_that_was_saved_with_a_machine_gets_the_pods_mac_address() {
    let tools = tools!();
    let interface = guest::Interface {
        name: "pod0".into(),
        mac: "02:00:00:00:0a:0b".into(),
        saved_mac: "02:6b:75:61:73:00".into(),
        mtu: 1400,
        addresses: vec!["10.9.0.2/24".into()],
        ..Default::default()
    };
    let network = guest::Network { interfaces: vec![interface], ..Default::default() };
    let network = MessageField::some(network);
    let setup = guest::SetupRequest { network: network.clone(), ..setup(false) };
    let devices = [
        "-netdev",
        "hubport,id=n0,hubid=0",
        "-device",
        "virtio-net-device,netdev=n0,mac=02:6b:75:61:73:00",
    ];
    let pod = Pod::of(&tools, &devices, setup).await;
    let looks = async |id: &str| {
        let (status, output) = pod.run(&tools, id, &["busybox", "ifconfig", "-a"]).await;
        assert_eq!(status, 0);
        let output = String::from_utf8(output).unwrap();
        for part in ["pod0 ", "HWaddr 02:00:00:00:0A:0B", "inet addr:10.9.0.2", "MTU:1400", "UP "] {
            assert!(output.contains(part), "{part} in {output}");
        }
        assert!(!output.contains("02:6B:75:61:73:00") && !output.contains("eth0"), "{output}");
    };
    looks("n1").await;
    // What it has is found again, told the same or without a word of what it had.
    let mut later = guest::SetNetworkRequest { network, ..Default::default() };
    pod.guest.set_network(soon(), &later).await.unwrap();
    later.network.as_mut().unwrap().interfaces[0].saved_mac.clear();
    pod.guest.set_network(soon(), &later).await.unwrap();
    looks("n2").await;
}

#[tokio::test]
async fn a_terminal_is_a_terminal_and_a_shared_pid_namespace_is_shared() {
    let tools = tools!();
    let pod = Pod::new(&tools, true).await;
    let Pod { vm, task, guest } = &pod;
    vm.rootfs(&tools, "t1");
    task.create(soon(), &create("t1", &["sh"], true)).await.unwrap_or_else(|e| {
        panic!("create: {e}; console:\n{}", vm.log());
    });
    let mut terminal = vm.stream("t1", "", Kind::Terminal).await;
    task.start(soon(), &start("t1", "")).await.unwrap();
    let resize =
        api::ResizePtyRequest { id: "t1".into(), width: 133, height: 42, ..Default::default() };
    task.resize_pty(soon(), &resize).await.unwrap();
    terminal.write_all(b"stty size; exit 4\n").await.unwrap();
    let text = String::from_utf8_lossy(&all(&mut terminal).await).into_owned();
    assert!(text.contains("42 133"), "{text}");
    assert_eq!(task.wait(soon(), &wait("t1", "")).await.unwrap().exit_status, 4);
    task.delete(soon(), &delete("t1", "")).await.unwrap();

    // `/proc/0/ns/pid` is the pod's.
    let request = create("s1", &["sh", "-c", "[ $$ -gt 1 ] && cat /proc/1/comm"], false);
    let request = changed(request, |_, spec| {
        spec["linux"]["namespaces"][0] = json!({"type": "pid", "path": "/proc/0/ns/pid"});
    });
    vm.rootfs(&tools, "s1");
    task.create(soon(), &request).await.unwrap();
    let mut stdout = vm.stream("s1", "", Kind::Stdout).await;
    task.start(soon(), &start("s1", "")).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&all(&mut stdout).await), "pod-init\n");
    task.wait(soon(), &wait("s1", "")).await.unwrap();
    task.delete(soon(), &delete("s1", "")).await.unwrap();

    // Huge pages are made when they are used, up to the container's limit, and go with their file.
    let count = "busybox awk '/^HugePages_Total/ {print $2}' /proc/meminfo";
    let line = format!(
        "{count}; busybox fallocate -l 4194304 /huge/a && {count}; \
         busybox fallocate -l 2097152 /huge/b 2>/dev/null \
         || echo no more; busybox rm /huge/*; {count}"
    );
    let limited = |size: &str, limit: u64| {
        changed(create("h1", &["sh", "-c", &line], false), |container, spec| {
            spec["linux"]["resources"]["hugepageLimits"] =
                json!([{"pageSize": "64KB", "limit": 0}, {"pageSize": size, "limit": limit}]);
            let target = "/run/kuasar/huge";
            container.storages.push(guest::Storage {
                id: "huge".into(),
                kind: "hugetlbfs".into(),
                options: vec!["pagesize=2097152".into()],
                target: target.into(),
                ..Default::default()
            });
            let mount = json!({"destination": "/huge", "type": "bind", "source": target,
                "options": ["bind"]});
            spec["mounts"].as_array_mut().unwrap().push(mount);
        })
    };
    vm.rootfs(&tools, "h1");
    let refused = task.create(soon(), &limited("1GB", 1 << 30)).await.unwrap_err();
    assert!(refused.to_string().contains("huge pages of 1GB"), "{refused}");
    task.create(soon(), &limited("2MB", 4 << 20)).await.unwrap();
    let mut stdout = vm.stream("h1", "", Kind::Stdout).await;
    task.start(soon(), &start("h1", "")).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&all(&mut stdout).await), "0\n2\nno more\n0\n");
    task.wait(soon(), &wait("h1", "")).await.unwrap();
    task.delete(soon(), &delete("h1", "")).await.unwrap();

    // The clock goes both ways.
    for (shift, sign) in [(3600, -1), (-3600, 1)] {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let now = i64::try_from(now.as_nanos()).unwrap() + shift * 1_000_000_000;
        let request =
            guest::SetClockRequest { now_ns: now, tolerance_ns: 1_000_000, ..Default::default() };
        let answer = guest.set_clock(soon(), &request).await.unwrap();
        assert!(answer.stepped && answer.offset_ns.signum() == sign, "{answer}");
    }
    let renew = guest::RenewRequest {
        token: "f".repeat(64),
        entropy: vec![7; 64],
        now_ns: 1_700_000_000_000_000_000,
        ..Default::default()
    };
    guest.renew(soon(), &renew).await.unwrap();
    let mut late = vm.dial(vmm_common::port::CONTROL).await;
    let purpose = vmm_common::handshake::Purpose::Control;
    assert!(vmm_common::handshake::greet(&mut late, support::TOKEN, &purpose).await.is_err());
    guest.shutdown(soon(), &guest::ShutdownRequest::new()).await.unwrap();
    assert!(pod.vm.ended().await.success());
}

/// For people: runs the words of `KUASAR_TRY` (separated by `;;`) as containers.
#[tokio::test]
async fn tries() {
    let (Ok(tools), Ok(tries)) = (Tools::find(), std::env::var("KUASAR_TRY")) else { return };
    let pod = Pod::new(&tools, false).await;
    for (n, script) in tries.split(";;").enumerate() {
        let began = Instant::now();
        let id = format!("t{n}");
        pod.vm.rootfs(&tools, &id);
        pod.task.create(soon(), &create(&id, &["sh", "-c", script], false)).await.unwrap();
        let made = began.elapsed();
        let mut stdout = pod.vm.stream(&id, "", Kind::Stdout).await;
        let mut stderr = pod.vm.stream(&id, "", Kind::Stderr).await;
        pod.task.start(soon(), &start(&id, "")).await.unwrap();
        let wait = wait(&id, "");
        let (status, out, err) =
            tokio::join!(pod.task.wait(soon(), &wait), all(&mut stdout), all(&mut stderr));
        pod.task.delete(soon(), &delete(&id, "")).await.unwrap();
        println!(
            "== {script}: create {made:?}, all {:?}: {status:?} {} bytes, {:?} {:?}",
            began.elapsed(),
            out.len(),
            String::from_utf8_lossy(out.get(..300).unwrap_or(&out)),
            String::from_utf8_lossy(&err)
        );
    }
    println!("{}", pod.vm.log());
}

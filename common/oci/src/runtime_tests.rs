//! Containers for real: sandbox-parent, the built-in engine, and every runc or crun found here.

use std::io::Read;
use std::time::Duration;

use containerd_task::runtime::Mount as TaskMount;
use kuasar_host::live::Live;
use sandbox_parent::client::{Parent, ParentOptions, PodNamespaces};

use super::*;
use crate::engine::{Backend, EngineConfig, Settings};
use crate::pod::{Modes, Namespaces};
use crate::processes::{Command, Failure, Spawned as Made};

struct Bed {
    dir: tempfile::TempDir,
    parent: Parent,
    runtime: Containers,
}

fn settings() -> Live<Settings> {
    let cli = |name: &str| {
        (name.into(), EngineConfig { path: name.into(), systemd_cgroup: false, args: vec![] })
    };
    let engines = [cli("runc"), cli("crun")].into();
    Live::new(Settings { engines, ..Settings::default() })
}

/// A pod with its own namespaces, or why there can be none here.
async fn bed(engine: &str) -> Option<Bed> {
    // SAFETY: plain call.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: needs root");
        return None;
    }
    let exe = std::env::current_exe().unwrap();
    let bin = exe.parent().unwrap().parent().unwrap();
    let (program, parent) = (bin.join("examples/kuasar-oci"), bin.join("sandbox-parent"));
    if !program.exists() || !parent.exists() {
        eprintln!("skipped: build the workspace first ({} is missing)", bin.display());
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = ParentOptions {
        dir: dir.path().to_owned(),
        binary: parent,
        timeout: Duration::from_secs(10),
        max_connections: 16,
        hold: Duration::from_secs(1),
        ..ParentOptions::new("", "")
    };
    let (parent, _connections, fresh) = Parent::connect_or_spawn(&options).await.unwrap();
    assert!(fresh);
    let builtin = Some(vec![program.to_str().unwrap().to_owned()]);
    let backend = Backend::new(Arc::new(parent.clone()), settings());
    let engines = Arc::new(Engines::new(Backend { builtin, ..backend }));
    if let Err(reason) = engines.get(engine) {
        eprintln!("skipped: {reason}");
        parent.shutdown(true).await.unwrap();
        return None;
    }
    let begun = Instant::now();
    let made = parent
        .pod_namespaces(&PodNamespaces {
            id: "p",
            ipc: true,
            uts: Some("pod-host"),
            ..PodNamespaces::default()
        })
        .await
        .unwrap();
    eprintln!("pod namespaces: {:?}", begun.elapsed());
    let pod_dir = dir.path().join("p");
    std::fs::create_dir_all(pod_dir.join("shm")).unwrap();
    for name in ["hostname", "hosts", "resolv.conf"] {
        std::fs::write(pod_dir.join(name), "pod-host\n").unwrap();
    }
    let pod = Pod {
        id: "p".into(),
        dir: pod_dir,
        netns: String::new(),
        modes: Modes { host_network: true, host_ipc: false, host_pid: false, shared_pid: false },
        engine: engine.into(),
        namespaces: Namespaces { ipc: made.ipc, uts: made.uts, ..Namespaces::default() },
    };
    let mut pod = pod;
    // The UTS namespace is the pod's own here, with the host's network.
    pod.modes.host_network = false;
    pod.netns = format!("/proc/{}/ns/net", std::process::id());
    let layout = Arc::new(Layout::detect().unwrap());
    let runtime = Containers::new(Arc::new(pod), engines, layout);
    Some(Bed { dir, parent, runtime })
}

impl Bed {
    /// A bundle whose rootfs is the host's, under an overlay.
    fn bundle(&self, id: &str, args: &[&str]) -> CreateContainer {
        let bundle = self.dir.path().join(format!("bundle-{id}"));
        let layers = self.dir.path().join(format!("layers-{id}"));
        for name in ["upper", "work"] {
            std::fs::create_dir_all(layers.join(name)).unwrap();
        }
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let spec = json!({
            "ociVersion": "1.1.0",
            "process": {
                "args": args, "cwd": "/new/work", "env": ["PATH=/usr/bin:/bin"],
                "user": {"uid": 0, "gid": 0}, "noNewPrivileges": false,
                "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]}
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}
            ],
            "linux": {
                "cgroupsPath": format!("/kuasar-runc-test/{id}"),
                "namespaces": [
                    {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"},
                    {"type": "ipc", "path": "/proc/0/ns/ipc"}, {"type": "uts", "path": "/proc/0/ns/uts"},
                    {"type": "network", "path": "/proc/0/ns/net"}
                ],
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
                    "syscalls": [{"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}]
                }
            }
        });
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        CreateContainer {
            id: id.into(),
            bundle,
            rootfs: vec![TaskMount {
                kind: "overlay".into(),
                source: "overlay".into(),
                target: String::new(),
                options: vec![
                    "lowerdir=/".into(),
                    format!("upperdir={}", layers.join("upper").display()),
                    format!("workdir={}", layers.join("work").display()),
                ],
            }],
            terminal: false,
            checkpoint: None,
            options: None,
        }
    }

    async fn end(self) {
        self.parent.shutdown(true).await.unwrap();
    }
}

fn streams() -> (ProcessIo, std::io::PipeReader) {
    let (read, write) = std::io::pipe().unwrap();
    let error = write.try_clone().unwrap();
    (
        ProcessIo::Streams { stdin: None, stdout: Some(write.into()), stderr: Some(error.into()) },
        read,
    )
}

fn text(mut pipe: std::io::PipeReader) -> String {
    let mut text = String::new();
    pipe.read_to_string(&mut text).unwrap();
    text
}

fn process(args: &[&str]) -> Vec<u8> {
    json!({
        "args": args, "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 1000, "gid": 1000},
        "capabilities": {"bounding": ["CAP_KILL"]}
    })
    .to_string()
    .into_bytes()
}

async fn a_container_lives_and_dies(engine: &str) {
    let Some(bed) = bed(engine).await else { return };
    let request =
        bed.bundle(&format!("c-{engine}"), &["sh", "-c", "hostname; pwd; exec sleep 1000"]);
    let (io, out) = streams();
    let begun = Instant::now();
    let made = bed.runtime.create(&request, io).await.unwrap();
    let created = begun.elapsed();
    bed.runtime.start(&request.id, made.pid).await.unwrap();
    eprintln!("{engine}: create {created:?}, with start {:?}", begun.elapsed());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(bed.runtime.pids(&request.id).await.unwrap().contains(&made.pid));
    let (kind, _) = bed.runtime.stats(&request.id, StatsFlavor::Native).await.unwrap();
    assert!(kind.starts_with("io.containerd.cgroups.v"));

    // An exec: filtered by seccomp, without capabilities, with its own exit status.
    let (io, exec_out) = streams();
    let begun = Instant::now();
    let exec = bed
        .runtime
        .exec(
            &request.id,
            "e",
            &process(&[
                "sh",
                "-c",
                "grep -E '^(Seccomp|CapEff|CapInh):' /proc/self/status; exit 7",
            ]),
            io,
        )
        .await
        .unwrap();
    eprintln!("{engine}: exec {:?}", begun.elapsed());
    assert_eq!(exec.exit.await.status, 7);
    let status = text(exec_out);
    assert!(status.contains("Seccomp:\t2"), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");

    // A command that is not there says so, and nothing stays of it.
    let (io, _) = streams();
    let error =
        bed.runtime.exec(&request.id, "x", &process(&["no-such-command"]), io).await.err().unwrap();
    assert!(error.chain().contains("no-such-command"), "{}", error.chain());

    let process = ProcessRef {
        container: request.id.clone(),
        exec: String::new(),
        pid: made.pid,
        handle: made.handle,
    };
    bed.runtime.kill(&process, libc::SIGKILL, false).await.unwrap();
    assert_eq!(made.exit.await.status, 137);
    assert!(bed.runtime.reattach(&process).await.unwrap().is_some());
    bed.runtime.exit_recorded(&process).await;
    bed.runtime.delete(&request.id, &request.bundle).await.unwrap();
    bed.runtime.delete(&request.id, &request.bundle).await.unwrap();
    assert_eq!(text(out), "pod-host\n/new/work\n");
    assert!(kuasar_host::mount::mounts_below(bed.dir.path()).unwrap().is_empty());
    assert!(bed.runtime.pids(&request.id).await.is_err());
    bed.end().await;
}

#[tokio::test]
async fn a_container_of_the_builtin_engine_lives_and_dies() {
    a_container_lives_and_dies("builtin").await;
}

#[tokio::test]
async fn a_container_of_runc_lives_and_dies() {
    a_container_lives_and_dies("runc").await;
}

#[tokio::test]
async fn a_container_of_crun_lives_and_dies() {
    a_container_lives_and_dies("crun").await;
}

#[tokio::test]
async fn a_failed_create_leaves_nothing_and_says_why() {
    let Some(bed) = bed("builtin").await else { return };
    let request = bed.bundle("bad", &["no-such-command"]);
    let (io, _) = streams();
    let error = bed.runtime.create(&request, io).await.err().unwrap();
    assert!(matches!(error, Error::InvalidArgument(_)), "{}", error.chain());
    let wanted = "exec: \"no-such-command\": executable file not found in $PATH";
    assert!(error.chain().ends_with(wanted), "{}", error.chain());
    assert!(kuasar_host::mount::mounts_below(bed.dir.path()).unwrap().is_empty());
    assert!(!bed.runtime.pod.container("bad").exists());
    assert!(!Layout::detect().unwrap().group("/kuasar-runc-test/bad").unwrap().exists());
    bed.end().await;
}

#[tokio::test]
async fn a_terminal_comes_back_as_its_master() {
    let Some(bed) = bed("builtin").await else { return };
    let request = bed.bundle("tty", &["sh", "-c", "stty size; sleep 1000"]);
    let io = ProcessIo::Terminal { size: Some((120, 40)) };
    let made = bed.runtime.create(&request, io).await.unwrap();
    bed.runtime.start(&request.id, made.pid).await.unwrap();
    let mut master = std::fs::File::from(made.terminal.unwrap());
    let mut buffer = [0u8; 64];
    let count = master.read(&mut buffer).unwrap();
    assert!(String::from_utf8_lossy(&buffer[..count]).contains("40 120"));
    let process = ProcessRef {
        container: request.id.clone(),
        exec: String::new(),
        pid: made.pid,
        handle: made.handle,
    };
    bed.runtime.kill(&process, libc::SIGKILL, true).await.unwrap();
    assert_eq!(made.exit.await.status, 137);
    bed.runtime.delete(&request.id, &request.bundle).await.unwrap();
    bed.end().await;
}

#[tokio::test]
async fn names_of_engines_are_told_when_one_is_unknown() {
    struct Nobody;
    #[async_trait]
    impl Processes for Nobody {
        async fn spawn(&self, _: Command<'_>) -> std::result::Result<Made, Failure> {
            Err("nobody runs anything".into())
        }
        async fn watch(&self, _: u32, _: u64, _: u64) -> std::result::Result<(), Failure> {
            Ok(())
        }
        async fn exit_of(&self, _: u64) -> std::result::Result<Exit, Failure> {
            Err("nobody knows".into())
        }
        async fn acknowledge(&self, _: u64) {}
        async fn watched(&self) -> std::result::Result<Vec<u64>, Failure> {
            Ok(Vec::new())
        }
    }
    let backend = Backend::new(Arc::new(Nobody), settings());
    let error = Arc::new(Engines::new(backend.clone())).get("builtin").unwrap_err();
    assert_eq!(error, "unknown engine \"builtin\": configured are crun, runc");
    let builtin = Some(vec!["/engine".to_owned()]);
    let engines = Arc::new(Engines::new(Backend { builtin, ..backend.clone() }));
    let error = engines.get("podman").unwrap_err();
    assert_eq!(error, "unknown engine \"podman\": configured are builtin, crun, runc");
    // What a reload changes counts at once.
    backend.settings.set(Settings::default());
    let error = engines.get("runc").unwrap_err();
    assert_eq!(error, "unknown engine \"runc\": configured are builtin");
    let dir = tempfile::tempdir().unwrap();
    let engine = engines.get("builtin").unwrap();
    let error = engine.command(dir.path(), vec!["checkpoint".into()]).await.unwrap_err();
    assert_eq!(error.chain(), "run engine builtin: nobody runs anything");
}

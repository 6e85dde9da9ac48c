//! Regression tests of what has gone wrong in other runtimes, one for each lesson; the CVE that
//! taught it is named.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use kuasar_protos::controller::{ControllerCreateRequest, ControllerCreateResponse};
use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::wire::{self, Bundle, Direct};
use kuasar_tests::{bed, handler, inside, leaks, ours, programs, switch, task};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::engines;

/// A directory of the host that no container is to reach, with a file in it.
struct Outside(PathBuf);

impl Outside {
    fn new() -> Self {
        let dir = bed().join(format!("run/logs/outside-{}", unique()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("secret"), "of the host\n").unwrap();
        Self(dir)
    }

    /// Asserts that nothing was added, changed or mounted there.
    fn untouched(&self, who: &str) {
        let names: Vec<_> =
            std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"], "{who}");
        assert_eq!(
            std::fs::read_to_string(self.0.join("secret")).unwrap(),
            "of the host\n",
            "{who}"
        );
        let mounts = inside(&["cat", "/proc/self/mounts"]).stdout;
        let mounts = String::from_utf8_lossy(&mounts).into_owned();
        assert!(!mounts.contains(&*self.0.to_string_lossy()), "{who}: {mounts}");
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn create(q: ControllerCreateRequest) -> Result<ControllerCreateResponse, Status> {
    wire::controller("Create", q)
}

fn start(pod: &Direct, exec: &str) -> Result<u32, Status> {
    let q = tasks::StartRequest { id: "c".into(), exec_id: exec.into(), ..Default::default() };
    task!(&pod.socket, start, q).map(|answer| answer.pid)
}

/// Runs a process in the container `c`; its exit code, or why it did not run.
fn exec(pod: &Direct, process: &Value) -> Result<u32, Status> {
    let exec_id = format!("e{}", unique());
    let spec = Any {
        type_url: wire::PROCESS.into(),
        value: process.to_string().into_bytes(),
        ..Any::default()
    };
    let q = tasks::ExecProcessRequest {
        id: "c".into(),
        exec_id: exec_id.clone(),
        spec: MessageField::some(spec),
        ..Default::default()
    };
    task!(&pod.socket, exec, q)?;
    let started = start(pod, &exec_id);
    let q = tasks::WaitRequest { id: "c".into(), exec_id: exec_id.clone(), ..Default::default() };
    let ended = task!(&pod.socket, wait, q);
    let q = tasks::DeleteRequest { id: "c".into(), exec_id, ..Default::default() };
    task!(&pod.socket, delete, q).unwrap();
    started?;
    ended.map(|e| e.exit_status)
}

/// A pod of `engine` whose container `c` sleeps.
fn sleeper(engine: &str, bundle: &Bundle) -> Direct {
    let pod = Direct::run_on("sleeper", engine);
    task!(&pod.socket, create, bundle.request("c")).unwrap();
    start(&pod, "").unwrap();
    pod
}

/// CVE-2024-21626: runc leaked a descriptor of the host's cgroup directory.
#[test]
fn no_descriptor_of_the_host_reaches_a_container() {
    engines::each("fds", |engine, pod| {
        let c = pod.start(&["sleep", "1000"]);
        let fds = |pid: u32| {
            let list = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            let mut list: Vec<_> =
                list.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            list.sort();
            list
        };
        assert_eq!(fds(c.pid()), ["0", "1", "2"], "{engine}");
        // `ls` has one of its own.
        assert_eq!(c.sh("ls /proc/self/fd").split_whitespace().count(), 4, "{engine}");
        let c = pod.start_with(&["sleep", "1000"], |c| c.tty = true);
        assert_eq!(fds(c.pid()), ["0", "1", "2"], "{engine}");
    });
}

/// CVE-2024-21626, its other half: a working directory by way of such a descriptor.
#[test]
fn a_working_directory_is_inside_the_container() {
    if !ours() {
        return;
    }
    for engine in engines::available() {
        let bundle = Bundle::new(&["sleep", "1000"]);
        let pod = sleeper(engine, &bundle);
        for fd in 0..=14 {
            let cwd = format!("/proc/self/fd/{fd}");
            // Either it is refused, or it leads nowhere but into the container.
            let args = ["sh", "-c", "test -x /bin/busybox && ls ../../../../../../bin/busybox"];
            let process = json!({ "args": args, "cwd": cwd, "env": ["PATH=/bin"],
                                  "user": { "uid": 0, "gid": 0 } });
            if let Ok(code) = exec(&pod, &process) {
                assert_eq!(code, 0, "{engine}: exec in {cwd}");
            }
            let mut init = Bundle::new(&args);
            init.spec["process"]["cwd"] = json!(cwd);
            if let Ok(code) = pod.run_to_end(&init) {
                assert_eq!(code, 0, "{engine}: init in {cwd}");
            }
        }
    }
}

/// CVE-2019-5736: a container wrote to the runtime's program through /proc/PID/exe.
#[test]
fn the_engines_program_cannot_be_written_from_what_runs_it() {
    if !ours() {
        return;
    }
    let program = programs().join("runc-sandboxer");
    let before = std::fs::read(&program).unwrap();
    let pod = Direct::run("exe");
    let bundle = Bundle::new(&["sleep", "1000"]);
    let pid = task!(&pod.socket, create, bundle.request("c")).unwrap().pid;
    // The engine's init, that waits for its start inside the container.
    let exe = format!("/proc/{pid}/exe");
    let name = std::fs::read_link(&exe).unwrap();
    assert!(std::fs::read(&exe).unwrap() == before, "{} is the engine", name.display());
    let held =
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&exe).unwrap();
    start(&pod, "").unwrap();
    kuasar_tests::wait_for("it has become its payload", std::time::Duration::from_secs(10), || {
        std::fs::read_link(&exe).is_ok_and(|now| now != name)
    });
    // Nobody executes it now, not even the daemon: what remains has to be a matter of the mount.
    switch(&["daemon", "stop"], &[]);
    let path = format!("/proc/self/fd/{}", held.as_raw_fd());
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let opened = loop {
        let opened = std::fs::OpenOptions::new().append(true).open(&path);
        let busy = |e: &std::io::Error| e.kind() == std::io::ErrorKind::ExecutableFileBusy;
        // The others want the daemon, whatever comes of this.
        if !opened.as_ref().is_err_and(busy) || std::time::Instant::now() > until {
            break opened;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    switch(&["daemon", "start"], &[]);
    match opened {
        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EROFS), "{e}"),
        Ok(mut file) => drop(file.write_all(b"x").expect_err("it can be written to")),
    }
    assert!(std::fs::read(&program).unwrap() == before);
    // And with the program itself as the payload.
    let mut own = Bundle::new(&["/proc/self/exe", "--version"]);
    own.spec["process"]["args"] = json!(["/proc/self/exe"]);
    let _ = pod.run_to_end(&own);
    assert!(std::fs::read(&program).unwrap() == before);
}

/// CVE-2022-27650: crun's execs had inheritable capabilities.
#[test]
fn all_five_capability_sets_are_as_asked_for_on_execs_too() {
    if !ours() {
        return;
    }
    let words = ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"];
    let want = (1_u64 << 0) | (1 << 10);
    for engine in engines::available() {
        let mut bundle = Bundle::new(&["sleep", "1000"]);
        bundle.spec["process"]["capabilities"] =
            json!({ "bounding": words, "effective": words, "permitted": words });
        let pod = sleeper(engine, &bundle);
        let q = tasks::StateRequest { id: "c".into(), ..Default::default() };
        let pid = task!(&pod.socket, state, q).unwrap().pid;
        let check = |status: &str, bounding: u64, who: &str| {
            for (set, want) in [
                ("CapInh", 0),
                ("CapPrm", bounding),
                ("CapEff", bounding),
                ("CapBnd", bounding),
                ("CapAmb", 0),
            ] {
                let line = status.lines().find(|l| l.starts_with(set)).unwrap();
                let value =
                    u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
                assert_eq!(value, want, "{engine}: {set} of {who}");
            }
        };
        check(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap(), want, "init");
        let process = |sets: Value| {
            json!({ "args": ["sh", "-c", "cat /proc/self/status > /out"], "cwd": "/",
                    "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 }, "capabilities": sets })
        };
        let sets = json!({ "bounding": words, "effective": words, "permitted": words });
        assert_eq!(exec(&pod, &process(sets)).unwrap(), 0);
        check(&bundle.out(), want, "an exec");
        let one = json!({ "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"],
                          "permitted": ["CAP_CHOWN"], "inheritable": null });
        assert_eq!(exec(&pod, &process(one)).unwrap(), 0);
        check(&bundle.out(), 1, "an exec with one");
        let none = json!({ "bounding": [], "effective": [], "permitted": [] });
        assert_eq!(exec(&pod, &process(none)).unwrap(), 0);
        check(&bundle.out(), 0, "an exec with none");
    }
}

/// CVE-2021-30465, CVE-2024-45310: a link in the image as the target of a mount.
#[test]
fn a_link_of_the_image_as_a_mount_target_stays_inside() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    for engine in engines::available() {
        let outside = Outside::new();
        let volume = Outside::new();
        let host = outside.0.to_string_lossy();
        let made = format!("{host}/made");
        let up = format!("../../../../../../../../..{}", outside.0.display());
        // Link in the rootfs; where to mount below it; whether a file is mounted.
        let cases: &[(&str, &str, &str, bool)] = &[
            ("evil", &host, "/evil/new", false),
            ("evil", &up, "/evil/new", false),
            ("evil", &host, "/evil", false),
            ("evil", &up, "/evil/secret", true),
            ("evil", &made, "/evil", true),
        ];
        for (link, to, target, file) in cases {
            let who = format!("{engine}: {link} -> {to}, mounted at {target}");
            println!("{who}");
            let mut bundle = Bundle::new(&["sh", "-c", "cat /proc/self/mounts > /out"]);
            symlink(to, bundle.rootfs().join(link)).unwrap();
            let source = if *file { volume.0.join("secret") } else { volume.0.clone() };
            bundle.bind(&source, target);
            let pod = Direct::run_on("link", engine);
            // It may be refused, too.
            let _ = pod.run_to_end(&bundle);
            outside.untouched(&who);
        }
        // What we mount ourselves follows no link either.
        for name in ["etc/hostname", "etc/hosts", "etc/resolv.conf"] {
            let bundle = Bundle::new(&["true"]);
            symlink(outside.0.join("made"), bundle.rootfs().join(name)).unwrap();
            let pod = Direct::run_on("link", engine);
            let _ = pod.run_to_end(&bundle);
            outside.untouched(&format!("{engine}: {name}"));
        }
        let bundle = Bundle::new(&["true"]);
        std::fs::remove_dir(bundle.rootfs().join("etc")).unwrap();
        symlink(&outside.0, bundle.rootfs().join("etc")).unwrap();
        let pod = Direct::run_on("link", engine);
        let _ = pod.run_to_end(&bundle);
        outside.untouched(&format!("{engine}: etc"));
    }
    leaks::assert_none(&before);
}

/// CVE-2025-24965: a host's write into a tree that a guest fills. Here: the working directory,
/// which is made in the rootfs when it is not there.
#[test]
fn a_working_directory_behind_a_link_is_made_inside() {
    if !ours() {
        return;
    }
    for engine in engines::available() {
        let outside = Outside::new();
        let mut bundle = Bundle::new(&["true"]);
        symlink(&outside.0, bundle.rootfs().join("inner")).unwrap();
        bundle.spec["process"]["cwd"] = json!("/inner/a/b");
        let pod = Direct::run_on("cwd", engine);
        let _ = pod.run_to_end(&bundle);
        outside.untouched(engine);
    }
}

/// CVE-2025-31133, CVE-2019-16884: /dev/null and /proc of the image are not what they seem.
#[test]
fn a_masked_path_is_masked_by_nothing_of_the_image() {
    if !ours() {
        return;
    }
    for engine in engines::available() {
        let outside = Outside::new();
        let mut bundle =
            Bundle::new(&["sh", "-c", "cat /proc/kcore > /out; cat /etc/mask >> /out"]);
        bundle.spec["linux"]["maskedPaths"] = json!(["/proc/kcore", "/etc/mask"]);
        bundle.spec["mounts"].as_array_mut().unwrap().retain(|m| m["destination"] != "/dev");
        symlink(outside.0.join("secret"), bundle.rootfs().join("dev/null")).unwrap();
        std::fs::write(bundle.rootfs().join("etc/mask"), "not to be seen").unwrap();
        let pod = Direct::run_on("mask", engine);
        // It may be refused, too.
        let _ = pod.run_to_end(&bundle);
        let out = std::fs::read(bundle.rootfs().join("out")).unwrap_or_default();
        assert!(out.is_empty(), "{engine}: {}", String::from_utf8_lossy(&out));
        outside.untouched(engine);
    }
}

/// CVE-2026-30892: a user that is no number became root.
#[test]
fn a_user_that_is_no_number_is_refused() {
    if !ours() {
        return;
    }
    let outside = Outside::new();
    for engine in engines::available() {
        let bundle = Bundle::new(&["sleep", "1000"]);
        let pod = sleeper(engine, &bundle);
        let wrong = [
            json!("0"),
            json!("0x0"),
            json!("root"),
            json!(-1),
            json!(4_294_967_296_u64),
            json!(1.5),
            json!([0]),
        ];
        for uid in wrong {
            let process = json!({ "args": ["sh", "-c", "id -u > /out"], "cwd": "/",
                                  "env": ["PATH=/bin"], "user": { "uid": uid, "gid": 0 } });
            let e = exec(&pod, &process).expect_err("a user that is no number");
            assert_eq!(e.code(), Code::InvalidArgument, "{engine}: exec as {uid}: {e}");
            let mut init = Bundle::new(&["true"]);
            init.spec["process"]["user"] = json!({ "uid": uid, "gid": 0 });
            let e = pod.run_to_end(&init).expect_err("a user that is no number");
            assert_eq!(e.code(), Code::InvalidArgument, "{engine}: init as {uid}: {e}");
        }
    }
    outside.untouched("nobody");
}

/// CVE-2022-31030, CVE-2022-23471: execs that never end, or whose output nobody takes, add up.
#[test]
fn many_execs_leave_no_descriptor_and_no_process() {
    if !ours() {
        return;
    }
    let pod = Pod::run(pod_config("pile"));
    let c = pod.start(&["sleep", "1000"]);
    c.exec(&["true"]);
    let daemon = kuasar_tests::daemon_pid();
    let fds = leaks::descriptors(daemon);
    for i in 0..10 {
        if i < 2 {
            // Killed at its limit.
            let q = ExecSyncRequest {
                container_id: c.id.clone(),
                cmd: ["sleep", "1111"].map(String::from).to_vec(),
                timeout: 1,
            };
            assert!(kuasar_tests::cri!(exec_sync, q).is_err());
        }
        c.exec(&["sh", "-c", "yes | head -c 1000000"]);
    }
    kuasar_tests::wait_for("descriptors are closed", std::time::Duration::from_secs(20), || {
        leaks::descriptors(daemon) <= fds + 4
    });
    let ps = c.sh("ps -o args");
    assert!(!ps.contains("sleep 1111") && !ps.contains("yes"), "{ps}");
}

/// CVE-2022-23648 and 2026-53488: what an image or pod names is never a path of the daemon's.
#[test]
fn names_of_a_pod_never_become_paths_of_the_host() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    for name in ["../../../../tmp/evil", "a/../../b", "x\ny"] {
        let mut config = pod_config("names");
        config.hostname = name.into();
        let e = Pod::try_run(config, &handler()).err().expect("a hostname is one word");
        assert_eq!(e.code(), Code::InvalidArgument, "hostname {name:?}: {e}");
        let pod = Direct::run_with("names", |config| {
            config.metadata.mut_or_insert_default().name = name.into();
            config.log_directory = format!("/tmp/{name}");
            config.annotations.insert("io.kuasar.other".into(), name.into());
        });
        assert_eq!(pod.run_to_end(&Bundle::new(&["true"])).unwrap(), 0);
    }
    let program = Direct::run_with("names", |config| {
        config.annotations.insert("io.kuasar.runc.path".into(), "/bin/false".into());
    });
    assert_eq!(program.run_to_end(&Bundle::new(&["true"])).unwrap(), 0);
    drop(program);
    let q = wire::create_with("names", |config| {
        config.annotations.insert("io.kuasar.runc.engine".into(), "/bin/true".into());
    });
    assert_eq!(create(q).unwrap_err().code(), Code::InvalidArgument);
    assert!(!Path::new("/tmp/evil").exists());
    leaks::assert_none(&before);
}

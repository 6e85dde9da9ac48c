//! `kuasar-ctl` on real daemons: pods that containerd has made, pods that it makes itself, a host with
//! things broken on purpose.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use kuasar_tests::cri::*;
use kuasar_tests::{bed, inside, leaks, on, ours, programs, root, skip, switch, wait_for, wasm};
use serde_json::Value;

/// Directory for what a run of the program makes.
fn state() -> PathBuf {
    bed().join("run/ctl")
}

/// The daemons of the bed that answer Admin: those under test here.
pub(crate) fn arguments(kinds: &[&str]) -> Vec<String> {
    let mut all = vec![programs().join("kuasar-ctl").display().to_string()];
    all.extend(["--state-dir".to_owned(), state().display().to_string()]);
    for kind in kinds {
        let socket = bed().join(format!("run/kuasar-{kind}.sock"));
        all.extend(["-a".to_owned(), format!("{kind}={}", socket.display())]);
    }
    all
}

/// Runs the program in the bed's namespaces.
pub(crate) fn ctl_on(kinds: &[&str], args: &[&str]) -> Output {
    let mut all = arguments(kinds);
    all.extend(args.iter().map(ToString::to_string));
    inside(&all.iter().map(String::as_str).collect::<Vec<_>>())
}

fn ctl(args: &[&str]) -> Output {
    ctl_on(&["runc"], args)
}

pub(crate) fn code(out: &Output) -> i32 {
    out.status.code().unwrap_or(-1)
}

pub(crate) fn out(o: &Output) -> String {
    String::from_utf8_lossy(&o.stdout).into_owned()
}

pub(crate) fn err(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

/// Standard output of what must succeed.
fn good(args: &[&str]) -> String {
    let o = ctl(args);
    assert_eq!(code(&o), 0, "{args:?}: {}{}", out(&o), err(&o));
    out(&o)
}

fn json(args: &[&str]) -> Value {
    let all: Vec<&str> = ["-o", "json"].iter().chain(args).copied().collect();
    serde_json::from_str(&good(&all)).unwrap()
}

/// Starts the program and leaves it running.
pub(crate) fn spawn(kinds: &[&str], args: &[&str]) -> Child {
    let ns = std::fs::read_to_string(bed().join("run/ns.pid")).unwrap();
    Command::new("nsenter")
        .args(["-t", ns.trim(), "-n", "-m", "--"])
        .args(arguments(kinds))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

pub(crate) fn signal(child: &Child, signal: i32) {
    // SAFETY: a process of ours that was not waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// A root file system with busybox; removed when dropped.
struct Rootfs(PathBuf);

impl Rootfs {
    fn new() -> Self {
        let dir = bed().join(format!("run/logs/rootfs-{}", unique()));
        for name in ["bin", "dev", "etc", "proc", "sys", "tmp", "run"] {
            std::fs::create_dir_all(dir.join(name)).unwrap();
        }
        let busybox = dir.join("bin/busybox");
        std::fs::copy(bed().join("src/busybox"), &busybox).unwrap();
        for name in ["sh", "cat", "echo", "sleep", "touch"] {
            std::fs::hard_link(&busybox, dir.join("bin").join(name)).unwrap();
        }
        Self(dir)
    }

    fn path(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Nothing of a run is left: pods, files, cgroups, mounts.
fn assert_nothing_left(kinds: &[&str]) {
    let o = ctl_on(kinds, &["-o", "json", "ps"]);
    let pods: Value = serde_json::from_str(&out(&o)).unwrap();
    let ours = |pod: &&Value| pod["namespace"] == "kuasar-ctl";
    let left: Vec<&Value> = pods.as_array().unwrap().iter().filter(ours).collect();
    assert!(left.is_empty(), "pods: {left:#?}");
    let dir = root().join(state().strip_prefix("/").unwrap());
    let files: Vec<_> = std::fs::read_dir(dir).into_iter().flatten().flatten().collect();
    assert!(files.is_empty(), "files: {files:?}");
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let group = hierarchy.path().join("kuasar-ctl");
        assert!(!group.exists(), "cgroup: {}", group.display());
    }
    let mounts = out(&inside(&["cat", "/proc/self/mounts"]));
    let state = state().display().to_string();
    assert!(!mounts.contains(&state), "mounts: {mounts}");
}

#[test]
fn ctl_sees_pods_of_containerd_and_runs_processes_in_them() {
    if !ours() {
        return;
    }
    let pod = Pod::run(pod_config("ctl-seen"));
    let c = pod.start(&["sh", "-c", "echo one; echo two >&2; while :; do sleep 1; done"]);
    let all = json(&["ps"]);
    let found = all.as_array().unwrap().iter().find(|p| p["id"] == pod.id.as_str()).unwrap();
    assert_eq!((&found["phase"], &found["name"]), (&"ready".into(), &"ctl-seen".into()));
    let container = &found["containers"][0];
    assert_eq!(container["id"], c.id.as_str());
    assert_eq!(container["pid"], c.pid());
    assert!(good(&["ps"]).contains("e2e/ctl-seen"));
    assert!(good(&["ps", "-c"]).contains(&c.id[..13]));
    assert_eq!(good(&["ps", "-q"]).trim(), pod.id);
    let all = json(&["inspect", &pod.id[..10]]);
    assert_eq!(all[0]["info"]["info"]["processStatus"], "running");
    assert_eq!(all[0]["info"]["runc"]["engine"], "builtin");
    // By name, by the beginning of the pod's id, and by the container's.
    for name in ["ctl-seen", "e2e/ctl-seen", &pod.id[..12], &c.id[..12]] {
        let o = ctl(&["exec", name, "sh", "-c", "echo out; echo err >&2; exit 7"]);
        assert_eq!((code(&o), out(&o).as_str()), (7, "out\n"), "{name}: {}", err(&o));
        assert_eq!(err(&o), "err\n");
    }
    let o = ctl(&["exec", "ctl-seen", "no-such-program"]);
    assert_eq!(code(&o), 125, "{}", err(&o));
    assert!(err(&o).contains("no-such-program"), "{}", err(&o));
    wait_for("containerd writes the log", Duration::from_secs(10), || {
        out(&ctl(&["logs", "ctl-seen"])).lines().count() == 2
    });
    let logged = good(&["logs", "ctl-seen"]);
    assert!(logged.contains("one\n") && logged.contains("two\n"), "{logged}");
    let top = json(&["top", "-n", "1"]);
    let used = top.as_array().unwrap().iter().find(|p| p["pod"] == pod.id.as_str()).unwrap();
    assert!(used["memoryBytes"].as_u64().unwrap() > 0 && used["processes"].as_u64().unwrap() > 0);
    let metrics = json(&["metrics"]);
    let gauge = metrics.as_array().unwrap().iter().find(|m| m["name"] == "kuasar_sandboxes");
    assert!(gauge.unwrap()["value"].as_f64().unwrap() >= 1.0);
    for (args, wanted) in [
        (&["inspect", "nobody"][..], 4),
        (&["exec", "nobody", "true"], 125),
        (&["console", "ctl-seen"], 1),
        (&["-s", "rnc", "ps"], 4),
        (&["ps", "--nothing"], 2),
    ] {
        assert_eq!(code(&ctl(args)), wanted, "{args:?}");
    }
    let stopped = good(&["stop", &pod.id]);
    assert_eq!(stopped.trim(), pod.id);
    assert_eq!(c.wait(), 137, "containerd has heard of it");
    assert_eq!(pod.state(), PodSandboxState::SandboxNotready as i32);
}

#[test]
fn ctl_passes_standard_input_on_and_tells_of_its_end() {
    if !ours() {
        return;
    }
    let pod = Pod::run(pod_config("ctl-input"));
    pod.start(&["sleep", "1000"]);
    let mut child = spawn(&["runc"], &["exec", "-i", "ctl-input", "cat"]);
    let text = "x".repeat(100_000) + "\n";
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let o = child.wait_with_output().unwrap();
    assert_eq!(code(&o), 0, "{}", err(&o));
    assert_eq!(out(&o).len(), text.len());
}

#[test]
fn ctl_follows_events_over_a_kill_9_of_the_daemon() {
    if !ours() {
        return;
    }
    let mut child = spawn(&["runc"], &["-o", "json", "events"]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut notes = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut next = |topic: &str| loop {
        let event: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        if event["topic"] == topic {
            return event;
        }
    };
    // It follows as soon as it has asked: a pod before that would not be seen.
    wait_for("it is connected", Duration::from_secs(10), || {
        std::fs::read_dir(format!("/proc/{}/fd", child.id())).map_or(0, Iterator::count) > 8
    });
    std::thread::sleep(Duration::from_millis(300));
    let pod = Pod::run(pod_config("ctl-events"));
    assert_eq!(next("/sandbox/ready")["pod"], pod.id.as_str());
    switch(&["daemon", "kill"], &[]);
    assert!(notes.next().unwrap().unwrap().contains("is away"));
    switch(&["daemon", "start"], &[]);
    let c = pod.start(&["sh", "-c", "exit 3"]);
    let exit = next("/tasks/exit");
    assert_eq!((&exit["container"], &exit["exitStatus"]), (&c.id.as_str().into(), &3.into()));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn ctl_runs_a_pod_without_an_engine_and_leaves_nothing() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    let rootfs = Rootfs::new();
    let dir = rootfs.path();
    let o = ctl(&["run", &dir, "sh", "-c", "echo hello; touch /new; echo bad >&2; exit 5"]);
    assert_eq!((code(&o), out(&o).as_str()), (5, "hello\n"), "{}", err(&o));
    assert_eq!(err(&o), "bad\n");
    assert!(!rootfs.0.join("new").exists(), "the directory itself is written to");
    let mut child = spawn(&["runc"], &["run", "-i", "--env", "A=b", &dir, "cat"]);
    child.stdin.take().unwrap().write_all(b"through\n").unwrap();
    let o = child.wait_with_output().unwrap();
    assert_eq!((code(&o), out(&o).as_str()), (0, "through\n"), "{}", err(&o));
    // An image: its own command, its layers.
    let archive = bed().join("images/base.tar").display().to_string();
    let image = ["run", "--ref", "localhost/busybox:latest", &archive];
    let o = ctl(&[&image[..], &["sh", "-c", "echo $PATH; exit 6"]].concat());
    assert_eq!(code(&o), 6, "{}", err(&o));
    assert!(out(&o).contains("/bin"), "{}", out(&o));
    for (args, wanted) in [
        (&["run", &dir, "no-such-program"][..], 125),
        (&["run", "/no/such/image"], 125),
        (&["run", &dir], 2),
        (&["run", "--ref", "nobody", &archive], 125),
    ] {
        let o = ctl(args);
        assert_eq!(code(&o), wanted, "{args:?}: {}", err(&o));
    }
    assert_nothing_left(&["runc"]);
    leaks::assert_none(&before);
}

#[test]
fn ctl_run_passes_signals_on_and_ends_what_does_not_end() {
    if !ours() {
        return;
    }
    let rootfs = Rootfs::new();
    let dir = rootfs.path();
    let started = |script: &str, more: &[&str]| {
        let args = [&["run"], more, &[dir.as_str(), "sh", "-c", script]].concat();
        let mut child = spawn(&["runc"], &args);
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        child
    };
    let mut child = started("trap 'exit 9' INT; echo up; while :; do sleep 0.1; done", &[]);
    signal(&child, libc::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(9));
    // PID 1 without a handler is immune: it is killed after its grace.
    let mut child = started("echo up; sleep 1000", &["--stop-timeout", "1"]);
    signal(&child, libc::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(137));
    assert_nothing_left(&["runc"]);
}

#[test]
fn ctl_gc_removes_what_a_killed_run_has_left() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    let rootfs = Rootfs::new();
    let mut child = spawn(&["runc"], &["run", &rootfs.path(), "sh", "-c", "echo up; sleep 1000"]);
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let would = json(&["gc", "--dry-run"]);
    assert!(would["removed"].as_array().unwrap().iter().any(|r| r["what"] == "abandoned pod"));
    assert!(good(&["ps"]).contains("kuasar-ctl/"), "a dry run removes nothing");
    let done = json(&["gc"]);
    assert_eq!(
        done["removed"].as_array().unwrap().len(),
        would["removed"].as_array().unwrap().len()
    );
    assert_eq!(json(&["gc"])["removed"].as_array().unwrap().len(), 0);
    assert_nothing_left(&["runc"]);
    leaks::assert_none(&before);
}

#[test]
fn ctl_runs_wasm_and_gvisor_pods_without_an_engine() {
    let dir = bed().join(format!("run/logs/ctl-wasm-{}", unique()));
    std::fs::create_dir_all(&dir).unwrap();
    let all = wasm::programs();
    if let Some(_chosen) = on("kuasar-wasm") {
        for (name, wanted, said) in [("hello.wasm", 0, "hello from wasm\n"), ("exit7.wasm", 7, "")]
        {
            let module = dir.join(name);
            std::fs::write(&module, &all[name]).unwrap();
            let o =
                ctl_on(&["wasm"], &["run", "--sandboxer", "wasm", &module.display().to_string()]);
            assert_eq!((code(&o), out(&o).as_str()), (wanted, said), "{}", err(&o));
        }
        assert_nothing_left(&["wasm"]);
    }
    if let Some(_chosen) = on("kuasar-gvisor") {
        let rootfs = Rootfs::new();
        let run = ["run", &rootfs.path(), "sh", "-c", "echo hello; exit 5"];
        let o = ctl_on(&["gvisor"], &run);
        assert_eq!((code(&o), out(&o).as_str()), (5, "hello\n"), "{}", err(&o));
        assert_nothing_left(&["gvisor"]);
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn ctl_shows_a_machines_console() {
    let Some(_chosen) = on("kuasar-vmm") else { return };
    let pod = Pod::run(pod_config("ctl-console"));
    let o = ctl_on(&["vmm"], &["console", "ctl-console"]);
    assert_eq!(code(&o), 0, "{}", err(&o));
    let o = ctl_on(&["vmm"], &["template", "list"]);
    assert_eq!(code(&o), 0, "{}", err(&o));
    drop(pod);
}

#[test]
fn ctl_bench_measures_and_leaves_nothing() {
    if !ours() {
        return;
    }
    let told = json(&["bench", "-n", "4", "-j", "2"]);
    let start = &told["steps"]["start"];
    assert!(start["minMs"].as_f64().unwrap() > 0.0);
    assert!(start["maxMs"].as_f64().unwrap() >= start["medianMs"].as_f64().unwrap());
    assert_nothing_left(&["runc"]);
}

/// A directory like /etc/kuasar; removed when dropped.
struct Etc(PathBuf);

impl Etc {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = bed().join(format!("run/logs/etc-{}", unique()));
        std::fs::create_dir_all(&dir).unwrap();
        for (name, text) in files {
            std::fs::write(dir.join(name), text).unwrap();
        }
        Self(dir)
    }

    fn run(&self, args: &[&str]) -> Output {
        let program = programs().join("kuasar-ctl").display().to_string();
        let dir = self.0.display().to_string();
        let fixed = [program.as_str(), "--config-dir", dir.as_str()];
        inside(&fixed.iter().chain(args).copied().collect::<Vec<_>>())
    }
}

impl Drop for Etc {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn finding<'a>(all: &'a Value, words: &str) -> &'a Value {
    let all = all.as_array().unwrap();
    let found = all.iter().find(|f| f["detail"].as_str().unwrap_or_default().contains(words));
    found.unwrap_or_else(|| panic!("nobody says {words:?}: {all:#?}"))
}

#[test]
fn ctl_check_says_what_the_daemon_says_on_one_line() {
    if !ours() {
        return;
    }
    let socket = bed().join("run/kuasar-runc.sock").display().to_string();
    let containerd = bed().join("etc/config.toml").display().to_string();
    let check = |etc: &Etc, more: &[&str]| -> (Value, i32) {
        let base = ["-o", "json", "check", "--containerd-config", &containerd];
        let o = etc.run(&[&base[..], more].concat());
        (serde_json::from_str(&out(&o)).unwrap_or(Value::Null), code(&o))
    };
    // The bed's own daemon is good.
    let dir = bed().join("run/kuasar-runc").display().to_string();
    let text = format!("listen = \"{socket}\"\ndir = \"{dir}\"\n");
    let etc = Etc::new(&[("runc-sandboxer.toml", &text)]);
    let (all, _) = check(&etc, &[]);
    assert_eq!(finding(&all, "answers, ")["state"], "good");
    assert_eq!(finding(&all, "the configuration is good")["state"], "good");
    assert_eq!(finding(&all, "kuasar-runc is used")["state"], "good");
    // A misspelt key: in the daemon's own words.
    let file = etc.0.join("runc-sandboxer.toml");
    std::fs::write(&file, format!("{text}log_levl = \"info\"\n")).unwrap();
    let daemon = Command::new(programs().join("runc-sandboxer"))
        .args(["--check-config", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    let said = err(&daemon);
    let said = said.trim().strip_prefix("runc-sandboxer: ").unwrap();
    let (all, exit) = check(&etc, &[]);
    assert_eq!((finding(&all, said)["state"].as_str(), exit), (Some("bad"), 5));
    assert!(said.contains("did you mean `log_level`?") && !said.contains('\n'), "{said}");
    assert_eq!(code(&etc.run(&["config", "check"])), 5);
    // Two daemons on one socket, and a daemon that is not there.
    std::fs::write(&file, &text).unwrap();
    std::fs::write(etc.0.join("wasm-sandboxer.toml"), &text).unwrap();
    let (all, exit) = check(&etc, &[]);
    assert_eq!(
        (finding(&all, "another daemon serves /")["state"].as_str(), exit),
        (Some("bad"), 5)
    );
    std::fs::write(etc.0.join("wasm-sandboxer.toml"), "dir = \"/nowhere/wasm\"\n").unwrap();
    let (all, _) = check(&etc, &[]);
    let away = finding(&all, "does not answer at /nowhere/wasm/sandboxer.sock");
    assert!(away["remedy"].as_str().unwrap().contains("systemctl start kuasar-wasm"));
    // A state directory that is open to others.
    std::fs::remove_file(etc.0.join("wasm-sandboxer.toml")).unwrap();
    let open = root().join(dir.strip_prefix('/').unwrap());
    std::fs::set_permissions(&open, PermissionsExt::from_mode(0o755)).unwrap();
    let (all, _) = check(&etc, &[]);
    std::fs::set_permissions(&open, PermissionsExt::from_mode(0o700)).unwrap();
    let wrong = finding(&all, "mode 0755");
    assert_eq!(wrong["remedy"], format!("chmod 0700 {dir}"));
    // What `--fix` prints is what is missing: here nothing, and both stanzas without containerd.
    assert_eq!(out(&etc.run(&["check", "--containerd-config", &containerd, "--fix"])), "");
    let missing = out(&etc.run(&["check", "--containerd-config", "/nowhere.toml", "--fix"]));
    assert!(
        missing.contains("[proxy_plugins.kuasar-runc]") && missing.contains(&socket),
        "{missing}"
    );
    assert!(missing.contains("runtimes.kuasar-runc]"), "{missing}");
}

#[test]
fn ctl_migrates_a_configuration_that_the_daemon_takes() {
    let upstream = "[sandbox]\nlog_level = 'info'\nenable_tracing = false\n[hypervisor]\n\
        path = '/usr/local/bin/cloud-hypervisor'\nvcpus = 2\nmemory_in_mb = 512\n\
        kernel_path = '/var/lib/kuasar/vmlinux.bin'\nimage_path = '/var/lib/kuasar/kuasar.img'\n\
        kernel_params = 'console=hvc0 task.log_level=debug'\nhugepages = false\n\
        entropy_source = '/dev/urandom'\n[hypervisor.task]\ndebug = true\n[hypervisor.virtiofsd]\n\
        path = '/usr/local/bin/virtiofsd'\nlog_level = 'info'\ncache = 'never'\nthread_pool_size = 4\n";
    let etc = Etc::new(&[("upstream.toml", upstream)]);
    let path = |name: &str| etc.0.join(name).display().to_string();
    let (from, to) = (path("upstream.toml"), path("vmm-sandboxer.toml"));
    let o = etc.run(&["config", "migrate", &from, "--to", &to]);
    assert_eq!(code(&o), 0, "{}", err(&o));
    let o = etc.run(&["config", "migrate", &from, "--to", &to]);
    assert_eq!(code(&o), 1, "an existing file is not replaced");
    let program = programs().join("vmm-sandboxer");
    if !program.exists() {
        return skip("no vmm-sandboxer to check a migrated configuration with");
    }
    let o = Command::new(program).args(["--check-config", "--config", &to]).output().unwrap();
    assert!(o.status.success(), "{}: {}", err(&o), std::fs::read_to_string(&to).unwrap());
    let shown = out(&etc.run(&["config", "show", "vmm"]));
    assert!(
        shown.contains("\nmemory_mib = 512\n") && shown.contains("\n#overhead_mib = "),
        "{shown}"
    );
    assert!(Path::new(&to).exists());
}

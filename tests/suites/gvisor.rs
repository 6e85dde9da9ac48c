//! Pods on gVisor: real containerd, real runsc. What is the same for every sandboxer is tried here
//! in short; the other suites run on this handler too, with `KUASAR_HANDLER=kuasar-gvisor`.

use std::path::PathBuf;
use std::time::Duration;

use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::{Chosen, bed, cri, inside, leaks, on, switch, task, wait_for, wire};

use crate::own_kernel::*;

const HANDLER: &str = "kuasar-gvisor";

fn gvisor() -> Option<Chosen> {
    on(HANDLER)
}

fn sentry(pod: &Pod) -> u32 {
    info(pod, "gvisor").get("sentryPid").unwrap().as_u64().unwrap() as u32
}

/// Processes below the pod's cgroup, by their title's first word.
fn processes(pod: &Pod) -> Vec<String> {
    let parent = &pod.config.linux.as_ref().unwrap().cgroup_parent;
    let mut titles = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let dir = entry.path();
        let Ok(cgroup) = std::fs::read_to_string(dir.join("cgroup")) else { continue };
        let Ok(title) = std::fs::read(dir.join("cmdline")) else { continue };
        let title = String::from_utf8_lossy(&title).split('\0').next().unwrap_or("").to_owned();
        if cgroup.contains(&format!("{parent}/")) {
            titles.push(title);
        }
    }
    titles.sort();
    titles
}

#[test]
fn a_pod_lives_on_a_kernel_of_its_own_and_leaves_nothing() {
    let Some(_on) = gvisor() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("gv-life"));
    let c = pod.start(&["sleep", "1000"]);
    assert!(c.sh("uname -r").starts_with("4.4"), "gVisor calls itself Linux 4.4");
    assert_eq!(c.sh("hostname"), "gv-life");
    assert_eq!(c.sh("cat /etc/hostname"), "gv-life");
    assert!(c.is_running());
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    c.remove().unwrap();
    pod.stop();
    assert_eq!(pod.state(), PodSandboxState::SandboxNotready as i32);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn no_process_stays_beside_sentry_and_gofers() {
    let Some(_on) = gvisor() else { return };
    let count = || {
        let own = |name: &&str| name.contains("runsc") || name.contains("shim");
        let all = inside(&["ps", "-e", "-o", "args"]).stdout;
        String::from_utf8_lossy(&all).lines().filter(own).count()
    };
    let before = count();
    let pod = Pod::run(pod_config("gv-count"));
    let first = pod.start(&["sleep", "1000"]);
    let _second = pod.start(&["sleep", "1000"]);
    first.exec(&["true"]);
    let rest = processes(&pod);
    let gofers = rest.iter().filter(|title| *title == "runsc-gofer").count();
    let sentries = rest.iter().filter(|title| *title == "runsc-sandbox").count();
    assert_eq!((sentries, gofers), (1, 3), "{rest:?}");
    // And nobody of ours outside of the pod's cgroup: no shim, no waiting command.
    let outside = count().saturating_sub(before).saturating_sub(processes(&pod).len());
    assert_eq!(
        outside,
        0,
        "{}",
        String::from_utf8_lossy(&inside(&["ps", "-e", "-o", "args"]).stdout)
    );
}

#[test]
fn exit_codes_and_output_come_exactly() {
    let Some(_on) = gvisor() else { return };
    let pod = Pod::run(pod_config("gv-io"));
    assert_eq!(pod.start(&["sh", "-c", "exit 7"]).wait(), 7);
    let c = pod.start(&["sh", "-c", "seq 1 100000; echo problem >&2; exit 3"]);
    assert_eq!(c.wait(), 3);
    let want: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(c.logged("stdout"), want.as_bytes());
    assert_eq!(c.logged("stderr"), b"problem\n");
    let c = pod.start(&["sh", "-c", "trap 'exit 4' TERM; while :; do sleep 0.1; done"]);
    c.exec(&["true"]);
    c.stop(20).unwrap();
    assert_eq!(c.wait(), 4);
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let Some(_on) = gvisor() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("gv-missing"));
    let c = pod.create_with(&["/no/such/program"], |_| {}).unwrap();
    let error = c.start().unwrap_err();
    assert!(error.message().contains("/no/such/program"), "{error}");
    let c = pod.start(&["sleep", "1000"]);
    let q = ExecSyncRequest {
        container_id: c.id.clone(),
        cmd: vec!["/no/such/exec".into()],
        timeout: 30,
    };
    let error = cri!(exec_sync, q).unwrap_err();
    assert!(
        error.message().contains("no such file") || error.message().contains("not found"),
        "{error}"
    );
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn execs_have_their_own_output_code_and_user() {
    let Some(_on) = gvisor() else { return };
    let pod = Pod::run(pod_config("gv-exec"));
    let c = pod.start_with(&["sleep", "1000"], |c| {
        let linux = c.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        security.run_as_user = Some(Int64Value { value: 1234 });
    });
    let (code, out, err) = c.exec(&["sh", "-c", "id -u; echo bad >&2; exit 9"]);
    assert_eq!((code, out.as_str(), err.as_str()), (9, "1234\n", "bad\n"));
    let (code, out, _) = c.exec(&["sh", "-c", "seq 1 20000 | tail -n 1"]);
    assert_eq!((code, out.as_str()), (0, "20000\n"));
    // CAP_NET_RAW is withheld here as it is from the container.
    let line = "grep CapBnd /proc/self/status";
    assert_eq!(
        c.sh(line),
        c.sh(&format!("{line} /proc/1/status | tail -n 1 | sed s/.*CapBnd/CapBnd/"))
    );
}

#[test]
fn a_terminal_has_a_size_and_is_told_of_another() {
    let Some(_on) = gvisor() else { return };
    let pod = Pod::run(pod_config("gv-tty"));
    let line = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let c = pod.start_with(&["sh", "-c", line], |c| c.tty = true);
    let logged = || String::from_utf8_lossy(&c.logged("stdout")).replace('\r', "");
    wait_for("it waits for the signal", SOON, || logged().contains("ready"));
    let socket = wire::task_socket(&pod.id);
    for (width, height) in [(99, 33), (120, 40)] {
        let q = tasks::ResizePtyRequest { id: c.id.clone(), width, height, ..Default::default() };
        task!(&socket, resize_pty, q).unwrap();
        let want = format!("{height} {width}\n");
        wait_for(&want, SOON, || logged().contains(&want));
    }
    c.stop(0).unwrap();
    let c = pod.start_with(&["sh", "-c", "seq 1 20000; exit 4"], |c| c.tty = true);
    assert_eq!(c.wait(), 4);
    let text = String::from_utf8_lossy(&c.logged("stdout")).replace('\r', "");
    let want: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(text, want);
}

#[test]
fn kill_9_of_the_daemon_loses_no_container_and_no_line() {
    let Some(_on) = gvisor() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("gv-kill9"));
    let c = pod.start(&["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"]);
    switch(&["daemon", "kill"], &[]);
    std::thread::sleep(Duration::from_millis(300));
    switch(&["daemon", "start"], &[]);
    assert_eq!(pod.state(), PodSandboxState::SandboxReady as i32);
    assert!(c.is_running());
    assert_eq!(c.sh("echo in"), "in");
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    let text = String::from_utf8(c.logged("stdout")).unwrap();
    assert!(text.lines().count() > 3);
    for (i, line) in text.lines().enumerate() {
        assert_eq!(line, (i + 1).to_string());
    }
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn ends_while_the_daemon_is_away_are_told_with_their_codes() {
    let Some(_on) = gvisor() else { return };
    ends_while_the_daemon_is_away(&Pod::run(pod_config("gv-away")));
}

#[test]
fn a_container_that_was_created_is_started_by_the_next_daemon() {
    let Some(_on) = gvisor() else { return };
    created_and_started_by_the_next_daemon(&Pod::run(pod_config("gv-created")));
}

#[test]
fn a_killed_sentry_ends_all_containers_at_once() {
    let Some(_on) = gvisor() else { return };
    killed_ends_all_containers_at_once("gv-sentry", sentry);
}

#[test]
fn a_sentry_that_ends_while_the_daemon_is_away_is_found_out() {
    let Some(_on) = gvisor() else { return };
    an_end_while_the_daemon_is_away_is_found_out("gv-both", sentry);
}

#[test]
fn containers_share_what_a_pod_shares() {
    let Some(_on) = gvisor() else { return };
    let pod = Pod::with("gv-share", |options| options.pid = NamespaceMode::Pod as i32);
    let first = pod.start(&["sleep", "1111"]);
    let second = pod.start(&["sleep", "2222"]);
    let seen = second.sh("ps");
    assert!(seen.contains("1111") && seen.contains("2222"), "{seen}");
    assert!(seen.contains("/pause"), "{seen}");
    first.sh("echo note > /dev/shm/note");
    assert_eq!(second.sh("cat /dev/shm/note"), "note");
    let apart = Pod::run(pod_config("gv-apart"));
    let (one, _two) = (apart.start(&["sleep", "1111"]), apart.start(&["sleep", "2222"]));
    let seen = one.sh("ps");
    assert!(!seen.contains("2222"), "{seen}");
}

#[test]
fn the_network_is_gvisors_and_a_port_is_forwarded() {
    let Some(_on) = gvisor() else { return };
    let pod = Pod::run(pod_config("gv-net"));
    let line = "while :; do echo served | nc -l -p 8080; done";
    let c = pod.start(&["sh", "-c", line]);
    assert!(c.sh("ip addr").contains("10.88.77."), "{}", c.sh("ip addr"));
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
    let ip = cri!(pod_sandbox_status, q).unwrap().status.unwrap().network.unwrap().ip;
    // From the host over the pod's veth.
    wait_for("it answers on its address", SOON, || dial(&format!("{ip}:8080")));
    // The way of kubectl port-forward: localhost in the pod's network namespace.
    let netns = info_netns(&pod);
    wait_for("it answers through the pod's localhost", SOON, || {
        let at = format!("--net={netns}");
        let script = "import socket; s = socket.create_connection(('localhost', 8080), 5); \
                      s.settimeout(5); print(s.recv(99).decode().strip())";
        inside(&["nsenter", &at, "python3", "-c", script]).stdout == b"served\n"
    });
}

fn info_netns(pod: &Pod) -> String {
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let answer = cri!(pod_sandbox_status, q).unwrap();
    let text = format!("{:?}", answer.info);
    let at = text.find("/var/run/netns/").or_else(|| text.find("/run/netns/")).unwrap();
    text[at..].chars().take_while(|c| c.is_alphanumeric() || "/-_".contains(*c)).collect()
}

fn dial(address: &str) -> bool {
    let script = format!(
        "import socket; s = socket.create_connection(('{}', {}), 5); s.settimeout(5); \
         print(s.recv(99).decode().strip())",
        address.split(':').next().unwrap(),
        address.split(':').nth(1).unwrap()
    );
    inside(&["python3", "-c", &script]).stdout == b"served\n"
}

#[test]
fn statistics_tell_a_container_that_works() {
    let Some(_on) = gvisor() else { return };
    let pod = Pod::run(pod_config("gv-stats"));
    let c = pod.start(&["sh", "-c", "while :; do :; done"]);
    let used = || {
        let q = ContainerStatsRequest { container_id: c.id.clone() };
        let stats = cri!(container_stats, q).unwrap().stats.unwrap();
        let cpu = stats.cpu.and_then(|c| c.usage_core_nano_seconds).map_or(0, |v| v.value);
        let memory = stats.memory.and_then(|m| m.working_set_bytes).map_or(0, |v| v.value);
        (cpu, memory)
    };
    wait_for("it has used time and memory", SOON, || {
        let (cpu, memory) = used();
        cpu > 10_000_000 && memory > 0
    });
}

#[test]
fn a_pod_may_choose_where_that_is_allowed() {
    let Some(_on) = gvisor() else { return };
    let mut config = pod_config("gv-choose");
    config.annotations = annotations(&[("io.kuasar.gvisor.platform", "ptrace")]);
    let pod = Pod::run(config);
    assert_eq!(info(&pod, "gvisor").get("platform").unwrap(), "ptrace");
    assert_eq!(pod.start(&["sh", "-c", "exit 6"]).wait(), 6);
    let mut config = pod_config("gv-choose-wrong");
    config.annotations = annotations(&[("io.kuasar.gvisor.platform", "xen")]);
    let error = Pod::try_run(config, HANDLER).map(drop).unwrap_err();
    assert!(error.message().contains("systrap, kvm or ptrace"), "{error}");
}

#[test]
fn what_a_pod_chooses_is_how_it_runs() {
    let Some(_on) = gvisor() else { return };
    let name = |flag: &str| format!("io.kuasar.gvisor.{flag}");
    let run = |flag: &str, value: &str| {
        let mut config = pod_config("gv-flag");
        config.annotations = annotations(&[(&name(flag), value)]);
        if flag == "file-access" {
            // gVisor has no overlay over a file system that others change.
            config.annotations.insert(name("overlay2"), "none".into());
        }
        Pod::run(config)
    };
    // Loopback alone, the pod's own addresses, and gVisor's stack.
    let pod = run("network", "none");
    let c = pod.start(&["sleep", "1000"]);
    assert!(!c.sh("ip addr").contains("10.88.77."), "{}", c.sh("ip addr"));
    pod.remove().unwrap();
    let pod = run("network", "host");
    let c = pod.start(&["sleep", "1000"]);
    assert!(c.sh("ip addr").contains("10.88.77."), "{}", c.sh("ip addr"));
    assert_eq!(info(&pod, "gvisor").get("network").unwrap(), "host");
    pod.remove().unwrap();
    // What is written to a volume is the host's, or lost.
    for (value, reaches) in [("root:self", true), ("all:memory", false)] {
        let pod = run("overlay2", value);
        let (dir, mount) = volume(&pod);
        let c = pod.start_with(&["sleep", "1000"], |c| c.mounts = vec![mount]);
        c.sh("echo x > /go/x; cat /go/x");
        assert_eq!(dir.join("x").exists(), reaches, "{value}");
        pod.remove().unwrap();
    }
    // A file that the host changes is seen with `shared`.
    for flag in ["file-access", "file-access-mounts"] {
        let pod = run(flag, "shared");
        let (dir, mount) = volume(&pod);
        let c = pod.start_with(&["sleep", "1000"], |c| c.mounts = vec![mount]);
        std::fs::write(dir.join("x"), "one").unwrap();
        assert_eq!(c.sh("cat /go/x"), "one");
        std::fs::write(dir.join("x"), "other").unwrap();
        assert_eq!(c.sh("cat /go/x"), "other");
        pod.remove().unwrap();
    }
    // The others are flags of runsc as they stand.
    for (flag, value) in
        [("host-uds", "open"), ("host-fifo", "open"), ("net-raw", "true"), ("oci-seccomp", "false")]
    {
        let pod = run(flag, value);
        let flags = info(&pod, "gvisor").get("flags").unwrap().to_string();
        assert!(flags.contains(&format!("--{flag}={value}")), "{flags}");
        assert_eq!(pod.start(&["sh", "-c", "exit 6"]).wait(), 6);
        pod.remove().unwrap();
    }
}

#[test]
fn debug_logs_and_system_calls_go_where_the_configuration_says() {
    let Some(_on) = gvisor() else { return };
    let configuration = Configuration::read("gvisor");
    let logs = bed().join(format!("run/logs/gv-debug-{}", unique()));
    std::fs::create_dir_all(&logs).unwrap();
    configuration
        .set(&format!("{}\ndebug_log = {logs:?}\nstrace = true\n", configuration.text.trim_end()));
    let pod = Pod::run(pod_config("gv-debug"));
    assert_eq!(pod.start(&["sh", "-c", "exit 6"]).wait(), 6);
    pod.remove().unwrap();
    let texts = std::fs::read_dir(&logs).unwrap().flatten();
    let texts = texts.map(|entry| std::fs::read(entry.path()).unwrap_or_default());
    let all: Vec<String> = texts.map(|text| String::from_utf8_lossy(&text).into_owned()).collect();
    let _ = std::fs::remove_dir_all(&logs);
    assert!(!all.is_empty());
    assert!(all.iter().any(|text| text.contains("strace.go")), "no system call is logged");
}

#[test]
fn a_missing_runsc_is_told_with_the_remedy() {
    let Some(_on) = gvisor() else { return };
    let configuration = Configuration::read("gvisor");
    let before = leaks::snapshot();
    for (program, words) in [
        ("/no/such/runsc", "install gVisor, or set runsc.path"),
        ("/bin/false", "has to be gVisor's runsc"),
    ] {
        configuration.set(&with_path(&configuration.text, program));
        let error = Pod::try_run(pod_config("gv-none"), HANDLER).map(drop).unwrap_err();
        assert!(error.message().contains(words), "{error}");
    }
    leaks::assert_none(&before);
}

/// The configuration with another `runsc.path`.
pub(crate) fn with_path(text: &str, program: &str) -> String {
    let line = |line: &str| match line.starts_with("path = ") {
        true => format!("path = {program:?}"),
        false => line.to_owned(),
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// A program in runsc's place, which answers `--version` with this and does `line` else.
pub(crate) fn fake_runsc(version: &str, line: &str) -> PathBuf {
    let file = bed().join(format!("run/fake-runsc-{}", unique()));
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in --version) echo runsc version {version} ;; *) {line} ;; esac\n"
    );
    std::fs::write(&file, script).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    file
}

#[test]
fn a_runsc_that_is_too_old_is_told_with_the_remedy() {
    let Some(_on) = gvisor() else { return };
    let configuration = Configuration::read("gvisor");
    let before = leaks::snapshot();
    let fake = fake_runsc("release-20231218.0", "exit 0");
    configuration.set(&with_path(&configuration.text, &fake.to_string_lossy()));
    let error = Pod::try_run(pod_config("gv-old"), HANDLER).map(drop).unwrap_err();
    let _ = std::fs::remove_file(&fake);
    assert!(error.message().contains("gVisor of 20231218, which is too old: install"), "{error}");
    leaks::assert_none(&before);
}

#[test]
fn a_platform_that_is_not_here_is_told_with_the_remedy() {
    let Some(_on) = gvisor() else { return };
    if inside(&["test", "-e", "/dev/kvm"]).status.success() {
        return kuasar_tests::skip("there is a /dev/kvm here");
    }
    let before = leaks::snapshot();
    let mut config = pod_config("gv-kvm");
    config.annotations = annotations(&[("io.kuasar.gvisor.platform", "kvm")]);
    let error = Pod::try_run(config, HANDLER).map(drop).unwrap_err();
    assert!(error.message().contains("or choose platform systrap"), "{error}");
    leaks::assert_none(&before);
}

#[test]
fn a_runsc_that_crashes_or_hangs_fails_the_pod_alone() {
    let Some(_on) = gvisor() else { return };
    let configuration = Configuration::read("gvisor");
    let before = leaks::snapshot();
    let known = "release-20240729.0";
    let fakes = [
        (known, "kill -9 $$", "no message"),
        (known, "exec sleep 100", "runsc run did not finish within"),
        ("$(exec sleep 100)", "exit 0", "--version did not answer within"),
    ];
    for (version, line, words) in fakes {
        let fake = fake_runsc(version, line);
        let changed = with_path(&configuration.text, &fake.to_string_lossy());
        let limits = "create = \"2s\"\nother = \"2s\"";
        configuration.set(&format!("{changed}\n[runsc_timeouts]\n{limits}\n"));
        let error = Pod::try_run(pod_config("gv-bad"), HANDLER).map(drop).unwrap_err();
        let _ = std::fs::remove_file(&fake);
        assert!(error.message().contains(words), "{error}");
    }
    leaks::assert_none(&before);
}

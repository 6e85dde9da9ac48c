//! Pods on Quark: real containerd, and a fake in Quark's place (`tests/fake-quark`), which has its
//! command line and Task API and runs ordinary processes. What Quark itself would do with what it
//! is given is not tried by this. Other suites run on this handler too, with
//! `KUASAR_HANDLER=kuasar-quark`.

use std::time::Duration;

use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::{Chosen, inside, leaks, on, switch, task, wait_for, wire};

use crate::own_kernel::*;
use crate::{failpoints, kill9};

const HANDLER: &str = "kuasar-quark";

fn quark() -> Option<Chosen> {
    on(HANDLER)
}

fn process(pod: &Pod) -> u32 {
    info(pod, "quark").get("quarkPid").unwrap().as_u64().unwrap() as u32
}

#[test]
fn a_pod_lives_behind_a_task_socket_and_leaves_nothing() {
    let Some(_on) = quark() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("q-life"));
    let c = pod.start(&["sleep", "1000"]);
    assert_eq!(c.sh("hostname"), "q-life");
    assert_eq!(c.sh("cat /etc/hostname"), "q-life");
    assert!(c.sh("ip addr").contains("10.88.77."));
    // The process is in the pod's cgroup, and in no mount namespace of ours.
    let parent = &pod.config.linux.as_ref().unwrap().cgroup_parent;
    let pid = process(&pod);
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(cgroup.contains(parent.as_str()), "{cgroup}");
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
fn exit_codes_and_output_come_exactly() {
    let Some(_on) = quark() else { return };
    let pod = Pod::run(pod_config("q-io"));
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
    let (code, out, err) = {
        let c = pod.start(&["sleep", "1000"]);
        c.exec(&["sh", "-c", "seq 1 20000 | tail -n 1; echo bad >&2; exit 9"])
    };
    assert_eq!((code, out.as_str(), err.as_str()), (9, "20000\n", "bad\n"));
}

#[test]
fn a_terminal_has_a_size_and_its_output_is_whole() {
    let Some(_on) = quark() else { return };
    let pod = Pod::run(pod_config("q-tty"));
    let line = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let c = pod.start_with(&["sh", "-c", line], |c| c.tty = true);
    let logged = || String::from_utf8_lossy(&c.logged("stdout")).replace('\r', "");
    wait_for("it waits for the signal", SOON, || logged().contains("ready"));
    let q =
        tasks::ResizePtyRequest { id: c.id.clone(), width: 99, height: 33, ..Default::default() };
    let socket = wire::task_socket(&pod.id);
    task!(&socket, resize_pty, q).unwrap();
    wait_for("it sees the size", SOON, || logged().contains("33 99\n"));
    c.stop(0).unwrap();
    let c = pod.start_with(&["sh", "-c", "seq 1 20000; exit 4"], |c| c.tty = true);
    assert_eq!(c.wait(), 4);
    let text = String::from_utf8_lossy(&c.logged("stdout")).replace('\r', "");
    let want: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(text, want);
}

#[test]
fn volumes_and_shm_are_where_they_belong() {
    let Some(_on) = quark() else { return };
    let pod = Pod::run(pod_config("q-volumes"));
    let (dir, mount) = volume(&pod);
    std::fs::write(dir.join("note"), "from the host\n").unwrap();
    let first = pod.start_with(&["sleep", "1000"], |c| c.mounts = vec![mount.clone()]);
    assert_eq!(first.sh("cat /go/note"), "from the host");
    first.sh("echo back > /go/back");
    assert_eq!(std::fs::read(dir.join("back")).unwrap(), b"back\n");
    let mount = Mount { readonly: true, container_path: "/run/deep/go".into(), ..mount };
    let second = pod.start_with(&["sleep", "1000"], |c| c.mounts = vec![mount]);
    assert_eq!(second.sh("cat /run/deep/go/note"), "from the host");
    let (code, ..) = second.exec(&["sh", "-c", "echo no > /run/deep/go/note"]);
    assert_ne!(code, 0);
    first.sh("echo shared > /dev/shm/note");
    assert_eq!(second.sh("cat /dev/shm/note"), "shared");
    // A removed container takes its mounts along and nothing of the volume.
    first.stop(0).unwrap();
    first.remove().unwrap();
    assert!(dir.join("note").exists());
    assert_eq!(second.sh("cat /run/deep/go/note"), "from the host");
}

#[test]
fn kill_9_of_the_daemon_loses_no_container_and_no_line() {
    let Some(_on) = quark() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("q-kill9"));
    let c = pod.start(&["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"]);
    let tty = pod
        .start_with(&["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"], |c| {
            c.tty = true
        });
    for _ in 0..3 {
        switch(&["daemon", "kill"], &[]);
        // Lines are written while nobody reads.
        std::thread::sleep(Duration::from_millis(300));
        switch(&["daemon", "start"], &[]);
        assert_eq!(pod.state(), PodSandboxState::SandboxReady as i32);
        assert!(c.is_running() && tty.is_running());
        assert_eq!(c.sh("echo in"), "in");
    }
    for c in [&c, &tty] {
        c.stop(0).unwrap();
        assert_eq!(c.wait(), 137);
        let text = String::from_utf8(c.logged("stdout")).unwrap().replace('\r', "");
        assert!(text.lines().count() > 10);
        for (i, line) in text.lines().enumerate() {
            assert_eq!(line, (i + 1).to_string());
        }
    }
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn ends_while_the_daemon_is_away_are_told_with_their_codes() {
    let Some(_on) = quark() else { return };
    ends_while_the_daemon_is_away(&Pod::run(pod_config("q-away")));
}

#[test]
fn a_container_that_was_created_is_started_by_the_next_daemon() {
    let Some(_on) = quark() else { return };
    created_and_started_by_the_next_daemon(&Pod::run(pod_config("q-created")));
}

#[test]
fn a_killed_quark_ends_all_containers_at_once() {
    let Some(_on) = quark() else { return };
    killed_ends_all_containers_at_once("q-killed", process);
}

#[test]
fn a_quark_that_ends_while_the_daemon_is_away_is_found_out() {
    let Some(_on) = quark() else { return };
    an_end_while_the_daemon_is_away_is_found_out("q-both", process);
}

#[test]
fn a_terminal_survives() {
    let Some(_on) = quark() else { return };
    kill9::terminal_survives();
}

#[test]
fn killing_it_again_and_again_under_load_loses_no_container() {
    let Some(_on) = quark() else { return };
    kill9::killed_again_and_again_under_load();
}

#[test]
fn it_may_die_at_every_failpoint() {
    let Some(_on) = quark() else { return };
    failpoints::dies_at_every_failpoint();
}

#[test]
fn a_failure_at_any_point_leaves_nothing() {
    let Some(_on) = quark() else { return };
    failpoints::fails_at_any_point();
}

#[test]
fn what_quark_cannot_is_refused_in_words() {
    let Some(_on) = quark() else { return };
    let mut config = pod_config("q-sysctl");
    let linux = config.linux.get_or_insert_default();
    linux.sysctls = annotations(&[("net.ipv4.ip_forward", "1")]);
    let error = Pod::try_run(config, HANDLER).map(drop).unwrap_err();
    assert!(error.message().contains("ignored_sysctls"), "{error}");
    let pod = Pod::run(pod_config("q-cannot"));
    let c = pod.start(&["sleep", "1000"]);
    let q =
        tasks::CheckpointTaskRequest { id: c.id.clone(), path: "/x".into(), ..Default::default() };
    let socket = wire::task_socket(&pod.id);
    let error = task!(&socket, checkpoint, q).unwrap_err();
    assert!(error.to_string().contains("Quark makes no checkpoints"), "{error}");
    // What its own server does not implement is told as that.
    let q = tasks::PauseRequest { id: c.id.clone(), ..Default::default() };
    let error = task!(&socket, pause, q).unwrap_err();
    assert!(error.to_string().contains("pause"), "{error}");
    assert!(c.is_running());
}

#[test]
fn a_missing_quark_or_kvm_is_told_with_the_remedy() {
    let Some(_on) = quark() else { return };
    let configuration = Configuration::read("quark");
    let before = leaks::snapshot();
    for (from, to, words) in [
        ("fake-quark", "/no/such/quark", "install Quark, or set quark.path"),
        ("/dev/null", "/no/such/kvm", "load the kvm module"),
    ] {
        configuration.set(&configuration.text.replace(from, to));
        let error = Pod::try_run(pod_config("q-none"), HANDLER).map(drop).unwrap_err();
        assert!(error.message().contains(words), "{error}");
    }
    leaks::assert_none(&before);
}

#[test]
fn a_quark_that_spares_what_it_was_to_kill_holds_up_no_pod() {
    let Some(_on) = quark() else { return };
    let configuration = Configuration::read("quark");
    let before = leaks::snapshot();
    let other = Pod::run(pod_config("q-beside"));
    let beside = other.start(&["sleep", "1000"]);
    configuration.set(&format!(
        "{}args = [\"--fake\", \"spares\"]\n[quark_timeouts]\nother = \"1s\"\n",
        configuration.text
    ));
    let pod = Pod::run(pod_config("q-spares"));
    let c = pod.start(&["sleep", "1000"]);
    let begun = std::time::Instant::now();
    wait_for("the pod can be removed", Duration::from_secs(60), || pod.remove().is_ok());
    println!("{:?}", begun.elapsed());
    drop(c);
    assert_eq!(beside.sh("echo on"), "on");
    other.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn a_quark_that_fails_hangs_dies_or_lies_fails_the_pod_alone() {
    let Some(_on) = quark() else { return };
    let configuration = Configuration::read("quark");
    let before = leaks::snapshot();
    for (mode, words) in [
        ("fails", "the fake was told to fail"),
        ("hangs", "quark_timeouts.start"),
        ("dies", "has ended at once"),
        ("deaf", "did not answer"),
        ("rubbish", "the guest"),
        ("lies", "none of the sandbox's"),
    ] {
        let changed = format!(
            "{}args = [\"--fake\", \"{mode}\"]\n[quark_timeouts]\nstart = \"2s\"\n",
            configuration.text
        );
        configuration.set(&changed);
        let error = Pod::try_run(pod_config("q-bad"), HANDLER).map(drop).unwrap_err();
        println!("{mode}: {}", error.message());
        assert!(error.message().contains(words), "{mode}: {error}");
        leaks::assert_none(&before);
    }
    // Nobody of them is left.
    let all = inside(&["ps", "-e", "-o", "args"]).stdout;
    assert!(!String::from_utf8_lossy(&all).contains("fake-quark boot"));
}

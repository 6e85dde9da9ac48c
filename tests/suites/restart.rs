//! containerd is killed and comes back; so is the daemon, and another one takes its place.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use kuasar_tests::cri::*;
use kuasar_tests::{bed, daemon_pid, handler, leaks, ours, programs, skip, switch, wait_for};

const COUNT: &[&str] = &["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"];

/// Every line that it has written so far is there, in order, and more come.
fn counts_on(c: &Container) {
    let lines = || String::from_utf8(c.logged("stdout")).unwrap().replace('\r', "");
    let seen = lines().lines().count();
    wait_for("output goes on", Duration::from_secs(10), || lines().lines().count() > seen + 3);
    for (i, line) in lines().lines().enumerate() {
        assert_eq!(line, (i + 1).to_string());
    }
}

fn containerd_finds(handler: &str) {
    let before = leaks::snapshot();
    let pod = Pod::try_run(pod_config("restart"), handler).unwrap();
    let running = pod.start(COUNT);
    let terminal = pod.start_with(&["sh", "-c", "while read l; do echo $l; done"], |c| {
        (c.tty, c.stdin) = (true, true);
    });
    let created = pod.create_with(&["sh", "-c", "echo late; exit 8"], |_| {}).unwrap();
    let exited = pod.start(&["sh", "-c", "echo gone; exit 9"]);
    assert_eq!(exited.wait(), 9);
    let mut exec = std::process::Command::new("nsenter")
        .args([
            "-t",
            std::fs::read_to_string(bed().join("run/ns.pid")).unwrap().trim(),
            "-n",
            "-m",
            "--",
        ])
        .arg(bed().join("bin/crictl"))
        .args(["exec", &running.id, "sh", "-c", "echo begun; sleep 1234"])
        .env("CRI_CONFIG_FILE", bed().join("etc/crictl.yaml"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("the exec runs", Duration::from_secs(10), || {
        running.sh("ps -o args").contains("sleep 1234")
    });
    let pids = [running.pid(), terminal.pid()];
    switch(&["containerd", "kill"], &[]);
    exec.wait().unwrap();
    switch(&["containerd", "start"], &[]);
    assert_eq!(pod.state(), PodSandboxState::SandboxReady as i32);
    assert!(running.is_running() && terminal.is_running());
    assert_eq!([running.pid(), terminal.pid()], pids);
    assert_eq!(running.sh("echo alive"), "alive");
    // The exec's client is gone, the exec is not: as on stock runc.
    assert!(running.sh("ps -o args").contains("sleep 1234"));
    assert_eq!(terminal.sh("readlink /proc/1/fd/0"), terminal.sh("readlink /proc/1/fd/1"));
    assert_eq!(exited.status().exit_code, 9);
    assert_eq!(exited.logged("stdout"), b"gone\n");
    created.start().unwrap();
    assert_eq!(created.wait(), 8);
    wait_for("its output is logged", Duration::from_secs(10), || {
        created.logged("stdout") == b"late\n"
    });
    // Its output goes on into the same log.
    let seen = running.logged("stdout").len();
    wait_for("output goes on", Duration::from_secs(10), || running.logged("stdout").len() > seen);
    running.stop(0).unwrap();
    terminal.stop(0).unwrap();
    assert_eq!((running.wait(), terminal.wait()), (137, 137));
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn containerd_finds_its_pods_again() {
    containerd_finds(&handler());
}

#[test]
fn containerd_finds_its_pods_again_over_streams() {
    if handler() != "kuasar-runc" {
        return skip("streaming has a handler of its own");
    }
    containerd_finds("kuasar-runc-streaming");
}

#[test]
fn a_daemon_that_is_told_to_end_leaves_its_pods_running() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("term"));
    let shared = Pod::with("term-shared", |n| n.pid = NamespaceMode::Pod as i32);
    let (c, other) = (pod.start(COUNT), shared.start(COUNT));
    let pids = [c.pid(), other.pid()];
    let daemon = daemon_pid();
    switch(&["daemon", "stop"], &[]);
    for pid in pids {
        assert!(Path::new(&format!("/proc/{pid}/exe")).exists());
    }
    switch(&["daemon", "start"], &[]);
    assert_ne!(daemon_pid(), daemon);
    for (pod, c) in [(&pod, &c), (&shared, &other)] {
        assert_eq!(pod.state(), PodSandboxState::SandboxReady as i32);
        assert!(c.is_running());
        assert_eq!(c.sh("echo in"), "in");
        counts_on(c);
    }
    assert_eq!([c.pid(), other.pid()], pids);
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    pod.remove().unwrap();
    shared.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn another_daemon_takes_over_and_the_old_program_may_go() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    let copy = |name: &str| {
        let dir = bed().join("run").join(format!("{name}-{}", unique()));
        std::fs::create_dir(&dir).unwrap();
        for program in ["runc-sandboxer", "sandbox-parent"] {
            std::fs::copy(programs().join(program), dir.join(program)).unwrap();
        }
        dir
    };
    let (old, new) = (copy("old"), copy("new"));
    let start = |dir: &Path| {
        switch(&["daemon", "stop"], &[]);
        switch(&["daemon", "start"], &[("KUASAR_BIN_DIR", &dir.to_string_lossy())]);
        let exe = std::fs::read_link(format!("/proc/{}/exe", daemon_pid())).unwrap();
        assert_eq!(exe, dir.join("runc-sandboxer"));
    };
    start(&old);
    let pod = Pod::run(pod_config("upgrade"));
    let c = pod.start(COUNT);
    let created = pod.create_with(&["sh", "-c", "exit 8"], |_| {}).unwrap();
    let pid = c.pid();
    start(&new);
    std::fs::remove_dir_all(&old).unwrap();
    assert!(c.is_running());
    assert_eq!(c.pid(), pid);
    assert_eq!(c.sh("echo in"), "in");
    created.start().unwrap();
    assert_eq!(created.wait(), 8);
    assert_eq!(pod.start(&["sh", "-c", "exit 2"]).wait(), 2);
    counts_on(&c);
    pod.remove().unwrap();
    switch(&["daemon", "stop"], &[]);
    switch(&["daemon", "start"], &[]);
    std::fs::remove_dir_all(&new).unwrap();
    leaks::assert_none(&before);
}

#[test]
fn a_pod_can_be_made_by_the_shim_alone() {
    let pod = match Pod::try_run(pod_config("shim"), "kuasar-runc-shim") {
        Ok(pod) => pod,
        Err(e) if e.message().contains("no runtime") => return skip("no shim handler in this bed"),
        Err(e) => panic!("{e}"),
    };
    let c = pod.start(&["sleep", "1000"]);
    assert_eq!(c.sh("hostname"), "shim");
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    pod.remove().unwrap();
}

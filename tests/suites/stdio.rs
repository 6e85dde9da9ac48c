//! Standard streams, byte for byte.

use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::{daemon_pid, handler, leaks, ours, skip, wait_for, wire};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Ten megabytes of numbered lines, then exit.
const BURST: &str = "seq 1 1300000";

fn expected() -> Vec<u8> {
    (1..=1_300_000).flat_map(|i| format!("{i}\n").into_bytes()).collect()
}

fn burst(handler: &str) {
    let pod = Pod::try_run(pod_config("burst"), handler).unwrap();
    let c = pod.start(&["sh", "-c", BURST]);
    assert_eq!(c.wait(), 0);
    let want = expected();
    wait_for("everything is logged", Duration::from_secs(60), || {
        std::fs::metadata(&c.log).is_ok_and(|m| m.len() as usize > want.len())
            && c.logged("stdout").len() >= want.len()
    });
    assert!(c.logged("stdout") == want, "bytes differ");
}

#[test]
fn ten_megabytes_and_an_exit_lose_nothing() {
    burst(&handler());
}

#[test]
fn ten_megabytes_over_a_stream_lose_nothing() {
    if handler() != "kuasar-runc" {
        return skip("streaming has a handler of its own");
    }
    burst("kuasar-runc-streaming");
}

fn exec_with_input(handler: &str) {
    let pod = Pod::try_run(pod_config("stdin"), handler).unwrap();
    let c = pod.start(&["sleep", "1000"]);
    let ns = std::fs::read_to_string(kuasar_tests::bed().join("run/ns.pid")).unwrap();
    let mut child = Command::new("nsenter")
        .args(["-t", ns.trim(), "-n", "-m", "--"])
        .arg(kuasar_tests::bed().join("bin/crictl"))
        .args(["exec", "-i", &c.id, "sh", "-c", "cat; echo end"])
        .env("CRI_CONFIG_FILE", kuasar_tests::bed().join("etc/crictl.yaml"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let data = vec![b'x'; 300_000];
    child.stdin.take().unwrap().write_all(&data).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    assert_eq!(out.stdout.len(), data.len() + 4);
}

#[test]
fn the_end_of_input_reaches_the_process() {
    exec_with_input(&handler());
}

#[test]
fn the_end_of_input_reaches_the_process_over_a_stream() {
    if handler() != "kuasar-runc" {
        return skip("streaming has a handler of its own");
    }
    exec_with_input("kuasar-runc-streaming");
}

#[test]
fn many_short_execs_come_back_each_with_its_output() {
    let pod = Pod::run(pod_config("execs"));
    let c = pod.start(&["sleep", "1000"]);
    let n = std::env::var("KUASAR_EXECS").ok().and_then(|v| v.parse().ok()).unwrap_or(1000);
    c.exec(&["true"]);
    let fds = ours().then(|| leaks::descriptors(daemon_pid()));
    for i in 0..n {
        let text = i.to_string();
        let (code, out, _) = c.exec(&["echo", &text]);
        assert_eq!((code, out.trim()), (0, text.as_str()));
    }
    if let Some(fds) = fds {
        wait_for("descriptors are closed", Duration::from_secs(10), || {
            leaks::descriptors(daemon_pid()) <= fds + 8
        });
    }
}

#[test]
fn an_exec_whose_child_stays_does_not_hang() {
    let pod = Pod::run(pod_config("detached"));
    let c = pod.start(&["sleep", "1000"]);
    let (code, out, _) = c.exec(&["sh", "-c", "sleep 500 >/dev/null 2>&1 & echo started"]);
    assert_eq!((code, out.trim()), (0, "started"));
}

/// Straight to the task socket: containerd would read.
#[test]
fn a_pipe_that_nobody_ever_reads_holds_up_no_exit() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    {
        let pod = wire::Direct::run("unread");
        let bundle = wire::Bundle::new(&["sh", "-c", "cat /bin/busybox; exit 3"]);
        let fifo = bundle.dir.join("stdout");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let mut q = bundle.request("noisy");
        q.stdout = fifo.to_string_lossy().into_owned();
        kuasar_tests::task!(&pod.socket, create, q).unwrap();
        let q = tasks::StartRequest { id: "noisy".into(), ..Default::default() };
        kuasar_tests::task!(&pod.socket, start, q).unwrap();
        // Others come and go, while it waits for a reader.
        let other = wire::Bundle::new(&["true"]);
        assert_eq!(pod.run_to_end(&other).unwrap(), 0);
        let q = tasks::KillRequest { id: "noisy".into(), signal: 9, ..Default::default() };
        kuasar_tests::task!(&pod.socket, kill, q).unwrap();
        let q = tasks::WaitRequest { id: "noisy".into(), ..Default::default() };
        assert_eq!(kuasar_tests::task!(&pod.socket, wait, q).unwrap().exit_status, 137);
    }
    leaks::assert_none(&before);
}

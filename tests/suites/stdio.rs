//! Standard streams, byte for byte.

use kuasar_tests::cri::*;
use kuasar_tests::{handler, inside, skip, wait_for};
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
    for i in 0..n {
        let text = i.to_string();
        let (code, out, _) = c.exec(&["echo", &text]);
        assert_eq!((code, out.trim()), (0, text.as_str()));
    }
}

#[test]
fn an_exec_whose_child_stays_does_not_hang() {
    let pod = Pod::run(pod_config("detached"));
    let c = pod.start(&["sleep", "1000"]);
    let (code, out, _) = c.exec(&["sh", "-c", "sleep 500 >/dev/null 2>&1 & echo started"]);
    assert_eq!((code, out.trim()), (0, "started"));
}

#[test]
fn a_terminal_is_one_and_has_a_size() {
    let pod = Pod::run(pod_config("tty"));
    let c = pod.start(&["sleep", "1000"]);
    let id = &c.id;
    let crictl = kuasar_tests::bed().join("bin/crictl");
    // `script` gives crictl a terminal to pass on.
    let line = format!("stty rows 33 cols 99; {} exec -it {id} sh -c 'sleep 0.5; tty; stty size'", crictl.display());
    let out = inside(&["script", "-qec", &line, "/dev/null"]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(text.contains("/dev/pts/"), "{text}");
    assert!(text.contains("33 99"), "{text}");
}

#[test]
fn a_terminal_container_writes_through_its_terminal() {
    let pod = Pod::run(pod_config("ttyc"));
    let c = pod.start_with(&["sh", "-c", "tty; seq 1 20000; exit 4"], |c| c.tty = true);
    assert_eq!(c.wait(), 4);
    let text = String::from_utf8_lossy(&c.logged("stdout")).replace('\r', "");
    assert!(text.starts_with("/dev/pts/") || text.starts_with("/dev/console"), "{text:.40}");
    assert!(text.ends_with("20000\n"), "{}", text.len());
}

//! Terminals, attach, and execs that nobody waits for.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::wire::{self, Bundle, Direct};
use kuasar_tests::{bed, handler, inside, leaks, ours, skip, task, wait_for};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::json;

fn crictl(args: &[&str]) -> Command {
    let ns = std::fs::read_to_string(bed().join("run/ns.pid")).unwrap();
    let mut command = Command::new("nsenter");
    command.args(["-t", ns.trim(), "-n", "-m", "--"]).arg(bed().join("bin/crictl")).args(args);
    command.env("CRI_CONFIG_FILE", bed().join("etc/crictl.yaml"));
    command
}

#[test]
fn a_terminal_is_one_and_has_a_size() {
    let pod = Pod::run(pod_config("tty"));
    let c = pod.start(&["sleep", "1000"]);
    let id = &c.id;
    let crictl = bed().join("bin/crictl");
    // `script` gives crictl a terminal to pass on.
    let line = format!(
        "stty rows 33 cols 99; {} exec -it {id} sh -c 'sleep 0.5; tty; stty size'",
        crictl.display()
    );
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

#[test]
fn a_terminal_that_is_resized_tells_its_program() {
    if !ours() {
        return;
    }
    let pod = Pod::run(pod_config("resize"));
    let line = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let c = pod.start_with(&["sh", "-c", line], |c| c.tty = true);
    let logged = || String::from_utf8_lossy(&c.logged("stdout")).replace('\r', "");
    wait_for("it waits for the signal", Duration::from_secs(10), || logged().contains("ready"));
    let socket = wire::task_socket(&pod.id);
    for (width, height) in [(99, 33), (120, 40), (7, 3)] {
        let q = tasks::ResizePtyRequest { id: c.id.clone(), width, height, ..Default::default() };
        task!(&socket, resize_pty, q).unwrap();
        let want = format!("{height} {width}\n");
        wait_for(&want, Duration::from_secs(10), || logged().contains(&want));
    }
    // Sizes that no terminal has harm nobody.
    for (width, height) in [(0, 0), (u32::MAX, u32::MAX)] {
        let q = tasks::ResizePtyRequest { id: c.id.clone(), width, height, ..Default::default() };
        task!(&socket, resize_pty, q).unwrap();
    }
    assert!(c.is_running());
}

#[test]
fn a_size_that_comes_before_an_exec_starts_is_its_size() {
    if !ours() {
        return;
    }
    let pod = Direct::run("early");
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    bundle.spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/dev/pts", "type": "devpts", "source": "devpts",
        "options": ["newinstance", "ptmxmode=0666", "mode=0620"],
    }));
    let start = |exec: &str| {
        let q = tasks::StartRequest { id: "c".into(), exec_id: exec.into(), ..Default::default() };
        task!(&pod.socket, start, q).unwrap()
    };
    task!(&pod.socket, create, bundle.request("c")).unwrap();
    start("");
    exec(&pod, "e", true, &["sh", "-c", "stty size > /out"]);
    let q = tasks::ResizePtyRequest {
        id: "c".into(),
        exec_id: "e".into(),
        width: 99,
        height: 33,
        ..Default::default()
    };
    task!(&pod.socket, resize_pty, q).unwrap();
    start("e");
    assert_eq!(wait(&pod, "e"), 0);
    assert_eq!(bundle.out(), "33 99");
}

/// Adds an exec to the container `c` that has no streams.
fn exec(pod: &Direct, id: &str, terminal: bool, args: &[&str]) {
    let spec = json!({ "args": args, "cwd": "/", "env": ["PATH=/bin"], "terminal": terminal,
                       "user": { "uid": 0, "gid": 0 } });
    let spec = Any {
        type_url: wire::PROCESS.into(),
        value: spec.to_string().into_bytes(),
        ..Any::default()
    };
    let q = tasks::ExecProcessRequest {
        id: "c".into(),
        exec_id: id.into(),
        terminal,
        spec: MessageField::some(spec),
        ..Default::default()
    };
    task!(&pod.socket, exec, q).unwrap();
}

fn wait(pod: &Direct, exec: &str) -> u32 {
    let q = tasks::WaitRequest { id: "c".into(), exec_id: exec.into(), ..Default::default() };
    task!(&pod.socket, wait, q).unwrap().exit_status
}

#[test]
fn a_detached_exec_runs_without_streams_and_its_end_is_kept() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    for engine in crate::engines::available() {
        let pod = Direct::run_on("detached", engine);
        let bundle = Bundle::new(&["sleep", "1000"]);
        task!(&pod.socket, create, bundle.request("c")).unwrap();
        let q = tasks::StartRequest { id: "c".into(), ..Default::default() };
        task!(&pod.socket, start, q).unwrap();
        exec(
            &pod,
            "e",
            false,
            &["sh", "-c", "cat; echo to nobody; ls -l /proc/self/fd > /out; exit 6"],
        );
        let q = tasks::StartRequest { id: "c".into(), exec_id: "e".into(), ..Default::default() };
        assert!(task!(&pod.socket, start, q).unwrap().pid > 0);
        assert_eq!(wait(&pod, "e"), 6, "{engine}");
        assert!(bundle.out().contains("/dev/null"), "{engine}: {}", bundle.out());
        // It is told again until it is deleted, also by another daemon.
        assert_eq!(wait(&pod, "e"), 6, "{engine}");
        let q = tasks::DeleteRequest { id: "c".into(), exec_id: "e".into(), ..Default::default() };
        assert_eq!(task!(&pod.socket, delete, q.clone()).unwrap().exit_status, 6, "{engine}");
        assert_eq!(task!(&pod.socket, delete, q).unwrap_err().code(), tonic::Code::NotFound);
    }
    leaks::assert_none(&before);
}

pub(crate) fn attach(handler: &str) {
    let line = "while read l; do echo got $l; done; echo end; sleep 1000";
    attach_to(handler, &["sh", "-c", line], |_| {}, "got ");
}

/// A client writes lines to a container that writes each again with this before it, leaves, and another
/// one goes on.
pub(crate) fn attach_to(
    handler: &str,
    command: &[&str],
    edit: impl FnOnce(&mut ContainerConfig),
    before: &str,
) {
    let pod = Pod::try_run(pod_config("attach"), handler).unwrap();
    let c = pod.start_with(command, |c| {
        c.stdin = true;
        edit(c);
    });
    let mut child = crictl(&["attach", "-i", &c.id])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut input = child.stdin.take().unwrap();
    for word in ["one", "two", "three"] {
        writeln!(input, "{word}").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), format!("{before}{word}"));
    }
    // Without stdin_once the container's input stays open when a client leaves.
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(c.is_running());
    assert!(String::from_utf8(c.logged("stdout")).unwrap().contains(&format!("{before}three\n")));
    let mut child = crictl(&["attach", "-i", &c.id])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // containerd takes the end of a client's input for its detaching: it stays open.
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "again").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), format!("{before}again"));
    let _ = child.kill();
    child.wait().unwrap();
}

#[test]
fn a_client_attaches_leaves_and_another_attaches() {
    attach(&handler());
}

#[test]
fn a_client_attaches_leaves_and_another_attaches_over_a_stream() {
    if handler() != "kuasar-runc" {
        return skip("streaming has a handler of its own");
    }
    attach("kuasar-runc-streaming");
}

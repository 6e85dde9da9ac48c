//! Pods whose agents are reached by a serial port or a console in place of vsock.
//!
//! One pod for each: whatever its containers do at the same time goes over the one port.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::{bed, inside, leaks, switch, task, wait_for, wire};

use crate::vmm::{HANDLER, Settings, kill, machine, machine_dirs, status, vmm_pid};
use crate::vmm_debug;
use crate::vmm_q35::netns;

const SOON: Duration = Duration::from_secs(60);

/// `crictl exec`, with streams that we hold.
struct Exec(Child);

impl Exec {
    fn new(c: &Container, line: &str) -> Self {
        let ns = std::fs::read_to_string(bed().join("run/ns.pid")).unwrap();
        let mut command = Command::new("nsenter");
        command.args(["-t", ns.trim(), "-n", "-m", "--"]).arg(bed().join("bin/crictl"));
        command.args(["exec", "-i", &c.id, "sh", "-c", line]);
        command.env("CRI_CONFIG_FILE", bed().join("etc/crictl.yaml"));
        Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn numbers(last: usize) -> Vec<u8> {
    (1..=last).flat_map(|i| format!("{i}\n").into_bytes()).collect()
}

/// What a container has written, once there is so much of it.
fn all(c: &Container, length: usize) -> Vec<u8> {
    wait_for("everything is logged", SOON, || {
        std::fs::metadata(&c.log).is_ok_and(|meta| meta.len() as usize > length)
            && c.logged("stdout").len() >= length
    });
    c.logged("stdout")
}

/// One writes what nobody reads, one is sent what it does not read: for as long as both are held.
fn stalled(c: &Container) -> (Exec, Exec) {
    let unread =
        Exec::new(c, "touch /unread; while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done");
    let mut deaf = Exec::new(c, "touch /deaf; sleep 1000");
    let mut stdin = deaf.0.stdin.take().unwrap();
    std::thread::spawn(move || while stdin.write_all(&[b'x'; 65_536]).is_ok() {});
    c.sh("until [ -e /unread ] && [ -e /deaf ]; do sleep 0.1; done");
    (unread, deaf)
}

fn input_and_terminal(pod: &Pod, c: &Container) {
    let mut echo = Exec::new(c, "cat; echo end");
    let sent = numbers(50_000);
    let (copy, mut stdin) = (sent.clone(), echo.0.stdin.take().unwrap());
    let writer = std::thread::spawn(move || stdin.write_all(&copy).unwrap());
    let mut got = Vec::new();
    std::io::Read::read_to_end(&mut echo.0.stdout.take().unwrap(), &mut got).unwrap();
    writer.join().unwrap();
    assert!(echo.0.wait().unwrap().success());
    assert!(got.strip_suffix(b"end\n") == Some(&sent[..]), "{} of {}", got.len(), sent.len());

    let line = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let tty = pod.start_with(&["sh", "-c", line], |c| c.tty = true);
    let logged = || String::from_utf8_lossy(&tty.logged("stdout")).replace('\r', "");
    wait_for("it waits for the signal", SOON, || logged().contains("ready"));
    let q =
        tasks::ResizePtyRequest { id: tty.id.clone(), width: 99, height: 33, ..Default::default() };
    let socket = wire::task_socket(&pod.id);
    task!(&socket, resize_pty, q).unwrap();
    wait_for("the new size", SOON, || logged().contains("33 99\n"));
    tty.stop(0).unwrap();
}

/// The daemon is killed while a container writes faster than anybody reads.
fn killed_in_the_middle(pod: &Pod) {
    let last = 300_000;
    let c = pod.start(&["sh", "-c", &format!("seq 1 {last}; exit 3")]);
    wait_for("it writes", SOON, || c.logged("stdout").len() > 20_000);
    switch(&["daemon", "kill"], &[("KIND", "vmm")]);
    switch(&["daemon", "start"], &[("KIND", "vmm")]);
    assert_eq!(c.wait(), 3);
    let wanted = numbers(last);
    assert!(all(&c, wanted.len()) == wanted, "bytes differ");
}

fn forwards_a_port(pod: &Pod) {
    let line = "while :; do echo served | nc -l -p 8080; done";
    let _c = pod.start(&["sh", "-c", line]);
    let at = format!("--net={}", netns(pod));
    let script = "import socket; s = socket.create_connection(('localhost', 8080), 5); \
                  s.settimeout(5); print(s.recv(99).decode().strip())";
    wait_for("it answers through the pod's localhost", SOON, || {
        inside(&["nsenter", &at, "python3", "-c", script]).stdout == b"served\n"
    });
}

/// Pid of the relay: jailed, as the pod's own user, without rights.
fn relay(pod: &Pod) -> u32 {
    let all = machine(pod);
    let (pid, _) = all.iter().find(|(_, name)| name.starts_with("vmm-sandboxer")).unwrap();
    for (key, wanted) in [("NoNewPrivs", "1"), ("Seccomp", "2"), ("CapEff", "0000000000000000")] {
        assert_eq!(status(*pid, key), wanted, "{key}");
    }
    assert_eq!(status(*pid, "Uid"), status(vmm_pid(pod), "Uid"));
    println!("figure: resident memory of the relay {}", status(*pid, "VmRSS"));
    *pid
}

/// A pod over this channel; `end` is how it ends.
fn works(channel: &str, device: &str, end: impl FnOnce(&Pod)) {
    let with = |text: &str| {
        let text = text.replace("[qemu]", &format!("[qemu]\nchannel = \"{channel}\""));
        format!("{text}\n[guest]\n{}", vmm_debug::console_on())
    };
    let Some(_settings) = Settings::with(with) else { return };
    // The first namespace of a bed makes the place of them all, which stays.
    assert!(inside(&["sh", "-c", "ip netns add first && ip netns del first"]).status.success());
    let before = leaks::snapshot();
    {
        let pod = Pod::try_run(pod_config(channel), HANDLER).unwrap();
        let line = std::fs::read(format!("/proc/{}/cmdline", vmm_pid(&pod))).unwrap();
        let line = String::from_utf8_lossy(&line).into_owned();
        assert!(line.contains(device) && !line.contains("vsock"), "{line}");
        relay(&pod);

        let c = pod.start(&["sleep", "1000"]);
        let beside = pod.start(&["sleep", "1000"]);
        let held = stalled(&beside);
        let said = c.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
        assert_eq!(said, (3, "out\n".into(), "err\n".into()));
        let writes = pod.start(&["sh", "-c", "seq 1 160000; exit 4"]);
        assert_eq!(writes.wait(), 4);
        let wanted = numbers(160_000);
        assert!(all(&writes, wanted.len()) == wanted, "bytes differ");
        input_and_terminal(&pod, &c);
        vmm_debug::works(&pod);
        drop(held);
        killed_in_the_middle(&pod);
        // Old streams and new ones.
        assert_eq!(c.sh("hostname"), pod.config.hostname);
        forwards_a_port(&pod);
        end(&pod);
        pod.remove().unwrap();
        assert_eq!(machine(&pod), []);
    }
    assert!(machine_dirs().is_empty());
    leaks::assert_none(&before);
}

#[test]
fn a_pod_lives_on_a_serial_port_over_kill_9_of_the_daemon() {
    works("serial", "virtserialport", |pod| {
        let c = pod.start(&["sleep", "1000"]);
        c.stop(0).unwrap();
        assert_eq!(c.wait(), 137);
        pod.stop();
        assert_eq!(machine(pod), []);
    });
}

#[test]
fn a_pod_lives_on_a_console_and_ends_with_its_relay() {
    works("console", "virtconsole", |pod| {
        let c = pod.start(&["sleep", "1000"]);
        kill(relay(pod));
        wait_for("the pod is not ready", Duration::from_secs(10), || {
            pod.state() == PodSandboxState::SandboxNotready as i32
        });
        assert_eq!(c.wait(), 137);
    });
}

#[test]
fn a_channel_that_this_host_lacks_is_refused_with_the_remedy_and_leaves_nothing() {
    if std::path::Path::new("/dev/vhost-vsock").exists() {
        return kuasar_tests::skip("this host has the kernel's vsock");
    }
    let with = |text: &str| text.replace("[qemu]", "[qemu]\nchannel = \"vsock\"");
    let Some(_settings) = Settings::with(with) else { return };
    let Err(error) = Pod::try_run(pod_config("no-vhost"), HANDLER) else {
        panic!("a pod without its channel")
    };
    let said = error.message();
    assert!(said.contains("load the module vhost_vsock, or set another channel"), "{said}");
    assert!(machine_dirs().is_empty());
}

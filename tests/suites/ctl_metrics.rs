//! `kuasar-ctl metrics --listen`: one endpoint for the daemons of a node.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kuasar_tests::cri::*;
use kuasar_tests::{bed, inside, ours, skip, switch, wait_for};

use crate::ctl::{arguments, code, ctl_on, err, signal, spawn};

/// An exporter, which is ended with the test.
struct Exporter(Child);

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The answer to a request, whole.
fn asked(mut socket: impl Read + Write) -> String {
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n").unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    body.to_owned()
}

/// Prometheus refuses a text with two samples of one name and labels, or with a metric in two places.
fn assert_well_formed(text: &str) {
    let (mut series, mut families) = (BTreeSet::new(), BTreeSet::new());
    let mut current = "";
    for line in text.lines() {
        if let Some(of) = line.strip_prefix("# TYPE ") {
            current = of.split(' ').next().unwrap();
            assert!(families.insert(current), "{current} comes twice");
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap();
            assert!(name.starts_with(current), "{line} below {current}");
            assert!(name.contains("sandboxer=\""), "whose is {line}?");
            assert!(series.insert(name), "{name} comes twice");
        }
    }
    assert!(families.len() > 5, "{text}");
}

#[test]
fn ctl_serves_the_metrics_of_all_daemons_at_one_address() {
    if !ours() {
        return;
    }
    let pod = Pod::run(pod_config("ctl-metrics"));
    let other = bed().join("run/kuasar-wasm.sock").exists();
    if !other {
        skip(
            "no wasm-sandboxer in the test bed: the second daemon of the endpoint is one that is away",
        );
    }
    let path = bed().join("run/logs/node-metrics.sock");
    // containerd gives up a connection that is not answered for three seconds, and fails what comes next.
    let patience = ["--daemon-timeout", "1"];
    let listen = ["metrics", "--listen", path.to_str().unwrap(), "--listen", "127.0.0.1:9755"];
    let listen = [&listen[..], &patience].concat();
    let mut exporter = Exporter(spawn(&["runc", "wasm"], &listen));
    let scrape = || asked(UnixStream::connect(&path).unwrap());
    wait_for("it listens", Duration::from_secs(10), || UnixStream::connect(&path).is_ok());
    let text = scrape();
    assert_well_formed(&text);
    assert!(text.contains("kuasar_daemon_up{sandboxer=\"runc\"} 1\n"), "{text}");
    assert!(
        text.contains(&format!("kuasar_daemon_up{{sandboxer=\"wasm\"}} {}\n", u8::from(other)))
    );
    let pods = text.lines().find_map(|l| l.strip_prefix("kuasar_sandboxes{sandboxer=\"runc\"} "));
    assert!(pods.unwrap().parse::<u32>().unwrap() >= 1, "{text}");

    let busybox = bed().join("src/busybox");
    let get = [busybox.to_str().unwrap(), "wget", "-qO-", "http://127.0.0.1:9755/metrics"];
    let over_tcp = String::from_utf8(inside(&get).stdout).unwrap();
    assert_well_formed(&over_tcp);

    // A daemon that is away takes nobody's metrics with it, and is seen again when it is back.
    switch(&["daemon", "kill"], &[]);
    let text = scrape();
    assert_well_formed(&text);
    assert!(text.contains("kuasar_daemon_up{sandboxer=\"runc\"} 0\n"), "{text}");
    assert_eq!(text.contains("kuasar_sandboxes{sandboxer=\"wasm\"}"), other, "{text}");
    switch(&["daemon", "start"], &[]);
    assert!(scrape().contains("kuasar_daemon_up{sandboxer=\"runc\"} 1\n"));
    wait_for("containerd has its daemon again", Duration::from_secs(10), || pod.remove().is_ok());

    signal(&exporter.0, libc::SIGTERM);
    assert!(exporter.0.wait().unwrap().success());
    assert!(!path.exists(), "the socket is left");
}

#[test]
fn ctl_serves_metrics_at_a_socket_of_systemd() {
    if !ours() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    // As a service manager hands sockets over: from descriptor 3, and the variables say so.
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\" 3<&0 </dev/null";
    let mut started = Command::new("sh");
    started.args(["-c", script, "sh"]).args(arguments(&["runc"]));
    started.args(["metrics", "--listen", "fd://"]);
    started.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener))).stderr(Stdio::null());
    let _exporter = Exporter(started.spawn().unwrap());
    // The first request waits for it in the socket's queue.
    let text = asked(std::net::TcpStream::connect(to).unwrap());
    assert_well_formed(&text);
    assert!(text.contains("kuasar_daemon_up{sandboxer=\"runc\"} 1\n"), "{text}");

    let o = ctl_on(&["runc"], &["metrics", "--listen", "fd://"]);
    assert_eq!(code(&o), 2);
    assert!(err(&o).contains("kuasar-metrics.socket"), "{}", err(&o));
    let o = ctl_on(&["runc"], &["metrics", "--listen", "9755"]);
    assert_eq!(code(&o), 1);
    assert!(err(&o).contains("127.0.0.1:port"), "{}", err(&o));
}

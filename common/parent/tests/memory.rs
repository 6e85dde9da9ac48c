//! The promise: 100 pods cost this process at most 100 kB of private memory.
//!
//! Measured is `Anonymous` of `/proc/<pid>/smaps_rollup`: pages that exist for this process and
//! not as a part of its file, stack and copied data of the program included. Pages of the file
//! itself are the page cache's, shared with every other sandbox-parent (`Private_Dirty` counts
//! them, too, while the disk has not caught up with a program that has just been linked). The
//! number means something for the static release build only, so `SANDBOX_PARENT_BIN` has to name
//! it.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use support::{Home, dial, frame, until};

const PODS: usize = 100;
const LIMIT_KB: u64 = 100;

/// A field of `smaps_rollup` in kB.
fn memory(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn private(pid: u32) -> u64 {
    memory(pid, "Anonymous:")
}

/// A Wait as containerd sends it.
fn wait(id: &str) -> Vec<u8> {
    let mut body = Vec::new();
    let mut field = |key: u8, bytes: &[u8]| {
        body.extend_from_slice(&[key, bytes.len() as u8]);
        body.extend_from_slice(bytes);
    };
    field(0x0a, b"containerd.task.v3.Task");
    field(0x12, b"Wait");
    let mut payload = vec![0x0a, id.len() as u8];
    payload.extend_from_slice(id.as_bytes());
    field(0x1a, &payload);
    field(0x2a, b"\x0a\x1acontainerd-namespace-ttrpc\x12\x06k8s.io");
    frame(1, 1, 1, &body)
}

#[test]
fn a_hundred_pods_cost_less_than_a_hundred_kilobytes() {
    if std::env::var_os("SANDBOX_PARENT_BIN").is_none() {
        eprintln!("skipped: SANDBOX_PARENT_BIN does not name the static release build");
        return;
    }
    let home = Home::new();
    let mut daemon = home.daemon();
    let pid = daemon.parent.pid();
    eprintln!("idle: {} kB", private(pid));
    let ids: Vec<String> = (0..PODS).map(|i| format!("{i:064x}")).collect();
    let ns = ["ipc", "uts", "net"].map(|n| (n, File::open(format!("/proc/self/ns/{n}")).unwrap()));
    daemon.run(async {
        for id in &ids {
            for (name, file) in &ns {
                daemon.parent.keep(&format!("{id}/ns/{name}"), file.as_fd()).await.unwrap();
            }
            let listener = UnixListener::bind(home.socket(&id[56..])).unwrap();
            daemon.parent.listen(id, listener.as_fd()).await.unwrap();
        }
        daemon.parent.ready().await.unwrap();
    });
    let mut clients: Vec<_> = ids.iter().map(|id| dial(&home, &id[56..])).collect();
    let mut ends: Vec<_> = ids.iter().map(|_| support::blocking(daemon.connection())).collect();
    for (client, id) in clients.iter_mut().zip(&ids) {
        client.write_all(&wait(id)).unwrap();
    }
    for end in &mut ends {
        assert_eq!(support::read_frame(end).0, 1);
    }
    eprintln!("{PODS} pods: {} kB", private(pid));
    drop(ends);
    daemon.kill();
    until("it is idle again", || private(pid) <= LIMIT_KB);
    eprintln!("{PODS} pods, parked: {} kB", private(pid));

    // What large messages have needed is given back, too.
    let mut daemon = home.daemon();
    daemon.run(daemon.parent.ready()).unwrap();
    let mut ends: Vec<_> = ids.iter().map(|_| support::blocking(daemon.connection())).collect();
    for end in &mut ends {
        assert_eq!(support::read_frame(end).0, 1);
        end.write_all(&frame(9, 2, 0, &vec![0; 60_000])).unwrap();
    }
    for client in &mut clients {
        assert_eq!(support::read_frame(client).3.len(), 60_000);
    }
    until("it is idle again", || private(pid) <= LIMIT_KB);
    eprintln!("{PODS} pods, after large answers: {} kB", private(pid));
    let counts = daemon.run(daemon.parent.status()).unwrap();
    assert_eq!((counts.kept, counts.pods, counts.connections), (300, 100, 100));

    // And a pod's init: what it has for itself.
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } == 0 {
        let q = sandbox_parent::client::PodNamespaces { id: "p", pid: true, ..Default::default() };
        let made = daemon.run(daemon.parent.pod_namespaces(&q)).unwrap();
        let (init, _pidfd) = made.init.unwrap();
        until("the init has settled", || {
            std::fs::read_dir(format!("/proc/{init}/fd")).is_ok_and(|d| d.count() == 0)
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(private(init) <= LIMIT_KB);
        eprintln!("init of a PID namespace: {} kB", private(init));
        // SAFETY: a process of this test.
        unsafe { libc::kill(init as i32, libc::SIGTERM) };
    }
}

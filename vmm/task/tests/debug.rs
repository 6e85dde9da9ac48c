//! Debug sessions on real processes. One test in a process of its own: it reaps every child there is.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of the test, outside of test functions

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vmm_common::guest::{DebugRequest, Size, SteerDebugRequest, steer_debug_request::What};
use vmm_task::debug::Debugs;
use vmm_task::limits;
use vmm_task::reaper::Reaper;

const SOON: Duration = Duration::from_secs(30);

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, work).await.unwrap()
}

/// A session, and the host's end of its stream.
async fn open(debugs: &Arc<Debugs>, id: &str, argv: &[&str], terminal: bool) -> UnixStream {
    let argv = argv.iter().map(|word| (*word).to_owned()).collect();
    let question =
        DebugRequest { id: id.into(), argv, terminal, width: 80, height: 24, ..Default::default() };
    debugs.expect(question).unwrap();
    let session = debugs.start(id).await.unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(session.join(ours));
    theirs
}

/// Reads until these words have come.
async fn until(stream: &mut UnixStream, words: &str) -> String {
    let mut said = String::new();
    let mut buffer = [0; 4096];
    while !said.contains(words) {
        let n = soon(stream.read(&mut buffer)).await.unwrap();
        assert!(n > 0, "it has ended without {words:?}: {said:?}");
        said.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    said
}

/// The rest, up to the end.
async fn rest(stream: &mut UnixStream) -> String {
    let mut said = Vec::new();
    soon(stream.read_to_end(&mut said)).await.unwrap();
    String::from_utf8(said).unwrap()
}

fn steer(debugs: &Debugs, id: &str, what: What) {
    let question =
        SteerDebugRequest { id: id.into(), what: Some(what), ..SteerDebugRequest::default() };
    debugs.steer(&question).unwrap();
}

/// No process of any session is there.
async fn none_is_left() {
    let deadline = Instant::now() + SOON;
    let children = || kuasar_host::process::children(std::process::id()).unwrap();
    while !children().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", children());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn sessions_have_what_they_need_and_end_and_leave_nothing() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let reaper = Reaper::default();
    reaper.run().unwrap();
    let exe = env!("CARGO_BIN_EXE_vmm-task").to_owned();
    let debugs = Debugs::new(true, reaper, Arc::default(), exe);

    // A terminal of its own, which it controls, of the size that it is told.
    let mut stream = open(&debugs, "tty", &["/bin/sh"], true).await;
    stream.write_all(b"stty size; test -t 2 && echo ou''t >/dev/tty\n").await.unwrap();
    let said = until(&mut stream, "out\r\n").await;
    assert!(said.contains("24 80\r\n"), "{said}");
    let size = Size { width: 99, height: 33, ..Size::default() };
    steer(&debugs, "tty", What::Size(size));
    stream.write_all(b"stty size\n").await.unwrap();
    until(&mut stream, "33 99\r\n").await;
    // It ends with its program, and what that has left behind ends, too.
    stream.write_all(b"sleep 1000 & exit\n").await.unwrap();
    rest(&mut stream).await;
    none_is_left().await;

    // Pipes: nothing is added to its output, which comes whole, and the end of its input is told.
    let script = "echo err >&2; seq 1 30000; cat; echo end; sleep 1000 &";
    let mut stream = open(&debugs, "pipes", &["/bin/sh", "-c", script], false).await;
    // Before all of it has come, as it may be.
    steer(&debugs, "pipes", What::InputBytes(5));
    stream.write_all(b"more\n").await.unwrap();
    let numbers: String = (1..=30_000).map(|n| format!("{n}\n")).collect();
    let said = rest(&mut stream).await;
    assert!(said == format!("err\n{numbers}more\nend\n"), "{} bytes", said.len());
    none_is_left().await;

    // With its stream, even one that does not want to.
    for (id, terminal) in [("deaf-tty", true), ("deaf-pipes", false)] {
        let script = "trap '' HUP TERM; echo ready; while :; do sleep 1000; done";
        // Not the same id: a session's name is free a little after its processes have gone.
        let mut stream = open(&debugs, id, &["/bin/sh", "-c", script], terminal).await;
        until(&mut stream, "ready").await;
        drop(stream);
        none_is_left().await;
    }

    // When it is told to, even while it takes no input.
    let script = "echo ready; exec sleep 1000";
    let mut stream = open(&debugs, "full", &["/bin/sh", "-c", script], false).await;
    until(&mut stream, "ready").await;
    let full = async { while stream.write_all(&[b'x'; 4096]).await.is_ok() {} };
    assert!(tokio::time::timeout(Duration::from_millis(200), full).await.is_err());
    debugs.end("full").await.unwrap();
    none_is_left().await;

    // Out of its session and its process group, it is in its cgroup still.
    if nix::unistd::geteuid().is_root() {
        let script = "setsid sleep 1000 & echo ready; read nothing";
        let mut stream = open(&debugs, "left", &["/bin/sh", "-c", script], false).await;
        until(&mut stream, "ready").await;
        drop(stream);
        none_is_left().await;
        let group = kuasar_host::cgroup::Cgroup::open("/debug-left").unwrap();
        // Removed after the last process has gone.
        let deadline = Instant::now() + SOON;
        while group.exists() {
            assert!(Instant::now() < deadline, "its cgroup stays");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    } else {
        println!("skipped: cgroups are made by root");
    }

    // What cannot be run says so where the operator sees it.
    let mut stream = open(&debugs, "none", &["/no/such/program"], false).await;
    let said = rest(&mut stream).await;
    assert!(said.starts_with("debug: /no/such/program: "), "{said}");
    none_is_left().await;

    // All places are free again.
    for n in 0..limits::DEBUGS {
        let argv = vec!["/bin/sh".to_owned()];
        let question = DebugRequest { id: format!("s{n}"), argv, ..Default::default() };
        let deadline = Instant::now() + SOON;
        while let Err(error) = debugs.expect(question.clone()) {
            assert!(Instant::now() < deadline, "{error}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

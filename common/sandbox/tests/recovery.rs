//! What a daemon finds when it starts again.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::*;

fn edit(dir: &Path, id: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join("sandboxes").join(id).join("sandbox.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut record["data"]);
    std::fs::write(&path, record.to_string()).unwrap();
}

fn phase(dir: &Path, id: &str, phase: &str) {
    edit(dir, id, |r| r["phase"] = phase.into());
}

#[tokio::test]
async fn a_running_pod_is_taken_up_and_its_connections_wait_meanwhile() {
    let bed = bed().await;
    let address = bed.grpc().await.up("pod").await.address;
    let mut early = None;
    let dialled = address.clone();
    let bed = bed
        .restart(|_, _| {
            early = Some(tokio::spawn(async move { straw_task::connect(&dialled, "c").await }));
        })
        .await;
    let c = bed.grpc().await;
    let status = c.status("pod", false).await.unwrap();
    assert_eq!((&*status.state, status.pid), ("SANDBOX_READY", 43));
    assert_eq!(status.address, address);
    assert_eq!(early.unwrap().await.unwrap().unwrap().task_pid, 7);
    assert_eq!(bed.sandboxer.known.lock().unwrap().clone().unwrap(), ["pod"]);
    let state = bed.sandboxer.seen.lock().unwrap().clone().unwrap().1;
    assert_eq!(state, serde_json::json!({ "made": true }));
    c.stop("pod", 0).await.unwrap();
    c.shutdown("pod").await.unwrap();
    assert!(bed.sockets.pods().is_empty());
}

#[tokio::test]
async fn sockets_are_made_again_when_sandbox_parent_is_gone_too() {
    let bed = bed().await;
    let address = bed.grpc().await.up("pod").await.address;
    let sockets = bed.sockets.clone();
    let bed = bed.restart(|_, _| sockets.lose_all()).await;
    assert_eq!(straw_task::connect(&address, "c").await.unwrap().task_pid, 7);
    assert_eq!(bed.sockets.pods(), ["pod"]);
}

#[tokio::test]
async fn half_done_operations_are_finished_or_rolled_back() {
    let bed = bed().await;
    let c = bed.grpc().await;
    for id in ["creating", "starting", "stopping", "stopped", "removing", "created"] {
        c.create(id).await.unwrap();
    }
    for id in ["stopping", "stopped", "removing"] {
        c.start(id).await.unwrap();
    }
    c.stop("stopped", 0).await.unwrap();
    let stopped = c.wait("stopped").await.unwrap();
    let bed = bed
        .restart(|dir, _| {
            for id in ["creating", "starting", "stopping", "removing"] {
                phase(dir, id, id);
            }
        })
        .await;
    let c = bed.grpc().await;
    for id in ["creating", "starting", "removing"] {
        assert_eq!(c.state(id).await, "NotFound", "{id}");
        assert!(!bed.sandbox_dir(id).exists());
    }
    assert_eq!(bed.sandboxer.count("remove"), 3);
    assert_eq!(bed.sandboxer.count("stop"), 1);
    assert_eq!(c.wait("stopping").await.unwrap().exit_status, 0);
    assert_eq!(c.wait("stopped").await.unwrap(), stopped);
    assert_eq!(c.start("created").await.unwrap().pid, 42);
    let mut known = bed.sandboxer.known.lock().unwrap().clone().unwrap();
    known.sort();
    assert_eq!(known, ["created", "stopped", "stopping"]);
}

#[tokio::test]
async fn a_removal_that_fails_is_tried_again() {
    let bed = bed_with(|o| o.open_timeout = Duration::from_millis(20)).await;
    bed.grpc().await.create("pod").await.unwrap();
    let bed = bed
        .restart(|dir, s| {
            phase(dir, "pod", "starting");
            s.failing.lock().unwrap().insert("remove");
        })
        .await;
    let c = bed.grpc().await;
    until("tried again", async || bed.sandboxer.count("remove") > 1).await;
    assert_eq!(c.state("pod").await, "SANDBOX_NOTREADY");
    bed.sandboxer.failing.lock().unwrap().clear();
    until("removed", async || c.state("pod").await == "NotFound").await;
    assert!(!bed.sandbox_dir("pod").exists());
}

#[tokio::test]
async fn a_pod_that_died_meanwhile_and_one_that_cannot_be_recovered_are_stopped() {
    let bed = bed().await;
    let c = bed.grpc().await;
    c.up("pod").await;
    let bed = bed.restart(|_, s| assert!(s.dead.lock().unwrap().insert("pod".into()))).await;
    let c = bed.grpc().await;
    assert_eq!(c.wait("pod").await.unwrap().exit_status, 137);
    c.up("broken").await;
    let bed = bed.restart(|_, s| assert!(s.panicking.lock().unwrap().insert("recover"))).await;
    let c = bed.grpc().await;
    assert_eq!(c.wait("broken").await.unwrap().exit_status, 255);
    assert_eq!(c.wait("pod").await.unwrap().exit_status, 137);
    // The engine can still clear and remove it.
    c.stop("broken", 0).await.unwrap();
    c.shutdown("broken").await.unwrap();
}

#[tokio::test]
async fn a_pod_that_hangs_does_not_keep_the_others_away() {
    let bed = bed_with(|o| o.recover_timeout = Duration::from_millis(50)).await;
    bed.grpc().await.up("pod").await;
    let bed = bed.restart(|_, s| drop(s.gate("recover"))).await;
    assert_eq!(bed.grpc().await.wait("pod").await.unwrap().exit_status, 255);
}

#[tokio::test]
async fn a_torn_or_foreign_record_is_set_aside_alone() {
    let bed = bed().await;
    let c = bed.grpc().await;
    for id in ["good", "torn", "foreign", "newer"] {
        c.up(id).await;
    }
    let bed = bed
        .restart(|dir, _| {
            let record = |id| dir.join("sandboxes").join(id).join("sandbox.json");
            let text = std::fs::read(record("torn")).unwrap();
            std::fs::write(record("torn"), &text[..text.len() / 2]).unwrap();
            edit(dir, "foreign", |r| r["id"] = "good".into());
            let newer = std::fs::read_to_string(record("newer")).unwrap();
            std::fs::write(record("newer"), newer.replace("\"version\":1", "\"version\":9"))
                .unwrap();
        })
        .await;
    let c = bed.grpc().await;
    assert_eq!(c.state("good").await, "SANDBOX_READY");
    for id in ["torn", "foreign"] {
        assert_eq!(c.state(id).await, "NotFound");
        assert!(bed.options.dir.join("quarantine").join(format!("{id}-0")).exists());
        c.shutdown(id).await.unwrap();
    }
    // That of a newer version is left to it, with its socket.
    assert_eq!(c.state("newer").await, "NotFound");
    c.shutdown("newer").await.unwrap();
    assert!(c.create("newer").await.is_err());
    assert!(bed.sandbox_dir("newer").join("sandbox.json").exists());
    let sorted = |mut list: Vec<String>| {
        list.sort();
        list
    };
    assert_eq!(sorted(bed.sockets.pods()), ["good", "newer"]);
    let known = bed.sandboxer.known.lock().unwrap().clone().unwrap();
    assert_eq!(sorted(known), ["good", "newer"]);
    c.up("torn").await;
}

#[tokio::test]
async fn what_a_newer_version_wrote_is_kept() {
    let bed = bed().await;
    bed.grpc().await.up("pod").await;
    let bed = bed.restart(|dir, _| edit(dir, "pod", |r| r["future"] = 7.into())).await;
    bed.grpc().await.stop("pod", 0).await.unwrap();
    let text = std::fs::read(bed.sandbox_dir("pod").join("sandbox.json")).unwrap();
    let record: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(record["data"]["future"], 7);
    assert_eq!(record["data"]["phase"], "stopped");
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(bed.sandbox_dir("pod")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_pods_are_recovered_in_less_than_300_ms() {
    let bed = bed().await;
    let c = bed.grpc().await;
    for n in 0..100 {
        c.up(&format!("pod-{n}")).await;
    }
    // The best of three: other work on this machine is not ours.
    let (mut bed, mut best) = (bed, Duration::MAX);
    for _ in 0..3 {
        let mut since = Instant::now();
        bed = bed.restart(|_, _| since = Instant::now()).await;
        best = best.min(since.elapsed());
        assert_eq!(bed.controller.sandboxes().len(), 100);
    }
    assert!(best < Duration::from_millis(300), "{best:?}");
}

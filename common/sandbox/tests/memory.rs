//! What 100 pods cost the daemon. Apart, because it measures this process.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests

mod support;

use support::*;

fn private_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let of = |key: &str| -> u64 {
        let line = text.lines().find(|l| l.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    of("Private_Dirty:")
}

/// Server and client are both in this process, so the bound is generous: 30 KiB per pod with its
/// open Wait on both sides, its endpoint and its task service.
#[tokio::test]
async fn a_hundred_pods_cost_less_than_3_mib() {
    let bed = bed().await;
    let c = bed.grpc().await;
    c.up("warm").await;
    let before = private_kib();
    for n in 0..100 {
        c.up(&format!("pod-{n}")).await;
        let c = c.clone();
        tokio::spawn(async move { c.wait(&format!("pod-{n}")).await });
    }
    assert_eq!(c.state("pod-99").await, "SANDBOX_READY");
    let cost = private_kib().saturating_sub(before);
    eprintln!("100 pods: {cost} KiB");
    assert!(cost < 3072, "{cost} KiB");
}

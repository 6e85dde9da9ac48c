//! What is looked at of machines while they run: their processes' rights, their guests' health and events.

use std::time::Duration;

use kuasar_tests::cri::*;
use kuasar_tests::wait_for;

use crate::vmm::{Settings, able, link, log, machine, pod, status, vmm_pid};

/// What virtiofsd has at most: it acts for every user of its guest (`jail::privileges`).
const FILE_SERVER: u64 = 0x8804_01db;

#[test]
fn every_process_of_a_machine_is_jailed_and_bounded() {
    if !able() {
        return;
    }
    let pod = pod("vm-jailed");
    let c = pod.start(&["sleep", "1000"]);
    let all = machine(&pod);
    // QEMU, the vsock helper, and virtiofsd for root file systems and for volumes, each with the process
    // that it serves from.
    assert!(all.len() >= 4, "{all:?}");
    let own = std::process::id();
    for (pid, name) in &all {
        let field = |key: &str| status(*pid, key);
        let serves_files = name == "virtiofsd";
        assert_eq!(field("NoNewPrivs:"), "1", "{name}");
        assert_eq!(field("Seccomp:"), "2", "{name}");
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            let has = u64::from_str_radix(&field(set), 16).unwrap();
            let most = if serves_files { FILE_SERVER } else { 0 };
            assert_eq!(has & !most, 0, "{name}: {set} {has:x}");
        }
        for set in ["CapInh:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{name}: {set}");
        }
        let root = field("Uid:").split_whitespace().any(|id| id == "0");
        assert_eq!(root, serves_files, "{name}");
        assert_eq!(field("Groups:"), "", "{name}");
        for namespace in ["mnt", "pid", "ipc", "uts", "net"] {
            assert_ne!(link(*pid, namespace), link(own, namespace), "{name}: {namespace}");
        }
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let limit = |what: &str| {
            let line = limits.lines().find_map(|line| line.strip_prefix(what)).unwrap();
            let both: Vec<&str> = line.split_whitespace().take(2).collect();
            (both[0].parse::<u64>().unwrap(), both[1].parse::<u64>().unwrap())
        };
        assert_eq!(limit("Max core file size"), (0, 0), "{name}");
        let (soft, hard) = limit("Max open files");
        assert!(soft <= hard && hard <= 65_536, "{name}: {soft} {hard}");
        // Of the host's files the root has what it takes, and nobody's home or configuration.
        for gone in ["etc/shadow", "root", "home", "var", "run/containerd"] {
            let path = format!("/proc/{pid}/root/{gone}");
            assert!(!std::path::Path::new(&path).exists(), "{name} sees {gone}");
        }
    }
    assert_eq!(c.sh("echo works"), "works");
    pod.remove().unwrap();
}

#[test]
fn a_guest_that_does_not_answer_its_health_probe_ends_with_its_machine_and_no_other() {
    let lines = "[guest_timeouts]\ncall = \"1s\"\nconnect = \"1s\"\nhealth = \"1s\"\nunwell = 2";
    let Some(_settings) = Settings::with(|text| format!("{text}\n{lines}\n")) else { return };
    let (frozen, other) = (pod("vm-frozen"), pod("vm-healthy"));
    let (c, beside) = (frozen.start(&["sleep", "1000"]), other.start(&["sleep", "1000"]));
    let from = log().len();
    // SAFETY: a pid that we have just found in the pod's own cgroup.
    unsafe { libc::kill(vmm_pid(&frozen) as i32, libc::SIGSTOP) };
    wait_for("its machine is killed", Duration::from_secs(60), || {
        frozen.state() == PodSandboxState::SandboxNotready as i32
    });
    assert_eq!(c.wait(), 137);
    let said = &log()[from..];
    assert!(
        said.contains("the guest is unwell") && said.contains("its machine is killed"),
        "{said}"
    );
    assert_eq!(other.state(), PodSandboxState::SandboxReady as i32);
    assert_eq!(beside.sh("echo on"), "on");
    frozen.remove().unwrap();
    other.remove().unwrap();
}

#[test]
fn a_container_that_runs_out_of_memory_is_killed_by_its_guest_and_the_engine_hears_why() {
    if !able() {
        return;
    }
    let pod = pod("vm-oom");
    let other = pod.start(&["sleep", "1000"]);
    let c = pod.start_with(&["tail", "/dev/zero"], |c| {
        let resources = c.linux.get_or_insert_default().resources.get_or_insert_default();
        resources.memory_limit_in_bytes = 24 << 20;
    });
    assert_eq!(c.wait(), 137);
    assert_eq!(c.status().reason, "OOMKilled");
    assert_eq!(other.sh("echo on"), "on");
    pod.remove().unwrap();
}

//! Bad input that comes through CRI gets the right answer, and everybody else goes on.

use std::path::PathBuf;
use std::time::Duration;

use kuasar_tests::cri::*;
use kuasar_tests::{bed, handler, inside, leaks, ours, switch, wait_for};

/// Directories of a process' cgroups below its pod's; none when it has ended.
fn cgroup_of(pid: u32) -> Vec<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let paths = text.lines().filter_map(|line| line.rsplit(':').next());
    let paths = paths.filter(|path| path.contains(&format!("{}/", cgroup_root())));
    let hierarchies = || std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten();
    let mut all: Vec<PathBuf> = paths
        .map(|path| path.trim_start_matches('/').to_owned())
        .flat_map(|path| {
            let v2 = PathBuf::from("/sys/fs/cgroup").join(&path);
            hierarchies().map(move |entry| entry.path().join(&path)).chain([v2])
        })
        .filter(|dir| dir.is_dir())
        .collect();
    all.sort();
    all.dedup();
    all
}

fn still_works() {
    let pod = Pod::run(pod_config("works"));
    assert_eq!(pod.start(&["sh", "-c", "exit 2"]).wait(), 2);
}

#[test]
fn an_unknown_engine_is_named_with_those_that_there_are() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    let mut config = pod_config("engine");
    config.annotations = annotations(&[("io.kuasar.runc.engine", "podman")]);
    let e = Pod::try_run(config, &handler()).err().unwrap();
    assert!(e.message().contains("podman") && e.message().contains("builtin"), "{e}");
    leaks::assert_none(&before);
    still_works();
}

#[test]
fn a_command_that_does_not_exist_is_explained() {
    let before = leaks::snapshot();
    {
        let pod = Pod::run(pod_config("nothing"));
        let c = pod.create_with(&["/no/such/program"], |_| {}).unwrap();
        let e = c.start().unwrap_err();
        assert!(e.message().contains("no such file"), "{e}");
        let c = pod.start(&["sleep", "1000"]);
        let q = ExecSyncRequest {
            container_id: c.id.clone(),
            cmd: vec!["no-such-program".into()],
            timeout: 5,
        };
        let e = kuasar_tests::cri!(exec_sync, q);
        assert!(e.is_err() || e.unwrap().exit_code != 0);
    }
    leaks::assert_none(&before);
}

#[test]
fn a_full_disk_fails_the_new_pod_and_no_other() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    {
        let pod = Pod::run(pod_config("before"));
        let c = pod.start(&["sleep", "1000"]);
        let filler = bed().join("run/kuasar-runc/filler");
        let filler = filler.to_string_lossy();
        inside(&["dd", "if=/dev/zero", &format!("of={filler}"), "bs=64k"]);
        let e = Pod::try_run(pod_config("full"), &handler()).err();
        inside(&["rm", "-f", &filler]);
        let e = e.expect("no room, and yet a pod");
        assert!(e.message().contains("No space") || e.message().contains("room"), "{e}");
        assert!(c.is_running());
        assert_eq!(c.sh("echo on"), "on");
    }
    still_works();
    leaks::assert_none(&before);
}

#[test]
fn a_torn_record_costs_one_pod() {
    if !ours() {
        return;
    }
    let (good, bad) = (Pod::run(pod_config("good")), Pod::run(pod_config("torn")));
    let c = good.start(&["sleep", "1000"]);
    let lost = bad.start(&["sleep", "1000"]);
    let pid = lost.pid();
    let cgroup = cgroup_of(pid);
    assert!(cgroup.iter().any(|dir| dir.is_dir()), "{cgroup:?}");
    // Nobody but the daemon has made the pod's.
    let pods: Vec<_> = cgroup.iter().filter_map(|dir| dir.parent()).collect();
    switch(&["daemon", "kill"], &[]);
    let record = bed().join("run/kuasar-runc/sandboxes").join(&bad.id).join("sandbox.json");
    inside(&["truncate", "-s", "20", &record.to_string_lossy()]);
    switch(&["daemon", "start"], &[]);
    assert!(c.is_running());
    assert_eq!(c.sh("echo on"), "on");
    // Nobody is in charge of the torn one's container any more: it must not go on.
    wait_for("its process ends", Duration::from_secs(10), || cgroup_of(pid) != cgroup);
    wait_for("its cgroup goes", Duration::from_secs(10), || cgroup.iter().all(|dir| !dir.exists()));
    // containerd finds that its task is gone, after a retry.
    lost.wait();
    wait_for("the pod's cgroup goes", Duration::from_secs(10), || {
        pods.iter().all(|dir| !dir.exists())
    });
    bad.remove().unwrap();
    still_works();
}

#[test]
fn a_fifo_that_nobody_reads_holds_up_its_writer_only() {
    let pod = Pod::run(pod_config("writer"));
    // containerd reads slowly at best: the container may block, others must not.
    let noisy = pod.start(&["sh", "-c", "yes | head -c 50000000 >&2; sleep 1000"]);
    let quiet = pod.start(&["sleep", "1000"]);
    assert_eq!(quiet.sh("echo free"), "free");
    noisy.stop(0).unwrap();
    assert_eq!(noisy.wait(), 137);
}

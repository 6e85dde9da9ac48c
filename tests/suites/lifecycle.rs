//! The life of pods and containers.

use kuasar_tests::cri::*;
use kuasar_tests::{cri, daemon_pid, handler, leaks};

#[test]
fn a_pod_runs_stops_and_is_removed_without_a_trace() {
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("life"));
    assert_eq!(pod.state(), PodSandboxState::SandboxReady as i32);
    let c = pod.start(&["sleep", "1000"]);
    assert!(c.is_running());
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    c.remove().unwrap();
    pod.stop();
    assert_eq!(pod.state(), PodSandboxState::SandboxNotready as i32);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn stop_and_remove_may_be_repeated_and_come_without_each_other() {
    let pod = Pod::run(pod_config("again"));
    pod.start(&["sleep", "1000"]);
    pod.stop();
    pod.stop();
    pod.remove().unwrap();
    pod.remove().unwrap();
    let unknown = RemovePodSandboxRequest { pod_sandbox_id: "0123456789abcdef".repeat(4) };
    cri!(remove_pod_sandbox, unknown).unwrap();
    let pod = Pod::run(pod_config("remove-only"));
    pod.start(&["sleep", "1000"]);
    pod.remove().unwrap();
}

#[test]
fn exit_codes_come_as_the_program_gave_them() {
    let pod = Pod::run(pod_config("codes"));
    assert_eq!(pod.start(&["sh", "-c", "exit 7"]).wait(), 7);
    assert_eq!(
        pod.start(&["sh", "-c", "kill -KILL $$; sleep 9"]).wait() & 0x80,
        0,
        "init is immune"
    );
    let c = pod.start(&["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"]);
    c.exec(&["true"]);
    c.stop(10).unwrap();
    assert_eq!(c.wait(), 3);
    assert_eq!(c.status().reason, "Error");
}

#[test]
fn a_started_container_is_its_program_already() {
    if handler() == "runc" {
        return kuasar_tests::skip("stock runc answers before its init has become the program");
    }
    let pod = Pod::run(pod_config("program"));
    for _ in 0..10 {
        let c = pod.start(&["sleep", "1000"]);
        let name = std::fs::read_to_string(format!("/proc/{}/comm", c.pid())).unwrap();
        assert_eq!(name.trim(), "sleep");
        c.remove().unwrap();
    }
}

#[test]
fn a_pod_holds_many_containers() {
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("many"));
    let all: Vec<Container> = (0..8).map(|_| pod.start(&["sleep", "1000"])).collect();
    assert!(all.iter().all(Container::is_running));
    let (code, out, _) = all[3].exec(&["hostname"]);
    assert_eq!((code, out.trim()), (0, "many"));
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn ten_pods_start_side_by_side() {
    let before = leaks::snapshot();
    let fds = leaks::descriptors(daemon_pid());
    let threads: Vec<_> = (0..10)
        .map(|i| {
            std::thread::spawn(move || {
                let pod = Pod::run(pod_config(&format!("side{i}")));
                let c = pod.start(&["sleep", "1000"]);
                assert!(c.is_running());
                pod.remove().unwrap();
            })
        })
        .collect();
    for t in threads {
        t.join().unwrap();
    }
    leaks::assert_none(&before);
    kuasar_tests::wait_for("descriptors are closed", std::time::Duration::from_secs(10), || {
        leaks::descriptors(daemon_pid()) <= fds + 8
    });
}

#[test]
fn statistics_are_there_for_pods_and_containers() {
    let pod = Pod::run(pod_config("stats"));
    let c = pod.start(&["sh", "-c", "x=$(seq 1 20000); sleep 1000"]);
    let s = cri!(container_stats, ContainerStatsRequest { container_id: c.id.clone() }).unwrap();
    let s = s.stats.unwrap();
    assert!(s.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    assert!(s.memory.unwrap().working_set_bytes.unwrap().value > 0);
    let q = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let s = cri!(pod_sandbox_stats, q).unwrap().stats.unwrap().linux.unwrap();
    assert!(s.network.unwrap().default_interface.is_some());
    assert!(s.memory.unwrap().working_set_bytes.is_some());
}

#[test]
fn a_pod_without_shared_pids_leaves_no_process_and_inspectp_shows_its_info() {
    if handler() == "runc" {
        return kuasar_tests::skip("stock runc keeps a pause process");
    }
    let pod = Pod::run(pod_config("empty"));
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let info = cri!(pod_sandbox_status, q).unwrap().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    assert_eq!(info["pid"], 0);
    assert_eq!(info["config"]["hostname"], "empty");
    let config = &pod.config.linux.as_ref().unwrap().cgroup_parent;
    let procs = std::fs::read_to_string(format!("/sys/fs/cgroup/memory{config}/cgroup.procs"));
    assert_eq!(procs.unwrap_or_default(), "");
}

#[test]
fn resources_are_updated_while_a_container_runs() {
    let pod = Pod::run(pod_config("update"));
    let c = pod.start_with(&["sleep", "1000"], |c| {
        let r = c.linux.as_mut().unwrap().resources.as_mut().unwrap();
        r.memory_limit_in_bytes = 64 << 20;
    });
    let limit = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max";
    assert_eq!(c.sh(limit), (64 << 20).to_string());
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..Default::default()
    };
    let q = UpdateContainerResourcesRequest {
        container_id: c.id.clone(),
        linux: Some(resources),
        ..Default::default()
    };
    cri!(update_container_resources, q).unwrap();
    assert_eq!(c.sh(limit), (96 << 20).to_string());
}

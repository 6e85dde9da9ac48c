//! Limits of one container: memory, processor time, processes; and how they change while it runs.

use kuasar_tests::cri::*;
use kuasar_tests::wire::{Bundle, Direct};
use kuasar_tests::{cri, leaks, wait_for, wasm};
use serde_json::json;

use super::*;
use crate::events::Events;

#[test]
fn one_containers_memory_ends_it_alone_and_is_told() {
    let Some(_on) = handler() else { return };
    let before = leaks::snapshot();
    let events = Events::follow();
    let pod = Pod::run(pod_config("wasm-oom"));
    let other = start(&pod, &["/sleep.wasm"]);
    // Either of its memories may have 32 MiB; with what it touches of both it is beyond its cgroup's limit.
    let c = pod.start_with(&["/two.wasm"], limited(32 << 20));
    assert_eq!(c.wait(), 137, "{}", text(&c, "stderr"));
    assert_eq!(c.status().reason, "OOMKilled");
    let told = events.of(&c.id, "/tasks/exit");
    let topics: Vec<&str> = told.iter().map(|(topic, _)| topic.as_str()).collect();
    assert!(topics.contains(&"/tasks/oom"), "{topics:?}");
    assert!(other.is_running());
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn memory_may_grow_as_far_as_an_update_says() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-update"));
    let c = pod.start_with(&["/again.wasm"], limited(32 << 20));
    wait_for("it is full", SOON, || text(&c, "stdout") == "full\n");
    let update = |bytes: i64| {
        let resources =
            LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() };
        let q = UpdateContainerResourcesRequest {
            container_id: c.id.clone(),
            linux: Some(resources),
            ..Default::default()
        };
        cri!(update_container_resources, q).unwrap();
    };
    // Less, and it stays so; then more.
    update(24 << 20);
    let limit = || {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", c.pid())).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max resident set")).unwrap();
        line.split_whitespace().nth(3).unwrap().to_owned()
    };
    assert_eq!(limit(), (24 << 20).to_string());
    assert!(c.is_running());
    assert_eq!(text(&c, "stdout"), "full\n");
    update(64 << 20);
    assert_eq!(c.wait(), 0, "{}", text(&c, "stderr"));
    assert_eq!(text(&c, "stdout"), "full\nmore\n");
}

/// A file of the cgroup of a container's process, in the hierarchy of this controller.
fn in_group(pid: u32, controller: &str, file: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (names, path) = (fields.next()?, fields.next()?);
        if names.is_empty() {
            return Some(format!("/sys/fs/cgroup{path}/{file}"));
        }
        let ours = names.split(',').any(|name| name == controller);
        ours.then(|| format!("/sys/fs/cgroup/{names}{path}/{file}"))
    });
    std::fs::read_to_string(path.unwrap()).unwrap()
}

#[test]
fn a_quota_of_processor_time_holds_a_loop_back() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-quota"));
    let c = pod.start_with(&["/spin.wasm"], |config| {
        image(config);
        let linux = config.linux.as_mut().unwrap();
        linux.resources = Some(LinuxContainerResources {
            cpu_quota: 20_000,
            cpu_period: 100_000,
            ..Default::default()
        });
    });
    wait_for("it is held back", SOON, || {
        let stat = in_group(c.pid(), "cpu", "cpu.stat");
        let held = stat.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        held.unwrap().parse::<u64>().unwrap() > 3
    });
    assert!(c.is_running());
}

#[test]
fn the_processes_of_a_program_are_the_one_that_it_is() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-pids"));
    let c = start(&pod, &["/sleep.wasm"]);
    wait_for("it runs", SOON, || text(&c, "stdout") == "ready\n");
    let out = wasm::ctr(&["tasks", "ps", &c.id]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let pids: Vec<&str> =
        said.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(pids, [c.pid().to_string()], "{said}");
}

#[test]
fn threads_are_bounded_by_the_containers_limit_of_processes() {
    let Some(_on) = handler() else { return };
    let before = leaks::snapshot();
    let pod = Direct::run("wasm-pids-limit");
    let mut bundle = Bundle::new(&["/many-threads.wasm"]);
    let module = &wasm::programs()["many-threads.wasm"];
    std::fs::write(bundle.rootfs().join("many-threads.wasm"), module).unwrap();
    // max_threads of the bed's configuration is 16.
    assert_eq!(pod.run_to_end(&bundle).unwrap(), 16);
    bundle.spec["linux"]["resources"] = json!({ "pids": { "limit": 8 } });
    let threads = pod.run_to_end(&bundle).unwrap();
    assert!((1..8).contains(&threads), "{threads}");
    drop((pod, bundle));
    leaks::assert_none(&before);
}

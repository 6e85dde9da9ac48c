//! What is done to running containers: signals, budgets, pause, statistics, and the end of their daemon.

use std::time::{Duration, Instant};

use kuasar_tests::cri::*;
use kuasar_tests::settings::Settings;
use kuasar_tests::{bed, cri, daemon_pid, inside, leaks, skip, switch, wait_for};

use super::*;

#[test]
fn term_ends_a_program_at_once_and_kill_does_too() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-term"));
    for program in ["/sleep.wasm", "/spin.wasm", "/start.wasm"] {
        let c = start(&pod, &[program]);
        let begun = Instant::now();
        c.stop(20).unwrap();
        assert_eq!(c.wait(), 143, "{program}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{program}: {:?}", begun.elapsed());
        let c = start(&pod, &[program]);
        c.stop(0).unwrap();
        assert!([137, 143].contains(&c.wait()), "{program}");
    }
}

#[test]
fn budgets_end_a_program_with_152_and_the_reason() {
    with_engines(|engine| {
        for (name, value, programs, words) in [
            ("io.kuasar.wasm.fuel", "20000000", &["/spin.wasm"][..], "fuel is used up"),
            ("io.kuasar.wasm.time-budget", "500ms", &["/spin.wasm", "/sleep.wasm"][..], "budget"),
        ] {
            let mut config = pod_config("wasm-budget");
            config.annotations = annotations(&[(name, value)]);
            let pod = Pod::run(config);
            for program in programs {
                let c = start(&pod, &[program]);
                assert_eq!(c.wait(), 152, "{engine} {name} {program}");
                let said = text(&c, "stderr");
                assert!(said.contains(words), "{engine} {name} {program}: {said}");
            }
            // What stays within it is as ever.
            assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7, "{engine} {name}");
        }
    });
}

#[test]
fn a_program_that_can_be_interrupted_ends_on_term() {
    let Some(_on) = handler() else { return };
    let mut config = pod_config("wasm-epoch");
    // A budget that is not used up has its code compiled so that it can be.
    config.annotations = annotations(&[("io.kuasar.wasm.time-budget", "10m")]);
    let pod = Pod::run(config);
    for (program, words) in [("/spin.wasm", "ended by SIGTERM"), ("/sleep.wasm", "")] {
        let c = start(&pod, &[program]);
        let begun = Instant::now();
        c.stop(20).unwrap();
        assert_eq!(c.wait(), 143, "{program}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{program}");
        assert!(text(&c, "stderr").contains(words), "{program}: {}", text(&c, "stderr"));
    }
}

#[test]
fn with_interruption_by_epoch_programs_without_a_budget_can_be_interrupted() {
    let Some(_on) = handler() else { return };
    let settings = Settings::open();
    let pod = Pod::run(pod_config("wasm-interruption"));
    let ends = |how: &str| {
        let c = start(&pod, &["/spin.wasm"]);
        let begun = Instant::now();
        c.stop(20).unwrap();
        assert_eq!(c.wait(), 143, "{how}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{how}");
        text(&c, "stderr")
    };
    assert_eq!(ends("process"), "");
    settings.reload("interruption = \"epoch\"", "configuration read again");
    let said = ends("epoch");
    assert!(said.contains("ended by SIGTERM"), "{said}");
    // One that waits in a call to the host has no check to come to.
    let c = start(&pod, &["/sleep.wasm"]);
    c.stop(20).unwrap();
    assert_eq!(c.wait(), 143);
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
}

#[test]
fn exec_is_refused_with_words() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-exec"));
    let c = start(&pod, &["/sleep.wasm"]);
    let q = ExecSyncRequest { container_id: c.id.clone(), cmd: vec!["sh".into()], timeout: 5 };
    let error = cri!(exec_sync, q).unwrap_err().to_string();
    assert!(error.contains("no further processes"), "{error}");
    assert!(c.is_running());
}

#[test]
fn a_module_reads_what_clients_write_one_after_another() {
    with_engines(|engine| {
        println!("{engine}");
        let handler = kuasar_tests::handler();
        crate::terminal::attach_to(&handler, &["/cat.wasm"], image, "");
    });
    if handler().is_some() {
        crate::terminal::attach_to("kuasar-wasm-streaming", &["/cat.wasm"], image, "");
    }
}

#[test]
fn statistics_and_updates_work() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-stats"));
    let c = pod.start_with(&["/sleep.wasm"], limited(64 << 20));
    let q = ContainerStatsRequest { container_id: c.id.clone() };
    let stats = cri!(container_stats, q).unwrap().stats.unwrap();
    let used = stats.memory.unwrap().working_set_bytes.unwrap().value;
    assert!(used > 0 && used < 16 << 20, "{used}");
    let q = UpdateContainerResourcesRequest {
        container_id: c.id.clone(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    cri!(update_container_resources, q).unwrap();
    assert!(c.is_running());
    let status = std::fs::read_to_string(format!("/proc/{}/cgroup", c.pid())).unwrap();
    let group = |line: &str| line.split_once(":memory:").map(|(_, path)| path.to_owned());
    let Some(group) = status.lines().find_map(group) else { return };
    let limit = format!("/sys/fs/cgroup/memory{group}/memory.limit_in_bytes");
    assert_eq!(std::fs::read_to_string(limit).unwrap().trim(), (96 << 20).to_string());
}

#[test]
fn a_paused_program_stands_still() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-pause"));
    let c = start(&pod, &["/spin.wasm"]);
    // Processor time in ticks: fields 14 and 15 of proc_pid_stat(5), 12 and 13 behind the name.
    let spent = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", c.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let task = |verb: &str| {
        let ctr = bed().join("root/usr/bin/ctr");
        let socket = bed().join("run/containerd.sock");
        let out = inside(&[
            ctr.to_str().unwrap(),
            "-a",
            socket.to_str().unwrap(),
            "-n",
            "k8s.io",
            "tasks",
            verb,
            &c.id,
        ]);
        assert!(out.status.success(), "{verb}: {}", String::from_utf8_lossy(&out.stderr));
    };
    task("pause");
    let before = spent();
    std::thread::sleep(Duration::from_millis(500));
    assert!(spent() <= before + 1, "a paused program goes on");
    task("resume");
    wait_for("it goes on", SOON, || spent() > before + 2);
}

#[test]
fn containers_and_exit_codes_survive_kill_9_of_the_daemon() {
    let Some(_on) = handler() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("wasm-kill9"));
    let stays = start(&pod, &["/sleep.wasm"]);
    let server = start(&pod, &["/http.wasm"]);
    let ends = start(&pod, &["/sleep.wasm"]);
    let ip = address(&pod);
    wait_for("it answers", SOON, || http(&ip, 8080).is_some());
    let (old, pid) = (daemon_pid(), stays.pid());
    let ending = ends.pid();
    switch(&["daemon", "kill"], &[]);
    assert!(http(&ip, 8080).is_some(), "containers go on without a daemon");
    // It ends while nobody is there.
    let kill = std::process::Command::new("kill").args(["-TERM", &ending.to_string()]).status();
    assert!(kill.unwrap().success());
    switch(&["daemon", "start"], &[]);
    assert_ne!(daemon_pid(), old);
    assert_eq!(ends.wait(), 143);
    assert!(stays.is_running() && server.is_running());
    assert_eq!(stays.pid(), pid);
    // A new worker makes new containers in the old pod.
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    stays.stop(10).unwrap();
    assert_eq!(stays.wait(), 143);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn a_worker_that_is_killed_is_replaced() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-worker"));
    let c = start(&pod, &["/sleep.wasm"]);
    let worker = worker().expect("there is a worker");
    let kill = std::process::Command::new("kill").args(["-KILL", &worker.to_string()]).status();
    assert!(kill.unwrap().success());
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    assert!(c.is_running());
}

#[test]
fn a_container_that_cannot_be_set_up_says_why_and_leaves_nothing() {
    let Some(_on) = handler() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("wasm-no-place"));
    let c = pod.create_with(&["/sleep.wasm"], |config| {
        image(config);
        config.mounts = vec![Mount {
            container_path: "/sleep.wasm/below".into(),
            host_path: "/etc".into(),
            readonly: true,
            ..Default::default()
        }];
    });
    let c = c.unwrap();
    let error = c.start().expect_err("it starts").to_string();
    assert!(error.contains("/sleep.wasm/below") && error.contains("ot a directory"), "{error}");
    c.remove().unwrap();
    // The pod is none the worse.
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn the_next_container_is_a_process_that_waits_for_it() {
    let Some(_on) = handler() else { return };
    if inside(&["test", "-e", "/sys/fs/cgroup/cgroup.controllers"]).status.success() {
        return skip("on cgroup v2 a process is made in its group");
    }
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("wasm-spare"));
    let first = start(&pod, &["/sleep.wasm"]);
    let next = spare();
    let second = start(&pod, &["/sleep.wasm"]);
    assert_eq!(second.pid(), next);
    // It is no promise: one that has gone is no loss, and a container that wants other namespaces gets
    // its own process.
    let gone = spare();
    assert_ne!(gone, next);
    let kill = std::process::Command::new("kill").args(["-KILL", &gone.to_string()]).status();
    assert!(kill.unwrap().success());
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    let waiting = spare();
    let mut shared = pod_config("wasm-spare-host");
    let security = shared.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default().pid = NamespaceMode::Node as i32;
    let other = Pod::run(shared);
    let c = other.start_with(&["/sleep.wasm"], |config| {
        image(config);
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        security.namespace_options.get_or_insert_default().pid = NamespaceMode::Node as i32;
    });
    assert_ne!(c.pid(), waiting);
    assert!(first.is_running() && second.is_running() && c.is_running());
    other.remove().unwrap();
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

/// The process that waits to be the next container.
fn spare() -> u32 {
    let mut found = None;
    wait_for("there is a spare process", SOON, || {
        found = named("wasm-spare");
        found.is_some()
    });
    found.unwrap()
}

/// The warm worker's pid.
fn worker() -> Option<u32> {
    named("wasm-zygote")
}

//! Pods of WebAssembly: real containerd, real Wasmtime; the programs are assembled by the tests.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use kuasar_tests::cri::*;
use kuasar_tests::{Chosen, bed, cri, daemon_pid, inside, leaks, on, switch, wait_for, wasm};

const HANDLER: &str = "kuasar-wasm";
const SOON: Duration = Duration::from_secs(30);

fn handler() -> Option<Chosen> {
    let chosen = on(HANDLER)?;
    wasm::import();
    Some(chosen)
}

fn image(config: &mut ContainerConfig) {
    config.image = Some(ImageSpec { image: wasm::IMAGE.into(), ..Default::default() });
}

fn start(pod: &Pod, command: &[&str]) -> Container {
    pod.start_with(command, image)
}

fn text(container: &Container, stream: &str) -> String {
    String::from_utf8_lossy(&container.logged(stream)).into_owned()
}

/// Creates and starts a container that is to fail; answers the message.
fn fails(pod: &Pod, command: &[&str]) -> String {
    let container = match pod.create_with(command, image) {
        Ok(container) => container,
        Err(error) => return error.to_string(),
    };
    let error = container.start().expect_err("it starts");
    container.remove().unwrap();
    error.to_string()
}

/// Members of the entry that the sandboxer adds to a verbose status.
fn info(pod: &Pod) -> serde_json::Value {
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let answer = cri!(pod_sandbox_status, q).unwrap();
    serde_json::from_str(answer.info.get("wasm").unwrap()).unwrap()
}

fn address(pod: &Pod) -> String {
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
    cri!(pod_sandbox_status, q).unwrap().status.unwrap().network.unwrap().ip
}

fn http(address: &str, port: u16) -> Option<String> {
    let url = format!("http://{address}:{port}/");
    let busybox = bed().join("src/busybox");
    let out = inside(&[busybox.to_str().unwrap(), "wget", "-q", "-O", "-", "-T", "5", &url]);
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

fn limited(bytes: i64) -> impl FnOnce(&mut ContainerConfig) {
    move |config| {
        image(config);
        let linux = config.linux.as_mut().unwrap();
        linux.resources =
            Some(LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() });
    }
}

#[test]
fn a_module_runs_and_leaves_nothing() {
    let Some(_on) = handler() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("wasm-life"));
    let c = start(&pod, &["/hello.wasm"]);
    assert_eq!(c.wait(), 0);
    assert_eq!(text(&c, "stdout"), "hello from wasm\n");
    assert_eq!(text(&c, "stderr"), "problem\n");
    assert_eq!(info(&pod)["engine"]["name"], "wasmtime");
    c.remove().unwrap();
    pod.stop();
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn exit_codes_are_the_programs_and_a_trap_is_134_with_its_reason() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-exit"));
    for (program, code) in [("/exit7.wasm", 7), ("/ok.wasm", 0), ("/fail.wasm", 1)] {
        assert_eq!(start(&pod, &[program]).wait(), code, "{program}");
    }
    for (program, reason) in [
        ("/trap.wasm", "unreachable"),
        // Wasmtime takes codes of preview 1 below 126.
        ("/exit263.wasm", "exit status"),
        ("/divide.wasm", "divide by zero"),
        ("/outside.wasm", "out of bounds"),
        ("/recurse.wasm", "call stack exhausted"),
        ("/component-trap.wasm", "unreachable"),
    ] {
        let c = start(&pod, &[program]);
        assert_eq!(c.wait(), 134, "{program}");
        let said = text(&c, "stderr");
        assert!(said.contains(reason), "{program}: {said}");
    }
}

#[test]
fn a_component_of_wasi_0_2_prints() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-component"));
    let c = start(&pod, &["/print.wasm"]);
    assert_eq!(c.wait(), 0, "{}", text(&c, "stderr"));
    assert_eq!(text(&c, "stdout"), "hello from a component\n");
}

#[test]
fn arguments_environment_and_entrypoint_are_the_containers() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-args"));
    let c = pod.start_with(&["/args.wasm", "one", "two words"], image);
    assert_eq!(c.wait(), 0);
    assert_eq!(text(&c, "stdout"), "/args.wasm\0one\0two words\0");
    let c = pod.start_with(&["/env.wasm"], |config| {
        image(config);
        config.envs = vec![KeyValue { key: "GREETING".into(), value: "hello you".into() }];
    });
    assert_eq!(c.wait(), 0);
    let env = text(&c, "stdout");
    assert!(env.split('\0').any(|entry| entry == "GREETING=hello you"), "{env}");
    // No command: the image's entrypoint.
    let c = pod.start_with(&[], image);
    assert_eq!(c.wait(), 0);
    assert_eq!(text(&c, "stdout"), "hello from wasm\n");
    // A name, beside the working directory.
    let c = pod.start_with(&["hello.wasm"], |config| {
        image(config);
        config.working_dir = "/app".into();
    });
    assert_eq!(c.wait(), 0);
}

#[test]
fn files_and_volumes_are_the_containers_and_read_only_is_read_only() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-files"));
    let c = start(&pod, &["/hostname.wasm"]);
    assert_eq!(c.wait(), 0);
    assert_eq!(text(&c, "stdout").trim(), "wasm-files");
    let dir = bed().join(format!("run/wasm-volume-{}", unique()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("file"), "from a volume").unwrap();
    let with = |readonly: bool, command: &str| {
        let c = pod.start_with(&[command], |config| {
            image(config);
            config.mounts = vec![Mount {
                container_path: "/data".into(),
                host_path: dir.to_str().unwrap().into(),
                readonly,
                ..Default::default()
            }];
        });
        (c.wait(), text(&c, "stdout"))
    };
    assert_eq!(with(true, "/volume.wasm"), (0, "from a volume".into()));
    // ROFS of WASI, which Wasmtime's preview 1 says as IO.
    assert!(matches!(with(true, "/write.wasm").0, 29 | 69));
    assert!(!dir.join("new").exists());
    assert_eq!(with(false, "/write.wasm").0, 0);
    assert_eq!(std::fs::read_to_string(dir.join("new")).unwrap(), "written");
    std::fs::remove_dir_all(dir).unwrap();
    let c = pod.start_with(&["/scratch.wasm"], |config| {
        image(config);
        let linux = config.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().readonly_rootfs = true;
    });
    assert!(matches!(c.wait(), 29 | 69));
}

#[test]
fn a_module_sees_neither_the_host_nor_the_kernels_files_and_has_its_user() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-inside"));
    // NOENT: there is no /proc. PERM or NOTCAPABLE: out of the root.
    assert_eq!(start(&pod, &["/proc.wasm"]).wait(), 44);
    let code = start(&pod, &["/escape.wasm"]).wait();
    assert!(matches!(code, 63 | 76), "{code}");
    // /etc/secret of the image is root's, 0600.
    assert_eq!(start(&pod, &["/shadow.wasm"]).wait(), 0);
    let as_user = |config: &mut ContainerConfig| {
        image(config);
        let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        security.run_as_user = Some(Int64Value { value: 1000 });
    };
    let c = pod.start_with(&["/shadow.wasm"], as_user);
    // ACCES of WASI.
    assert_eq!(c.wait(), 2);
    let c = pod.start_with(&["/sleep.wasm"], as_user);
    let status = std::fs::read_to_string(format!("/proc/{}/status", c.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap_or_default().trim().to_owned()
    };
    assert!(field("Uid").starts_with("1000\t1000\t1000"), "{status}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".into(), "2".into()));
}

#[test]
fn nothing_of_the_worker_is_open_in_a_container() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-fds"));
    let c = start(&pod, &["/sleep.wasm"]);
    wait_for("it runs", SOON, || text(&c, "stdout") == "ready\n");
    let dir = format!("/proc/{}/fd", c.pid());
    let links: Vec<(String, String)> = std::fs::read_dir(dir)
        .unwrap()
        .flatten()
        .map(|entry| {
            let to = std::fs::read_link(entry.path()).unwrap_or_default();
            (entry.file_name().into_string().unwrap(), to.to_string_lossy().into_owned())
        })
        .collect();
    let sockets = links.iter().filter(|(_, to)| to.starts_with("socket:")).count();
    for (fd, to) in &links {
        let streams = ["0", "1", "2"].contains(&fd.as_str());
        // Its own event loop, its compiled code, and its own root.
        let own = ["anon_inode:", "/memfd:"].iter().any(|kind| to.starts_with(kind))
            || to.ends_with(".cwasm")
            || to == "/"
            || to == "/dev/urandom"
            // The event loop's own pair, one end twice.
            || to.starts_with("socket:") && sockets <= 3;
        assert!(streams || own, "{links:?}");
    }
}

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
fn output_comes_exactly_with_both_kinds_of_stdio() {
    for name in [HANDLER, "kuasar-wasm-streaming"] {
        let Some(_on) = on(name) else { return };
        wasm::import();
        let pod = Pod::run(pod_config("wasm-output"));
        let c = start(&pod, &["/many.wasm"]);
        assert_eq!(c.wait(), 3);
        let line = format!("{}\n", "x".repeat(63));
        assert!(c.logged("stdout") == line.repeat(16384).into_bytes(), "{name}");
    }
}

#[test]
fn memory_is_bounded_by_the_container() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-memory"));
    // 64 MiB: 2 pages are there, and 63 times a mebibyte more; memory.grow says no, nothing is killed.
    let c = pod.start_with(&["/grow.wasm"], limited(64 << 20));
    assert_eq!(c.wait(), 63);
    // What it touches counts in the cgroup, too: either bound is an end.
    let c = pod.start_with(&["/eat.wasm"], limited(32 << 20));
    let code = c.wait();
    assert!(matches!(code, 5 | 137), "{code}");
    if code == 137 {
        assert_eq!(c.status().reason, "OOMKilled");
    }
    let message = {
        let c = pod.create_with(&["/four.wasm"], limited(64 << 20)).unwrap();
        c.start().unwrap_err().to_string()
    };
    assert!(message.contains("linear memory") && message.contains("67108864"), "{message}");
}

#[test]
fn containers_do_not_share_their_random_numbers() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-random"));
    let numbers = |_| {
        let c = start(&pod, &["/random.wasm"]);
        assert_eq!(c.wait(), 0);
        std::fs::read(&c.log).unwrap().splitn(4, |b| *b == b' ').nth(3).unwrap().to_vec()
    };
    let all: Vec<_> = (0..4).map(numbers).collect();
    for (i, one) in all.iter().enumerate() {
        assert!(one.len() > 8 && all[i + 1..].iter().all(|other| other != one));
    }
}

#[test]
fn a_component_answers_requests_over_the_pods_network() {
    let Some(_on) = handler() else { return };
    let mut config = pod_config("wasm-http");
    config.annotations = annotations(&[("io.kuasar.wasm.http-port", "8123")]);
    let pod = Pod::run(config);
    let c = start(&pod, &["/http.wasm"]);
    let ip = address(&pod);
    wait_for("it answers", SOON, || {
        assert!(c.is_running(), "{}", text(&c, "stderr"));
        http(&ip, 8123).as_deref() == Some("hello over http\n")
    });
    c.stop(10).unwrap();
    assert_eq!(c.wait(), 143);
    // Another one, by its environment.
    let pod = Pod::run(pod_config("wasm-http"));
    let c = pod.start_with(&["/http.wasm"], |config| {
        image(config);
        config.envs = vec![KeyValue { key: "PORT".into(), value: "8124".into() }];
    });
    let ip = address(&pod);
    wait_for("it answers", SOON, || {
        assert!(c.is_running(), "{}", text(&c, "stderr"));
        http(&ip, 8124).is_some()
    });
}

#[test]
fn a_native_container_lives_in_the_same_pod() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-native"));
    let server = start(&pod, &["/http.wasm"]);
    let native = pod.start_with(&["/bin/sleep", "1000"], image);
    assert_eq!(native.sh("cat /etc/hostname"), "wasm-native");
    wait_for("it answers in the pod", SOON, || {
        let (code, out, _) = native.exec(&["wget", "-q", "-O", "-", "http://127.0.0.1:8080/"]);
        assert!(server.is_running(), "{}", text(&server, "stderr"));
        code == 0 && out == "hello over http\n"
    });
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

/// The warm worker's pid.
fn worker() -> Option<u32> {
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        (name.trim() == "wasm-zygote" && parent_is_ours(pid)).then_some(pid)
    })
}

/// Another checkout's bed may be up on this machine.
fn parent_is_ours(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap_or("0");
    let exe = std::fs::read_link(format!("/proc/{}/exe", parent.trim())).unwrap_or_default();
    exe.starts_with(kuasar_tests::top()) || exe.starts_with(kuasar_tests::programs())
}

#[test]
fn what_is_no_program_is_explained_and_leaves_nothing() {
    let Some(_on) = handler() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("wasm-bad"));
    for (program, words) in [
        ("/garbage.wasm", "permission denied"),
        ("/empty.wasm", "permission denied"),
        ("/header.wasm", "truncated"),
        ("/version.wasm", "version 0x7"),
        ("/truncated.wasm", "cannot be compiled"),
        ("/world.wasm", "world is unknown"),
        ("/import.wasm", "no_such_thing"),
        ("/library.wasm", "_start"),
        ("/nothing.wasm", "no such file"),
        ("/outside-link.wasm", "no such file"),
        ("/absolute-link.wasm", "no such file"),
        ("/../../../../../../../../no/such.wasm", "no such file"),
    ] {
        let message = fails(&pod, &[program]);
        assert!(message.contains(words), "{program}: {message}");
    }
    // A link that stays inside, and a path that would lead out and is held inside.
    assert_eq!(start(&pod, &["/inside-link.wasm"]).wait(), 0);
    assert_eq!(start(&pod, &["/../../../../../../../../app/hello.wasm"]).wait(), 0);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

fn cached() -> Vec<PathBuf> {
    let dir = kuasar_tests::root().join(bed().join("run/wasm-cache").strip_prefix("/").unwrap());
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let code = entries.map(|entry| entry.path());
    code.filter(|path| path.extension().is_some_and(|kind| kind == "cwasm")).collect()
}

#[test]
fn an_altered_cache_file_is_not_used() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-cache"));
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    let files = cached();
    assert!(!files.is_empty());
    for file in &files {
        let mut bytes = std::fs::read(file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        std::fs::write(file, bytes).unwrap();
    }
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    // Also by a daemon that has never seen the good one.
    for file in cached() {
        std::fs::write(file, b"evil").unwrap();
    }
    switch(&["daemon", "kill"], &[]);
    switch(&["daemon", "start"], &[]);
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
}

#[test]
fn a_full_disk_is_said_so_and_leaves_nothing() {
    let Some(_on) = handler() else { return };
    let dir = bed().join("run/wasm-cache");
    let dir = dir.to_str().unwrap();
    let pod = Pod::run(pod_config("wasm-full"));
    assert_eq!(start(&pod, &["/ok.wasm"]).wait(), 0);
    let full = inside(&["mount", "-t", "tmpfs", "-o", "size=8k,mode=0700", "tmpfs", dir]);
    assert!(full.status.success());
    // The daemon has the directory by its path.
    let message = fails(&pod, &["/hello.wasm"]);
    let out = inside(&["ls", "-A", dir]);
    assert!(inside(&["umount", dir]).status.success());
    assert!(message.contains("No space left") || message.contains("make room"), "{message}");
    let left = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(!left.contains("draft") && !left.contains("cwasm"), "{left}");
    assert_eq!(start(&pod, &["/hello.wasm"]).wait(), 0);
}

#[test]
fn one_programs_loop_and_trap_touch_no_other() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-alone"));
    let spin = start(&pod, &["/spin.wasm"]);
    let sleep = start(&pod, &["/sleep.wasm"]);
    assert_eq!(start(&pod, &["/trap.wasm"]).wait(), 134);
    assert_eq!(start(&pod, &["/recurse.wasm"]).wait(), 134);
    assert!(spin.is_running() && sleep.is_running());
}

#[test]
fn a_container_has_a_terminal() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-tty"));
    let c = pod.start_with(&["/hello.wasm"], |config| {
        image(config);
        config.tty = true;
    });
    assert_eq!(c.wait(), 0);
    wait_for("its output is there", SOON, || text(&c, "stdout").contains("hello from wasm"));
}

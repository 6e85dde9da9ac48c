//! Pods of WebAssembly: real containerd, real Wasmtime; the programs are assembled by the tests.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use kuasar_tests::cri::*;
use kuasar_tests::{Chosen, bed, cri, daemon_pid, inside, leaks, on, skip, switch, wait_for, wasm};

const HANDLER: &str = "kuasar-wasm";
const EDGE: &str = "kuasar-wasmedge";
const SOON: Duration = Duration::from_secs(30);

fn handler() -> Option<Chosen> {
    let chosen = on(HANDLER)?;
    wasm::import();
    Some(chosen)
}

/// WasmEdge in place of Wasmtime, where the bed has it.
fn edge() -> Option<Chosen> {
    let chosen = on(EDGE)?;
    if !bed().join("bin/wasm-worker-wasmedge").exists() {
        skip("no WasmEdge in the test bed");
        return None;
    }
    wasm::import();
    Some(chosen)
}

/// Tries the same with each engine that there is.
fn with_engines(test: impl Fn(&'static str)) {
    if let Some(_on) = handler() {
        test("wasmtime");
    }
    if let Some(_on) = edge() {
        test("wasmedge");
    }
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
    with_engines(a_module_runs_and_leaves_nothing_with);
}

fn a_module_runs_and_leaves_nothing_with(engine: &str) {
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("wasm-life"));
    let c = start(&pod, &["/hello.wasm"]);
    assert_eq!(c.wait(), 0);
    assert_eq!(text(&c, "stdout"), "hello from wasm\n");
    assert_eq!(text(&c, "stderr"), "problem\n");
    // Which module runs, and how.
    let runs = start(&pod, &["/sleep.wasm"]);
    let info = info(&pod);
    assert_eq!(info["engine"]["name"], engine);
    let module = &info["modules"][&runs.id];
    assert_eq!((&module["path"], &module["form"]), (&"/sleep.wasm".into(), &"compiled".into()));
    assert!(module["digest"].as_str().unwrap().starts_with("sha256:"), "{module}");
    runs.stop(10).unwrap();
    runs.wait();
    runs.remove().unwrap();
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
        ("/deep.wasm", "call stack exhausted"),
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
    with_engines(arguments_environment_and_entrypoint_are_the_containers_with);
}

fn arguments_environment_and_entrypoint_are_the_containers_with(_engine: &str) {
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
    with_engines(files_and_volumes_are_the_containers_and_read_only_is_read_only_with);
}

fn files_and_volumes_are_the_containers_and_read_only_is_read_only_with(_engine: &str) {
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
    with_engines(containers_do_not_share_their_random_numbers_with);
}

fn containers_do_not_share_their_random_numbers_with(_engine: &str) {
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

#[test]
fn exit_codes_and_traps_are_the_same_with_wasmedge() {
    let Some(_on) = edge() else { return };
    let pod = Pod::run(pod_config("wasmedge-exit"));
    // It takes any code of preview 1, whose last byte counts.
    for (program, code) in [("/exit7.wasm", 7), ("/exit263.wasm", 7)] {
        assert_eq!(start(&pod, &[program]).wait(), code, "{program}");
    }
    for (program, reason) in [
        ("/trap.wasm", "unreachable"),
        ("/divide.wasm", "divide by zero"),
        ("/outside.wasm", "out of bounds"),
    ] {
        let c = start(&pod, &[program]);
        assert_eq!(c.wait(), 134, "{program}");
        let said = text(&c, "stderr");
        assert!(said.contains(reason), "{program}: {said}");
    }
    // The stack is the process's own: the kernel ends it.
    let code = start(&pod, &["/deep.wasm"]).wait();
    assert!(matches!(code, 134 | 139), "{code}");
}

#[test]
fn wasmedge_is_confined_ended_and_bounded_like_wasmtime() {
    let Some(_on) = edge() else { return };
    let pod = Pod::run(pod_config("wasmedge-inside"));
    assert_eq!(start(&pod, &["/proc.wasm"]).wait(), 44);
    let code = start(&pod, &["/escape.wasm"]).wait();
    assert!(matches!(code, 44 | 63 | 76), "{code}");
    let c = start(&pod, &["/sleep.wasm"]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", c.pid())).unwrap();
    for (field, value) in [("CapBnd", "0000000000000000"), ("NoNewPrivs", "1"), ("Seccomp", "2")] {
        let line = status.lines().find(|line| line.starts_with(&format!("{field}:"))).unwrap();
        assert!(line.ends_with(value), "{line}");
    }
    for program in ["/sleep.wasm", "/spin.wasm", "/start.wasm"] {
        let c = start(&pod, &[program]);
        c.stop(20).unwrap();
        assert_eq!(c.wait(), 143, "{program}");
    }
    let c = pod.start_with(&["/grow.wasm"], limited(64 << 20));
    assert_eq!(c.wait(), 63);
    let message = {
        let c = pod.create_with(&["/four.wasm"], limited(64 << 20)).unwrap();
        c.start().unwrap_err().to_string()
    };
    assert!(message.contains("linear memory") && message.contains("67108864"), "{message}");
}

#[test]
fn what_wasmedge_cannot_run_is_explained_and_leaves_nothing() {
    let Some(_on) = edge() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("wasmedge-bad"));
    for (program, words) in [
        ("/header.wasm", "truncated"),
        ("/truncated.wasm", "cannot be compiled"),
        ("/print.wasm", "engine wasmtime"),
        ("/import.wasm", "no_such_thing"),
        ("/library.wasm", "_start"),
        ("/outside-link.wasm", "no such file"),
    ] {
        let message = fails(&pod, &[program]);
        assert!(message.contains(words), "{program}: {message}");
    }
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn wasmedge_has_sockets_in_the_pods_network() {
    let Some(_on) = edge() else { return };
    let pod = Pod::run(pod_config("wasmedge-socket"));
    let listens = start(&pod, &["/bin/busybox", "nc", "-l", "-p", "9000"]);
    let sent = || start(&pod, &["/socket.wasm"]).wait() == 0;
    wait_for("it is sent", SOON, sent);
    assert_eq!(listens.wait(), 0);
    assert_eq!(text(&listens, "stdout"), "hello over a socket\n");
}

#[test]
fn a_shared_object_of_wasmedges_compiler_runs() {
    let Some(_on) = edge() else { return };
    let pod = Pod::run(pod_config("wasmedge-shared"));
    let c = start(&pod, &["/exit7.so"]);
    assert_eq!(c.wait(), 7, "{}", text(&c, "stderr"));
    let c = start(&pod, &["/sleep.so"]);
    assert_eq!(info(&pod)["modules"][&c.id]["form"], "shared");
    c.stop(10).unwrap();
    assert_eq!(c.wait(), 143);
}

#[test]
fn a_pod_chooses_its_engine_by_annotation() {
    let Some(_on) = edge() else { return };
    drop(_on);
    let Some(_on) = handler() else { return };
    let mut config = pod_config("wasm-engine");
    config.annotations = annotations(&[("io.kuasar.wasm.engine", "wasmedge")]);
    let pod = Pod::run(config.clone());
    assert_eq!(info(&pod)["engine"]["name"], "wasmedge");
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    config.metadata.as_mut().unwrap().uid = format!("engine-{}", unique());
    config.annotations = annotations(&[("io.kuasar.wasm.engine", "v8")]);
    let q = RunPodSandboxRequest { config: Some(config), runtime_handler: HANDLER.into() };
    let error = cri!(run_pod_sandbox, q).unwrap_err().to_string();
    assert!(error.contains("wasmtime and wasmedge"), "{error}");
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
fn simd_is_there() {
    with_engines(|engine| {
        let pod = Pod::run(pod_config("wasm-simd"));
        assert_eq!(start(&pod, &["/simd.wasm"]).wait(), 33, "{engine}");
    });
}

#[test]
fn threads_share_memory_and_are_bounded() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-threads"));
    let c = start(&pod, &["/threads.wasm"]);
    assert_eq!(c.wait(), 10, "{}", text(&c, "stderr"));
    // max_threads of the bed's configuration.
    assert_eq!(start(&pod, &["/many-threads.wasm"]).wait(), 16);
    let c = start(&pod, &["/thread-trap.wasm"]);
    assert_eq!(c.wait(), 134);
    assert!(text(&c, "stderr").contains("unreachable"));
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

/// Runs a program in the bed; answers what it has printed.
fn tool(words: &[&str]) -> String {
    let out = inside(words);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{words:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

#[test]
fn an_oci_artifact_runs_as_the_image_that_is_made_of_it() {
    let Some(_on) = handler() else { return };
    let name = "localhost/wasm-artifact:latest";
    let files = bed().join("run/wasm");
    let path = |name: &str| files.join(name).to_str().unwrap().to_owned();
    let (artifact, archive) = (path("artifact.tar"), path("of-artifact.tar"));
    let script = kuasar_tests::top().join("tests/bed/wasmartifact.py");
    let module = path("files/hello.wasm");
    tool(&["python3", script.to_str().unwrap(), name, &module, &artifact]);
    let program = kuasar_tests::programs().join("wasm-sandboxer");
    let program = program.to_str().unwrap();
    let said = tool(&[program, "image-of-artifact", &artifact, &archive, "--name", name]);
    assert!(said.contains("module /hello.wasm"), "{said}");
    let ctr = bed().join("root/usr/bin/ctr");
    let socket = bed().join("run/containerd.sock");
    let (ctr, socket) = (ctr.to_str().unwrap(), socket.to_str().unwrap());
    tool(&[ctr, "-a", socket, "-n", "k8s.io", "images", "import", &archive]);
    let pod = Pod::run(pod_config("wasm-artifact"));
    let c = pod.start_with(&[], |config| {
        config.image = Some(ImageSpec { image: name.into(), ..Default::default() });
    });
    assert_eq!(c.wait(), 0);
    assert_eq!(text(&c, "stdout"), "hello from wasm\n");
}

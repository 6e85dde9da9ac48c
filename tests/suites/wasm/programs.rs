//! What programs see of WASI: arguments, files, exit codes, terminals, SIMD, threads.

use std::net::UdpSocket;

use kuasar_tests::cri::*;
use kuasar_tests::{bed, leaks, on, wait_for, wasm};

use super::*;

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
fn a_component_has_the_containers_files_and_read_only_is_refused() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-component-files"));
    let dir = bed().join(format!("run/wasm-volume-{}", unique()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("file"), "from a volume").unwrap();
    // Its one directory is the root, above which is nothing: not-permitted is 31 of WASI's errors. Where it
    // may not write it is not read-only (33) but io (13) that Wasmtime 48 says.
    for (readonly, last) in [(true, "13"), (false, "written")] {
        let c = pod.start_with(&["/files.wasm"], |config| {
            image(config);
            config.mounts = vec![Mount {
                container_path: "/data".into(),
                host_path: dir.to_str().unwrap().into(),
                readonly,
                ..Default::default()
            }];
        });
        assert_eq!(c.wait(), 0, "{}", text(&c, "stderr"));
        assert_eq!(text(&c, "stdout"), format!("/\nfrom a volume\n31\n{last}\n"));
        assert_eq!(dir.join("new").exists(), !readonly);
    }
    assert_eq!(std::fs::read_to_string(dir.join("new")).unwrap(), "written");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_component_connects_over_the_pods_network() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-component-socket"));
    let listens = start(&pod, &["/bin/sh", "-c", "echo an answer | exec busybox nc -l -p 9000"]);
    let mut said = String::new();
    wait_for("somebody listens", SOON, || {
        let c = start(&pod, &["/connects.wasm"]);
        let code = c.wait();
        said = text(&c, "stdout");
        // 14 of WASI's errors is connection-refused.
        assert!(code == 0 || said == "14\n", "{code} {said:?}: {}", text(&c, "stderr"));
        code == 0
    });
    assert_eq!(said, "an answer\n");
    assert_eq!(listens.wait(), 0);
    assert_eq!(text(&listens, "stdout"), "hello over a socket\n");
}

/// A UDP socket of a pod's network, which a process of the pod's is in.
fn socket_of(pid: u32, address: &'static str) -> UdpSocket {
    let make = move || {
        let net = std::fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
        // Of this thread alone, which ends.
        nix::sched::setns(net, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        UdpSocket::bind(address).unwrap()
    };
    let socket = std::thread::spawn(make).join().unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

#[test]
fn a_component_sends_datagrams_over_the_pods_network_and_gets_them() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-component-udp"));
    let sleeps = start(&pod, &["/bin/sleep", "600"]);
    let socket = socket_of(sleeps.pid(), "127.0.0.1:9001");
    let c = start(&pod, &["/datagrams.wasm"]);
    let mut bytes = [0; 100];
    let (length, sender) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!(&bytes[..length], b"hello in a datagram\n");
    socket.send_to(b"an answer\n", sender).unwrap();
    assert_eq!(c.wait(), 0, "{}{}", text(&c, "stdout"), text(&c, "stderr"));
    assert_eq!(text(&c, "stdout"), "an answer\n");
}

/// The answer to a query of one question: this address where one of IPv4 is wanted, else none.
fn answer(query: &[u8], address: [u8; 4]) -> Vec<u8> {
    // RFC 1035: a header of 12 bytes; of the question its name, which ends with 0, its type and its class.
    let end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
    let wanted = query[end - 3] == 1;
    // The same id; an answer, recursive; one question, and one answer or none.
    let mut bytes = query[..2].to_vec();
    bytes.extend([0x81, 0x80, 0, 1, 0, u8::from(wanted), 0, 0, 0, 0]);
    bytes.extend(&query[12..end]);
    if wanted {
        // The question's name, an address, of the Internet, for a minute.
        bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        bytes.extend(address);
    }
    bytes
}

#[test]
fn a_component_looks_names_up_in_the_pods_hosts_and_by_its_name_server() {
    let Some(_on) = handler() else { return };
    let mut config = pod_config("wasm-component-names");
    config.dns_config = Some(DnsConfig { servers: vec!["127.0.0.1".into()], ..Default::default() });
    let pod = Pod::run(config);
    let sleeps = start(&pod, &["/bin/sleep", "600"]);
    let socket = socket_of(sleeps.pid(), "127.0.0.1:53");
    let serve = std::thread::spawn(move || {
        let mut bytes = [0; 512];
        // Nothing more comes.
        while let Ok((length, client)) = socket.recv_from(&mut bytes) {
            if bytes[..length] == *b"end" {
                return;
            }
            socket.send_to(&answer(&bytes[..length], [10, 9, 8, 7]), client).unwrap();
        }
    });
    let said = |c: &Container| {
        assert_eq!(c.wait(), 0, "{}{}", text(c, "stdout"), text(c, "stderr"));
        text(c, "stdout")
    };
    assert_eq!(said(&start(&pod, &["/looks-up.wasm"])), "10\n9\n8\n7\n");
    socket_of(sleeps.pid(), "127.0.0.1:0").send_to(b"end", "127.0.0.1:53").unwrap();
    serve.join().unwrap();
    let hosts = bed().join(format!("run/wasm-hosts-{}", unique()));
    std::fs::write(&hosts, "127.0.0.1 localhost\n192.0.2.4 app.example\n").unwrap();
    let c = pod.start_with(&["/looks-up.wasm"], |config| {
        image(config);
        config.mounts = vec![Mount {
            container_path: "/etc/hosts".into(),
            host_path: hosts.display().to_string(),
            readonly: true,
            ..Default::default()
        }];
    });
    assert_eq!(said(&c), "192\n0\n2\n4\n");
    std::fs::remove_file(hosts).unwrap();
}

#[test]
fn a_component_has_clocks_and_random_numbers_of_its_own() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-component-clocks"));
    let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let mut numbers = Vec::new();
    for _ in 0..2 {
        let begun = now();
        let c = start(&pod, &["/clocks.wasm"]);
        assert_eq!(c.wait(), 0, "{}", text(&c, "stderr"));
        let said: Vec<u64> = text(&c, "stdout").lines().map(|n| n.parse().unwrap()).collect();
        // It waits for 200 ms by the monotonic clock, and says the time of day.
        assert!((200_000_000..30_000_000_000).contains(&said[0]), "{said:?}");
        assert!((begun..=now()).contains(&said[1]), "{said:?} {begun}");
        numbers.extend_from_slice(&said[2..]);
    }
    assert_eq!(numbers.len(), 4);
    for (i, number) in numbers.iter().enumerate() {
        assert!(!numbers[i + 1..].contains(number), "{numbers:?}");
    }
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

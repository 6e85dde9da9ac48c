//! What is different with WasmEdge.

use kuasar_tests::cri::*;
use kuasar_tests::settings::{Settings, log};
use kuasar_tests::{cri, daemon_pid, leaks, switch, wait_for};

use super::*;

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
    assert!(error.contains("wasmtime, wasmedge"), "{error}");
}

#[test]
fn without_libwasmedge_its_pods_fail_with_the_package_and_all_others_run() {
    let Some(_on) = edge() else { return };
    let settings = Settings::open();
    let missing = settings.text.replace("libwasmedge.so.0", "libwasmedge-none.so.0");
    assert_ne!(missing, settings.text);
    std::fs::write(&settings.path, missing).unwrap();
    let from = log().len();
    // A worker that has loaded it goes with its daemon.
    switch(&["daemon", "kill"], &[]);
    switch(&["daemon", "start"], &[]);
    wait_for("the log says so", SOON, || log()[from..].contains("libwasmedge0"));
    let error = Pod::try_run(pod_config("wasmedge-none"), EDGE).map(drop).unwrap_err().to_string();
    assert!(error.contains("install libwasmedge0"), "{error}");
    let pod = Pod::try_run(pod_config("wasmedge-other"), HANDLER).unwrap();
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    // As when the package comes: nothing is started anew.
    let daemon = daemon_pid();
    settings.reload("", "configuration read again");
    let pod = Pod::run(pod_config("wasmedge-there"));
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    assert_eq!(daemon_pid(), daemon);
}

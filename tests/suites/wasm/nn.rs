//! WASI-NN: in a program of its own, which is built by `make wasi-nn` alone.

use kuasar_tests::cri::*;
use kuasar_tests::settings::{Settings, log};
use kuasar_tests::{bed, leaks, switch, wait_for};

use super::*;

const ENGINE: &str = "io.kuasar.wasm.engine";

fn nn() -> Option<Chosen> {
    let chosen = handler()?;
    if !bed().join("bin/wasm-worker-nn").exists() {
        skip("no wasm-worker-nn or no ONNX Runtime in the test bed: make wasi-nn bed");
        return None;
    }
    Some(chosen)
}

/// A pod with WASI-NN.
fn pod(name: &str) -> Result<Pod, tonic::Status> {
    let mut config = pod_config(name);
    config.annotations = annotations(&[(ENGINE, "wasmtime-nn")]);
    Pod::try_run(config, HANDLER)
}

#[test]
fn a_module_infers_by_wasi_nn_without_a_further_thread() {
    let Some(_on) = nn() else { return };
    let before = leaks::snapshot();
    let pod = pod("wasm-nn").unwrap();
    let c = start(&pod, &["/nn.wasm"]);
    assert_eq!(c.wait(), 0, "{}", text(&c, "stderr"));
    assert_eq!(text(&c, "stdout"), "3 4\n");
    // What is no model is the module's to hear of: RUNTIME_ERROR of WASI-NN, or INVALID_ARGUMENT.
    let code = start(&pod, &["/nn-bad.wasm"]).wait();
    assert!(matches!(code, 1 | 5), "{code}");
    // An address that is not there ends it, and it alone.
    let c = start(&pod, &["/nn-wild.wasm"]);
    assert_eq!(c.wait(), 101);
    assert!(text(&c, "stderr").contains("guest error"), "{}", text(&c, "stderr"));
    // Everything else runs there, too, as confined as with the other worker.
    let c = start(&pod, &["/sleep.wasm"]);
    wait_for("it runs", SOON, || text(&c, "stdout") == "ready\n");
    let status = std::fs::read_to_string(format!("/proc/{}/status", c.pid())).unwrap();
    for line in ["Threads:\t1", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(&format!("\n{line}\n")), "{line}: {status}");
    }
    assert_eq!(start(&pod, &["/ok.wasm"]).wait(), 0);
    assert_eq!(info(&pod)["engine"]["name"], "wasmtime-nn");
    // Without it a module hears what it is that is not there.
    let plain = Pod::run(pod_config("wasm-no-nn"));
    let message = fails(&plain, &["/nn.wasm"]);
    assert!(message.contains("wasi_ephemeral_nn"), "{message}");
    for pod in [pod, plain] {
        pod.stop();
        pod.remove().unwrap();
    }
    leaks::assert_none(&before);
}

#[test]
fn without_the_library_its_pods_fail_with_the_package_and_all_others_run() {
    let Some(_on) = nn() else { return };
    let settings = Settings::open();
    let missing = settings.text.replace("libonnxruntime.so", "libonnxruntime-none.so");
    assert_ne!(missing, settings.text);
    std::fs::write(&settings.path, missing).unwrap();
    let from = log().len();
    // A worker that has loaded it goes with its daemon.
    switch(&["daemon", "kill"], &[]);
    switch(&["daemon", "start"], &[]);
    wait_for("the log says so", SOON, || log()[from..].contains("libonnxruntime1.23"));
    let error = pod("wasm-nn-none").map(drop).unwrap_err().to_string();
    assert!(error.contains("libonnxruntime1.23"), "{error}");
    assert!(error.contains("wasi_nn.library"), "{error}");
    let other = Pod::run(pod_config("wasm-nn-other"));
    assert_eq!(start(&other, &["/exit7.wasm"]).wait(), 7);
}

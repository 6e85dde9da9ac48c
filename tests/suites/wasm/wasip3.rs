//! WASI 0.3: off unless the operator has said otherwise.

use kuasar_tests::cri::*;
use kuasar_tests::settings::Settings;
use kuasar_tests::{leaks, wait_for};

use super::*;

const ON: &str = "[wasmtime]\nwasi_0_3 = true\n";

/// Switched on as long as it is held. A table cannot stand in front of the file's own keys.
fn switched_on() -> Settings {
    let settings = Settings::open();
    settings.reload_as(&format!("{}\n{ON}", settings.text), "configuration read again");
    settings
}

#[test]
fn a_component_of_wasi_0_3_is_refused_with_the_key_that_lets_it_run() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-p3-off"));
    for program in ["/print3.wasm", "/http3.wasm"] {
        let message = fails(&pod, &[program]);
        assert!(message.contains("wasmtime.wasi_0_3"), "{program}: {message}");
    }
}

#[test]
fn a_component_of_wasi_0_3_runs_where_it_is_switched_on() {
    let Some(_on) = handler() else { return };
    let before = leaks::snapshot();
    let settings = switched_on();
    let pod = Pod::run(pod_config("wasm-p3"));
    let c = start(&pod, &["/print3.wasm"]);
    assert_eq!(c.wait(), 0, "{}", text(&c, "stderr"));
    assert_eq!(text(&c, "stdout"), "hello from wasi 0.3\n");
    // What there was before goes on: a component of 0.2, and a module.
    for program in ["/print.wasm", "/hello.wasm"] {
        let c = start(&pod, &[program]);
        assert_eq!(c.wait(), 0, "{program}: {}", text(&c, "stderr"));
    }
    let server = start(&pod, &["/http3.wasm"]);
    let address = address(&pod);
    for _ in 0..3 {
        wait_for("it answers", SOON, || {
            http(&address, 8080).as_deref() == Some("hello over http 0.3\n")
        });
    }
    server.stop(10).unwrap();
    assert_eq!(server.wait(), 143);
    // Code that was compiled then is none of those that have it off.
    drop(settings);
    wait_for("it is off again", SOON, || fails(&pod, &["/print3.wasm"]).contains("wasi_0_3"));
    pod.stop();
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

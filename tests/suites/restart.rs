//! containerd is killed and comes back.

use kuasar_tests::cri::*;
use kuasar_tests::{skip, switch};

#[test]
fn containerd_finds_its_pods_again() {
    let pod = Pod::run(pod_config("restart"));
    let running = pod.start(&["sh", "-c", "while :; do echo tick; sleep 0.2; done"]);
    let created = pod.create_with(&["sleep", "1000"], |_| {}).unwrap();
    let exited = pod.start(&["sh", "-c", "exit 9"]);
    assert_eq!(exited.wait(), 9);
    let pid = running.pid();
    switch(&["containerd", "kill"], &[]);
    switch(&["containerd", "start"], &[]);
    assert_eq!(pod.state(), PodSandboxState::SandboxReady as i32);
    assert!(running.is_running());
    assert_eq!(running.pid(), pid);
    assert_eq!(running.sh("echo alive"), "alive");
    assert_eq!(exited.status().exit_code, 9);
    created.start().unwrap();
    assert!(created.is_running());
    // Its output goes on into the same log.
    let before = running.logged("stdout").len();
    kuasar_tests::wait_for("output goes on", std::time::Duration::from_secs(10), || {
        running.logged("stdout").len() > before
    });
    running.stop(0).unwrap();
    assert_eq!(running.wait(), 137);
    pod.remove().unwrap();
}

#[test]
fn a_pod_can_be_made_by_the_shim_alone() {
    let pod = match Pod::try_run(pod_config("shim"), "kuasar-runc-shim") {
        Ok(pod) => pod,
        Err(e) if e.message().contains("no runtime") => return skip("no shim handler in this bed"),
        Err(e) => panic!("{e}"),
    };
    let c = pod.start(&["sleep", "1000"]);
    assert_eq!(c.sh("hostname"), "shim");
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    pod.remove().unwrap();
}

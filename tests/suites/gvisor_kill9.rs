//! The daemon of gVisor's pods dies at any moment, at rest ([`crate::gvisor`]), under load and at each
//! point of each operation, and nothing is lost or left behind: what is tried of runc's, on gVisor.

use kuasar_tests::cri::*;
use kuasar_tests::{cri, leaks, on, wait_for};

use crate::own_kernel::*;
use crate::{failpoints, kill9};

const HANDLER: &str = "kuasar-gvisor";

#[test]
fn a_terminal_survives() {
    let Some(_on) = on(HANDLER) else { return };
    kill9::terminal_survives();
}

#[test]
fn killing_it_again_and_again_under_load_loses_no_container() {
    let Some(_on) = on(HANDLER) else { return };
    kill9::killed_again_and_again_under_load();
}

#[test]
fn it_may_die_at_every_failpoint() {
    let Some(_on) = on(HANDLER) else { return };
    failpoints::dies_at_every_failpoint();
}

#[test]
fn a_failure_at_any_point_leaves_nothing() {
    let Some(_on) = on(HANDLER) else { return };
    failpoints::fails_at_any_point();
}

/// Not an end but worse: the sentry is there and does not answer.
#[test]
fn a_sentry_that_hangs_holds_up_its_pod_alone() {
    let Some(_on) = on(HANDLER) else { return };
    let before = leaks::snapshot();
    let configuration = Configuration::read("gvisor");
    configuration.set(&format!("{}\n[runsc_timeouts]\nother = \"2s\"\n", configuration.text));
    let (pod, other) = (Pod::run(pod_config("gv-hangs")), Pod::run(pod_config("gv-beside")));
    let (c, beside) = (pod.start(&["sleep", "1000"]), other.start(&["sleep", "1000"]));
    let pid = info(&pod, "gvisor").get("sentryPid").unwrap().as_u64().unwrap();
    let stop = std::process::Command::new("kill").args(["-STOP", &pid.to_string()]).status();
    assert!(stop.unwrap().success());
    let q = ExecSyncRequest { container_id: c.id.clone(), cmd: vec!["true".into()], timeout: 20 };
    let error = cri!(exec_sync, q).unwrap_err();
    assert!(error.message().contains("did not answer within 2s"), "{error}");
    assert_eq!(beside.sh("echo on"), "on");
    // Its containers are killed by the first that is to stop them.
    wait_for("the pod can be removed", SOON, || pod.remove().is_ok());
    assert_eq!(beside.sh("echo on"), "on");
    other.remove().unwrap();
    leaks::assert_none(&before);
}

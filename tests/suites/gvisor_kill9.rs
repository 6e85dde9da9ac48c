//! The daemon of gVisor's pods dies at any moment, at rest ([`crate::gvisor`]), under load and at each
//! point of each operation, and nothing is lost or left behind: what is tried of runc's, on gVisor.

use kuasar_tests::cri::*;
use kuasar_tests::{bed, cri, leaks, on, switch, wait_for};

use crate::gvisor::{fake_runsc, with_path};
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

/// `runsc run` is still at work when the daemon is killed, and when the pod is removed: it must not
/// bring the sandbox up afterwards.
#[test]
fn a_sandbox_that_is_being_started_goes_with_its_pod() {
    let Some(_on) = on(HANDLER) else { return };
    let (before, usual) = (leaks::snapshot(), failpoints::sandboxes());
    let configuration = Configuration::read("gvisor");
    let real = configuration.text.lines().find_map(|line| line.strip_prefix("path = ")).unwrap();
    let held = bed().join(format!("run/held-{}", unique()));
    let go = held.with_extension("go");
    // The pid is there when the file has its name.
    let wait = format!(
        "case \" $* \" in *\" run \"*) echo $$ > {held}.new && mv {held}.new {held}; \
         while [ ! -e {go} ]; do sleep 0.05; done ;; esac; exec {real} \"$@\"",
        held = held.display(),
        go = go.display()
    );
    let fake = fake_runsc("release-20240729.0", &wait);
    configuration.set(&with_path(&configuration.text, &fake.to_string_lossy()));
    let worker = std::thread::spawn(|| Pod::try_run(pod_config("gv-held"), HANDLER).map(drop));
    wait_for("runsc run is at work", SOON, || held.exists());
    let pid = std::fs::read_to_string(&held).unwrap();
    let command = std::path::PathBuf::from("/proc").join(pid.trim());
    switch(&["daemon", "kill"], &[]);
    assert!(command.exists(), "it ends with the daemon");
    assert!(worker.join().unwrap().is_err());
    switch(&["daemon", "start"], &[]);
    wait_for("the command has ended", SOON, || !command.exists());
    std::fs::write(&go, "").unwrap();
    // containerd has given the pod up when nobody answered: it goes after a time.
    wait_for("the pod is removed", 2 * SOON, || failpoints::sandboxes() == usual);
    leaks::assert_none(&before);
    for file in [held, go, fake] {
        let _ = std::fs::remove_file(file);
    }
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

//! The configuration is read again on SIGHUP.

use std::process::Command;
use std::time::Duration;

use kuasar_tests::cri::*;
use kuasar_tests::settings::{Settings, hang_up, log};
use kuasar_tests::{daemon_pid, ours, programs, wait_for};

#[test]
fn the_configuration_is_read_again_and_pods_go_on() {
    if !ours() {
        return;
    }
    let settings = Settings::open();
    let old = Pod::run(pod_config("old"));
    let c = old.start(&["sleep", "1000"]);
    let size = |c: &Container| {
        c.sh("df -k /dev/shm | tail -1").split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(size(&c), "65536");
    settings.reload("shm_size = 8388608", "configuration read again");
    let new = Pod::run(pod_config("new"));
    assert_eq!(size(&new.start(&["sleep", "1000"])), "8192");
    assert_eq!(size(&c), "65536", "pods keep what they have");
    assert!(c.is_running());
}

#[test]
fn the_log_level_changes_without_a_restart() {
    if !ours() {
        return;
    }
    let settings = Settings::open();
    let daemon = daemon_pid();
    let from = log().len();
    drop(Pod::run(pod_config("quiet")));
    assert!(!log()[from..].contains("DEBUG"), "{}", &log()[from..]);
    settings.reload("log_level = \"trace\"", "read again");
    drop(Pod::run(pod_config("loud")));
    wait_for("it is talkative now", Duration::from_secs(10), || {
        let text = log();
        text[from..].contains("TRACE") || text[from..].contains("DEBUG")
    });
    assert_eq!(daemon_pid(), daemon);
}

#[test]
fn a_bad_configuration_is_kept_out_with_a_message() {
    if !ours() {
        return;
    }
    let settings = Settings::open();
    let daemon = daemon_pid();
    for (lines, word) in [
        ("engine = \"podman\"", "podman"),
        ("create_timeout_secs = 0", "create_timeout_secs"),
        ("no_such_key = 1", "no_such_key"),
        ("this is no TOML", "TOML"),
        ("shm_size = \"large\"", "shm_size"),
        ("shm_size = 8192\nlog_level = \"info,a=loud\"", "log_level"),
    ] {
        let told = settings.reload(lines, "configuration is unchanged");
        assert!(told.contains(word), "{word}: {told}");
    }
    std::fs::remove_file(&settings.path).unwrap();
    hang_up();
    let pod = Pod::run(pod_config("still"));
    assert_eq!(pod.start(&["sh", "-c", "exit 2"]).wait(), 2);
    assert_eq!(daemon_pid(), daemon);
    assert!(std::path::Path::new(&format!("/proc/{daemon}/exe")).exists());
}

#[test]
fn a_configuration_is_checked_without_a_daemon() {
    if !ours() {
        return;
    }
    let settings = Settings::open();
    let check = || {
        let mut command = Command::new(programs().join("runc-sandboxer"));
        command.arg("--config").arg(&settings.path).arg("--check-config").output().unwrap()
    };
    assert!(check().status.success());
    std::fs::write(&settings.path, "engine = \"podman\"").unwrap();
    let out = check();
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("podman"));
}

//! `kill -9` of the daemon at any moment loses nothing.

use kuasar_tests::cri::*;
use kuasar_tests::{handler, leaks, ours, switch, wait_for};
use std::time::Duration;

use crate::own_kernel::kill_and_start;

#[test]
fn a_container_survives_kill_9_of_its_daemon() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("survive"));
    let c = pod.start(&["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"]);
    let pid = c.pid();
    switch(&["daemon", "kill"], &[]);
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    std::thread::sleep(Duration::from_millis(300));
    switch(&["daemon", "start"], &[]);
    assert_eq!(pod.state(), PodSandboxState::SandboxReady as i32);
    assert!(c.is_running());
    assert_eq!(c.pid(), pid);
    assert_eq!(c.sh("echo in"), "in");
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    // Every line is there, in order: nothing was lost while nobody served.
    let text = String::from_utf8(c.logged("stdout")).unwrap();
    for (i, line) in text.lines().enumerate() {
        assert_eq!(line, (i + 1).to_string());
    }
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn an_exit_while_the_daemon_is_away_is_told() {
    if !ours() {
        return;
    }
    let pod = Pod::run(pod_config("away"));
    let flag = std::path::PathBuf::from(&pod.config.log_directory).join("go");
    std::fs::create_dir_all(&flag).unwrap();
    let mount = Mount {
        host_path: flag.to_string_lossy().into_owned(),
        container_path: "/go".into(),
        ..Default::default()
    };
    let c = pod.start_with(
        &["sh", "-c", "while [ ! -e /go/x ]; do sleep 0.02; done; echo last words; exit 42"],
        |c| c.mounts = vec![mount],
    );
    let pid = c.pid();
    switch(&["daemon", "kill"], &[]);
    std::fs::write(flag.join("x"), "").unwrap();
    wait_for("the container ends", Duration::from_secs(10), || {
        !std::path::Path::new(&format!("/proc/{pid}")).exists()
    });
    // containerd has seen no exit: its Wait is parked.
    assert!(c.is_running());
    switch(&["daemon", "start"], &[]);
    assert_eq!(c.wait(), 42);
    assert_eq!(c.logged("stdout"), b"last words\n");
}

#[test]
fn a_terminal_survives() {
    if ours() {
        terminal_survives();
    }
}

/// On the handler under test.
pub(crate) fn terminal_survives() {
    let pod = Pod::run(pod_config("ttykill"));
    let c = pod.start_with(
        &["sh", "-c", "for i in $(seq 1 100); do echo $i; sleep 0.02; done; exit 6"],
        |c| {
            c.tty = true;
        },
    );
    kill_and_start();
    assert_eq!(c.wait(), 6);
    let text = String::from_utf8(c.logged("stdout")).unwrap().replace('\r', "");
    let want: String = (1..=100).map(|i| format!("{i}\n")).collect();
    assert_eq!(text, want);
}

#[test]
fn killing_it_again_and_again_under_load_loses_no_container() {
    if ours() {
        killed_again_and_again_under_load();
    }
}

/// The daemon of the handler under test.
pub(crate) fn killed_again_and_again_under_load() {
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("load"));
    let keep = pod.start(&["sleep", "1000"]);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let load: Vec<_> = (0..3)
        .map(|i| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut done = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // Calls may fail while nobody serves; they must not hang or lie.
                    if let Ok(pod) = Pod::try_run(pod_config(&format!("load{i}")), &handler()) {
                        if let Ok(c) = pod.create_with(&["sh", "-c", "exit 3"], |_| {})
                            && c.start().is_ok()
                        {
                            assert_eq!(c.wait(), 3);
                            done += 1;
                        }
                        wait_for("the pod is removed", Duration::from_secs(30), || {
                            pod.remove().is_ok()
                        });
                    }
                }
                done
            })
        })
        .collect();
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(700));
        kill_and_start();
    }
    std::thread::sleep(Duration::from_secs(4));
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let done: u32 = load.into_iter().map(|t| t.join().unwrap()).sum();
    assert!(done > 0);
    assert!(keep.is_running());
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

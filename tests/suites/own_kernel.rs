//! What is tried alike of every sandboxer whose pods have one process of their own that all
//! containers live in: gVisor's sentry, Quark.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::{bed, cri, leaks, switch, task, wait_for, wire};

/// On a machine with much to do.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// Members of the entry that the sandboxer of this kind adds to a verbose status.
pub(crate) fn info(pod: &Pod, kind: &str) -> serde_json::Value {
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let answer = cri!(pod_sandbox_status, q).unwrap();
    serde_json::from_str(answer.info.get(kind).unwrap()).unwrap()
}

/// Kills a process; when it is answered, the process has ended, at most a millisecond ago.
pub(crate) fn end(pid: u32) {
    let kill = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status();
    assert!(kill.unwrap().success());
    let (stat, begun) = (PathBuf::from(format!("/proc/{pid}/stat")), Instant::now());
    while std::fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z ")) {
        assert!(begun.elapsed() < SOON, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn kill_and_start() {
    switch(&["daemon", "kill"], &[]);
    switch(&["daemon", "start"], &[]);
}

/// A directory of the pod, mounted at `/go` of its containers.
pub(crate) fn volume(pod: &Pod) -> (PathBuf, Mount) {
    let dir = PathBuf::from(&pod.config.log_directory).join("go");
    std::fs::create_dir_all(&dir).unwrap();
    let mount = Mount {
        host_path: dir.to_string_lossy().into_owned(),
        container_path: "/go".into(),
        ..Default::default()
    };
    (dir, mount)
}

/// The daemon's configuration as it was, put back when this is dropped.
pub(crate) struct Configuration {
    file: PathBuf,
    pub(crate) text: String,
}

impl Configuration {
    pub(crate) fn read(kind: &str) -> Self {
        let file = bed().join(format!("etc/kuasar-{kind}.toml"));
        let text = std::fs::read_to_string(&file).unwrap();
        Self { file, text }
    }

    /// The daemon runs with this.
    pub(crate) fn set(&self, text: &str) {
        std::fs::write(&self.file, text).unwrap();
        switch(&["daemon", "stop"], &[]);
        switch(&["daemon", "start"], &[]);
    }
}

impl Drop for Configuration {
    fn drop(&mut self) {
        self.set(&self.text);
    }
}

/// A container and an exec that end while no daemon is there.
pub(crate) fn ends_while_the_daemon_is_away(pod: &Pod) {
    let (dir, mount) = volume(pod);
    let line = "while [ ! -e /go/x ]; do sleep 0.05; done; echo last words; touch /go/y; exit 42";
    let c = pod.start_with(&["sh", "-c", line], |c| c.mounts = vec![mount.clone()]);
    let idle = pod.start_with(&["sleep", "1000"], |c| c.mounts = vec![mount]);
    let (id, wait) = (idle.id.clone(), "while [ ! -e /go/y ]; do sleep 0.05; done; exit 43");
    let exec = std::thread::spawn(move || {
        let cmd = ["sh", "-c", wait].map(str::to_owned).to_vec();
        let q = ExecSyncRequest { container_id: id, cmd, timeout: 60 };
        cri!(exec_sync, q).unwrap().exit_code
    });
    wait_for("the exec runs", SOON, || idle.sh("ps | grep -c 'exit 4[3]' || true") != "0");
    switch(&["daemon", "kill"], &[]);
    std::fs::write(dir.join("x"), "").unwrap();
    wait_for("the container has ended", SOON, || dir.join("y").exists());
    std::thread::sleep(Duration::from_millis(500));
    switch(&["daemon", "start"], &[]);
    assert_eq!(c.wait(), 42);
    assert_eq!(c.logged("stdout"), b"last words\n");
    assert_eq!(exec.join().unwrap(), 43);
}

/// Containers that are created before the daemon is killed and started, or removed, after it.
pub(crate) fn created_and_started_by_the_next_daemon(pod: &Pod) {
    let plain = pod.create_with(&["sh", "-c", "echo late; exit 5"], |_| {}).unwrap();
    let never = pod.create_with(&["sh", "-c", "echo never"], |_| {}).unwrap();
    kill_and_start();
    plain.start().unwrap();
    assert_eq!(plain.wait(), 5);
    assert_eq!(plain.logged("stdout"), b"late\n");
    never.remove().unwrap();
}

/// The process that `of` finds is killed: every container has ended with it, and Waits say so within
/// 100 ms. On a machine with much to do a round may be late; three are not.
pub(crate) fn killed_ends_all_containers_at_once(name: &str, of: impl Fn(&Pod) -> u32) {
    let rounds = (0..3).map(|_| killed_once(name, &of));
    let latest: Vec<Duration> = rounds.take_while(|late| *late > PROMISE).collect();
    assert!(latest.len() < 3, "{latest:?}");
}

/// How soon the end of a pod's process is told.
const PROMISE: Duration = Duration::from_millis(100);

/// One round; answers how late the latest Wait was answered.
fn killed_once(name: &str, of: impl Fn(&Pod) -> u32) -> Duration {
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config(name));
    let all: Vec<Container> = (0..2).map(|_| pod.start(&["sleep", "1000"])).collect();
    let socket = wire::task_socket(&pod.id);
    let waits: Vec<_> = all
        .iter()
        .map(|c| {
            let (socket, id) = (socket.clone(), c.id.clone());
            std::thread::spawn(move || {
                let q = tasks::WaitRequest { id, ..Default::default() };
                let answer = task!(&socket, wait, q).unwrap();
                (answer.exit_status, Instant::now())
            })
        })
        .collect();
    // Let the waits be under way.
    std::thread::sleep(Duration::from_millis(500));
    end(of(&pod));
    let ended = Instant::now();
    let mut latest = Duration::ZERO;
    for wait in waits {
        let (status, at) = wait.join().unwrap();
        assert_eq!(status, 137);
        let late = at.saturating_duration_since(ended);
        println!("told {late:?} after the end of the pod's process");
        assert!(late < Duration::from_secs(5), "{late:?}");
        latest = latest.max(late);
    }
    wait_for("the pod is down", SOON, || pod.state() == PodSandboxState::SandboxNotready as i32);
    assert!(all.iter().all(|c| c.wait() == 137));
    pod.remove().unwrap();
    leaks::assert_none(&before);
    latest
}

/// The same while no daemon is there: the next one finds out, and codes that were known stay.
pub(crate) fn an_end_while_the_daemon_is_away_is_found_out(name: &str, of: impl Fn(&Pod) -> u32) {
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config(name));
    let ended = pod.start(&["sh", "-c", "exit 11"]);
    assert_eq!(ended.wait(), 11);
    let c = pod.start(&["sleep", "1000"]);
    let pid = of(&pod);
    switch(&["daemon", "kill"], &[]);
    end(pid);
    switch(&["daemon", "start"], &[]);
    assert_ne!(c.wait(), 0);
    assert_eq!(ended.wait(), 11);
    wait_for("the pod is down", SOON, || pod.state() == PodSandboxState::SandboxNotready as i32);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

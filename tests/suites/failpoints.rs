//! The daemon dies at each named point of each operation; nobody else notices.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_tests::cri::*;
use kuasar_tests::{bed, cri, handler, inside, kind, leaks, ours, switch, wait_for};

const POINTS: [&str; 8] = [
    "sandbox.create",
    "sandbox.start",
    "sandbox.stop",
    "sandbox.shutdown",
    "task.create",
    "task.start",
    "task.exec",
    "task.delete",
];

/// Counts aloud until it is told to go, then goes with `code`.
struct Counter {
    container: Container,
    pid: u32,
    flag: PathBuf,
    /// Its last act but its exit.
    gone: PathBuf,
    code: i32,
}

impl Counter {
    fn new(pod: &Pod, code: i32) -> Self {
        let dir = PathBuf::from(&pod.config.log_directory).join(format!("go{code}"));
        std::fs::create_dir_all(&dir).unwrap();
        let mount = Mount {
            host_path: dir.to_string_lossy().into_owned(),
            container_path: "/go".into(),
            ..Default::default()
        };
        let line = format!(
            "i=0; while [ ! -e /go/x ]; do i=$((i+1)); echo $i; echo $i > /go/n; usleep 10000; done; echo last $i >&2; touch /go/y; exit {code}"
        );
        let container = pod.start_with(&["sh", "-c", &line], |c| c.mounts = vec![mount]);
        let [flag, gone] = ["x", "y"].map(|name| dir.join(name));
        Self { pid: container.pid(), container, flag, gone, code }
    }

    /// It is there, and where the host does not see its process, it counts on.
    fn runs(&self) -> bool {
        if kind() == "runc" {
            return Path::new(&format!("/proc/{}/exe", self.pid)).exists();
        }
        // Empty for the moment in which it is written.
        let count = || std::fs::read_to_string(self.flag.with_file_name("n")).unwrap_or_default();
        let before = count();
        wait_for("it counts on", Duration::from_secs(10), || {
            !count().is_empty() && count() != before
        });
        true
    }

    /// Lets it end, with or without a daemon.
    fn go(&self) {
        std::fs::write(&self.flag, "").unwrap();
        wait_for("it ends", Duration::from_secs(10), || match kind() {
            "runc" => std::fs::read_link(format!("/proc/{}/exe", self.pid)).is_err(),
            // The host does not see its process: that of the kernel goes on.
            _ => self.gone.exists(),
        });
    }

    /// Its exit code is known, and every byte that it has written.
    fn has_lost_nothing(&self, point: &str) {
        assert_eq!(self.container.wait(), self.code, "{point}");
        let last = || String::from_utf8(self.container.logged("stderr")).unwrap();
        wait_for("its last words are logged", Duration::from_secs(10), || last().ends_with('\n'));
        let count: u32 = last().trim().strip_prefix("last ").unwrap().parse().unwrap();
        let want: String = (1..=count).map(|i| format!("{i}\n")).collect();
        assert_eq!(String::from_utf8(self.container.logged("stdout")).unwrap(), want, "{point}");
    }
}

/// A whole life: whatever of it fails may fail; nothing may hang. Answers the pod, where there
/// is one, and the init of a container that was not told to end.
fn life() -> Option<Pod> {
    let pod = Pod::try_run(pod_config("victim"), &handler()).ok()?;
    if let Ok(c) = pod.create_with(&["sleep", "1000"], |_| {})
        && c.start().is_ok()
    {
        let exec =
            ExecSyncRequest { container_id: c.id.clone(), cmd: vec!["true".into()], timeout: 5 };
        if let Ok(answer) = cri!(exec_sync, exec) {
            assert_eq!(answer.exit_code, 0, "an exec that is answered is answered right");
        }
        assert!(c.is_running(), "a container died with the daemon");
        let _ = c.stop(0);
        let _ = c.remove();
    }
    let _ = pod.remove();
    Some(pod)
}

#[test]
fn it_may_die_at_every_failpoint() {
    if ours() {
        dies_at_every_failpoint();
    }
}

/// Of the daemon under test.
/// How many pods the daemon under test has records of.
pub(crate) fn sandboxes() -> usize {
    let kept = bed().join(format!("run/kuasar-{}/sandboxes", kind()));
    std::fs::read_dir(kuasar_tests::root().join(kept.strip_prefix("/").unwrap())).unwrap().count()
}

pub(crate) fn dies_at_every_failpoint() {
    let before = leaks::snapshot();
    let bystander = Pod::run(pod_config("bystander"));
    let witness = Counter::new(&bystander, 99);
    let created = bystander.create_with(&["sh", "-c", "exit 8"], |_| {}).unwrap();
    let usual = sandboxes();
    let names =
        POINTS.iter().flat_map(|point| ["before", "after"].map(|side| format!("{point}.{side}")));
    for (i, name) in names.enumerate() {
        println!("failpoint {name}");
        // What a kill before has left is removed after a time, which is a Shutdown, too: it is not to
        // meet a failpoint that is armed for this life.
        wait_for("nothing is left of the life before", Duration::from_secs(60), || {
            sandboxes() <= usual
        });
        let leaver = Counter::new(&bystander, 10 + i32::try_from(i).unwrap());
        switch(&["daemon", "stop"], &[]);
        let stamp = bed().join(format!("run/kuasar-{}/failpoint.done", kind()));
        inside(&["rm", "-f", &stamp.to_string_lossy()]);
        switch(&["daemon", "start"], &[("KUASAR_FAILPOINT", &format!("{name}:kill"))]);
        let worker = std::thread::spawn(life);
        switch(&["daemon", "died"], &[]);
        assert!(leaver.runs() && witness.runs(), "{name}: a container died with the daemon");
        leaver.go();
        assert!(leaver.container.is_running(), "{name}: containerd cannot know yet");
        switch(&["daemon", "start"], &[]);
        leaver.has_lost_nothing(&name);
        leaver.container.remove().unwrap();
        if let Some(pod) = worker.join().unwrap() {
            wait_for(&format!("{name}: the pod is removed"), Duration::from_secs(60), || {
                pod.remove().is_ok()
            });
        }
        assert!(witness.container.is_running(), "{name}");
        assert_eq!(witness.container.pid(), witness.pid, "{name}");
        assert_eq!(witness.container.sh("echo here"), "here", "{name}");
    }
    created.start().unwrap();
    assert_eq!(created.wait(), 8, "created before sixteen deaths, started after them");
    witness.go();
    witness.has_lost_nothing("the end");
    bystander.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn a_failure_at_any_point_leaves_nothing() {
    if ours() {
        fails_at_any_point();
    }
}

/// An operation that fails half-way is undone, by the daemon under test.
pub(crate) fn fails_at_any_point() {
    let before = leaks::snapshot();
    // A delete that fails each time keeps containerd trying: there is nothing to undo.
    for point in POINTS.iter().filter(|point| **point != "task.delete") {
        for side in ["before", "after"] {
            let name = format!("{point}.{side}");
            println!("failpoint {name}");
            switch(&["daemon", "stop"], &[]);
            switch(&["daemon", "start"], &[("KUASAR_FAILPOINT", &format!("{name}:error"))]);
            let pod = life();
            switch(&["daemon", "stop"], &[]);
            switch(&["daemon", "start"], &[]);
            if let Some(pod) = pod {
                wait_for(&format!("{name}: the pod is removed"), Duration::from_secs(60), || {
                    pod.remove().is_ok()
                });
            }
            leaks::assert_none(&before);
        }
    }
}

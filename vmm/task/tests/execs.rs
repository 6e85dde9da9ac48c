//! Execs by the process that stays, for a container that is no more than its records. One test in a
//! process of its own: it reaps every child there is.

#![allow(clippy::unwrap_used)] // helpers of the test, outside of test functions

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kuasar_oci::command::Unfinished;
use kuasar_oci::engine::{Execs, Left};
use kuasar_oci::execs::ExecServer;
use kuasar_oci::processes::{Command, Processes, new_cookie};
use serde_json::{Value, json};
use vmm_task::containers::EXECS;
use vmm_task::reaper::Reaper;

const SOON: Duration = Duration::from_secs(30);

struct Bench {
    reaper: Reaper,
    server: ExecServer,
    dir: tempfile::TempDir,
}

fn write(path: &Path, value: &Value) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, value.to_string()).unwrap();
}

impl Bench {
    async fn exec(
        &self,
        process: &Value,
        stdout: Option<BorrowedFd<'_>>,
    ) -> Result<Left, Unfinished> {
        let file = self.dir.path().join("process.json");
        write(&file, process);
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let words = ["--root", &text(self.dir.path()), "exec", "--process", &text(&file), "c"];
        let words = words.map(str::to_owned).to_vec();
        self.server.exec(words, [None, stdout, None], SOON).await
    }

    async fn status(&self, left: Left) -> u32 {
        let exit = self.reaper.end_of(left.watched.unwrap());
        tokio::time::timeout(SOON, exit).await.unwrap().unwrap().status
    }
}

fn process(words: &[&str]) -> Value {
    json!({"cwd": "/", "args": words, "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0}})
}

#[tokio::test]
async fn execs_need_no_program_for_each_and_survive_the_end_of_who_makes_them() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: namespaces are joined by root");
        return;
    }
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let reaper = Reaper::default();
    reaper.run().unwrap();
    let program =
        |idle: &str| vec![env!("CARGO_BIN_EXE_vmm-task").to_owned(), EXECS.into(), idle.into()];
    let server = ExecServer::new(Arc::new(reaper.clone()), program("600"), Vec::new());
    let bench = Bench { reaper, server, dir: tempfile::tempdir().unwrap() };
    let init = Command {
        argv: vec!["/bin/sh".into(), "-c".into(), "exec sleep 1000".into()],
        env: vec!["PATH=/usr/bin:/bin".into()],
        fds: vec![None, None, None],
        cookie: new_cookie(),
        place: None,
    };
    let cookie = init.cookie;
    let spawned = bench.reaper.spawn(init).await.unwrap();
    let dir = bench.dir.path();
    write(&dir.join("c/state.json"), &json!({"pid": spawned.pid, "bundle": dir.join("bundle")}));
    write(&dir.join("bundle/config.json"), &json!({"linux": {}}));

    let (read, stdout) = std::io::pipe().unwrap();
    let words = ["sh", "-c", "echo $PPID; exit 7"];
    let left = bench.exec(&process(&words), Some(stdout.as_fd())).await.unwrap();
    drop(stdout);
    assert_eq!(bench.status(left).await, 7);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut &read, &mut said).unwrap();
    assert_eq!(said.trim(), std::process::id().to_string(), "it is a child of who reaps");

    // What cannot be run is told, and nothing of it stays.
    let none = bench.exec(&process(&["no-such-program"]), None).await.unwrap_err();
    assert!(none.to_string().contains("executable file not found in $PATH"), "{none}");
    let none = bench.exec(&json!({"cwd": "/", "args": 1}), None).await.unwrap_err();
    assert!(matches!(none, Unfinished::Failed(_)), "{none}");
    // A process that has ended before anybody asks.
    for _ in 0..50 {
        let left = bench.exec(&process(&["true"]), None).await.unwrap();
        assert_eq!(bench.status(left).await, 0);
    }

    // Somebody ends it: what it has made goes on, and the next exec has another.
    let sleeper = bench.exec(&process(&["sleep", "1000"]), None).await.unwrap();
    servers().into_iter().for_each(kill);
    let left = bench.exec(&process(&["sh", "-c", "exit 9"]), None).await.unwrap();
    assert_eq!(bench.status(left).await, 9);
    assert!(Path::new(&format!("/proc/{}", sleeper.pid)).exists());
    kill(sleeper.pid);
    assert_eq!(bench.status(sleeper).await, 137);

    // Its container ends.
    kill(spawned.pid);
    assert_eq!(bench.reaper.end_of(cookie).await.unwrap().status, 137);
    let gone = bench.exec(&process(&["true"]), None).await.unwrap_err();
    assert!(gone.to_string().contains("container c is not running"), "{gone}");
    let Bench { server, reaper, .. } = bench;
    drop(server);
    none_is_left().await;

    // One that nobody asks any more ends by itself, and the next exec has another.
    let server = ExecServer::new(Arc::new(reaper), program("1"), Vec::new());
    for _ in 0..2 {
        let words = vec!["exec".to_owned(), "--process".into(), "/none".into(), "c".into()];
        let error = server.exec(words, [None; 3], SOON).await.unwrap_err();
        assert!(matches!(error, Unfinished::Failed(_)), "{error}");
        none_is_left().await;
    }
}

async fn none_is_left() {
    let deadline = std::time::Instant::now() + SOON;
    while !servers().is_empty() {
        assert!(std::time::Instant::now() < deadline, "a server stays");
        tokio::task::yield_now().await;
    }
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// Children of this process that make execs.
fn servers() -> Vec<u32> {
    let children = kuasar_host::process::children(std::process::id()).unwrap();
    let serves = |pid: &u32| {
        let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&text).split('\0').nth(1) == Some(EXECS)
    };
    children.into_iter().map(|child| child.pid).filter(serves).collect()
}

//! The reaper on real processes. One test in a process of its own: it reaps every child there is.

#![allow(clippy::unwrap_used)] // helpers of the test, outside of test functions

use std::os::fd::AsFd;
use std::time::Duration;

use kuasar_oci::processes::{Command, Processes, new_cookie};
use vmm_task::reaper::Reaper;

fn shell(script: &str) -> Command<'static> {
    Command {
        argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
        env: vec!["PATH=/usr/bin:/bin".into()],
        fds: vec![None, None, None],
        cookie: new_cookie(),
        place: None,
    }
}

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), work).await.unwrap()
}

/// Runs a script and answers its output.
async fn output(reaper: &Reaper, script: &str) -> String {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let mut command = shell(script);
    let cookie = command.cookie;
    command.fds = vec![None, Some(write.as_fd()), None];
    reaper.spawn(command).await.unwrap();
    drop(write);
    let text = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::fs::File::from(read), &mut text).unwrap();
        text
    });
    let text = soon(text).await.unwrap();
    assert_eq!(soon(reaper.end_of(cookie)).await.unwrap().status, 0, "{script}: {text}");
    text
}

#[tokio::test]
async fn everything_is_reaped_and_no_exit_is_lost() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let reaper = Reaper::default();
    reaper.run().unwrap();

    // Exit codes and signals.
    for (script, status) in [("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143), ("true", 0)]
    {
        let command = shell(script);
        let cookie = command.cookie;
        let spawned = reaper.spawn(command).await.unwrap();
        assert!(spawned.pid > 1);
        assert_eq!(soon(reaper.exit_of(cookie)).await.unwrap().status, status, "{script}");
        // It may be asked again until it is acknowledged.
        assert_eq!(soon(reaper.exit_of(cookie)).await.unwrap().status, status);
        reaper.acknowledge(cookie).await;
        assert!(reaper.exit_of(cookie).await.is_err());
    }

    // What an engine has left behind, long ended or still there. It ends when its input does, and
    // not before the engine has: a shell reaps on its own account what ends before it.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    for (status, ended_before) in [(5, true), (6, false)] {
        let (read, hold) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let orphan = format!("read nothing <&3; exit {status}");
        let mut command = shell(&format!("({orphan}) & echo $! > {}", file.display()));
        command.fds = vec![None, None, None, Some(read.as_fd())];
        let engine = command.cookie;
        let since = reaper.spawn(command).await.unwrap().since;
        soon(reaper.end_of(engine)).await.unwrap();
        let pid = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        let mut hold = Some(hold);
        if ended_before {
            hold = None;
            let gone = async {
                while std::fs::exists(format!("/proc/{pid}")).unwrap() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            soon(gone).await;
        }
        let cookie = new_cookie();
        reaper.watch(pid, since, cookie).await.unwrap();
        drop(hold);
        assert_eq!(soon(reaper.exit_of(cookie)).await.unwrap().status, status);
        // An exit of before is not taken for one of now.
        let later = reaper.spawn(shell("true")).await.unwrap().since;
        assert!(reaper.watch(pid, later, new_cookie()).await.is_err());
        reaper.acknowledge(cookie).await;
    }

    // Many at once.
    let mut cookies = Vec::new();
    for n in 0..60 {
        let command = shell(&format!("exit {n}"));
        cookies.push(command.cookie);
        reaper.spawn(command).await.unwrap();
    }
    for (n, cookie) in cookies.into_iter().enumerate() {
        assert_eq!(soon(reaper.end_of(cookie)).await.unwrap().status, n as u32);
    }

    // A program that is not there is an error here, and leaves nothing.
    let mut missing = shell("");
    missing.argv = vec!["/no/such/program".into()];
    let error = reaper.spawn(missing).await.err().unwrap();
    assert!(error.to_string().contains("No such file"), "{error}");

    // Nothing of ours leaks into a child: neither descriptors nor ignored signals.
    let _held = std::fs::File::open("/dev/null").unwrap();
    let fds = output(&reaper, "ls /proc/self/fd | wc -l").await;
    // 0, 1, 2 and the directory that ls reads.
    assert_eq!(fds.trim(), "4");
    let ignored = output(&reaper, "grep SigIgn /proc/self/status").await;
    assert!(ignored.trim().ends_with("0000000000000000"), "{ignored}");
    let blocked = output(&reaper, "grep SigBlk /proc/self/status").await;
    assert!(blocked.trim().ends_with("0000000000000000"), "{blocked}");

    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a PID namespace needs root");
        return;
    }
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let mut command = shell("echo $$");
    let cookie = command.cookie;
    command.fds = vec![None, Some(write.as_fd()), None];
    let spawned = reaper.spawn_in_new_pid_namespace(command).unwrap();
    drop(write);
    assert!(spawned.pid > 1);
    assert_eq!(soon(reaper.end_of(cookie)).await.unwrap().status, 0);
    let mut text = String::new();
    std::io::Read::read_to_string(&mut std::fs::File::from(read), &mut text).unwrap();
    assert_eq!(text.trim(), "1");
    // Nothing else of ours is in a new namespace.
    assert_ne!(output(&reaper, "echo $$").await.trim(), "1");
}

//! Fork, reap and keep.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, SystemTime};

use sandbox_parent::client::{Parent, PodNamespaces, Spawn, SpawnOptions};
use sandbox_parent::protocol::stage;
use support::{Daemon, Home, shell, until};

fn pipe() -> (std::fs::File, OwnedFd) {
    let (r, w) = std::io::pipe().unwrap();
    (OwnedFd::from(r).into(), w.into())
}

/// Output and exit status of a script.
fn output(daemon: &Daemon, script: &str, options: &SpawnOptions<'_>) -> (String, u32) {
    let (mut r, w) = pipe();
    let cookie = Parent::new_cookie();
    let mut command = shell(script, cookie);
    command.fds = vec![None, Some(w.as_fd()), None];
    daemon.run(daemon.parent.spawn_with(command, options)).unwrap();
    drop(w);
    let mut text = String::new();
    r.read_to_string(&mut text).unwrap();
    let exit = daemon.run(daemon.parent.exit_of(cookie)).unwrap();
    daemon.run(daemon.parent.acknowledge(cookie));
    (text, exit.status)
}

#[test]
fn a_program_runs_with_its_descriptors_and_its_exit_is_reported() {
    let home = Home::new();
    let daemon = home.daemon();
    assert!(daemon.fresh);
    let plain = SpawnOptions::default();
    assert_eq!(output(&daemon, "echo hello; exit 7", &plain), ("hello\n".into(), 7));
    assert_eq!(output(&daemon, "pwd; umask; ls /proc/self/fd | wc -l", &plain).0, "/\n0022\n4\n");
    let (text, _) = output(&daemon, "cat /proc/self/status", &plain);
    assert!(text.contains("SigBlk:\t0000000000000000"), "{text}");
    assert!(text.contains("SigIgn:\t0000000000000000"), "{text}");
    let options = SpawnOptions {
        cwd: Some("/tmp"),
        umask: Some(0o077),
        rlimits: vec![(7, 64, 64)],
        ..SpawnOptions::default()
    };
    assert_eq!(output(&daemon, "pwd; umask; ulimit -n", &options).0, "/tmp\n0077\n64\n");
    let cookie = Parent::new_cookie();
    let spawned = daemon.run(daemon.parent.spawn(shell("kill -9 $$", cookie))).unwrap();
    let exit = daemon.run(daemon.parent.exit_of(cookie)).unwrap();
    assert_eq!((exit.status, exit.signal), (137, Some(9)));
    assert!(exit.at.elapsed().unwrap() < Duration::from_secs(10));
    assert!(spawned.pid > 1 && spawned.pidfd.as_raw_fd() > 2);
    daemon.run(daemon.parent.acknowledge(cookie));
    assert!(daemon.run(daemon.parent.watched()).unwrap().is_empty());
}

#[test]
fn a_program_that_cannot_run_says_at_which_step() {
    let home = Home::new();
    let daemon = home.daemon();
    let fail = |path: &str, options: SpawnOptions<'_>| {
        let command = Spawn { argv: vec![path.into()], env: vec![], fds: vec![None], cookie: 5 };
        daemon.run(daemon.parent.spawn_with(command, &options)).unwrap_err().failure().unwrap()
    };
    assert_eq!(fail("/no/such", SpawnOptions::default()), (libc::ENOENT, stage::EXEC));
    assert_eq!(fail("/etc", SpawnOptions::default()), (libc::EACCES, stage::EXEC));
    let options = SpawnOptions { cwd: Some("/no/such"), ..SpawnOptions::default() };
    assert_eq!(fail("/bin/true", options), (libc::ENOENT, stage::CWD));
    let options = SpawnOptions { rlimits: vec![(200, 1, 1)], ..SpawnOptions::default() };
    assert_eq!(fail("/bin/true", options), (libc::EINVAL, stage::RLIMIT));
    let (_r, w) = pipe();
    let (r, _w) = pipe();
    drop(w);
    let options = SpawnOptions { cgroups: vec![r.as_fd()], ..SpawnOptions::default() };
    assert_eq!(fail("/bin/true", options), (libc::EBADF, stage::CGROUP));
    assert!(daemon.run(daemon.parent.watched()).unwrap().is_empty());
}

#[test]
fn what_a_program_leaves_behind_is_watched_even_if_it_has_ended() {
    let home = Home::new();
    let daemon = home.daemon();
    for (script, expected) in
        [("(exit 3) & echo $!; sleep 0.2", 3), ("(sleep 0.3; exit 4) & echo $!", 4)]
    {
        // The engine must not reap its child: `exec` leaves the shell without a wait.
        let script = format!("{script}; exec sleep 0.1");
        let (mut r, w) = pipe();
        let engine = Parent::new_cookie();
        let mut command = shell(&script, engine);
        command.fds = vec![None, Some(w.as_fd()), None];
        let spawned = daemon.run(daemon.parent.spawn(command)).unwrap();
        drop(w);
        daemon.run(daemon.parent.exit_of(engine)).unwrap();
        let mut pid = String::new();
        r.read_to_string(&mut pid).unwrap();
        let cookie = Parent::new_cookie();
        let pid = pid.trim().parse().unwrap();
        daemon.run(daemon.parent.watch(pid, spawned.since, cookie)).unwrap();
        let status = daemon.run(daemon.parent.exit_of(cookie)).unwrap().status;
        // A shell may have reaped the first one itself, and then nobody knows.
        assert!(status == expected || (expected == 3 && status == 255), "{status}");
    }
}

#[test]
fn a_process_of_somebody_else_is_watched_without_its_status() {
    let home = Home::new();
    let daemon = home.daemon();
    let mut child = std::process::Command::new("/bin/sleep").arg("100").spawn().unwrap();
    let cookie = Parent::new_cookie();
    daemon.run(daemon.parent.watch(child.id(), 0, cookie)).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let exit = daemon.run(daemon.parent.exit_of(cookie)).unwrap();
    assert_eq!((exit.status, exit.signal), (255, None));
    // One that does not exist at all has ended as well.
    let cookie = Parent::new_cookie();
    daemon.run(daemon.parent.watch(child.id(), 0, cookie)).unwrap();
    assert_eq!(daemon.run(daemon.parent.exit_of(cookie)).unwrap().status, 255);
}

#[test]
fn exits_and_descriptors_survive_the_daemon() {
    let home = Home::new();
    let first = home.daemon();
    let cookie = Parent::new_cookie();
    let begun = SystemTime::now();
    first.run(first.parent.spawn(shell("sleep 0.2; exit 9", cookie))).unwrap();
    let (mut r, w) = pipe();
    first.run(async {
        for i in 0..1000 {
            first.parent.keep(&format!("pod{}/ns/{i}", i % 10), w.as_fd()).await.unwrap();
        }
    });
    drop(w);
    let pid = first.parent.pid();
    first.kill();
    std::thread::sleep(Duration::from_millis(400));

    let second = home.daemon();
    assert!(!second.fresh);
    assert_eq!(second.parent.pid(), pid);
    assert_eq!(second.run(second.parent.watched()).unwrap(), [cookie]);
    let exit = second.run(second.parent.exit_of(cookie)).unwrap();
    assert_eq!(exit.status, 9);
    assert!(exit.at > begun && exit.at < SystemTime::now() - Duration::from_millis(100));
    // Once more, and not after it has been acknowledged.
    second.kill();
    let third = home.daemon();
    assert_eq!(third.run(third.parent.exit_of(cookie)).unwrap(), exit);
    third.run(third.parent.acknowledge(cookie));

    let mut names = third.run(third.parent.kept()).unwrap();
    assert_eq!(names.len(), 1000);
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 1000);
    let w = third.run(third.parent.fetch("pod3/ns/13")).unwrap().unwrap();
    std::io::Write::write_all(&mut std::fs::File::from(w), b"x").unwrap();
    assert!(third.run(third.parent.fetch("pod3/ns/1")).unwrap().is_none());
    third.run(third.parent.forget("pod3/ns/13")).unwrap();
    assert!(third.run(third.parent.fetch("pod3/ns/13")).unwrap().is_none());
    third.run(third.parent.forget("pod3/")).unwrap();
    assert_eq!(third.run(third.parent.status()).unwrap().kept, 900);
    assert!(third.run(third.parent.shutdown(false)).is_err());
    third.run(third.parent.forget("pod")).unwrap();
    let mut text = String::new();
    r.read_to_string(&mut text).unwrap();
    assert_eq!(text, "x");
    third.run(third.parent.shutdown(false)).unwrap();
    until("it ends", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn there_is_one_per_directory_and_the_newest_daemon_has_it() {
    let home = Home::new();
    let first = home.daemon();
    let second = home.daemon();
    assert_eq!(first.parent.pid(), second.parent.pid());
    assert!(first.run(first.parent.status()).is_err());
    assert!(second.run(second.parent.status()).is_ok());
    let again = std::process::Command::new(support::program()).arg(home.0.path()).output().unwrap();
    assert_eq!(again.status.code(), Some(1));
    let text = String::from_utf8_lossy(&again.stderr);
    assert!(text.contains("another sandbox-parent serves"), "{text}");
    let mode = |name: &str| {
        use std::os::unix::fs::PermissionsExt;
        home.0.path().join(name).metadata().unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode("parent.sock") & 0o077, 0);
    assert_eq!(mode("parent.lock"), 0o600);
}

#[test]
fn no_message_makes_it_stumble() {
    use nix::sys::socket::{MsgFlags, UnixAddr, connect, send, socket};
    let home = Home::new();
    let daemon = home.daemon();
    let address = UnixAddr::new(&home.0.path().join("parent.sock")).unwrap();
    let dial = || {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType};
        let s = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
        let s = s.unwrap();
        connect(s.as_raw_fd(), &address).unwrap();
        s
    };
    // One that only looks may not do anything, and does not disturb the daemon.
    let looks = dial();
    for op in 0..=255u8 {
        if op != 1 {
            for n in [1, 5, 9, 40] {
                let _ = send(looks.as_raw_fd(), &vec![op; n], MsgFlags::MSG_NOSIGNAL);
            }
        }
    }
    drop(looks);
    assert!(daemon.run(daemon.parent.status()).is_ok());
    let pid = daemon.parent.pid();
    daemon.kill();
    // A daemon gone mad: HELLO, then every operation with bodies of all kinds.
    let mut seed = 1u32;
    for round in 0..40 {
        let mad = dial();
        send(mad.as_raw_fd(), &[1, 0, 0, 0, 0, 1, 0, 0, 0], MsgFlags::MSG_NOSIGNAL).unwrap();
        for op in (2..=20u8).filter(|op| *op != 14) {
            let mut message = vec![op, 0, 0, 0, 0];
            for _ in 0..round * 3 {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let byte = (seed >> 24) as u8;
                // Small numbers are lengths and counts that nearly fit.
                message.push(if byte & 1 == 0 { byte >> 5 } else { byte });
            }
            if let (3, Some(flags)) = (op, message.get_mut(5)) {
                // No PID namespace: its init would outlive the test.
                *flags &= !4;
            }
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let _ = send(mad.as_raw_fd(), &message, flags);
        }
    }
    let daemon = home.daemon();
    assert_eq!(daemon.parent.pid(), pid);
    assert!(daemon.run(daemon.parent.status()).is_ok());
}

#[test]
fn a_pods_namespaces_live_without_a_process() {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: needs root");
        return;
    }
    let home = Home::new();
    let daemon = home.daemon();
    let made = daemon
        .run(daemon.parent.pod_namespaces(&PodNamespaces {
            id: "p",
            ipc: true,
            uts: Some("pod-host"),
            sysctls: vec![("kernel.shmmax", "12345678"), ("kernel/msgmax", "4096")],
            ..PodNamespaces::default()
        }))
        .unwrap();
    // Kept by the same request: they outlive a daemon that is killed right after it.
    assert!(made.kept);
    let mut kept = daemon.run(daemon.parent.kept()).unwrap();
    kept.sort();
    assert_eq!(kept, ["p/ns/ipc", "p/ns/uts"]);
    let (ipc, uts) = (made.ipc.unwrap(), made.uts.unwrap());
    assert!(made.init.is_none() && made.user.is_none());
    let (i, u) = (ipc.as_raw_fd(), uts.as_raw_fd());
    let me = std::process::id();
    let enter = format!("nsenter --ipc=/proc/{me}/fd/{i} --uts=/proc/{me}/fd/{u}");
    let script = format!("{enter} sh -c 'hostname; cat /proc/sys/kernel/shmmax'");
    let (text, status) = output(&daemon, &script, &SpawnOptions::default());
    assert_eq!((text.as_str(), status), ("pod-host\n12345678\n", 0));

    let refuse = |key: &str, ipc: bool| {
        let sysctls = vec![("kernel.shmmni", "100"), (key, "1")];
        let sysctls = if ipc { sysctls } else { sysctls[1..].to_vec() };
        let q = PodNamespaces { id: "p", ipc, sysctls, ..PodNamespaces::default() };
        daemon.run(daemon.parent.pod_namespaces(&q)).unwrap_err().failure().unwrap()
    };
    assert_eq!(refuse("kernel.panic", true), (libc::EINVAL, stage::SYSCTL + 1));
    assert_eq!(refuse("kernel.shm/../panic", true).1, stage::SYSCTL + 1);
    assert_eq!(refuse("kernel/shm/../panic", true), (libc::EINVAL, stage::SYSCTL + 1));
    assert_eq!(refuse("net.ipv4.ip_forward", true), (libc::EPERM, stage::SYSCTL + 1));
    assert_eq!(refuse("kernel.shmmax", false), (libc::EPERM, stage::SYSCTL));
}

#[test]
fn the_init_of_a_shared_pid_namespace_reaps_and_ends_when_told() {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: needs root");
        return;
    }
    let home = Home::new();
    let daemon = home.daemon();
    let id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    let q = PodNamespaces { id, ipc: true, uts: Some("h"), pid: true, ..PodNamespaces::default() };
    let made = daemon.run(daemon.parent.pod_namespaces(&q)).unwrap();
    let (init, _pidfd) = made.init.unwrap();
    let mut kept = daemon.run(daemon.parent.kept()).unwrap();
    kept.sort();
    assert_eq!(kept, ["init", "ipc", "pid", "uts"].map(|name| format!("{id}/ns/{name}")));
    let space = daemon.run(daemon.parent.fetch(&kept[2])).unwrap().unwrap();
    let same = |path: String| std::fs::metadata(path).unwrap().ino();
    let held = format!("/proc/self/fd/{}", space.as_raw_fd());
    assert_eq!(same(held), same(format!("/proc/{init}/ns/pid")));
    let title = || std::fs::read(format!("/proc/{init}/cmdline")).unwrap_or_default();
    until("it has its title", || title().starts_with(format!("[sandbox-{id}]").as_bytes()));
    until("it holds no descriptor", || {
        std::fs::read_dir(format!("/proc/{init}/fd")).is_ok_and(|d| d.count() == 0)
    });
    // Orphans in the namespace are reaped by it.
    let script = format!(
        "nsenter -t {init} -p sh -c 'sh -c \"sleep 0.1 & \"; sleep 0.4'; ps --ppid {init} -o stat= | wc -l"
    );
    assert_eq!(output(&daemon, &script, &SpawnOptions::default()).0, "0\n");
    let cookie = Parent::new_cookie();
    daemon.run(daemon.parent.watch(init, 0, cookie)).unwrap();
    std::process::Command::new("kill").arg(init.to_string()).status().unwrap();
    assert_eq!(daemon.run(daemon.parent.exit_of(cookie)).unwrap().status, 0);
}

#[test]
fn a_new_one_starts_right_after_the_old_one_was_told_to_end() {
    let home = Home::new();
    let mut pids = Vec::new();
    for _ in 0..5 {
        let daemon = home.daemon();
        assert!(daemon.fresh);
        pids.push(daemon.parent.pid());
        daemon.run(daemon.parent.shutdown(false)).unwrap();
    }
    pids.dedup();
    assert_eq!(pids.len(), 5);
}

#[test]
fn a_program_that_is_not_there_is_named_in_the_error() {
    let dir = tempfile::tempdir().unwrap();
    let options = sandbox_parent::client::ParentOptions::new(dir.path(), "/no/sandbox-parent");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let error = runtime.block_on(Parent::connect_or_spawn(&options)).unwrap_err();
    assert_eq!(error.to_string(), "cannot start /no/sandbox-parent");
}

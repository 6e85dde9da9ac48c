//! The debug console: programs beside the containers, in guests whose kernels were told of it.

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kuasar_tests::cri::*;
use kuasar_tests::{bed, leaks, ours, wait_for};

use crate::ctl::{arguments, code, ctl_on, err, out, spawn};
use crate::vmm::{HANDLER, Settings, machine_dirs};

const SOON: Duration = Duration::from_secs(60);

/// `kuasar-ctl` with this input; its exit code and output.
fn fed(args: &[&str], input: &str) -> (i32, String) {
    let mut child = spawn(&["vmm"], args);
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let ended = child.wait_with_output().unwrap();
    (code(&ended), out(&ended) + &err(&ended))
}

/// One command in the guest.
fn sh(pod: &Pod, line: &str) -> String {
    let (code, said) = fed(&["debug", &pod.id], &format!("{line}\n"));
    assert_eq!(code, 0, "{line}: {said}");
    said
}

/// `kuasar-ctl debug` on a terminal of ours.
struct Terminal {
    child: Child,
    master: OwnedFd,
    said: String,
}

impl Terminal {
    fn new(pod: &Pod) -> Self {
        let pty = nix::pty::openpty(Some(&window(80, 24)), None).unwrap();
        let ns = std::fs::read_to_string(bed().join("run/ns.pid")).unwrap();
        let mut command = Command::new("setsid");
        command.args(["-c", "nsenter", "-t", ns.trim(), "-n", "-m", "--"]);
        command.args(arguments(&["vmm"])).args(["debug", &pod.id]);
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        Self { child, master: pty.master, said: String::new() }
    }

    fn types(&self, text: &str) {
        assert_eq!(nix::unistd::write(&self.master, text.as_bytes()), Ok(text.len()));
    }

    /// Waits until it shows these words, and forgets what was before.
    fn shows(&mut self, words: &str) {
        let mut buffer = [0; 4096];
        wait_for(words, SOON, || {
            let mut fds = [nix::poll::PollFd::new(
                std::os::fd::AsFd::as_fd(&self.master),
                nix::poll::PollFlags::POLLIN,
            )];
            if nix::poll::poll(&mut fds, 1000_u16) == Ok(1) {
                let n = nix::unistd::read(&self.master, &mut buffer).unwrap_or(0);
                self.said.push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
            self.said.contains(words)
        });
        self.said.clear();
    }

    fn resize(&self, columns: u16, rows: u16) {
        let window = window(columns, rows);
        // SAFETY: the request reads the structure that it gets.
        let set =
            unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const window) };
        assert_eq!(set, 0);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn window(columns: u16, rows: u16) -> libc::winsize {
    libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn pod(name: &str) -> Pod {
    Pod::try_run(pod_config(name), HANDLER).unwrap()
}

fn sockets() -> Vec<std::path::PathBuf> {
    let is_ours = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.strip_prefix('d')
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let dirs = machine_dirs().into_iter();
    let all = dirs.flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten());
    all.map(|entry| entry.path()).filter(is_ours).collect()
}

/// Lines below `[guest]`: guests that boot from then on have a debug console.
pub(crate) fn console_on() -> String {
    let program = bed().join("src/busybox");
    format!("debug_console = true\ndebug_program = \"{}\"\n", program.display())
}

/// What is in the guest of sessions, this one's included.
fn left(pod: &Pod) -> usize {
    sh(pod, "ls -d /sys/fs/cgroup/debug-* /run/kuasar/files/.debug-*").lines().count()
}

/// The debug console of a pod works, whatever machine and channel it has, and leaves nothing.
pub(crate) fn works(pod: &Pod) {
    // Nothing but what the program says: a script can use it.
    assert_eq!(sh(pod, "cat /proc/1/comm; (exit 3); echo $?"), "init\n3\n");
    let numbers: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    let written = sh(pod, "awk 'BEGIN { while (i++ < 20000) print i }'");
    assert!(written == numbers, "{} of {}: {written:.80}", written.len(), numbers.len());
    let (status, said) = fed(&["debug", &pod.id, "sh", "-c", "wc -c"], &"x".repeat(100_000));
    assert_eq!((status, said.trim()), (0, "100000"));
    // Root's alone, and gone with its one connection.
    assert_eq!(sockets(), Vec::<std::path::PathBuf>::new());

    let mut terminal = Terminal::new(pod);
    terminal.types("stty size\n");
    terminal.shows("24 80");
    terminal.resize(99, 33);
    // It comes by another way than what is typed.
    let line = "until [ \"$(stty size)\" = '33 99' ]; do sleep 0.1; done; echo lar''ge\n";
    terminal.types(line);
    terminal.shows("large");
    // A second one beside it sees it, and neither sees more after its end than before.
    assert_eq!(left(pod), 4);
    terminal.types("sleep 5432 &\n");
    wait_for("it runs", SOON, || sh(pod, "ps").contains("sleep 5432"));
    drop(terminal);
    wait_for("it has ended with its terminal", SOON, || !sh(pod, "ps").contains("sleep 5432"));
    wait_for("nothing of it is left", SOON, || left(pod) == 2);
}

#[test]
fn a_guest_has_a_debug_console_where_its_boot_allowed_it_and_nowhere_else() {
    let Some(off) = Settings::with(|text| text.to_owned()) else { return };
    let before = leaks::snapshot();
    // Off is the default, and said with the key.
    let older = pod("debug-older");
    let refused = |pod: &Pod| {
        let (code, said) = fed(&["debug", &pod.id], "uname\n");
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("guest.debug_console = true"), "{said}");
    };
    refused(&older);
    drop(off);
    let settings = Settings::with(|text| format!("{text}\n[guest]\n{}", console_on())).unwrap();
    // What was booted without stays without: its own agent refuses.
    refused(&older);
    let o = ctl_on(&["vmm"], &["debug", "no-such-pod"]);
    assert_eq!(code(&o), 4, "{}", err(&o));

    let pod = pod("debug-on");
    let c = pod.start(&["sleep", "4321"]);
    works(&pod);
    let release = c.sh("uname -r");
    assert_eq!(sh(&pod, "uname -r; exit; echo never"), format!("{release}\n"));
    assert!(sh(&pod, "ps").contains("sleep 4321"), "it does not see the container's process");
    // A container does not see it, nor its files.
    assert_eq!(c.sh("ls /run/kuasar 2>/dev/null | wc -l"), "0");
    assert!(sh(&pod, "ps").contains("sleep 4321"));
    let o = ctl_on(&["vmm"], &["stop", &pod.id]);
    assert_eq!(code(&o), 0, "{}", err(&o));
    let (status, said) = fed(&["debug", &pod.id], "");
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("is not running"), "{said}");
    for pod in [pod, older] {
        pod.remove().unwrap();
    }
    drop(settings);
    leaks::assert_none(&before);
}

#[test]
fn sandboxes_that_are_no_machines_have_no_debug_console() {
    if !ours() {
        return;
    }
    let pod = Pod::run(pod_config("debug-runc"));
    let said = ctl_on(&["runc"], &["debug", &pod.id]);
    assert_eq!(code(&said), 1, "{}", out(&said));
    assert!(err(&said).contains("only machines of vmm-sandboxer have one"), "{}", err(&said));
}

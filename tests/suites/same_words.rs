//! Bad input of an operator: `kuasar-ctl check` and the daemon say the same, on one line, with the
//! remedy. Each test breaks one thing on a node of its own, which has directories and daemons but no
//! engine, and compares both outputs.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kuasar_tests::cri::unique;
use kuasar_tests::{bed, programs, skip, wait_for};
use serde_json::Value;

/// Configurations, state directories and a `containerd` that only says its version.
struct Node(PathBuf);

impl Node {
    fn new() -> Self {
        let dir = bed().join(format!("run/node-{}", unique()));
        std::fs::create_dir_all(dir.join("etc")).unwrap();
        std::fs::create_dir_all(dir.join("bin")).unwrap();
        Self(dir).with_containerd("2.1.9")
    }

    fn with_containerd(self, version: &str) -> Self {
        let program = self.0.join("bin/containerd");
        let text =
            format!("#!/bin/sh\necho containerd github.com/containerd/containerd {version}\n");
        std::fs::write(&program, text).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        self
    }

    fn file(&self, kind: &str) -> PathBuf {
        self.0.join(format!("etc/{kind}-sandboxer.toml"))
    }

    fn state(&self, kind: &str) -> PathBuf {
        self.0.join(kind)
    }

    /// A good configuration of this kind, and `more`.
    fn configure(&self, kind: &str, more: &str) {
        let dir = self.0.display();
        let text = format!("dir = \"{dir}/{kind}\"\nevents_address = \"{dir}/events\"\n{more}\n");
        std::fs::write(self.file(kind), text).unwrap();
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(programs().join(program));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.0.join("bin").display()));
        command
    }

    /// The lines of `check` that say so, and what it shows people.
    fn check(&self, words: &str) -> String {
        let check = |more: &[&str]| {
            let mut command = self.command("kuasar-ctl");
            command.arg("--config-dir").arg(self.0.join("etc")).args(more);
            let said = command.args(["check", "--containerd-config", "/nowhere"]).output().unwrap();
            String::from_utf8(said.stdout).unwrap()
        };
        let all: Value = serde_json::from_str(&check(&["-o", "json"])).unwrap();
        let text =
            |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
        let found = all.as_array().unwrap().iter().find(|f| text(f, "detail").contains(words));
        let found = found.unwrap_or_else(|| panic!("check does not say {words:?}: {all:#}"));
        assert!(matches!(found["state"].as_str(), Some("bad" | "warning")), "{found}");
        let line = match text(found, "remedy") {
            remedy if remedy.is_empty() => text(found, "detail"),
            remedy => format!("{}: {remedy}", text(found, "detail")),
        };
        let shown = check(&[]);
        assert!(shown.lines().any(|l| l.ends_with(&line)), "not on one line: {line}\n{shown}");
        line
    }

    fn start(&self, kind: &str) -> Daemon {
        let program = format!("{kind}-sandboxer");
        let mut command = self.command(&program);
        let file = self.file(kind);
        let how = command.arg("--config").arg(&file).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = how.stdout(Stdio::null()).spawn().unwrap();
        let (said, lines) = (Arc::<Mutex<Vec<String>>>::default(), child.stderr.take().unwrap());
        let to = said.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(lines).lines().map_while(Result::ok) {
                to.lock().unwrap().push(line);
            }
        });
        Daemon { child, said, program: programs().join(program), file }
    }

    /// Check and daemon are asked; the daemon is to say the line of `check` as a part of one of its own.
    fn same(&self, kind: &str, words: &str) {
        let line = self.check(words);
        self.start(kind).says(&line);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Ended with its sandbox-parent when dropped.
struct Daemon {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
    program: PathBuf,
    file: PathBuf,
}

impl Daemon {
    fn says(&self, words: &str) {
        let said = || self.said.lock().unwrap().iter().any(|line| line.contains(words));
        let until = std::time::Instant::now() + Duration::from_secs(30);
        while !said() {
            let all = self.said.lock().unwrap().join("\n");
            assert!(std::time::Instant::now() < until, "{words:?} was not said:\n{all}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // SAFETY: a process of ours that was not waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let _ = self.child.wait();
        // Where the configuration is no configuration, there is no sandbox-parent either.
        let mut end = Command::new(&self.program);
        let _ = end.arg("--config").arg(&self.file).args(["shutdown-parent", "--force"]).output();
    }
}

#[test]
fn a_misspelt_and_an_unknown_key_are_named_by_both() {
    for kind in ["runc", "vmm", "gvisor", "quark", "wasm"] {
        let node = Node::new();
        node.configure(kind, "log_levl = \"info\"");
        node.same(kind, "unknown key `log_levl`: did you mean `log_level`?");
        node.configure(kind, "[limits]\nquite_unlike_all_others = 1");
        node.same(kind, "unknown key `quite_unlike_all_others`: no key is like it: remove it");
        // In a drop-in, too, with its line.
        node.configure(kind, "");
        let drop_ins = node.0.join(format!("etc/{kind}-sandboxer.toml.d"));
        std::fs::create_dir_all(&drop_ins).unwrap();
        std::fs::write(drop_ins.join("10.toml"), "\n\nallowed_uid = [1]\n").unwrap();
        node.same(kind, "10.toml:3: unknown key `allowed_uid`: did you mean `allowed_uids`?");
    }
}

#[test]
fn a_configuration_of_upstream_is_sent_to_migrate_by_both() {
    let upstream = "[sandbox]\nlog_level = 'info'\nenable_tracing = false\n[hypervisor]\n\
        path = '/usr/local/bin/cloud-hypervisor'\nvcpus = 2\nentropy_source = '/dev/urandom'\n";
    let node = Node::new();
    std::fs::write(node.file("vmm"), upstream).unwrap();
    let migrate = format!("kuasar-ctl config migrate {}", node.file("vmm").display());
    node.same("vmm", &migrate);
    // What the line says works, and names the keys that mean nothing here.
    let mut command = node.command("kuasar-ctl");
    let said = command.args(["config", "migrate"]).arg(node.file("vmm")).output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let text = String::from_utf8(said.stdout).unwrap();
    assert!(text.contains("hypervisor.entropy_source") && text.contains("sandbox.enable_tracing"));
}

#[test]
fn wrong_permissions_are_told_by_both() {
    let node = Node::new();
    node.configure("runc", "");
    let state = node.state("runc");
    std::fs::create_dir(&state).unwrap();
    std::fs::set_permissions(&state, PermissionsExt::from_mode(0o755)).unwrap();
    node.same("runc", "mode 0755: others get in");
    // The daemon has mended it, as it says.
    assert_eq!(std::fs::metadata(&state).unwrap().permissions().mode() & 0o777, 0o700);
    chown(&state, Some(65534), None).unwrap();
    node.same("runc", "belongs to user 65534");
}

#[test]
fn two_daemons_on_one_socket_are_told_by_both() {
    let node = Node::new();
    node.configure("runc", "");
    let mut first = node.start("runc");
    first.says("ready");
    // Both are configured, and one of them runs.
    let socket = node.state("runc").join("sandboxer.sock");
    node.configure("quark", &format!("listen = \"{}\"", socket.display()));
    node.same("quark", &format!("another daemon serves {}", socket.display()));
    // The other's configuration is somewhere else.
    std::fs::rename(node.file("runc"), node.0.join("away.toml")).unwrap();
    node.same("quark", &format!("another daemon serves {}", socket.display()));
    assert!(first.child.try_wait().unwrap().is_none(), "the first goes on");
}

#[test]
fn two_daemons_on_one_directory_are_told_by_both() {
    let node = Node::new();
    node.configure("runc", "");
    let mut first = node.start("runc");
    first.says("ready");
    let text = std::fs::read_to_string(node.file("runc")).unwrap();
    std::fs::write(node.file("quark"), format!("{text}\nlisten = \"{}/q\"", node.0.display()))
        .unwrap();
    let line = node.check(&format!("another daemon uses {}", node.state("runc").display()));
    let mut second = node.start("quark");
    second.says(&line);
    wait_for("it ends", Duration::from_secs(10), || second.child.try_wait().unwrap().is_some());
    // Its directory is the first one's: nothing there is to be ended with it.
    second.file = PathBuf::from("/nowhere");
    assert!(first.child.try_wait().unwrap().is_none(), "the first goes on");
}

#[test]
fn a_containerd_that_is_too_old_is_told_by_both() {
    let node = Node::new().with_containerd("1.6.20~ds1");
    node.configure("runc", "");
    node.same("runc", "containerd 1.6.20~ds1 is older than 1.7 and not supported");
    let node = node.with_containerd("1.7.24~ds1");
    node.same("runc", "containerd 1.7.24~ds1 is without sandboxers");
}

#[test]
fn a_kernel_image_that_cannot_be_read_is_told_by_both() {
    if !programs().join("vmm-sandboxer").exists() {
        return skip("no vmm-sandboxer to give a kernel image to");
    }
    let node = Node::new();
    let kernel = node.0.join("vmlinux");
    let given = |path: &Path| {
        node.configure("vmm", &format!("[guest]\nkernel = \"{}\"", path.display()));
    };
    given(&kernel);
    node.same("vmm", &format!("guest.kernel: {} is no file", kernel.display()));
    std::fs::write(&kernel, "<html>404</html>").unwrap();
    node.same("vmm", &format!("guest.kernel: {} is neither vmlinux", kernel.display()));
    given(&node.0);
    node.same("vmm", &format!("guest.kernel: {} is no file", node.0.display()));
}

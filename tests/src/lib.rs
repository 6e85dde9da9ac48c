//! Harness of the end-to-end suites and of the benchmark: a CRI client, pods and containers as
//! values, and the switch of the test bed (`tests/bed/bed.sh`).
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)] // test code: a failure is to stop the test at its place

pub mod collector;
pub mod cri;
pub mod leaks;
pub mod settings;
pub mod wasm;
pub mod wire;

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// The checkout.
pub fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Where the test bed is.
pub fn bed() -> PathBuf {
    std::env::var_os("BED").map_or_else(|| top().join("target/bed"), PathBuf::from)
}

/// Where the programs under test are.
pub fn programs() -> PathBuf {
    std::env::var_os("KUASAR_BIN_DIR").map_or_else(|| top().join("target/release"), PathBuf::from)
}

/// Whether a process that runs this program is of this bed. Others may be up on this machine, of this
/// checkout too: each has its own programs.
pub fn is_ours(program: &std::path::Path) -> bool {
    program.starts_with(bed()) || program.starts_with(programs())
}

/// The handler of tests that choose one, see [`on`].
static CHOSEN: std::sync::Mutex<Option<String>> = std::sync::Mutex::new(None);

/// Until it is dropped, [`handler`] is the one that was chosen.
#[must_use]
pub struct Chosen(());

impl Drop for Chosen {
    fn drop(&mut self) {
        *CHOSEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    }
}

/// Puts another handler under test; `None` and a note where its sandboxer is not in the bed.
/// Suites run one test at a time.
pub fn on(handler: &str) -> Option<Chosen> {
    *CHOSEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(handler.to_owned());
    let chosen = Chosen(());
    if !bed().join(format!("run/kuasar-{}.sock", kind())).exists() {
        skip(&format!("no {}-sandboxer in the test bed: its engine does not run here", kind()));
        return None;
    }
    Some(chosen)
}

/// The sandboxer under test: `runc`, `gvisor`, `quark`, `vmm` or `wasm`.
pub fn kind() -> &'static str {
    let handler = handler();
    let named = |kind: &&str| handler.starts_with(&format!("kuasar-{kind}"));
    ["gvisor", "quark", "vmm", "wasm"].into_iter().find(named).unwrap_or("runc")
}

/// Runtime handler under test.
pub fn handler() -> String {
    if let Some(chosen) = &*CHOSEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return chosen.clone();
    }
    std::env::var("KUASAR_HANDLER").unwrap_or_else(|_| "kuasar-runc".into())
}

/// Runs `tests/bed/bed.sh` with arguments; panics when it fails.
pub fn switch(args: &[&str], env: &[(&str, &str)]) {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("bed/bed.sh");
    let out = Command::new(script)
        .args(args)
        .env("KIND", kind())
        .envs(env.iter().copied())
        .output()
        .unwrap();
    assert!(out.status.success(), "bed.sh {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// The root directory as the bed's mount namespace has it.
pub fn root() -> PathBuf {
    let ns = std::fs::read_to_string(bed().join("run/ns.pid")).unwrap();
    PathBuf::from(format!("/proc/{}/root", ns.trim()))
}

/// Whether kuasar-runc is under test; else notes that the test is not for stock runc.
pub fn ours() -> bool {
    if handler() == "runc" {
        skip("a matter of kuasar-runc");
        return false;
    }
    true
}

/// A command inside the bed's namespaces.
pub fn inside(args: &[&str]) -> Output {
    let ns = std::fs::read_to_string(bed().join("run/ns.pid")).unwrap();
    Command::new("nsenter")
        .args(["-t", ns.trim(), "-n", "-m", "--"])
        .args(args)
        .env("CRI_CONFIG_FILE", bed().join("etc/crictl.yaml"))
        .output()
        .unwrap()
}

/// Waits until `ok` answers true; panics after the deadline.
pub fn wait_for(what: &str, deadline: Duration, mut ok: impl FnMut() -> bool) {
    let until = Instant::now() + deadline;
    while !ok() {
        assert!(Instant::now() < until, "not within {deadline:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Pid of the daemon under test.
pub fn daemon_pid() -> u32 {
    let name =
        if kind() == "runc" { "daemon.pid".into() } else { format!("daemon-{}.pid", kind()) };
    std::fs::read_to_string(bed().join("run").join(name)).unwrap().trim().parse().unwrap()
}

/// Notes a test that cannot run here: printed, and counted by `tests/run.sh`.
pub fn skip(reason: &str) {
    println!("skipped: {reason}");
    let path = bed().join("run/skipped");
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    std::fs::write(path, format!("{old}{reason}\n")).unwrap();
}

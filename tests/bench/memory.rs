//! Weighs what runs beside the containers: proportional set size, from `/proc/PID/smaps_rollup`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use kuasar_tests::{bed, daemon_pid, programs};

/// Kibibytes and number of processes, by the name of the program.
pub struct Weight(BTreeMap<String, (u64, usize)>);

impl Weight {
    pub fn total(&self) -> u64 {
        self.0.values().map(|(kib, _)| kib).sum()
    }

    fn add(&mut self, name: &str, pid: u32) {
        let entry = self.0.entry(name.to_owned()).or_default();
        entry.0 += pss(pid);
        entry.1 += 1;
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB", self.total())?;
        for (name, (kib, processes)) in &self.0 {
            write!(f, ", {name} × {processes}: {kib} KiB")?;
        }
        Ok(())
    }
}

fn pss(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("Pss:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn processes() -> Vec<u32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

fn arguments(pid: u32) -> String {
    let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&text).replace('\0', " ")
}

fn parent_of(pid: u32) -> u32 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    after.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// The shims of this bed's containerd, and the pause processes below them.
pub fn stock() -> Weight {
    let mut weight = Weight(BTreeMap::new());
    let all = processes();
    let shims = shims();
    for shim in &shims {
        weight.add("shim", *shim);
    }
    for pid in all.iter().filter(|p| shims.contains(&parent_of(**p))) {
        if arguments(*pid).starts_with("/pause") {
            weight.add("pause", *pid);
        }
    }
    weight
}

/// The shims of this bed's containerd.
pub fn shims() -> Vec<u32> {
    let socket = bed().join("run/containerd.sock");
    let socket = socket.to_string_lossy();
    let shim = |p: &u32| {
        let text = arguments(*p);
        text.contains("containerd-shim-runc-v2") && text.contains(&*socket)
    };
    processes().into_iter().filter(shim).collect()
}

/// Directories of which a process holds this lock file.
fn locked(pid: u32, lock: &str) -> Option<PathBuf> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let mut links = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    links.find(|link| link.ends_with(lock))?.parent().map(Path::to_owned)
}

/// The daemon, its sandbox-parent, and everything else that runs one of our programs; not the
/// daemons of other kinds that the bed runs, nor theirs.
pub fn ours() -> Weight {
    let mut weight = Weight(BTreeMap::new());
    for (name, pid) in our_processes() {
        weight.add(&name, pid);
    }
    weight
}

/// The same processes, each with the name of its program.
pub fn our_processes() -> Vec<(String, u32)> {
    let daemon = daemon_pid();
    let mut all = vec![("daemon".to_owned(), daemon)];
    let (home, dir) = (programs(), locked(daemon, "daemon.lock"));
    assert!(dir.is_some(), "the daemon {daemon} holds no lock of its directory");
    for pid in processes() {
        let Ok(exe) = std::fs::read_link(format!("/proc/{pid}/exe")) else { continue };
        let own = std::process::id();
        let others = locked(pid, "daemon.lock").or_else(|| locked(pid, "parent.lock"));
        let ours = exe.starts_with(&home) && (others.is_none() || others == dir);
        if pid != daemon && pid != own && ours {
            let name = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
            all.push((name, pid));
        }
    }
    all
}

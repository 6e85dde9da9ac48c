//! Control groups, v1, hybrid and v2.
//!
//! A [`Layout`] says where the hierarchies are mounted; a [`Cgroup`] is one path in all of them.
//! The engine makes a container's group and writes its first limits; this module reads, updates,
//! freezes, kills and removes. A controller that the host lacks is skipped, never an error.

mod devices;
mod layout;
mod oom;
mod stats;
mod update;
mod wait;
mod warm;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::{Context, Error, Result};

pub use devices::Rule as DeviceRule;
pub use layout::{Layout, expand_systemd};
pub use oom::OomWatch;
pub use stats::{V1_TYPE, V2_TYPE};
pub use warm::Warmer;

/// One group, in every hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup {
    layout: Layout,
    path: PathBuf,
}

impl Cgroup {
    /// The group's directory for a controller (v2: the one directory).
    fn dir(&self, controller: &str) -> Option<PathBuf> {
        match &self.layout {
            Layout::V1(c) => c.get(controller).map(|m| m.join(&self.path)),
            Layout::V2(m) => Some(m.join(&self.path)),
        }
    }

    /// The group's directory in every hierarchy, each once; they need not exist.
    pub fn dirs(&self) -> Vec<PathBuf> {
        let mut dirs: Vec<PathBuf> = match &self.layout {
            Layout::V1(c) => c.values().map(|m| m.join(&self.path)).collect(),
            Layout::V2(m) => vec![m.join(&self.path)],
        };
        dirs.sort();
        dirs.dedup();
        dirs
    }

    /// The group at a cgroupfs path or systemd name, on this host's layout.
    ///
    /// # Errors
    /// As [`Layout::detect`] and [`Layout::group`].
    pub fn open(path: &str) -> Result<Self> {
        Layout::detect()?.group(path)
    }

    /// Path of the group below the roots of the hierarchies, without a leading slash.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the hierarchies are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Moves a process, with all its threads, into the group.
    ///
    /// # Errors
    /// [`Error::Io`], `ESRCH` when it has ended; [`Error::Invalid`] when the group does not exist.
    pub fn add_process(&self, pid: u32) -> Result<()> {
        let mut moved = false;
        for dir in self.dirs().iter().filter(|d| d.is_dir()) {
            write(dir, "cgroup.procs", &pid.to_string())?;
            moved = true;
        }
        if moved {
            return Ok(());
        }
        Err(Error::Invalid(format!("cgroup {} does not exist", self.path.display())))
    }

    /// The files by which a process of one thread enters the group when it writes `0` to them, one
    /// for each hierarchy in which the group exists.
    ///
    /// On v1 that is `tasks` and not `cgroup.procs`: a thread that moves itself need not wait for the
    /// grace period that any other move begins with (Linux 5.5; see [`Warmer`]).
    pub fn entrances(&self) -> Vec<PathBuf> {
        let name = self.layout.entrance();
        let dirs = self.dirs().into_iter().filter(|dir| dir.is_dir());
        dirs.map(|dir| dir.join(name)).collect()
    }

    /// This process, which has one thread, enters the group in every hierarchy: see
    /// [`Self::entrances`].
    ///
    /// # Errors
    /// [`Error::Io`] when it may not, or the group does not exist.
    pub fn enter(&self) -> Result<()> {
        let name = self.layout.entrance();
        self.dirs().iter().try_for_each(|dir| write(dir, name, "0"))
    }

    /// The group below this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self { layout: self.layout.clone(), path: self.path.join(name) }
    }

    /// Whether it exists in any hierarchy.
    pub fn exists(&self) -> bool {
        self.dirs().iter().any(|d| d.is_dir())
    }

    /// Makes the group in every hierarchy; answers whether it was made now.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(&self) -> Result<bool> {
        let mut made = false;
        for d in self.dirs() {
            // cpuset asks before it makes anything; for the others, making it is the question.
            let ask = matches!(&self.layout, Layout::V1(c)
                if c.get("cpuset").is_some_and(|m| d.starts_with(m)));
            if ask && d.is_dir() {
                continue;
            }
            let new = std::cell::Cell::new(true);
            let make = || {
                match fs::create_dir(&d) {
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                        new.set(false);
                        Ok(())
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        fs::create_dir_all(&d)
                    }
                    other => other,
                }
                .context(|| format!("cannot make {}", d.display()))
            };
            match &self.layout {
                Layout::V1(c) if c.get("cpuset").is_some_and(|m| d.starts_with(m)) => {
                    cloning(&d, make)?;
                    // A new cpuset that is empty takes no process until it has been filled.
                    self.inherit_cpuset(&d);
                }
                Layout::V1(_) => make()?,
                Layout::V2(root) => {
                    make()?;
                    if new.get() {
                        delegate(root, &self.path);
                    }
                }
            }
            made |= new.get();
        }
        Ok(made)
    }

    fn inherit_cpuset(&self, dir: &Path) {
        let Some(parent) = dir.parent() else { return };
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let empty =
                |p: &Path| fs::read_to_string(p.join(file)).is_ok_and(|t| t.trim().is_empty());
            // Mostly it has its parent's by now: see `cloning`.
            if !empty(dir) {
                continue;
            }
            if empty(parent) {
                self.inherit_cpuset(parent);
            }
            if let Ok(value) = fs::read(parent.join(file)) {
                // Best effort: without the controller there is nothing to fill.
                let _ = fs::write(dir.join(file), value);
            }
        }
    }

    fn process_dir(&self) -> Option<PathBuf> {
        ["pids", "memory", "cpu", "systemd", "freezer"].iter().find_map(|c| {
            let d = self.dir(c)?;
            d.is_dir().then_some(d)
        })
    }

    /// Pids of this group and those below it.
    ///
    /// # Errors
    /// [`Error::Io`]; a group that does not exist has none.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        if let Some(dir) = self.process_dir() {
            collect_pids(&dir, &mut pids)?;
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Freezes every process and waits until they stand, or `deadline` passes.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Deadline`] after the deadline (the group is thawed again).
    pub fn freeze(&self, deadline: Duration) -> Result<()> {
        let (file, value, state, frozen) = match self.layout {
            Layout::V1(_) => ("freezer.state", "FROZEN", "freezer.state", "FROZEN"),
            Layout::V2(_) => ("cgroup.freeze", "1", "cgroup.events", "frozen 1"),
        };
        let dir = self.need("freezer")?;
        let mut wait = wait::Wait::new(&dir.join(state), deadline);
        loop {
            // v1 may miss a process that is just being forked: write again until it holds.
            write(&dir, file, value)?;
            let text = fs::read_to_string(dir.join(state)).unwrap_or_default();
            if text.contains(frozen) {
                return Ok(());
            }
            if !wait.more() {
                self.thaw()?;
                let text = format!("{} did not freeze within {deadline:?}", self.path.display());
                return Err(Error::Deadline(text));
            }
        }
    }

    /// Lets frozen processes run again.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn thaw(&self) -> Result<()> {
        let dir = self.need("freezer")?;
        match self.layout {
            Layout::V1(_) => write(&dir, "freezer.state", "THAWED"),
            Layout::V2(_) => write(&dir, "cgroup.freeze", "0"),
        }
    }

    fn need(&self, controller: &str) -> Result<PathBuf> {
        self.dir(controller).filter(|d| d.is_dir()).ok_or_else(|| {
            Error::Invalid(format!(
                "cgroup {} has no {controller} controller on this host",
                self.path.display()
            ))
        })
    }

    /// Kills every process of the group and those below it, frozen ones too.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn kill(&self) -> Result<()> {
        self.signal_all(libc::SIGKILL)
    }

    /// Sends a signal to every process of the group and those below it, again until no new one
    /// appears. SIGKILL reaches also processes that fork all the time: v2 has a file for it; on v1
    /// the group is frozen meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        let kill = signal == libc::SIGKILL;
        if kill
            && let Layout::V2(m) = &self.layout
            && fs::write(m.join(&self.path).join("cgroup.kill"), "1").is_ok()
        {
            return Ok(());
        }
        let mut done = std::collections::BTreeSet::new();
        // Most groups are gone after the first rounds; the freezer is for those that are not.
        for round in 0..16 {
            let frozen = kill && round >= 2 && self.freeze(Duration::from_millis(500)).is_ok();
            let mut found = false;
            for pid in self.pids()? {
                // While the group stands still a pid cannot be reused: kill it again then.
                if done.insert(pid) || frozen {
                    found = true;
                    // SAFETY: kill takes integers; a process that has just ended is no error.
                    unsafe { libc::kill(pid as i32, signal) };
                }
            }
            if kill {
                // A frozen process dies only when it is thawed, and thawing a group does not
                // thaw one below it that was frozen by itself.
                if let Some(dir) = self.dir("freezer") {
                    thaw_tree(&dir);
                }
            }
            if !found || frozen {
                break;
            }
        }
        Ok(())
    }

    /// Waits until no process is in the group or below it; answers whether that came in time.
    ///
    /// # Errors
    /// [`Error::Io`] when a v1 group cannot be read.
    pub fn wait_empty(&self, deadline: Duration) -> Result<bool> {
        let v2 = match &self.layout {
            Layout::V1(_) => None,
            Layout::V2(_) => self.dirs().into_iter().next().map(|dir| dir.join("cgroup.events")),
        };
        let mut wait = wait::Wait::new(v2.as_deref().unwrap_or(Path::new("")), deadline);
        loop {
            let empty = match &v2 {
                // A group that is not there has nobody in it.
                Some(file) => !fs::read_to_string(file).is_ok_and(|t| t.contains("populated 1")),
                None => self.pids()?.is_empty(),
            };
            if empty || !wait.more() {
                return Ok(empty);
            }
        }
    }

    /// Removes the group and those below it, waiting up to `deadline` for processes to leave.
    ///
    /// # Errors
    /// [`Error::Io`] `EBUSY` when processes are still there.
    pub fn remove(&self, deadline: Duration) -> Result<()> {
        let until = Instant::now() + deadline;
        for dir in self.dirs() {
            let left = until.saturating_duration_since(Instant::now());
            let mut wait = None;
            loop {
                match remove_tree(&dir) {
                    Ok(()) => break,
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                        let events = || wait::Wait::new(&dir.join("cgroup.events"), left);
                        if !wait.get_or_insert_with(events).more() {
                            return Err(e).context(|| {
                                format!("{} still has processes after {deadline:?}", dir.display())
                            });
                        }
                    }
                    Err(e) => return Err(e).context(|| format!("cannot remove {}", dir.display())),
                }
            }
        }
        Ok(())
    }

    /// How many processes of the group the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.layout.is_v2() { "memory.events" } else { "memory.oom_control" };
        let text = self.dir("memory").and_then(|d| fs::read_to_string(d.join(file)).ok());
        text.and_then(|t| t.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok()))
            .unwrap_or(0)
    }
}

/// Makes a cpuset with the CPUs and memory nodes of its parent: the kernel copies them while
/// `cgroup.clone_children` is set. Written by us, afterwards, each would have the scheduler rebuild
/// its domains, which stops all CPUs.
fn cloning<T>(dir: &Path, make: impl FnOnce() -> Result<T>) -> Result<T> {
    let flag = dir.parent().map(|parent| parent.join("cgroup.clone_children"));
    // Best effort: without it, or when somebody else sets it back, the values are written.
    let set = flag.filter(|flag| {
        fs::read(flag).is_ok_and(|value| value.starts_with(b"0")) && fs::write(flag, "1").is_ok()
    });
    let made = make();
    if let Some(flag) = set {
        let _ = fs::write(flag, "0");
    }
    made
}

fn collect_pids(dir: &Path, pids: &mut Vec<u32>) -> Result<()> {
    match fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|l| l.trim().parse::<u32>().ok())),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound) => return Ok(()),
        // A threaded group has no process list of its own, and a group may go while we read.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV)) => {}
        Err(e) => return Err(e).context(|| format!("cannot read {}", dir.display())),
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect_pids(&entry.path(), pids)?;
        }
    }
    Ok(())
}

/// Thaws a v1 group and those below it, as far as they exist and are frozen.
fn thaw_tree(dir: &Path) {
    // Best effort: the group may go at any moment, and without a freezer nothing is frozen.
    let _ = fs::write(dir.join("freezer.state"), "THAWED");
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            thaw_tree(&entry.path());
        }
    }
}

fn remove_tree(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Hands every controller that the parents have down to the group at `path` (v2). A controller
/// that cannot be had (a parent with processes of its own, or not delegated) is done without.
fn delegate(root: &Path, path: &Path) {
    let mut dir = root.to_path_buf();
    for part in path.components() {
        let have = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
        let on = fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
        for c in have.split_whitespace().filter(|c| !on.split_whitespace().any(|o| o == *c)) {
            // One by one: a single one that is refused must not keep the others away.
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{c}"));
        }
        dir.push(part);
    }
}

fn write(dir: &Path, file: &str, value: &str) -> Result<()> {
    fs::write(dir.join(file), value)
        .context(|| format!("cannot write {value:?} to {}", dir.join(file).display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes, fills, freezes, kills, measures and removes a group of this host.
    #[test]
    fn the_life_of_a_group() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let path = format!("/kuasar-host-test-{}", std::process::id());
        let group = Cgroup::open(&path).unwrap();
        if let Err(e) = group.create() {
            eprintln!("skipped: cgroups are not writable here: {e}");
            return;
        }
        let inner = group.child("inner");
        inner.create().unwrap();
        let mut child = std::process::Command::new("sh")
            .args(["-c", "while :; do sleep 0.01 & wait; done"])
            .spawn()
            .unwrap();
        inner.add_process(child.id()).unwrap();
        assert!(group.pids().unwrap().contains(&child.id()));
        group
            .update(br#"{"memory":{"limit":104857600},"cpu":{"quota":50000,"period":100000}}"#)
            .unwrap();
        let deadline = Duration::from_secs(5);
        if inner.need("freezer").is_ok() {
            inner.freeze(deadline).unwrap();
        }
        assert!(group.remove(Duration::from_millis(20)).is_err());
        // Frozen processes are killed as well.
        group.kill().unwrap();
        child.wait().unwrap();
        group.remove(deadline).unwrap();
        assert!(!group.exists());
        group.remove(Duration::ZERO).unwrap();
    }
}

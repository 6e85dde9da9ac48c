//! What must be as it was when a suite ends.

use std::collections::BTreeSet;
use std::path::Path;

/// What exists of ours on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

fn walk(dir: &Path, prefix: &str, depth: usize, out: &mut BTreeSet<String>) {
    for e in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        out.insert(format!("{prefix} {}", e.path().display()));
        if depth > 0 && e.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&e.path(), prefix, depth - 1, out);
        }
    }
}

/// Takes a snapshot: processes that run a container or pod, mounts, network namespaces, cgroups,
/// state files and the number of descriptors of daemon and sandbox-parent.
pub fn snapshot() -> Snapshot {
    let mut all = BTreeSet::new();
    let root = crate::cri::cgroup_root();
    for e in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(text) = std::fs::read(e.path().join("cmdline")) else { continue };
        let text = String::from_utf8_lossy(&text).replace('\0', " ");
        let is_ours =
            std::fs::read_link(e.path().join("exe")).is_ok_and(|exe| crate::is_ours(&exe));
        if is_ours && text.starts_with("[sandbox-") && !text.starts_with("[sandbox-parent") {
            all.insert(format!("process {text}"));
        }
        if is_ours
            && (text.starts_with("runsc-")
                || text.contains("/runsc ")
                || text.contains("fake-quark"))
        {
            all.insert(format!("process {text}"));
        }
        let Ok(cgroup) = std::fs::read_to_string(e.path().join("cgroup")) else { continue };
        if cgroup.contains(&format!("/{root}/")) {
            all.insert(format!("process in a pod's cgroup: {text}"));
        }
    }
    let bed = crate::bed();
    let run = bed.join("run");
    let mounts = crate::inside(&["cat", "/proc/self/mounts"]).stdout;
    for line in String::from_utf8_lossy(&mounts).lines() {
        let at = line.split(' ').nth(1).unwrap_or_default();
        if at.starts_with(&*run.to_string_lossy())
            || at.starts_with("/run/netns/")
            || at.starts_with("/var/run/netns/")
        {
            all.insert(format!("mount {at}"));
        }
    }
    for dir in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        walk(&dir.path().join(&root), "cgroup", 3, &mut all);
        // Of containers that were given no group. Beside another bed of this checkout they may be that
        // one's: tests/run.sh looks at them when both have ended.
        if std::env::var_os("KUASAR_TESTS_BESIDE").is_none() {
            walk(&dir.path().join("kuasar"), "cgroup", 3, &mut all);
        }
    }
    for sub in ["sandboxes", "t", "pods", "r", "q"] {
        let state = run.join(format!("kuasar-{}", crate::kind()));
        let listed = crate::inside(&["ls", "-1", &state.join(sub).to_string_lossy()]);
        for name in String::from_utf8_lossy(&listed.stdout).lines() {
            all.insert(format!("state {sub}/{name}"));
        }
    }
    // Its own lock and last address stay.
    walk(&run.join("cni-ipam/bed"), "address", 0, &mut all);
    all.retain(|s| !s.ends_with("/lock") && !s.contains("/last_reserved_ip"));
    Snapshot(
        all.into_iter()
            .filter(|s| !s.contains("cgroup."))
            .filter(|s| s.strip_prefix("cgroup ").is_none_or(|p| Path::new(p).is_dir()))
            .collect(),
    )
}

/// Open descriptors of a process.
pub fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Asserts that nothing has been added since `before`, waiting a little for what ends by itself.
pub fn assert_none(before: &Snapshot) {
    let mut last = String::new();
    let clean = (0..150).any(|i| {
        if i > 0 {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let now = snapshot();
        let new: Vec<&String> = now.0.difference(&before.0).collect();
        last = format!("{new:#?}");
        new.is_empty()
    });
    assert!(clean, "left behind: {last}");
}

//! Where a host has its control groups, and how groups are named.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use super::Cgroup;
use crate::{Context, Error, Result};

/// Controllers of v1. Mount options that are none of them are not mistaken for one.
const CONTROLLERS: [&str; 14] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "hugetlb",
    "net_cls",
    "net_prio",
    "perf_event",
    "rdma",
    "misc",
];

/// Where control groups are mounted on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// One hierarchy per controller, by controller name. Hybrid hosts count as v1: their unified
    /// hierarchy carries no controllers that containers use.
    V1(BTreeMap<String, PathBuf>),
    /// The unified hierarchy alone.
    V2(PathBuf),
}

impl Layout {
    /// Reads the layout of this mount namespace.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] when there are no control groups at all.
    pub fn detect() -> Result<Self> {
        let text =
            fs::read_to_string("/proc/self/mountinfo").context(|| "cannot read mountinfo")?;
        Self::parse(&text)
    }

    /// As [`Self::detect`], without reading mountinfo where the hierarchies are where nearly every
    /// host has them: `/sys/fs/cgroup` itself, or one directory per line of `/proc/self/cgroup`
    /// below it. mountinfo has a line for each mount of the host, that is for each container; a
    /// program that runs once per container would get slower with each.
    ///
    /// Looks once in the life of a process and of those that it forks.
    ///
    /// # Errors
    /// As [`Self::detect`].
    pub fn detect_usual() -> Result<Self> {
        static USUAL: OnceLock<Layout> = OnceLock::new();
        if let Some(layout) = USUAL.get() {
            return Ok(layout.clone());
        }
        let layout = match Self::usual(Path::new("/sys/fs/cgroup")) {
            Some(layout) => layout,
            None => Self::detect()?,
        };
        Ok(USUAL.get_or_init(|| layout).clone())
    }

    fn usual(root: &Path) -> Option<Self> {
        use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, statfs};
        let kind = |at: &Path| statfs(at).ok().map(|fs| fs.filesystem_type());
        if kind(root)? == CGROUP2_SUPER_MAGIC {
            return Some(Self::V2(root.to_owned()));
        }
        let mut v1 = BTreeMap::new();
        for line in fs::read_to_string("/proc/self/cgroup").ok()?.lines() {
            let controllers = line.split(':').nth(1)?;
            if controllers.is_empty() {
                continue;
            }
            let at = root.join(controllers.strip_prefix("name=").unwrap_or(controllers));
            if kind(&at)? != CGROUP_SUPER_MAGIC {
                return None;
            }
            for name in controllers.split(',') {
                v1.insert(name.strip_prefix("name=").unwrap_or(name).to_owned(), at.clone());
            }
        }
        (!v1.is_empty()).then_some(Self::V1(v1))
    }

    fn parse(mountinfo: &str) -> Result<Self> {
        let (mut v1, mut v2) = (BTreeMap::new(), None);
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let Some(at) = left.split(' ').nth(4).map(crate::mount::unescape) else { continue };
            let mut right = right.split(' ');
            let (kind, options) = (right.next(), right.nth(1).unwrap_or_default());
            match kind {
                Some("cgroup2") => v2 = v2.or(Some(at)),
                Some("cgroup") => {
                    for o in options.split(',') {
                        let named = o.strip_prefix("name=");
                        if named.is_some() || CONTROLLERS.contains(&o) {
                            let name = named.unwrap_or(o).to_owned();
                            v1.entry(name).or_insert_with(|| at.clone());
                        }
                    }
                }
                _ => {}
            }
        }
        match (v1.is_empty(), v2) {
            (false, _) => Ok(Self::V1(v1)),
            (true, Some(path)) => Ok(Self::V2(path)),
            (true, None) => Err(Error::Invalid(
                "no control groups are mounted: mount cgroup2 on /sys/fs/cgroup".into(),
            )),
        }
    }

    /// Whether this is the unified hierarchy.
    pub fn is_v2(&self) -> bool {
        matches!(self, Self::V2(_))
    }

    /// The file of a group by which a process of one thread enters it itself.
    pub fn entrance(&self) -> &'static str {
        if self.is_v2() { "cgroup.procs" } else { "tasks" }
    }

    /// The group at `path`: as in a spec's `cgroupsPath` or CRI's `cgroup_parent`. Of systemd's
    /// `slice:prefix:name` the path that systemd would make is taken.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a path with `..`.
    pub fn group(&self, path: &str) -> Result<Cgroup> {
        let path = expand_systemd(path);
        let rel: PathBuf =
            Path::new(&path).components().filter(|c| *c != Component::RootDir).collect();
        if rel.as_os_str().is_empty()
            || rel.components().any(|c| !matches!(c, Component::Normal(_)))
        {
            return Err(Error::Invalid(format!("cgroup path {path:?} is not allowed")));
        }
        Ok(Cgroup { layout: self.clone(), path: rel })
    }
}

/// `a-b.slice:prefix:name` is `/a.slice/a-b.slice/prefix-name.scope`.
pub fn expand_systemd(path: &str) -> String {
    let slice_path = |slice: &str| {
        let stem = slice.trim_end_matches(".slice");
        let mut out = String::new();
        let mut prefix = String::new();
        for part in stem.split('-').filter(|p| !p.is_empty()) {
            prefix = if prefix.is_empty() { part.into() } else { format!("{prefix}-{part}") };
            out.push_str(&format!("/{prefix}.slice"));
        }
        out
    };
    let parts: Vec<&str> = path.split(':').collect();
    match parts.as_slice() {
        [slice, prefix, name] if !path.starts_with('/') => {
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            let unit = if name.ends_with(".slice") {
                (*name).to_owned()
            } else if prefix.is_empty() {
                format!("{name}.scope")
            } else {
                format!("{prefix}-{name}.scope")
            };
            format!("{}/{unit}", slice_path(slice))
        }
        [slice] if slice.ends_with(".slice") && !slice.contains('/') => slice_path(slice),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_told_apart() {
        let v1 = "29 25 0:25 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset,noprefix,release_agent=/x\n\
                  30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n\
                  31 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
                  32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let Layout::V1(c) = Layout::parse(v1).unwrap() else { panic!("v1 expected") };
        assert_eq!(c["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert!(!c.contains_key("noprefix") && !c.contains_key("release_agent=/x"));
        assert_eq!(c["systemd"], Path::new("/sys/fs/cgroup/systemd"));
        let v2 = "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(Layout::parse(v2).unwrap(), Layout::V2("/sys/fs/cgroup".into()));
        assert!(Layout::parse("").is_err());
    }

    #[test]
    fn the_usual_places_are_what_mountinfo_says() {
        let Some(usual) = Layout::usual(Path::new("/sys/fs/cgroup")) else {
            return eprintln!("skipped: this host has its control groups elsewhere");
        };
        let all = Layout::detect().unwrap();
        match (&usual, &all) {
            (Layout::V1(usual), Layout::V1(all)) => {
                for (name, at) in usual {
                    assert!(all.get(name).is_none_or(|other| other == at), "{name}");
                }
                assert!(all.keys().all(|name| usual.contains_key(name)));
            }
            _ => assert_eq!(usual, all),
        }
        assert_eq!(Layout::usual(Path::new("/")), None);
    }

    #[test]
    fn systemd_paths_are_expanded() {
        assert_eq!(expand_systemd("/a/b"), "/a/b");
        assert_eq!(
            expand_systemd("kubepods-pod1.slice:cri-containerd:abc"),
            "/kubepods.slice/kubepods-pod1.slice/cri-containerd-abc.scope"
        );
        assert_eq!(expand_systemd("kubepods-x.slice"), "/kubepods.slice/kubepods-x.slice");
    }

    #[test]
    fn a_path_cannot_leave_the_hierarchy() {
        let l = Layout::V2("/sys/fs/cgroup".into());
        assert!(l.group("/../etc").is_err());
        assert!(l.group("/").is_err());
        assert!(l.group("/k8s/pod").is_ok());
    }
}

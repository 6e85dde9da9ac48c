//! A spec's mounts: what their options say.

use std::path::{Component, Path, PathBuf};

use super::super::spec;
use super::{Reason, leave};

/// How mounts and unmounts travel between copies of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Propagation {
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or `MS_UNBINDABLE`.
    pub kind: u64,
    /// With all mounts below.
    pub deep: bool,
}

/// What is mounted.
#[derive(Debug, PartialEq, Eq)]
pub enum What {
    /// A file or directory of the host.
    Bind {
        /// With what is mounted below.
        deep: bool,
    },
    /// A new instance of a file system; parameters with and without value.
    New(Vec<(String, Option<String>)>),
    /// The container's part of the control groups.
    Cgroup,
}

/// One mount.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    /// Absolute, without `.` and `..`.
    pub at: PathBuf,
    /// File system type, or empty.
    pub kind: String,
    /// Source.
    pub source: PathBuf,
    /// What it is.
    pub what: What,
    /// `MOUNT_ATTR_*` to set and to clear.
    pub attr: Attr,
    /// The same, with all mounts below.
    pub deep_attr: Attr,
    /// Its own propagation.
    pub propagation: Option<Propagation>,
    /// Start with what is there in the image.
    pub copy_up: bool,
    /// Its files belong to the users of the user namespace; `true` with all mounts below.
    pub mapped: Option<bool>,
}

/// Attributes to set and to clear.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attr {
    /// `MOUNT_ATTR_*`.
    pub set: u64,
    /// `MOUNT_ATTR_*`.
    pub clear: u64,
}

impl Attr {
    /// Whether nothing changes.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// File systems of which new instances are mounted. Others have sources or helpers of their own.
const FILE_SYSTEMS: [&str; 5] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue"];

/// `rslave` and its kin.
pub(super) fn propagation(name: &str) -> Option<Propagation> {
    let (deep, plain) = match name.strip_prefix('r') {
        Some(plain) => (true, plain),
        None => (false, name),
    };
    let kind = match plain {
        "private" => libc::MS_PRIVATE,
        "slave" => libc::MS_SLAVE,
        "shared" => libc::MS_SHARED,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some(Propagation { kind, deep })
}

/// An absolute path without `.` and `..`, as runc takes destinations: without looking at links.
pub fn clean(path: &str) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            _ => {}
        }
    }
    clean
}

/// An attribute's bits by its name in the options: to set, to clear.
fn attribute(name: &str) -> Option<Attr> {
    use libc::{
        MOUNT_ATTR__ATIME as ATIME, MOUNT_ATTR_NOATIME as NOATIME, MOUNT_ATTR_NODEV as NODEV,
        MOUNT_ATTR_NODIRATIME as NODIRATIME, MOUNT_ATTR_NOEXEC as NOEXEC,
        MOUNT_ATTR_NOSUID as NOSUID, MOUNT_ATTR_NOSYMFOLLOW as NOSYMFOLLOW,
        MOUNT_ATTR_RDONLY as RDONLY, MOUNT_ATTR_STRICTATIME as STRICTATIME,
    };
    let set = |set| Some(Attr { set, clear: 0 });
    let clear = |clear| Some(Attr { set: 0, clear });
    // The kinds of access times are one number, not bits.
    let time = |set| Some(Attr { set, clear: ATIME });
    match name {
        "ro" => set(RDONLY),
        "rw" => clear(RDONLY),
        "nosuid" => set(NOSUID),
        "suid" => clear(NOSUID),
        "nodev" => set(NODEV),
        "dev" => clear(NODEV),
        "noexec" => set(NOEXEC),
        "exec" => clear(NOEXEC),
        "nodiratime" => set(NODIRATIME),
        "diratime" => clear(NODIRATIME),
        "nosymfollow" => set(NOSYMFOLLOW),
        "symfollow" => clear(NOSYMFOLLOW),
        "noatime" => time(NOATIME),
        "strictatime" => time(STRICTATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => time(0),
        _ => None,
    }
}

impl Attr {
    /// The later one wins, as on mount(8)'s command line.
    fn then(&mut self, next: Self) {
        self.set = self.set & !next.clear | next.set;
        self.clear = self.clear & !next.set | next.clear;
    }
}

pub(super) fn mount(mount: &spec::Mount) -> Result<Mount, Reason> {
    let at = clean(&mount.destination);
    if at == Path::new("/") {
        return leave("a mount on the root");
    }
    let options = mount.options.as_deref().unwrap_or_default();
    let bind = options.iter().rev().find_map(|option| match option.as_str() {
        "bind" => Some(false),
        "rbind" => Some(true),
        _ => None,
    });
    let (mut attr, mut deep_attr) = (Attr::default(), Attr::default());
    let (mut own, mut copy_up, mut parameters) = (None, false, Vec::new());
    let mut mapped = None;
    for option in options {
        if let Some(next) = attribute(option) {
            attr.then(next);
        } else if let Some(next) = propagation(option) {
            own = Some(next);
        } else if let Some(next) = option.strip_prefix('r').and_then(attribute) {
            deep_attr.then(next);
        } else {
            match option.as_str() {
                "bind" | "rbind" | "defaults" => {}
                "tmpcopyup" => copy_up = true,
                "idmap" => mapped = Some(false),
                "ridmap" => mapped = Some(true),
                "remount" | "mand" | "nomand" | "sync" | "async" | "dirsync" | "iversion"
                | "noiversion" | "silent" | "loud" | "lazytime" | "nolazytime" => {
                    return leave(format!("mount option {option:?}"));
                }
                other => match other.split_once('=') {
                    Some((key, value)) => parameters.push((key.into(), Some(value.into()))),
                    None => parameters.push((other.into(), None)),
                },
            }
        }
    }
    let what = match (bind, &*mount.kind) {
        (Some(deep), _) => What::Bind { deep },
        (None, "bind") => What::Bind { deep: false },
        (None, "cgroup" | "cgroup2") => What::Cgroup,
        (None, kind) if FILE_SYSTEMS.contains(&kind) => What::New(Vec::new()),
        (None, kind) => return leave(format!("a mount of type {kind:.40?}")),
    };
    let what = match what {
        What::New(_) => What::New(parameters),
        _ if parameters.is_empty() => what,
        _ => return leave("unknown mount options"),
    };
    if copy_up && mount.kind != "tmpfs" {
        return leave("tmpcopyup of no tmpfs");
    }
    if matches!(what, What::Bind { .. }) && mount.source.is_empty() {
        return leave("a bind mount without source");
    }
    Ok(Mount {
        at,
        kind: mount.kind.clone(),
        source: PathBuf::from(&mount.source),
        what,
        attr,
        deep_attr,
        propagation: own,
        copy_up,
        mapped,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_option_wins() {
        let options = |list: &[&str]| {
            let options = Some(list.iter().map(|o| (*o).to_owned()).collect());
            let kind = "bind".to_owned();
            let source = "/s".to_owned();
            let (destination, more) = ("/d".into(), spec::Mount::default());
            mount(&spec::Mount { destination, kind, source, options, ..more }).unwrap()
        };
        let made = options(&["ro", "rw", "nosuid", "noatime", "strictatime", "slave", "rshared"]);
        assert_eq!(made.attr.set, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME);
        assert_eq!(made.attr.clear & libc::MOUNT_ATTR_RDONLY, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(made.propagation.unwrap(), Propagation { kind: libc::MS_SHARED, deep: true });
        assert_eq!(options(&["bind"]).what, What::Bind { deep: false });
    }

    #[test]
    fn paths_are_cleaned_without_looking_at_links() {
        for (dirty, clear) in
            [("a//b/./c", "/a/b/c"), ("/../../x", "/x"), ("/a/../..", "/"), ("", "/")]
        {
            assert_eq!(clean(dirty), Path::new(clear));
        }
    }
}

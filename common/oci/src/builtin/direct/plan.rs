//! Whether this engine runs a spec, decided before anything is touched, and what it will do.
//!
//! [`Plan::of`] looks at the whole spec. Whatever it does not know, from an unknown field to an
//! unknown mount option, is an answer of its own, [`Reason`]: libcontainer gets that container.
//! So this engine can be small without ever doing half of what was asked for.

mod mounts;

use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use serde_json::Value;

use super::spec::{self, Spec};
use super::user::{self, User};

pub use mounts::{Attr, Mount, Propagation, What, clean};
use mounts::{mount, propagation};

/// Why a spec is left to libcontainer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason(pub String);

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

pub(super) fn leave<T>(why: impl Into<String>) -> Result<T, Reason> {
    Err(Reason(why.into()))
}

/// What is to be done.
#[derive(Debug)]
pub struct Plan {
    /// The spec, for everything that is used as it stands.
    pub spec: Spec,
    /// Namespaces that are made.
    pub new: CloneFlags,
    /// Namespaces that are joined, the pid namespace last.
    pub join: Vec<(CloneFlags, PathBuf)>,
    /// The pod's user namespace, which is entered last of all.
    pub user: Option<User>,
    /// All mounts, in order.
    pub mounts: Vec<Mount>,
    /// Propagation of the root.
    pub root: Propagation,
    /// `process.capabilities`, as numbers.
    pub capabilities: Sets,
    /// `process.rlimits`.
    pub rlimits: Vec<(libc::__rlimit_resource_t, libc::rlimit)>,
    /// Where the container's cgroup is.
    pub cgroup: String,
    /// `linux.resources` without its devices.
    pub resources: Value,
    /// Device rules: the spec's, then what every container may use.
    pub device_rules: Value,
    /// Whether `/dev` is ours to fill: not where it is somebody's directory.
    pub fill_dev: bool,
    /// Whether `/proc` is mounted by the spec, so that what is below it has to be procfs.
    pub has_proc: bool,
}

/// The five capability sets, a bit for each capability.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sets {
    /// What may be gained at all.
    pub bounding: u64,
    /// What counts.
    pub effective: u64,
    /// What may be made effective.
    pub permitted: u64,
    /// What passes to programs with file capabilities.
    pub inheritable: u64,
    /// What passes to programs without.
    pub ambient: u64,
}

/// Parts of `linux.resources` that [`kuasar_host::cgroup`] applies; another one that says anything
/// is left to libcontainer.
const RESOURCES: [(&str, &[&str]); 7] = [
    ("memory", &["limit", "reservation", "swap", "swappiness", "disableOOMKiller"]),
    ("cpu", &["shares", "quota", "period", "burst", "cpus", "mems", "idle"]),
    ("pids", &["limit"]),
    (
        "blockIO",
        &[
            "weight",
            "throttleReadBpsDevice",
            "throttleWriteBpsDevice",
            "throttleReadIOPSDevice",
            "throttleWriteIOPSDevice",
        ],
    ),
    ("hugepageLimits", &[]),
    ("unified", &[]),
    ("devices", &[]),
];

impl Plan {
    /// Whose a mount point is that has to be made: the container's root's.
    pub fn root_owner(&self) -> Option<(u32, u32)> {
        self.user.as_ref().and_then(|user| user.uid(0).zip(user.gid(0)))
    }

    /// Looks at a whole spec.
    ///
    /// # Errors
    /// The reason why libcontainer has to run this one.
    pub fn of(text: &[u8]) -> Result<Self, Reason> {
        let mut spec: Spec = serde_json::from_slice(text).or_else(|e| leave(e.to_string()))?;
        if !spec.oci_version.is_empty() && !spec.oci_version.starts_with("1.") {
            return leave(format!("version {:.40?}", spec.oci_version));
        }
        let hooks = spec.hooks.iter().flat_map(|hooks| hooks.values()).flatten();
        if hooks.flatten().next().is_some() {
            return leave("hooks");
        }
        if spec.linux.mount_label.as_ref().is_some_and(|label| !label.is_empty()) {
            return leave("a label for mounts");
        }
        let Some(cgroup) = spec.linux.cgroups_path.take().filter(|path| !path.is_empty()) else {
            return leave("no cgroup path");
        };
        if !Path::new(&spec.root.path).is_absolute() {
            return leave("a relative root");
        }
        let (new, mut join) = namespaces(spec.linux.namespaces.as_deref().unwrap_or_default())?;
        let user = User::of(&mut join, &mut spec.linux)?;
        let root = match spec.linux.rootfs_propagation.as_deref().unwrap_or_default() {
            "" => Propagation { kind: libc::MS_SLAVE, deep: true },
            name => match propagation(name) {
                Some(propagation) => propagation,
                None => return leave(format!("rootfsPropagation {name:.40?}")),
            },
        };
        let mut mounts = spec.mounts.iter().flatten().map(mount).collect::<Result<Vec<_>, _>>()?;
        for (mount, given) in mounts.iter_mut().zip(spec.mounts.iter().flatten()) {
            user::map(user.as_ref(), mount, given)?;
        }
        let at = |path: &str| mounts.iter().rev().find(|mount| mount.at == Path::new(path));
        let fill_dev = !at("/dev").is_some_and(|mount| matches!(mount.what, What::Bind { .. }));
        let has_proc = at("/proc").is_some_and(|mount| mount.kind == "proc");
        let mut resources = spec.linux.resources.take().unwrap_or(Value::Null);
        let device_rules = split_resources(&mut resources)?;
        for device in spec.linux.devices.iter().flatten() {
            if !matches!(&*device.kind, "c" | "u" | "b" | "p") {
                return leave(format!("device type {:.40?}", device.kind));
            }
            let numbers = [device.major, device.minor];
            if numbers.iter().any(|number| u32::try_from(*number).is_err()) {
                return leave("a device without numbers");
            }
        }
        if let Some(seccomp) = &spec.linux.seccomp {
            super::seccomp::check(seccomp).or_else(leave)?;
        }
        let capabilities = capabilities(spec.process.capabilities.as_ref())?;
        let rlimits = rlimits(spec.process.rlimits.as_deref().unwrap_or_default())?;
        Ok(Self {
            spec,
            new,
            join,
            user,
            mounts,
            root,
            capabilities,
            rlimits,
            cgroup,
            resources,
            device_rules,
            fill_dev,
            has_proc,
        })
    }
}

impl Plan {
    /// Whether making the container writes something that its cgroup has to be charged for.
    pub fn is_charged(&self) -> bool {
        self.mounts.iter().any(|mount| mount.copy_up)
    }

    /// Whether all that the container's process takes from the host can be in its hands before it
    /// leaves the host's mounts: the rest of a container's file system names places of the host.
    pub fn is_portable(&self) -> bool {
        !self.fill_dev && self.mounts.iter().all(|mount| mount.what != What::Cgroup)
    }
}

type Namespaces = (CloneFlags, Vec<(CloneFlags, PathBuf)>);

fn namespaces(list: &[spec::Namespace]) -> Result<Namespaces, Reason> {
    let (mut new, mut join) = (CloneFlags::empty(), Vec::new());
    let mut seen = CloneFlags::empty();
    for namespace in list {
        let flag = match &*namespace.kind {
            "mount" => CloneFlags::CLONE_NEWNS,
            "network" => CloneFlags::CLONE_NEWNET,
            "ipc" => CloneFlags::CLONE_NEWIPC,
            "uts" => CloneFlags::CLONE_NEWUTS,
            "pid" => CloneFlags::CLONE_NEWPID,
            "user" => CloneFlags::CLONE_NEWUSER,
            "cgroup" => CloneFlags::CLONE_NEWCGROUP,
            other => return leave(format!("a namespace of type {other:.40?}")),
        };
        if seen.contains(flag) {
            return leave("a namespace twice");
        }
        seen |= flag;
        match namespace.path.as_deref().filter(|path| !path.is_empty()) {
            // Its mapping would have to be written from outside.
            None if flag == CloneFlags::CLONE_NEWUSER => return leave("a new user namespace"),
            None => new |= flag,
            Some(_) if flag == CloneFlags::CLONE_NEWNS => {
                return leave("a mount namespace that exists");
            }
            Some(path) => join.push((flag, PathBuf::from(path))),
        }
    }
    if !new.contains(CloneFlags::CLONE_NEWNS) {
        return leave("no mount namespace");
    }
    // From then on our own children are in it.
    join.sort_by_key(|(flag, _)| *flag == CloneFlags::CLONE_NEWPID);
    Ok((new, join))
}

/// Checks the resources, takes the device rules out and completes them.
pub fn split_resources(resources: &mut Value) -> Result<Value, Reason> {
    fn empty(value: &Value) -> bool {
        match value {
            Value::Null | Value::Bool(false) => true,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.values().all(empty),
            Value::Bool(true) => false,
        }
    }
    if resources.is_null() {
        *resources = Value::Object(serde_json::Map::new());
    }
    let Some(map) = resources.as_object_mut() else { return leave("resources are no object") };
    for (name, value) in map.iter() {
        let Some((_, known)) = RESOURCES.iter().find(|(known, _)| known == name) else {
            if empty(value) {
                continue;
            }
            return leave(format!("resource {name:.40}"));
        };
        if let (Some(inner), false) = (value.as_object(), known.is_empty()) {
            for (key, value) in inner {
                if !known.contains(&&**key) && !empty(value) {
                    return leave(format!("resource {name}.{key:.40}"));
                }
            }
        }
    }
    let mut rules = match map.remove("devices") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(rules)) => rules,
        Some(_) => return leave("device rules are no list"),
    };
    rules.extend(super::devices::allowed_rules());
    let rules = Value::Array(rules);
    kuasar_host::cgroup::DeviceRule::list(&rules).or_else(|e| leave(e.to_string()))?;
    Ok(rules)
}

fn capabilities(given: Option<&spec::Capabilities>) -> Result<Sets, Reason> {
    let set = |names: &Option<Vec<String>>| {
        names.iter().flatten().try_fold(0u64, |set, name| {
            match kuasar_host::capability::number(name) {
                Some(number) => Ok(set | 1 << number),
                None => leave(format!("capability {name:.40?}")),
            }
        })
    };
    let Some(given) = given else { return Ok(Sets::default()) };
    Ok(Sets {
        bounding: set(&given.bounding)?,
        effective: set(&given.effective)?,
        permitted: set(&given.permitted)?,
        inheritable: set(&given.inheritable)?,
        ambient: set(&given.ambient)?,
    })
}

fn rlimits(
    list: &[spec::Rlimit],
) -> Result<Vec<(libc::__rlimit_resource_t, libc::rlimit)>, Reason> {
    list.iter()
        .map(|limit| {
            let resource = match &*limit.kind {
                "RLIMIT_CPU" => libc::RLIMIT_CPU,
                "RLIMIT_FSIZE" => libc::RLIMIT_FSIZE,
                "RLIMIT_DATA" => libc::RLIMIT_DATA,
                "RLIMIT_STACK" => libc::RLIMIT_STACK,
                "RLIMIT_CORE" => libc::RLIMIT_CORE,
                "RLIMIT_RSS" => libc::RLIMIT_RSS,
                "RLIMIT_NPROC" => libc::RLIMIT_NPROC,
                "RLIMIT_NOFILE" => libc::RLIMIT_NOFILE,
                "RLIMIT_MEMLOCK" => libc::RLIMIT_MEMLOCK,
                "RLIMIT_AS" => libc::RLIMIT_AS,
                "RLIMIT_LOCKS" => libc::RLIMIT_LOCKS,
                "RLIMIT_SIGPENDING" => libc::RLIMIT_SIGPENDING,
                "RLIMIT_MSGQUEUE" => libc::RLIMIT_MSGQUEUE,
                "RLIMIT_NICE" => libc::RLIMIT_NICE,
                "RLIMIT_RTPRIO" => libc::RLIMIT_RTPRIO,
                "RLIMIT_RTTIME" => libc::RLIMIT_RTTIME,
                other => return leave(format!("rlimit {other:.40?}")),
            };
            Ok((resource, libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec() -> Value {
        json!({
            "ociVersion": "1.2.1",
            "process": {
                "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
                "args": ["sh"], "env": ["A=b"], "cwd": "/",
                "capabilities": {"bounding": ["CAP_CHOWN", "CAP_BPF"], "effective": null},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
                "noNewPrivileges": true, "oomScoreAdj": 1000
            },
            "root": {"path": "/rootfs", "readonly": true},
            "hostname": "h",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "relatime", "ro"]},
                {"destination": "/data/../etc//hosts", "type": "bind", "source": "/h", "options": ["rbind", "rprivate", "rro"]}
            ],
            "annotations": {"a": "b"},
            "linux": {
                "namespaces": [
                    {"type": "pid", "path": "/proc/self/fd/4"}, {"type": "mount"},
                    {"type": "network", "path": "/n"}, {"type": "cgroup"}
                ],
                "cgroupsPath": "/k/c",
                "resources": {
                    "devices": [{"allow": false, "access": "rwm"}],
                    "memory": {"limit": 4096, "kernel": 0}, "cpu": {"shares": 2, "realtimePeriod": null},
                    "network": {}
                },
                "maskedPaths": ["/proc/kcore"], "readonlyPaths": null
            }
        })
    }

    fn plan(spec: &Value) -> Result<Plan, Reason> {
        Plan::of(&serde_json::to_vec(spec).unwrap())
    }

    #[test]
    fn a_usual_spec_is_run_here() {
        let plan = plan(&spec()).unwrap();
        assert_eq!(plan.new, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP);
        assert_eq!(plan.join.last().unwrap().0, CloneFlags::CLONE_NEWPID);
        assert_eq!(plan.capabilities.bounding, 1 | 1 << 39);
        assert_eq!(plan.mounts[3].at, Path::new("/etc/hosts"));
        assert_eq!(plan.mounts[3].deep_attr.set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(plan.mounts[3].propagation.unwrap().kind, libc::MS_PRIVATE);
        assert_eq!(plan.mounts[2].what, What::Cgroup);
        assert_eq!(
            plan.mounts[1].what,
            What::New(vec![
                ("mode".into(), Some("755".into())),
                ("size".into(), Some("65536k".into()))
            ])
        );
        assert!(plan.fill_dev && plan.has_proc);
        assert!(plan.resources.get("devices").is_none());
        assert!(plan.device_rules.as_array().unwrap().len() > 1);
    }

    /// Everything that has to go to libcontainer, as a pointer and the value there.
    #[test]
    fn what_is_not_known_is_left_to_libcontainer() {
        for (pointer, value) in [
            ("/vm", json!({})),
            ("/hooks", json!({"createRuntime": [{"path": "/bin/true"}]})),
            ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_IDLE"})),
            ("/process/scheduler", json!({"policy": "SCHED_BATCH"})),
            ("/process/user/username", json!("me")),
            ("/process/capabilities/bounding", json!(["CAP_NEW"])),
            ("/process/rlimits", json!([{"type": "RLIMIT_NEW", "hard": 1, "soft": 1}])),
            ("/linux/intelRdt", json!({"closID": "x"})),
            ("/linux/personality", json!({"domain": "LINUX32"})),
            ("/linux/timeOffsets", json!({"boottime": {"secs": 1}})),
            ("/linux/netDevices", json!({"eth0": {}})),
            ("/linux/uidMappings", json!([{"containerID": 0, "hostID": 1, "size": 1}])),
            ("/linux/mountLabel", json!("system_u:object_r:x")),
            ("/linux/cgroupsPath", json!("")),
            ("/linux/rootfsPropagation", json!("sideways")),
            ("/linux/resources/rdma", json!({"mlx": {"hcaHandles": 1}})),
            ("/linux/resources/network", json!({"classID": 1})),
            ("/linux/resources/cpu/realtimePeriod", json!(5)),
            ("/linux/resources/devices", json!([{"allow": true, "type": "q"}])),
            ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"})),
            ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/s"})),
            ("/linux/devices", json!([{"type": "q", "path": "/dev/q"}])),
            ("/linux/devices", json!([{"type": "c", "path": "/dev/q", "major": -1}])),
            ("/linux/namespaces", json!([{"type": "mount", "path": "/m"}])),
            ("/linux/namespaces", json!([{"type": "pid"}])),
            ("/linux/namespaces", json!([{"type": "mount"}, {"type": "user"}])),
            ("/linux/namespaces", json!([{"type": "mount"}, {"type": "time"}])),
            ("/linux/namespaces", json!([{"type": "mount"}, {"type": "mount"}])),
            ("/mounts/3/uidMappings", json!([{"containerID": 0, "hostID": 1, "size": 1}])),
            ("/mounts/0/type", json!("ext4")),
            ("/mounts/0/destination", json!("/..")),
            ("/mounts/3/options", json!(["rbind", "idmap"])),
            ("/mounts/3/options", json!(["rbind", "X-later"])),
            ("/mounts/3/options", json!(["bind", "remount"])),
            ("/root/path", json!("rootfs")),
            ("/ociVersion", json!("2.0.0")),
        ] {
            let mut changed = spec();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            let parent = changed.pointer_mut(parent).unwrap();
            match parent {
                Value::Array(_) => panic!("{pointer}"),
                parent => parent[key] = value.clone(),
            }
            assert!(plan(&changed).is_err(), "{pointer} {value}");
        }
        assert!(Plan::of(b"{").is_err());
    }
}

//! The edits that turn containerd's OCI spec into one for this pod.
//!
//! containerd 2.x writes the spec of a container as if a pause process stood for the pod: its
//! namespaces are `/proc/<sandbox pid>/ns/…`, with our pid 0 that is `/proc/0/ns/…`, and it
//! leaves `/etc/hostname`, `/etc/resolv.conf` and the pod's `/dev/shm` to the sandboxer. The spec
//! is edited as JSON, so that nothing that we do not know is lost on the way to the engine.

use std::os::fd::RawFd;
use std::path::Path;

use serde_json::{Map, Value, json};

/// How one kind of namespace of a container is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespace {
    /// The host's: the entry is left out.
    Host,
    /// A new one for this container.
    New,
    /// An existing one, by path.
    Path(String),
    /// The pod's, by a descriptor that we hold.
    Held(RawFd),
}

/// What the pod contributes to the spec of its containers.
#[derive(Debug)]
pub struct PodSpec<'a> {
    /// Network: the pod's path or the host's.
    pub network: Namespace,
    /// IPC.
    pub ipc: Namespace,
    /// UTS.
    pub uts: Namespace,
    /// PID namespace of the pod: `New` when containers have one each.
    pub pid: Namespace,
    /// User namespace; `Host` when the pod has none of its own.
    pub user: Namespace,
    /// Pid that Start answered, as it stands in the paths of the spec.
    pub sandbox_pid: u32,
    /// Directory with `hostname`, `hosts`, `resolv.conf`.
    pub files: &'a Path,
    /// What `/dev/shm` is bound to.
    pub shm: &'a Path,
}

/// How the engine gets at descriptors that we hold.
#[derive(Debug, Clone, Copy)]
pub enum Descriptors {
    /// They are passed on, from this number upwards: `/proc/self/fd/N`. Works also after the
    /// engine has joined a user namespace, from where other processes' `/proc` is closed.
    Passed(RawFd),
    /// The engine opens ours: `/proc/<daemon>/fd/N`. For runc and crun, which close what they
    /// inherit before their init process opens the path.
    Ours,
}

/// Edits `spec`; answers the descriptors to pass on, in order.
pub fn edit(
    spec: &mut Value,
    pod: &PodSpec<'_>,
    rootfs: &Path,
    descriptors: Descriptors,
) -> Result<Vec<RawFd>, String> {
    let spec = spec.as_object_mut().ok_or("config.json is not a JSON object")?;
    let readonly = root(spec, rootfs)?;
    process(spec)?;
    mounts(spec, pod, readonly)?;
    if matches!(descriptors, Descriptors::Passed(_)) {
        plain_propagation(spec)?;
    }
    namespaces(spec, pod, descriptors)
}

/// libcontainer knows `shared`, `slave`, … (and applies them recursively), but not `rshared`,
/// `rslave`, … which containerd writes, and of a mount's own propagation it knows nothing: all
/// mounts have that of the container's root. So the root gets what the mounts ask for at most.
/// With `private`, which nearly every container asks for everywhere, later mounts of the host do
/// not come into a volume.
fn plain_propagation(spec: &mut Map<String, Value>) -> Result<(), String> {
    let asks = |option: &Value| {
        let option = option.as_str().unwrap_or_default();
        matches!(option.strip_prefix('r').unwrap_or(option), "shared" | "slave")
    };
    let options = |mount: &Value| mount.get("options").and_then(Value::as_array).cloned();
    let mounts = array(spec, "mounts")?;
    let propagates = mounts.iter().filter_map(options).flatten().any(|option| asks(&option));
    let linux = object(spec, "linux")?;
    let given = linux.get("rootfsPropagation").and_then(Value::as_str).unwrap_or_default();
    let plain = match given.strip_prefix('r').unwrap_or(given) {
        "" if !propagates => "private",
        "" => "slave",
        plain => plain,
    };
    let plain = json!(plain);
    linux.insert("rootfsPropagation".into(), plain);
    Ok(())
}

/// An object member, made when it is missing.
fn object<'a>(
    parent: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Map<String, Value>, String> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut().ok_or_else(|| format!("config.json: {key} is not an object"))
}

/// An array member, made when it is missing.
fn array<'a>(parent: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>, String> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!([]);
    }
    value.as_array_mut().ok_or_else(|| format!("config.json: {key} is not an array"))
}

fn root(spec: &mut Map<String, Value>, rootfs: &Path) -> Result<bool, String> {
    let root = object(spec, "root")?;
    let absolute =
        root.get("path").and_then(Value::as_str).is_some_and(|path| path.starts_with('/'));
    if !absolute {
        root.insert("path".into(), json!(rootfs));
    }
    Ok(root.get("readonly").and_then(Value::as_bool).unwrap_or(false))
}

fn process(spec: &mut Map<String, Value>) -> Result<(), String> {
    if !spec.contains_key("process") {
        return Err("config.json has no process".into());
    }
    let process = object(spec, "process")?;
    if let Some(cwd) =
        process.get("cwd").and_then(Value::as_str).filter(|cwd| !cwd.starts_with('/'))
    {
        return Err(format!("config.json: process.cwd {cwd:.100?} is not absolute"));
    }
    plain_process(process)
}

/// What every engine has to find in a `process` object, of a container or of an exec:
/// * `noNewPrivileges: false` is the same as its absence, but libcontainer takes its presence as
///   leave to load seccomp after capabilities are dropped;
/// * all five capability sets, so that none is inherited (CVE-2022-27650);
/// * users that are numbers of 32 bits: crun takes `"0"`, and whatever else it cannot read, for
///   root (CVE-2026-30892).
pub fn plain_process(process: &mut Map<String, Value>) -> Result<(), String> {
    let is_id = |id: &Value| id.as_u64().is_some_and(|id| u32::try_from(id).is_ok());
    if let Some(user) = process.get("user") {
        let user = user.as_object().ok_or("process.user is not an object")?;
        let groups = match user.get("additionalGids") {
            None | Some(Value::Null) => &Vec::new(),
            Some(groups) => {
                groups.as_array().ok_or("process.user.additionalGids is not an array")?
            }
        };
        let ids = [user.get("uid"), user.get("gid")].into_iter().flatten();
        if let Some(id) = ids.chain(groups).find(|id| !is_id(id)) {
            let shown: String = id.to_string().chars().take(40).collect();
            return Err(format!(
                "process.user: {shown} is no user or group: a number of 32 bits is"
            ));
        }
    }
    if process.get("noNewPrivileges") == Some(&Value::Bool(false)) {
        process.remove("noNewPrivileges");
    }
    if let Some(Value::Object(sets)) = process.get_mut("capabilities") {
        for name in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
            let set = sets.entry(name).or_insert_with(|| json!([]));
            if set.is_null() {
                *set = json!([]);
            }
        }
    }
    Ok(())
}

fn destination(mount: &Value) -> Option<&str> {
    let path = mount.get("destination")?.as_str()?;
    Some(if path.len() > 1 { path.trim_end_matches('/') } else { path })
}

fn mounts(spec: &mut Map<String, Value>, pod: &PodSpec<'_>, readonly: bool) -> Result<(), String> {
    let mounts = array(spec, "mounts")?;
    let access = if readonly { "ro" } else { "rw" };
    for name in ["hostname", "hosts", "resolv.conf"] {
        let target = format!("/etc/{name}");
        let source = pod.files.join(name);
        if mounts.iter().all(|mount| destination(mount) != Some(&target)) {
            mounts.push(json!({
                "destination": target, "type": "bind", "source": source,
                "options": ["rbind", "rprivate", access],
            }));
        }
    }
    let shm = json!({
        "destination": "/dev/shm", "type": "bind", "source": pod.shm,
        "options": ["rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"],
    });
    match mounts.iter_mut().find(|mount| destination(mount) == Some("/dev/shm")) {
        // The private tmpfs of the OCI default; a volume that the user put there stays.
        Some(mount) if mount.get("type").and_then(Value::as_str) != Some("bind") => *mount = shm,
        Some(_) => {}
        None => mounts.push(shm),
    }
    Ok(())
}

fn namespaces(
    spec: &mut Map<String, Value>,
    pod: &PodSpec<'_>,
    descriptors: Descriptors,
) -> Result<Vec<RawFd>, String> {
    let linux = object(spec, "linux")?;
    let list = array(linux, "namespaces")?;
    let old = std::mem::take(list);
    for entry in &old {
        let kind = entry.get("type").and_then(Value::as_str).unwrap_or_default();
        // Leaving one out would isolate the container less than it asks for.
        if !kuasar_host::spec::NAMESPACES.contains(&kind) {
            return Err(format!("config.json: linux.namespaces: unknown type {kind:.40?}"));
        }
    }
    let find = |kind: &str| {
        old.iter().find(|entry| entry.get("type").and_then(Value::as_str) == Some(kind))
    };
    let path_of = |entry: Option<&Value>| {
        entry
            .and_then(|e| e.get("path"))
            .and_then(Value::as_str)
            .filter(|p| !p.is_empty())
            .map(str::to_owned)
    };
    let of_sandbox = |path: &str| {
        let pid = path.strip_prefix("/proc/").and_then(|rest| rest.split('/').next());
        pid.and_then(|pid| pid.parse::<u32>().ok())
            .is_some_and(|pid| pid == 0 || pid == pod.sandbox_pid)
    };
    let pid = match (find("pid"), path_of(find("pid"))) {
        (None, _) => Namespace::Host,
        (Some(_), None) => Namespace::New,
        (Some(_), Some(path)) if of_sandbox(&path) => pod.pid.clone(),
        // NamespaceMode_TARGET: another container's, by its pid.
        (Some(_), Some(path)) => Namespace::Path(path),
    };
    let mut wanted = vec![
        ("network", pod.network.clone()),
        ("ipc", pod.ipc.clone()),
        ("uts", pod.uts.clone()),
        ("pid", pid),
        ("user", pod.user.clone()),
        ("mount", Namespace::New),
    ];
    for kind in ["cgroup", "time"] {
        if find(kind).is_some() {
            wanted.push((kind, Namespace::New));
        }
    }
    let mut passed = Vec::new();
    for (kind, namespace) in wanted {
        let entry = match namespace {
            Namespace::Host => continue,
            Namespace::New => json!({ "type": kind }),
            Namespace::Path(path) => json!({ "type": kind, "path": path }),
            Namespace::Held(fd) => {
                let path = match descriptors {
                    Descriptors::Ours => format!("/proc/{}/fd/{fd}", std::process::id()),
                    Descriptors::Passed(first) => {
                        let number =
                            first + i32::try_from(passed.len()).unwrap_or(i32::MAX - first);
                        passed.push(fd);
                        format!("/proc/self/fd/{number}")
                    }
                };
                json!({ "type": kind, "path": path })
            }
        };
        list.push(entry);
    }
    // A namespace that is joined has its mapping already; runc wants it not to be said again.
    if pod.user == Namespace::Host || matches!(descriptors, Descriptors::Ours) {
        linux.remove("uidMappings");
        linux.remove("gidMappings");
    }
    // These belong to the pod's namespaces, and are set there.
    if pod.uts == Namespace::Host {
        spec.remove("hostname");
        spec.remove("domainname");
    }
    Ok(passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodSpec<'static> {
        PodSpec {
            network: Namespace::Path("/run/netns/n".into()),
            ipc: Namespace::Held(40),
            uts: Namespace::Held(41),
            pid: Namespace::Held(42),
            user: Namespace::Host,
            sandbox_pid: 0,
            files: Path::new("/pod"),
            shm: Path::new("/pod/shm"),
        }
    }

    fn spec() -> Value {
        json!({
            "process": {"args": ["x"], "noNewPrivileges": false, "capabilities": {"bounding": ["CAP_CHOWN"]}},
            "root": {"path": "rootfs"},
            "unknown": {"kept": 1},
            "mounts": [
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
                {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts"}
            ],
            "linux": {"namespaces": [
                {"type": "network", "path": "/proc/0/ns/net"}, {"type": "ipc", "path": "/proc/0/ns/ipc"},
                {"type": "uts", "path": "/proc/0/ns/uts"}, {"type": "pid", "path": "/proc/0/ns/pid"},
                {"type": "mount"}, {"type": "cgroup"}
            ]}
        })
    }

    fn path(spec: &Value, kind: &str) -> Option<String> {
        spec["linux"]["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .find(|n| n["type"] == kind)
            .map(|n| n["path"].as_str().unwrap_or_default().to_owned())
    }

    #[test]
    fn namespaces_become_the_pods_and_nothing_of_pid_0_stays() {
        let mut spec = spec();
        let fds = edit(&mut spec, &pod(), Path::new("/b/rootfs"), Descriptors::Passed(3)).unwrap();
        assert_eq!(fds, [40, 41, 42]);
        assert_eq!(path(&spec, "network").unwrap(), "/run/netns/n");
        assert_eq!(path(&spec, "ipc").unwrap(), "/proc/self/fd/3");
        assert_eq!(path(&spec, "uts").unwrap(), "/proc/self/fd/4");
        assert_eq!(path(&spec, "pid").unwrap(), "/proc/self/fd/5");
        assert_eq!(path(&spec, "cgroup").unwrap(), "");
        assert!(!spec.to_string().contains("/proc/0/"));
        assert_eq!(spec["unknown"]["kept"], 1);
        assert_eq!(spec["root"]["path"], "/b/rootfs");
    }

    #[test]
    fn a_user_is_a_number() {
        let with = |user: Value| plain_process(json!({ "user": user }).as_object_mut().unwrap());
        with(json!({"uid": 0, "gid": u32::MAX, "additionalGids": [1, 2]})).unwrap();
        with(json!({"username": "x", "additionalGids": null})).unwrap();
        for wrong in
            [json!("0"), json!(-1), json!(1.0), json!(1_u64 << 32), json!(null), json!([0])]
        {
            assert!(with(json!({"uid": wrong, "gid": 0})).is_err(), "{wrong}");
            assert!(with(json!({"uid": 0, "gid": wrong})).is_err(), "{wrong}");
            assert!(
                with(json!({"uid": 0, "gid": 0, "additionalGids": [wrong]})).is_err(),
                "{wrong}"
            );
        }
        assert!(with(json!("root")).is_err());
    }

    #[test]
    fn an_unknown_namespace_and_a_relative_directory_are_refused() {
        let mut relative = spec();
        relative["process"]["cwd"] = json!("tmp");
        assert!(edit(&mut relative, &pod(), Path::new("/r"), Descriptors::Ours).is_err());
        for kind in [json!({"type": "moon"}), json!({})] {
            let mut spec = spec();
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(kind);
            assert!(edit(&mut spec, &pod(), Path::new("/r"), Descriptors::Ours).is_err());
        }
    }

    #[test]
    fn host_namespaces_are_left_out() {
        let mut pod = pod();
        (pod.network, pod.ipc, pod.uts, pod.pid) =
            (Namespace::Host, Namespace::Host, Namespace::Host, Namespace::Host);
        let mut spec = spec();
        edit(&mut spec, &pod, Path::new("/r"), Descriptors::Ours).unwrap();
        for kind in ["network", "ipc", "uts", "pid"] {
            assert_eq!(path(&spec, kind), None, "{kind}");
        }
    }

    #[test]
    fn recursive_propagation_is_put_in_the_engines_words() {
        let mut spec = spec();
        spec["linux"]["rootfsPropagation"] = json!("rslave");
        edit(&mut spec, &pod(), Path::new("/r"), Descriptors::Passed(3)).unwrap();
        assert_eq!(spec["linux"]["rootfsPropagation"], "slave");
    }

    #[test]
    fn a_target_pid_namespace_is_kept() {
        let mut spec = spec();
        spec["linux"]["namespaces"][3]["path"] = json!("/proc/77/ns/pid");
        edit(&mut spec, &pod(), Path::new("/r"), Descriptors::Ours).unwrap();
        assert_eq!(path(&spec, "pid").unwrap(), "/proc/77/ns/pid");
    }

    #[test]
    fn the_pods_files_are_mounted_unless_the_spec_has_its_own() {
        let mut spec = spec();
        edit(&mut spec, &pod(), Path::new("/r"), Descriptors::Ours).unwrap();
        let source = |at: &str| {
            let mounts = spec["mounts"].as_array().unwrap();
            let all: Vec<_> = mounts.iter().filter(|m| m["destination"] == at).collect();
            assert_eq!(all.len(), 1, "{at}");
            all[0]["source"].as_str().unwrap().to_owned()
        };
        assert_eq!(source("/etc/hosts"), "/kubelet/hosts");
        assert_eq!(source("/etc/resolv.conf"), "/pod/resolv.conf");
        assert_eq!(source("/dev/shm"), "/pod/shm");
    }

    #[test]
    fn every_capability_set_is_explicit_and_a_false_flag_is_gone() {
        let mut spec = spec();
        edit(&mut spec, &pod(), Path::new("/r"), Descriptors::Ours).unwrap();
        assert_eq!(spec["process"]["capabilities"].as_object().unwrap().len(), 5);
        assert!(spec["process"].get("noNewPrivileges").is_none());
    }
}

//! Specs as Quark gets them: of the sandbox, and of containers in it.
//!
//! Quark's process has the pod's tree as its root by the time a container comes: no path of the
//! host means anything there. What is bound from the host is mounted by us in the container's root
//! file system and leaves the spec; what lies below a file system that Quark itself mounts (a
//! volume below `/dev`, say) is shown beside the root file system, for Quark to bind.

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use kuasar_host::cgroup::expand_systemd;
use kuasar_host::mount::tree;
use kuasar_oci::pod::Pod;
use kuasar_oci::spec::{Descriptors, Namespace, PodSpec};
use serde_json::{Value, json};

use crate::tree::open_source;

/// Most bind mounts of a container.
const MAX_VOLUMES: usize = 256;

/// Where a volume goes.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// Into the root file system, by us.
    Rootfs(PathBuf),
    /// Beside it under this name, for Quark.
    Beside(String),
}

/// A volume of a container.
#[derive(Debug)]
pub struct Volume {
    /// What is bound, opened once and for all.
    pub source: OwnedFd,
    /// Where it goes.
    pub place: Place,
    /// How.
    pub flags: tree::Flags,
}

/// What an edited spec needs.
#[derive(Debug)]
pub struct Needs {
    /// In the order in which they are mounted.
    pub volumes: Vec<Volume>,
    /// `linux.cgroupsPath`.
    pub cgroup: String,
    /// Where the root file system is when the engine mounts none.
    pub rootfs: PathBuf,
}

/// The spec of the sandbox.
pub fn sandbox(pod: &Pod, hostname: &str) -> Value {
    let mut namespaces = Vec::new();
    if !pod.modes.host_network {
        namespaces.push(json!({ "type": "network", "path": pod.netns }));
    }
    json!({
        "ociVersion": "1.0.2",
        "process": { "user": { "uid": 0, "gid": 0 }, "args": [], "cwd": "/" },
        "root": { "path": "rootfs" },
        "hostname": hostname,
        "mounts": [],
        "linux": { "namespaces": namespaces },
    })
}

fn str_of<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn options(mount: &Value) -> impl Iterator<Item = &str> {
    mount.get("options").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

fn is_bind(mount: &Value) -> bool {
    str_of(mount, "type") == "bind" || options(mount).any(|o| matches!(o, "bind" | "rbind"))
}

/// The destination of a mount, absolute and without `..`.
fn destination(mount: &Value) -> Result<PathBuf, String> {
    let path = Path::new(str_of(mount, "destination"));
    let plain = path.is_absolute()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    match plain {
        true => Ok(path.components().collect()),
        false => Err(format!(
            "config.json: mounts: destination {:.200?} is not absolute, or has ..",
            path.display().to_string()
        )),
    }
}

/// Turns containerd's spec of a container into one for its pod's sandbox. `bundle` is containerd's.
///
/// # Errors
/// A text that says what is wrong with it.
pub fn container(
    spec: &mut Value,
    pod: &Pod,
    pid: u32,
    id: &str,
    bundle: &Path,
) -> Result<Needs, String> {
    let shm = pod.shm();
    let parts = PodSpec {
        // All containers share those of the sandbox whatever stands here.
        network: Namespace::Host,
        ipc: Namespace::New,
        uts: Namespace::New,
        pid: Namespace::Host,
        user: Namespace::Host,
        sandbox_pid: pid,
        files: &pod.dir,
        shm: &shm,
    };
    kuasar_oci::spec::edit(spec, &parts, &bundle.join("rootfs"), Descriptors::Ours)?;
    let rootfs = spec.pointer("/root/path").and_then(Value::as_str).map(PathBuf::from);
    let all = spec.as_object_mut().ok_or("config.json is not a JSON object")?;
    if all.get("hooks").and_then(Value::as_object).is_some_and(|hooks| !hooks.is_empty()) {
        return Err("config.json: hooks are programs of the host, and Quark runs none: remove \
                    them"
            .into());
    }
    if let Some(root) = all.get_mut("root").and_then(Value::as_object_mut) {
        root.insert("path".into(), json!("rootfs"));
    }
    let given = all.get_mut("mounts").and_then(Value::as_array_mut);
    let given = std::mem::take(given.ok_or("config.json: mounts is not an array")?);
    let (volumes, kept) = mounts(given, id)?;
    all.insert("mounts".into(), Value::Array(kept));
    let linux = all.get_mut("linux").and_then(Value::as_object_mut);
    let linux = linux.ok_or("config.json has no linux section")?;
    let shares_pids = pod.modes.shared_pid || pod.modes.host_pid;
    if let Some(list) = linux.get_mut("namespaces").and_then(Value::as_array_mut) {
        list.retain(|entry| {
            let joined = entry.get("path").is_some();
            !joined && !(shares_pids && str_of(entry, "type") == "pid")
        });
    }
    let cgroup = match linux.get("cgroupsPath").and_then(Value::as_str).unwrap_or_default() {
        "" => format!("/kuasar/{}/{id}", pod.id),
        path => expand_systemd(path),
    };
    linux.insert("cgroupsPath".into(), json!(cgroup));
    let rootfs = rootfs.unwrap_or_else(|| bundle.join("rootfs"));
    Ok(Needs { volumes, cgroup, rootfs })
}

/// Takes the mounts apart: what we mount, and what Quark does.
fn mounts(given: Vec<Value>, id: &str) -> Result<(Vec<Volume>, Vec<Value>), String> {
    let (mut volumes, mut kept) = (Vec::new(), Vec::new());
    let mut theirs: Vec<PathBuf> = Vec::new();
    for mut mount in given {
        let at = destination(&mount)?;
        if !is_bind(&mount) {
            theirs.push(at);
            kept.push(mount);
            continue;
        }
        if volumes.len() >= MAX_VOLUMES {
            return Err(format!("config.json: mounts: more than {MAX_VOLUMES} volumes"));
        }
        let shown = str_of(&mount, "source").to_owned();
        let source = open_source(Path::new(&shown)).map_err(|error| {
            format!("config.json: mounts: source {shown:.200?} of {}: {error}", at.display())
        })?;
        let flags = tree::Flags {
            recursive: options(&mount).any(|option| option == "rbind"),
            read_only: options(&mount).any(|option| option == "ro"),
            no_devices: true,
        };
        let covered = theirs.iter().any(|dir| at.starts_with(dir));
        let place = match covered {
            false => Place::Rootfs(at),
            true => {
                let name = format!("m{}", volumes.len());
                if let Some(mount) = mount.as_object_mut() {
                    mount.insert("type".into(), json!("bind"));
                    mount.insert("source".into(), json!(format!("/{id}/{name}")));
                }
                kept.push(mount);
                Place::Beside(name)
            }
        };
        volumes.push(Volume { source, place, flags });
    }
    Ok((volumes, kept))
}

#[cfg(test)]
mod tests {
    use kuasar_oci::pod::{Modes, Namespaces};

    use super::*;

    fn pod(dir: &Path) -> Pod {
        for name in ["hostname", "hosts", "resolv.conf"] {
            std::fs::write(dir.join(name), "").unwrap();
        }
        std::fs::create_dir_all(dir.join("shm")).unwrap();
        Pod {
            id: "p".into(),
            dir: dir.into(),
            netns: "/run/netns/n".into(),
            modes: Modes {
                host_network: false,
                host_ipc: false,
                host_pid: false,
                shared_pid: false,
            },
            engine: "quark".into(),
            namespaces: Namespaces::default(),
        }
    }

    fn given(mounts: Value) -> Value {
        json!({
            "process": { "args": ["a"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "root": { "path": "rootfs" },
            "mounts": mounts,
            "linux": { "namespaces": [
                { "type": "pid" }, { "type": "network", "path": "/proc/5/ns/net" },
                { "type": "ipc", "path": "/proc/0/ns/ipc" },
            ] },
        })
    }

    #[test]
    fn nothing_of_the_host_stays_in_a_containers_spec() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        let mut spec = given(json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm" },
            { "destination": "/data", "type": "bind", "source": volume, "options": ["rbind", "ro"] },
        ]));
        let needs = container(&mut spec, &pod(dir.path()), 7, "c", Path::new("/b")).unwrap();
        let text = spec.to_string();
        assert!(!text.contains(dir.path().to_str().unwrap()), "{text}");
        assert!(!text.contains("/proc/"), "{text}");
        let places: Vec<&Place> = needs.volumes.iter().map(|volume| &volume.place).collect();
        // The pod's shm is below what Quark mounts.
        assert!(places.contains(&&Place::Beside("m0".into())), "{places:?}");
        assert!(places.contains(&&Place::Rootfs("/data".into())), "{places:?}");
        assert!(places.contains(&&Place::Rootfs("/etc/hosts".into())), "{places:?}");
        assert!(text.contains("/c/m0"), "{text}");
        assert_eq!(
            (needs.cgroup.as_str(), needs.rootfs.as_path()),
            ("/kuasar/p/c", Path::new("/b/rootfs"))
        );
        let namespaces = spec.pointer("/linux/namespaces").unwrap();
        assert!(namespaces.as_array().unwrap().contains(&json!({ "type": "pid" })));
    }

    #[test]
    fn a_destination_that_leads_out_and_a_missing_source_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(dir.path());
        for (destination, source, words) in [
            ("/a/../../etc", "/", ".."),
            ("relative", "/", "absolute"),
            ("/a", "/nowhere/at/all", "/nowhere/at/all"),
        ] {
            let mut spec = given(json!([
                { "destination": destination, "type": "bind", "source": source },
            ]));
            let error = container(&mut spec, &pod, 0, "c", Path::new("/b")).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        let mut spec = given(json!([]));
        spec["hooks"] = json!({ "prestart": [{ "path": "/bin/x" }] });
        assert!(container(&mut spec, &pod, 0, "c", Path::new("/b")).unwrap_err().contains("hooks"));
    }
}

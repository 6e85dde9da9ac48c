//! Specs as gVisor gets them: of the root container, and of containers in its sandbox.

use std::path::Path;

use kuasar_host::cgroup::expand_systemd;
use kuasar_oci::pod::Pod;
use kuasar_oci::spec::{Descriptors, Namespace, PodSpec};
use serde_json::{Map, Value, json};

use crate::cli::Own;
use crate::sentry::Capabilities;

/// Whether this is the root container or one in its sandbox: gVisor reads CRI's annotations.
const KIND: &str = "io.kubernetes.cri.container-type";
/// In which sandbox.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// Bits of one capability set of a `process` object. Names that Linux does not have are none.
fn bits(process: &Map<String, Value>, set: &str, raw: bool) -> u64 {
    let names = process.get("capabilities").and_then(|sets| sets.get(set));
    let names = names.and_then(Value::as_array).into_iter().flatten();
    let number = |name: &Value| kuasar_host::capability::number(name.as_str()?);
    let all = names.filter_map(number).fold(0, |bits, number| bits | 1u64 << number);
    // gVisor gives it to nobody unless it is told to, on the command line only.
    if raw { all } else { all & !(1 << 13) }
}

/// The capability sets of a `process` object; `raw` is whether CAP_NET_RAW counts.
pub fn capabilities(process: &Map<String, Value>, raw: bool) -> Capabilities {
    Capabilities {
        permitted_caps: bits(process, "permitted", raw),
        inheritable_caps: bits(process, "inheritable", raw),
        effective_caps: bits(process, "effective", raw),
        bounding_caps: bits(process, "bounding", raw),
        // gVisor has no ambient capabilities for containers.
        ambient_caps: 0,
    }
}

/// The spec of the root container.
pub fn root(pod: &Pod, own: &Own, hostname: &str) -> Value {
    let mut namespaces: Vec<Value> =
        ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind })).to_vec();
    if !pod.modes.host_network {
        namespaces.push(json!({ "type": "network", "path": pod.netns }));
    }
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": ["/pause"],
            "env": ["PATH=/"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": [], "effective": [], "permitted": [], "inheritable": [], "ambient": [],
            },
        },
        // Nothing writes to it, so that it wants no memory for what is written.
        "root": { "path": "rootfs", "readonly": true },
        "hostname": hostname,
        "mounts": [],
        "annotations": { KIND: "sandbox", SANDBOX: own.id },
        "linux": { "cgroupsPath": own.cgroup, "namespaces": namespaces },
    })
}

/// Turns containerd's spec of a container into one for its pod's sandbox; answers the path of its
/// cgroup.
///
/// # Errors
/// A text that says what is wrong with it.
pub fn container(
    spec: &mut Value,
    pod: &Pod,
    own: &Own,
    id: &str,
    rootfs: &Path,
) -> Result<String, String> {
    let (files, shm) = (pod.dir.as_path(), pod.shm());
    let shares_pids = pod.modes.shared_pid || pod.modes.host_pid;
    if shares_pids {
        remove_namespace(spec, "pid");
    }
    let parts = PodSpec {
        network: match pod.modes.host_network {
            true => Namespace::Host,
            false => Namespace::Path(pod.netns.clone()),
        },
        // All containers share those of the sandbox whatever stands here.
        ipc: Namespace::New,
        uts: Namespace::New,
        // A path is the sandbox's, or that of a container in it: the sentry's pid stands in
        // either, and the sandbox's namespace has every process in it.
        pid: Namespace::Host,
        user: Namespace::Host,
        sandbox_pid: own.sentry.map_or(0, |sentry| sentry.pid),
        files,
        shm: &shm,
    };
    kuasar_oci::spec::edit(spec, &parts, rootfs, Descriptors::Ours)?;
    let all = spec.as_object_mut().ok_or("config.json is not a JSON object")?;
    let annotations = all.entry("annotations").or_insert_with(|| json!({}));
    let annotations =
        annotations.as_object_mut().ok_or("config.json: annotations is not an object")?;
    // gVisor takes these for orders: they are not a pod's to give.
    annotations.retain(|name, _| !name.starts_with("dev.gvisor."));
    annotations.insert(KIND.into(), json!("container"));
    annotations.insert(SANDBOX.into(), json!(own.id));
    let linux = all.get_mut("linux").and_then(Value::as_object_mut);
    let linux = linux.ok_or("config.json has no linux section")?;
    let given = linux.get("cgroupsPath").and_then(Value::as_str).unwrap_or_default();
    let path = match given {
        "" if own.asks_systemd() => systemd_cgroup("", id),
        "" => format!("/kuasar/{}/{id}", pod.id),
        given if own.asks_systemd() => given.to_owned(),
        given => expand_systemd(given),
    };
    linux.insert("cgroupsPath".into(), json!(path));
    Ok(path)
}

/// `slice:prefix:name` as systemd's driver wants it, for `name` in the slice that ends `parent`.
pub fn systemd_cgroup(parent: &str, name: &str) -> String {
    let slice = parent.rsplit('/').next().filter(|slice| !slice.is_empty());
    format!("{}:kuasar:{name}", slice.unwrap_or("system.slice"))
}

fn remove_namespace(spec: &mut Value, kind: &str) {
    if let Some(list) = spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut) {
        list.retain(|entry| entry.get("type").and_then(Value::as_str) != Some(kind));
    }
}

#[cfg(test)]
mod tests {
    use kuasar_oci::pod::{Modes, Namespaces};

    use super::*;

    fn pod(shared_pid: bool) -> Pod {
        Pod {
            id: "p".into(),
            dir: "/d".into(),
            netns: "/run/netns/n".into(),
            modes: Modes { host_network: false, host_ipc: false, host_pid: false, shared_pid },
            engine: "runsc".into(),
            namespaces: Namespaces::default(),
        }
    }

    fn given(pid: Value) -> Value {
        json!({
            "process": { "args": ["a"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "root": { "path": "rootfs" },
            "annotations": { "dev.gvisor.internal.x": "y", SANDBOX: "long" },
            "linux": { "cgroupsPath": "kubepods-pod1.slice:cri-containerd:c", "namespaces":
                [pid, { "type": "network", "path": "/proc/5/ns/net" }] },
        })
    }

    fn pids(spec: &Value) -> Vec<Value> {
        let list = spec.pointer("/linux/namespaces").unwrap().as_array().unwrap();
        list.iter().filter(|entry| entry.get("type").unwrap() == "pid").cloned().collect()
    }

    #[test]
    fn a_container_joins_its_sandbox_and_gives_gvisor_no_orders() {
        let own = Own { id: "short".into(), ..Own::default() };
        let mut spec = given(json!({ "type": "pid" }));
        let cgroup = container(&mut spec, &pod(false), &own, "c", Path::new("/b/rootfs")).unwrap();
        assert_eq!(cgroup, "/kubepods.slice/kubepods-pod1.slice/cri-containerd-c.scope");
        let annotations = spec.get("annotations").unwrap().as_object().unwrap();
        assert_eq!(annotations.len(), 2);
        assert_eq!(annotations.get(SANDBOX).unwrap(), "short");
        assert_eq!(pids(&spec), [json!({ "type": "pid" })]);
    }

    #[test]
    fn systemd_is_asked_in_its_own_words_where_it_is_asked() {
        let asks = Own { args: vec!["--systemd-cgroup".into()], ..Own::default() };
        let cgroup_of = |own: &Own, path: &str| {
            let mut spec = given(json!({ "type": "pid" }));
            spec["linux"]["cgroupsPath"] = json!(path);
            let cgroup =
                container(&mut spec, &pod(false), own, "c", Path::new("/b/rootfs")).unwrap();
            assert_eq!(spec.pointer("/linux/cgroupsPath").unwrap(), &json!(cgroup));
            cgroup
        };
        let path = "kubepods-pod1.slice:cri-containerd:c";
        assert_eq!(cgroup_of(&asks, path), path);
        assert_eq!(cgroup_of(&asks, ""), "system.slice:kuasar:c");
        let not = Own::default();
        assert_eq!(
            cgroup_of(&not, path),
            "/kubepods.slice/kubepods-pod1.slice/cri-containerd-c.scope"
        );
        assert_eq!(cgroup_of(&not, ""), "/kuasar/p/c");
        // Of the sandbox: CRI gives its slice, with or without the slices above.
        for parent in ["kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice"] {
            assert_eq!(systemd_cgroup(parent, "p"), "kubepods-pod1.slice:kuasar:p");
        }
        assert_eq!(systemd_cgroup("", "p"), "system.slice:kuasar:p");
    }

    #[test]
    fn a_shared_or_a_targets_pid_namespace_is_the_sandboxs() {
        let own = Own::default();
        for path in ["/proc/0/ns/pid", "/proc/77/ns/pid"] {
            let mut spec = given(json!({ "type": "pid", "path": path }));
            let own = Own {
                sentry: Some(kuasar_host::process::Identity { pid: 77, start: 1 }),
                ..own.clone()
            };
            container(&mut spec, &pod(false), &own, "c", Path::new("/b/rootfs")).unwrap();
            assert!(pids(&spec).is_empty(), "{path}");
        }
        let mut spec = given(json!({ "type": "pid" }));
        container(&mut spec, &pod(true), &own, "c", Path::new("/b/rootfs")).unwrap();
        assert!(pids(&spec).is_empty());
    }

    #[test]
    fn capabilities_are_bits_and_raw_sockets_an_exception() {
        let process = json!({ "capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_NET_RAW", "CAP_CHECKPOINT_RESTORE", "CAP_WHAT"],
            "ambient": ["CAP_CHOWN"],
        }});
        let process = process.as_object().unwrap();
        assert_eq!(capabilities(process, false).bounding_caps, 1 | 1 << 40);
        assert_eq!(capabilities(process, true).bounding_caps, 1 | 1 << 13 | 1 << 40);
        assert_eq!(capabilities(process, true).ambient_caps, 0);
        assert_eq!(capabilities(&Map::new(), true), Capabilities::default());
    }
}

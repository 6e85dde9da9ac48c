//! The edits that turn a container's spec into one for a WebAssembly process.
//!
//! containerd writes the spec of a Linux program: with `/proc`, `/dev`, `/sys` and cgroups, with
//! capabilities, and with the profiles of whatever security module there is. A module sees the
//! file system through WASI alone and needs nothing of it.

use serde_json::{Map, Value, json};
use wasm_common::job::{self, Job};

/// File systems of the kernel's that containerd mounts for programs.
const KERNEL: [&str; 7] = ["proc", "sysfs", "cgroup", "cgroup2", "mqueue", "devpts", "tmpfs"];
/// Where they are: what a user has mounted elsewhere stays.
const PLACES: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];

/// Edits `spec` for `job`. With a terminal `/dev` stays, where the terminal is.
///
/// # Errors
/// When it is not what the runtime specification says.
pub fn edit(spec: &mut Value, job: &Job) -> Result<(), String> {
    let spec = spec.as_object_mut().ok_or("config.json is not a JSON object")?;
    let process = member(spec, "process")?;
    let terminal = process.get("terminal").and_then(Value::as_bool).unwrap_or(false);
    let none = ["bounding", "effective", "permitted", "inheritable", "ambient"]
        .map(|set| (set.to_owned(), json!([])));
    process.insert("capabilities".into(), Value::Object(none.into_iter().collect()));
    process.insert("noNewPrivileges".into(), json!(true));
    // They count when a program is executed, and none is.
    process.remove("apparmorProfile");
    process.remove("selinuxLabel");
    let mounts = spec.get_mut("mounts").and_then(Value::as_array_mut);
    if let Some(mounts) = mounts {
        mounts.retain(|mount| !is_kernels(mount, terminal));
    }
    let linux = member(spec, "linux")?;
    // The worker has a filter of its own for all of them, in place of the pod's.
    for key in ["maskedPaths", "readonlyPaths", "devices", "seccomp"] {
        linux.remove(key);
    }
    if let Some(list) = linux.get_mut("namespaces").and_then(Value::as_array_mut) {
        // A view of cgroups that are not mounted.
        list.retain(|entry| entry.get("type").and_then(Value::as_str) != Some("cgroup"));
    }
    let annotations = spec.entry("annotations").or_insert(Value::Null);
    if !annotations.is_object() {
        *annotations = json!({});
    }
    if let Some(annotations) = annotations.as_object_mut() {
        annotations.insert(job::ANNOTATION.into(), json!(job.to_json()));
    }
    Ok(())
}

fn member<'a>(
    parent: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Map<String, Value>, String> {
    parent
        .get_mut(key)
        .and_then(Value::as_object_mut)
        .ok_or_else(|| format!("config.json has no {key}"))
}

/// Whether a mount is there for programs alone.
fn is_kernels(mount: &Value, terminal: bool) -> bool {
    let text = |key: &str| mount.get(key).and_then(Value::as_str).unwrap_or_default();
    let at = text("destination");
    let below = |place: &str| {
        at.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let kept = terminal && matches!(at, "/dev" | "/dev/pts");
    let kernels = KERNEL.contains(&text("type")) || at == "/dev/shm";
    kernels && !kept && PLACES.iter().any(|place| below(place))
}

/// The container's memory limit in bytes; 0 for none.
pub fn memory_limit(spec: &Value) -> u64 {
    let limit = spec.pointer("/linux/resources/memory/limit").and_then(Value::as_i64);
    limit.and_then(|limit| u64::try_from(limit).ok()).unwrap_or(0)
}

/// A variable of the container's environment.
pub fn variable<'a>(spec: &'a Value, name: &str) -> Option<&'a str> {
    let env = spec.pointer("/process/env").and_then(Value::as_array)?;
    env.iter().rev().filter_map(Value::as_str).find_map(|entry| {
        let (key, value) = entry.split_once('=')?;
        (key == name).then_some(value)
    })
}

/// An annotation of the container.
pub fn annotation<'a>(spec: &'a Value, name: &str) -> Option<&'a str> {
    spec.get("annotations")?.get(name)?.as_str()
}

#[cfg(test)]
mod tests {
    use wasm_common::kind::Kind;

    use super::*;

    fn job() -> Job {
        Job { artifact: 5, port: 80, connections: 1, ..Job::of(Kind::Module) }
    }

    fn spec() -> Value {
        json!({
            "process": { "args": ["x"], "capabilities": { "bounding": ["CAP_CHOWN"] },
                "apparmorProfile": "p", "env": ["A=1", "A=2", "B"] },
            "annotations": { job::ANNOTATION: "forged" },
            "mounts": [
                { "destination": "/proc", "type": "proc" },
                { "destination": "/dev", "type": "tmpfs" },
                { "destination": "/dev/pts", "type": "devpts" },
                { "destination": "/dev/shm", "type": "bind" },
                { "destination": "/sys/fs/cgroup", "type": "cgroup" },
                { "destination": "/scratch", "type": "tmpfs" },
                { "destination": "/devices", "type": "tmpfs" },
                { "destination": "/dev/data", "type": "bind" },
                { "destination": "/etc/hosts", "type": "bind" },
            ],
            "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ALLOW" }, "resources": { "memory": { "limit": 1024 } }, "maskedPaths": ["/proc/kcore"],
                "namespaces": [{ "type": "pid" }, { "type": "cgroup" }] },
        })
    }

    fn places(spec: &Value) -> Vec<&str> {
        let mounts = spec["mounts"].as_array().unwrap();
        mounts.iter().map(|mount| mount["destination"].as_str().unwrap()).collect()
    }

    #[test]
    fn a_module_gets_nothing_of_the_kernels_and_all_of_the_users() {
        let mut spec = spec();
        edit(&mut spec, &job()).unwrap();
        assert_eq!(places(&spec), ["/scratch", "/devices", "/dev/data", "/etc/hosts"]);
        assert_eq!(spec["process"]["capabilities"]["bounding"], json!([]));
        assert_eq!(spec["process"]["noNewPrivileges"], json!(true));
        assert!(spec["process"].get("apparmorProfile").is_none());
        assert!(spec["linux"].get("maskedPaths").is_none());
        assert!(spec["linux"].get("seccomp").is_none());
        assert_eq!(spec["linux"]["namespaces"], json!([{ "type": "pid" }]));
    }

    #[test]
    fn an_image_cannot_write_its_own_job() {
        let mut spec = spec();
        edit(&mut spec, &job()).unwrap();
        assert_eq!(annotation(&spec, job::ANNOTATION), Some(&*job().to_json()));
    }

    #[test]
    fn a_terminal_has_a_place() {
        let mut spec = spec();
        spec["process"]["terminal"] = json!(true);
        edit(&mut spec, &job()).unwrap();
        assert_eq!(places(&spec)[..2], ["/dev", "/dev/pts"]);
    }

    #[test]
    fn limits_and_variables_are_read() {
        let spec = spec();
        assert_eq!(memory_limit(&spec), 1024);
        assert_eq!((variable(&spec, "A"), variable(&spec, "B")), (Some("2"), None));
    }
}

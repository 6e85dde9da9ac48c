//! The OCI spec of `run`'s one container: what engines give a container that asks for nothing.

use serde_json::{Value, json};

use super::{Image, RunArgs};
use crate::error::{Error, Result};

/// Capabilities of an unprivileged container, as engines give them by default.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn mounts() -> Vec<Value> {
    let mount = |kind: &str, at: &str, options: &[&str]| json!({ "type": kind, "source": kind, "destination": at, "options": options });
    vec![
        mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
        mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "devpts",
            "/dev/pts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("tmpfs", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        mount("tmpfs", "/run", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
    ]
}

/// `config.json`. Namespaces with a path in `/proc/0` are the pod's; which they are, its sandboxer
/// knows.
///
/// # Errors
/// [`Error::Usage`] when neither image nor command line says what to run.
pub fn container(
    args: &RunArgs,
    image: &Image,
    netns: Option<&str>,
    cgroup: &str,
    pod: &str,
) -> Result<Value> {
    let command = image.command(&args.command);
    if command.is_empty() {
        return Err(Error::Usage(format!(
            "{} names no program: say which one to run after it",
            args.source.display()
        )));
    }
    let mut env: Vec<String> = image.env.clone();
    if !env.iter().any(|e| e.starts_with("PATH=")) {
        env.push(PATH.into());
    }
    if args.tty && !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".into())));
    }
    env.extend(args.env.iter().cloned());
    let cwd = args.workdir.as_deref().or(image.workdir.as_deref()).unwrap_or("/");
    if !cwd.starts_with('/') {
        return Err(Error::Usage(format!("the working directory {cwd:?} is no absolute path")));
    }
    let (uid, gid) = args.user.unwrap_or(image.user);
    let mut mounts = mounts();
    mounts.extend(args.volume.iter().map(|v| {
        let mode = if v.read_only { "ro" } else { "rw" };
        json!({
            "type": "bind", "source": v.source, "destination": v.target,
            "options": ["rbind", "rprivate", mode],
        })
    }));
    let of_pod = |kind: &str| json!({ "type": kind, "path": format!("/proc/0/ns/{kind}") });
    let mut namespaces =
        vec![json!({ "type": "mount" }), json!({ "type": "pid" }), of_pod("ipc"), of_pod("uts")];
    if let Some(path) = netns {
        namespaces.push(json!({ "type": "network", "path": path }));
    }
    Ok(json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": args.tty,
            "user": { "uid": uid, "gid": gid },
            "args": command,
            "env": env,
            "cwd": cwd,
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
            },
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs" },
        "mounts": mounts,
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.container-name": "run",
            "io.kubernetes.cri.sandbox-id": pod,
        },
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": cgroup,
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi",
                "/sys/firmware", "/sys/devices/virtual/powercap",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    }))
}

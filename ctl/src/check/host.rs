//! The kernel and the programs of this host.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use kuasar_daemon::diagnosis::numbers;
use kuasar_host::cgroup::Layout;

use super::{Finding, State};
use crate::daemons::Daemon;

const KERNEL: &str = "kernel";
const MACHINES: &str = "virtual machines";
const ENGINES: &str = "engines";

/// Everything. Blocks.
pub fn findings(daemons: &[Daemon]) -> Vec<Finding> {
    let wants = |kind: &str| daemons.iter().any(|d| d.kind == kind);
    let mut all = vec![root(), version(), cgroups()];
    all.extend(namespaces());
    all.extend([overlay(), pidfd(), openat2(), id_mapped_mounts()]);
    all.extend(machines(wants("vmm")));
    all.extend(engines(daemons));
    all
}

fn root() -> Finding {
    match nix::unistd::geteuid().is_root() {
        true => Finding::good(KERNEL, "user", "root"),
        false => Finding::other(
            State::Warning,
            KERNEL,
            "user",
            "not root: some of what follows cannot be seen",
            "sudo kuasar-ctl check",
        ),
    }
}

/// Oldest kernel: mount_setattr(2), which id-mapped mounts and the built-in engine need.
const OLDEST_KERNEL: (u32, u32) = (5, 12);

fn version() -> Finding {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim().to_owned();
    match numbers(&release) {
        Some(found) if found >= OLDEST_KERNEL => Finding::good(KERNEL, "version", release),
        _ => {
            let (major, minor) = OLDEST_KERNEL;
            let detail = format!("{release}: at least {major}.{minor} is needed");
            Finding::other(
                State::Bad,
                KERNEL,
                "version",
                detail,
                "install a newer kernel and reboot",
            )
        }
    }
}

fn cgroups() -> Finding {
    match Layout::detect() {
        Ok(layout) if layout.is_v2() => Finding::good(KERNEL, "cgroups", "version 2"),
        Ok(_) => {
            let hybrid = Path::new("/sys/fs/cgroup/unified").is_dir();
            let detail = if hybrid { "version 1, hybrid" } else { "version 1" };
            Finding::good(KERNEL, "cgroups", detail)
        }
        Err(error) => Finding::other(
            State::Bad,
            KERNEL,
            "cgroups",
            error.to_string(),
            "mount -t cgroup2 none /sys/fs/cgroup",
        ),
    }
}

fn namespaces() -> Vec<Finding> {
    let one = |name: &str| {
        let path = format!("/proc/self/ns/{name}");
        let (there, what) = (Path::new(&path).exists(), format!("{name} namespaces"));
        match (there, name) {
            (true, _) => Finding::good(KERNEL, what, "there"),
            (false, "user" | "time") => Finding::other(
                State::Warning,
                KERNEL,
                what,
                "not built into this kernel",
                "use a kernel of a distribution",
            ),
            (false, _) => Finding::other(
                State::Bad,
                KERNEL,
                what,
                "not built into this kernel",
                "use a kernel of a distribution",
            ),
        }
    };
    let mut all: Vec<Finding> =
        ["mnt", "pid", "net", "ipc", "uts", "user", "time", "cgroup"].map(one).into();
    let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    if limit.trim() == "0" {
        all.push(Finding::other(
            State::Warning,
            KERNEL,
            "user namespaces",
            "user.max_user_namespaces = 0: pods with hostUsers: false will fail",
            "sysctl -w user.max_user_namespaces=15000",
        ));
    }
    all
}

fn overlay() -> Finding {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    match known.lines().any(|line| line.ends_with("\toverlay")) {
        true => Finding::good(KERNEL, "overlayfs", "there"),
        false => Finding::other(State::Bad, KERNEL, "overlayfs", "not loaded", "modprobe overlay"),
    }
}

fn pidfd() -> Finding {
    match kuasar_host::process::pidfd_open(std::process::id()) {
        Ok(_) => Finding::good(KERNEL, "pidfd", "there"),
        Err(error) => missing_call("pidfd", &error.to_string()),
    }
}

fn openat2() -> Finding {
    let root = kuasar_host::safe_path::Root::open(Path::new("/proc"));
    match root.and_then(|root| root.open_file(Path::new("filesystems"), libc::O_RDONLY)) {
        Ok(_) => Finding::good(KERNEL, "openat2", "there"),
        Err(error) => missing_call("openat2", &error.to_string()),
    }
}

fn missing_call(what: &str, why: &str) -> Finding {
    let remedy = "use a newer kernel, or a seccomp profile that lets it through";
    Finding::other(State::Bad, KERNEL, what, why, remedy)
}

/// Whether the kernel has id-mapped mounts: a mount_setattr(2) that asks for nothing succeeds where
/// there is such a call.
fn id_mapped_mounts() -> Finding {
    let what = "mount_setattr (id-mapped mounts)";
    let nothing = [0_u64; 4];
    // SAFETY: an open directory, an empty path, and attributes of the size that is given, all zero.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            0,
            nothing.as_ptr(),
            size_of_val(&nothing),
        )
    };
    match (r, nix::Error::last()) {
        (0, _) => Finding::good(KERNEL, what, "there"),
        (_, nix::Error::EPERM) => Finding::good(KERNEL, what, "there, not for this user"),
        (_, error) => missing_call(what, error.desc()),
    }
}

/// A device of the kernel that machines use.
fn device(path: &str, module: &str, wanted: State, without: &str) -> Finding {
    let there = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_char_device());
    if !there {
        return Finding::other(wanted, MACHINES, path, without, format!("modprobe {module}"));
    }
    let mut how = std::fs::OpenOptions::new();
    match how.read(true).write(true).open(path) {
        Ok(_) => Finding::good(MACHINES, path, "there"),
        Err(error) => {
            let detail = format!("cannot be opened ({error})");
            Finding::other(
                wanted,
                MACHINES,
                path,
                detail,
                "run this as root, or let the container have the device",
            )
        }
    }
}

fn machines(wanted: bool) -> Vec<Finding> {
    let of = |state| if wanted { state } else { State::Absent };
    vec![
        device(
            "/dev/kvm",
            "kvm_intel || modprobe kvm_amd",
            of(State::Warning),
            "there is none: only QEMU without acceleration (qemu.accel = \"tcg\") runs",
        ),
        device(
            "/dev/vhost-vsock",
            "vhost_vsock",
            State::Absent,
            "vhost-device-vsock is used in its place",
        ),
        device(
            "/dev/vhost-net",
            "vhost_net",
            State::Absent,
            "machines' networks are slower without",
        ),
        device("/dev/net/tun", "tun", of(State::Bad), "pods in machines get no network"),
    ]
}

/// A program and its version.
struct Program {
    name: &'static str,
    of: &'static [&'static str],
    /// Where it can be configured.
    key: &'static str,
    /// What it is when it is missing and its sandboxer is wanted.
    missing: State,
    /// What to do then.
    remedy: &'static str,
}

const PROGRAMS: [Program; 12] = [
    Program {
        name: "runc",
        of: &["runc"],
        key: "engines.runc.path",
        missing: State::Warning,
        remedy: "apt install runc (pods with a user namespace need it)",
    },
    Program {
        name: "crun",
        of: &["runc"],
        key: "engines.crun.path",
        missing: State::Absent,
        remedy: "apt install crun",
    },
    Program {
        name: "runsc",
        of: &["gvisor"],
        key: "runsc.path",
        missing: State::Bad,
        remedy: "apt install runsc, or set runsc.path",
    },
    Program {
        name: "quark",
        of: &["quark"],
        key: "quark.path",
        missing: State::Bad,
        remedy: "install Quark, or set quark.path",
    },
    Program {
        name: "wasm-worker",
        of: &["wasm"],
        key: "worker",
        missing: State::Bad,
        remedy: "make install",
    },
    Program {
        name: "sandbox-parent",
        of: &["runc", "vmm", "gvisor", "quark", "wasm"],
        key: "parent_binary",
        missing: State::Bad,
        remedy: "make install",
    },
    Program {
        name: "qemu-system-x86_64",
        of: &["vmm"],
        key: "qemu.path",
        missing: State::Warning,
        remedy: "apt install qemu-system-x86, or set qemu.path",
    },
    Program {
        name: "cloud-hypervisor",
        of: &["vmm"],
        key: "cloud_hypervisor.path",
        missing: State::Absent,
        remedy: "install Cloud Hypervisor, or set cloud_hypervisor.path",
    },
    Program {
        name: "firecracker",
        of: &["vmm"],
        key: "firecracker.path",
        missing: State::Absent,
        remedy: "install Firecracker, or set firecracker.path",
    },
    Program {
        name: "stratovirt",
        of: &["vmm"],
        key: "stratovirt.path",
        missing: State::Absent,
        remedy: "install StratoVirt, or set stratovirt.path",
    },
    Program {
        name: "virtiofsd",
        of: &["vmm"],
        key: "helpers.virtiofsd",
        missing: State::Bad,
        remedy: "apt install virtiofsd, or set helpers.virtiofsd",
    },
    Program {
        name: "vhost-device-vsock",
        of: &["vmm"],
        key: "helpers.vsock",
        missing: State::Absent,
        remedy: "install vhost-device-vsock, where the kernel has no vhost_vsock",
    },
];

/// Where a daemon's configuration says that a program is.
fn configured(daemon: &Daemon, key: &str) -> Option<PathBuf> {
    let table = kuasar_daemon::config::table(daemon.config.as_deref()).ok()?;
    let mut parts = key.split('.');
    let first = table.get(parts.next()?)?;
    let path = parts.try_fold(first, |value, part| value.get(part))?.as_str()?;
    kuasar_host::process::find_program(Path::new(path))
}

fn engines(daemons: &[Daemon]) -> Vec<Finding> {
    let mut all: Vec<Finding> = PROGRAMS
        .iter()
        .map(|program| {
            let mut of = daemons.iter().filter(|d| program.of.contains(&d.kind.as_str()));
            let wanted = of.clone().next().is_some();
            let found = of
                .find_map(|daemon| configured(daemon, program.key))
                .or_else(|| crate::config::program(program.name));
            match found {
                Some(path) => Finding::good(ENGINES, program.name, path.display().to_string()),
                None => {
                    let state = if wanted { program.missing } else { State::Absent };
                    Finding::other(state, ENGINES, program.name, "not in PATH", program.remedy)
                }
            }
        })
        .collect();
    let dirs = [
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/lib/x86_64-linux-gnu",
        "/usr/lib/x86_64-linux-gnu",
    ];
    let library = dirs
        .iter()
        .flat_map(std::fs::read_dir)
        .flatten()
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with("libwasmedge.so"));
    all.push(match library {
        Some(entry) => Finding::good(ENGINES, "WasmEdge", entry.path().display().to_string()),
        None => Finding::other(
            State::Absent,
            ENGINES,
            "WasmEdge",
            "no libwasmedge.so",
            "apt install libwasmedge0 (Wasmtime is built in)",
        ),
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        assert_eq!(numbers("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(numbers("v2.1.9+ds1"), Some((2, 1)));
        assert_eq!(numbers("5.15"), Some((5, 15)));
        assert_eq!(numbers("next"), None);
    }

    #[test]
    fn what_nobody_wants_is_never_bad() {
        for finding in findings(&[]).iter().filter(|f| f.area != KERNEL) {
            assert!(matches!(finding.state, State::Good | State::Absent), "{finding:?}");
        }
        let all = findings(
            &["vmm", "gvisor"].map(|kind| crate::daemons::of_kind(kind, Path::new("/nowhere"))),
        );
        assert!(all.iter().all(|f| f.state == State::Good || !f.remedy.is_empty()));
    }
}

//! Devices of a container: which it may use, and its files in `/dev`.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, SFlag, fstatat, makedev, mknodat};
use serde_json::{Value, json};

use kuasar_host::inside::Want;

use super::plan::Plan;
use super::rootfs::target;
use super::{spec, sys};

/// What every container has: name, major, minor.
const DEFAULT: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Links of `/dev`, and what they point at.
const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
];

/// Rules behind those of the spec: making any node, the default devices, ptys, as runc allows them.
pub fn allowed_rules() -> Vec<Value> {
    let rule = |kind: &str, major: i64, minor: i64, access: &str| json!({ "allow": true, "type": kind, "major": major, "minor": minor, "access": access });
    let mut rules = vec![rule("c", -1, -1, "m"), rule("b", -1, -1, "m")];
    rules.extend(DEFAULT.map(|(_, major, minor)| rule("c", major as i64, minor as i64, "rwm")));
    rules.extend([rule("c", 136, -1, "rwm"), rule("c", 5, 2, "rwm")]);
    rules
}

/// Fills `/dev`. The umask is 0.
pub fn fill(root: &impl AsFd, plan: &Plan) -> Result<(), String> {
    let dev = target(root, plan, Path::new("/dev"), Want::Directory)?;
    let own = plan.spec.linux.devices.as_deref().unwrap_or_default();
    for (name, major, minor) in DEFAULT {
        let path = Path::new("/dev").join(name);
        if own.iter().all(|device| super::plan::clean(&device.path) != path) {
            node(&dev, Path::new(name), SFlag::S_IFCHR, 0o666, makedev(major, minor), (0, 0))?;
        }
    }
    for device in own {
        one(root, device, plan)?;
    }
    for (name, to) in LINKS {
        link(&dev, name, to)?;
    }
    Ok(())
}

fn link(dev: &impl AsFd, name: &str, to: &str) -> Result<(), String> {
    let make = || nix::unistd::symlinkat(to, dev.as_fd(), name);
    match make() {
        // `ptmx` has to be the container's own; the image may not decide on it.
        Err(Errno::EEXIST) if name == "ptmx" => {
            let flags = nix::unistd::UnlinkatFlags::NoRemoveDir;
            nix::unistd::unlinkat(dev.as_fd(), name, flags).and_then(|()| make())
        }
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    }
    .map_err(|error| format!("link /dev/{name}: {error}"))
}

fn one(root: &impl AsFd, device: &spec::Device, plan: &Plan) -> Result<(), String> {
    let path = super::plan::clean(&device.path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(format!("device path {:?} is not allowed", device.path));
    };
    let directory = target(root, plan, parent, Want::Directory)?;
    let kind = match device.kind.as_str() {
        "b" => SFlag::S_IFBLK,
        "p" => SFlag::S_IFIFO,
        _ => SFlag::S_IFCHR,
    };
    let number = makedev(
        u64::try_from(device.major).unwrap_or_default(),
        u64::try_from(device.minor).unwrap_or_default(),
    );
    let mode = device.file_mode.unwrap_or(0o666) & 0o7777;
    let owner = (device.uid.unwrap_or(0), device.gid.unwrap_or(0));
    let owner = match &plan.user {
        Some(user) => user.uid(owner.0).zip(user.gid(owner.1)).unwrap_or_default(),
        None => owner,
    };
    node(&directory, Path::new(name), kind, mode, number, owner)
        .map_err(|error| format!("{}: {error}", path.display()))
}

/// Makes a node; what is there already has to be the same device.
fn node(
    directory: &impl AsFd,
    name: &Path,
    kind: SFlag,
    mode: u32,
    number: u64,
    owner: (u32, u32),
) -> Result<(), String> {
    let wrap = |error: Errno| format!("device {}: {error}", name.display());
    match mknodat(directory.as_fd(), name, kind, Mode::from_bits_truncate(mode), number) {
        Ok(()) => {}
        Err(Errno::EEXIST) => {
            let stat =
                fstatat(directory.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(wrap)?;
            let same = stat.st_mode & libc::S_IFMT == kind.bits()
                && (kind == SFlag::S_IFIFO || stat.st_rdev == number);
            if same {
                return Ok(());
            }
            let flags = nix::unistd::UnlinkatFlags::NoRemoveDir;
            nix::unistd::unlinkat(directory.as_fd(), name, flags).map_err(wrap)?;
            mknodat(directory.as_fd(), name, kind, Mode::from_bits_truncate(mode), number)
                .map_err(wrap)?;
        }
        // A user namespace makes no nodes: the host's is bound there.
        Err(Errno::EPERM) if kind != SFlag::S_IFIFO => return bind(directory, name, number),
        Err(error) => return Err(wrap(error)),
    }
    if owner != (0, 0) {
        nix::unistd::fchownat(
            directory.as_fd(),
            name,
            Some(owner.0.into()),
            Some(owner.1.into()),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .map_err(wrap)?;
    }
    Ok(())
}

fn bind(directory: &impl AsFd, name: &Path, number: u64) -> Result<(), String> {
    let host: PathBuf = Path::new("/dev").join(name);
    let wrap = |error: std::io::Error| format!("bind device {}: {error}", host.display());
    let tree = sys::clone_tree_at(&host, false).map_err(wrap)?;
    let stat = nix::sys::stat::fstat(&tree).map_err(|error| wrap(error.into()))?;
    if stat.st_rdev != number {
        return Err(format!("device {}: the host has another one of that name", name.display()));
    }
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let place = nix::fcntl::openat(directory.as_fd(), name, flags, Mode::from_bits_truncate(0o644))
        .map_err(|error| wrap(error.into()))?;
    sys::attach(&tree, &place).map_err(wrap)
}

//! The container's file system, built in its new mount namespace.
//!
//! Order matters, and each step relies on the one before:
//! 1. Copies of everything that is bound, and of the root, are taken while this namespace still is
//!    what the host's is, or the host's itself: a shared mount is a peer of the host's there, so that
//!    each copy can be made private, slave or left shared as its mount asks for.
//! 2. Then everything here becomes a slave of the host's, or this process goes to where nothing is
//!    ([`room`]): what follows is nobody else's.
//! 3. The root's copy is attached, and the mounts are made in their order, on places that are
//!    resolved inside it ([`kuasar_host::inside`]). A mount is given its attributes while it is detached:
//!    there is no moment at which it can be used without.
//! 4. `pivot_root`, and the host's tree is let go.
//! 5. What needs the finished tree: console, read-only root, read-only and masked paths.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kuasar_host::cgroup::{Cgroup, Layout};
use kuasar_host::inside::{self as paths, Want};
use kuasar_host::mount::idmap;
use kuasar_host::safe_path::{is_procfs, open_beneath};
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::stat::{Mode, SFlag, fstat};

use super::plan::{Attr, Mount, Plan, Propagation, What};
use super::{copy_up, devices, room, sys};

const PRIVATE: Propagation = Propagation { kind: libc::MS_PRIVATE, deep: true };
/// What a cgroup mount always is.
const CGROUP_ATTR: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Files below `/proc` that a mount may cover, as runc has them; LXCFS does so.
const COVERED: [&str; 12] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/random/boot_id",
];

fn is_directory(fd: &impl AsFd) -> bool {
    fstat(fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

/// Steps 1 to 3; answers the root. Mounts are mapped by the user namespace `users`. `in_group` is
/// called before the group is looked at, and before this process goes to `empty`: without one it is in a
/// mount namespace of its own already.
pub fn build(
    plan: &Plan,
    users: Option<&OwnedFd>,
    group: Option<&Cgroup>,
    empty: Option<&OwnedFd>,
    mut in_group: impl FnMut() -> Result<(), String>,
) -> Result<OwnedFd, String> {
    let sources =
        plan.mounts.iter().map(|mount| source(mount, users)).collect::<Result<Vec<_>, _>>()?;
    let path = Path::new(&plan.spec.root.path);
    let wrap = |error: std::io::Error| format!("rootfs {}: {error}", path.display());
    let root = sys::clone_tree_at(path, true).map_err(wrap)?;
    let place = match empty {
        Some(empty) => {
            in_group()?;
            room::enter(empty)?
        }
        None => own_mounts(path).map_err(wrap)?,
    };
    let kind = if plan.root.kind == libc::MS_SLAVE { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    sys::set_mount(&root, Attr::default(), Some(Propagation { kind, deep: true }), true)
        .map_err(wrap)?;
    sys::attach(&root, &place).map_err(wrap)?;
    for (mount, source) in plan.mounts.iter().zip(sources) {
        let made = match (&mount.what, source) {
            (What::New(parameters), _) => new(&root, plan, mount, parameters),
            (What::Cgroup, _) => in_group().and_then(|()| {
                let group = group.ok_or("the container's cgroup is not known")?;
                cgroup(&root, plan, mount, group)
            }),
            (What::Bind { .. }, Some(tree)) => bind(&root, plan, mount, &tree),
            (What::Bind { .. }, None) => Ok(()),
        };
        made.map_err(|error| {
            format!("mount {} at {}: {error}", mount.source.display(), mount.at.display())
        })?;
    }
    if plan.fill_dev {
        devices::fill(&root, plan)?;
    }
    if plan.spec.process.cwd.starts_with('/') {
        // As runc has it, a working directory that is missing is made. One that cannot be is
        // explained by who goes there.
        let _ = target(&root, plan, &super::plan::clean(&plan.spec.process.cwd), Want::Directory);
    }
    Ok(root)
}

/// Makes everything in this namespace a slave of the host's; answers where the root's copy belongs.
fn own_mounts(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    nix::mount::mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(path, flags, Mode::empty())?)
}

fn source(mount: &Mount, users: Option<&OwnedFd>) -> Result<Option<OwnedFd>, String> {
    let What::Bind { deep } = mount.what else { return Ok(None) };
    let wrap = |error: std::io::Error| {
        format!("mount {} at {}: {error}", mount.source.display(), mount.at.display())
    };
    let tree = sys::clone_tree_at(&mount.source, deep).map_err(wrap)?;
    if let (Some(below), Some(users)) = (mount.mapped, users) {
        idmap::apply(tree.as_fd(), users.as_fd(), deep && below).map_err(|error| {
            let why = wrap(error);
            format!("{why}: its file system has no id-mapped mounts, or it is one")
        })?;
    }
    Ok(Some(tree))
}

/// A place of the container's, made for its root where it is missing.
pub(super) fn target(
    root: &impl AsFd,
    plan: &Plan,
    at: &Path,
    want: Want,
) -> Result<OwnedFd, String> {
    paths::target_of(root, at, want, plan.root_owner())
}

fn bind(root: &OwnedFd, plan: &Plan, mount: &Mount, tree: &OwnedFd) -> Result<(), String> {
    let wrap = |error: std::io::Error| error.to_string();
    let directory = is_directory(tree);
    let own = mount.propagation.unwrap_or(Propagation { kind: plan.root.kind, deep: true });
    // Nothing is mounted below a file: one call does for all.
    if !directory || !own.deep {
        sys::set_mount(tree, mount.attr, Some(own), false).map_err(wrap)?;
    } else {
        sys::set_mount(tree, Attr::default(), Some(own), true).map_err(wrap)?;
        sys::set_mount(tree, mount.attr, None, false).map_err(wrap)?;
    }
    sys::set_mount(tree, mount.deep_attr, None, true).map_err(wrap)?;
    let want = if directory { Want::Directory } else { Want::File };
    let place = target(root, plan, &mount.at, want)?;
    let covers = COVERED.iter().any(|path| mount.at == Path::new(path));
    let whole = mount.at == Path::new("/proc") && is_procfs(tree.as_fd());
    if is_procfs(place.as_fd()) && !covers && !whole {
        return Err("it would cover a part of /proc".into());
    }
    sys::attach(tree, &place).map_err(wrap)
}

fn new(
    root: &OwnedFd,
    plan: &Plan,
    mount: &Mount,
    parameters: &[(String, Option<String>)],
) -> Result<(), String> {
    let wrap = |error: std::io::Error| error.to_string();
    if matches!(&*mount.kind, "proc" | "sysfs") {
        plain_directory(root, &mount.at)?;
    }
    let place = target(root, plan, &mount.at, Want::Directory)?;
    if is_procfs(place.as_fd()) && mount.kind != "proc" {
        return Err("it would cover a part of /proc".into());
    }
    let mut parameters = parameters.to_vec();
    let given = |name: &str| parameters.iter().any(|(key, _)| key == name);
    if mount.kind == "tmpfs" && !given("mode") {
        // A tmpfs stands for the directory that it covers.
        let stat = fstat(&place).map_err(|error| error.to_string())?;
        parameters.push(("mode".into(), Some(format!("{:o}", stat.st_mode & 0o7777))));
    }
    let attr = mount.attr.set | mount.deep_attr.set;
    let late = if mount.copy_up { libc::MOUNT_ATTR_RDONLY & attr } else { 0 };
    let source = mount.source.to_str().filter(|s| !s.is_empty()).unwrap_or(&mount.kind);
    let made = sys::new_mount(&mount.kind, source, &parameters, attr & !late).map_err(wrap)?;
    if mount.copy_up {
        copy_up::copy(&place, &made)?;
    }
    let own = mount.propagation;
    sys::set_mount(&made, Attr { set: late, clear: 0 }, own, false).map_err(wrap)?;
    sys::attach(&made, &place).map_err(wrap)
}

/// procfs and sysfs are only mounted where no link leads: labels and masks depend on what is there.
fn plain_directory(root: &OwnedFd, at: &Path) -> Result<(), String> {
    let relative = at.strip_prefix("/").unwrap_or(at);
    match open_beneath(root.as_fd(), relative, libc::O_PATH | libc::O_DIRECTORY, 0) {
        Ok(_) => Ok(()),
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(()),
        Err(_) => Err("it has to be mounted on an ordinary directory".into()),
    }
}

/// The container's groups: on v2 its directory, on v1 one directory per hierarchy in a tmpfs.
/// Bound in a namespace of its own or not, it sees these and nothing above.
fn cgroup(root: &OwnedFd, plan: &Plan, mount: &Mount, group: &Cgroup) -> Result<(), String> {
    let wrap = |error: std::io::Error| error.to_string();
    let os = |error: nix::Error| error.to_string();
    let attr = Attr { set: mount.attr.set | mount.deep_attr.set | CGROUP_ATTR, clear: 0 };
    let part = |dir: &Path| -> Result<OwnedFd, String> {
        let tree = sys::clone_tree_at(dir, false)
            .map_err(|error| format!("{}: {error}", dir.display()))?;
        sys::set_mount(&tree, attr, Some(mount.propagation.unwrap_or(PRIVATE)), false)
            .map_err(wrap)?;
        Ok(tree)
    };
    let place = target(root, plan, &mount.at, Want::Directory)?;
    let hierarchies = match group.layout() {
        Layout::V2(at) => return sys::attach(&part(&at.join(group.path()))?, &place).map_err(wrap),
        Layout::V1(hierarchies) => hierarchies,
    };
    let mode = [("mode".to_owned(), Some("755".to_owned()))];
    let tmpfs = sys::new_mount("tmpfs", "tmpfs", &mode, CGROUP_ATTR).map_err(wrap)?;
    sys::attach(&tmpfs, &place).map_err(wrap)?;
    let mut done: Vec<&PathBuf> = Vec::new();
    for (controller, at) in hierarchies {
        let Some(name) = at.file_name() else { continue };
        if !done.contains(&at) {
            done.push(at);
            nix::sys::stat::mkdirat(&tmpfs, name, Mode::from_bits_truncate(0o755)).map_err(os)?;
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let inner = nix::fcntl::openat(&tmpfs, name, flags, Mode::empty()).map_err(os)?;
            sys::attach(&part(&at.join(group.path()))?, &inner).map_err(wrap)?;
        }
        // `cpu` of `cpu,cpuacct`.
        if name != controller.as_str() {
            nix::unistd::symlinkat(name, &tmpfs, controller.as_str()).map_err(os)?;
        }
    }
    let read_only = Attr { set: attr.set & libc::MOUNT_ATTR_RDONLY, clear: 0 };
    sys::set_mount(&tmpfs, read_only, None, false).map_err(wrap)
}

/// Step 4: the root becomes `/`.
pub fn enter(root: &OwnedFd, own: Propagation) -> Result<(), String> {
    let wrap = |error: nix::Error| format!("pivot_root: {error}");
    nix::unistd::fchdir(root).map_err(wrap)?;
    // The old root ends up on top of the new one, where it is let go.
    nix::unistd::pivot_root(".", ".").map_err(wrap)?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH).map_err(wrap)?;
    nix::unistd::chdir("/").map_err(wrap)?;
    if matches!(own.kind, libc::MS_SHARED | libc::MS_UNBINDABLE) {
        sys::set_mount(root, Attr::default(), Some(own), own.deep)
            .map_err(|error| format!("propagation of the root: {error}"))?;
    }
    Ok(())
}

/// The container's own `/dev/null`, if it is one (CVE-2025-31133).
pub fn null(root: &OwnedFd) -> Result<Option<OwnedFd>, String> {
    let Some(fd) = paths::existing(root, Path::new("/dev/null"))? else { return Ok(None) };
    let stat = fstat(&fd).map_err(|error| format!("/dev/null: {error}"))?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT);
    if kind != SFlag::S_IFCHR || stat.st_rdev != nix::sys::stat::makedev(1, 3) {
        return Err("the container's /dev/null is not the null device".into());
    }
    Ok(Some(fd))
}

/// Standard streams that are the host's `/dev/null` become the container's: who holds a file can
/// change its mode.
pub fn own_null(null: &OwnedFd) -> Result<(), String> {
    let mut own = None;
    for stream in 0..3 {
        // SAFETY: borrowed for one call; a closed descriptor answers EBADF.
        let stat = fstat(unsafe { BorrowedFd::borrow_raw(stream) });
        if stat.is_ok_and(|s| s.st_rdev == nix::sys::stat::makedev(1, 3)) {
            if own.is_none() {
                // By the descriptor that was checked; procfs of the container is not asked.
                own = Some(reopen(null)?);
            }
            if let Some(own) = &own {
                // SAFETY: dup2 onto a standard stream of this single-threaded process.
                if unsafe { libc::dup2(own.as_raw_fd(), stream) } < 0 {
                    return Err(format!("dup2: {}", std::io::Error::last_os_error()));
                }
            }
        }
    }
    Ok(())
}

fn reopen(null: &OwnedFd) -> Result<OwnedFd, String> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open("/dev/null", flags, Mode::empty());
    let fd = fd.map_err(|error| format!("open the container's /dev/null: {error}"))?;
    match (fstat(&fd), fstat(null)) {
        (Ok(a), Ok(b)) if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino) => Ok(fd),
        _ => Err("the container's /dev/null has changed".into()),
    }
}

/// Binds the terminal, which is standard input, on `/dev/console`.
pub fn console(root: &OwnedFd) -> Result<(), String> {
    let place = paths::target(root, Path::new("/dev/console"), Want::File)?;
    // SAFETY: standard input stays open for this call.
    let terminal = unsafe { BorrowedFd::borrow_raw(0) };
    sys::clone_tree(terminal, false)
        .and_then(|tree| sys::attach(&tree, &place))
        .map_err(|error| format!("/dev/console: {error}"))
}

/// The last of step 5.
pub fn close(root: &OwnedFd, plan: &Plan, null: Option<&OwnedFd>) -> Result<(), String> {
    let linux = &plan.spec.linux;
    for path in linux.readonly_paths.iter().flatten() {
        let Some(place) = guarded(root, path, plan)? else { continue };
        let attr = Attr { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
        sys::clone_tree(place.as_fd(), true)
            .and_then(|tree| {
                sys::set_mount(&tree, attr, None, false)?;
                sys::attach(&tree, &place)
            })
            .map_err(|error| format!("make {path} read-only: {error}"))?;
    }
    let mut empty: Option<OwnedFd> = None;
    for path in linux.masked_paths.iter().flatten() {
        let Some(place) = guarded(root, path, plan)? else { continue };
        let wrap = |error: std::io::Error| format!("mask {path}: {error}");
        if is_directory(&place) {
            // One empty file system for all of them.
            let mask = match &empty {
                Some(mask) => sys::clone_tree(mask.as_fd(), false),
                None => {
                    let small = [("nr_blocks", "1"), ("nr_inodes", "1")]
                        .map(|(key, value)| (key.to_owned(), Some(value.to_owned())));
                    sys::new_mount("tmpfs", "tmpfs", &small, libc::MOUNT_ATTR_RDONLY)
                }
            };
            let mask = mask.map_err(wrap)?;
            sys::attach(&mask, &place).map_err(wrap)?;
            empty.get_or_insert(mask);
        } else {
            let null = null.ok_or_else(|| format!("mask {path}: there is no /dev/null"))?;
            sys::clone_tree(null.as_fd(), false)
                .and_then(|mask| sys::attach(&mask, &place))
                .map_err(wrap)?;
        }
    }
    if plan.spec.root.readonly {
        let attr = Attr { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
        sys::set_mount(root, attr, None, false)
            .map_err(|error| format!("make the root read-only: {error}"))?;
    }
    Ok(())
}

/// What a read-only or masked path names: no link is followed, since what one leads to is not what
/// is to be guarded, and below a procfs that the spec mounts it has to be procfs.
fn guarded(root: &OwnedFd, path: &str, plan: &Plan) -> Result<Option<OwnedFd>, String> {
    let clean = super::plan::clean(path);
    let relative = clean.strip_prefix("/").unwrap_or(&clean);
    let place = match open_beneath(root.as_fd(), relative, libc::O_PATH, 0) {
        Ok(place) => place,
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            return Ok(None);
        }
        Err(error) => {
            // A link, as `/proc/self/…` or one of the image: guard what it leads to, inside.
            let _ = error;
            match paths::existing(root, &clean)? {
                Some(place) => place,
                None => return Ok(None),
            }
        }
    };
    if plan.has_proc && clean.starts_with("/proc") && !is_procfs(place.as_fd()) {
        let covered = plan
            .mounts
            .iter()
            .any(|mount| mount.at != Path::new("/proc") && clean.starts_with(&mount.at));
        if !covered {
            return Err(format!("{path} is not on procfs: it cannot be guarded"));
        }
    }
    Ok(Some(place))
}

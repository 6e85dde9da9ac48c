//! The root directory of a jail: a small tmpfs with what the program needs and no more.
//!
//! Everything appears at the path that it has on the host, so that no command line has to be
//! translated. What is bound is looked up once, as root and before the program exists; links on
//! the way are followed then and lead nowhere afterwards.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{chdir, pivot_root};

use super::Plan;
use super::run::{Failed, Step};

/// Where the tmpfs is put together: a directory that every host has and nothing in a jail needs.
const PLACE: &str = "/sys";
/// Directories and device nodes only; no file has content of its own.
const SIZE: &str = "size=256k,nr_inodes=2048,mode=755";
/// Devices that any program may expect.
const DEVICES: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/urandom"];

const NONE: Option<&str> = None;

/// How something of the host appears.
#[derive(Clone, Copy, PartialEq)]
enum As {
    Program,
    Data,
    Writable,
    Tree,
}

/// Builds the root and makes it this process's.
pub(super) fn enter(plan: &Plan, program: Option<&std::ffi::CString>) -> Result<(), Failed> {
    // Mounts made later on the host come in here, for the tree that virtiofsd serves; nothing
    // goes out.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)
        .step(|| "separate the mounts from the host's")?;
    // No `nodev`: the devices are nodes in it.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), PLACE, Some("tmpfs"), flags, Some(SIZE))
        .step(|| "mount the root directory")?;
    mount(NONE, PLACE, NONE, MsFlags::MS_PRIVATE, NONE).step(|| "make the root private")?;

    let program = program.map(|p| Path::new(OsStr::from_bytes(p.as_bytes())));
    for path in program.into_iter().chain(plan.config.libraries.iter().map(PathBuf::as_path)) {
        show(path, As::Program)?;
    }
    let view = &plan.view;
    for (paths, how) in [(&view.readable, As::Data), (&view.writable, As::Writable)] {
        for path in paths {
            show(path, how)?;
        }
    }
    if let Some(tree) = &view.shared_tree {
        show(tree, As::Tree)?;
    }
    let owner = super::privileges::user(plan);
    for path in DEVICES.iter().map(Path::new).chain(view.devices.iter().map(PathBuf::as_path)) {
        device(path, owner)?;
    }
    directory(&inside(Path::new("/proc")))?;

    chdir(PLACE).step(|| "enter the root directory")?;
    // The old root lands on top of the new one, and is taken off it: pivot_root(2), NOTES.
    pivot_root(".", ".").step(|| "change the root directory")?;
    umount2(".", MntFlags::MNT_DETACH).step(|| "leave the host's root directory")?;
    chdir("/").step(|| "enter the root directory")
}

/// In the PID namespace: its `/proc`, and nothing changes from here on.
pub(super) fn finish() -> Result<(), Failed> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // Only processes, and of those only the program's: nothing of the kernel's settings.
    mount(Some("proc"), "/proc", Some("proc"), flags, Some("subset=pid")).step(|| "mount /proc")?;
    let flags = MsFlags::MS_REMOUNT
        | MsFlags::MS_BIND
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NOEXEC;
    mount(NONE, "/", NONE, flags, NONE).step(|| "make the root directory read-only")
}

/// Where a path of the host is while the root is put together.
fn inside(path: &Path) -> PathBuf {
    Path::new(PLACE).join(path.strip_prefix("/").unwrap_or(path))
}

fn directory(path: &Path) -> Result<(), Failed> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o755);
    builder.create(path).step(|| format!("make {}", path.display()))
}

fn place_for(path: &Path, is_dir: bool) -> Result<PathBuf, Failed> {
    if !path.is_absolute() || path.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(Failed(format!("{} is no plain absolute path", path.display())));
    }
    let target = inside(path);
    if is_dir {
        directory(&target)?;
    } else {
        directory(target.parent().unwrap_or(Path::new(PLACE)))?;
        if !target.exists() {
            File::create(&target).step(|| format!("make {}", target.display()))?;
        }
    }
    Ok(target)
}

fn show(path: &Path, how: As) -> Result<(), Failed> {
    let source = match fs::canonicalize(path) {
        Ok(source) => source,
        // Lists for several distributions name what not all have; the program says what it misses.
        Err(e)
            if e.kind() == std::io::ErrorKind::NotFound
                && how != As::Writable
                && how != As::Tree =>
        {
            return Ok(());
        }
        Err(e) => return Err(e).step(|| format!("find {}", path.display())),
    };
    let meta = fs::metadata(&source).step(|| format!("look at {}", source.display()))?;
    let target = place_for(path, meta.is_dir())?;
    let step = || format!("show {}", path.display());
    let rec = if how == As::Tree { MsFlags::MS_REC } else { MsFlags::empty() };
    mount(Some(&source), &target, NONE, MsFlags::MS_BIND | rec, NONE).step(step)?;
    if how == As::Tree {
        // What of it may be written is decided by the mounts of the host below it, which come
        // with their own flags. It goes on to follow the host's.
        return Ok(());
    }
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if how != As::Writable {
        flags |= MsFlags::MS_RDONLY;
    }
    if how != As::Program {
        flags |= MsFlags::MS_NOEXEC;
    }
    mount(NONE, &target, NONE, MsFlags::MS_PRIVATE, NONE).step(step)?;
    mount(NONE, &target, NONE, flags, NONE).step(step)
}

/// A device of our own making, which belongs to the program's user.
fn device(path: &Path, (uid, gid): (u32, u32)) -> Result<(), Failed> {
    let meta = fs::metadata(path).step(|| format!("find device {}", path.display()))?;
    if SFlag::from_bits_truncate(meta.mode()) & SFlag::S_IFMT != SFlag::S_IFCHR {
        return Err(Failed(format!("{} is no character device", path.display())));
    }
    let target = inside(path);
    directory(target.parent().unwrap_or(Path::new(PLACE)))?;
    let step = || format!("make device {}", path.display());
    mknod(&target, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, meta.rdev()).step(step)?;
    std::os::unix::fs::chown(&target, Some(uid), Some(gid)).step(step)
}

//! An empty mount namespace, of which those of containers are made.
//!
//! A new mount namespace is a copy of the one that its maker is in. On a node that is every mount of every
//! pod and container: to copy them, and to let them go when the container has its own root, takes the
//! longer the more containers there are, and in between holds them busy for everybody else. Who makes
//! many containers has one namespace with nothing in it but a place, and has each container's process
//! go there when it has its hands on all that it takes with it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;

use super::plan::Propagation;
use super::{Error, Result, rootfs, sys};

/// Where the root of a container is put in there.
pub(super) const PLACE: &str = "/root";

/// Makes one; this process, which has one thread, is where it was before when this comes back.
///
/// # Errors
/// The kernel's. When the way back is barred, this process must not go on.
pub fn make() -> Result<OwnedFd> {
    let os = |what: &str| {
        let what = format!("an empty mount namespace: {what}");
        move |error: Errno| Error::io(what, error)
    };
    let open =
        |path: &str, flags: OFlag| nix::fcntl::open(path, flags | OFlag::O_CLOEXEC, Mode::empty());
    let own = open("/proc/self/ns/mnt", OFlag::O_RDONLY).map_err(os("/proc/self/ns/mnt"))?;
    let process = open("/proc/self", OFlag::O_PATH).map_err(os("/proc/self"))?;
    let flags = [("size", "4k"), ("nr_inodes", "3"), ("mode", "755")]
        .map(|(key, value)| (key.to_owned(), Some(value.to_owned())));
    let attr = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let room = sys::new_mount("tmpfs", "kuasar", &flags, attr)
        .map_err(|error| Error::io("an empty mount namespace: tmpfs", error))?;
    let name = PLACE.trim_start_matches('/');
    nix::sys::stat::mkdirat(&room, name, Mode::S_IRWXU).map_err(os("its only directory"))?;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(os("unshare"))?;
    let made = furnish(&room).and_then(|()| {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        nix::fcntl::openat(&process, "ns/mnt", flags, Mode::empty()).map_err(os("open it"))
    });
    nix::sched::setns(&own, CloneFlags::CLONE_NEWNS).map_err(os("go back"))?;
    made
}

/// Leaves nothing in this process's mount namespace but `room`, for reading.
fn furnish(room: &OwnedFd) -> Result<()> {
    let private = Propagation { kind: libc::MS_PRIVATE, deep: true };
    let wrap = |error: std::io::Error| Error::io("an empty mount namespace", error);
    let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    nix::mount::mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(|error| wrap(error.into()))?;
    let read_only = super::plan::Attr { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
    sys::set_mount(room, read_only, Some(private), false).map_err(wrap)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open("/", flags, Mode::empty()).map_err(|error| wrap(error.into()))?;
    sys::attach(room, &root).map_err(wrap)?;
    rootfs::enter(room, private)
        .map_err(|error| Error::Other(format!("an empty mount namespace: {error}")))
}

/// Goes into a copy of `room`; answers the place for a container's root.
pub(super) fn enter(room: &OwnedFd) -> std::result::Result<OwnedFd, String> {
    let wrap = |error: Errno| format!("the mount namespace: {error}");
    nix::sched::setns(room.as_fd(), CloneFlags::CLONE_NEWNS).map_err(wrap)?;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(wrap)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(Path::new(PLACE), flags, Mode::empty()).map_err(wrap)
}

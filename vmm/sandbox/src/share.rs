//! The tree that a pod's guest sees: `<sandbox>/share`.
//!
//! ```text
//! <sandbox>/share/<container>/rootfs   the container's root file system, mounted on the host
//! <sandbox>/share/<container>/m<N>     its N-th bind volume: a directory or a file
//! <sandbox>/share/<container>@<random>/rootfs   in place of the first, in a share that a guest caches
//! <sandbox>/served                     the same tree, read-only: what is handed to the VMM's side
//! ```
//!
//! `share` is a mount of its own with shared propagation, `served` a slave of it that is
//! read-only: what is mounted below `share` later appears below `served`, in the mount namespaces
//! of helpers too, and the tree itself cannot be changed from there. A guest can write in mounts
//! that are writable and nowhere else, so it cannot plant a link where the host will look: the
//! host resolves names of its own making only, and never below a mounted root or volume.
//!
//! Every mount has its flags before it is attached ([`kuasar_host::mount::tree`]): a read-only
//! volume is read-only on the host side, whatever the guest does.
//!
//! All of this can be found again by path: nothing is held in memory.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use containerd_task::error::{Error, Result};
use kuasar_forward::tree::{failed, place, share as share_mounts, show_rootfs};
use kuasar_host::inside::Want;
use kuasar_host::mount::{Mount, tree};
use kuasar_host::safe_path::Root;
use nix::mount::MsFlags;

/// Between a container's id and what makes the name of a directory unique.
const APART: char = '@';

/// The tree of one pod.
#[derive(Debug, Clone)]
pub struct ShareTree {
    dir: PathBuf,
}

impl ShareTree {
    /// The tree of the pod whose private directory is `dir`.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    fn share(&self) -> PathBuf {
        self.dir.join("share")
    }

    /// The read-only view that is handed to virtiofsd or the VMM.
    pub fn served(&self) -> PathBuf {
        self.dir.join("served")
    }

    /// Where a container's root file system is mounted before the guest may see it.
    fn staging(&self, container: &str) -> PathBuf {
        self.dir.join("containers").join(container).join("rootfs")
    }

    /// Makes the empty tree. Undone by [`ShareTree::remove`].
    ///
    /// # Errors
    /// When a mount fails.
    pub fn make(&self) -> Result<()> {
        let (share, served) = (self.share(), self.served());
        for dir in [&share, &served] {
            kuasar_host::record::private_dir(dir).map_err(failed("make the pod's share"))?;
        }
        let system = |what: &'static str| move |error: nix::Error| Error::internal(what, error);
        let none = None::<&str>;
        share_mounts(&share)?;
        let flags = tree::Flags { read_only: true, ..tree::Flags::default() };
        let view = tree::copy(&share, flags).map_err(failed("copy the pod's share"))?;
        let at = open_dir(&served)?;
        tree::attach(&view, at.as_fd()).map_err(failed("mount the served tree"))?;
        nix::mount::mount(none, &served, none, MsFlags::MS_SLAVE, none)
            .map_err(system("make the served tree a slave"))
    }

    /// Takes over the tree of a machine that was there before its pod: what is mounted in this tree from now on
    /// is seen by whoever serves the other one. Nothing of `other` stays mounted where it was.
    ///
    /// # Errors
    /// When a mount fails: [`ShareTree::remove`] both.
    pub fn take_over(&self, other: &Self) -> Result<()> {
        self.remove()?;
        let (from, to) = (other.share(), self.share());
        // A copy of a shared mount is of the same group, so the slaves of one are those of both.
        nix::mount::mount(Some(&from), &to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|error| Error::internal("take the machine's tree over", error))?;
        other.remove()
    }

    /// Removes every mount of the pod. Idempotent.
    ///
    /// # Errors
    /// When something stays mounted: then nothing may be removed below.
    pub fn remove(&self) -> Result<()> {
        for dir in [self.share(), self.served(), self.dir.join("containers")] {
            kuasar_host::mount::unmount_below(&dir).map_err(failed("unmount the pod's files"))?;
        }
        Ok(())
    }

    fn container(&self, place: &str) -> Result<Root> {
        let root = Root::open(&self.share()).map_err(failed("open the pod's share"))?;
        root.mkdir_all(Path::new(place), 0o755).map_err(failed("make the container's share"))
    }

    /// A directory for a container that no other ever gets, of the same name neither: no id has an `@`.
    pub fn unique(container: &str, random: &str) -> String {
        format!("{container}{APART}{random}")
    }

    /// The container's directories.
    fn places(&self, container: &str) -> Vec<PathBuf> {
        let own = |name: &str| container_of(name) == container;
        let entries = std::fs::read_dir(self.share()).into_iter().flatten().flatten();
        let named = entries.filter(|entry| entry.file_name().to_str().is_some_and(own));
        named.map(|entry| entry.path()).collect()
    }

    /// Mounts a container's root file system, as its snapshotter says, and shows it to the guest in the
    /// directory `place`: the container's, or a [`ShareTree::unique`] one.
    ///
    /// # Errors
    /// When a mount fails; [`ShareTree::remove_container`] undoes what was done.
    pub fn add_rootfs(
        &self,
        (container, place): (&str, &str),
        mounts: &[Mount],
        bundle: &Path,
    ) -> Result<()> {
        // Without mounts the engine has mounted it itself, or it is a plain directory.
        let ready = bundle.join("rootfs");
        show_rootfs(&self.container(place)?, mounts, &ready, &self.staging(container))
    }

    /// Shows a volume to the guest as the container's `number`-th; `source` is an open file or
    /// directory of the host. What the host mounts below it later comes along only if it `follows`
    /// the host's mounts, and nothing ever goes the other way.
    ///
    /// # Errors
    /// When a mount fails.
    pub fn add_volume(
        &self,
        container: &str,
        number: usize,
        source: &OwnedFd,
        (kind, follows): (Want, bool),
        flags: tree::Flags,
    ) -> Result<String> {
        let dir = self.container(container)?;
        let name = format!("m{number}");
        let at = place(&dir, Path::new(&name), kind)?;
        let flags = tree::Flags { no_devices: true, ..flags };
        let copy = tree::copy_of(source.as_fd(), flags).map_err(failed("copy a volume's mount"))?;
        let propagation = if follows { libc::MS_SLAVE } else { libc::MS_PRIVATE };
        tree::set_propagation(&copy, propagation).map_err(failed("copy a volume's mount"))?;
        tree::attach(&copy, at.as_fd()).map_err(failed("show a volume to the guest"))?;
        Ok(name)
    }

    /// Unmounts what the guest saw of a container, and removes its mount points. Idempotent.
    ///
    /// # Errors
    /// When something stays mounted.
    pub fn remove_container(&self, container: &str) -> Result<()> {
        let unmount = |dir: &Path| {
            kuasar_host::mount::unmount_below(dir).map_err(failed("unmount a container"))
        };
        unmount(&self.staging(container))?;
        for dir in self.places(container) {
            unmount(&dir)?;
            remove_mount_points(&dir)?;
        }
        Ok(())
    }

    /// Containers of which there is something in the tree.
    pub fn containers(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.share()).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.map(|name| container_of(&name).to_owned()).collect()
    }
}

/// Whose directory has this name.
fn container_of(name: &str) -> &str {
    name.split_once(APART).map_or(name, |(container, _)| container)
}

/// Removes a container's directory. Mount points only, one by one: should anything be mounted still, this
/// fails instead of emptying a volume.
fn remove_mount_points(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let removed = match entry.file_type() {
            Ok(kind) if kind.is_dir() => std::fs::remove_dir(&path),
            _ => std::fs::remove_file(&path),
        };
        removed.map_err(|error| {
            Error::internal(format!("remove the mount point {}", path.display()), error)
        })?;
    }
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::internal(format!("remove {}", dir.display()), error))
        }
        _ => Ok(()),
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    let root = Root::open(path).map_err(failed("open a mount point"))?;
    root.resolve(Path::new(".")).map_err(failed("open a mount point"))
}

#[cfg(test)]
mod tests {
    use kuasar_host::testing::apart;

    use super::*;

    fn bind(from: &Path) -> Mount {
        Mount {
            kind: "bind".into(),
            source: from.display().to_string(),
            options: vec!["rbind".into(), "rw".into()],
            ..Mount::default()
        }
    }

    fn path_fd(path: &Path) -> OwnedFd {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = std::fs::OpenOptions::new();
        options.read(true).custom_flags(libc::O_PATH).open(path).unwrap().into()
    }

    fn errno(result: std::io::Result<()>) -> Option<i32> {
        result.err().and_then(|e| e.raw_os_error())
    }

    #[test]
    fn a_tree_that_is_taken_over_shows_what_comes_later_to_who_served_it_before() {
        apart(|dir| {
            let image = dir.join("image");
            std::fs::create_dir(&image).unwrap();
            std::fs::write(image.join("file"), "x").unwrap();
            let [pool, pod] = ["pool", "pod"].map(|name| {
                std::fs::create_dir(dir.join(name)).unwrap();
                ShareTree::new(&dir.join(name))
            });
            pool.make().unwrap();
            pod.make().unwrap();
            // As virtiofsd has it in its jail: a slave, which stays when the daemon's own goes.
            let jail = dir.join("jail");
            std::fs::create_dir(&jail).unwrap();
            let none = None::<&str>;
            let bind = |flags| nix::mount::mount(Some(&pool.served()), &jail, none, flags, none);
            bind(MsFlags::MS_BIND | MsFlags::MS_REC).unwrap();
            nix::mount::mount(none, &jail, none, MsFlags::MS_SLAVE, none).unwrap();
            pod.take_over(&pool).unwrap();
            let below = |dir: &Path| kuasar_host::mount::mounts_below(dir).unwrap().len();
            assert_eq!(below(&dir.join("pool")), 0);
            kuasar_host::record::private_dir(&dir.join("pod/containers/c")).unwrap();
            pod.add_rootfs(("c", "c@1"), &[self::bind(&image)], Path::new("/nowhere")).unwrap();
            assert_eq!(std::fs::read(jail.join("c@1/rootfs/file")).unwrap(), b"x");
            assert_eq!(errno(std::fs::write(jail.join("new"), "")), Some(libc::EROFS));
            assert_eq!(pod.containers(), ["c"]);
            pod.remove_container("c").unwrap();
            assert!(!jail.join("c@1").exists());
            nix::mount::umount(&jail).unwrap();
            pod.remove().unwrap();
            assert_eq!(below(dir), 0);
        });
    }

    #[test]
    fn the_served_tree_shows_what_comes_later_and_is_read_only_itself() {
        apart(|dir| {
            let image = dir.join("image");
            std::fs::create_dir(&image).unwrap();
            std::fs::write(image.join("file"), "x").unwrap();
            let tree = ShareTree::new(&dir.join("pod"));
            std::fs::create_dir(dir.join("pod")).unwrap();
            kuasar_host::record::private_dir(&dir.join("pod/containers/c")).unwrap();
            tree.make().unwrap();
            tree.add_rootfs(("c", "c"), &[bind(&image)], Path::new("/nowhere")).unwrap();
            let served = tree.served();
            assert_eq!(std::fs::read(served.join("c/rootfs/file")).unwrap(), b"x");
            std::fs::write(served.join("c/rootfs/new"), "y").unwrap();
            assert_eq!(std::fs::read(image.join("new")).unwrap(), b"y");
            for at in ["new", "c/new"] {
                assert_eq!(errno(std::fs::write(served.join(at), "")), Some(libc::EROFS), "{at}");
            }
            tree.remove_container("c").unwrap();
            tree.remove_container("c").unwrap();
            assert!(!served.join("c").exists() && tree.containers().is_empty());
            assert!(image.join("file").exists());
            tree.remove().unwrap();
            tree.remove().unwrap();
        });
    }

    #[test]
    fn one_volume_is_read_only_in_one_container_and_writable_in_another() {
        apart(|dir| {
            let volume = dir.join("volume");
            std::fs::create_dir(&volume).unwrap();
            std::fs::write(volume.join("config"), "1").unwrap();
            std::fs::create_dir(dir.join("pod")).unwrap();
            let tree = ShareTree::new(&dir.join("pod"));
            tree.make().unwrap();
            let source = path_fd(&volume);
            let ro = tree::Flags { recursive: true, read_only: true, no_devices: false };
            let rw = tree::Flags { read_only: false, ..ro };
            let kind = (Want::Directory, false);
            assert_eq!(tree.add_volume("a", 0, &source, kind, ro).unwrap(), "m0");
            tree.add_volume("b", 0, &source, kind, rw).unwrap();
            let served = tree.served();
            let write = |at: &str| errno(std::fs::write(served.join(at), "2"));
            assert_eq!(write("a/m0/config"), Some(libc::EROFS));
            assert_eq!(write("b/m0/config"), None);
            // An update is seen by everybody.
            assert_eq!(std::fs::read(served.join("a/m0/config")).unwrap(), b"2");
            // One file alone.
            let file = path_fd(&volume.join("config"));
            let flags = tree::Flags { recursive: false, ..ro };
            tree.add_volume("a", 1, &file, (Want::File, false), flags).unwrap();
            assert_eq!(std::fs::read(served.join("a/m1")).unwrap(), b"2");
            assert_eq!(write("a/m1"), Some(libc::EROFS));
            tree.remove_container("a").unwrap();
            assert_eq!(write("b/m0/config"), None);
            tree.remove().unwrap();
            assert_eq!(std::fs::read(volume.join("config")).unwrap(), b"2");
        });
    }

    #[test]
    fn later_mounts_of_the_host_come_to_a_volume_that_follows_them_and_none_goes_back() {
        apart(|dir| {
            let volume = dir.join("volume");
            std::fs::create_dir_all(volume.join("below")).unwrap();
            let none = None::<&str>;
            for flags in [MsFlags::MS_BIND, MsFlags::MS_SHARED] {
                nix::mount::mount(Some(&volume), &volume, none, flags, none).unwrap();
            }
            std::fs::create_dir(dir.join("pod")).unwrap();
            let tree = ShareTree::new(&dir.join("pod"));
            tree.make().unwrap();
            let (source, kind) = (path_fd(&volume), Want::Directory);
            let flags = tree::Flags { recursive: true, ..tree::Flags::default() };
            tree.add_volume("c", 0, &source, (kind, false), flags).unwrap();
            tree.add_volume("c", 1, &source, (kind, true), flags).unwrap();
            kuasar_host::mount::mount_shm(&volume.join("below"), 4096).unwrap();
            std::fs::write(volume.join("below/late"), "").unwrap();
            let share = dir.join("pod/share/c");
            assert!(!share.join("m0/below/late").exists());
            assert!(share.join("m1/below/late").exists());
            // What goes below the pod's copy stays there.
            kuasar_host::mount::unmount(&volume.join("below")).unwrap();
            for name in ["m0", "m1"] {
                kuasar_host::mount::mount_shm(&share.join(name).join("below"), 4096).unwrap();
                std::fs::write(share.join(name).join("below/mine"), "").unwrap();
                assert!(!volume.join("below/mine").exists(), "{name}");
            }
            tree.remove().unwrap();
        });
    }

    #[test]
    fn a_link_in_the_tree_is_not_followed() {
        apart(|dir| {
            std::fs::create_dir(dir.join("pod")).unwrap();
            let tree = ShareTree::new(&dir.join("pod"));
            tree.make().unwrap();
            std::os::unix::fs::symlink("/etc", dir.join("pod/share/c")).unwrap();
            assert!(tree.add_rootfs(("c", "c"), &[bind(dir)], Path::new("/nowhere")).is_err());
            let source = path_fd(dir);
            let flags = tree::Flags::default();
            assert!(tree.add_volume("c", 0, &source, (Want::File, false), flags).is_err());
            assert!(!Path::new("/etc/rootfs").exists() && !Path::new("/etc/m0").exists());
            tree.remove().unwrap();
        });
    }
}

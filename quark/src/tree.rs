//! The tree that becomes the root of Quark's process: `<sandbox>/tree`.
//!
//! ```text
//! tree/config.json            the sandbox's spec
//! tree/rootfs                 the sandbox's own root file system, empty
//! tree/<container>/           a container's bundle: config.json, the FIFOs of its streams
//! tree/<container>/rootfs     its root file system, with its volumes mounted in it
//! tree/<container>/m<N>       a volume for a place that Quark itself mounts over
//! ```
//!
//! The tree is a mount of its own with shared propagation, so that what is mounted later appears
//! in the mount namespace that Quark's process has by then.
//!
//! Two others write here: the image and the containers below `rootfs`, and Quark's process, which
//! a container may have taken over. So nothing is looked up by path: whatever is made is made
//! through descriptors, one name at a time, and what is mounted is attached to a descriptor. Below
//! `rootfs` links are followed as a process of the container would follow them, and stay inside
//! ([`kuasar_host::inside`]); elsewhere none is.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use containerd_task::error::{Error, Result};
use kuasar_forward::tree::{failed, place, share, show_rootfs};
use kuasar_host::inside::{self, Want};
use kuasar_host::mount::{Mount, tree};
use kuasar_host::safe_path::Root;
use nix::sys::stat::{Mode, SFlag, fstat, mknodat};

/// The tree of one pod.
#[derive(Debug, Clone)]
pub struct Tree {
    dir: PathBuf,
}

/// Both ends of a FIFO.
#[derive(Debug)]
pub struct Fifo {
    /// For reading, non-blocking.
    pub read: OwnedFd,
    /// For writing.
    pub write: OwnedFd,
}

/// Opens what a volume is bound to, whatever it is.
///
/// # Errors
/// A text that names it.
pub fn open_source(source: &Path) -> std::io::Result<OwnedFd> {
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(source)
        .map(OwnedFd::from)
}

fn want(source: &OwnedFd) -> Result<Want> {
    let stat = fstat(source).map_err(|error| Error::internal("examine a volume", error))?;
    Ok(match stat.st_mode & libc::S_IFMT {
        libc::S_IFDIR => Want::Directory,
        _ => Want::File,
    })
}

/// A copy of a volume's mounts: later ones of the host come into it only if it `follows` them.
fn copy(source: &OwnedFd, flags: tree::Flags, follows: bool) -> Result<OwnedFd> {
    let copy = tree::copy_of(source.as_fd(), flags).map_err(failed("copy a volume's mount"))?;
    let kind = if follows { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    tree::set_propagation(&copy, kind).map_err(failed("copy a volume's mount"))?;
    Ok(copy)
}

impl Tree {
    /// The tree of the pod whose private directory is `dir`.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.dir.join("tree")
    }

    /// Where a container's root file system is mounted before anybody else may see it.
    fn staging(&self, container: &str) -> PathBuf {
        self.dir.join("containers").join(container).join("rootfs")
    }

    fn root(&self) -> Result<Root> {
        Root::open(&self.path()).map_err(failed("open the pod's tree"))
    }

    fn container(&self, container: &str) -> Result<Root> {
        let made = self.root()?.mkdir_all(Path::new(container), 0o755);
        made.map_err(failed("make the container's bundle"))
    }

    /// Makes the tree with the sandbox's spec in it.
    ///
    /// # Errors
    /// When a mount fails.
    pub fn make(&self, spec: &[u8]) -> Result<()> {
        let path = self.path();
        kuasar_host::record::private_dir(&path.join("rootfs"))
            .map_err(failed("make the pod's tree"))?;
        kuasar_host::record::write_file(&path.join("config.json"), spec, 0o600)
            .map_err(failed("write the sandbox's spec"))?;
        share(&path)
    }

    /// Unmounts everything of the pod. Idempotent.
    ///
    /// # Errors
    /// When something stays mounted: then nothing may be removed below.
    pub fn release(&self) -> Result<()> {
        for dir in [self.path(), self.dir.join("containers")] {
            kuasar_host::mount::unmount_below(&dir).map_err(failed("unmount the pod's files"))?;
        }
        Ok(())
    }

    /// Mounts a container's root file system, as its snapshotter says. Without mounts it is at
    /// `ready` already.
    ///
    /// # Errors
    /// When a mount fails; [`Tree::remove_container`] undoes what was done.
    pub fn add_rootfs(&self, container: &str, mounts: &[Mount], ready: &Path) -> Result<()> {
        show_rootfs(&self.container(container)?, mounts, ready, &self.staging(container))
    }

    /// The container's root file system, once it is mounted.
    fn rootfs(&self, container: &str) -> Result<OwnedFd> {
        let dir = self.container(container)?;
        dir.open_file(Path::new("rootfs"), libc::O_PATH | libc::O_DIRECTORY)
            .map_err(failed("open the rootfs"))
    }

    /// Mounts a volume at `at` in the container's root file system.
    ///
    /// # Errors
    /// When there is no such place and none can be made, or the mount fails.
    pub fn add_volume(
        &self,
        container: &str,
        source: &OwnedFd,
        at: &Path,
        flags: tree::Flags,
        follows: bool,
    ) -> Result<()> {
        let rootfs = self.rootfs(container)?;
        let place = inside::target(&rootfs, at, want(source)?).map_err(|words| {
            Error::InvalidArgument(format!("mount a volume at {}: {words}", at.display()))
        })?;
        let copy = copy(source, flags, follows)?;
        tree::attach(&copy, place.as_fd())
            .map_err(failed(format!("mount a volume at {}", at.display())))
    }

    /// Shows a volume as `name` beside the container's root file system, for Quark to bind.
    ///
    /// # Errors
    /// When a mount fails.
    pub fn add_beside(
        &self,
        container: &str,
        name: &str,
        source: &OwnedFd,
        flags: tree::Flags,
        follows: bool,
    ) -> Result<()> {
        let dir = self.container(container)?;
        let place = place(&dir, Path::new(name), want(source)?)?;
        let copy = copy(source, flags, follows)?;
        tree::attach(&copy, place.as_fd()).map_err(failed("show a volume to Quark"))
    }

    /// Writes the container's spec.
    ///
    /// # Errors
    /// When there is one already, or no room.
    pub fn write_spec(&self, container: &str, spec: &[u8]) -> Result<()> {
        let dir = self.container(container)?;
        let file = dir
            .create_file(Path::new("config.json"), 0o600)
            .map_err(failed("write the container's spec"))?;
        std::io::Write::write_all(&mut std::fs::File::from(file), spec)
            .map_err(|error| Error::internal("write the container's spec", error))
    }

    /// Makes a FIFO in the container's bundle, and opens both ends.
    ///
    /// # Errors
    /// When it is there already, or cannot be made.
    pub fn make_fifo(&self, container: &str, name: &str) -> Result<Fifo> {
        let dir = self.container(container)?;
        let at = dir.resolve(Path::new(".")).map_err(failed("open the container's bundle"))?;
        mknodat(&at, name, SFlag::S_IFIFO, Mode::from_bits_truncate(0o600), 0)
            .map_err(|error| Error::internal(format!("make the FIFO {name}"), error))?;
        let open = |flags: i32| {
            let opened = dir.open_file(Path::new(name), flags | libc::O_NOFOLLOW);
            opened.map_err(failed(format!("open the FIFO {name}")))
        };
        let read = open(libc::O_RDONLY | libc::O_NONBLOCK)?;
        let write = open(libc::O_WRONLY | libc::O_NONBLOCK)?;
        for end in [&read, &write] {
            let stat = fstat(end).map_err(|error| Error::internal("examine a FIFO", error))?;
            if stat.st_mode & libc::S_IFMT != libc::S_IFIFO {
                return Err(Error::internal("open a stream", format!("{name} is no FIFO")));
            }
        }
        Ok(Fifo { read, write })
    }

    /// FIFOs of a container's execs, by the exec's id.
    pub fn execs(&self, container: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path().join(container)).into_iter().flatten();
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut all: Vec<String> = names
            .filter_map(|name| {
                let id = ["-stdin", "-stdout", "-stderr"].iter();
                id.filter_map(|end| name.strip_suffix(end)).next().map(str::to_owned)
            })
            .collect();
        all.sort();
        all.dedup();
        all
    }

    /// Removes FIFOs of a container's bundle. What is not there is no error.
    pub fn remove_fifos(&self, container: &str, names: &[String]) {
        let Ok(dir) = self.root().and_then(|root| {
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            root.open_file(Path::new(container), flags).map_err(failed("open the bundle"))
        }) else {
            return;
        };
        for name in names {
            let _ =
                nix::unistd::unlinkat(&dir, name.as_str(), nix::unistd::UnlinkatFlags::NoRemoveDir);
        }
    }

    /// Unmounts what there is of a container, and removes its bundle. Idempotent.
    ///
    /// # Errors
    /// When something stays mounted.
    pub fn remove_container(&self, container: &str) -> Result<()> {
        for dir in [self.path().join(container), self.staging(container)] {
            kuasar_host::mount::unmount_below(&dir).map_err(failed("unmount a container"))?;
        }
        match Root::open(&self.path()) {
            // Another file system is never entered: should anything be mounted still, this fails
            // instead of emptying a volume.
            Ok(root) => root
                .remove_tree(Path::new(container))
                .map_err(failed("remove the container's bundle")),
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(()),
            Err(error) => Err(failed("open the pod's tree")(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use kuasar_host::testing::apart;
    use nix::mount::MsFlags;

    use super::*;

    fn bind(from: &Path) -> Mount {
        Mount {
            kind: "bind".into(),
            source: from.display().to_string(),
            options: vec!["rbind".into(), "rw".into()],
            ..Mount::default()
        }
    }

    fn pod(dir: &Path) -> Tree {
        let (pod, image) = (dir.join("pod"), dir.join("image"));
        std::fs::create_dir_all(pod.join("containers/c")).unwrap();
        std::fs::create_dir_all(&image).unwrap();
        let tree = Tree::new(&pod);
        tree.make(b"{}").unwrap();
        tree.add_rootfs("c", &[bind(&image)], Path::new("/nowhere")).unwrap();
        tree
    }

    #[test]
    fn a_volume_lands_inside_whatever_links_the_image_has() {
        apart(|dir| {
            let tree = pod(dir);
            let (volume, outside) = (dir.join("volume"), dir.join("outside"));
            std::fs::create_dir(&volume).unwrap();
            std::fs::create_dir(&outside).unwrap();
            std::fs::write(volume.join("file"), "1").unwrap();
            let rootfs = tree.path().join("c/rootfs");
            // As the image would see it, `/outside` is below its own root.
            symlink(&outside, rootfs.join("link")).unwrap();
            symlink("../../../../../../..", rootfs.join("up")).unwrap();
            let source = open_source(&volume).unwrap();
            let flags = tree::Flags { recursive: true, no_devices: true, read_only: true };
            tree.add_volume("c", &source, Path::new("/up/data"), flags, false).unwrap();
            assert_eq!(std::fs::read(rootfs.join("data/file")).unwrap(), b"1");
            assert!(std::fs::write(rootfs.join("data/file"), "2").is_err());
            assert!(tree.add_volume("c", &source, Path::new("/link/data"), flags, false).is_err());
            assert!(std::fs::read_dir(&outside).unwrap().next().is_none());
            let file = open_source(&volume.join("file")).unwrap();
            tree.add_volume("c", &file, Path::new("/etc/one"), flags, false).unwrap();
            assert_eq!(std::fs::read(rootfs.join("etc/one")).unwrap(), b"1");
            tree.remove_container("c").unwrap();
            tree.remove_container("c").unwrap();
            assert!(volume.join("file").exists() && !tree.path().join("c").exists());
            tree.release().unwrap();
        });
    }

    #[test]
    fn links_that_a_hijacked_quark_plants_are_not_followed() {
        apart(|dir| {
            let tree = pod(dir);
            let outside = dir.join("outside");
            std::fs::create_dir(&outside).unwrap();
            symlink(&outside, tree.path().join("d")).unwrap();
            assert!(tree.add_rootfs("d", &[bind(&outside)], Path::new("/nowhere")).is_err());
            assert!(tree.make_fifo("d", "stdout").is_err());
            assert!(tree.write_spec("d", b"{}").is_err());
            symlink(outside.join("spec"), tree.path().join("c/config.json")).unwrap();
            assert!(tree.write_spec("c", b"{}").is_err());
            std::fs::write(tree.path().join("c/stdin"), "").unwrap();
            assert!(tree.make_fifo("c", "stdin").is_err());
            assert!(std::fs::read_dir(&outside).unwrap().next().is_none());
            tree.remove_container("d").unwrap();
            assert!(outside.exists());
            tree.release().unwrap();
        });
    }

    #[test]
    fn what_is_mounted_later_appears_where_quark_lives_and_goes_again() {
        apart(|dir| {
            let tree = pod(dir);
            let (path, image) = (tree.path(), dir.join("image"));
            std::fs::write(image.join("file"), "x").unwrap();
            let (to, from) = std::sync::mpsc::channel::<()>();
            let (back, told) = std::sync::mpsc::channel();
            let quark = std::thread::spawn(move || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
                let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
                nix::mount::mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).unwrap();
                back.send(false).unwrap();
                while from.recv().is_ok() {
                    back.send(path.join("e/rootfs/file").exists()).unwrap();
                }
            });
            told.recv().unwrap();
            let look = || {
                to.send(()).unwrap();
                told.recv().unwrap()
            };
            assert!(!look());
            tree.add_rootfs("e", &[bind(&image)], Path::new("/nowhere")).unwrap();
            assert!(look());
            tree.remove_container("e").unwrap();
            assert!(!look());
            drop(to);
            quark.join().unwrap();
            tree.release().unwrap();
        });
    }
}

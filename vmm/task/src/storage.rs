//! Filesystems that the host asks for: of the pod, or of one container.
//!
//! A message is first made into a [`Plan`]: its target is below `/run/kuasar` and not in the
//! share, whose trees containers can write to; nothing about a device is guessed. Targets are
//! made without following a link.

use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use containerd_task::error::{Error, Result};
use kuasar_host::mount::{Mount, mount_all, unmount};
use kuasar_host::safe_path::Root;
use vmm_common::guest::Storage;
use vmm_common::{ROOTS_PATH, SHARE_PATH};

use crate::boot::DIR;
use crate::limits;

/// How the source of a mount is found.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    /// As it stands.
    Plain(String),
    /// A virtio-blk device by its serial number.
    Serial(String),
    /// A block device by the PCI address of its controller.
    Pci(String),
    /// A block device by its path.
    Device(PathBuf),
}

/// A checked [`Storage`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Empty: the device itself is wanted.
    fstype: String,
    source: Source,
    options: Vec<String>,
    /// Below [`DIR`].
    target: PathBuf,
}

fn bad(storage: &Storage, why: &str) -> Error {
    Error::InvalidArgument(format!("storage {:.80?}: {why}", storage.id))
}

/// Paths as they are without `.`, `..` and anything relative.
fn plain_path(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    let normal = path.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
    (path.is_absolute() && normal && !text.contains('\0')).then(|| path.to_owned())
}

impl Plan {
    /// Checks a message.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that says what is wrong.
    pub fn new(storage: &Storage) -> Result<Self> {
        if storage.id.is_empty() || storage.id.len() > 256 {
            return Err(bad(storage, "its id is empty or too long"));
        }
        if storage.options.len() > limits::ENTRIES || storage.source.len() > 4096 {
            return Err(bad(storage, "too many options, or too long a source"));
        }
        let path = plain_path(&storage.target)
            .ok_or_else(|| bad(storage, "its target is no plain absolute path"))?;
        let target = path.strip_prefix(DIR).map(Path::to_owned).unwrap_or_default();
        if target.as_os_str().is_empty() {
            return Err(bad(storage, "its target is not below /run/kuasar"));
        }
        let inside = |share: &str| path.starts_with(share) && path != Path::new(share);
        if inside(SHARE_PATH) || inside(ROOTS_PATH) {
            return Err(bad(storage, "its target is in the share, where containers can write"));
        }
        let source = storage.source.as_str();
        let mut options = storage.options.clone();
        let has = |key: &str| {
            storage.options.iter().any(|o| o.split('=').next().unwrap_or_default() == key)
        };
        let (fstype, source) = match storage.kind.as_str() {
            "block" => {
                let name = |text: &str| {
                    let good = !text.is_empty()
                        && text.len() <= 64
                        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b));
                    if good && text != "." && text != ".." {
                        Ok(text.to_owned())
                    } else {
                        Err(bad(storage, "its device has no plain name"))
                    }
                };
                let source = match source.split_once(':') {
                    Some(("serial", serial)) => Source::Serial(name(serial)?),
                    Some(("pci", address)) => Source::Pci(name(address)?),
                    Some(("path", path)) => Source::Device(
                        plain_path(path)
                            .filter(|path| path.starts_with("/dev"))
                            .ok_or_else(|| bad(storage, "its device is not below /dev"))?,
                    ),
                    _ => return Err(bad(storage, "its source is none of serial:, pci:, path:")),
                };
                (storage.fstype.clone(), source)
            }
            kind @ ("virtiofs" | "overlay" | "tmpfs" | "hugetlbfs") => {
                let source = if source.is_empty() { kind } else { source };
                (kind.to_owned(), Source::Plain(source.to_owned()))
            }
            "9p" => {
                // Linux documentation, filesystems/9p: the transport's default is TCP.
                for (key, option) in [("trans", "trans=virtio"), ("version", "version=9p2000.L")] {
                    if !has(key) {
                        options.push(option.into());
                    }
                }
                ("9p".into(), Source::Plain(source.to_owned()))
            }
            "bind" => {
                let path = plain_path(source)
                    .ok_or_else(|| bad(storage, "its source is no plain absolute path"))?;
                if !has("bind") && !has("rbind") {
                    options.push("rbind".into());
                }
                ("bind".into(), Source::Plain(path.to_string_lossy().into_owned()))
            }
            kind => return Err(bad(storage, &format!("there is no kind {kind:.40?}"))),
        };
        if storage.kind == "block"
            && !fstype.is_empty()
            && !matches!(fstype.as_str(), "ext4" | "xfs" | "erofs" | "btrfs" | "squashfs" | "ext2")
        {
            return Err(bad(storage, &format!("filesystem {fstype:.40?} is not known here")));
        }
        Ok(Self { fstype, source, options, target })
    }

    /// Does it, and answers where it is.
    ///
    /// # Errors
    /// [`Error::DeadlineExceeded`] for a device that does not appear; the kernel's.
    pub async fn mount(self) -> Result<PathBuf> {
        let device = match &self.source {
            Source::Plain(tag) if self.fstype == "virtiofs" => {
                find_share(Path::new("/sys/fs/virtiofs"), tag).await?;
                PathBuf::from(tag)
            }
            Source::Plain(text) => PathBuf::from(text),
            source => find_device(source).await?,
        };
        let work = move || self.mount_from(&device);
        tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal("worker", error))?
    }

    fn mount_from(self, source: &Path) -> Result<PathBuf> {
        let at = Path::new(DIR).join(&self.target);
        let what = || format!("storage at {}", at.display());
        let failed = |error| Error::internal(what(), error);
        let root = Root::open(Path::new(DIR)).map_err(failed)?;
        let parent = self.target.parent().unwrap_or(Path::new(""));
        if self.fstype.is_empty() {
            make_parent(&root, parent).map_err(failed)?;
            return device_node(source, &at).map(|()| at.clone());
        }
        let is_file = self.fstype == "bind" && source.symlink_metadata().is_ok_and(|m| !m.is_dir());
        if is_file {
            let dir = make_parent(&root, parent).map_err(failed)?;
            let name = self.target.file_name().unwrap_or_default();
            match dir.as_ref().unwrap_or(&root).create_file(Path::new(name), 0o600) {
                Ok(_) => {}
                Err(error) if error.errno() == Some(libc::EEXIST) => {}
                Err(error) => return Err(failed(error)),
            }
        } else {
            root.mkdir_all(&self.target, 0o755).map_err(failed)?;
        }
        if self.fstype == "hugetlbfs" {
            crate::hugepages::for_volume(&self.options)?;
        }
        let mount = Mount {
            kind: self.fstype,
            source: source.to_string_lossy().into_owned(),
            target: String::new(),
            options: self.options,
        };
        match mount_all(std::slice::from_ref(&mount), &at) {
            Ok(()) => Ok(at),
            Err(error) if error.kind() == kuasar_host::Kind::Invalid => {
                Err(Error::InvalidArgument(Error::internal(what(), error).chain()))
            }
            Err(error) => Err(failed(error)),
        }
    }
}

fn make_parent(root: &Root, parent: &Path) -> kuasar_host::Result<Option<Root>> {
    if parent.as_os_str().is_empty() {
        return Ok(None);
    }
    root.mkdir_all(parent, 0o755).map(Some)
}

/// A node of the device under another name.
fn device_node(device: &Path, at: &Path) -> Result<()> {
    use nix::sys::stat::{Mode, SFlag, mknod};
    let failed = |error| Error::internal(format!("device node {}", at.display()), error);
    let found = std::fs::symlink_metadata(device).map_err(failed)?;
    let mode = Mode::from_bits_truncate(0o600);
    match mknod(at, SFlag::S_IFBLK, mode, found.rdev()) {
        Ok(()) => Ok(()),
        Err(nix::Error::EEXIST) => {
            let there = std::fs::symlink_metadata(at).map_err(failed)?;
            if there.file_type().is_block_device() && there.rdev() == found.rdev() {
                return Ok(());
            }
            Err(Error::AlreadyExists(format!("{} is something else", at.display())))
        }
        Err(error) => Err(failed(error.into())),
    }
}

/// Waits for a share that was just plugged in. A kernel before 6.9 lists none: there the mount
/// itself says whether it is there.
async fn find_share(sys: &Path, tag: &str) -> Result<()> {
    let listed = |entry: &std::fs::DirEntry| {
        let name = std::fs::read_to_string(entry.path().join("tag")).unwrap_or_default();
        name.trim_end_matches('\n') == tag
    };
    let what = format!("the share {tag:.40}");
    crate::uevent::wait_for(&what, limits::DEVICE_TIME, || {
        let Ok(entries) = std::fs::read_dir(sys) else { return Ok(Some(())) };
        Ok(entries.flatten().any(|entry| listed(&entry)).then_some(()))
    })
    .await
}

async fn find_device(source: &Source) -> Result<PathBuf> {
    let what = match source {
        Source::Serial(serial) => format!("the block device with serial number {serial}"),
        Source::Pci(address) => format!("the block device at PCI address {address}"),
        Source::Device(path) => format!("the block device {}", path.display()),
        Source::Plain(text) => text.clone(),
    };
    crate::uevent::wait_for(&what, limits::DEVICE_TIME, || {
        let name = match source {
            Source::Serial(serial) => by_serial(Path::new("/sys/block"), serial),
            Source::Pci(address) => by_pci(Path::new("/sys/bus/pci/devices"), address),
            Source::Device(path) => return Ok(is_ready(path).then(|| path.clone())),
            Source::Plain(_) => None,
        };
        Ok(name.map(|name| Path::new("/dev").join(name)).filter(|path| is_ready(path)))
    })
    .await
}

fn is_block(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|m| m.file_type().is_block_device())
}

/// A disk that was just plugged in has its node and its serial number a moment before it can be
/// opened (`ENXIO`); the kernel tells of it after that.
fn is_ready(path: &Path) -> bool {
    let early = |error: std::io::Error| error.raw_os_error() == Some(libc::ENXIO);
    is_block(path) && !std::fs::File::open(path).is_err_and(early)
}

fn by_serial(sys: &Path, serial: &str) -> Option<std::ffi::OsString> {
    let entries = std::fs::read_dir(sys).ok()?;
    let has = |entry: &std::fs::DirEntry| {
        let text = std::fs::read_to_string(entry.path().join("serial"));
        text.is_ok_and(|text| text.trim_end() == serial)
    };
    entries.flatten().find(has).map(|entry| entry.file_name())
}

/// `<device>/virtio<N>/block/<name>` for virtio, `<device>/block/<name>` and deeper for others.
fn by_pci(sys: &Path, address: &str) -> Option<std::ffi::OsString> {
    fn below(dir: &Path, depth: usize) -> Option<std::ffi::OsString> {
        let block = dir.join("block");
        if let Some(entry) = std::fs::read_dir(&block).ok().and_then(|d| d.flatten().next()) {
            return Some(entry.file_name());
        }
        let entries = std::fs::read_dir(dir).ok()?.flatten();
        let dirs = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        dirs.filter(|_| depth > 0).find_map(|e| below(&e.path(), depth - 1))
    }
    // The entry is a link into /sys/devices.
    below(&std::fs::canonicalize(sys.join(address)).ok()?, 3)
}

/// The storages of the pod, by id.
#[derive(Default)]
pub struct Storages {
    table: Mutex<HashMap<String, (Storage, PathBuf)>>,
    /// One at a time: what is asked for twice is mounted once.
    turn: tokio::sync::Mutex<()>,
}

impl Storages {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Storage, PathBuf)>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mounts it, unless the same one is there.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when another one has the id or the target, and of [`Plan`].
    pub async fn add(&self, storage: &Storage) -> Result<PathBuf> {
        let plan = Plan::new(storage)?;
        let _turn = self.turn.lock().await;
        {
            let table = self.lock();
            if let Some((old, path)) = table.get(&storage.id) {
                if old == storage {
                    return Ok(path.clone());
                }
                let text = format!("another storage has the id {:.80}", storage.id);
                return Err(Error::AlreadyExists(text));
            }
            if table.values().any(|(old, _)| old.target == storage.target) {
                let text = format!("another storage is at {:.200}", storage.target);
                return Err(Error::AlreadyExists(text));
            }
            if table.len() >= limits::STORAGES {
                let text = format!("the pod has {} storages already", limits::STORAGES);
                return Err(Error::ResourceExhausted(text));
            }
        }
        let path = plan.mount().await?;
        self.lock().insert(storage.id.clone(), (storage.clone(), path.clone()));
        Ok(path)
    }

    /// Unmounts it; one that is not known is no error.
    ///
    /// # Errors
    /// Of the kernel.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let _turn = self.turn.lock().await;
        let Some(path) = self.lock().get(id).map(|(_, path)| path.clone()) else { return Ok(()) };
        tokio::task::spawn_blocking(move || take_away(&path))
            .await
            .map_err(|error| Error::internal("worker", error))??;
        self.lock().remove(id);
        Ok(())
    }
}

/// Unmounts what [`Plan::mount`] answered, and removes its mount point. Blocks.
///
/// # Errors
/// Of the kernel.
pub fn take_away(path: &Path) -> Result<()> {
    unmount(path).map_err(|e| Error::internal(format!("unmount {}", path.display()), e))?;
    // Only what is empty goes: an empty directory, a device node, an empty file.
    match path.symlink_metadata() {
        Ok(m) if m.is_dir() => drop(std::fs::remove_dir(path)),
        Ok(m) if m.file_type().is_block_device() || m.len() == 0 => {
            drop(std::fs::remove_file(path));
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(kind: &str, source: &str, target: &str) -> Storage {
        Storage {
            id: "s".into(),
            kind: kind.into(),
            source: source.into(),
            target: target.into(),
            ..Default::default()
        }
    }

    #[test]
    fn targets_stay_below_our_directory_and_out_of_the_share() {
        for target in [
            "/run/kuasar",
            "/run/kuasar/",
            "/run/kuasar/../x",
            "/etc",
            "run/kuasar/x",
            "",
            "/run/kuasar/share/c/rootfs",
            "/run/kuasar/roots/c@1/rootfs",
            "/run/kuasar/share/../x",
            "/run/kuasarx/y",
        ] {
            let error = Plan::new(&storage("tmpfs", "", target)).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{target}");
        }
        let plan = Plan::new(&storage("virtiofs", "kuasar", SHARE_PATH)).unwrap();
        assert_eq!(plan.target, Path::new("share"));
    }

    #[test]
    fn no_device_and_no_filesystem_is_guessed() {
        let at = "/run/kuasar/d";
        let mut s = storage("block", "serial:disk-1", at);
        assert_eq!(Plan::new(&s).unwrap().source, Source::Serial("disk-1".into()));
        s.fstype = "ext4".into();
        assert_eq!(Plan::new(&s).unwrap().fstype, "ext4");
        s.fstype = "auto".into();
        assert!(Plan::new(&s).is_err());
        for source in
            ["vda", "serial:", "serial:a/b", "pci:..", "path:/etc/passwd", "path:/dev/../x"]
        {
            assert!(Plan::new(&storage("block", source, at)).is_err(), "{source}");
        }
        assert!(Plan::new(&storage("nfs", "x", at)).is_err());
    }

    #[test]
    fn a_bind_binds_and_9p_goes_over_virtio() {
        let plan = Plan::new(&storage("bind", "/run/kuasar/share/c/m0", "/run/kuasar/b")).unwrap();
        assert_eq!(plan.options, ["rbind"]);
        let plan = Plan::new(&storage("9p", "kuasar", "/run/kuasar/share")).unwrap();
        assert_eq!(plan.options, ["trans=virtio", "version=9p2000.L"]);
        assert!(Plan::new(&storage("bind", "../x", "/run/kuasar/b")).is_err());
    }

    #[test]
    fn odd_messages_are_refused_and_nothing_else() {
        let mut random = crate::testing::Random(11);
        for _ in 0..3000 {
            let mut text = |n| String::from_utf8_lossy(&random.bytes(n)).into_owned();
            let kinds = ["block", "bind", "9p", "tmpfs", "overlay"];
            let (source, tail, options) = (text(30), text(30), text(20));
            for kind in kinds {
                let mut s = storage(kind, &source, &format!("/run/kuasar/{tail}"));
                s.options = vec![options.clone()];
                if let Ok(plan) = Plan::new(&s) {
                    let plain = |c| matches!(c, Component::Normal(_));
                    assert!(plan.target.components().all(plain), "{s:?}");
                }
            }
        }
    }

    #[test]
    fn devices_are_found_by_serial_and_address() {
        let sys = tempfile::tempdir().unwrap();
        let at = |p: &str| sys.path().join(p);
        for (name, serial) in [("vda", "root\n"), ("vdb", "disk-1\n")] {
            std::fs::create_dir_all(at(name)).unwrap();
            std::fs::write(at(name).join("serial"), serial).unwrap();
        }
        assert_eq!(by_serial(sys.path(), "disk-1").unwrap(), "vdb");
        assert_eq!(by_serial(sys.path(), "disk"), None);
        std::fs::create_dir_all(at("0000:00:05.0/virtio3/block/vdc")).unwrap();
        assert_eq!(by_pci(sys.path(), "0000:00:05.0").unwrap(), "vdc");
        assert_eq!(by_pci(sys.path(), "0000:00:06.0"), None);
    }
}

//! Block storage of containers: root file systems that a snapshotter keeps on a block device or in
//! an image file, and raw block volumes. Each becomes a virtio-blk disk of the machine, plugged in
//! while it runs; the guest finds it by its serial number, and mounts it or hands it on.
//!
//! | what the engine asks for | on the host | in the guest |
//! |---|---|---|
//! | rootfs: one mount of a file system whose source is a block device or an image | opened once, never mounted | mounted for the container |
//! | a block device in the spec (`volumeMode: Block`) | opened by its number | a node for the container, with the guest's number |
//!
//! **Which device.** A path is opened without following a link in its last name, and only below
//! `/dev`, where udev makes links, are those followed, and none out of it. A number in the spec is
//! looked up in sysfs, and what was opened must have it: nothing is guessed from where something
//! lies (CVE-2026-24054). Images are always raw, so nothing that a guest writes is ever taken for
//! another format or a backing file.
//!
//! **Disks of the pod.** Two containers may use one volume: it is one disk, under a name made of its
//! number, and goes when the last container that has it in its record is deleted. A record is
//! written before the machine is changed: after a crash the container is deleted, and its disks
//! with it.
//!
//! **A guest that does not let go** of a disk keeps it until its machine ends. Delete of the
//! container succeeds all the same, or a hostile guest would hold up the engine.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_task::error::{Error, Result};
use kuasar_host::mount::Mount;
use kuasar_host::safe_path;
use serde::{Deserialize, Serialize};
use vmm_common::guest::{Device, Storage};

use crate::vmm::{self, Disk, DiskFormat, Feature, Vm, VmState};

/// Root file systems in the guest that came on disks.
const ROOTFS: &str = "/run/kuasar/rootfs";
/// Device nodes of containers' volumes in the guest.
const DEVICES: &str = "/run/kuasar/devices";
/// File in a pod's directory with the machine's newest state.
const RECORD: &str = "vm.json";
/// Most block volumes of a container.
pub const MAX_VOLUMES: usize = 64;

/// Block storage: `[storage]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorageConfig {
    /// Root file systems on block devices go to the guest as disks where the machine can take
    /// them. `false`: the host mounts them and shares the files. (Image files always go as disks:
    /// nothing here mounts those.)
    pub block_rootfs: bool,
    /// File systems that the guest's kernel can mount. Others are mounted by the host.
    pub filesystems: Vec<String>,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self { block_rootfs: true, filesystems: vec!["ext4".into(), "erofs".into()] }
    }
}

/// A root file system on a block device or in an image file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Device or image.
    pub source: PathBuf,
    /// File system.
    pub fstype: String,
    /// Mount options for the guest.
    pub options: Vec<String>,
    /// The guest may not write.
    pub read_only: bool,
    /// It is an image file.
    pub file: bool,
}

impl Image {
    /// The image of a rootfs that is one, or nothing: then its mounts are the host's to make.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a source that is missing or a link.
    pub fn of(mounts: &[Mount]) -> Result<Option<Self>> {
        let [mount] = mounts else { return Ok(None) };
        let plain = !mount.kind.is_empty() && mount.kind.bytes().all(|b| b.is_ascii_alphanumeric());
        let has = |name: &str| mount.options.iter().any(|option| option == name);
        let source = Path::new(&mount.source);
        if !plain
            || !mount.target.is_empty()
            || !source.is_absolute()
            || has("bind")
            || has("rbind")
        {
            return Ok(None);
        }
        // No node behind a tmpfs or an overlay; those of file systems on disks are looked at.
        if ["overlay", "tmpfs", "bind", "virtiofs", "nfs", "fuse"].contains(&mount.kind.as_str()) {
            return Ok(None);
        }
        let kind = open(source, libc::O_PATH)?.metadata();
        let kind = kind.map_err(|error| unreadable(source, &error))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Ok(None);
        }
        // These file systems have no writable kind.
        let read_only =
            has("ro") || ["erofs", "squashfs", "iso9660"].contains(&mount.kind.as_str());
        let mut options: Vec<String> = mount
            .options
            .iter()
            .filter(|option| !matches!(option.as_str(), "loop" | "ro" | "rw" | "defaults"))
            .cloned()
            .collect();
        if read_only {
            options.push("ro".into());
        }
        Ok(Some(Self {
            source: source.to_owned(),
            fstype: mount.kind.clone(),
            options,
            read_only,
            file: kind.is_file(),
        }))
    }
}

/// A raw block volume, as the spec has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Number of the host's device.
    pub major: u32,
    /// Number of the host's device.
    pub minor: u32,
    /// Where the container sees it.
    pub path: String,
    /// Permission bits, owner and group of its node.
    pub node: (u32, u32, u32),
    /// Letters of `rwm`.
    pub access: String,
}

impl Volume {
    fn read_only(&self) -> bool {
        !self.access.contains('w')
    }
}

/// A disk that a container has, in its record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Used {
    /// Its name in the machine.
    pub id: String,
    /// The guest may not write.
    pub read_only: bool,
}

/// Disks that were opened for a container.
#[derive(Debug, Default)]
pub struct Opened {
    rootfs: Option<(Disk, Image)>,
    volumes: Vec<(Disk, Volume)>,
}

/// What the guest is told of a container's disks.
#[derive(Debug, Default)]
pub struct Told {
    /// Where the root file system is, if it is on a disk.
    pub rootfs: Option<String>,
    /// To be mounted for the container.
    pub storages: Vec<Storage>,
    /// To be given to it.
    pub devices: Vec<Device>,
}

impl Opened {
    /// Opens them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that names path or number and says what is wrong with it.
    pub fn open(container: &str, image: Option<Image>, volumes: Vec<Volume>) -> Result<Self> {
        let rootfs = match image {
            None => None,
            Some(image) => {
                let file = open(&image.source, access(image.read_only))?;
                let id = rootfs_id(container);
                let disk =
                    Disk::from_file(id, &image.source, file, DiskFormat::Raw, image.read_only);
                Some((disk.map_err(machine)?, image))
            }
        };
        let open = |volume: Volume| {
            let (path, file) = open_number(&volume)?;
            let id = format!("v{:x}-{:x}", volume.major, volume.minor);
            let disk = Disk::from_file(id, &path, file, DiskFormat::Raw, volume.read_only());
            Ok((disk.map_err(machine)?, volume))
        };
        let volumes = volumes.into_iter().map(open).collect::<Result<_>>()?;
        Ok(Self { rootfs, volumes })
    }

    /// Their names, for the container's record.
    pub fn used(&self) -> Vec<Used> {
        let all: BTreeSet<Used> = self.disks().map(used).collect();
        all.into_iter().collect()
    }

    fn disks(&self) -> impl Iterator<Item = &Disk> {
        let volumes = self.volumes.iter().map(|(disk, _)| disk);
        self.rootfs.iter().map(|(disk, _)| disk).chain(volumes)
    }

    fn is_empty(&self) -> bool {
        self.rootfs.is_none() && self.volumes.is_empty()
    }
}

fn used(disk: &Disk) -> Used {
    Used { id: disk.id.clone(), read_only: disk.read_only }
}

/// The disks of one pod's machine.
#[derive(Debug)]
pub struct Disks {
    /// None when the machine has ended.
    vm: Option<Arc<dyn Vm>>,
    dir: PathBuf,
    /// One change at a time: who has a disk is counted.
    turn: tokio::sync::Mutex<()>,
}

impl Disks {
    /// Those of the machine of the pod whose private directory is `dir`.
    pub fn new(vm: Option<Arc<dyn Vm>>, dir: &Path) -> Self {
        Self { vm, dir: dir.to_owned(), turn: tokio::sync::Mutex::default() }
    }

    /// The machine, while there is one.
    pub(crate) fn machine(&self) -> Option<&Arc<dyn Vm>> {
        self.vm.as_ref()
    }

    /// Whether the machine takes disks while it runs.
    pub fn pluggable(&self) -> bool {
        self.vm.as_ref().is_some_and(|vm| vm.features().has(Feature::DiskHotplug))
    }

    /// Why it does not.
    pub fn cannot(&self, what: &str) -> Error {
        match &self.vm {
            Some(vm) => {
                Error::Unimplemented(format!("{what}: {}", vm.cannot(Feature::DiskHotplug)))
            }
            None => Error::FailedPrecondition("the machine has ended".into()),
        }
    }

    /// Plugs them in. `others`: what the pod's other containers have.
    ///
    /// # Errors
    /// Of the machine; [`Error::FailedPrecondition`] for a volume that another container has
    /// read-only.
    pub async fn plug(
        &self,
        container: &str,
        opened: Opened,
        others: impl FnOnce() -> Vec<Used>,
    ) -> Result<Told> {
        if opened.is_empty() {
            return Ok(Told::default());
        }
        let vm = self.vm.as_ref().ok_or_else(|| self.cannot("disks"))?;
        let _turn = self.turn.lock().await;
        let others = others();
        for disk in opened.disks() {
            let had = others.iter().find(|other| other.id == disk.id);
            if had.is_some_and(|had| had.read_only && !disk.read_only) {
                return Err(Error::FailedPrecondition(format!(
                    "volume {} is read-only in another container of the pod, and a machine has a \
                     disk once: ask for it read-only here, or start the container that writes first",
                    disk.path.display()
                )));
            }
            match vm.attach_disk(disk).await {
                Ok(()) => {}
                // Of another container, or of one that had no patience while its guest let go.
                Err(vmm::Error::DeviceExists(_)) if disk.id.starts_with('v') => {}
                Err(error) => return Err(machine(error)),
            }
        }
        self.record(vm)?;
        Ok(opened.tell(container, |id| vm.disk_serial(id)))
    }

    /// Takes disks out that no other container has.
    pub async fn unplug(&self, had: &[Used], others: impl FnOnce() -> Vec<Used>) {
        let Some(vm) = self.vm.as_ref().filter(|_| !had.is_empty()) else { return };
        let _turn = self.turn.lock().await;
        let others: BTreeSet<String> = others().into_iter().map(|used| used.id).collect();
        for disk in had.iter().filter(|disk| !others.contains(&disk.id)) {
            match vm.detach(&disk.id).await {
                Ok(()) | Err(vmm::Error::NoDevice(_) | vmm::Error::Gone) => {}
                Err(error) => tracing::warn!(
                    disk = disk.id,
                    error = crate::errors::chain(&error),
                    "a disk stays in the machine until its end"
                ),
            }
        }
        if let Err(error) = self.record(vm) {
            tracing::warn!(error = error.chain(), "the machine's disks are not recorded");
        }
    }

    fn record(&self, vm: &Arc<dyn Vm>) -> Result<()> {
        let text = serde_json::to_vec(&vm.state())
            .map_err(|error| Error::internal("record the machine", error))?;
        kuasar_host::record::write_file(&self.dir.join(RECORD), &text, 0o600)
            .map_err(|error| Error::internal("record the machine", error))
    }
}

/// What is known of the pod's machine at last: its disks may have changed since the pod's own
/// record was written.
pub(crate) fn newest(dir: &Path, recorded: VmState) -> VmState {
    let text = std::fs::read(dir.join(RECORD)).unwrap_or_default();
    match serde_json::from_slice::<VmState>(&text) {
        Ok(newer) if newer.vmm == recorded.vmm && newer.kind == recorded.kind => newer,
        _ => recorded,
    }
}

impl Opened {
    fn tell(&self, container: &str, serial: impl Fn(&str) -> String) -> Told {
        let mut told = Told::default();
        let source = |disk: &Disk| format!("serial:{}", serial(&disk.id));
        if let Some((disk, image)) = &self.rootfs {
            let target = format!("{ROOTFS}/{container}");
            told.storages.push(Storage {
                id: disk.id.clone(),
                kind: "block".into(),
                source: source(disk),
                fstype: image.fstype.clone(),
                options: image.options.clone(),
                target: target.clone(),
                ..Storage::default()
            });
            told.rootfs = Some(target);
        }
        for (n, (disk, volume)) in self.volumes.iter().enumerate() {
            let target = format!("{DEVICES}/{container}-{n}");
            told.storages.push(Storage {
                id: format!("{}-{n}", disk.id),
                kind: "block".into(),
                source: source(disk),
                target: target.clone(),
                ..Storage::default()
            });
            let (mode, uid, gid) = volume.node;
            told.devices.push(Device {
                node: target,
                path: volume.path.clone(),
                mode,
                uid,
                gid,
                access: volume.access.clone(),
                ..Device::default()
            });
        }
        told
    }
}

/// The same in each daemon: FNV-1a of the container's id.
fn rootfs_id(container: &str) -> String {
    let hash = container.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| {
        (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("r{hash:016x}")
}

fn machine(error: vmm::Error) -> Error {
    let text = error.chain();
    match error {
        vmm::Error::Unsupported { .. } => Error::Unimplemented(text),
        vmm::Error::Invalid(_) => Error::InvalidArgument(text),
        vmm::Error::Exhausted(_) => Error::ResourceExhausted(text),
        vmm::Error::Deadline { .. } => Error::DeadlineExceeded(text),
        vmm::Error::Refused { .. } | vmm::Error::DeviceExists(_) | vmm::Error::Gone => {
            Error::FailedPrecondition(text)
        }
        other => Error::internal("the machine's disks", other),
    }
}

fn access(read_only: bool) -> i32 {
    if read_only { libc::O_RDONLY } else { libc::O_RDWR }
}

fn unreadable(path: &Path, why: &dyn std::fmt::Display) -> Error {
    Error::InvalidArgument(format!("disk {}: {why}", path.display()))
}

/// Opens an image or device: no link in its last name, and no link out of `/dev`.
fn open(path: &Path, flags: i32) -> Result<File> {
    if let Ok(name) = path.strip_prefix("/dev") {
        let dev = safe_path::Root::open(Path::new("/dev"))
            .and_then(|dev| dev.resolve(Path::new(".")))
            .map_err(|error| unreadable(path, &error))?;
        // A device's name is often a link of udev (/dev/mapper): inside of /dev it is followed.
        let flags = if flags & libc::O_PATH == 0 { flags | libc::O_NONBLOCK } else { flags };
        let opened = safe_path::open_in_root(dev.as_fd(), name, flags)
            .map_err(|error| unreadable(path, &error))?;
        return Ok(File::from(opened));
    }
    let mut options = File::options();
    options.read(true).write(flags & libc::O_RDWR != 0);
    // A FIFO must not block us. O_PATH opens a link itself: it is then no file.
    options.custom_flags(flags & libc::O_PATH | libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let opened = options.open(path).map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => unreadable(path, &"it is a link, which is not followed"),
        _ => unreadable(path, &error),
    })?;
    if opened.metadata().is_ok_and(|meta| meta.file_type().is_symlink()) {
        return Err(unreadable(path, &"it is a link, which is not followed"));
    }
    Ok(opened)
}

/// Opens the host's block device of a number.
fn open_number(volume: &Volume) -> Result<(PathBuf, File)> {
    let (major, minor) = (volume.major, volume.minor);
    let what = PathBuf::from(format!("{major}:{minor} for {:.200}", volume.path));
    let about = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
    let about = about.map_err(|error| unreadable(&what, &format!("no such device ({error})")))?;
    let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| unreadable(&what, &"the kernel has no name for it"))?;
    let path = Path::new("/dev").join(name);
    let file = open(&path, access(volume.read_only()))?;
    let meta = file.metadata().map_err(|error| unreadable(&path, &error))?;
    let number = nix::sys::stat::makedev(u64::from(major), u64::from(minor));
    if !meta.file_type().is_block_device() || meta.rdev() != number {
        let why = format!("it is not device {major}:{minor}: is /dev as the kernel says?");
        return Err(unreadable(&path, &why));
    }
    Ok((path, file))
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;

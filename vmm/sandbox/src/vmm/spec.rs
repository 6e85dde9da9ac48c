//! What a machine is made of: the same for every VMM. Drivers refuse what theirs cannot do.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::{Doing, Error, Result};
use super::helpers::Cache;

/// A machine to be started.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Its name: the sandbox id. Letters, digits, `-`, `_`, `.`.
    pub id: String,
    /// Private directory of this machine (0700, ours): sockets, console log. It outlives the
    /// daemon and is named in [`super::VmState`]. Short: socket paths have at most 107 bytes.
    pub dir: PathBuf,
    /// CPUs.
    pub cpus: Range,
    /// Memory in MiB. The most is address space, not memory, as long as nothing uses it.
    pub memory_mib: Range,
    /// Back guest memory with huge pages of 2 MiB.
    pub hugepages: bool,
    /// What it boots.
    pub boot: Boot,
    /// Directories of the host that it sees.
    pub shares: Vec<Share>,
    /// Network interfaces.
    pub nics: Vec<Nic>,
    /// Disks, the one that it boots from not among them.
    pub disks: Vec<Disk>,
    /// How the host talks to the guest's agent.
    pub channel: Channel,
    /// A virtio entropy source, fed from the host's `/dev/urandom`.
    pub entropy: bool,
    /// Guest console and the VMM's standard output.
    pub console: Console,
    /// The network namespace that the VMM runs in; that of the daemon when it is `None` and
    /// there is no jail.
    pub netns: Option<Arc<OwnedFd>>,
    /// `cgroup.procs` files of the cgroups that VMM and helpers enter before they run.
    pub cgroups: Vec<PathBuf>,
}

/// How many there are at first, and how many there may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// At boot.
    pub at_boot: u32,
    /// At most; not less than `at_boot`.
    pub most: u32,
}

impl Range {
    /// Never more than at boot.
    pub fn fixed(at_boot: u32) -> Self {
        Self { at_boot, most: at_boot }
    }
}

/// What a machine boots.
#[derive(Debug, Clone)]
pub struct Boot {
    /// Kernel: an ELF file with a PVH note or a bzImage (x86_64), an Image (aarch64).
    pub kernel: PathBuf,
    /// Root file system.
    pub root: Root,
    /// Kernel parameters of the guest; the driver adds those that its machine needs.
    pub params: Vec<String>,
}

/// The guest's root file system.
#[derive(Debug, Clone)]
pub enum Root {
    /// An initramfs.
    Initrd(PathBuf),
    /// A read-only disk, the first one that the guest sees. The driver adds [`root_params`].
    Image {
        /// The image.
        disk: Disk,
        /// Its file system, for `rootfstype=`.
        fstype: String,
    },
}

impl Root {
    /// The file that holds it.
    pub fn path(&self) -> &Path {
        match self {
            Self::Initrd(path) => path,
            Self::Image { disk, .. } => &disk.path,
        }
    }

    /// The disk, when it is one.
    pub fn disk(&self) -> Option<&Disk> {
        match self {
            Self::Image { disk, .. } => Some(disk),
            Self::Initrd(_) => None,
        }
    }
}

/// What tells a kernel to boot from its first disk. Its program has the same place there as in an
/// initramfs, where the kernel looks for it by itself.
pub fn root_params(fstype: &str) -> [String; 4] {
    ["root=/dev/vda".into(), "ro".into(), format!("rootfstype={fstype}"), "init=/init".into()]
}

/// A directory of the host that the guest can mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Mount tag, at most 36 bytes.
    pub tag: String,
    /// The directory.
    pub dir: PathBuf,
    /// How it is served.
    pub kind: ShareKind,
    /// The VMM's side refuses to write. Mount it read-only on the host all the same.
    pub read_only: bool,
    /// What the guest may cache of it (virtiofs).
    #[serde(default)]
    pub cache: Cache,
}

/// How a directory is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShareKind {
    /// By a virtiofsd of its own, beside the VMM.
    Virtiofs,
    /// By the VMM itself, as 9p (QEMU).
    Ninep,
}

/// A network interface.
#[derive(Debug, Clone)]
pub struct Nic {
    /// Name of the device, see [`Disk::id`].
    pub id: String,
    /// MAC address.
    pub mac: [u8; 6],
    /// MTU that the guest is told.
    pub mtu: u16,
    /// Tap device: one descriptor for each pair of queues.
    pub tap: Vec<Arc<OwnedFd>>,
    /// Name of the tap device and address of the host's side, for VMMs that open it by name.
    pub tap_name: Option<(String, Option<Ipv4Addr>)>,
}

impl Nic {
    /// The MAC address as text.
    pub fn mac_text(&self) -> String {
        let [a, b, c, d, e, f] = self.mac;
        format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// A virtio-blk disk.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Name of the device: unique in the machine, at most 20 bytes of letters, digits, `-`, `_`,
    /// beginning with a letter. The guest sees it as the disk's serial number.
    pub id: String,
    /// Where it is. For people and for VMMs that open disks by path; others get `file`.
    pub path: PathBuf,
    /// Format of the image. Never guessed: a guest that writes another format's header into its
    /// raw disk must not make the next start follow it. Backing files are never followed.
    pub format: DiskFormat,
    /// The guest may not write; the descriptor is not open for writing either.
    pub read_only: bool,
    /// It is a block device.
    pub block_device: bool,
    /// The open file.
    pub file: Arc<File>,
}

impl Disk {
    /// Opens an image or block device that the host's administrator or snapshotter named. For
    /// paths below something that a guest can write use `kuasar_host::safe_path` and
    /// [`Disk::from_file`].
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] for a directory, socket or the like.
    pub fn open(
        id: impl Into<String>,
        path: &Path,
        format: DiskFormat,
        read_only: bool,
    ) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(!read_only)
            // A FIFO must not block us; close-on-exec is what std does by itself.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .doing(|| format!("open disk {}", path.display()))?;
        Self::from_file(id, path, file, format, read_only)
    }

    /// The same, of a file that is open already.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn from_file(
        id: impl Into<String>,
        path: &Path,
        file: File,
        format: DiskFormat,
        read_only: bool,
    ) -> Result<Self> {
        let id = id.into();
        check_device_id(&id)?;
        let kind = file.metadata().doing(|| format!("look at {}", path.display()))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Invalid(format!(
                "disk {}: neither a regular file nor a block device",
                path.display()
            )));
        }
        let block_device = kind.is_block_device();
        Ok(Self { id, path: path.into(), format, read_only, block_device, file: Arc::new(file) })
    }
}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl DiskFormat {
    /// Its name in QEMU's options.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// How the host talks to the agent in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// No channel.
    None,
    /// vsock through unix sockets: `uds` takes `CONNECT <port>\n`; what the guest dials arrives
    /// at `<uds>_<port>`. Whatever makes it so (the VMM, or `vhost-device-vsock` beside it) is
    /// the driver's affair. See [`super::vsock`].
    HybridVsock {
        /// Context id of the guest, 3 or more.
        cid: u32,
        /// The host's socket. Its directory belongs to the channel alone: the VMM or helper
        /// may write there.
        uds: PathBuf,
    },
    /// vsock of the host's kernel (`/dev/vhost-vsock`); the host dials `cid`.
    KernelVsock {
        /// Context id of the guest, unique on the host, 3 or more; 0 lets the driver take one
        /// that is free, which [`super::VmState::channel`] has then.
        cid: u32,
    },
    /// One virtio-serial port ([`SERIAL_PORT`]) whose bytes come out at a unix socket.
    Serial {
        /// The socket; the driver makes it. One connection at a time.
        socket: PathBuf,
        /// The port is a console, the first one of the machine.
        #[serde(default)]
        console: bool,
        /// A relay beside the VMM ([`crate::relay`]) has that connection, and serves vsock's unix
        /// sockets here, as for [`Channel::HybridVsock`].
        #[serde(default)]
        uds: Option<PathBuf>,
    },
}

impl Channel {
    /// The unix socket at which the guest's ports are dialled, where there is one.
    pub fn uds(&self) -> Option<&Path> {
        match self {
            Self::HybridVsock { uds, .. } => Some(uds),
            Self::Serial { uds, .. } => uds.as_deref(),
            Self::None | Self::KernelVsock { .. } => None,
        }
    }

    /// The sockets of it that are left when the machine has ended.
    pub(super) fn sockets(&self) -> Vec<PathBuf> {
        let port = match self {
            Self::Serial { socket, .. } => Some(socket.clone()),
            _ => None,
        };
        self.uds().map(Path::to_owned).into_iter().chain(port).collect()
    }
}

/// By which way the agents of a VMM's machines are reached: `channel` in its configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// vsock as unix sockets, made by the VMM or by `vhost-device-vsock` beside it.
    #[default]
    Hybrid,
    /// A virtio-serial port.
    Serial,
    /// The same as a console.
    Console,
    /// vsock of the host's kernel.
    Vsock,
}

/// Name of the virtio-serial port of [`Channel::Serial`].
pub const SERIAL_PORT: &str = "org.kuasar.agent.0";

/// Where the guest's console and the VMM's own words go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Console {
    /// The log. One older part stands beside it with `.1` appended.
    pub log: PathBuf,
    /// Bytes of each of the two; what is older is gone. 0 keeps no log.
    pub limit: u64,
}

impl VmSpec {
    /// Checks what is the same for all VMMs.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the field and what would be right.
    pub fn check(&self) -> Result<()> {
        let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.id.is_empty() || self.id.len() > 128 || !self.id.chars().all(name) {
            return invalid("a machine's id has 1 to 128 letters, digits, '-', '_' or '.'");
        }
        for (what, range) in [("CPUs", self.cpus), ("memory", self.memory_mib)] {
            if range.at_boot == 0 || range.most < range.at_boot {
                return Err(Error::Invalid(format!(
                    "{what}: {} at boot and {} at most: at least one, and not more than at most",
                    range.at_boot, range.most
                )));
            }
        }
        let mut ids = std::collections::BTreeSet::new();
        let disks = self.disks.iter().map(|disk| &disk.id);
        for id in disks.chain(self.nics.iter().map(|nic| &nic.id)) {
            check_device_id(id)?;
            if !ids.insert(id) {
                return Err(Error::DeviceExists(id.clone()));
            }
        }
        for nic in &self.nics {
            if nic.mac.first().is_some_and(|byte| byte & 1 == 1) {
                return Err(Error::Invalid(format!(
                    "{}: {} is a multicast address",
                    nic.id,
                    nic.mac_text()
                )));
            }
        }
        for share in &self.shares {
            if share.tag.is_empty() || share.tag.len() > 36 || !share.tag.chars().all(name) {
                return invalid("a share's tag has 1 to 36 letters, digits, '-', '_' or '.'");
            }
        }
        match &self.channel {
            Channel::KernelVsock { cid: 0 } => Ok(()),
            Channel::HybridVsock { cid, .. } | Channel::KernelVsock { cid }
                if *cid < 3 || *cid == u32::MAX =>
            {
                invalid("a guest's vsock context id is 3 or more")
            }
            // The longest that comes behind it is `_` and five digits.
            Channel::HybridVsock { uds, .. } => check_socket(uds, 6),
            Channel::Serial { socket, uds, .. } => {
                uds.as_ref().map_or(Ok(()), |uds| check_socket(uds, 6))?;
                check_socket(socket, 0)
            }
            _ => Ok(()),
        }
    }
}

/// Whether a socket's path leaves room for `more` bytes.
pub(crate) fn check_socket(path: &Path, more: usize) -> Result<()> {
    let most = kuasar_host::socket::MAX_PATH - more;
    if path.as_os_str().len() > most {
        return Err(Error::Invalid(format!(
            "{} is longer than the {most} bytes that a socket's path may have: shorten the state \
             directory",
            path.display()
        )));
    }
    Ok(())
}

pub(crate) fn check_device_id(id: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if id.len() > 20 || !id.starts_with(|c: char| c.is_ascii_alphabetic()) || !id.chars().all(good)
    {
        return invalid("a device's id has 1 to 20 letters, digits, '-' or '_', a letter first");
    }
    Ok(())
}

fn invalid<T>(text: &str) -> Result<T> {
    Err(Error::Invalid(text.into()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine for the drivers' own tests.
    pub(crate) fn spec() -> VmSpec {
        VmSpec {
            id: "one".into(),
            dir: "/run/k/vm".into(),
            cpus: Range::fixed(1),
            memory_mib: Range::fixed(128),
            hugepages: false,
            boot: Boot {
                kernel: "/k/vmlinux".into(),
                root: Root::Initrd("/k/initrd".into()),
                params: vec!["quiet".into()],
            },
            shares: Vec::new(),
            nics: Vec::new(),
            disks: Vec::new(),
            channel: Channel::HybridVsock { cid: 3, uds: "/run/k/v/s".into() },
            entropy: true,
            console: Console { log: "/run/k/console.log".into(), limit: 4096 },
            netns: None,
            cgroups: Vec::new(),
        }
    }
}

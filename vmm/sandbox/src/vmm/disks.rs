//! Disks for VMMs that open them by path (Cloud Hypervisor, Firecracker, StratoVirt).
//!
//! A jailed VMM sees no path of the host, runs as a user who may open nothing there, and a disk may
//! come long after its jail was closed. So each machine has a small tmpfs, seen by its VMM as well,
//! into which the daemon puts a device node for each disk, owned by the VMM's user: the disk's own
//! for a block device, a loop device's over the already open descriptor for a file. No path is
//! opened a second time that something else may have changed, no file changes its owner, and a disk
//! that is read-only is so in the kernel. The loop device goes by itself when the VMM closes it.
//!
//! A VMM that is not jailed is root and gets a link to the disk's path, so that what it reports of
//! its disks has the same names.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, mknod};

use super::error::{Doing, Error, Result};
use super::spec::Disk;

/// Nodes only. No `nodev`: the nodes are its purpose.
const OPTIONS: &str = "size=16k,nr_inodes=512,mode=711";
/// Attempts to get a loop device that nobody else has taken between two calls.
const ATTEMPTS: usize = 16;

/// linux/loop.h.
mod uapi {
    pub const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
    pub const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
    pub const LO_FLAGS_READ_ONLY: u32 = 1;
    pub const LO_FLAGS_AUTOCLEAR: u32 = 4;

    /// `struct loop_info64`.
    #[repr(C)]
    pub struct Info {
        pub device: u64,
        pub inode: u64,
        pub rdevice: u64,
        pub offset: u64,
        pub size_limit: u64,
        pub number: u32,
        pub encrypt_type: u32,
        pub encrypt_key_size: u32,
        pub flags: u32,
        pub file_name: [u8; 64],
        pub crypt_name: [u8; 64],
        pub encrypt_key: [u8; 32],
        pub init: [u64; 2],
    }

    /// `struct loop_config`.
    #[repr(C)]
    pub struct Config {
        pub fd: u32,
        pub block_size: u32,
        pub info: Info,
        pub reserved: [u64; 8],
    }
}

/// The disks of one machine.
#[derive(Debug, Clone)]
pub(super) struct Disks {
    dir: PathBuf,
    owner: Option<(u32, u32)>,
}

/// A disk's path for the VMM. What must stay open until the VMM has opened it goes with this.
#[derive(Debug)]
pub(super) struct Placed {
    pub path: PathBuf,
    _loop_device: Option<File>,
}

impl Disks {
    /// Those of a machine that is there already.
    pub fn of(dir: &Path, owner: Option<(u32, u32)>) -> Self {
        Self { dir: dir.join("disks"), owner }
    }

    /// Makes the directory of a machine that is to start. `owner`: the jailed VMM's user.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(dir: &Path, owner: Option<(u32, u32)>) -> Result<Self> {
        let disks = Self::of(dir, owner);
        disks.release();
        kuasar_host::record::private_dir(&disks.dir)?;
        if owner.is_some() {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
            mount(Some("kuasar-disks"), &disks.dir, Some("tmpfs"), flags, Some(OPTIONS))
                .doing(|| format!("mount a tmpfs at {}", disks.dir.display()))?;
        }
        Ok(disks)
    }

    /// The directory, for the jail; none without one.
    pub fn shown(&self) -> Option<PathBuf> {
        self.owner.map(|_| self.dir.clone())
    }

    /// Where a disk is, once it was placed.
    pub fn path(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// The id of the disk at a path that a VMM reports.
    pub fn id_of<'a>(&self, path: &'a str) -> Option<&'a str> {
        let path = Path::new(path);
        (path.parent() == Some(&self.dir)).then(|| path.file_name()?.to_str()).flatten()
    }

    /// Makes a disk visible to the VMM.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Exhausted`] without a free loop device.
    pub fn place(&self, disk: &Disk) -> Result<Placed> {
        let path = self.path(&disk.id);
        super::core::remove(&path);
        let Some(owner) = self.owner else {
            std::os::unix::fs::symlink(&disk.path, &path)
                .doing(|| format!("make {}", path.display()))?;
            return Ok(Placed { path, _loop_device: None });
        };
        let (device, held) = if disk.block_device {
            let meta = disk.file.metadata().doing(|| "look at a disk")?;
            (meta.rdev(), None)
        } else {
            let held = loop_device(disk)?;
            let meta = held.metadata().doing(|| "look at a loop device")?;
            (meta.rdev(), Some(held))
        };
        let mode = if disk.read_only { Mode::S_IRUSR } else { Mode::S_IRUSR | Mode::S_IWUSR };
        mknod(&path, SFlag::S_IFBLK, mode, device)
            .and_then(|()| nix::unistd::chown(&path, Some(owner.0.into()), Some(owner.1.into())))
            .doing(|| format!("make device {}", path.display()))?;
        Ok(Placed { path, _loop_device: held })
    }

    /// Takes a disk away. A VMM that has it open keeps it until it closes it.
    pub fn remove(&self, id: &str) {
        super::core::remove(&self.path(id));
    }

    /// Takes everything away.
    pub fn release(&self) {
        if self.owner.is_some() {
            match umount2(&self.dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(error) => {
                    tracing::warn!(dir = %self.dir.display(), %error, "cannot unmount");
                }
            }
        }
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            super::core::remove(&entry.path());
        }
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// A loop device over an open file; it is gone when the last who has it open closes it.
fn loop_device(disk: &Disk) -> Result<File> {
    let control = File::options().read(true).write(true).open("/dev/loop-control");
    let control = control.doing(|| "open /dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        // SAFETY: the call takes no argument.
        let n = unsafe { libc::ioctl(control.as_raw_fd(), uapi::LOOP_CTL_GET_FREE) };
        let n = Errno::result(n).doing(|| "find a free loop device")?;
        let path = format!("/dev/loop{n}");
        let device = File::options()
            .read(true)
            .write(!disk.read_only)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .doing(|| format!("open {path}"))?;
        if !device.metadata().is_ok_and(|meta| meta.file_type().is_block_device()) {
            return Err(Error::Invalid(format!("{path} is no block device")));
        }
        let read_only = if disk.read_only { uapi::LO_FLAGS_READ_ONLY } else { 0 };
        // SAFETY: integers and arrays of them, for which zero is a value.
        let mut config: uapi::Config = unsafe { std::mem::zeroed() };
        config.fd = u32::try_from(disk.file.as_fd().as_raw_fd()).unwrap_or(u32::MAX);
        config.info.flags = uapi::LO_FLAGS_AUTOCLEAR | read_only;
        // SAFETY: LOOP_CONFIGURE reads a `struct loop_config`.
        let r = unsafe { libc::ioctl(device.as_raw_fd(), uapi::LOOP_CONFIGURE, &raw const config) };
        match Errno::result(r) {
            Ok(_) => return Ok(device),
            // Somebody else was quicker.
            Err(Errno::EBUSY) => {}
            Err(error) => return Err(error).doing(|| format!("put {} on {path}", disk.id)),
        }
    }
    Err(Error::Exhausted("other programs take every loop device: try again".into()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::spec::DiskFormat;
    use super::*;

    fn disk(dir: &Path, read_only: bool) -> Disk {
        let path = dir.join("image");
        let mut file = File::create(&path).unwrap();
        writeln!(file, "content").unwrap();
        file.set_len(1 << 20).unwrap();
        Disk::open("one", &path, DiskFormat::Raw, read_only).unwrap()
    }

    #[test]
    fn without_a_jail_a_disk_is_a_link_and_its_id_is_known_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::new(dir.path(), None).unwrap();
        let placed = disks.place(&disk(dir.path(), true)).unwrap();
        assert_eq!(std::fs::read_link(&placed.path).unwrap(), dir.path().join("image"));
        assert_eq!(disks.id_of(placed.path.to_str().unwrap()), Some("one"));
        assert_eq!(disks.id_of("/etc/passwd"), None);
        disks.remove("one");
        assert!(!placed.path.exists());
        disks.release();
        assert!(!dir.path().join("disks").exists());
    }

    #[test]
    fn a_jailed_vmms_disk_is_a_device_of_its_user_over_the_open_file() {
        if !Path::new("/dev/loop-control").exists() {
            println!("skipped: needs loop devices");
            return;
        }
        kuasar_host::testing::apart(|dir| {
            let disks = Disks::new(dir, Some((65_530, 65_530))).unwrap();
            let disk = disk(dir, true);
            // What the path leads to now is of no interest any more.
            std::fs::remove_file(&disk.path).unwrap();
            let placed = disks.place(&disk).unwrap();
            let meta = std::fs::metadata(&placed.path).unwrap();
            assert!(meta.file_type().is_block_device());
            assert_eq!((meta.uid(), meta.mode() & 0o777), (65_530, 0o400));
            let mut text = [0; 7];
            let mut opened = File::open(&placed.path).unwrap();
            opened.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"content");
            // Even root, whom the node's mode does not stop.
            let mut writer = File::options().write(true).open(&placed.path).unwrap();
            assert!(writer.write_all(&[0; 512]).is_err(), "read-only");
            drop((placed, opened, writer));
            disks.release();
            assert!(!dir.join("disks").exists());
        });
    }
}

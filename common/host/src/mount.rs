//! Mounts by system call.
//!
//! containerd hands a rootfs over as a list of mounts. Overlay options with many layers outgrow
//! the page that `mount(2)` copies, so overlay goes through `fsopen`/`fsconfig`, where each
//! layer is a call of its own, and falls back to `mount(2)` on kernels without.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};

use crate::{Context, Error, Result};

/// A mount in `mount(8)`'s terms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mount {
    /// Filesystem type.
    pub kind: String,
    /// Source.
    pub source: String,
    /// Target below the directory given to [`mount_all`]; empty for the directory itself.
    pub target: String,
    /// Options.
    pub options: Vec<String>,
}

/// Flags and data of a list of options.
fn parse_options(options: &[String]) -> (MsFlags, MsFlags, Vec<&str>) {
    let (mut flags, mut propagation, mut data) = (MsFlags::empty(), MsFlags::empty(), Vec::new());
    for o in options {
        let (set, flag) = match o.as_str() {
            "ro" => (true, MsFlags::MS_RDONLY),
            "rw" => (false, MsFlags::MS_RDONLY),
            "nosuid" => (true, MsFlags::MS_NOSUID),
            "suid" => (false, MsFlags::MS_NOSUID),
            "nodev" => (true, MsFlags::MS_NODEV),
            "dev" => (false, MsFlags::MS_NODEV),
            "noexec" => (true, MsFlags::MS_NOEXEC),
            "exec" => (false, MsFlags::MS_NOEXEC),
            "sync" => (true, MsFlags::MS_SYNCHRONOUS),
            "async" => (false, MsFlags::MS_SYNCHRONOUS),
            "dirsync" => (true, MsFlags::MS_DIRSYNC),
            "noatime" => (true, MsFlags::MS_NOATIME),
            "atime" => (false, MsFlags::MS_NOATIME),
            "nodiratime" => (true, MsFlags::MS_NODIRATIME),
            "relatime" => (true, MsFlags::MS_RELATIME),
            "strictatime" => (true, MsFlags::MS_STRICTATIME),
            "bind" => (true, MsFlags::MS_BIND),
            "rbind" => (true, MsFlags::MS_BIND | MsFlags::MS_REC),
            "defaults" => (true, MsFlags::empty()),
            "shared" | "rshared" | "slave" | "rslave" | "private" | "rprivate" | "unbindable"
            | "runbindable" => {
                propagation = match o.trim_start_matches('r') {
                    "shared" => MsFlags::MS_SHARED,
                    "slave" => MsFlags::MS_SLAVE,
                    "private" => MsFlags::MS_PRIVATE,
                    _ => MsFlags::MS_UNBINDABLE,
                };
                if o.starts_with('r') {
                    propagation |= MsFlags::MS_REC;
                }
                continue;
            }
            other => {
                data.push(other);
                continue;
            }
        };
        flags.set(flag, set);
    }
    (flags, propagation, data)
}

/// Mounts a list in order on (or below) `dir`. When one fails, those before it are undone.
///
/// # Errors
/// [`Error::Io`] naming the mount, [`Error::Invalid`] for a target outside `dir` or an option
/// that needs a mount helper.
pub fn mount_all(mounts: &[Mount], dir: &Path) -> Result<()> {
    for (i, m) in mounts.iter().enumerate() {
        if let Err(e) = mount_one(m, dir) {
            if i > 0 {
                // Undo what was mounted; the first error is the one to report.
                let _ = unmount_below(dir);
            }
            return Err(e);
        }
    }
    Ok(())
}

fn mount_one(m: &Mount, dir: &Path) -> Result<()> {
    if let Some(o) = m.options.iter().find(|o| *o == "loop" || o.starts_with("X-containerd.")) {
        return Err(Error::Invalid(format!(
            "mount option {o:?} needs a mount manager; let containerd 2.2 or later do this mount"
        )));
    }
    let mut target = dir.to_path_buf();
    if !m.target.is_empty() {
        let rel = Path::new(m.target.trim_start_matches('/'));
        if rel.components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
            return Err(Error::Invalid(format!("mount target {:?} leaves the rootfs", m.target)));
        }
        target.push(rel);
    }
    let (flags, propagation, data) = parse_options(&m.options);
    let what = || format!("cannot mount {} {} on {}", m.kind, m.source, target.display());
    if m.kind == "overlay" {
        match overlay(&target, flags, &data) {
            Ok(()) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {}
            Err(e) => return Err(e).context(what),
        }
    }
    let data = data.join(",");
    let source = Some(m.source.as_str()).filter(|s| !s.is_empty());
    let kind = (!flags.contains(MsFlags::MS_BIND)).then_some(m.kind.as_str());
    let text = (!data.is_empty()).then_some(data.as_str());
    nix::mount::mount(source, &target, kind, flags, text).context(what)?;
    // The kernel ignores other flags on the first bind.
    let extra = flags - MsFlags::MS_BIND - MsFlags::MS_REC;
    if flags.contains(MsFlags::MS_BIND) && !extra.is_empty() {
        let flags = flags | MsFlags::MS_REMOUNT;
        let none = None::<&str>;
        nix::mount::mount(none, &target, none, flags - MsFlags::MS_REC, none).context(what)?;
    }
    if !propagation.is_empty() {
        let none = None::<&str>;
        nix::mount::mount(none, &target, none, propagation, none).context(what)?;
    }
    Ok(())
}

/// Mounts an overlay through the file-descriptor based API.
fn overlay(target: &Path, flags: MsFlags, data: &[&str]) -> std::io::Result<()> {
    const FSCONFIG_SET_FLAG: u32 = 0;
    const FSCONFIG_SET_STRING: u32 = 1;
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
    let own = |fd: libc::c_long| {
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    };
    // SAFETY: a valid string; FSOPEN_CLOEXEC is 1.
    let fs = own(unsafe { libc::syscall(libc::SYS_fsopen, c"overlay".as_ptr(), 1) })?;
    let set = |cmd: u32, key: Option<&str>, value: Option<&str>| {
        let c = |s: &str| CString::new(s).map_err(|_| std::io::Error::from_raw_os_error(libc::EINVAL));
        let (key, value) = (key.map(c).transpose()?, value.map(c).transpose()?);
        let p = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
        // SAFETY: null or valid strings that live across the call.
        let r = unsafe {
            libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), cmd, p(&key), p(&value), 0)
        };
        if r < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    set(FSCONFIG_SET_STRING, Some("source"), Some("overlay"))?;
    for option in data {
        match option.split_once('=') {
            // From Linux 6.5 layers are added one by one; before, they are one string, and
            // a string of fsconfig is at most 255 bytes: then mount(2) has to do.
            Some(("lowerdir", value)) => {
                for layer in value.split(':') {
                    if set(FSCONFIG_SET_STRING, Some("lowerdir+"), Some(layer)).is_err() {
                        return Err(std::io::Error::from_raw_os_error(libc::ENOSYS));
                    }
                }
            }
            Some((key, value)) => set(FSCONFIG_SET_STRING, Some(key), Some(value))?,
            None => set(FSCONFIG_SET_FLAG, Some(option), None)?,
        }
    }
    set(FSCONFIG_CMD_CREATE, None, None)?;
    let attr = [
        (MsFlags::MS_RDONLY, 1u32),
        (MsFlags::MS_NOSUID, 2),
        (MsFlags::MS_NODEV, 4),
        (MsFlags::MS_NOEXEC, 8),
        (MsFlags::MS_NOATIME, 0x10),
    ];
    let attr = attr.iter().filter(|(f, _)| flags.contains(*f)).fold(0, |a, (_, b)| a | b);
    // SAFETY: integer arguments; FSMOUNT_CLOEXEC is 1.
    let mount = own(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), 1, attr) })?;
    let path = CString::new(target.as_os_str().as_encoded_bytes())
        .map_err(|_| std::io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: valid strings and descriptors.
    let r = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if r < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// A tmpfs of a fixed size, as for a pod's `/dev/shm`.
///
/// # Errors
/// [`Error::Io`].
pub fn mount_shm(dir: &Path, bytes: u64) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = format!("mode=1777,size={bytes}");
    nix::mount::mount(Some("shm"), dir, Some("tmpfs"), flags, Some(data.as_str()))
        .context(|| format!("cannot mount a tmpfs on {}", dir.display()))
}

/// Mount points at or below `dir`, in mount order.
///
/// # Errors
/// [`Error::Io`] when mountinfo cannot be read.
pub fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").context(|| "cannot read mountinfo")?;
    let at = |line: &str| line.split(' ').nth(4).map(unescape);
    Ok(text.lines().filter_map(at).filter(|p| p.starts_with(dir)).collect())
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
pub(crate) fn unescape(s: &str) -> PathBuf {
    let mut out = Vec::with_capacity(s.len());
    let mut bytes = s.bytes();
    while let Some(b) = bytes.next() {
        if b != b'\\' {
            out.push(b);
            continue;
        }
        let digit = |b: Option<u8>| b.map_or(0, |b| b.wrapping_sub(b'0') & 7);
        let (x, y, z) = (digit(bytes.next()), digit(bytes.next()), digit(bytes.next()));
        out.push((x << 6) | (y << 3) | z);
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(out))
}


/// Unmounts `dir` alone, if it is a mount point.
///
/// # Errors
/// [`Error::Io`].
pub fn unmount(dir: &Path) -> Result<()> {
    match nix::mount::umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        Err(e) => Err(e).context(|| format!("cannot unmount {}", dir.display())),
    }
}

/// Unmounts everything at and below `dir`, last mounted first. Nothing mounted is no error.
///
/// # Errors
/// [`Error::Io`].
pub fn unmount_below(dir: &Path) -> Result<()> {
    for p in mounts_below(dir)?.iter().rev() {
        unmount(p)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_told_apart() {
        let o: Vec<String> =
            ["ro", "rbind", "rprivate", "size=64k"].iter().map(ToString::to_string).collect();
        let (flags, propagation, data) = parse_options(&o);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(propagation, MsFlags::MS_PRIVATE | MsFlags::MS_REC);
        assert_eq!(data, ["size=64k"]);
    }

    #[test]
    fn a_target_cannot_leave_the_rootfs() {
        let m = Mount { kind: "bind".into(), target: "../x".into(), ..Mount::default() };
        assert!(matches!(mount_all(&[m], Path::new("/tmp")), Err(Error::Invalid(_))));
    }

    #[test]
    fn mountinfo_is_unescaped() {
        assert_eq!(unescape(r"/a\040b\134c"), Path::new("/a b\\c"));
    }
}

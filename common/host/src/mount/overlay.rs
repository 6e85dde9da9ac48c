//! Overlay mounts whose options do not fit into a page.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

// linux/mount.h
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;

/// Longest value of one `fsconfig` string.
const STRING: usize = 255;

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn not_here() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSYS)
}

/// Layers of a `lowerdir` value, topmost first. `None` for what is not a plain list: escaped
/// colons and data-only layers (`::`), which `mount(2)` understands.
fn layers(value: &str) -> Option<Vec<&str>> {
    let plain = !value.contains('\\') && value.split(':').all(|l| !l.is_empty());
    plain.then(|| value.split(':').collect())
}

/// The layers of a `lowerdir` value that is a plain list.
pub(super) fn plain_layers(value: &str) -> io::Result<Vec<&str>> {
    layers(value).ok_or_else(invalid)
}

/// Attaches a detached mount.
pub(super) fn attach(mount: &impl AsRawFd, target: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: valid strings and descriptors.
    let r = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Mounts an overlay through the file-descriptor based API (Linux 6.5 for single layers).
///
/// # Errors
/// `ENOSYS` when this kernel or these options need `mount(2)`; nothing is mounted then.
pub(super) fn mount(
    target: BorrowedFd<'_>,
    source: &str,
    flags: MsFlags,
    data: &[&str],
) -> io::Result<()> {
    let own = |fd: libc::c_long| {
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    };
    // SAFETY: a valid string and an integer.
    let fs = own(unsafe { libc::syscall(libc::SYS_fsopen, c"overlay".as_ptr(), FSOPEN_CLOEXEC) })?;
    let set = |cmd: u32, key: Option<&str>, value: Option<&str>| {
        let c = |s: &str| CString::new(s).map_err(|_| invalid());
        let (key, value) = (key.map(c).transpose()?, value.map(c).transpose()?);
        let p = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
        // SAFETY: null or valid strings that live across the call.
        let r = unsafe {
            libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), cmd, p(&key), p(&value), 0)
        };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    let source = if source.is_empty() { "overlay" } else { source };
    set(FSCONFIG_SET_STRING, Some("source"), Some(source))?;
    for option in data {
        match option.split_once('=') {
            Some(("lowerdir", value)) => {
                for layer in layers(value).ok_or_else(not_here)? {
                    let one = set(FSCONFIG_SET_STRING, Some("lowerdir+"), Some(layer));
                    match one.map_err(|e| e.raw_os_error()) {
                        Ok(()) => {}
                        // A missing layer is an error that names itself; anything else may be
                        // an older kernel that knows no `lowerdir+`.
                        Err(Some(e @ (libc::ENOENT | libc::ENOTDIR | libc::EACCES))) => {
                            return Err(io::Error::from_raw_os_error(e));
                        }
                        Err(_) => return Err(not_here()),
                    }
                }
            }
            Some((_, value)) if value.len() > STRING => return Err(not_here()),
            Some((key, value)) => set(FSCONFIG_SET_STRING, Some(key), Some(value))?,
            None => set(FSCONFIG_SET_FLAG, Some(option), None)?,
        }
    }
    if flags.contains(MsFlags::MS_RDONLY) {
        set(FSCONFIG_SET_FLAG, Some("ro"), None)?;
    }
    set(FSCONFIG_CMD_CREATE, None, None)?;
    let attr = [
        (MsFlags::MS_RDONLY, 0x1u32),
        (MsFlags::MS_NOSUID, 0x2),
        (MsFlags::MS_NODEV, 0x4),
        (MsFlags::MS_NOEXEC, 0x8),
        (MsFlags::MS_NOATIME, 0x10),
        (MsFlags::MS_STRICTATIME, 0x20),
        (MsFlags::MS_NODIRATIME, 0x80),
        (super::NOSYMFOLLOW, 0x20_0000),
    ];
    let attr = attr.iter().filter(|(f, _)| flags.contains(*f)).fold(0, |a, (_, b)| a | b);
    // SAFETY: integer arguments.
    let mount =
        own(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, attr) })?;
    attach(&mount, &target)
}

/// Mounts with `mount(2)` from the layers' common directory, so that relative names fit into the
/// page. The working directory is changed on a thread of its own, nobody else's.
///
/// # Errors
/// `E2BIG` when it still does not fit.
pub(super) fn mount_relative(
    target: BorrowedFd<'_>,
    source: &str,
    flags: MsFlags,
    data: &[&str],
) -> io::Result<()> {
    let value = |key: &str| data.iter().find_map(|o| o.strip_prefix(key));
    let lower: Vec<&Path> = layers(value("lowerdir=").unwrap_or_default())
        .ok_or_else(invalid)?
        .into_iter()
        .map(Path::new)
        .collect();
    let base = common_dir(&lower).ok_or_else(invalid)?;
    let relative: Vec<String> = lower
        .iter()
        .filter_map(|p| Some(p.strip_prefix(&base).ok()?.to_str()?.to_owned()))
        .collect();
    if relative.len() != lower.len() || relative.iter().any(String::is_empty) {
        return Err(invalid());
    }
    let text: Vec<String> = data
        .iter()
        .map(|o| match o.strip_prefix("lowerdir=") {
            Some(_) => format!("lowerdir={}", relative.join(":")),
            None => (*o).to_owned(),
        })
        .collect();
    let text = text.join(",");
    if text.len() >= super::PAGE {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let path = format!("/proc/self/fd/{}", target.as_raw_fd());
    let source = if source.is_empty() { "overlay" } else { source };
    std::thread::scope(|scope| {
        let work = || {
            // The new thread shares the working directory with all others until this.
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(&base)?;
            let text = Some(text.as_str());
            nix::mount::mount(Some(source), path.as_str(), Some("overlay"), flags, text)
        };
        let ended = std::thread::Builder::new().spawn_scoped(scope, work)?.join();
        ended.map_err(|_| io::Error::other("the mounting thread ended"))?.map_err(io::Error::from)
    })
}

/// The deepest directory that holds all layers.
fn common_dir(layers: &[&Path]) -> Option<PathBuf> {
    let mut base = layers.first()?.parent()?.to_path_buf();
    while !layers.iter().all(|l| l.starts_with(&base) && **l != base) {
        if !base.pop() {
            return None;
        }
    }
    Some(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_split_only_where_that_is_safe() {
        assert_eq!(layers("/a:/b").unwrap(), ["/a", "/b"]);
        assert_eq!(layers(r"/a\:b:/c"), None);
        assert_eq!(layers("/a::/data"), None);
    }

    #[test]
    fn the_common_directory_holds_all_layers() {
        let p = |s: &'static [&'static str]| s.iter().map(Path::new).collect::<Vec<_>>();
        assert_eq!(common_dir(&p(&["/s/1/fs", "/s/22/fs"])).unwrap(), Path::new("/s"));
        assert_eq!(common_dir(&p(&["/s/1/fs"])).unwrap(), Path::new("/s/1"));
        assert_eq!(common_dir(&p(&["/s", "/s/x"])).unwrap(), Path::new("/"));
    }
}

//! Namespaces by descriptor.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::sched::CloneFlags;

use crate::{Context, Error, Result};

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS_MAGIC: i64 = 0x6e73_6673;
// ioctl_ns(2), linux/nsfs.h
const NS_GET_USERNS: libc::c_ulong = 0xb701;
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// Opens a namespace file.
///
/// # Errors
/// [`Error::Io`] when it is gone; [`Error::Invalid`] when the path is no namespace (for example
/// the plain file that is left of an unmounted one).
pub fn open(path: &Path) -> Result<OwnedFd> {
    let file =
        File::open(path).context(|| format!("namespace {} cannot be opened", path.display()))?;
    let fs = nix::sys::statfs::fstatfs(file.as_fd())
        .context(|| format!("namespace {} cannot be examined", path.display()))?;
    #[allow(clippy::unnecessary_cast)] // the type differs between platforms
    let magic = fs.filesystem_type().0 as i64;
    if magic != NSFS_MAGIC {
        return Err(Error::Invalid(format!(
            "{} is no namespace any more: it was removed, create a new pod",
            path.display()
        )));
    }
    Ok(file.into())
}

/// Opens a namespace and checks its kind, so that for example a pod's network namespace is one.
///
/// # Errors
/// As [`open`]; [`Error::Invalid`] for another kind.
pub fn open_kind(path: &Path, kind: CloneFlags) -> Result<OwnedFd> {
    let fd = open(path)?;
    if self::kind(fd.as_fd())? == kind {
        return Ok(fd);
    }
    Err(Error::Invalid(format!("{} is a namespace of another kind", path.display())))
}

/// The kind of a namespace, as the flag that makes one.
///
/// # Errors
/// [`Error::Io`] when the descriptor is no namespace.
pub fn kind(ns: BorrowedFd<'_>) -> Result<CloneFlags> {
    // SAFETY: this ioctl takes no argument.
    let r = unsafe { libc::ioctl(ns.as_raw_fd(), NS_GET_NSTYPE as _) };
    if r < 0 {
        return Err(std::io::Error::last_os_error()).context(|| "cannot tell a namespace's kind");
    }
    Ok(CloneFlags::from_bits_retain(r))
}

/// The user namespace that owns a namespace.
///
/// # Errors
/// [`Error::Io`]: `EPERM` when it lies outside of ours.
pub fn owner(ns: BorrowedFd<'_>) -> Result<OwnedFd> {
    // SAFETY: this ioctl takes no argument; a non-negative result is a new descriptor
    // (close-on-exec, as nsfs makes them).
    let r = unsafe { libc::ioctl(ns.as_raw_fd(), NS_GET_USERNS as _) };
    if r < 0 {
        return Err(std::io::Error::last_os_error()).context(|| "cannot open the owning namespace");
    }
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(r) })
}

/// What tells one living namespace from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device of the namespace filesystem.
    pub dev: u64,
    /// Inode number; reused after the namespace has ended.
    pub ino: u64,
}

/// The identity of a namespace.
///
/// # Errors
/// [`Error::Io`].
pub fn identity(ns: BorrowedFd<'_>) -> Result<Identity> {
    let stat = nix::sys::stat::fstat(ns).context(|| "cannot examine a namespace")?;
    Ok(Identity { dev: stat.st_dev, ino: stat.st_ino })
}

/// Whether `ns` is the namespace of that name (`net`, `pid`, …) in which this process runs.
///
/// # Errors
/// [`Error::Io`].
pub fn is_own(ns: BorrowedFd<'_>, name: &str) -> Result<bool> {
    let own = open(Path::new(&format!("/proc/self/ns/{name}")))?;
    Ok(identity(ns)? == identity(own.as_fd())?)
}

/// Runs `work` on a new thread inside a namespace, and waits for it. No other thread is touched;
/// the thread ends afterwards, so there is nothing to switch back.
///
/// # Errors
/// [`Error::Io`] when the namespace cannot be entered, or what `work` answers.
pub fn enter_on_thread<T: Send>(
    ns: BorrowedFd<'_>,
    kind: CloneFlags,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    std::thread::scope(|scope| {
        let inside = || {
            if kind.intersects(CloneFlags::CLONE_NEWNS) {
                // A thread that shares its root directory cannot change its mount namespace.
                nix::sched::unshare(CloneFlags::CLONE_FS).context(|| "cannot unshare")?;
            }
            nix::sched::setns(ns, kind).context(|| "cannot enter a namespace")?;
            work()
        };
        let thread = std::thread::Builder::new()
            .name("in-namespace".into())
            .stack_size(256 << 10)
            .spawn_scoped(scope, inside)
            .context(|| "cannot start a thread")?;
        match thread.join() {
            Ok(result) => result,
            Err(_) => {
                Err(std::io::Error::other("it panicked")).context(|| "work in a namespace failed")
            }
        }
    })
}

/// File below `/proc/sys` of a sysctl such as `net.ipv4.ip_forward` or `net/ipv4/conf/eth0.1/x`.
///
/// # Errors
/// [`Error::Invalid`] for a name that is none.
pub fn sysctl_path(name: &str) -> Result<std::path::PathBuf> {
    // As sysctl(8): the first separator decides; with a slash first, dots are literal.
    let slashes =
        matches!((name.find('/'), name.find('.')), (Some(s), d) if d.is_none_or(|d| s < d));
    let parts: Vec<String> = if slashes {
        name.split('/').map(str::to_owned).collect()
    } else {
        name.split('.').map(|p| p.replace('/', ".")).collect()
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.:@".contains(&b);
    if parts.len() < 2
        || parts.iter().any(|p| p.is_empty() || p == "." || p == ".." || !p.bytes().all(plain))
    {
        return Err(Error::Invalid(format!("sysctl {name:?} is no name of a sysctl")));
    }
    Ok(parts.iter().collect())
}

/// Reads a sysctl of the calling thread's namespaces.
///
/// # Errors
/// [`Error::Invalid`] for a name that is none or when `/proc` is not procfs; [`Error::Io`].
pub fn sysctl(name: &str) -> Result<String> {
    use std::io::Read;
    let file = open_sysctl(name, libc::O_RDONLY)?;
    let mut text = String::new();
    file.take(64 << 10).read_to_string(&mut text).context(|| format!("cannot read {name}"))?;
    Ok(text.trim_end().to_owned())
}

/// Writes a sysctl of the calling thread's namespaces.
///
/// # Errors
/// As [`sysctl`].
pub fn set_sysctl(name: &str, value: &str) -> Result<()> {
    use std::io::Write;
    let mut file = open_sysctl(name, libc::O_WRONLY)?;
    file.write_all(value.as_bytes()).context(|| format!("cannot set sysctl {name}"))
}

fn open_sysctl(name: &str, flags: i32) -> Result<File> {
    let path = sysctl_path(name)?;
    let root = crate::safe_path::Root::open(Path::new("/proc/sys"))?;
    let fd = root.open_file(&path, flags)?;
    crate::safe_path::verify_procfs(fd.as_fd())?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_file_is_no_namespace() {
        assert!(open(Path::new("/proc/self/ns/net")).is_ok());
        assert!(matches!(open(Path::new("/etc/passwd")), Err(Error::Invalid(_))));
        assert!(matches!(open(Path::new("/nowhere")), Err(Error::Io { .. })));
    }

    #[test]
    fn kind_owner_and_identity_of_our_own() {
        let net = open_kind(Path::new("/proc/self/ns/net"), CloneFlags::CLONE_NEWNET).unwrap();
        assert!(open_kind(Path::new("/proc/self/ns/net"), CloneFlags::CLONE_NEWPID).is_err());
        assert!(is_own(net.as_fd(), "net").unwrap());
        assert!(!is_own(net.as_fd(), "uts").unwrap());
        // Answers EPERM where our own user namespace is not the first.
        if let Ok(user) = owner(net.as_fd()) {
            assert_eq!(kind(user.as_fd()).unwrap(), CloneFlags::CLONE_NEWUSER);
        }
    }

    #[test]
    fn sysctl_names_are_paths_below_proc_sys_only() {
        let p = |s| sysctl_path(s).ok().map(|p| p.display().to_string());
        assert_eq!(p("net.ipv4.ip_forward").unwrap(), "net/ipv4/ip_forward");
        assert_eq!(
            p("net.ipv4.conf.eth0/1.forwarding").unwrap(),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(p("net/ipv4/conf/eth0.1/x").unwrap(), "net/ipv4/conf/eth0.1/x");
        for bad in ["", "a", "a..b", "../a/b", "a.//.b", "/etc/passwd", "a b.c"] {
            assert_eq!(p(bad), None, "{bad}");
        }
        assert!(!sysctl("kernel.ostype").unwrap().is_empty());
    }
}

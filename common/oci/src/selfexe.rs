//! Our own executable, as another process may run it for the built-in engine; or another program
//! that does the same.
//!
//! A container can reach the executable of a process that has entered it: as `/proc/PID/exe` of
//! an exec that has not become its payload yet, or by naming `/proc/self/exe` as its command. If
//! that were the installed file, root in the container could write to it (CVE-2019-5736). So the
//! engine runs from something that cannot be written, whoever opens it:
//!
//! 1. **A read-only clone of the mount** that the file is on, detached from every mount
//!    namespace (`open_tree(OPEN_TREE_CLONE)`, `mount_setattr(MOUNT_ATTR_RDONLY)`, Linux 5.12).
//!    The executable of the process *is* then a path on that read-only mount, and opening it for
//!    writing answers `EROFS`. It costs nothing: the same page cache, no copy, one descriptor.
//!    Nobody in a container can make it writable, since the mount is in no namespace that a
//!    container owns.
//! 2. Where the kernel refuses that, **a sealed memfd**: one copy of the program in memory for
//!    the daemon's life, sealed against writing, growing and shrinking.
//!
//! runc copies itself into a memfd (or mounts an overlay) for every single exec; here it is done
//! once. sandbox-parent opens the program by the path `/proc/<daemon>/fd/<n>`.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// The executable, held open.
#[derive(Debug)]
pub struct SelfExe {
    fd: OwnedFd,
}

impl SelfExe {
    /// Makes an unwritable handle of the program that runs now; `name` is what a copy is called.
    ///
    /// # Errors
    /// When there can be neither a read-only clone nor a copy.
    pub fn open(name: &str) -> io::Result<Self> {
        Self::of(Path::new("/proc/self/exe"), name)
    }

    /// The same for the program at `path`.
    ///
    /// # Errors
    /// When there can be neither a read-only clone nor a copy.
    pub fn of(path: &Path, name: &str) -> io::Result<Self> {
        match read_only_clone(path) {
            Ok(fd) => Ok(Self { fd }),
            Err(error) => {
                tracing::info!(%error, "no read-only clone of the executable: copying it once");
                Ok(Self { fd: sealed_copy(path, name)? })
            }
        }
    }

    /// Path by which another process of this host can exec it while we live.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }
}

/// A new descriptor from a system call's result.
fn own(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just made it for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn read_only_clone(program: &Path) -> io::Result<OwnedFd> {
    let exe = std::fs::canonicalize(program)?;
    let path = std::ffi::CString::new(std::os::unix::ffi::OsStrExt::as_bytes(exe.as_os_str()))?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: plain system call with a valid path.
    let tree =
        own(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })?;
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor; the structure is whole.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            std::mem::size_of::<libc::mount_attr>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // Be sure that the clone is what was named, or what runs now, and that it cannot be written.
    let own_path = format!("/proc/self/fd/{}", tree.as_raw_fd());
    use std::os::unix::fs::MetadataExt;
    let (clone, running) = (std::fs::metadata(&own_path)?, std::fs::metadata(program)?);
    if (clone.dev(), clone.ino()) != (running.dev(), running.ino()) {
        return Err(io::Error::other("the installed file has been replaced since start"));
    }
    // Opening it for writing would say ETXTBSY for as long as we run: ask the mount.
    let mount = nix::sys::statvfs::fstatvfs(&tree)?;
    if !mount.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
        return Err(io::Error::other("the clone of the mount can be written"));
    }
    Ok(tree)
}

fn sealed_copy(program: &Path, name: &str) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name)?;
    let mut source = std::fs::File::open(program)?;
    // SAFETY: plain system call with a valid name.
    let fd = own(libc::c_long::from(unsafe {
        libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    }))?;
    let mut copy = std::fs::File::from(fd);
    io::copy(&mut source, &mut copy)?;
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: plain system call.
    if unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(copy.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: &str = "KUASAR_TEST_WAIT";

    fn refuses_writing(fd: &OwnedFd) -> bool {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        match std::fs::OpenOptions::new().write(true).open(path) {
            Err(_) => true,
            Ok(mut file) => io::Write::write_all(&mut file, b"x").is_err(),
        }
    }

    #[test]
    fn a_sealed_copy_cannot_be_written_and_runs() {
        let fd = sealed_copy(Path::new("/proc/self/exe"), "engine").unwrap();
        assert!(refuses_writing(&fd));
    }

    #[test]
    fn a_process_cannot_write_the_executable_it_runs_from() {
        // SAFETY: plain call.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("skipped: needs root");
            return;
        }
        // What the process below does, which runs this test: it is there until it is let go.
        if std::env::var_os(WAIT).is_some() {
            let _ = io::Read::read(&mut io::stdin(), &mut [0]);
            return;
        }
        let fd = match read_only_clone(Path::new("/proc/self/exe")) {
            Ok(fd) => fd,
            Err(error) => {
                eprintln!("skipped: {error}");
                return;
            }
        };
        assert!(refuses_writing(&fd));
        // The same through /proc/PID/exe of a process that runs from it, as a container sees it.
        let path = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        let mut child = std::process::Command::new(path)
            .args(["--exact", "selfexe::tests::a_process_cannot_write_the_executable_it_runs_from"])
            .env(WAIT, "1")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let exe = format!("/proc/{}/exe", child.id());
        let error = std::fs::OpenOptions::new().append(true).open(exe).unwrap_err();
        // Closes its standard input first.
        assert!(child.wait().unwrap().success(), "the test has another name now");
        assert!(matches!(error.raw_os_error(), Some(libc::EROFS | libc::ETXTBSY)), "{error}");
    }
}

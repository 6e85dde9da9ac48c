//! The system calls that nix has no functions for: mounts by descriptor, clone3, seccomp, capset.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::plan::{Attr, Propagation, Sets};

// linux/mount.h, linux/sched.h, linux/seccomp.h, linux/capability.h
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
const AT_RECURSIVE: u32 = 0x8000;
const AT_EMPTY_PATH: u32 = libc::AT_EMPTY_PATH as u32;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const SECCOMP_SET_MODE_FILTER: libc::c_ulong = 1;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn own(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the kernel has just made this descriptor for us; descriptors fit an int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A path or name for the kernel.
pub fn c(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Whether this kernel has all that is used here (Linux 5.12); asked without doing anything.
pub fn supported() -> bool {
    // SAFETY: a size of 0 is refused with EINVAL by a kernel that knows the call.
    let r = unsafe { libc::syscall(libc::SYS_mount_setattr, -1, c"".as_ptr(), 0, 0usize, 0usize) };
    r < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

/// A detached copy of the mount at a path of this process.
pub fn clone_tree_at(path: &Path, deep: bool) -> io::Result<OwnedFd> {
    let path = c(path)?;
    let flags =
        libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | if deep { AT_RECURSIVE } else { 0 };
    // SAFETY: a valid string and integers.
    own(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// A detached copy of the mount that a descriptor names a place in.
pub fn clone_tree(fd: BorrowedFd<'_>, deep: bool) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE
        | libc::OPEN_TREE_CLOEXEC
        | AT_EMPTY_PATH
        | if deep { AT_RECURSIVE } else { 0 };
    // SAFETY: a valid descriptor, an empty path and integers.
    own(unsafe { libc::syscall(libc::SYS_open_tree, fd.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches a detached mount on top of what `target` names.
pub fn attach(mount: &impl AsFd, target: &impl AsFd) -> io::Result<()> {
    // SAFETY: valid descriptors and strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            target.as_fd().as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Changes attributes and propagation of a mount in one call.
pub fn set_mount(
    mount: &impl AsFd,
    attr: Attr,
    propagation: Option<Propagation>,
    deep: bool,
) -> io::Result<()> {
    let propagation = propagation.map_or(0, |propagation| propagation.kind);
    if attr.is_empty() && propagation == 0 {
        return Ok(());
    }
    // The kinds of access times are a number: they can only be set together.
    let times = if attr.set & libc::MOUNT_ATTR__ATIME != 0 { libc::MOUNT_ATTR__ATIME } else { 0 };
    let attr = libc::mount_attr {
        attr_set: attr.set,
        attr_clr: attr.clear | times,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: an empty path for the descriptor itself; structure and size belong together.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            AT_EMPTY_PATH | if deep { AT_RECURSIVE } else { 0 },
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// A new, detached instance of a file system.
pub fn new_mount(
    kind: &str,
    source: &str,
    parameters: &[(String, Option<String>)],
    attr: u64,
) -> io::Result<OwnedFd> {
    let kind = CString::new(kind)?;
    // SAFETY: a valid string and an integer.
    let fs = own(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    let set = |command: u32, key: Option<&CStr>, value: Option<&CStr>| {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: null or valid strings that live across the call.
        check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                fs.as_raw_fd(),
                command,
                pointer(key),
                pointer(value),
                0,
            )
        })
        .map(drop)
        .map_err(|error| explain(&fs, error))
    };
    let source = CString::new(source)?;
    set(FSCONFIG_SET_STRING, Some(c"source"), Some(&source))?;
    for (key, value) in parameters {
        let key = CString::new(key.as_str())?;
        match value {
            Some(value) => {
                let value = CString::new(value.as_str())?;
                set(FSCONFIG_SET_STRING, Some(&key), Some(&value))?;
            }
            None => set(FSCONFIG_SET_FLAG, Some(&key), None)?,
        }
    }
    set(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: integer arguments.
    own(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, attr as u32) })
}

/// The kernel's own words, which it keeps for whoever reads the context.
fn explain(fs: &OwnedFd, error: io::Error) -> io::Error {
    let mut text = [0u8; 256];
    match nix::unistd::read(fs, &mut text) {
        Ok(count) => {
            let words = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
            io::Error::other(format!("{error} ({})", words.trim()))
        }
        Err(_) => error,
    }
}

/// A child of our parent, in new namespaces and (cgroup v2) in a group from its first moment.
/// Answers 0 in the child.
pub fn clone_sibling(namespaces: libc::c_int, cgroup: Option<BorrowedFd<'_>>) -> io::Result<i32> {
    // SAFETY: all-zero is a valid clone_args: no stack, no thread data, no exit signal (with
    // CLONE_PARENT it is that of our own end).
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (libc::CLONE_PARENT | namespaces) as u32 as u64;
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd.as_raw_fd() as u64;
    }
    // SAFETY: as fork(); this process has one thread.
    let pid = check(unsafe {
        libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>())
    })?;
    Ok(pid as i32)
}

/// Loads a compiled filter for this thread.
pub fn load_seccomp(program: &[libc::sock_filter], flags: u64) -> io::Result<()> {
    let len =
        u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel only reads the program, which lives across the call.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    })
    .map(drop)
}

/// Sets the effective, permitted and inheritable capabilities.
pub fn set_capabilities(sets: &Sets) -> io::Result<()> {
    let header = [CAPABILITY_VERSION_3, 0];
    let half = |shift: u32| {
        [sets.effective, sets.permitted, sets.inheritable].map(|set| (set >> shift) as u32)
    };
    let data = [half(0), half(32)];
    // SAFETY: header and data are as linux/capability.h lays them out for version 3.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// `prctl` with up to two numbers.
pub fn prctl(option: libc::c_int, a: libc::c_ulong, b: libc::c_ulong) -> io::Result<()> {
    // SAFETY: only used with options that take numbers.
    check(unsafe { libc::prctl(option, a, b, 0 as libc::c_ulong, 0 as libc::c_ulong) }.into())
        .map(drop)
}

//! The pty of an exec: made in the container's own devpts, its master sent to whoever asked.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Makes a pty, hands its master over `socket` and makes the slave this session's terminal and
/// standard streams. Runs inside the container, before its user is taken on.
pub fn attach(socket: &UnixStream, uid: u32, size: Option<(u16, u16)>) -> Result<(), String> {
    let window = size.map(|(columns, rows)| nix::pty::Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    });
    let pty = nix::pty::openpty(window.as_ref(), None)
        .map_err(|error| format!("cannot make a pty in the container: {error}"))?;
    verify(&pty.master, true)?;
    verify(&pty.slave, false)?;
    nix::unistd::fchown(&pty.slave, Some(uid.into()), None)
        .map_err(|error| format!("cannot give the pty to uid {uid}: {error}"))?;
    let fds = [pty.master.as_raw_fd()];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(b"/dev/ptmx")],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )
    .map_err(|error| format!("cannot send the pty: {error}"))?;
    // SAFETY: plain ioctl on a descriptor that we own.
    if unsafe { libc::ioctl(pty.slave.as_raw_fd(), libc::TIOCSCTTY, 0) } < 0 {
        return Err(format!("controlling terminal: {}", std::io::Error::last_os_error()));
    }
    for stream in 0..3 {
        // SAFETY: dup2 onto the standard streams of this single-threaded process.
        if unsafe { libc::dup2(pty.slave.as_raw_fd(), stream) } < 0 {
            return Err(format!("dup2: {}", std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// The container owns `/dev/ptmx` and `/dev/pts`: be sure that these are devices of a devpts
/// (CVE-2025-52565).
fn verify(fd: &OwnedFd, master: bool) -> Result<(), String> {
    const DEVPTS: i64 = 0x1cd1;
    let fs = nix::sys::statfs::fstatfs(fd).map_err(|error| error.to_string())?;
    let stat = nix::sys::stat::fstat(fd).map_err(|error| error.to_string())?;
    let major = nix::sys::stat::major(stat.st_rdev);
    let minor = nix::sys::stat::minor(stat.st_rdev);
    let char_device = stat.st_mode & libc::S_IFMT == libc::S_IFCHR;
    let right = if master { (major, minor) == (5, 2) } else { (136..144).contains(&major) };
    if fs.filesystem_type().0 != DEVPTS || !char_device || !right {
        return Err("the container's /dev/ptmx is not a pty device of a devpts".to_owned());
    }
    Ok(())
}

/// Gives the standard streams to the container's user, so that it may open `/dev/stdout`: only
/// pipes and FIFOs, never a device or a file of the host.
pub fn own_streams(uid: u32) {
    for stream in 0..3 {
        // SAFETY: borrowed for two calls only; a closed descriptor answers EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(stream) };
        let fifo = nix::sys::stat::fstat(fd)
            .is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFIFO && stat.st_uid != uid);
        if fifo {
            // A stream that cannot be given away still works as it is.
            let _ = nix::unistd::fchown(fd, Some(uid.into()), None);
        }
    }
}

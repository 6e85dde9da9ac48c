//! The socket on which an engine hands over the master of a pty.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use containerd_task::error::{Error, Result};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// A listening console socket; its file goes with it.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    file: PathBuf,
    /// What the engine is told; goes through `_directory` where `file` is too long for a socket.
    path: PathBuf,
    _directory: std::fs::File,
}

impl Console {
    /// Listens in the sandbox's private directory, under a name short enough for a socket path.
    pub fn listen(dir: &Path) -> Result<Self> {
        let wrap = |error| Error::internal("make the console socket", error);
        let name = format!("c{:08x}", crate::processes::new_cookie() as u32);
        let handle = std::fs::File::open(dir).map_err(wrap)?;
        // Bound through a descriptor: the directory's own path may be too long for a socket.
        let fd = handle.as_raw_fd();
        let listener = UnixListener::bind(format!("/proc/self/fd/{fd}/{name}")).map_err(wrap)?;
        listener.set_nonblocking(true).map_err(wrap)?;
        let file = dir.join(&name);
        let path = if file.as_os_str().len() <= kuasar_host::socket::MAX_PATH {
            file.clone()
        } else {
            format!("/proc/{}/fd/{fd}/{name}", std::process::id()).into()
        };
        Ok(Self { listener, file, path, _directory: handle })
    }

    /// Where the engine finds it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The master, after the engine has ended: what it sent waits in the socket.
    pub fn master(&self, size: Option<(u16, u16)>) -> Result<OwnedFd> {
        let wrap = |error: std::io::Error| Error::internal("the engine sent no terminal", error);
        let (stream, _) = self.listener.accept().map_err(wrap)?;
        let mut name = [0u8; 256];
        let mut space = nix::cmsg_space!([i32; 4]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let mut buffer = [IoSliceMut::new(&mut name)];
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut buffer, Some(&mut space), flags)
            .map_err(|error| wrap(error.into()))?;
        let mut masters = Vec::new();
        for control in message.cmsgs().map_err(|error| wrap(error.into()))? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just installed these descriptors for us.
                masters.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let master = masters.pop().ok_or_else(|| wrap(std::io::Error::other("no descriptor")))?;
        if let Some((columns, rows)) = size {
            let window =
                libc::winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
            // SAFETY: a live descriptor and a whole structure.
            unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const window) };
        }
        Ok(master)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

//! The streams of a session's program: a terminal, or two pipes; and our ends of them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use containerd_task::error::{Error, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::unix::pipe;

/// Columns and rows.
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub width: u16,
    pub height: u16,
}

impl Size {
    fn window(self) -> libc::winsize {
        libc::winsize { ws_row: self.height, ws_col: self.width, ws_xpixel: 0, ws_ypixel: 0 }
    }
}

/// Our ends.
pub(super) struct Ends {
    pub input: Box<dyn AsyncWrite + Send + Sync + Unpin>,
    pub output: Output,
}

/// What the program writes.
pub(super) enum Output {
    Terminal(Master),
    Pipe(pipe::Receiver),
}

/// The program's ends.
pub(super) struct Program {
    pub input: OwnedFd,
    pub output: OwnedFd,
}

/// Sets the size of a terminal for as long as its session has it.
pub(super) struct Resize(Weak<AsyncFd<OwnedFd>>);

impl Resize {
    pub fn set(&self, size: Size) -> Result<()> {
        let Some(master) = self.0.upgrade() else { return Ok(()) };
        let window = size.window();
        // SAFETY: the request reads the structure that it gets; the descriptor is open.
        match unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const window) } {
            0 => Ok(()),
            _ => Err(Error::internal("resize the terminal", io::Error::last_os_error())),
        }
    }
}

impl Ends {
    pub fn resize(&self) -> Option<Resize> {
        match &self.output {
            Output::Terminal(master) => Some(Resize(Arc::downgrade(&master.0))),
            Output::Pipe(_) => None,
        }
    }
}

/// A new terminal of this size, or pipes.
pub(super) fn pair(terminal: Option<Size>) -> Result<(Ends, Program)> {
    match terminal {
        Some(size) => new_terminal(size),
        None => pipes(),
    }
    .map_err(|error| Error::internal("make a debug session's streams", error))
}

fn new_terminal(size: Size) -> io::Result<(Ends, Program)> {
    let pty = nix::pty::openpty(Some(&size.window()), None)?;
    for fd in [&pty.master, &pty.slave] {
        fcntl(fd, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    fcntl(&pty.master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
    let master = unsafe { AsyncFd::register(pty.master) }.map_err(io::Error::from)?;
    let master = Arc::new(master);
    let input = Box::new(Master(master.clone()));
    let ends = Ends { input, output: Output::Terminal(Master(master)) };
    let output = pty.slave.try_clone()?;
    Ok((ends, Program { input: pty.slave, output }))
}

fn pipes() -> io::Result<(Ends, Program)> {
    let (stdin, ours) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (theirs, stdout) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    for fd in [ours.as_fd(), theirs.as_fd()] {
        let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    let input = Box::new(pipe::Sender::from_owned_fd(ours)?);
    let output = Output::Pipe(pipe::Receiver::from_owned_fd(theirs)?);
    Ok((Ends { input, output }, Program { input: stdin, output: stdout }))
}

/// The master of a terminal.
pub(super) struct Master(Arc<AsyncFd<OwnedFd>>);

impl AsyncRead for Master {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            let read =
                guard.try_io(|fd| nix::unistd::read(fd.get_ref(), space).map_err(io::Error::from));
            match read {
                Ok(Ok(n)) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // EIO is a terminal whose last user has gone: the end.
                Ok(Err(_)) => return Poll::Ready(Ok(())),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Master {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            let wrote =
                guard.try_io(|fd| nix::unistd::write(fd.get_ref(), buf).map_err(io::Error::from));
            match wrote {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Output {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Terminal(master) => Pin::new(master).poll_read(cx, buf),
            Self::Pipe(pipe) => Pin::new(pipe).poll_read(cx, buf),
        }
    }
}

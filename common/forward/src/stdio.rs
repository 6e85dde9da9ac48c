//! Joins a process's streams in the guest with the engine's FIFOs.
//!
//! `splice(2)` moves bytes between the connection and the FIFO inside the kernel: at any moment a
//! byte is in one or the other, never in this process. Both descriptors are kept by
//! sandbox-parent, and a daemon that starts again goes on where the last one was cut: nothing is
//! lost and nothing comes twice.
//!
//! | engine's end | how |
//! |---|---|
//! | FIFO or pipe | `splice(2)` |
//! | regular file, device | copied; a daemon that is killed may lose what it has in hand |
//!
//! An output ends when the guest shuts its direction down; then our end of the FIFO goes, so that
//! readers see the end. If nobody reads any more, what comes is thrown away, so that the process
//! in the guest is not held up. An input ends when the engine has closed its FIFO; then the
//! connection's direction to the guest is shut down.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use containerd_task::error::{Error, Result};
use containerd_task::runtime::Keeper;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

/// Most bytes that are moved at once.
const CHUNK: usize = 64 << 10;

/// Direction of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Engine to process.
    Input,
    /// Process to engine.
    Output,
}

/// Name under which both ends of a stream are kept: `vmio/<container>/<exec>/<which>/`.
pub fn name(container: &str, exec: &str, which: &str) -> String {
    format!("vmio/{container}/{exec}/{which}/")
}

/// Prefix of everything that is kept for one process.
pub fn process_prefix(container: &str, exec: &str) -> String {
    format!("vmio/{container}/{exec}/")
}

/// Prefix of everything that is kept for a container.
pub fn container_prefix(container: &str) -> String {
    format!("vmio/{container}/")
}

/// Keeps both ends and begins to move bytes.
///
/// # Errors
/// When they cannot be kept or registered.
pub async fn begin(
    keeper: &Arc<dyn Keeper>,
    name: String,
    guest: OwnedFd,
    engine: OwnedFd,
    direction: Direction,
) -> Result<Stream> {
    let (one, other) = (format!("{name}guest"), format!("{name}engine"));
    tokio::try_join!(keeper.keep(&one, guest.as_fd()), keeper.keep(&other, engine.as_fd()))?;
    run(keeper.clone(), name, guest, engine, direction)
}

/// Goes on with a stream of an earlier daemon; `None` when it had come to its end.
///
/// # Errors
/// When the ends cannot be fetched or registered.
pub async fn resume(
    keeper: &Arc<dyn Keeper>,
    name: String,
    direction: Direction,
) -> Result<Option<Stream>> {
    let guest = keeper.fetch(&format!("{name}guest")).await?;
    let engine = keeper.fetch(&format!("{name}engine")).await?;
    match (guest, engine) {
        (Some(guest), Some(engine)) => {
            run(keeper.clone(), name, guest, engine, direction).map(Some)
        }
        _ => Ok(None),
    }
}

fn run(
    keeper: Arc<dyn Keeper>,
    name: String,
    guest: OwnedFd,
    engine: OwnedFd,
    direction: Direction,
) -> Result<Stream> {
    let connection =
        guest.try_clone().map_err(|error| Error::internal("duplicate a stream", error))?;
    let pump = Pump::new(guest, engine, direction)?;
    let pump = tokio::spawn(async move {
        pump.run().await;
        // Before the exit is told: a kept end would keep readers waiting.
        if let Err(error) = keeper.forget(&name).await {
            tracing::error!(%name, "an ended stream stays open: {}", error.chain());
        }
    });
    Ok(Stream { pump, connection })
}

/// A stream that is being pumped.
#[derive(Debug)]
pub struct Stream {
    /// The pump.
    pub pump: JoinHandle<()>,
    /// The connection to the guest.
    pub connection: OwnedFd,
}

/// While bytes were held up somewhere: how long none have to come until there are no more.
const QUIET: Duration = Duration::from_millis(50);

impl Stream {
    /// Brings an output to its end after its process has ended and the guest has said that all of
    /// it is on its way; at most `limit`.
    ///
    /// `vhost-device-vsock` does not pass the half-close of a guest on (measured), so that the end
    /// does not show by itself. But it handles what the guest sends in order: when the guest's
    /// word that it has sent everything is here, everything is, as far as our socket had room.
    /// Then we hang up, and the guest, which waits for that, does so as well.
    pub async fn finish(self, limit: Duration) {
        let Self { mut pump, connection } = self;
        let ended = async {
            let mut held_up = false;
            let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
            loop {
                let more = matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0);
                held_up |= more;
                if !more && !held_up {
                    break;
                }
                // The pump has it in hand; look again when it had time to go on.
                if tokio::time::timeout(QUIET, &mut pump).await.is_ok() {
                    return;
                }
                let more = matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0);
                if !more {
                    break;
                }
            }
            // Fails when the guest has hung up.
            let write = nix::sys::socket::Shutdown::Write;
            match nix::sys::socket::shutdown(connection.as_raw_fd(), write) {
                // A FIFO, of which the guest holds an end still: all that came is through.
                Err(Errno::ENOTSOCK) => pump.abort(),
                _ => drop((&mut pump).await),
            }
        };
        if tokio::time::timeout(limit, ended).await.is_err() {
            pump.abort();
        }
    }
}

/// Moves bytes one way between the guest's connection and the engine's end.
pub struct Pump {
    guest: End,
    engine: End,
    direction: Direction,
}

impl Pump {
    /// Makes both non-blocking and registers them with the async runtime.
    ///
    /// # Errors
    /// When one of them cannot be polled.
    pub fn new(guest: OwnedFd, engine: OwnedFd, direction: Direction) -> Result<Self> {
        Ok(Self { guest: End::new(guest)?, engine: End::new(engine)?, direction })
    }

    /// Runs to the end of the stream. Cut at any point, another pump can go on with the same
    /// descriptors as long as one end is a pipe.
    pub async fn run(self) {
        let (from, to) = match self.direction {
            Direction::Input => (&self.engine, &self.guest),
            Direction::Output => (&self.guest, &self.engine),
        };
        let spliced = from.is_pipe() || to.is_pipe();
        let end = if spliced { splice(from, to).await } else { copy(from, to).await };
        match (end, self.direction) {
            (_, Direction::Input) => {
                // The process sees the end of its input. Fails when the guest has gone.
                let _ = nix::sys::socket::shutdown(
                    self.guest.fd().as_raw_fd(),
                    nix::sys::socket::Shutdown::Write,
                );
            }
            (Ended::NobodyReads, Direction::Output) => {
                let Self { guest, engine, .. } = self;
                drop(engine);
                discard(&guest).await;
            }
            (Ended::Source, Direction::Output) => {}
        }
    }
}

/// How a pump came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// No more bytes come.
    Source,
    /// Nobody takes them.
    NobodyReads,
}

/// One end of a pump. Regular files cannot be polled and are always ready.
enum End {
    Polled { fd: AsyncFd<OwnedFd>, pipe: bool },
    File(OwnedFd),
}

impl End {
    fn new(fd: OwnedFd) -> Result<Self> {
        let failed = |e: Errno| Error::internal("examine a stream", e);
        let kind = nix::sys::stat::fstat(&fd).map_err(failed)?.st_mode & libc::S_IFMT;
        if !matches!(kind, libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFCHR) {
            return Ok(Self::File(fd));
        }
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(failed)?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(failed)?;
        // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
        match unsafe { AsyncFd::register(fd) } {
            Ok(fd) => Ok(Self::Polled { fd, pipe: kind == libc::S_IFIFO }),
            // /dev/null is one that cannot be polled.
            Err(error) => {
                let (fd, error) = error.into_parts();
                if error.raw_os_error() == Some(libc::EPERM) {
                    Ok(Self::File(fd))
                } else {
                    Err(Error::internal("poll a stream", error))
                }
            }
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Polled { fd, .. } => fd.get_ref().as_fd(),
            Self::File(fd) => fd.as_fd(),
        }
    }

    fn is_pipe(&self) -> bool {
        matches!(self, Self::Polled { pipe: true, .. })
    }

    fn is_ready(&self, events: PollFlags) -> bool {
        let mut fds = [PollFd::new(self.fd(), events)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
    }

    /// Waits until it is readable, or has ended; an error is the end of the async runtime.
    async fn readable(&self) -> std::io::Result<()> {
        let Self::Polled { fd, .. } = self else { return Ok(()) };
        let mut guard = fd.readable().await?;
        if !self.is_ready(PollFlags::POLLIN) {
            guard.clear_ready();
        }
        Ok(())
    }

    async fn writable(&self) -> std::io::Result<()> {
        let Self::Polled { fd, .. } = self else { return Ok(()) };
        let mut guard = fd.writable().await?;
        if !self.is_ready(PollFlags::POLLOUT) {
            guard.clear_ready();
        }
        Ok(())
    }
}

async fn splice(from: &End, to: &End) -> Ended {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        match nix::fcntl::splice(from.fd(), None, to.fd(), None, CHUNK, flags) {
            Ok(0) => return Ended::Source,
            Ok(_) => {
                // A stream that never pauses must not keep its thread for itself.
                tokio::task::consume_budget().await;
                continue;
            }
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => {}
            // Files opened for appending, and sockets without it, on older kernels.
            Err(Errno::EINVAL) => return copy(from, to).await,
            Err(Errno::EPIPE) => return Ended::NobodyReads,
            // The other side of a connection has gone without a word.
            Err(error) => {
                tracing::debug!(fd = from.fd().as_raw_fd(), %error, "a stream broke");
                return Ended::Source;
            }
        }
        // Either there is nothing to read or no room to write: wait for the one that lacks.
        let waited = if from.is_ready(PollFlags::POLLIN) {
            to.writable().await
        } else {
            from.readable().await
        };
        if waited.is_err() {
            return Ended::Source;
        }
    }
}

/// For ends of which neither is a pipe.
async fn copy(from: &End, to: &End) -> Ended {
    let mut buffer = vec![0_u8; CHUNK / 4];
    loop {
        let n = match nix::unistd::read(from.fd(), &mut buffer) {
            Ok(0) => return Ended::Source,
            Ok(n) => n,
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => {
                if from.readable().await.is_err() {
                    return Ended::Source;
                }
                continue;
            }
            Err(_) => return Ended::Source,
        };
        let mut rest = buffer.get(..n).unwrap_or_default();
        while !rest.is_empty() {
            match nix::unistd::write(to.fd(), rest) {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if to.writable().await.is_err() {
                        return Ended::NobodyReads;
                    }
                }
                Err(_) => return Ended::NobodyReads,
            }
        }
        tokio::task::consume_budget().await;
    }
}

/// Takes what comes and throws it away, so that its writer is not held up.
async fn discard(from: &End) {
    let mut buffer = vec![0_u8; CHUNK / 4];
    loop {
        match nix::unistd::read(from.fd(), &mut buffer) {
            Ok(0) => return,
            Ok(_) => tokio::task::consume_budget().await,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                if from.readable().await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
#[path = "stdio_tests.rs"]
mod tests;

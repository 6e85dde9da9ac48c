//! Standard streams of a process.
//!
//! | engine gives | without a terminal | with a terminal |
//! |---|---|---|
//! | FIFO | the process gets the FIFO itself: nothing is copied, nothing can be lost | pty and FIFOs are joined by `splice(2)`: bytes never enter this process |
//! | stream URL | a pipe, pumped to the stream | the pty, pumped |
//! | raw stream ([`raw`]) | a pipe, pumped to a connection that comes later | the pty, pumped |
//! | file | the process gets the file | – |
//!
//! For FIFOs the other end is *held*: a read end of each output, so that a restart of containerd
//! is no EPIPE for the container, and a write end of the input until CloseIO, so that it is no
//! end of input. Held ends, our pipe ends, pty masters and the write end that a terminal's output
//! goes to are given to the [`Keeper`] as well, and live on when this process dies.

pub mod fifo;
pub mod pump;
pub mod raw;
pub mod streams;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::journal::Stdio;
use crate::runtime::{Keeper, ProcessIo};

/// Makes a descriptor non-blocking and registers it with the async runtime.
pub(crate) use pump::register as pump_register;
pub use streams::Streams;

/// One of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Standard input.
    Stdin,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Which {
    fn name(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Our side of a process's streams.
#[derive(Default)]
pub struct Io {
    /// Held ends and whatever else only has to stay open.
    held: Vec<OwnedFd>,
    /// Write end of the input FIFO, until CloseIO.
    stdin: Option<OwnedFd>,
    /// Pumps of outputs: the exit waits for them.
    outputs: Vec<JoinHandle<()>>,
    /// Pump of the input.
    input: Option<JoinHandle<()>>,
    terminal: Option<Arc<OwnedFd>>,
}

impl Drop for Io {
    fn drop(&mut self) {
        for task in self.outputs.iter().chain(&self.input) {
            task.abort();
        }
    }
}

/// What [`open`] has prepared and [`Prepared::attach`] completes.
pub struct Prepared {
    io: Io,
    ours: Vec<(Which, OwnedFd)>,
    /// Duplicates for the keeper, until it has them.
    unkept: Vec<(Which, OwnedFd)>,
    stdio: Stdio,
    name: String,
}

/// Name of a stream under which the engine connects, when `path` is a stream URL.
pub fn stream_id(path: &str) -> Option<&str> {
    let (scheme, rest) = path.split_once("://")?;
    if !matches!(scheme, "ttrpc+unix" | "ttrpc+vsock" | "ttrpc+hvsock" | "unix" | "streaming") {
        return None;
    }
    rest.split_once('?')?.1.split('&').find_map(|kv| kv.strip_prefix("streaming_id="))
}

/// Opens the process's ends. `name` identifies it to the keeper: `io/<container>/<exec>/`. Nothing
/// is kept until [`Prepared::keep`].
///
/// # Errors
/// [`Error::InvalidArgument`] or [`Error::Unimplemented`] for a stdio that cannot be served.
pub fn open(stdio: &Stdio, name: &str) -> Result<(ProcessIo, Prepared)> {
    let mut p = Prepared {
        io: Io::default(),
        ours: Vec::new(),
        unkept: Vec::new(),
        stdio: stdio.clone(),
        name: name.into(),
    };
    if stdio.terminal {
        return Ok((ProcessIo::Terminal { size: None }, p));
    }
    let mut theirs = [None, None, None];
    let all = [
        (Which::Stdin, &stdio.stdin),
        (Which::Stdout, &stdio.stdout),
        (Which::Stderr, &stdio.stderr),
    ];
    for ((which, path), slot) in all.into_iter().zip(&mut theirs) {
        if path.is_empty() {
            continue;
        }
        if stream_id(path).is_some() || raw::name(path).is_some() {
            let (r, w) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
                .map_err(|e| Error::internal("cannot make a pipe", e))?;
            let (end, our) = if which == Which::Stdin { (r, w) } else { (w, r) };
            p.unkept.push((which, duplicate(&our)?));
            p.ours.push((which, our));
            *slot = Some(end);
            continue;
        }
        let opened = fifo::open(path, which)?;
        if let Some(hold) = opened.hold {
            p.unkept.push((which, duplicate(&hold)?));
            if which == Which::Stdin {
                p.io.stdin = Some(hold);
            } else {
                p.io.held.push(hold);
            }
        }
        *slot = Some(opened.end);
    }
    let [stdin, stdout, stderr] = theirs;
    Ok((ProcessIo::Streams { stdin, stdout, stderr }, p))
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd> {
    fd.try_clone().map_err(|error| Error::internal("duplicate a stream", error))
}

impl Prepared {
    /// Has the keeper keep our ends; all are asked for at once.
    ///
    /// May be awaited beside what makes the process, as long as it is polled first: who reads the
    /// keeper's requests reads them in their order, so that a process that is made after them has
    /// its ends kept, whenever this process dies. Nothing may be answered before both are done.
    ///
    /// # Errors
    /// The keeper's.
    pub async fn keep(&mut self, keeper: &dyn Keeper) -> Result<()> {
        let name = &self.name;
        let all = std::mem::take(&mut self.unkept).into_iter().map(|(which, fd)| async move {
            keeper.keep(&format!("{name}{}", which.name()), fd.as_fd()).await
        });
        futures::future::try_join_all(all).await.map(drop)
    }

    /// Joins our ends with the engine's, now that the process is there.
    ///
    /// # Errors
    /// When the FIFOs of a terminal cannot be opened.
    pub async fn attach(
        mut self,
        terminal: Option<OwnedFd>,
        keeper: &dyn Keeper,
        streams: &Arc<Streams>,
    ) -> Result<Io> {
        if let Some(master) = terminal {
            keeper.keep(&format!("{}terminal", self.name), master.as_fd()).await?;
            if let Some(writer) = self.io.join_terminal(master, &self.stdio, streams)? {
                // Ours is the only one: without it containerd would take our death for the end.
                keeper.keep(&format!("{}writer", self.name), writer.as_fd()).await?;
            }
        }
        for (which, fd) in std::mem::take(&mut self.ours) {
            self.io.join_stream(which, fd, &self.stdio, streams, false)?;
        }
        Ok(std::mem::take(&mut self.io))
    }
}

/// Takes the streams of a process up again after a restart.
///
/// # Errors
/// When descriptors cannot be registered; the process goes on without our side of them.
pub async fn recover(
    stdio: &Stdio,
    stdin_closed: bool,
    name: &str,
    keeper: &dyn Keeper,
    streams: &Arc<Streams>,
) -> Result<Io> {
    let mut io = Io::default();
    if let Some(master) = keeper.fetch(&format!("{name}terminal")).await? {
        io.join_terminal(master, stdio, streams)?;
        return Ok(io);
    }
    for (which, path) in [
        (Which::Stdin, &stdio.stdin),
        (Which::Stdout, &stdio.stdout),
        (Which::Stderr, &stdio.stderr),
    ] {
        if path.is_empty() || (which == Which::Stdin && stdin_closed) {
            continue;
        }
        let Some(fd) = keeper.fetch(&format!("{name}{}", which.name())).await? else { continue };
        if stream_id(path).is_some() || raw::name(path).is_some() {
            io.join_stream(which, fd, stdio, streams, true)?;
        } else if which == Which::Stdin {
            io.stdin = Some(fd);
        } else {
            io.held.push(fd);
        }
    }
    Ok(io)
}

impl Io {
    /// Answers a duplicate of the write end of the output FIFO, if it is one.
    fn join_terminal(
        &mut self,
        master: OwnedFd,
        stdio: &Stdio,
        streams: &Arc<Streams>,
    ) -> Result<Option<OwnedFd>> {
        let failed = |e| Error::internal("cannot duplicate a terminal", e);
        let master = Arc::new(master);
        self.terminal = Some(master.clone());
        let copy = || master.try_clone().map_err(failed);
        if let Some(name) = raw::name(&stdio.stdout).or_else(|| raw::name(&stdio.stdin)) {
            self.outputs.push(raw::pump(streams.raw.get(name)?, copy()?, raw::Ways::Both)?);
            return Ok(None);
        }
        let mut writer = None;
        if !stdio.stdout.is_empty() {
            if stream_id(&stdio.stdout).is_some() {
                self.join_stream(Which::Stdout, copy()?, stdio, streams, false)?;
            } else {
                let opened = fifo::open_ours(&stdio.stdout, Which::Stdout)?;
                self.held.extend(opened.hold);
                writer = Some(opened.end.try_clone().map_err(failed)?);
                self.outputs.push(pump::splice(copy()?, opened.end)?);
            }
        }
        if !stdio.stdin.is_empty() {
            if stream_id(&stdio.stdin).is_some() {
                self.join_stream(Which::Stdin, copy()?, stdio, streams, false)?;
            } else {
                let opened = fifo::open_ours(&stdio.stdin, Which::Stdin)?;
                self.stdin = opened.hold;
                self.input = Some(pump::splice(opened.end, copy()?)?);
            }
        }
        Ok(writer)
    }

    fn join_stream(
        &mut self,
        which: Which,
        fd: OwnedFd,
        stdio: &Stdio,
        streams: &Arc<Streams>,
        resumed: bool,
    ) -> Result<()> {
        let path = match which {
            Which::Stdin => &stdio.stdin,
            Which::Stdout => &stdio.stdout,
            Which::Stderr => &stdio.stderr,
        };
        if let Some(name) = raw::name(path) {
            let slot = streams.raw.get(name)?;
            if which == Which::Stdin {
                self.input = Some(raw::pump(slot, fd, raw::Ways::Input)?);
            } else {
                self.outputs.push(raw::pump(slot, fd, raw::Ways::Output)?);
            }
            return Ok(());
        }
        let id = stream_id(path)
            .ok_or_else(|| Error::InvalidArgument(format!("{path:?} is no stream address")))?;
        if which == Which::Stdin {
            self.input = Some(streams::pump_input(streams.clone(), id.into(), fd)?);
        } else {
            self.outputs.push(streams::pump_output(streams.clone(), id.into(), fd, resumed)?);
        }
        Ok(())
    }

    /// CloseIO: the process sees the end of its input when containerd closes its end, too.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
        // A stream's own close frame ends its pump; nothing more to do for it.
    }

    /// Size of the terminal in columns and rows.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn resize(&self, width: u16, height: u16) -> Result<()> {
        let Some(t) = &self.terminal else { return Ok(()) };
        let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, libc::winsize);
        // SAFETY: `size` is valid for the call and the descriptor is open.
        unsafe { set_size(std::os::fd::AsRawFd::as_raw_fd(t), &size) }
            .map(drop)
            .map_err(|e| Error::internal("cannot resize the terminal", e))
    }

    /// After the exit: what is to be waited for before the exit is told.
    pub fn take_outputs(&mut self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut self.outputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_addresses_are_told_from_paths() {
        let url = "ttrpc+unix:///run/p/task.sock?streaming_id=abc-stdout";
        assert_eq!(stream_id(url), Some("abc-stdout"));
        assert_eq!(stream_id("/run/fifo"), None);
        assert_eq!(stream_id("binary:///x?streaming_id=1"), None);
    }
}

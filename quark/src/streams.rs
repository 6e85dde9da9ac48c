//! A process's streams: FIFOs in the container's bundle, which Quark opens by name, and what moves
//! bytes between them and the engine's ([`kuasar_forward::stdio`]).
//!
//! Quark makes ptys itself and copies between them and two FIFOs. The engine's side of a terminal
//! has to be one descriptor for both directions: one end of a socket pair, whose other end is
//! joined with both FIFOs.
//!
//! Both ends of each FIFO are open before Quark opens its own, so that Quark neither waits for us
//! nor reads an end of file, and until it has: the ends that are not ours are held so long.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use containerd_task::error::{Error, Result};
use containerd_task::runtime::{Keeper, ProcessIo};
use kuasar_forward::stdio::{self, Direction, Stream};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use tokio::task::JoinHandle;

use crate::tree::Tree;

/// Streams that are ready to be opened by Quark.
#[derive(Debug)]
pub struct Prepared {
    /// What Quark is told: stdin, stdout, stderr.
    pub names: [String; 3],
    /// Whether the process has a terminal.
    pub terminal: bool,
    joins: Vec<(String, OwnedFd, OwnedFd, Direction)>,
    /// Quark's ends, until it has its own.
    held: Vec<OwnedFd>,
    master: Option<OwnedFd>,
    /// The other end of the master.
    hub: Option<OwnedFd>,
}

/// Streams that bytes move on.
#[derive(Debug)]
pub struct Joined {
    /// The input's pump.
    pub input: Option<JoinHandle<()>>,
    /// The outputs, which an exit waits for.
    pub outputs: Vec<Stream>,
    /// The engine's side of a terminal.
    pub master: Option<OwnedFd>,
    /// To be hung up when the process has ended.
    pub hub: Option<OwnedFd>,
}

/// Name of a FIFO in the container's bundle.
fn file(exec: &str, which: &str) -> String {
    if exec.is_empty() { which.to_owned() } else { format!("{exec}-{which}") }
}

/// Names of all FIFOs that a process may have.
pub fn files(exec: &str) -> Vec<String> {
    ["stdin", "stdout", "stderr"].iter().map(|which| file(exec, which)).collect()
}

fn again(fd: &OwnedFd) -> Result<OwnedFd> {
    fd.try_clone().map_err(|error| Error::internal("duplicate a stream", error))
}

/// Makes the FIFOs of a process.
///
/// # Errors
/// When one cannot be made.
pub fn prepare(tree: &Tree, container: &str, exec: &str, io: ProcessIo) -> Result<Prepared> {
    let mut prepared = Prepared {
        names: [const { String::new() }; 3],
        terminal: false,
        joins: Vec::new(),
        held: Vec::new(),
        master: None,
        hub: None,
    };
    let ends = match io {
        ProcessIo::Streams { stdin, stdout, stderr } => {
            [("stdin", stdin), ("stdout", stdout), ("stderr", stderr)]
        }
        ProcessIo::Terminal { .. } => {
            let flags = SockFlag::SOCK_CLOEXEC;
            let (master, hub) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)
                .map_err(|error| Error::internal("make a terminal's streams", error))?;
            let ends =
                [("stdin", Some(again(&hub)?)), ("stdout", Some(again(&hub)?)), ("stderr", None)];
            prepared.terminal = true;
            prepared.master = Some(master);
            prepared.hub = Some(hub);
            ends
        }
    };
    for ((which, engine), name) in ends.into_iter().zip(&mut prepared.names) {
        let Some(engine) = engine else { continue };
        let fifo = tree.make_fifo(container, &file(exec, which))?;
        *name = format!("/{container}/{}", file(exec, which));
        let (ours, theirs, direction) = match which {
            "stdin" => (fifo.write, fifo.read, Direction::Input),
            _ => (fifo.read, fifo.write, Direction::Output),
        };
        prepared.held.push(theirs);
        prepared.joins.push((stdio::name(container, exec, which), ours, engine, direction));
    }
    Ok(prepared)
}

impl Prepared {
    /// Quark has opened its ends: bytes may move, and ends of file are real.
    ///
    /// # Errors
    /// When the ends cannot be kept.
    pub async fn join(self, keeper: &Arc<dyn Keeper>) -> Result<Joined> {
        let (mut input, mut outputs) = (None, Vec::new());
        for (name, ours, engine, direction) in self.joins {
            let stream = stdio::begin(keeper, name, ours, engine, direction).await?;
            match direction {
                Direction::Output => outputs.push(stream),
                Direction::Input => input = Some(stream.pump),
            }
        }
        drop(self.held);
        Ok(Joined { input, outputs, master: self.master, hub: self.hub })
    }
}

/// Goes on with a process's streams after a restart of the daemon.
///
/// # Errors
/// When the ends cannot be fetched.
pub async fn resume(keeper: &Arc<dyn Keeper>, container: &str, exec: &str) -> Result<Joined> {
    let output = stdio::name(container, exec, "stdout");
    // Before it may come to its end.
    let hub = keeper.fetch(&format!("{output}engine")).await?.filter(is_socket);
    let (mut input, mut outputs) = (None, Vec::new());
    for (which, direction) in
        [("stdin", Direction::Input), ("stdout", Direction::Output), ("stderr", Direction::Output)]
    {
        let name = stdio::name(container, exec, which);
        let stream = stdio::resume(keeper, name, direction).await?;
        match direction {
            Direction::Output => outputs.extend(stream),
            Direction::Input => input = stream.map(|stream| stream.pump),
        }
    }
    Ok(Joined { input, outputs, master: None, hub })
}

fn is_socket(fd: &OwnedFd) -> bool {
    let stat = nix::sys::stat::fstat(fd.as_fd());
    stat.is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFSOCK)
}

/// Lets the engine's side of a terminal see the end.
pub fn hang_up(hub: &OwnedFd) {
    // Fails when the other side has gone.
    let _ = shutdown(hub.as_raw_fd(), Shutdown::Both);
}

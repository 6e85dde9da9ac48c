//! Raw streams: connections that somebody brings later.
//!
//! Where containers run in a guest, the engine's FIFOs are on the other side of a socket. A
//! process then gets a pipe (or a pty) at once, under a name that the request gives
//! (`vsock-stream://<name>`), and the connection that carries its bytes is attached when the other
//! side dials: [`super::Streams::attach_raw`]. Until then output stays in the pipe, where it
//! blocks the process as a FIFO without a reader would.
//!
//! * The end of input is a half-close of the other side's: the pipe is closed then.
//! * A connection that breaks loses what the kernel had already taken for it, nothing else: the
//!   pump waits for the next one. A further connection of the same name takes over.
//! * The end of output closes the whole connection: a vsock that ends in a unix socket on the
//!   host passes no half-close on, and its reader would wait for ever. (The kernel keeps a closed
//!   vsock until the other side has taken what was sent, for eight seconds.)
//! * At most [`CHUNK`] bytes are written at once, because some vsock devices hang on more.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::pump::register;
use crate::error::{Error, Result};
use crate::journal::Stdio;

/// Most bytes of one write.
pub const CHUNK: usize = 16 << 10;
/// First size of a buffer for input; it grows to [`CHUNK`] when it is filled.
const SMALL: usize = 512;
const SCHEME: &str = "vsock-stream://";

/// A connection in both directions whose halves can be closed one by one.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Duplex for T {}

/// Any such connection.
pub type RawConnection = Box<dyn Duplex>;

/// The name in the address of a raw stream.
pub fn name(path: &str) -> Option<&str> {
    path.strip_prefix(SCHEME).filter(|name| !name.is_empty())
}

/// Where the connection of one name arrives.
#[derive(Default)]
pub(super) struct Slot {
    waiting: Mutex<Option<RawConnection>>,
    came: Notify,
    /// It was made known before its process.
    early: AtomicBool,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<RawConnection>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn next(&self) -> RawConnection {
        loop {
            if let Some(connection) = self.lock().take() {
                return connection;
            }
            // One permit is kept when nobody waits, so that nothing is missed in between.
            self.came.notified().await;
        }
    }
}

/// All names that are known.
#[derive(Default)]
pub(super) struct Slots(Mutex<HashMap<String, Arc<Slot>>>);

impl Slots {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Slot>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the names of a process known, those that were not announced.
    pub(super) fn expect(&self, stdio: &Stdio) -> Result<()> {
        let names = names(stdio);
        let mut slots = self.lock();
        let early = |slot: &Arc<Slot>| slot.early.load(Ordering::Relaxed);
        if let Some(taken) = names.iter().find(|name| slots.get(**name).is_some_and(|s| !early(s)))
        {
            return Err(Error::AlreadyExists(format!("stream {taken:.300} belongs to a process")));
        }
        for name in names {
            slots.entry(name.to_owned()).or_default().early.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Makes the names of a process known that is still to come.
    pub(super) fn announce(&self, stdio: &Stdio) -> Result<()> {
        self.expect(stdio)?;
        for name in names(stdio) {
            self.get(name)?.early.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    pub(super) fn get(&self, name: &str) -> Result<Arc<Slot>> {
        let unknown = || Error::NotFound(format!("no process has the stream {name:.300}"));
        self.lock().get(name).cloned().ok_or_else(unknown)
    }

    pub(super) fn attach(&self, name: &str, connection: RawConnection) -> Result<()> {
        let slot = self.get(name)?;
        slot.lock().replace(connection);
        slot.came.notify_one();
        Ok(())
    }

    pub(super) fn forget(&self, stdio: &Stdio) {
        let mut slots = self.lock();
        for name in names(stdio) {
            slots.remove(name);
        }
    }
}

fn names(stdio: &Stdio) -> Vec<&str> {
    let mut names: Vec<&str> =
        [&stdio.stdin, &stdio.stdout, &stdio.stderr].into_iter().filter_map(|p| name(p)).collect();
    // A terminal has one name for both directions.
    names.sort_unstable();
    names.dedup();
    names
}

/// Which ways bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ways {
    /// From the process.
    Output,
    /// To the process.
    Input,
    /// Both: a terminal.
    Both,
}

enum Ended {
    /// Everything has been handed over.
    Done,
    /// The process takes no more input.
    Deaf,
    /// The connection broke, or another one is there.
    Connection,
}

/// Joins a descriptor of ours with whatever connection comes for `slot`.
pub(super) fn pump(slot: Arc<Slot>, fd: OwnedFd, ways: Ways) -> Result<JoinHandle<()>> {
    let fd = register(fd)?;
    Ok(tokio::spawn(async move {
        let mut relay = Relay { ways, ..Relay::default() };
        loop {
            let (mut reader, mut writer) = split(slot.next().await);
            match relay.run(&slot, &fd, &mut reader, &mut writer).await {
                Ended::Done | Ended::Deaf => return,
                Ended::Connection => {}
            }
        }
    }))
}

/// Bytes that were taken from one side and not given to the other yet.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    at: usize,
    len: usize,
}

impl Buffer {
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.at..self.len).unwrap_or_default()
    }
    fn is_empty(&self) -> bool {
        self.at >= self.len
    }
    fn consume(&mut self, n: usize) {
        self.at += n;
    }
    fn fill(&mut self, n: usize) {
        (self.at, self.len) = (0, n);
    }
    fn space(&mut self, size: usize) -> &mut [u8] {
        if self.bytes.len() < size {
            self.bytes.resize(size, 0);
        }
        &mut self.bytes
    }
    fn free(&mut self) {
        *self = Self::default();
    }
}

struct Relay {
    ways: Ways,
    out: Buffer,
    out_ended: bool,
    input: Buffer,
    input_size: usize,
    input_ended: bool,
}

impl Default for Relay {
    fn default() -> Self {
        Self {
            ways: Ways::Both,
            out: Buffer::default(),
            out_ended: false,
            input: Buffer::default(),
            input_size: SMALL,
            input_ended: false,
        }
    }
}

impl Relay {
    async fn run(
        &mut self,
        slot: &Slot,
        fd: &AsyncFd<OwnedFd>,
        reader: &mut ReadHalf<RawConnection>,
        writer: &mut WriteHalf<RawConnection>,
    ) -> Ended {
        let outwards = self.ways != Ways::Input;
        let inwards = self.ways != Ways::Output;
        loop {
            if outwards && self.out_ended && self.out.is_empty() {
                return match writer.shutdown().await {
                    Ok(()) => Ended::Done,
                    Err(_) => Ended::Connection,
                };
            }
            if !outwards && self.input_ended && self.input.is_empty() {
                return Ended::Done;
            }
            self.input.space(if inwards { self.input_size } else { 0 });
            let listens = inwards && !self.input_ended && self.input.is_empty();
            tokio::select! {
                () = slot.came.notified() => {
                    if slot.lock().is_some() {
                        return Ended::Connection;
                    }
                }
                wrote = writer.write(self.out.rest()), if !self.out.is_empty() => match wrote {
                    Ok(0) | Err(_) => return Ended::Connection,
                    Ok(n) => self.out.consume(n),
                },
                guard = fd.readable(), if outwards && !self.out_ended && self.out.is_empty() => {
                    let Ok(mut guard) = guard else { return Ended::Deaf };
                    let space = self.out.space(CHUNK);
                    let read = guard.try_io(|fd| {
                        nix::unistd::read(fd.get_ref(), space).map_err(io::Error::from)
                    });
                    match read {
                        Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                        // EIO is a pty whose last user has gone.
                        Ok(Ok(0) | Err(_)) => self.out_ended = true,
                        Ok(Ok(n)) => self.out.fill(n),
                        // An idle stream costs no buffer.
                        Err(_would_block) => self.out.free(),
                    }
                }
                read = reader.read(&mut self.input.bytes), if listens => match read {
                    Ok(0) => self.input_ended = true,
                    Ok(n) => {
                        self.input.fill(n);
                        if n == self.input.bytes.len() {
                            self.input_size = (n * 4).min(CHUNK);
                        }
                    }
                    Err(_) => return Ended::Connection,
                },
                guard = fd.writable(), if !self.input.is_empty() => {
                    let Ok(mut guard) = guard else { return Ended::Deaf };
                    let rest = self.input.rest();
                    let wrote = guard.try_io(|fd| {
                        nix::unistd::write(fd.get_ref(), rest).map_err(io::Error::from)
                    });
                    match wrote {
                        Ok(Ok(n)) => self.input.consume(n),
                        Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                        // Nobody reads it. A terminal's output still counts.
                        Ok(Err(_)) if outwards => {
                            self.input.free();
                            self.input_ended = true;
                        }
                        Ok(Err(_)) => return Ended::Deaf,
                        Err(_would_block) => {}
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::net::UnixStream;

    fn pipe() -> (OwnedFd, OwnedFd) {
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap()
    }

    fn stdio(names: [&str; 3]) -> Stdio {
        let address = |name: &str| {
            if name.is_empty() { String::new() } else { format!("{SCHEME}{name}") }
        };
        let [stdin, stdout, stderr] = names.map(address);
        Stdio { stdin, stdout, stderr, terminal: false }
    }

    async fn soon<T>(work: impl Future<Output = T>) -> T {
        tokio::time::timeout(Duration::from_secs(20), work).await.unwrap()
    }

    fn bytes(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    #[test]
    fn names_are_unique_and_forgotten() {
        let slots = Slots::default();
        let one = stdio(["", "c//stdout", "c//stderr"]);
        slots.expect(&one).unwrap();
        assert!(matches!(slots.expect(&one), Err(Error::AlreadyExists(_))));
        assert!(slots.get("c//stdout").is_ok());
        slots.forget(&one);
        assert!(matches!(slots.get("c//stdout"), Err(Error::NotFound(_))));
        // A terminal names one stream twice.
        slots.expect(&stdio(["t", "t", ""])).unwrap();
        // One that was announced is there before its process, which takes it over.
        slots.announce(&one).unwrap();
        slots.announce(&one).unwrap();
        let early = slots.get("c//stdout").unwrap();
        slots.expect(&one).unwrap();
        assert!(Arc::ptr_eq(&early, &slots.get("c//stdout").unwrap()));
        assert!(matches!(slots.announce(&one), Err(Error::AlreadyExists(_))));
        assert_eq!(name("vsock-stream://a/b/c"), Some("a/b/c"));
        assert_eq!(name("vsock-stream://"), None);
        assert_eq!(name("/run/fifo"), None);
    }

    #[tokio::test]
    async fn what_was_written_before_the_connection_came_is_not_lost() {
        let slots = Slots::default();
        slots.expect(&stdio(["", "o", ""])).unwrap();
        let (r, w) = pipe();
        nix::unistd::write(&w, b"early ").unwrap();
        let pump = pump(slots.get("o").unwrap(), r, Ways::Output).unwrap();
        let sent = bytes(1 << 20);
        let copy = sent.clone();
        let writer = std::thread::spawn(move || {
            use std::io::Write;
            std::fs::File::from(w).write_all(&copy).unwrap();
        });
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        slots.attach("o", Box::new(ours)).unwrap();
        let mut got = Vec::new();
        soon(theirs.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got.get(..6).unwrap(), b"early ");
        assert!(got[6..] == sent);
        soon(pump).await.unwrap();
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn writes_are_small_enough_for_a_vsock_device() {
        struct Watching(UnixStream, Arc<Mutex<usize>>);
        impl AsyncRead for Watching {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
                buf: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<io::Result<()>> {
                std::pin::Pin::new(&mut self.0).poll_read(cx, buf)
            }
        }
        impl AsyncWrite for Watching {
            fn poll_write(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
                buf: &[u8],
            ) -> std::task::Poll<io::Result<usize>> {
                let mut most = self.1.lock().unwrap();
                *most = (*most).max(buf.len());
                drop(most);
                std::pin::Pin::new(&mut self.0).poll_write(cx, buf)
            }
            fn poll_flush(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
            ) -> std::task::Poll<io::Result<()>> {
                std::pin::Pin::new(&mut self.0).poll_flush(cx)
            }
            fn poll_shutdown(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
            ) -> std::task::Poll<io::Result<()>> {
                std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
            }
        }
        let slots = Slots::default();
        slots.expect(&stdio(["", "o", ""])).unwrap();
        let (r, w) = pipe();
        std::thread::spawn(move || {
            use std::io::Write;
            std::fs::File::from(w).write_all(&bytes(300_000)).unwrap();
        });
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let most = Arc::new(Mutex::new(0));
        slots.attach("o", Box::new(Watching(ours, most.clone()))).unwrap();
        let _pump = pump(slots.get("o").unwrap(), r, Ways::Output).unwrap();
        let mut got = Vec::new();
        soon(theirs.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got.len(), 300_000);
        assert!((1..=CHUNK).contains(&*most.lock().unwrap()));
    }

    #[tokio::test]
    async fn the_end_of_input_arrives_behind_its_last_byte() {
        let slots = Slots::default();
        slots.expect(&stdio(["i", "", ""])).unwrap();
        let (r, w) = pipe();
        let pump = pump(slots.get("i").unwrap(), w, Ways::Input).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        slots.attach("i", Box::new(ours)).unwrap();
        let reader = std::thread::spawn(move || {
            use std::io::Read;
            let mut got = Vec::new();
            std::fs::File::from(r).read_to_end(&mut got).unwrap();
            got
        });
        let sent = bytes(200_000);
        soon(theirs.write_all(&sent)).await.unwrap();
        theirs.shutdown().await.unwrap();
        soon(pump).await.unwrap();
        assert!(reader.join().unwrap() == sent);
    }

    #[tokio::test]
    async fn a_later_connection_takes_over() {
        let slots = Slots::default();
        slots.expect(&stdio(["", "o", ""])).unwrap();
        let (r, w) = pipe();
        let pump = pump(slots.get("o").unwrap(), r, Ways::Output).unwrap();
        let (ours, mut first) = UnixStream::pair().unwrap();
        slots.attach("o", Box::new(ours)).unwrap();
        nix::unistd::write(&w, b"one").unwrap();
        let mut three = [0; 3];
        soon(first.read_exact(&mut three)).await.unwrap();
        let (ours, mut second) = UnixStream::pair().unwrap();
        slots.attach("o", Box::new(ours)).unwrap();
        // The first one is closed, and what is written from now on goes to the second.
        assert_eq!(soon(first.read(&mut three)).await.unwrap(), 0);
        nix::unistd::write(&w, b"two").unwrap();
        drop(w);
        let mut rest = Vec::new();
        soon(second.read_to_end(&mut rest)).await.unwrap();
        assert_eq!(rest, b"two");
        soon(pump).await.unwrap();
    }

    #[tokio::test]
    async fn a_terminal_goes_both_ways_and_ends_with_its_users() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let mut raw = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
        nix::sys::termios::cfmakeraw(&mut raw);
        nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &raw).unwrap();
        let slots = Slots::default();
        slots.expect(&stdio(["t", "t", ""])).unwrap();
        let pump = pump(slots.get("t").unwrap(), pty.master, Ways::Both).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        slots.attach("t", Box::new(ours)).unwrap();
        theirs.write_all(b"in").await.unwrap();
        // The end of input is not the end of output.
        theirs.shutdown().await.unwrap();
        let slave = pty.slave;
        let slave = tokio::task::spawn_blocking(move || {
            let mut two = [0; 2];
            assert_eq!(nix::unistd::read(&slave, &mut two), Ok(2));
            assert_eq!(&two, b"in");
            nix::unistd::write(&slave, b"out").unwrap();
            slave
        })
        .await
        .unwrap();
        drop(slave);
        let mut got = Vec::new();
        soon(theirs.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got, b"out");
        soon(pump).await.unwrap();
    }
}

//! Many streams over one: vsock's ports, where there is only a serial port.
//!
//! A virtio-serial port, and even more a console (`/dev/hvc0`), is one stream of bytes that has no
//! connections, does not always tell when its other side comes or goes, and holds in itself what a side
//! that is gone has left there. Over it go what over vsock are connections: the one that carries
//! ttrpc, one for each stream of a process, and the guest's READY.
//!
//! ```text
//! guest: Hello                          I am here, and my terminal is raw
//! host:  Sync, session n                again and again until there is an answer
//! guest: Begun, session n               whatever was of another session is dropped, by both
//! either: Open ─▶ Accept | Reset        a stream to a port, as of vsock
//!         Data …, Window …              within the credit that the reader grants
//!         End                           no more is sent: half-close
//!         Stop                          no more is read
//! ```
//!
//! **Sessions.** The host chooses a number that was never used (64 random bits) each time that it
//! begins; each frame carries it. So neither what the port still holds of a host that has gone, in
//! the middle of a frame as it may be, nor what a machine had on its way when it was saved, is
//! taken for anything of the new session. It does not matter whether the port tells that its other
//! side has gone. A guest drops its streams when a session begins: to whoever has one it is a
//! connection that broke.
//!
//! **No stream holds another up.** Each may have [`WINDOW`] bytes on their way in each direction, and
//! no more before its reader has taken some. Whatever comes from the port is taken off it at once,
//! and streams send in turns.
//!
//! **Bounds.** What one side keeps for the other is at most [`WINDOW`] and [`WAITING`] bytes for each of
//! [`STREAMS`] streams, and one frame that has not ended. A side that sends more than it was granted
//! loses the stream. What makes no sense is dropped.
//!
//! Who may speak is not decided here: each stream begins with the lines of [`crate::handshake`], as
//! a connection over vsock does.

// Open for the fuzz targets; whoever speaks takes a `Mux`.
pub mod frame;
pub mod state;

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{Notify, watch};

use frame::Finder;
use state::{Key, Progress, State};
pub use state::{STREAMS, WAITING, WINDOW};

/// Version of this protocol. Frames of others are none.
pub const VERSION: u8 = 1;
/// Between two questions of a host that has no answer yet.
const AGAIN: Duration = Duration::from_millis(250);
/// Bytes that are read at once.
const READ: usize = 16 * 1024;

/// Which side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that begins sessions.
    Host,
    /// The other.
    Guest,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something to send.
    due: Notify,
    /// Somebody has opened a stream.
    arrived: Notify,
    session: watch::Sender<Option<u64>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something that may be followed by something to send.
    fn with<T>(&self, what: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let done = what(&mut state);
        let due = state.is_due();
        drop(state);
        if due {
            self.due.notify_one();
        }
        done
    }
}

/// One side. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Mux(Arc<Shared>);

impl Mux {
    /// The host's. `session` is a number that was never used: 64 random bits.
    pub fn host(session: u64) -> Self {
        Self::new(State::new(Role::Host, session))
    }

    /// The guest's.
    pub fn guest() -> Self {
        Self::new(State::new(Role::Guest, 0))
    }

    fn new(state: State) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(state),
            due: Notify::new(),
            arrived: Notify::new(),
            session: watch::Sender::new(None),
        }))
    }

    /// Speaks over `port` until that ends: nothing of this happens without it.
    ///
    /// # Errors
    /// When the port cannot be read or written.
    pub async fn run(&self, port: impl AsyncRead + AsyncWrite) -> io::Result<()> {
        let (reader, writer) = tokio::io::split(port);
        let done = tokio::select! {
            done = self.hear(reader) => done,
            done = self.speak(writer) => done,
        };
        self.0.state().close();
        self.0.session.send_replace(None);
        done
    }

    async fn hear(&self, mut port: impl AsyncRead + Unpin) -> io::Result<()> {
        let (mut finder, mut buffer) = (Finder::default(), vec![0; READ]);
        loop {
            let n = port.read(&mut buffer).await?;
            if n == 0 {
                return Ok(());
            }
            for frame in finder.find(buffer.get(..n).unwrap_or_default()) {
                let opens = frame.kind == frame::Kind::Open;
                let (begun, session) = self.0.with(|state| (state.hear(frame), state.session()));
                if begun || session.is_none() {
                    self.0.session.send_if_modified(|told| {
                        let new = *told != session;
                        *told = session;
                        new
                    });
                }
                if opens {
                    self.0.arrived.notify_one();
                }
            }
        }
    }

    async fn speak(&self, mut port: impl AsyncWrite + Unpin) -> io::Result<()> {
        let mut bytes = Vec::new();
        loop {
            self.0.state().fill(&mut bytes);
            if bytes.is_empty() {
                let asked = self.0.state().asks();
                let due = self.0.due.notified();
                if !asked {
                    due.await;
                } else if tokio::time::timeout(AGAIN, due).await.is_err() {
                    self.0.state().ask();
                }
                continue;
            }
            port.write_all(&bytes).await?;
            port.flush().await?;
            bytes.clear();
        }
    }

    /// The session that both sides are in, if there is one, and each that follows.
    pub fn sessions(&self) -> watch::Receiver<Option<u64>> {
        self.0.session.subscribe()
    }

    /// A stream to a port of the other side, once that has accepted it.
    ///
    /// # Errors
    /// `NotConnected` without a session, or with too many streams; `ConnectionRefused`.
    pub async fn open(&self, port: u32) -> io::Result<MuxStream> {
        let key = self.0.with(|state| state.open(port));
        let key = key.ok_or(io::ErrorKind::NotConnected)?;
        let stream = MuxStream { shared: self.0.clone(), key };
        let opened = poll_fn(|cx| match self.0.state().opened(key, cx.waker()) {
            Progress::Wait => Poll::Pending,
            Progress::Done(_) => Poll::Ready(Ok(())),
            Progress::Broken => Poll::Ready(Err(io::ErrorKind::ConnectionRefused)),
        });
        opened.await?;
        Ok(stream)
    }

    /// The next stream that the other side opens.
    pub async fn next(&self) -> Incoming {
        loop {
            if let Some((key, port)) = self.0.state().arrived() {
                return Incoming { port, stream: MuxStream { shared: self.0.clone(), key } };
            }
            // One permit is kept when nobody waits.
            self.0.arrived.notified().await;
        }
    }
}

/// A stream that the other side wants. Refused when it is dropped.
#[derive(Debug)]
pub struct Incoming {
    /// To which port.
    pub port: u32,
    stream: MuxStream,
}

impl Incoming {
    /// Accepts it.
    pub fn accept(self) -> MuxStream {
        let Self { stream, .. } = self;
        stream.shared.with(|state| state.accept(stream.key));
        stream
    }
}

/// A stream. Dropped it is closed, behind what was written.
#[derive(Debug)]
pub struct MuxStream {
    shared: Arc<Shared>,
    key: Key,
}

impl MuxStream {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.key.1
    }

    /// Whether it broke in a session that goes on: a piece of it was lost or changed on its way, or the
    /// other side says so. To be asked while the stream is held.
    pub fn lost(&self) -> impl Fn() -> bool + Send + use<> {
        let (shared, key) = (self.shared.clone(), self.key);
        move || shared.state().lost(key)
    }

    /// Resolves when the other side reads no more; for one at a time.
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let (shared, key) = (self.shared.clone(), self.key);
        poll_fn(move |cx| match shared.state().stopped(key, cx.waker()) {
            Progress::Wait => Poll::Pending,
            _ => Poll::Ready(()),
        })
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        self.shared.with(|state| state.drop_stream(self.key));
    }
}

impl AsyncRead for MuxStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let most = buf.remaining();
        if most == 0 {
            return Poll::Ready(Ok(()));
        }
        let mut add = |bytes: &[u8]| buf.put_slice(bytes);
        match self.shared.with(|state| state.read(self.key, most, &mut add, cx.waker())) {
            Progress::Done(_) => Poll::Ready(Ok(())),
            Progress::Wait => Poll::Pending,
            Progress::Broken => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        }
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.shared.with(|state| state.write(self.key, buf, cx.waker())) {
            Progress::Done(n) => Poll::Ready(Ok(n)),
            Progress::Wait => Poll::Pending,
            Progress::Broken => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // As of a socket: what was written is on its way.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|state| state.end(self.key));
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;

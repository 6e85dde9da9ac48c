//! containerd's stdio streams (`io_type = "streaming"`).
//!
//! containerd dials a connection per stream, before the container or exec exists, and names it
//! by id. A connection is acknowledged at once and then waits in [`Streams`] until a pump takes
//! it; after a restart of containerd the same id comes again and the newest wins.
//!
//! * Output: at most 32 KiB per message, and only within the credit that the reader has granted.
//!   The end is a bare close frame; then the reader's own close frame is awaited, because only it
//!   says that everything has been read, and only then the connection is closed.
//! * Input: the writer sends only what we grant; credit is given back as the process reads.
//! * When the reader closes an output first, the process must not block: the rest is discarded.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kuasar_protos::streaming::StreamInit;
use kuasar_protos::transfer::{Data, WindowUpdate};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::pump::register;
use crate::error::Result;
use crate::frame::{DATA, Decoder, Frame, NO_DATA, REMOTE_CLOSED};

/// Largest Data message: the reader's buffer (engine-contract §4).
const CHUNK: usize = 32 << 10;
/// Credit granted for input, in bytes.
const WINDOW: i32 = 64 << 10;
/// Credit assumed for a stream that was begun with an earlier daemon.
const RESUMED: i64 = 64 << 10;

const DATA_TYPE: &str = "containerd.types.transfer.Data";
const WINDOW_TYPE: &str = "containerd.types.transfer.WindowUpdate";

/// Connections that wait for their pump.
#[derive(Default)]
pub struct Streams {
    waiting: Mutex<HashMap<String, Connection>>,
    came: Notify,
    pub(super) raw: super::raw::Slots,
}

/// Most streams that wait for a container that was never created.
const MAX_WAITING: usize = 4096;

struct Connection {
    socket: UnixStream,
    decoder: Decoder,
    stream: u32,
    credit: i64,
}

impl Streams {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Connection>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection over whose first request was `Stream`; `decoder` holds what else has
    /// been read of it.
    pub async fn accept(&self, mut socket: UnixStream, mut decoder: Decoder, stream: u32) {
        let Ok(Some(frame)) = next(&mut socket, &mut decoder).await else { return };
        let id = Any::parse_from_bytes(&frame.body)
            .and_then(|any| StreamInit::parse_from_bytes(&any.value))
            .map(|init| init.id);
        let Ok(id) = id else { return };
        // At once: the client has no time-out of its own.
        let ack = Any { type_url: "google.protobuf.Empty".into(), ..Any::default() };
        if send(&mut socket, stream, &ack).await.is_err() {
            return;
        }
        {
            let mut waiting = self.lock();
            if waiting.len() >= MAX_WAITING && !waiting.contains_key(&id) {
                tracing::warn!(%id, "too many streams wait for their container: refused");
                return;
            }
            waiting.insert(id, Connection { socket, decoder, stream, credit: 0 });
        }
        self.came.notify_waiters();
    }

    /// Makes the raw streams of a process known, so that connections may come for them.
    ///
    /// # Errors
    /// [`crate::error::Error::AlreadyExists`] when another process has one of the names.
    pub fn expect_raw(&self, stdio: &crate::journal::Stdio) -> Result<()> {
        self.raw.expect(stdio)
    }

    /// Makes the raw streams of a process known that is still to come: their connections may come
    /// before it does.
    ///
    /// # Errors
    /// [`crate::error::Error::AlreadyExists`] when a process has one of the names.
    pub fn announce_raw(&self, stdio: &crate::journal::Stdio) -> Result<()> {
        self.raw.announce(stdio)
    }

    /// Hands the connection of a raw stream over; see [`super::raw`].
    ///
    /// # Errors
    /// [`crate::error::Error::NotFound`] when no process has a stream of this name.
    pub fn attach_raw(&self, name: &str, connection: super::raw::RawConnection) -> Result<()> {
        self.raw.attach(name, connection)
    }

    /// Whether a process has a raw stream of this name.
    pub fn has_raw(&self, name: &str) -> bool {
        self.raw.get(name).is_ok()
    }

    /// No more connections may come for this process.
    pub fn forget_raw(&self, stdio: &crate::journal::Stdio) {
        self.raw.forget(stdio);
    }

    fn take(&self, id: &str) -> Option<Connection> {
        self.lock().remove(id)
    }

    /// Waits for a connection of this name.
    async fn next(&self, id: &str) -> Connection {
        loop {
            let came = self.came.notified();
            tokio::pin!(came);
            came.as_mut().enable();
            if let Some(c) = self.take(id) {
                return c;
            }
            came.await;
        }
    }

    /// Drops what still waits for streams of this container or exec.
    pub fn forget(&self, id: &str) {
        let mut waiting = self.lock();
        for end in ["stdin", "stdout", "stderr"] {
            waiting.remove(&format!("{id}-{end}"));
        }
    }
}

async fn next(socket: &mut UnixStream, decoder: &mut Decoder) -> io::Result<Option<Frame>> {
    let mut buf = [0u8; 4096];
    loop {
        if let Some(frame) = decoder.next_frame()? {
            return Ok(Some(frame));
        }
        match socket.read(&mut buf).await? {
            0 => return Ok(None),
            n => decoder.push(buf.get(..n).unwrap_or_default()),
        }
    }
}

async fn send(socket: &mut UnixStream, stream: u32, any: &Any) -> io::Result<()> {
    let body = any.write_to_bytes().map_err(io::Error::other)?;
    socket.write_all(&Frame { stream, kind: DATA, flags: 0, body }.encode()).await
}

async fn send_close(c: &mut Connection) -> io::Result<()> {
    let flags = REMOTE_CLOSED | NO_DATA;
    let frame = Frame { stream: c.stream, kind: DATA, flags, body: Vec::new() };
    c.socket.write_all(&frame.encode()).await
}

enum Heard {
    Credit,
    Data(Vec<u8>),
    Closed,
}

fn hear(c: &mut Connection, frame: &Frame) -> Heard {
    if frame.flags & REMOTE_CLOSED != 0 && (frame.flags & NO_DATA != 0 || frame.body.is_empty()) {
        return Heard::Closed;
    }
    let Ok(any) = Any::parse_from_bytes(&frame.body) else { return Heard::Credit };
    match any.type_url.rsplit('/').next() {
        Some(WINDOW_TYPE) => {
            if let Ok(w) = WindowUpdate::parse_from_bytes(&any.value) {
                c.credit = c.credit.saturating_add(i64::from(w.update));
            }
            Heard::Credit
        }
        Some(DATA_TYPE) => {
            Heard::Data(Data::parse_from_bytes(&any.value).map(|d| d.data).unwrap_or_default())
        }
        _ => Heard::Credit,
    }
}

async fn read(fd: &AsyncFd<OwnedFd>, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut guard = fd.readable().await?;
        let got = guard.try_io(|fd| nix::unistd::read(fd.get_ref(), buf).map_err(io::Error::from));
        match got {
            // EIO is a pty whose last user has gone.
            Ok(Err(e)) if e.raw_os_error() == Some(libc::EIO) => return Ok(0),
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// Pumps a process's output to the stream `id` until the output ends and the reader has it.
///
/// # Errors
/// When the descriptor cannot be registered.
pub fn pump_output(
    streams: Arc<Streams>,
    id: String,
    fd: OwnedFd,
    resumed: bool,
) -> Result<JoinHandle<()>> {
    let fd = register(fd)?;
    Ok(tokio::spawn(async move {
        let mut pending: Vec<u8> = Vec::new();
        let mut first = resumed;
        loop {
            let mut c = streams.next(&id).await;
            if std::mem::take(&mut first) {
                c.credit += RESUMED;
            }
            match output(&streams, &id, &fd, &mut c, &mut pending).await {
                Ok(Ended::Output) => return,
                // The reader has gone on purpose: discard, so that the process does not block.
                Ok(Ended::Reader) => {
                    let mut buf = vec![0u8; CHUNK];
                    while matches!(read(&fd, &mut buf).await, Ok(n) if n > 0) {}
                    return;
                }
                // Replaced, or its client died: go on with the next connection.
                Ok(Ended::Connection) | Err(_) => {}
            }
        }
    }))
}

enum Ended {
    Output,
    Reader,
    Connection,
}

async fn output(
    streams: &Streams,
    id: &str,
    fd: &AsyncFd<OwnedFd>,
    c: &mut Connection,
    pending: &mut Vec<u8>,
) -> io::Result<Ended> {
    let mut buf = Vec::new();
    loop {
        if !pending.is_empty() && c.credit > 0 {
            let n = pending.len().min(usize::try_from(c.credit).unwrap_or(usize::MAX));
            let data: Vec<u8> = pending.get(..n).unwrap_or_default().to_vec();
            let message = Data { data, ..Data::default() };
            let any = Any {
                type_url: DATA_TYPE.into(),
                value: message.write_to_bytes().map_err(io::Error::other)?,
                ..Any::default()
            };
            send(&mut c.socket, c.stream, &any).await?;
            c.credit -= n as i64;
            pending.drain(..n);
            continue;
        }
        let came = streams.came.notified();
        tokio::select! {
            frame = next(&mut c.socket, &mut c.decoder) => match frame? {
                None => return Ok(Ended::Connection),
                Some(f) => if matches!(hear(c, &f), Heard::Closed) {
                    // Best effort: the reader has said that it wants no more.
                    let _ = send_close(c).await;
                    return Ok(Ended::Reader);
                },
            },
            () = came => {
                if streams.lock().contains_key(id) {
                    return Ok(Ended::Connection);
                }
            }
            n = async {
                buf.resize(CHUNK, 0);
                read(fd, &mut buf).await
            }, if pending.is_empty() => {
                let n = n.unwrap_or(0);
                if n == 0 {
                    break;
                }
                pending.extend_from_slice(buf.get(..n).unwrap_or_default());
            }
        }
    }
    send_close(c).await?;
    while let Some(f) = next(&mut c.socket, &mut c.decoder).await? {
        if matches!(hear(c, &f), Heard::Closed) {
            break;
        }
    }
    Ok(Ended::Output)
}

/// Pumps the stream `id` to a process's input until the writer closes it.
///
/// # Errors
/// When the descriptor cannot be registered.
pub fn pump_input(streams: Arc<Streams>, id: String, fd: OwnedFd) -> Result<JoinHandle<()>> {
    let fd = register(fd)?;
    Ok(tokio::spawn(async move {
        loop {
            let mut c = streams.next(&id).await;
            match input(&streams, &id, &fd, &mut c).await {
                Ok(true) => {
                    let _ = send_close(&mut c).await;
                    return;
                }
                // The process reads no more.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return,
                _ => {}
            }
        }
    }))
}

/// Answers `true` when the writer has closed its stream.
async fn input(
    streams: &Streams,
    id: &str,
    fd: &AsyncFd<OwnedFd>,
    c: &mut Connection,
) -> io::Result<bool> {
    grant(c, WINDOW).await?;
    loop {
        let came = streams.came.notified();
        let frame = tokio::select! {
            f = next(&mut c.socket, &mut c.decoder) => f?,
            () = came => {
                if streams.lock().contains_key(id) {
                    return Ok(false);
                }
                continue;
            }
        };
        let Some(frame) = frame else { return Ok(false) };
        match hear(c, &frame) {
            Heard::Closed => return Ok(true),
            Heard::Credit => {}
            Heard::Data(data) => {
                let mut rest = data.as_slice();
                while !rest.is_empty() {
                    let mut guard = fd.writable().await?;
                    let wrote = guard
                        .try_io(|f| nix::unistd::write(f.get_ref(), rest).map_err(io::Error::from));
                    match wrote {
                        Ok(n) => rest = rest.get(n?..).unwrap_or_default(),
                        Err(_would_block) => {}
                    }
                }
                grant(c, i32::try_from(data.len()).unwrap_or(WINDOW)).await?;
            }
        }
    }
}

async fn grant(c: &mut Connection, update: i32) -> io::Result<()> {
    let message = WindowUpdate { update, ..WindowUpdate::default() };
    let any = Any {
        type_url: WINDOW_TYPE.into(),
        value: message.write_to_bytes().map_err(io::Error::other)?,
        ..Any::default()
    };
    send(&mut c.socket, c.stream, &any).await
}

//! QMP, the JSON protocol of QEMU (and, as a dialect, of StratoVirt).
//!
//! Commands, answers and events have the types of the `qapi` crate. The connection is our own,
//! because three things are needed that the crate's does not have: descriptors travel with a
//! command (`SCM_RIGHTS`), an answer that comes after its deadline is dropped instead of ending
//! the connection, and a line has a greatest length whatever a broken-out guest makes the VMM
//! send. Lines end with `\n`; each command carries an id that comes back with the answer
//! (docs/interop/qmp-spec.rst of QEMU).

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use qapi::Command;
use qapi::qmp::{Event, qmp_capabilities};
use serde::Deserialize;
use serde_json::Value;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Mutex as AsyncMutex, broadcast, oneshot};

use super::Kind;
use super::error::{Error, Result, clean};

/// Longest line that is read. The longest real ones, lists of CPUs or block devices, have some
/// ten kB.
const MAX_LINE: usize = 1 << 20;
/// Most commands that wait for an answer.
const MAX_OPEN: usize = 64;
/// Events that a slow receiver may be behind.
const EVENTS: usize = 64;
/// Characters of a VMM's error text that are passed on.
const REASON: usize = 400;

/// A connection to a VMM's monitor. Cheap to clone; usable by many tasks at once.
#[derive(Clone)]
pub struct Qmp(Arc<Inner>);

struct Inner {
    kind: Kind,
    socket: Arc<UnixStream>,
    /// One command at a time is being written.
    writing: AsyncMutex<()>,
    shared: Arc<Mutex<Shared>>,
    next: AtomicU64,
    limit: Duration,
    events: broadcast::Sender<Event>,
    reader: tokio::task::AbortHandle,
}

#[derive(Default)]
struct Shared {
    open: HashMap<u64, oneshot::Sender<std::result::Result<Value, Refusal>>>,
    /// StratoVirt's answers that are still to come, in their order: not all name their command.
    order: VecDeque<u64>,
    closed: bool,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    #[serde(default)]
    desc: String,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Qmp({})", self.0.kind)
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Qmp {
    /// Takes the greeting and leaves negotiation mode. `limit` is the deadline for this, and
    /// later for each command.
    ///
    /// # Errors
    /// [`Error::Deadline`], [`Error::Gone`], [`Error::Protocol`].
    pub async fn new(kind: Kind, stream: UnixStream, limit: Duration) -> Result<Self> {
        let socket = Arc::new(stream);
        let mut lines = Lines { socket: socket.clone(), buffer: Vec::new(), scanned: 0 };
        let greeting = tokio::time::timeout(limit, lines.next())
            .await
            .map_err(|_| Error::Deadline { what: format!("{kind}'s greeting"), limit })?;
        let greeting = greeting.map_err(|e| lost(kind, &e))?;
        if greeting.get("QMP").is_none() {
            return Err(Error::Protocol { vmm: kind, reason: "no QMP greeting".into() });
        }
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (events, _) = broadcast::channel(EVENTS);
        let (of_reader, tell) = (shared.clone(), events.clone());
        let reader = tokio::spawn(async move {
            let error = loop {
                match lines.next().await {
                    Ok(line) => route(kind, line, &of_reader, &tell),
                    Err(error) => break error,
                }
            };
            tracing::debug!(vmm = %kind, %error, "the monitor's connection has ended");
            let mut shared = lock(&of_reader);
            shared.closed = true;
            shared.open.clear();
        });
        let qmp = Self(Arc::new(Inner {
            kind,
            socket,
            writing: AsyncMutex::default(),
            shared,
            next: AtomicU64::new(1),
            limit,
            events,
            reader: reader.abort_handle(),
        }));
        qmp.execute(&qmp_capabilities { enable: None }).await?;
        Ok(qmp)
    }

    /// Takes up the monitor of a VMM that an earlier daemon has started. It serves one connection;
    /// that of the dead daemon ends when the VMM reads its end.
    ///
    /// # Errors
    /// [`Error::Gone`] without anyone at `socket`; else as [`Qmp::new`].
    pub async fn connect(kind: Kind, socket: &Path, limit: Duration) -> Result<Self> {
        let stream = tokio::time::timeout(limit, UnixStream::connect(socket)).await;
        let what = || Error::Deadline { what: format!("{kind}'s monitor to be free"), limit };
        let stream = stream.map_err(|_| what())?.map_err(|_| Error::Gone)?;
        Self::new(kind, stream, limit).await
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.0.events.subscribe()
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        lock(&self.0.shared).closed
    }

    /// Runs a command within the usual deadline.
    ///
    /// # Errors
    /// [`Error::Refused`] with the VMM's words, [`Error::Deadline`], [`Error::Gone`],
    /// [`Error::Protocol`].
    pub async fn execute<C: Command>(&self, command: &C) -> Result<C::Ok> {
        self.execute_with(command, None).await
    }

    /// The same; a descriptor goes with it.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_with<C: Command>(
        &self,
        command: &C,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<C::Ok> {
        let arguments = serde_json::to_value(command).map_err(|e| self.protocol(&e))?;
        let answer = self.call(C::NAME, arguments, fd).await?;
        C::Ok::deserialize(answer).map_err(|e| self.protocol(&e))
    }

    /// A command that the `qapi` crate has no type for.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn call(
        &self,
        name: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value> {
        let inner = &self.0;
        let id = inner.next.fetch_add(1, Ordering::Relaxed);
        // As text: StratoVirt takes no number.
        let mut message = serde_json::json!({ "execute": name, "id": id.to_string() });
        // StratoVirt wants no arguments where there are none.
        if let (Some(fields), Some(map)) = (message.as_object_mut(), arguments.as_object())
            && !map.is_empty()
        {
            fields.insert("arguments".into(), arguments);
        }
        let mut line = message.to_string();
        line.push('\n');
        let (tx, rx) = oneshot::channel();
        {
            let mut shared = lock(&inner.shared);
            if shared.closed {
                return Err(Error::Gone);
            }
            if shared.open.len() >= MAX_OPEN {
                return Err(Error::Exhausted(format!(
                    "{MAX_OPEN} commands wait for an answer of {} already",
                    inner.kind
                )));
            }
            shared.open.insert(id, tx);
        }
        // Also when this future is dropped: a late answer finds nobody and is ignored.
        let _close = Close { shared: &inner.shared, id };
        let answer = async {
            let turn = inner.writing.lock().await;
            let dialect = inner.kind == Kind::StratoVirt;
            if dialect {
                lock(&inner.shared).order.push_back(id);
            }
            self.write(line.as_bytes(), fd).await.map_err(|e| lost(inner.kind, &e))?;
            // StratoVirt takes what comes with one read for one command: the next one goes after
            // its answer.
            let turn = dialect.then_some(turn);
            let answer = rx.await.map_err(|_| Error::Gone);
            drop(turn);
            answer
        };
        let answer =
            tokio::time::timeout(inner.limit, answer).await.map_err(|_| Error::Deadline {
                what: format!("{}'s answer to {name}", inner.kind),
                limit: inner.limit,
            })??;
        answer.map_err(|refusal| Error::Refused {
            vmm: inner.kind,
            command: name.into(),
            reason: clean(refusal.desc.as_bytes(), REASON),
        })
    }

    async fn write(&self, mut bytes: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let socket = &self.0.socket;
        while !bytes.is_empty() {
            let n = socket
                .async_io(Interest::WRITABLE, || {
                    let raw = fd.map(|fd| [fd.as_raw_fd()]);
                    let rights = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
                    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                    let data = [IoSlice::new(bytes)];
                    Ok(sendmsg::<()>(socket.as_raw_fd(), &data, rights.as_slice(), flags, None)?)
                })
                .await?;
            // It went with the first byte.
            fd = None;
            bytes = bytes.get(n..).unwrap_or_default();
        }
        Ok(())
    }

    fn protocol(&self, error: &serde_json::Error) -> Error {
        Error::Protocol { vmm: self.0.kind, reason: clean(error.to_string().as_bytes(), REASON) }
    }
}

struct Close<'a> {
    shared: &'a Mutex<Shared>,
    id: u64,
}

impl Drop for Close<'_> {
    fn drop(&mut self) {
        lock(self.shared).open.remove(&self.id);
    }
}

fn lost(kind: Kind, error: &io::Error) -> Error {
    if error.kind() == io::ErrorKind::InvalidData {
        return Error::Protocol { vmm: kind, reason: error.to_string() };
    }
    Error::Gone
}

fn route(kind: Kind, mut line: Value, shared: &Mutex<Shared>, events: &broadcast::Sender<Event>) {
    if line.get("event").is_some() {
        match Event::deserialize(&line) {
            // Nobody may be listening.
            Ok(event) => drop(events.send(event)),
            Err(error) => tracing::debug!(vmm = %kind, %error, "an event that is not known"),
        }
        return;
    }
    let waiting = {
        let mut shared = lock(shared);
        let id = match line.get("id").and_then(number) {
            Some(id) => {
                shared.order.retain(|one| *one != id);
                Some(id)
            }
            // Also one that nobody waits for any more: what comes next is the next one's.
            None => shared.order.pop_front(),
        };
        id.and_then(|id| shared.open.remove(&id))
    };
    let Some(waiting) = waiting else {
        tracing::debug!(vmm = %kind, "an answer that nobody waits for");
        return;
    };
    let answer = match line.get_mut("return") {
        Some(value) => Ok(value.take()),
        None => Err(line
            .get("error")
            .and_then(|error| Refusal::deserialize(error).ok())
            .unwrap_or(Refusal { desc: "no reason given".into() })),
    };
    let _ = waiting.send(answer);
}

fn number(id: &Value) -> Option<u64> {
    id.as_u64().or_else(|| id.as_str()?.parse().ok())
}

/// Lines of JSON, of bounded length.
struct Lines {
    socket: Arc<UnixStream>,
    buffer: Vec<u8>,
    /// There is no line end before here.
    scanned: usize,
}

impl Lines {
    async fn next(&mut self) -> io::Result<Value> {
        loop {
            let fresh = self.buffer.get(self.scanned..).unwrap_or_default();
            if let Some(at) = fresh.iter().position(|byte| *byte == b'\n') {
                let end = self.scanned + at + 1;
                let line = self.buffer.drain(..end).collect::<Vec<u8>>();
                self.scanned = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                if self.buffer.is_empty() {
                    // A long answer must not be held for good by an idle connection.
                    self.buffer.shrink_to(4096);
                }
                return serde_json::from_slice(&line)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()));
            }
            self.scanned = self.buffer.len();
            if self.scanned > MAX_LINE {
                let text = format!("a line of more than {MAX_LINE} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            self.socket.readable().await?;
            match self.socket.try_read_buf(&mut self.buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! The daemons' side: an async client of one sandbox-parent.
//!
//! Requests carry a sequence number and may be made by many tasks at once. Exits are remembered
//! by cookie until someone asks ([`Parent::exit_of`]); connections of containerd arrive on the
//! [`Connections`] queue.

mod launch;
mod transport;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::protocol::{MAX_MESSAGE, Reader, VERSION, Writer, ns, op, spawn, stage};

/// Why a request to sandbox-parent failed.
#[derive(Debug, thiserror::Error)]
pub enum ParentError {
    /// sandbox-parent refused or could not do it.
    #[error("sandbox-parent, {}: {}", stage::describe(*stage), io::Error::from_raw_os_error(*errno))]
    Failed {
        /// `errno`.
        errno: i32,
        /// Step that failed, see [`stage`].
        stage: u8,
    },
    /// The connection is gone: the process has ended or another daemon has taken over.
    #[error("sandbox-parent has gone, or another daemon of the same directory has taken it over")]
    Lost,
    /// It does not answer.
    #[error("sandbox-parent did not answer within {0:?}")]
    Timeout(Duration),
    /// It could not be started or reached.
    #[error("cannot {what}")]
    Start {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The request does not fit into a message.
    #[error("the request is larger than {MAX_MESSAGE} bytes: shorten arguments or environment")]
    TooLarge,
    /// The answer could not be read: another version?
    #[error("sandbox-parent answered something that this version does not understand")]
    Protocol,
}

impl ParentError {
    /// `errno` and stage, where sandbox-parent said so.
    pub fn failure(&self) -> Option<(i32, u8)> {
        match self {
            Self::Failed { errno, stage } => Some((*errno, *stage)),
            _ => None,
        }
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, ParentError>;

/// How to find or start a sandbox-parent.
#[derive(Debug, Clone)]
pub struct ParentOptions {
    /// State directory; `parent.sock` is in it.
    pub dir: PathBuf,
    /// The program.
    pub binary: PathBuf,
    /// How long a request may take.
    pub timeout: Duration,
    /// Most client connections that it relays at the same time.
    pub max_connections: u32,
    /// Most pods' sockets that it holds at the same time.
    pub pods: u32,
    /// Most descriptors that it keeps.
    pub kept: u32,
    /// Most processes whose exits it keeps.
    pub watched: u32,
    /// How long calls wait for a daemon while there is none, before they are refused. Counts for
    /// a sandbox-parent that is started; one that runs keeps what it was started with.
    pub hold: Duration,
}

impl ParentOptions {
    /// Options for `dir`, with the program beside the daemon's own, and the usual limits.
    pub fn new(dir: impl Into<PathBuf>, binary: impl Into<PathBuf>) -> Self {
        let timeout = Duration::from_secs(30);
        Self {
            dir: dir.into(),
            binary: binary.into(),
            timeout,
            max_connections: 16_384,
            pods: 4096,
            kept: 32_768,
            watched: 16_384,
            hold: Duration::from_secs(10),
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, 128 + signal, or 255 when it is not known.
    pub status: u32,
    /// The signal that ended it.
    pub signal: Option<u32>,
    /// When it was reaped.
    pub at: SystemTime,
}

/// A program to run. Descriptor `i` of the new process is `fds[i]`, or `/dev/null` for `None`.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// Program (absolute path) and arguments.
    pub argv: Vec<String>,
    /// Environment as `NAME=value`.
    pub env: Vec<String>,
    /// Standard streams and further descriptors.
    pub fds: Vec<Option<BorrowedFd<'a>>>,
    /// Name under which its exit is kept.
    pub cookie: u64,
}

/// What else a new program needs; the default is nothing of it.
#[derive(Debug, Default)]
pub struct SpawnOptions<'a> {
    /// Working directory; `/` otherwise.
    pub cwd: Option<&'a str>,
    /// File mode creation mask; 022 otherwise.
    pub umask: Option<u16>,
    /// Stay in the session of sandbox-parent instead of starting a new one.
    pub same_session: bool,
    /// `cgroup.procs` files, open for writing, of the cgroups to enter before the program runs.
    pub cgroups: Vec<BorrowedFd<'a>>,
    /// Resource limits: `RLIMIT_*`, soft, hard.
    pub rlimits: Vec<(u8, u64, u64)>,
}

/// A running program.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid.
    pub pid: u32,
    /// Refers to it even when the pid is reused.
    pub pidfd: OwnedFd,
    /// Exits that it causes have this number or a later one; for [`Parent::watch`].
    pub since: u64,
}

/// Which namespaces a pod needs.
#[derive(Debug, Default)]
pub struct PodNamespaces<'a> {
    /// Pod id, for the title of its init.
    pub id: &'a str,
    /// Make an IPC namespace.
    pub ipc: bool,
    /// Make a UTS namespace, with this hostname.
    pub uts: Option<&'a str>,
    /// Make a shared PID namespace with a reaping init.
    pub pid: bool,
    /// The pod's network namespace.
    pub netns: Option<BorrowedFd<'a>>,
    /// Sysctls to write in them, in order.
    pub sysctls: Vec<(&'a str, &'a str)>,
}

/// The namespaces of a pod.
#[derive(Debug, Default)]
pub struct PodNamespaceFds {
    /// IPC.
    pub ipc: Option<OwnedFd>,
    /// UTS.
    pub uts: Option<OwnedFd>,
    /// The user namespace that owns the network namespace, when it is not ours.
    pub user: Option<OwnedFd>,
    /// Pid and pidfd of the init of a shared PID namespace.
    pub init: Option<(u32, OwnedFd)>,
    /// Whether they are kept already: `<id>/ns/ipc`, `uts`, `user`, `pid`, `init`, as far as there.
    pub kept: bool,
}

/// A connection of containerd to a pod's socket.
#[derive(Debug)]
pub struct Connection {
    /// The pod whose socket was dialled.
    pub pod: String,
    /// Our end; speaks ttrpc.
    pub stream: UnixStream,
    /// Calls on it were begun with an earlier daemon and come again.
    pub replay: bool,
}

/// Connections as they come; ends when sandbox-parent is gone.
pub type Connections = mpsc::Receiver<Connection>;

/// Counters of a sandbox-parent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Kept descriptors.
    pub kept: u32,
    /// Watched processes and exits not yet acknowledged.
    pub watched: u32,
    /// Pods with a socket.
    pub pods: u32,
    /// Client connections.
    pub connections: u32,
    /// Calls that wait for a daemon.
    pub parked: u32,
    /// Connections and messages that were refused.
    pub refused: u64,
}

type Answer = (Vec<u8>, Vec<OwnedFd>);

#[derive(Default)]
struct Shared {
    open: HashMap<u32, oneshot::Sender<Answer>>,
    exits: HashMap<u64, Exit>,
    waiting: HashMap<u64, Vec<oneshot::Sender<Exit>>>,
    lost: bool,
}

struct Inner {
    socket: AsyncFd<OwnedFd>,
    shared: Mutex<Shared>,
    next: AtomicU32,
    /// Bounds the requests in flight, so that the parent's replies always find room.
    slots: Semaphore,
    timeout: Duration,
    pid: u32,
}

/// A sandbox-parent. Cheap to clone.
#[derive(Clone)]
pub struct Parent(Arc<Inner>);

impl std::fmt::Debug for Parent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Parent({})", self.0.pid)
    }
}

fn lock(m: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Parent {
    /// Connects to the running sandbox-parent of `options.dir`, or starts one. The flag says
    /// whether it was started now (and so knows nothing of earlier pods).
    pub async fn connect_or_spawn(options: &ParentOptions) -> Result<(Self, Connections, bool)> {
        Self::connect_or_spawn_in(options, &[]).await
    }

    /// The same; a new one moves to these cgroups (directories), so that a service manager that
    /// ends the daemon's cgroup does not end it, too.
    pub async fn connect_or_spawn_in(
        options: &ParentOptions,
        cgroups: &[PathBuf],
    ) -> Result<(Self, Connections, bool)> {
        launch::connect_or_spawn(options, cgroups).await
    }

    /// Connects to a running sandbox-parent only.
    pub async fn connect(dir: &Path, timeout: Duration) -> Result<(Self, Connections)> {
        launch::over(&dir.join("parent.sock"), timeout).await
    }

    pub(crate) async fn over(socket: OwnedFd, timeout: Duration) -> Result<(Self, Connections)> {
        let wrap = |source| ParentError::Start { what: "use the control socket".into(), source };
        // SAFETY: an OwnedFd always answers the same descriptor and closes it only when dropped.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(|e| wrap(e.into()))?;
        let mut inner = Inner {
            socket,
            shared: Mutex::default(),
            next: AtomicU32::new(1),
            slots: Semaphore::new(64),
            timeout,
            pid: 0,
        };
        // HELLO is answered before anything else is asked, so read it here.
        let mut w = Writer::new(op::HELLO, 0);
        w.u32(VERSION);
        inner.send(w.finish().unwrap_or_default(), &[]).await?;
        let hello = tokio::time::timeout(timeout, async {
            loop {
                let (data, _) = inner.receive().await?;
                let mut m = Reader(&data);
                if m.u8() == Some(op::REPLY) {
                    return Ok(data);
                }
                // Exits come again: they are told until they are acknowledged.
                lock(&inner.shared).event(&data, Vec::new());
            }
        });
        let data = hello.await.map_err(|_| ParentError::Timeout(timeout))??;
        let mut m = Reader(data.get(10..).ok_or(ParentError::Protocol)?);
        let (Some(_version), Some(pid)) = (m.u32(), m.u32()) else {
            return Err(ParentError::Protocol);
        };
        inner.pid = pid;
        let parent = Self(Arc::new(inner));
        // As many as a sandbox-parent has: the reader of replies must not wait for whoever takes
        // connections, who may be waiting for a reply.
        let (tx, rx) = mpsc::channel(60_000);
        let inner = parent.0.clone();
        tokio::spawn(async move {
            while let Ok((data, fds)) = inner.receive().await {
                let connection = lock(&inner.shared).event(&data, fds);
                if let Some(c) = connection {
                    // If nobody takes connections this one is closed.
                    let _ = tx.try_send(c);
                }
            }
            let mut shared = lock(&inner.shared);
            shared.lost = true;
            shared.open.clear();
            shared.waiting.clear();
        });
        Ok((parent, rx))
    }

    async fn call(&self, seq: u32, w: &Writer, fds: &[RawFd]) -> Result<Answer> {
        let data = w.finish().ok_or(ParentError::TooLarge)?;
        // sandbox-parent knows nothing of traces: what it is asked is seen from here.
        let span = data
            .first()
            .filter(|_| kuasar_trace::enabled())
            .and_then(|code| kuasar_trace::child(op::title(*code), kuasar_trace::Kind::Client));
        let answer = self.exchange(seq, data, fds).await;
        if let (Some(span), Err(error)) = (&span, &answer) {
            span.scope().failed(&error.to_string());
        }
        answer
    }

    async fn exchange(&self, seq: u32, data: &[u8], fds: &[RawFd]) -> Result<Answer> {
        let inner = &self.0;
        let _slot = inner.slots.acquire().await.map_err(|_| ParentError::Lost)?;
        let (tx, rx) = oneshot::channel();
        {
            let mut shared = lock(&inner.shared);
            if shared.lost {
                return Err(ParentError::Lost);
            }
            shared.open.insert(seq, tx);
        }
        let answer = async {
            inner.send(data, fds).await?;
            rx.await.map_err(|_| ParentError::Lost)
        };
        let (data, fds) = match tokio::time::timeout(inner.timeout, answer).await {
            Ok(answer) => answer?,
            Err(_) => {
                lock(&inner.shared).open.remove(&seq);
                return Err(ParentError::Timeout(inner.timeout));
            }
        };
        let mut m = Reader(&data);
        match (m.u8(), m.u32(), m.u32(), m.u8()) {
            (_, _, Some(0), Some(_)) => Ok((m.0.to_vec(), fds)),
            (_, _, Some(errno), Some(stage)) => {
                Err(ParentError::Failed { errno: errno as i32, stage })
            }
            _ => Err(ParentError::Protocol),
        }
    }

    fn request(&self, code: u8) -> (u32, Writer) {
        let seq = self.0.next.fetch_add(1, Ordering::Relaxed);
        (seq, Writer::new(code, seq))
    }

    async fn simple(&self, code: u8, name: &str, fd: Option<RawFd>) -> Result<Answer> {
        let (seq, mut w) = self.request(code);
        w.bytes(name.as_bytes());
        self.call(seq, &w, fd.as_slice()).await
    }

    /// Pid of the process.
    pub fn pid(&self) -> u32 {
        self.0.pid
    }

    /// A random name for a process, to be journalled with it.
    pub fn new_cookie() -> u64 {
        let mut bytes = [0u8; 8];
        // SAFETY: pointer and length describe `bytes`.
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        u64::from_ne_bytes(bytes) | 1
    }

    /// Runs a program. Its exit is kept under `command.cookie` until it is acknowledged.
    pub async fn spawn(&self, command: Spawn<'_>) -> Result<Spawned> {
        self.spawn_with(command, &SpawnOptions::default()).await
    }

    /// Runs a program, with more to say about it.
    pub async fn spawn_with(
        &self,
        command: Spawn<'_>,
        options: &SpawnOptions<'_>,
    ) -> Result<Spawned> {
        let (seq, mut w) = self.request(op::SPAWN);
        w.u64(command.cookie);
        for list in [&command.argv, &command.env] {
            w.u16(u16::try_from(list.len()).map_err(|_| ParentError::TooLarge)?);
            for s in list {
                w.bytes(s.as_bytes());
            }
        }
        w.u8(u8::try_from(command.fds.len()).map_err(|_| ParentError::TooLarge)?);
        let mut fds = Vec::new();
        for fd in &command.fds {
            match fd {
                Some(fd) => {
                    w.u8(fds.len() as u8);
                    fds.push(fd.as_raw_fd());
                }
                None => {
                    w.u8(255);
                }
            }
        }
        let umask = options.umask.unwrap_or(spawn::NO_UMASK);
        w.u8(if options.same_session { spawn::SAME_SESSION } else { 0 });
        w.u16(umask).bytes(options.cwd.unwrap_or_default().as_bytes());
        w.u8(u8::try_from(options.cgroups.len()).map_err(|_| ParentError::TooLarge)?);
        for cgroup in &options.cgroups {
            w.u8(fds.len() as u8);
            fds.push(cgroup.as_raw_fd());
        }
        w.u8(u8::try_from(options.rlimits.len()).map_err(|_| ParentError::TooLarge)?);
        for (resource, soft, hard) in &options.rlimits {
            w.u8(*resource).u64(*soft).u64(*hard);
        }
        let (data, mut fds) = self.call(seq, &w, &fds).await?;
        let mut m = Reader(&data);
        match (m.u32(), m.u64(), fds.pop()) {
            (Some(pid), Some(since), Some(pidfd)) => Ok(Spawned { pid, pidfd, since }),
            _ => Err(ParentError::Protocol),
        }
    }

    /// Makes a pod's namespaces, and has them kept as `<id>/ns/…` where the parent can do that in
    /// one go ([`PodNamespaceFds::kept`]).
    pub async fn pod_namespaces(&self, q: &PodNamespaces<'_>) -> Result<PodNamespaceFds> {
        let (seq, mut w) = self.request(op::NAMESPACES);
        let bit = |on: bool, flag: u8| if on { flag } else { 0 };
        let flags = ns::KEEP
            | bit(q.ipc, ns::IPC)
            | bit(q.uts.is_some(), ns::UTS)
            | bit(q.pid, ns::PID)
            | bit(q.netns.is_some(), ns::NETNS);
        w.u8(flags).bytes(q.id.as_bytes()).bytes(q.uts.unwrap_or_default().as_bytes());
        w.u16(u16::try_from(q.sysctls.len()).map_err(|_| ParentError::TooLarge)?);
        for (k, v) in &q.sysctls {
            w.bytes(k.as_bytes()).bytes(v.as_bytes());
        }
        let fds = q.netns.map(|fd| fd.as_raw_fd());
        let (data, mut fds) = self.call(seq, &w, fds.as_slice()).await?;
        let mut m = Reader(&data);
        let init = m.u32().ok_or(ParentError::Protocol)?;
        m.u64();
        let mut made = PodNamespaceFds { kept: m.u8() == Some(1), ..PodNamespaceFds::default() };
        if init > 0 {
            made.init = Some((init, fds.pop().ok_or(ParentError::Protocol)?));
        }
        let mut fds = fds.into_iter();
        if q.ipc {
            made.ipc = fds.next();
        }
        if q.uts.is_some() {
            made.uts = fds.next();
        }
        made.user = fds.next();
        Ok(made)
    }

    /// Watches a process that a spawned program has left behind.
    pub async fn watch(&self, pid: u32, since: u64, cookie: u64) -> Result<()> {
        let (seq, mut w) = self.request(op::WATCH);
        w.u64(cookie).u32(pid).u64(since);
        self.call(seq, &w, &[]).await.map(drop)
    }

    /// Waits for an exit; at once if it has come already.
    pub async fn exit_of(&self, cookie: u64) -> Result<Exit> {
        let rx = {
            let mut shared = lock(&self.0.shared);
            if let Some(exit) = shared.exits.get(&cookie) {
                return Ok(*exit);
            }
            if shared.lost {
                return Err(ParentError::Lost);
            }
            let (tx, rx) = oneshot::channel();
            shared.waiting.entry(cookie).or_default().push(tx);
            rx
        };
        rx.await.map_err(|_| ParentError::Lost)
    }

    /// The exit is recorded elsewhere now, or of no interest: sandbox-parent and we may forget it.
    pub async fn acknowledge(&self, cookie: u64) {
        {
            let mut shared = lock(&self.0.shared);
            shared.exits.remove(&cookie);
            shared.waiting.remove(&cookie);
        }
        let (_, mut w) = self.request(op::ACK);
        w.u64(cookie);
        // If it is lost there is nothing to forget.
        let _ = self.0.send(w.finish().unwrap_or_default(), &[]).await;
    }

    /// Cookies of all watched processes and unacknowledged exits.
    pub async fn watched(&self) -> Result<Vec<u64>> {
        let (mut cookies, mut from) = (Vec::new(), 0);
        loop {
            let (seq, mut w) = self.request(op::LIST_WATCHED);
            w.u32(from);
            let (data, _) = self.call(seq, &w, &[]).await?;
            let mut m = Reader(&data);
            for _ in 0..m.u16().ok_or(ParentError::Protocol)? {
                cookies.push(m.u64().ok_or(ParentError::Protocol)?);
            }
            from = m.u32().unwrap_or_default();
            if from == 0 {
                return Ok(cookies);
            }
        }
    }

    /// Keeps a duplicate of `fd` under `name`, replacing an older one.
    pub async fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        self.simple(op::KEEP, name, Some(fd.as_raw_fd())).await.map(drop)
    }

    /// A duplicate of the descriptor kept under `name`.
    pub async fn fetch(&self, name: &str) -> Result<Option<OwnedFd>> {
        match self.simple(op::FETCH, name, None).await {
            Ok((_, mut fds)) => Ok(fds.pop()),
            Err(ParentError::Failed { errno: libc::ENOENT, .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Forgets every name that starts with `prefix`.
    pub async fn forget(&self, prefix: &str) -> Result<()> {
        self.simple(op::FORGET, prefix, None).await.map(drop)
    }

    /// All names that are kept.
    pub async fn kept(&self) -> Result<Vec<String>> {
        self.names(op::LIST_KEPT).await
    }

    /// All pods that have a socket, or connections left.
    pub async fn pods(&self) -> Result<Vec<String>> {
        self.names(op::LIST_PODS).await
    }

    async fn names(&self, code: u8) -> Result<Vec<String>> {
        let (mut names, mut from) = (Vec::new(), 0);
        loop {
            let (seq, mut w) = self.request(code);
            w.u32(from);
            let (data, _) = self.call(seq, &w, &[]).await?;
            let mut m = Reader(&data);
            let (next, n) = (m.u32().ok_or(ParentError::Protocol)?, m.u16().unwrap_or(0));
            for _ in 0..n {
                names.push(m.str().ok_or(ParentError::Protocol)?.to_owned());
            }
            if next == 0 {
                return Ok(names);
            }
            from = next;
        }
    }

    /// Gives a pod's listening socket to sandbox-parent.
    pub async fn listen(&self, pod: &str, listener: BorrowedFd<'_>) -> Result<()> {
        self.simple(op::LISTEN, pod, Some(listener.as_raw_fd())).await.map(drop)
    }

    /// Stops listening for a pod; its connections go on until they end by themselves.
    pub async fn drain(&self, pod: &str) -> Result<()> {
        let (seq, mut w) = self.request(op::UNLISTEN);
        w.bytes(pod.as_bytes()).u8(1);
        self.call(seq, &w, &[]).await.map(drop)
    }

    /// Closes a pod's socket and its connections.
    pub async fn unlisten(&self, pod: &str) -> Result<()> {
        self.simple(op::UNLISTEN, pod, None).await.map(drop)
    }

    /// From now on connections are passed on, parked ones first.
    pub async fn ready(&self) -> Result<()> {
        let (seq, w) = self.request(op::READY);
        self.call(seq, &w, &[]).await.map(drop)
    }

    /// Counters.
    pub async fn status(&self) -> Result<Counts> {
        let (seq, w) = self.request(op::STATUS);
        let (data, _) = self.call(seq, &w, &[]).await?;
        let mut m = Reader(&data);
        let mut next = || m.u32().unwrap_or_default();
        let (kept, watched, pods, connections, parked) = (next(), next(), next(), next(), next());
        Ok(Counts {
            kept,
            watched,
            pods,
            connections,
            parked,
            refused: m.u64().unwrap_or_default(),
        })
    }

    /// Ends the process; without `force` only when nothing depends on it.
    pub async fn shutdown(&self, force: bool) -> Result<()> {
        let (seq, mut w) = self.request(op::SHUTDOWN);
        w.u8(u8::from(force));
        self.call(seq, &w, &[]).await.map(drop)
    }
}

impl Shared {
    /// Books a reply or an event; answers a connection to pass on.
    fn event(&mut self, data: &[u8], mut fds: Vec<OwnedFd>) -> Option<Connection> {
        let mut m = Reader(data);
        let (code, seq) = (m.u8()?, m.u32()?);
        match code {
            op::REPLY => {
                if let Some(tx) = self.open.remove(&seq) {
                    // The caller may have given up; then the descriptors are closed here.
                    let _ = tx.send((data.to_vec(), fds));
                }
                None
            }
            op::EXIT => {
                let (cookie, _pid, status, at) = (m.u64()?, m.u32()?, m.u32()? as i32, m.u64()?);
                let (status, signal) = match status {
                    -1 => (255, None),
                    s if libc::WIFSIGNALED(s) => {
                        let signal = libc::WTERMSIG(s) as u32;
                        (128 + signal, Some(signal))
                    }
                    s => (libc::WEXITSTATUS(s) as u32, None),
                };
                let exit =
                    Exit { status, signal, at: SystemTime::UNIX_EPOCH + Duration::from_nanos(at) };
                self.exits.insert(cookie, exit);
                for tx in self.waiting.remove(&cookie).unwrap_or_default() {
                    let _ = tx.send(exit);
                }
                None
            }
            op::CONNECTION => {
                let (replay, pod) = (m.u8()? != 0, m.str()?.to_owned());
                let stream = UnixStream::from(fds.pop()?);
                Some(Connection { pod, stream, replay })
            }
            _ => None,
        }
    }
}

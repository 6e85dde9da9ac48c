//! The warm worker: a process that containers are forked from, and how it is asked for one.
//!
//! sandbox-parent starts it, and it is as dispensable as an engine that runs for a moment: when it
//! or this daemon ends, containers know nothing of it (their parent is sandbox-parent), and the
//! next container gets a new one.
//!
//! [`Workers`] stands between the runtime and sandbox-parent: a command whose program is
//! [`warm`] is a fork of an engine's worker, everything else is sandbox-parent's. So containers of WebAssembly and
//! native ones are made, followed and reaped by the same code.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use kuasar_host::live::Live;
use kuasar_host::process;
use kuasar_oci::packets;
use kuasar_oci::place::{self, Place, Way};
use kuasar_oci::processes::{Command, Exit, Failure, Processes, Spawned, new_cookie};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use sandbox_parent::client::{Parent, Spawn};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use wasm_common::wire::{self, Entry, Hello, PROTOCOL, Request};

use crate::config::Config;

/// Programs that stand for a fork of an engine's warm worker begin so; its name follows.
const WARM: &str = "(warm) ";

/// The program that stands for a fork of the warm worker of `engine`.
pub fn warm(engine: &str) -> String {
    format!("{WARM}{engine}")
}

/// A worker that runs.
struct Running {
    socket: AsyncFd<OwnedFd>,
    ended: Arc<AtomicBool>,
    hello: Arc<Hello>,
}

/// Starts workers of one engine, one at a time.
pub struct Worker {
    parent: Parent,
    engine: &'static str,
    /// By which path sandbox-parent can execute it, or why there is none.
    program: Result<String, String>,
    config: Live<Config>,
    running: tokio::sync::Mutex<Option<Arc<Running>>>,
    /// What the latest one has said of itself.
    known: Mutex<Option<Arc<Hello>>>,
}

impl Worker {
    /// Runs `program`, a path by which sandbox-parent can execute it, or the reason why there is
    /// none.
    pub fn new(
        parent: Parent,
        engine: &'static str,
        program: Result<String, String>,
        config: Live<Config>,
    ) -> Self {
        Self {
            parent,
            engine,
            program,
            config,
            running: tokio::sync::Mutex::default(),
            known: Mutex::default(),
        }
    }

    /// What the worker says of itself; starts it if there is none. The next one may be of another version:
    /// it loads a library that has been installed anew meanwhile.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn hello(&self) -> Result<Arc<Hello>, Failure> {
        Ok(self.running().await?.hello.clone())
    }

    /// The same, of the latest that has been started.
    pub fn known(&self) -> Option<Arc<Hello>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn running(&self) -> Result<Arc<Running>, Failure> {
        let mut slot = self.running.lock().await;
        if let Some(running) = slot.as_ref().filter(|r| !r.ended.load(Ordering::Acquire)) {
            return Ok(running.clone());
        }
        let running = Arc::new(self.start().await?);
        *slot = Some(running.clone());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some(running.hello.clone());
        Ok(running)
    }

    async fn start(&self) -> Result<Running, Failure> {
        let config = self.config.get();
        let limit = config.worker_timeout;
        let mut argv = vec![self.program.clone()?, "zygote".into()];
        argv.extend(config.worker_words(self.engine));
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        let cookie = new_cookie();
        let stderr = std::io::stderr();
        let command = Spawn {
            argv,
            env: vec![format!("{}={}", wire::SPARE_AFTER, config.spare_after.as_millis())],
            fds: vec![None, None, Some(stderr.as_fd()), Some(theirs.as_fd())],
            cookie,
        };
        let spawned = self.parent.spawn(command).await?;
        drop(theirs);
        let ended = Arc::new(AtomicBool::new(false));
        let (parent, mark) = (self.parent.clone(), ended.clone());
        tokio::spawn(async move {
            let exit = parent.exit_of(cookie).await;
            mark.store(true, Ordering::Release);
            if let Ok(exit) = exit {
                tracing::warn!(status = exit.status, "the warm worker has ended");
            }
            parent.acknowledge(cookie).await;
        });
        // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
        let socket = unsafe { AsyncFd::register(ours) }?;
        let hello = packets::receive::<wire::Greeting>(&socket, wire::MAX);
        let hello = tokio::time::timeout(limit, hello).await;
        match hello {
            Ok(Ok((Ok(hello), _))) if hello.protocol == PROTOCOL => {
                Ok(Running { socket, ended, hello: Arc::new(hello) })
            }
            Ok(Ok((Ok(_), _))) => {
                Err("the worker is of another version of Kuasar than this program: \
                                  install both of one version"
                    .into())
            }
            Ok(Ok((Err(reason), _))) => Err(reason.into()),
            Ok(Err(error)) => Err(format!("the worker has ended at once: {error}").into()),
            Err(_) => {
                let _ = process::pidfd_signal(spawned.pidfd.as_fd(), libc::SIGKILL);
                Err(format!("the worker is not warm within {limit:?}").into())
            }
        }
    }

    /// Sends a request; a worker that has ended meanwhile is replaced once.
    async fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Failure> {
        for last in [false, true] {
            let running = self.running().await?;
            match packets::send(&running.socket, request, fds).await {
                Err(wire::Error::Closed) if !last => {}
                sent => return Ok(sent?),
            }
            running.ended.store(true, Ordering::Release);
        }
        Err("the worker ends again and again".into())
    }
}

type Ending = tokio::sync::watch::Receiver<Option<std::result::Result<Exit, String>>>;

/// sandbox-parent, and the workers beside it.
pub struct Workers {
    parent: Parent,
    workers: Vec<Worker>,
    /// Forks of the worker that make a container, by cookie.
    makers: Mutex<HashMap<u64, Ending>>,
}

impl Workers {
    /// Both.
    pub fn new(parent: Parent, workers: Vec<Worker>) -> Self {
        Self { parent, workers, makers: Mutex::default() }
    }

    /// The worker of an engine.
    ///
    /// # Errors
    /// When there is no such engine.
    pub fn worker(&self, engine: &str) -> Result<&Worker, Failure> {
        let found = self.workers.iter().find(|worker| worker.engine == engine);
        found.ok_or_else(|| format!("there is no engine {engine:?}").into())
    }

    fn makers(&self) -> MutexGuard<'_, HashMap<u64, Ending>> {
        self.makers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fork(&self, worker: &Worker, command: Command<'_>) -> Result<Spawned, Failure> {
        let Command { argv, fds, cookie, mut place, .. } = command;
        let watched = place.as_ref().map(|place| place.cookie);
        let (pid, reader) = match ask(worker, argv, &fds, place.as_mut()).await {
            Ok(asked) => asked,
            Err(error) => {
                // What was made is removed with the container, whatever came of it.
                let _ = place::made(place).await;
                return Err(error);
            }
        };
        let pidfd = process::pidfd_open(pid);
        let own = pidfd.as_ref().ok().and_then(|fd| fd.as_fd().try_clone_to_owned().ok());
        let (tell, ending) = tokio::sync::watch::channel(None);
        self.makers().insert(cookie, ending);
        let parent = self.parent.clone();
        tokio::spawn(async move {
            let (status, grouped, followed) = tokio::join!(
                status(reader, own),
                place::made(place),
                // It is asked for before the process can have ended well, and nobody has to wait for it.
                async {
                    match watched {
                        Some(cookie) => parent.watch(pid, u64::MAX, cookie).await,
                        None => Ok(()),
                    }
                }
            );
            let ended = match (grouped, followed) {
                (Ok(()), Err(error)) if status == 0 => Err(format!("watch the process: {error}")),
                (grouped, _) => grouped.map(|()| Exit { status, at: SystemTime::now() }),
            };
            if let Some(cookie) = watched.filter(|_| !matches!(ended, Ok(Exit { status: 0, .. }))) {
                // It is no container's.
                parent.acknowledge(cookie).await;
            }
            let _ = tell.send(Some(ended));
        });
        // One that has ended has no pidfd: what it has said is in the pipe.
        let pidfd = match pidfd {
            Ok(pidfd) => pidfd,
            Err(_) => std::fs::File::open("/dev/null")?.into(),
        };
        // The exit of what it leaves behind is only looked for among processes that live: a
        // container's waits for Start.
        Ok(Spawned { pid, pidfd, since: u64::MAX, watched })
    }
}

/// Asks a worker for a process with these arguments, of which the program and the word `oci` are left
/// out, and these descriptors; answers its pid, and where it says how it has ended.
async fn ask(
    worker: &Worker,
    argv: Vec<String>,
    given: &[Option<BorrowedFd<'_>>],
    place: Option<&mut Place>,
) -> Result<(u32, pipe::Receiver), Failure> {
    let (reader, writer) = std::io::pipe()?;
    let (entry, way) = match place {
        Some(place) => {
            let namespaces = place.namespaces.bits();
            let (grouped, way) = match place.way().await? {
                Way::Into(directory) => (true, directory),
                Way::Told(pipe) => (false, pipe),
            };
            (Some(Entry { namespaces, grouped }), Some(way))
        }
        None => (None, None),
    };
    let request = Request {
        argv: argv.into_iter().skip(2).collect(),
        given: given.iter().map(Option::is_some).collect(),
        entry,
    };
    let mut fds: Vec<BorrowedFd<'_>> = given.iter().flatten().copied().collect();
    fds.extend(way.as_ref().map(AsFd::as_fd));
    fds.push(writer.as_fd());
    worker.ask(&request, &fds).await?;
    drop(fds);
    drop((writer, way));
    let mut reader = pipe::Receiver::from_owned_fd(reader.into())?;
    let mut pid = [0; 4];
    let limit = worker.config.get().worker_timeout;
    tokio::time::timeout(limit, reader.read_exact(&mut pid))
        .await
        .map_err(|_| format!("the worker has made no process within {limit:?}"))?
        .map_err(|error| format!("the worker could not make a process: {error}"))?;
    Ok((u32::from_le_bytes(pid), reader))
}

/// How a maker has ended: what it says, or 255 when it was killed.
async fn status(mut reader: pipe::Receiver, pidfd: Option<OwnedFd>) -> u32 {
    let mut byte = [0];
    // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
    let ended = pidfd.and_then(|fd| unsafe { AsyncFd::register(fd) }.ok());
    let ended = async {
        match &ended {
            Some(ended) => drop(ended.readable().await),
            None => std::future::pending().await,
        }
    };
    let said = tokio::select! {
        biased;
        said = reader.read_exact(&mut byte) => said.is_ok(),
        () = ended => reader.try_read(&mut byte).is_ok_and(|length| length == 1),
    };
    if said { u32::from(u8::from_ne_bytes(byte)) } else { 255 }
}

#[async_trait]
impl Processes for Workers {
    async fn spawn(&self, command: Command<'_>) -> Result<Spawned, Failure> {
        let engine = command.argv.first().and_then(|program| program.strip_prefix(WARM));
        if let Some(worker) = engine.map(|engine| self.worker(engine)).transpose()? {
            return self.fork(worker, command).await;
        }
        Processes::spawn(&self.parent, command).await
    }

    async fn watch(&self, pid: u32, since: u64, cookie: u64) -> Result<(), Failure> {
        Processes::watch(&self.parent, pid, since, cookie).await
    }

    async fn exit_of(&self, cookie: u64) -> Result<Exit, Failure> {
        let maker = self.makers().get(&cookie).cloned();
        let Some(mut maker) = maker else {
            return Processes::exit_of(&self.parent, cookie).await;
        };
        let exit = maker.wait_for(Option::is_some).await?.clone();
        Ok(exit.ok_or("it is not known how it has ended")??)
    }

    async fn acknowledge(&self, cookie: u64) {
        if self.makers().remove(&cookie).is_none() {
            Processes::acknowledge(&self.parent, cookie).await;
        }
    }

    async fn watched(&self) -> Result<Vec<u64>, Failure> {
        Processes::watched(&self.parent).await
    }
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Running({})", self.socket.get_ref().as_raw_fd())
    }
}

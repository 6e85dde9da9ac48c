//! Execs without a program for each: who asks the built-in engine in a process that stays
//! ([`crate::builtin::serve`]), and starts it.
//!
//! It is started with the first exec, and is as dispensable as an engine that runs for a moment. What
//! it makes is a child of who reaps, as it is itself; when it ends, the next exec gets a new one.
//! An exec's process waits until it is watched: however short it lives, its exit is known.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kuasar_host::packet;
use kuasar_host::process::{pidfd_open, pidfd_signal};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::time::Instant;

use crate::builtin::serve::{ANSWER, Answer, Request};
use crate::command::{Unfinished, one_line};
use crate::engine::{Execs, Left};
use crate::packets;
use crate::processes::{Command, Failure, Processes, new_cookie};

/// Most bytes of why a process could not become its program.
const REASON: u64 = 2000;

/// Asks a process for execs, and starts it.
pub struct ExecServer {
    processes: Arc<dyn Processes>,
    /// Program and first words of the process.
    program: Vec<String>,
    /// First words of each request.
    words: Vec<String>,
    /// Held from a request to its answer.
    running: tokio::sync::Mutex<Option<Running>>,
}

struct Running {
    socket: AsyncFd<OwnedFd>,
    pidfd: OwnedFd,
    ended: Arc<AtomicBool>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It ends by its socket otherwise, unless it hangs.
        let _ = pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
    }
}

fn wait(error: impl Into<Failure>) -> Unfinished {
    Unfinished::Wait(error.into())
}

impl ExecServer {
    /// Runs `program`, a path and arguments with which [`crate::builtin::serve::main`] is called, and
    /// whose children are reaped by `processes`; `words` are the engine's first of each request.
    pub fn new(processes: Arc<dyn Processes>, program: Vec<String>, words: Vec<String>) -> Self {
        Self { processes, program, words, running: tokio::sync::Mutex::default() }
    }

    async fn start(&self) -> Result<Running, Failure> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let cookie = new_cookie();
        let stderr = std::io::stderr();
        let command = Command {
            argv: self.program.clone(),
            env: vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".into()],
            fds: vec![None, None, Some(stderr.as_fd()), Some(theirs.as_fd())],
            cookie,
            place: None,
        };
        let spawned = self.processes.spawn(command).await?;
        let ended = Arc::new(AtomicBool::new(false));
        let (processes, mark) = (self.processes.clone(), ended.clone());
        tokio::spawn(async move {
            let _ = processes.exit_of(cookie).await;
            mark.store(true, Ordering::Release);
            processes.acknowledge(cookie).await;
        });
        // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
        let socket = unsafe { AsyncFd::register(ours) }?;
        Ok(Running { socket, pidfd: spawned.pidfd, ended })
    }

    async fn answer(
        running: &Running,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>), packet::Error> {
        packets::send(&running.socket, request, fds).await?;
        packets::receive(&running.socket, ANSWER).await
    }

    /// One that has ended without having read the request is replaced once.
    async fn ask(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(i32, OwnedFd), Unfinished> {
        let mut slot = self.running.lock().await;
        // Taken: where this ends before there is an answer, that must not be the next one's.
        let old = slot.take().filter(|running| !running.ended.load(Ordering::Acquire));
        let answered = match old {
            Some(running) => match Self::answer(&running, request, fds).await {
                Err(packet::Error::Closed | packet::Error::Unread) => None,
                answer => Some((answer, running)),
            },
            None => None,
        };
        let (answer, running) = match answered {
            Some(answered) => answered,
            None => {
                let running = self.start().await.map_err(Unfinished::Spawn)?;
                (Self::answer(&running, request, fds).await, running)
            }
        };
        let (answer, pipes) = answer.map_err(wait)?;
        *slot = Some(running);
        let pid = answer.map_err(|reason| Unfinished::Failed(one_line(&reason)))?;
        let pipe = pipes.into_iter().next().ok_or_else(|| wait("a pid without its pipe"))?;
        Ok((pid, pipe))
    }
}

/// Waits until the process has become its program, or says why it could not.
async fn became(pipe: OwnedFd) -> Result<(), Unfinished> {
    let mut said = Vec::new();
    let pipe = pipe::Receiver::from_owned_fd(pipe).map_err(wait)?;
    pipe.take(REASON).read_to_end(&mut said).await.map_err(wait)?;
    if said.is_empty() {
        return Ok(());
    }
    let reason = one_line(&String::from_utf8_lossy(&said));
    Err(Unfinished::Failed(format!("unable to start container process: {reason}")))
}

#[async_trait]
impl Execs for ExecServer {
    async fn exec(
        &self,
        words: Vec<String>,
        streams: [Option<BorrowedFd<'_>>; 3],
        limit: Duration,
    ) -> Result<Left, Unfinished> {
        let deadline = Instant::now() + limit;
        let late = |_| Unfinished::Late(limit);
        let mut argv = self.words.clone();
        argv.extend(words);
        let (go, tell) = std::io::pipe().map_err(wait)?;
        let request = Request { argv, given: streams.map(|stream| stream.is_some()) };
        let mut fds: Vec<_> = streams.into_iter().flatten().collect();
        fds.push(go.as_fd());
        let asked = tokio::time::timeout_at(deadline, self.ask(&request, &fds)).await;
        let (pid, pipe) = asked.map_err(late)??;
        let pid = u32::try_from(pid).map_err(wait)?;
        // It waits for us, unless it has ended: then it has said why.
        let pidfd = pidfd_open(pid);
        let cookie = new_cookie();
        // Among processes that live: an exit of the past is another's.
        let watched = self.processes.watch(pid, u64::MAX, cookie).await;
        if watched.is_ok() {
            // Nobody reads when it has ended.
            let _ = std::io::Write::write_all(&mut &tell, b"G");
        }
        drop((go, tell));
        let failed = match tokio::time::timeout_at(deadline, became(pipe)).await {
            Ok(Ok(())) if watched.is_ok() => {
                return Ok(Left { pid, since: u64::MAX, watched: Some(cookie) });
            }
            Ok(Ok(())) => Unfinished::Wait(watched.err().unwrap_or_else(|| "it is gone".into())),
            Ok(Err(error)) => error,
            Err(elapsed) => late(elapsed),
        };
        if let Ok(pidfd) = pidfd {
            let _ = pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        }
        self.processes.acknowledge(cookie).await;
        Err(failed)
    }
}

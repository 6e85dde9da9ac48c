//! Execs without a program for each: the built-in engine in a process that stays
//! ([`kuasar_oci::builtin::serve`]).
//!
//! It is started with the first exec: a guest whose containers have none has one process less. It
//! is as dispensable as an engine that runs for a moment. What it makes is a child of ours, as it is
//! itself; when it ends, the next exec gets a new one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kuasar_host::packet;
use kuasar_host::process::pidfd_signal;
use kuasar_oci::builtin::serve::{ANSWER, Answer, Request};
use kuasar_oci::command::{Unfinished, one_line};
use kuasar_oci::engine::{Execs, Left};
use kuasar_oci::packets;
use kuasar_oci::processes::{Command, Failure, Processes, new_cookie};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::time::Instant;

use crate::limits;
use crate::reaper::Reaper;

/// First argument of this program for the process.
pub const WORD: &str = "execs";

/// Asks a process for execs, and starts it.
pub struct ExecServer {
    reaper: Reaper,
    /// Program and first word of the process.
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
    /// Runs `program`, whose children `reaper` reaps; `words` are the engine's first of each request.
    pub fn new(reaper: Reaper, program: Vec<String>, words: Vec<String>) -> Self {
        Self { reaper, program, words, running: tokio::sync::Mutex::default() }
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
        let spawned = self.reaper.spawn(command).await?;
        let ended = Arc::new(AtomicBool::new(false));
        let (reaper, mark) = (self.reaper.clone(), ended.clone());
        tokio::spawn(async move {
            let _ = reaper.end_of(cookie).await;
            mark.store(true, Ordering::Release);
        });
        // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
        let socket = unsafe { AsyncFd::register(ours) }?;
        Ok(Running { socket, pidfd: spawned.pidfd, ended })
    }

    /// A process that takes the request. One that has ended without a word is replaced once.
    async fn sent(
        &self,
        old: Option<Running>,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Running, Unfinished> {
        if let Some(running) = old.filter(|running| !running.ended.load(Ordering::Acquire)) {
            match packets::send(&running.socket, request, fds).await {
                Err(packet::Error::Closed) => {}
                sent => return sent.map(|()| running).map_err(wait),
            }
        }
        let running = self.start().await.map_err(Unfinished::Spawn)?;
        packets::send(&running.socket, request, fds).await.map_err(wait)?;
        Ok(running)
    }

    async fn ask(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Asked, Unfinished> {
        let mut slot = self.running.lock().await;
        let since = self.reaper.next();
        let asked = async {
            // Taken: where this ends before there is an answer, that must not be the next one's.
            let running = self.sent(slot.take(), request, fds).await?;
            let answer = packets::receive::<Answer>(&running.socket, ANSWER).await.map_err(wait)?;
            Ok((running, answer))
        };
        let asked = tokio::time::timeout(limit, asked).await;
        let (running, (answer, pipes)) = asked.map_err(|_| Unfinished::Late(limit))??;
        *slot = Some(running);
        let pid = answer.map_err(|reason| Unfinished::Failed(one_line(&reason)))?;
        let pid = u32::try_from(pid).map_err(wait)?;
        let pipe = pipes.into_iter().next().ok_or_else(|| wait("a pid without its pipe"))?;
        let cookie = new_cookie();
        self.reaper.watch(pid, since, cookie).await.map_err(Unfinished::Wait)?;
        Ok(Asked { left: Left { pid, since, watched: Some(cookie) }, cookie, pipe })
    }
}

/// A process that is becoming its program.
struct Asked {
    left: Left,
    cookie: u64,
    pipe: OwnedFd,
}

/// Waits until the process has become its program; why it could not, otherwise.
async fn became(pipe: OwnedFd) -> std::io::Result<String> {
    let mut said = Vec::new();
    let pipe = pipe::Receiver::from_owned_fd(pipe)?;
    pipe.take(limits::REASON).read_to_end(&mut said).await?;
    Ok(one_line(&String::from_utf8_lossy(&said)))
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
        let mut argv = self.words.clone();
        argv.extend(words);
        let request = Request { argv, given: streams.map(|stream| stream.is_some()) };
        let fds: Vec<_> = streams.into_iter().flatten().collect();
        let Asked { left, cookie, pipe } = self.ask(&request, &fds, limit).await?;
        let failed = match tokio::time::timeout_at(deadline, became(pipe)).await {
            Ok(Ok(reason)) if reason.is_empty() => return Ok(left),
            Ok(Ok(reason)) => {
                Unfinished::Failed(format!("unable to start container process: {reason}"))
            }
            Ok(Err(error)) => wait(error),
            Err(_) => Unfinished::Late(limit),
        };
        self.reaper.kill(cookie);
        self.reaper.acknowledge(cookie).await;
        Err(failed)
    }
}

//! A process in a pod from its start to its end: streams, terminal, signals, exit code. `exec` and
//! `run` are both made of it.

use std::time::Duration;

use kuasar_protos::shim::api as task;
use kuasar_protos::shim::shim_async::TaskClient;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::client::patient;
use crate::error::{Error, Result};
use crate::stdio::{self, RawTerminal, Streams};

/// A process by the names that the Task API has for it.
pub struct Process {
    /// The pod's Task service.
    pub tasks: TaskClient,
    /// Container.
    pub container: String,
    /// Exec; empty for the container's own process.
    pub exec: String,
    /// How long it may take to end after the first signal; then it is killed.
    pub grace: Duration,
}

/// The signals by which somebody ends us.
pub struct Stopped {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

/// The exit code of a program that a signal has ended, as shells have it.
pub fn code_of(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(255)
}

impl Stopped {
    /// From now on they do not end this process.
    ///
    /// # Errors
    /// When they cannot be handled.
    pub fn new() -> Result<Self> {
        let on = |kind| signal(kind).map_err(Error::io("handle signals"));
        Ok(Self {
            interrupt: on(SignalKind::interrupt())?,
            terminate: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
            quit: on(SignalKind::quit())?,
        })
    }

    /// The next one.
    pub async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.interrupt.recv() => libc::SIGINT,
            _ = self.terminate.recv() => libc::SIGTERM,
            _ = self.hangup.recv() => libc::SIGHUP,
            _ = self.quit.recv() => libc::SIGQUIT,
        }
    }
}

impl Process {
    async fn kill(&self, signal: i32) {
        let q = task::KillRequest {
            id: self.container.clone(),
            exec_id: self.exec.clone(),
            signal: signal.unsigned_abs(),
            ..Default::default()
        };
        // It may have ended just now; its end is what we wait for anyway.
        let _ = self.tasks.kill(patient(), &q).await;
    }

    async fn resize(&self) {
        let Some((width, height)) = stdio::size() else { return };
        let q = task::ResizePtyRequest {
            id: self.container.clone(),
            exec_id: self.exec.clone(),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        let _ = self.tasks.resize_pty(patient(), &q).await;
    }

    async fn close_input(&self) {
        let q = task::CloseIORequest {
            id: self.container.clone(),
            exec_id: self.exec.clone(),
            stdin: true,
            ..Default::default()
        };
        let _ = self.tasks.close_io(patient(), &q).await;
    }

    /// Starts it and follows it to its end; answers its exit code. Signals are passed on: when it
    /// does not end by the first within its grace, or at the second, it is killed.
    ///
    /// # Errors
    /// The daemon's. The process is deleted by the caller in any case.
    pub async fn follow(&self, mut streams: Streams, terminal: bool) -> Result<u8> {
        let mut signals = Stopped::new()?;
        let ended = self.follow_inner(&mut streams, terminal, &mut signals).await;
        if ended.is_ok() {
            streams.finish().await;
        }
        ended
    }

    async fn follow_inner(
        &self,
        streams: &mut Streams,
        terminal: bool,
        signals: &mut Stopped,
    ) -> Result<u8> {
        let _raw = if terminal { RawTerminal::enter()? } else { None };
        let (id, exec_id) = (self.container.clone(), self.exec.clone());
        let start =
            task::StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        self.tasks.start(patient(), &start).await?;
        let mut input = streams.start();
        if terminal {
            self.resize().await;
        }
        let wait = task::WaitRequest { id, exec_id, ..Default::default() };
        let end = self.tasks.wait(patient(), &wait);
        tokio::pin!(end);
        let resized = SignalKind::window_change();
        let mut resized = signal(resized).map_err(Error::io("handle signals"))?;
        let mut told = 0;
        let mut deadline = None;
        loop {
            let overdue = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let closed = async {
                match &mut input {
                    Some(input) => drop(input.await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                answer = &mut end => {
                    return Ok(u8::try_from(answer?.exit_status).unwrap_or(255));
                }
                signal = signals.next() => {
                    told += 1;
                    self.kill(if told > 1 { libc::SIGKILL } else { signal }).await;
                    deadline.get_or_insert(tokio::time::Instant::now() + self.grace);
                }
                () = overdue => {
                    self.kill(libc::SIGKILL).await;
                    deadline = Some(tokio::time::Instant::now() + Duration::from_secs(10));
                }
                _ = resized.recv() => if terminal { self.resize().await },
                () = closed => {
                    input = None;
                    self.close_input().await;
                }
            }
        }
    }

    /// Deletes it.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn delete(&self) -> Result<()> {
        let (id, exec_id) = (self.container.clone(), self.exec.clone());
        let q = task::DeleteRequest { id, exec_id, ..Default::default() };
        match self.tasks.delete(patient(), &q).await.map_err(Error::from) {
            Ok(_) | Err(Error::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

//! The program `quark`: one command per pod, and the Task server that it leaves behind.
//!
//! ```text
//! quark -r <tree> sandbox --task-socket <socket> --id <sandbox> --pid-file <file>
//! ```
//!
//! The command makes the sandbox's process, writes its pid and ends; the process is an orphan then
//! and becomes sandbox-parent's. It reads `<tree>/config.json`, enters the network namespace that
//! is named there, makes `<tree>` its root and serves the Task API (version 2) on the socket. Its
//! end is the end of everything in the sandbox.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result};
use kuasar_forward::{Client, Connect, GuestError, clean};
use kuasar_host::cgroup::Cgroup;
use kuasar_host::live::Live;
use kuasar_host::process::{Identity, find_program, pidfd_ended, pidfd_signal};
use kuasar_pod::files::host;
use sandbox_parent::client::{Parent, Spawn, SpawnOptions};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::config::{Config, Limits};

/// Between two attempts to reach a Task server that does not listen yet.
const AGAIN: Duration = Duration::from_millis(10);
/// How much of what Quark has said gets into an error.
const SAID: usize = 2048;

/// Runs `quark`.
#[derive(Debug)]
pub struct Quark {
    parent: Parent,
    config: Live<Config>,
    sockets: PathBuf,
}

/// A sandbox that is to be started.
#[derive(Debug)]
pub struct Start<'a> {
    /// The program.
    pub program: &'a Path,
    /// Id of the pod.
    pub id: &'a str,
    /// Short id, for the socket.
    pub short: &'a str,
    /// Private directory of the sandbox.
    pub dir: &'a Path,
    /// What becomes the process's root.
    pub tree: &'a Path,
    /// Where the process is.
    pub cgroup: &'a Cgroup,
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::InvalidArgument(format!("path {} is not UTF-8", path.display())))
}

impl Quark {
    /// With the configuration as it is at each call; Task sockets are in `sockets`.
    pub fn new(parent: Parent, config: Live<Config>, sockets: PathBuf) -> Self {
        Self { parent, config, sockets }
    }

    /// Who runs and keeps.
    pub fn parent(&self) -> &Parent {
        &self.parent
    }

    /// How long Quark may take.
    pub fn limits(&self) -> Limits {
        self.config.get().quark_timeouts
    }

    /// Task socket of a sandbox.
    pub fn socket(&self, short: &str) -> PathBuf {
        self.sockets.join(format!("{short}.sock"))
    }

    /// Finds the program, and looks whether there can be virtual machines.
    ///
    /// # Errors
    /// A text that says what is missing and what helps.
    pub fn find(&self) -> std::result::Result<PathBuf, String> {
        let config = self.config.get().quark.clone();
        let path = find_program(&config.path).ok_or_else(|| {
            format!(
                "program {} is not installed: install Quark, or set quark.path to where it is",
                config.path.display()
            )
        })?;
        match File::options().read(true).write(true).open(&config.kvm) {
            Ok(_) => Ok(path),
            Err(error) => Err(format!(
                "Quark needs KVM, and {} cannot be opened ({error}): load the kvm module of this \
                 processor, or let pods of this node use another runtime handler",
                config.kvm.display()
            )),
        }
    }

    /// Calls to the sandbox's Task server; `gone` becomes true when its process has ended.
    pub fn client(&self, short: &str, gone: watch::Receiver<bool>) -> Client {
        let other = self.limits().other;
        let limits = kuasar_forward::Limits { connect: other, call: other };
        Client::new(Arc::new(Socket(self.socket(short))), limits, gone)
    }

    /// Starts a sandbox; answers its process, which serves by then.
    ///
    /// # Errors
    /// Quark's last words, and what helps. What it left behind is in the sandbox's cgroup.
    pub async fn start(&self, start: &Start<'_>) -> Result<(Identity, OwnedFd)> {
        let limit = self.limits().start;
        let until = tokio::time::Instant::now() + limit;
        let late = || {
            Error::DeadlineExceeded(format!(
                "quark did not start the sandbox within {limit:?}: see quark_timeouts.start, and \
                 quark's own log for why{}",
                said(&start.dir.join("quark.log"))
            ))
        };
        let process = tokio::time::timeout_at(until, self.run(start)).await;
        let (identity, pidfd) = match process {
            Ok(process) => process?,
            Err(_) => return Err(late()),
        };
        // Only now: a process that has ended since is found out below.
        let watched = pidfd.try_clone();
        let watched = watched.map_err(|error| Error::internal("watch the sandbox", error))?;
        let ended = ended(watched);
        let serves = async {
            while UnixStream::connect(self.socket(start.short)).await.is_err() {
                tokio::time::sleep(AGAIN).await;
            }
        };
        tokio::select! {
            biased;
            () = serves => Ok((identity, pidfd)),
            () = ended => Err(Error::FailedPrecondition(format!(
                "quark's sandbox has ended at once: see whether {} makes virtual machines here, \
                 and quark's own log{}",
                self.config.get().quark.kvm.display(),
                said(&start.dir.join("quark.log"))
            ))),
            () = tokio::time::sleep_until(until) => Err(late()),
        }
    }

    /// The command itself.
    async fn run(&self, start: &Start<'_>) -> Result<(Identity, OwnedFd)> {
        let wrong = |what: &'static str| move |error: std::io::Error| Error::internal(what, error);
        let pid_file = start.dir.join("quark.pid");
        let log_file = start.dir.join("quark.log");
        let socket = self.socket(start.short);
        for old in [&pid_file, &log_file, &socket] {
            let _ = std::fs::remove_file(old);
        }
        let mut log = File::options();
        let log = log.create(true).append(true).mode(0o600).open(&log_file);
        let log = OwnedFd::from(log.map_err(wrong("make quark's log"))?);
        let mut argv = vec![text(start.program)?];
        argv.extend(self.config.get().quark.args.iter().cloned());
        argv.extend(["-r".into(), text(start.tree)?, "sandbox".into()]);
        argv.extend(["--task-socket".into(), text(&socket)?]);
        argv.extend(["--id".into(), start.id.into(), "--pid-file".into(), text(&pid_file)?]);
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        let entrances: Vec<OwnedFd> = start
            .cgroup
            .entrances()
            .iter()
            .map(|path| File::options().write(true).open(path).map(OwnedFd::from))
            .collect::<std::io::Result<_>>()
            .map_err(wrong("open the sandbox's cgroup"))?;
        let cwd = text(start.tree)?;
        let options = SpawnOptions {
            cwd: Some(&cwd),
            cgroups: entrances.iter().map(AsFd::as_fd).collect(),
            ..SpawnOptions::default()
        };
        let cookie = Parent::new_cookie();
        let fds = vec![None, Some(log.as_fd()), Some(log.as_fd())];
        let command = Spawn { argv, env: vec![format!("PATH={path}")], fds, cookie };
        let spawned = self.parent.spawn_with(command, &options).await;
        let spawned = spawned.map_err(|error| Error::internal("run quark", error))?;
        let guard = Guard { parent: self.parent.clone(), cookie, pidfd: Some(spawned.pidfd) };
        let exit = self.parent.exit_of(cookie).await;
        let exit = exit.map_err(|error| Error::internal("run quark", error))?;
        guard.done().await;
        if exit.status != 0 {
            return Err(Error::FailedPrecondition(format!(
                "quark sandbox failed with status {}{}",
                exit.status,
                said(&log_file)
            )));
        }
        let words = std::fs::read_to_string(&pid_file).map_err(wrong("read quark's pid file"))?;
        let pid = words.trim().parse::<u32>().ok().filter(|pid| *pid > 1);
        let pid = pid.ok_or_else(|| {
            Error::internal("read quark's pid file", clean(&format!("{words:?} is no pid")))
        })?;
        let ended = || {
            Error::FailedPrecondition(format!(
                "quark's sandbox has ended at once: see quark's own log{}",
                said(&log_file)
            ))
        };
        let identity = Identity::of(pid).ok_or_else(ended)?;
        let pidfd = identity.open().ok_or_else(ended)?;
        // Whatever else stands in the file, nothing but what quark has left behind is ours to kill.
        if !start.cgroup.pids().is_ok_and(|pids| pids.contains(&pid)) {
            // The group no longer lists a process that has ended and waits to be reaped.
            if pidfd_ended(pidfd.as_fd(), Duration::ZERO).is_ok_and(|gone| gone) {
                return Err(ended());
            }
            return Err(Error::internal(
                "read quark's pid file",
                format!("process {pid} is none of the sandbox's"),
            ));
        }
        Ok((identity, pidfd))
    }
}

/// Kills the command if nobody waits for it any more.
struct Guard {
    parent: Parent,
    cookie: u64,
    pidfd: Option<OwnedFd>,
}

impl Guard {
    async fn done(mut self) {
        self.pidfd = None;
        self.parent.acknowledge(self.cookie).await;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(pidfd) = self.pidfd.take() else { return };
        let _ = pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        let (parent, cookie) = (self.parent.clone(), self.cookie);
        tokio::spawn(async move {
            let _ = parent.exit_of(cookie).await;
            parent.acknowledge(cookie).await;
        });
    }
}

/// Resolves when the process has ended.
async fn ended(pidfd: OwnedFd) {
    // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
    match unsafe { AsyncFd::register(pidfd) } {
        Ok(ready) => drop(ready.readable().await),
        Err(_) => std::future::pending().await,
    }
}

/// Becomes true when the process has ended: at once without one.
pub fn gone(process: Option<OwnedFd>) -> watch::Receiver<bool> {
    let (tell, gone) = watch::channel(process.is_none());
    if let Some(pidfd) = process {
        tokio::spawn(async move {
            tokio::select! {
                () = ended(pidfd) => drop(tell.send_replace(true)),
                // Nobody asks any more.
                () = tell.closed() => {}
            }
        });
    }
    gone
}

/// The end of what Quark has written, for an error.
pub fn said(log: &Path) -> String {
    let mut words = String::new();
    if let Ok(mut file) = File::open(log) {
        use std::io::{Seek, SeekFrom};
        let length = file.metadata().map(|meta| meta.len()).unwrap_or_default();
        let _ = file.seek(SeekFrom::Start(length.saturating_sub(SAID as u64)));
        let mut bytes = Vec::new();
        let _ = file.take(SAID as u64).read_to_end(&mut bytes);
        words = String::from_utf8_lossy(&bytes).into_owned();
    }
    let last = words.lines().rev().find(|line| !line.trim().is_empty());
    last.map(|line| format!(": {}", clean(line.trim()))).unwrap_or_default()
}

/// A sandbox's Task socket.
#[derive(Debug)]
struct Socket(PathBuf);

#[async_trait]
impl Connect for Socket {
    async fn connect(&self, _limit: Duration) -> kuasar_forward::Result<UnixStream> {
        UnixStream::connect(&self.0).await.map_err(|error| GuestError::Broken(error.to_string()))
    }
}

/// Ends a process, and waits for its end.
///
/// # Errors
/// When it does not end within `limit`.
pub fn end(pidfd: BorrowedFd<'_>, limit: Duration) -> Result<()> {
    let _ = pidfd_signal(pidfd, libc::SIGKILL);
    if kuasar_host::process::pidfd_ended(pidfd, limit).map_err(host("wait for quark"))? {
        return Ok(());
    }
    Err(Error::DeadlineExceeded(format!(
        "the sandbox has not ended within {limit:?}: quark hangs in the kernel"
    )))
}

//! [`Processes`] without sandbox-parent: children of this process. For tests and tools; nothing
//! survives the process that uses it.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::super::error::{Doing, Error, Result};
use super::{Command, Exit, Processes};

/// Children of this process, which becomes their sub-reaper.
#[derive(Debug, Default)]
pub struct Local {
    exits: Mutex<HashMap<u64, watch::Receiver<Option<Exit>>>>,
    kept: Mutex<HashMap<String, OwnedFd>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Local {
    /// Makes this process the sub-reaper of what its children leave behind.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new() -> Result<Self> {
        nix::sys::prctl::set_child_subreaper(true).doing(|| "become a sub-reaper")?;
        Ok(Self::default())
    }

    fn follow(&self, pid: u32, cookie: u64) -> Result<()> {
        let pidfd = kuasar_host::process::pidfd_open(pid)?;
        // SAFETY: an OwnedFd always answers the same descriptor and closes it only when dropped.
        let pidfd =
            unsafe { AsyncFd::register(pidfd) }.map_err(std::io::Error::from).doing(|| "watch")?;
        let (tx, rx) = watch::channel(None);
        lock(&self.exits).insert(cookie, rx);
        tokio::spawn(async move {
            if pidfd.readable().await.is_err() {
                return;
            }
            let ended = waitid(Id::PIDFd(pidfd.get_ref().as_fd()), WaitPidFlag::WEXITED);
            let (status, signal) = match ended {
                Ok(WaitStatus::Exited(_, code)) => (code as u32, None),
                Ok(WaitStatus::Signaled(_, signal, _)) => {
                    (128 + signal as u32, Some(signal as u32))
                }
                _ => (255, None),
            };
            let _ = tx.send(Some(Exit { status, signal, at: SystemTime::now() }));
        });
        Ok(())
    }
}

#[async_trait]
impl Processes for Local {
    async fn spawn(&self, command: Command<'_>) -> Result<(u32, u64)> {
        let Some((program, arguments)) = command.argv.split_first() else {
            return Err(Error::Invalid("no program".into()));
        };
        let null = std::fs::File::options().read(true).write(true).open("/dev/null");
        let null = null.doing(|| "open /dev/null")?;
        let wanted: Vec<i32> =
            command.fds.iter().map(|fd| fd.map_or(null.as_raw_fd(), |fd| fd.as_raw_fd())).collect();
        let cgroups: Vec<i32> = command.cgroups.iter().map(AsRawFd::as_raw_fd).collect();
        let mut child = std::process::Command::new(program);
        child.args(arguments).env_clear();
        child.envs(command.env.iter().filter_map(|pair| pair.split_once('=')));
        // SAFETY: the closure only makes system calls on integers and memory that it owns; the
        // vectors are not changed, so nothing is allocated.
        unsafe { child.pre_exec(move || place(&wanted, &cgroups)) };
        let mut child = child.spawn().doing(|| format!("run {program}"))?;
        let pid = child.id();
        if let Err(error) = self.follow(pid, command.cookie) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok((pid, 0))
    }

    async fn watch(&self, pid: u32, _since: u64, cookie: u64) -> Result<()> {
        self.follow(pid, cookie)
    }

    async fn exit_of(&self, cookie: u64) -> Result<Exit> {
        let rx = lock(&self.exits).get(&cookie).cloned();
        let mut rx = rx.ok_or(Error::Gone)?;
        let exit = rx.wait_for(Option::is_some).await.map_err(|_| Error::Gone)?;
        exit.ok_or(Error::Gone)
    }

    async fn acknowledge(&self, cookie: u64) {
        lock(&self.exits).remove(&cookie);
    }

    async fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        let fd = fd.try_clone_to_owned().doing(|| "duplicate a descriptor")?;
        lock(&self.kept).insert(name.into(), fd);
        Ok(())
    }

    async fn fetch(&self, name: &str) -> Result<Option<OwnedFd>> {
        let kept = lock(&self.kept);
        kept.get(name).map(OwnedFd::try_clone).transpose().doing(|| "duplicate a descriptor")
    }

    async fn forget(&self, prefix: &str) -> Result<()> {
        lock(&self.kept).retain(|name, _| !name.starts_with(prefix));
        Ok(())
    }
}

/// In the child: descriptor `i` becomes `wanted[i]`. Numbers above are close-on-exec already.
fn place(wanted: &[i32], cgroups: &[i32]) -> std::io::Result<()> {
    let n = wanted.len() as i32;
    let done = |r: i32| if r < 0 { Err(std::io::Error::last_os_error()) } else { Ok(r) };
    for cgroup in cgroups {
        // SAFETY: one byte of a constant; 0 means the writing process.
        done(unsafe { libc::write(*cgroup, c"0".as_ptr().cast(), 1) } as i32)?;
    }
    // Out of the way of all targets first: the lifted copy of `i` is found by counting, because
    // nothing else takes numbers in between in a child with one thread.
    let base = 512;
    for (i, fd) in (0..).zip(wanted) {
        // SAFETY: integer arguments.
        done(unsafe { libc::dup3(*fd, base + i, libc::O_CLOEXEC) })?;
    }
    for i in 0..n {
        // SAFETY: integer arguments; the copy is inherited on purpose.
        done(unsafe { libc::dup2(base + i, i) })?;
    }
    // SAFETY: a new session, as sandbox-parent makes one.
    unsafe { libc::setsid() };
    Ok(())
}

//! Who forks and reaps for the runtime.
//!
//! An engine leaves the container's init process (or an exec's) behind when it ends, so whoever
//! runs the engine has to be the one who reaps the orphan: sandbox-parent on a host, which
//! outlives the daemon, or the init process of a guest. A process may end before anybody can say
//! that its exit is of interest, so exits are numbered: [`Processes::watch`] names the number from
//! which on an exit of that pid can be meant.

use std::os::fd::{BorrowedFd, OwnedFd};

use async_trait::async_trait;
pub use containerd_task::runtime::Exit;

use crate::place::Place;

/// Why [`Processes`] could not do it. Its text is shown behind what was being done.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A program to run. Descriptor `i` of the new process is `fds[i]`, or `/dev/null` for `None`;
/// no other descriptor is open in it.
#[derive(Debug)]
pub struct Command<'a> {
    /// Program (absolute path) and arguments.
    pub argv: Vec<String>,
    /// Environment as `NAME=value`.
    pub env: Vec<String>,
    /// Standard streams and further descriptors.
    pub fds: Vec<Option<BorrowedFd<'a>>>,
    /// Name under which its exit is kept.
    pub cookie: u64,
    /// Where the process is to be that this program would make: for who makes it itself, in place of the
    /// program.
    pub place: Option<Place>,
}

/// A running program.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid.
    pub pid: u32,
    /// Refers to it even when the pid is reused.
    pub pidfd: OwnedFd,
    /// Exits that it causes have this number or a later one.
    pub since: u64,
    /// [`Place::cookie`], when the process that is made is watched as soon as the command has ended well.
    pub watched: Option<u64>,
}

/// Runs programs, and keeps exits until they are recorded elsewhere.
#[async_trait]
pub trait Processes: Send + Sync {
    /// Runs a program. Its exit is kept under `command.cookie` until it is acknowledged.
    ///
    /// # Errors
    /// When it cannot be run.
    async fn spawn(&self, command: Command<'_>) -> Result<Spawned, Failure>;

    /// Keeps the exit of `pid`, a process that a spawned program has left behind, under `cookie`:
    /// the one that comes, or one since the number `since` that has come already.
    ///
    /// # Errors
    /// When there is neither such a process nor such an exit.
    async fn watch(&self, pid: u32, since: u64, cookie: u64) -> Result<(), Failure>;

    /// Waits for an exit; at once if it has come already. May be asked more than once.
    ///
    /// # Errors
    /// When it can no longer be known.
    async fn exit_of(&self, cookie: u64) -> Result<Exit, Failure>;

    /// The exit is recorded elsewhere now, or of no interest: it may be forgotten.
    async fn acknowledge(&self, cookie: u64);

    /// Cookies of all watched processes and unacknowledged exits.
    ///
    /// # Errors
    /// When it can no longer be known.
    async fn watched(&self) -> Result<Vec<u64>, Failure>;
}

/// A random name for a process, to be journalled with it; never 0.
pub fn new_cookie() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: pointer and length describe `bytes`.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    u64::from_ne_bytes(bytes) | 1
}

#[cfg(feature = "parent")]
mod parent {
    use sandbox_parent::client::{Parent, Spawn};

    use super::{Command, Exit, Failure, Processes, Spawned, async_trait};

    #[async_trait]
    impl Processes for Parent {
        async fn spawn(&self, command: Command<'_>) -> Result<Spawned, Failure> {
            let Command { argv, env, fds, cookie, place: _ } = command;
            let made = Parent::spawn(self, Spawn { argv, env, fds, cookie }).await?;
            Ok(Spawned { pid: made.pid, pidfd: made.pidfd, since: made.since, watched: None })
        }

        async fn watch(&self, pid: u32, since: u64, cookie: u64) -> Result<(), Failure> {
            Ok(Parent::watch(self, pid, since, cookie).await?)
        }

        async fn exit_of(&self, cookie: u64) -> Result<Exit, Failure> {
            let exit = Parent::exit_of(self, cookie).await?;
            Ok(Exit { status: exit.status, at: exit.at })
        }

        async fn acknowledge(&self, cookie: u64) {
            Parent::acknowledge(self, cookie).await;
        }

        async fn watched(&self) -> Result<Vec<u64>, Failure> {
            Ok(Parent::watched(self).await?)
        }
    }
}

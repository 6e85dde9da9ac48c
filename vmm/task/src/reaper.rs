//! Forks and reaps, for the OCI runtime and for everything else.
//!
//! PID 1 is the parent of whatever lost its own. All children are reaped here and nowhere else, so
//! no other part may wait for a process (and `std::process` is not used: it waits by itself when
//! an exec fails).
//!
//! An engine leaves a container's first process behind, and it may have ended before anybody can
//! say that its exit is of interest. So exits that nobody watches are numbered and the last
//! [`limits::EXITS`] of them kept; [`Processes::watch`] names the number that was next when the
//! engine was started. A pid that was used before has an older number. Spawning and reaping
//! exclude each other, so that a child's exit cannot be taken before the child is known.

use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_task::runtime::Exit;
use kuasar_oci::processes::{Command, Failure, Processes, Spawned};
use tokio::sync::watch;

use crate::limits;

/// The one reaper. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    /// By cookie.
    watched: HashMap<u64, watch::Sender<Option<Exit>>>,
    /// Cookie of a process that has not been reaped, by pid.
    running: HashMap<i32, u64>,
    unwatched: VecDeque<Stranger>,
    /// Number of the next exit that nobody watches.
    next: u64,
}

struct Stranger {
    number: u64,
    pid: i32,
    exit: Exit,
}

fn exit_of_status(status: i32) -> Exit {
    let code = if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    };
    Exit { status: u32::try_from(code).unwrap_or(255), at: SystemTime::now() }
}

impl Table {
    fn reap(&mut self) {
        loop {
            let mut status = 0;
            // SAFETY: `status` is a valid out pointer.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            let exit = exit_of_status(status);
            let sender = self.running.remove(&pid).and_then(|cookie| self.watched.get(&cookie));
            if let Some(sender) = sender {
                sender.send_replace(Some(exit));
                continue;
            }
            if self.unwatched.len() >= limits::EXITS {
                self.unwatched.pop_front();
            }
            self.unwatched.push_back(Stranger { number: self.next, pid, exit });
            self.next += 1;
        }
    }

    fn room(&self) -> Result<(), Failure> {
        if self.watched.len() >= limits::WATCHED {
            return Err("too many processes are watched".into());
        }
        Ok(())
    }
}

impl Reaper {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaps until the runtime ends.
    ///
    /// # Errors
    /// When SIGCHLD cannot be heard.
    pub fn run(&self) -> std::io::Result<()> {
        let mut children = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child())?;
        let table = self.clone();
        tokio::spawn(async move {
            // One signal may stand for many children, and what came before is not lost.
            table.lock().reap();
            while children.recv().await.is_some() {
                table.lock().reap();
            }
        });
        Ok(())
    }

    fn spawn_with(
        &self,
        command: &Command<'_>,
        spawn: impl FnOnce(&Command<'_>) -> Result<libc::pid_t, Failure>,
    ) -> Result<Spawned, Failure> {
        let mut table = self.lock();
        table.room()?;
        let pid = spawn(command)?;
        table.watched.insert(command.cookie, watch::Sender::new(None));
        table.running.insert(pid, command.cookie);
        let since = table.next;
        let pid = u32::try_from(pid)?;
        // It cannot have been reaped: we hold the table.
        let pidfd = kuasar_host::process::pidfd_open(pid)?;
        Ok(Spawned { pid, pidfd, since, watched: None })
    }

    /// As [`Processes::spawn`]; the program is process 1 of a new PID namespace.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn spawn_in_new_pid_namespace(&self, command: Command<'_>) -> Result<Spawned, Failure> {
        use nix::sched::{CloneFlags, unshare};
        // A namespace for children is a thread's own affair; the thread ends.
        let inside = |command: &Command<'_>| {
            std::thread::scope(|scope| {
                let thread = std::thread::Builder::new().stack_size(limits::STACK);
                let thread = thread.spawn_scoped(scope, || {
                    unshare(CloneFlags::CLONE_NEWPID)?;
                    spawn(command)
                })?;
                thread.join().unwrap_or_else(|_| Err("it panicked".into()))
            })
        };
        self.spawn_with(&command, inside)
    }

    /// Waits for a process that [`Processes::spawn`] made, and forgets it.
    ///
    /// # Errors
    /// When nobody knows it.
    pub async fn end_of(&self, cookie: u64) -> Result<Exit, Failure> {
        let exit = self.exit_of(cookie).await;
        self.acknowledge(cookie).await;
        exit
    }
}

#[async_trait]
impl Processes for Reaper {
    async fn spawn(&self, command: Command<'_>) -> Result<Spawned, Failure> {
        self.spawn_with(&command, spawn)
    }

    async fn watch(&self, pid: u32, since: u64, cookie: u64) -> Result<(), Failure> {
        let mut table = self.lock();
        table.room()?;
        let pid = i32::try_from(pid)?;
        // The latest: a pid that was used twice since then is the later one's.
        let found = table.unwatched.iter().rposition(|s| s.pid == pid && s.number >= since);
        let found = found.and_then(|at| table.unwatched.remove(at));
        if let Some(stranger) = found
            && !is_child(pid)
        {
            table.watched.insert(cookie, watch::Sender::new(Some(stranger.exit)));
            return Ok(());
        }
        if !is_child(pid) {
            return Err(format!("process {pid} is no child of ours and has not ended").into());
        }
        table.watched.insert(cookie, watch::Sender::new(None));
        table.running.insert(pid, cookie);
        Ok(())
    }

    async fn exit_of(&self, cookie: u64) -> Result<Exit, Failure> {
        let receiver = self.lock().watched.get(&cookie).map(watch::Sender::subscribe);
        let mut receiver = receiver.ok_or("nobody knows this process")?;
        let exit = receiver.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        exit.ok_or_else(|| "the process has been forgotten".into())
    }

    async fn acknowledge(&self, cookie: u64) {
        let mut table = self.lock();
        table.watched.remove(&cookie);
        table.running.retain(|_, running| *running != cookie);
    }

    async fn watched(&self) -> Result<Vec<u64>, Failure> {
        Ok(self.lock().watched.keys().copied().collect())
    }
}

/// Whether `pid` is a child that has not been reaped.
fn is_child(pid: i32) -> bool {
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    let id = libc::id_t::try_from(pid).unwrap_or(0);
    // SAFETY: `info` is a valid out pointer; nothing is reaped.
    id != 0 && unsafe { libc::waitid(libc::P_PID, id, info.as_mut_ptr(), flags) } == 0
}

/// A descriptor far above those of the new process.
fn lift(fd: BorrowedFd<'_>, above: i32) -> std::io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, fcntl};
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(above))?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) })
}

fn checked(code: libc::c_int) -> std::io::Result<()> {
    if code == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(code)) }
}

/// `posix_spawn(3)`: vfork underneath, and an error of exec is answered here. Everything that is
/// not mapped is closed.
fn spawn(command: &Command<'_>) -> Result<libc::pid_t, Failure> {
    let text = |words: &[String]| -> Result<Vec<CString>, Failure> {
        Ok(words.iter().map(|w| CString::new(w.as_str())).collect::<Result<_, _>>()?)
    };
    let (argv, env) = (text(&command.argv)?, text(&command.env)?);
    let pointers = |words: &[CString]| -> Vec<*mut libc::c_char> {
        words.iter().map(|w| w.as_ptr().cast_mut()).chain([std::ptr::null_mut()]).collect()
    };
    let program = argv.first().ok_or("no program")?;
    let above = i32::try_from(command.fds.len())?.checked_add(64).ok_or("too many descriptors")?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let lifted: Vec<OwnedFd> = command
        .fds
        .iter()
        .map(|fd| lift(fd.unwrap_or(std::os::fd::AsFd::as_fd(&null)), above))
        .collect::<Result<_, _>>()?;

    struct Actions(libc::posix_spawn_file_actions_t);
    impl Drop for Actions {
        fn drop(&mut self) {
            // SAFETY: made by `init`.
            unsafe { libc::posix_spawn_file_actions_destroy(&mut self.0) };
        }
    }
    struct Attributes(libc::posix_spawnattr_t);
    impl Drop for Attributes {
        fn drop(&mut self) {
            // SAFETY: made by `init`.
            unsafe { libc::posix_spawnattr_destroy(&mut self.0) };
        }
    }
    let mut raw = std::mem::MaybeUninit::uninit();
    // SAFETY: an out pointer of the right type.
    checked(unsafe { libc::posix_spawn_file_actions_init(raw.as_mut_ptr()) })?;
    // SAFETY: initialised by the call above.
    let mut actions = Actions(unsafe { raw.assume_init() });
    for (number, fd) in (0..).zip(&lifted) {
        // SAFETY: `actions` is initialised; the numbers are plain.
        checked(unsafe {
            libc::posix_spawn_file_actions_adddup2(&mut actions.0, fd.as_raw_fd(), number)
        })?;
    }
    let first_unused = above - 64;
    // SAFETY: as above.
    checked(unsafe {
        libc::posix_spawn_file_actions_addclosefrom_np(&mut actions.0, first_unused)
    })?;
    let mut raw = std::mem::MaybeUninit::uninit();
    // SAFETY: an out pointer of the right type.
    checked(unsafe { libc::posix_spawnattr_init(raw.as_mut_ptr()) })?;
    // SAFETY: initialised by the call above.
    let mut attributes = Attributes(unsafe { raw.assume_init() });
    let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // Not sigfillset(3): it leaves out the C library's own two signals, and posix_spawn(3) has
    // whatever is not in the set of those ignored by the new program.
    // SAFETY: a sigset_t is an array of bits.
    unsafe { std::ptr::write_bytes(all.as_mut_ptr(), 0xff, 1) };
    // A session of its own; no signal blocked, none ignored (Rust ignores SIGPIPE).
    let flags = libc::POSIX_SPAWN_SETSIGMASK
        | libc::POSIX_SPAWN_SETSIGDEF
        | libc::c_int::from(libc::POSIX_SPAWN_SETSID);
    // SAFETY: out pointers of the right type, and attributes that are initialised.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        checked(libc::posix_spawnattr_setflags(
            &mut attributes.0,
            libc::c_short::try_from(flags)?,
        ))?;
        checked(libc::posix_spawnattr_setsigmask(&mut attributes.0, none.as_ptr()))?;
        checked(libc::posix_spawnattr_setsigdefault(&mut attributes.0, all.as_ptr()))?;
    }
    let mut pid = 0;
    let (argv_pointers, env_pointers) = (pointers(&argv), pointers(&env));
    // SAFETY: null-terminated arrays of strings that live until the call returns.
    checked(unsafe {
        libc::posix_spawn(
            &mut pid,
            program.as_ptr(),
            &actions.0,
            &attributes.0,
            argv_pointers.as_ptr(),
            env_pointers.as_ptr(),
        )
    })?;
    Ok(pid)
}

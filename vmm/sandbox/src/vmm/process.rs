//! Running a VMM and its helpers, and knowing how they end.
//!
//! A driver hands a [`Program`] to the [`Launcher`]; that runs it through [`Processes`] (in a
//! daemon: sandbox-parent, which outlives it), in a jail when one is configured. What comes back
//! is a [`Process`]: a pidfd, the cookie of its exit, and the last words of its standard error.
//!
//! Descriptors: 0 is `/dev/null`, 1 the console, 2 a sealed memfd that takes [`WORDS`] bytes and
//! no more, however much a guest makes the VMM complain; from [`FIRST_FD`] on what the program
//! asks for.

mod local;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kuasar_host::process::Identity;
use nix::sys::memfd::{MFdFlags, memfd_create};
use sandbox_parent::client::{Parent, Spawn, SpawnOptions};
use serde::{Deserialize, Serialize};

use super::error::{Doing, Error, Result, clean};
use crate::jail::{self, JailConfig};

pub use local::Local;
pub use sandbox_parent::client::Exit;

/// Number of the first descriptor behind the standard streams.
pub const FIRST_FD: i32 = 3;
/// Bytes of standard error that are kept of a program.
pub const WORDS: u64 = 16 << 10;
/// Of these, as many characters come into an error.
const QUOTED: usize = 600;
/// How long the kernel may take to end a killed process.
const KILL: Duration = Duration::from_secs(10);

/// A program to run: the request of [`Processes::spawn`].
#[derive(Debug)]
pub struct Command<'a> {
    /// Program (absolute path) and arguments.
    pub argv: Vec<String>,
    /// Environment as `NAME=value`.
    pub env: Vec<String>,
    /// Descriptor `i` of the new process; `None` is `/dev/null`.
    pub fds: Vec<Option<BorrowedFd<'a>>>,
    /// `cgroup.procs` files, open for writing, to enter before it runs.
    pub cgroups: Vec<BorrowedFd<'a>>,
    /// Name under which its exit is kept.
    pub cookie: u64,
}

/// Who forks, reaps and keeps descriptors. The same shape as sandbox-parent's client.
#[async_trait]
pub trait Processes: std::fmt::Debug + Send + Sync {
    /// Runs a program; answers its pid and the number for `watch`.
    async fn spawn(&self, command: Command<'_>) -> Result<(u32, u64)>;
    /// Watches a process that a spawned program has left behind.
    async fn watch(&self, pid: u32, since: u64, cookie: u64) -> Result<()>;
    /// Waits for an exit; at once if it has come already.
    async fn exit_of(&self, cookie: u64) -> Result<Exit>;
    /// The exit may be forgotten.
    async fn acknowledge(&self, cookie: u64);
    /// Keeps a duplicate of a descriptor under a name, beyond the daemon's end.
    async fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()>;
    /// A duplicate of what is kept under the name.
    async fn fetch(&self, name: &str) -> Result<Option<OwnedFd>>;
    /// Forgets all names with this prefix.
    async fn forget(&self, prefix: &str) -> Result<()>;
}

fn parent(what: impl Into<String>) -> impl FnOnce(sandbox_parent::client::ParentError) -> Error {
    let what = what.into();
    move |source| Error::Parent { what, source }
}

#[async_trait]
impl Processes for Parent {
    async fn spawn(&self, command: Command<'_>) -> Result<(u32, u64)> {
        let program = command.argv.first().cloned().unwrap_or_default();
        let spawn = Spawn {
            argv: command.argv,
            env: command.env,
            fds: command.fds,
            cookie: command.cookie,
        };
        let options = SpawnOptions { cgroups: command.cgroups, ..SpawnOptions::default() };
        let spawned =
            self.spawn_with(spawn, &options).await.map_err(parent(format!("run {program}")))?;
        Ok((spawned.pid, spawned.since))
    }
    async fn watch(&self, pid: u32, since: u64, cookie: u64) -> Result<()> {
        Parent::watch(self, pid, since, cookie).await.map_err(parent("watch a process"))
    }
    async fn exit_of(&self, cookie: u64) -> Result<Exit> {
        Parent::exit_of(self, cookie).await.map_err(parent("wait for a process"))
    }
    async fn acknowledge(&self, cookie: u64) {
        Parent::acknowledge(self, cookie).await;
    }
    async fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        Parent::keep(self, name, fd).await.map_err(parent("keep a descriptor"))
    }
    async fn fetch(&self, name: &str) -> Result<Option<OwnedFd>> {
        Parent::fetch(self, name).await.map_err(parent("fetch a descriptor"))
    }
    async fn forget(&self, prefix: &str) -> Result<()> {
        Parent::forget(self, prefix).await.map_err(parent("forget descriptors"))
    }
}

/// A VMM or helper to run.
#[derive(Debug)]
pub struct Program<'a> {
    /// For messages and the process's record: `qemu`, `virtiofsd`.
    pub name: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Standard output; `/dev/null` otherwise.
    pub stdout: Option<BorrowedFd<'a>>,
    /// Descriptors from [`FIRST_FD`] on.
    pub fds: &'a Fds,
    /// What of the host it may see and do, when it is jailed.
    pub view: jail::View,
    /// The network namespace it runs in; an empty one of its own otherwise, when it is jailed.
    pub netns: Option<BorrowedFd<'a>>,
    /// `cgroup.procs` files of the cgroups to enter.
    pub cgroups: &'a [PathBuf],
}

/// Descriptors for a program; hands out the numbers that they will have there.
#[derive(Debug, Default)]
pub struct Fds(Vec<Held>);

#[derive(Debug)]
enum Held {
    Fd(Arc<OwnedFd>),
    File(Arc<File>),
}

impl Fds {
    /// Adds one; answers its number in the program.
    pub fn push(&mut self, fd: impl Into<Arc<OwnedFd>>) -> i32 {
        self.add(Held::Fd(fd.into()))
    }

    /// Adds a file; answers its number in the program.
    pub fn push_file(&mut self, file: Arc<File>) -> i32 {
        self.add(Held::File(file))
    }

    fn add(&mut self, held: Held) -> i32 {
        self.0.push(held);
        FIRST_FD - 1 + self.0.len() as i32
    }

    fn all(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|held| match held {
            Held::Fd(fd) => fd.as_fd(),
            Held::File(file) => file.as_fd(),
        })
    }
}

/// What a record keeps of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// For messages.
    pub name: String,
    /// Pid and start time.
    #[serde(flatten)]
    pub identity: Identity,
    /// Name of its exit.
    pub cookie: u64,
}

/// A process that was started here or by an earlier daemon.
#[derive(Debug)]
pub struct Process {
    record: Record,
    /// `None` when it had ended before it was taken up again.
    pidfd: Option<OwnedFd>,
    words: Option<File>,
    processes: Arc<dyn Processes>,
}

impl Process {
    /// Takes up a process of an earlier daemon.
    pub fn take_up(record: Record, processes: Arc<dyn Processes>) -> Self {
        let pidfd = record.identity.open();
        let path = format!("/proc/{}/fd/2", record.identity.pid);
        let words = pidfd.as_ref().and_then(|_| File::open(path).ok());
        Self { record, pidfd, words, processes }
    }

    /// For the journal.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.record.identity.pid
    }

    /// Who keeps its exit.
    pub fn processes(&self) -> Arc<dyn Processes> {
        self.processes.clone()
    }

    /// Whether it runs still.
    pub fn is_alive(&self) -> bool {
        let ended = |fd: &OwnedFd| {
            kuasar_host::process::pidfd_ended(fd.as_fd(), Duration::ZERO).unwrap_or(false)
        };
        self.pidfd.as_ref().is_some_and(|fd| !ended(fd))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`Error::Parent`].
    pub async fn wait(&self) -> Result<Exit> {
        self.processes.exit_of(self.record.cookie).await
    }

    /// Waits for its end, but not longer than `limit`.
    ///
    /// # Errors
    /// [`Error::Parent`].
    pub async fn wait_for(&self, limit: Duration) -> Result<Option<Exit>> {
        tokio::time::timeout(limit, self.wait()).await.ok().transpose()
    }

    /// Sends a signal; one that has ended is no error.
    pub fn signal(&self, signal: i32) {
        if let Some(pidfd) = &self.pidfd
            && let Err(error) = kuasar_host::process::pidfd_signal(pidfd.as_fd(), signal)
            && error.errno() != Some(libc::ESRCH)
        {
            tracing::warn!(program = self.record.name, %error, "cannot signal");
        }
    }

    /// Kills it and waits for the kernel to have ended it. Idempotent.
    ///
    /// # Errors
    /// [`Error::Parent`], [`Error::Deadline`].
    pub async fn kill(&self) -> Result<Exit> {
        self.signal(libc::SIGKILL);
        self.wait_for(KILL).await?.ok_or_else(|| Error::Deadline {
            what: format!("the end of the killed {}", self.record.name),
            limit: KILL,
        })
    }

    /// The error that says how it ended, with its last words.
    pub fn ended(&self, exit: Exit) -> Error {
        let said = self.words.as_ref().map(last_words).unwrap_or_default();
        Error::Ended { program: self.record.name.clone(), status: exit.status, said }
    }

    /// Its exit may be forgotten.
    pub async fn acknowledge(&self) {
        self.processes.acknowledge(self.record.cookie).await;
    }
}

fn words_file() -> Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"words", flags).doing(|| "make a memfd")?);
    file.set_len(WORDS).doing(|| "size a memfd")?;
    let seals = nix::fcntl::SealFlag::F_SEAL_GROW | nix::fcntl::SealFlag::F_SEAL_SHRINK;
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals)).doing(|| "seal a memfd")?;
    Ok(file)
}

fn last_words(file: &File) -> String {
    let mut bytes = vec![0; WORDS as usize];
    // At a place of its own: the program shares the offset.
    let n = file.read_at(&mut bytes, 0).unwrap_or_default();
    bytes.truncate(n);
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
    clean(bytes.get(..end).unwrap_or_default(), QUOTED)
}

/// Runs programs, jailed or not.
#[derive(Debug, Clone)]
pub struct Launcher {
    processes: Arc<dyn Processes>,
    jail: Option<Arc<JailConfig>>,
}

impl Launcher {
    /// Through `processes`; in a jail, unless it is `None`.
    pub fn new(processes: Arc<dyn Processes>, jail: Option<JailConfig>) -> Self {
        Self { processes, jail: jail.map(Arc::new) }
    }

    /// Who forks.
    pub fn processes(&self) -> &Arc<dyn Processes> {
        &self.processes
    }

    /// User and group of jailed programs: who must be able to reach sockets made for them.
    pub fn owner(&self) -> Option<(u32, u32)> {
        self.jail.as_ref().map(|jail| (jail.uid, jail.gid))
    }

    /// Runs a program. It has called execve when this answers.
    ///
    /// # Errors
    /// [`Error::NoProgram`]; [`Error::Ended`] with the jailer's words, which name the step.
    pub async fn run(&self, program: Program<'_>) -> Result<Process> {
        let wanted = program.argv.first().cloned().unwrap_or_default();
        let path = kuasar_host::process::find_program(wanted.as_ref())
            .ok_or_else(|| Error::NoProgram(wanted))?;
        let mut argv = program.argv;
        if let Some(first) = argv.first_mut() {
            *first = text(&path)?;
        }
        let words = words_file()?;
        let mut fds = vec![None, program.stdout, Some(words.as_fd())];
        fds.extend(program.fds.all().map(Some));
        match &self.jail {
            None => self.run_bare(program.name, argv, fds, program.cgroups, &words).await,
            Some(jail) => {
                let n = fds.len();
                let plan = jail::Plan {
                    fds: u32::try_from(n).unwrap_or(u32::MAX),
                    cgroups: program.cgroups.to_vec(),
                    view: program.view,
                    config: (**jail).clone(),
                };
                let plan = plan.seal().doing(|| "write the jail's plan")?;
                let pid_file = words_file()?;
                fds.extend([Some(plan.as_fd()), Some(pid_file.as_fd())]);
                fds.extend(program.netns.map(Some));
                let argv = jail::command_line(jail, n, program.netns.is_some(), argv);
                self.run_jailed(program.name, argv, fds, &words, &pid_file).await
            }
        }
    }

    async fn run_bare(
        &self,
        name: String,
        argv: Vec<String>,
        fds: Vec<Option<BorrowedFd<'_>>>,
        cgroups: &[PathBuf],
        words: &File,
    ) -> Result<Process> {
        let mut files = Vec::new();
        for path in cgroups {
            let file = File::options().write(true).open(path);
            files.push(file.doing(|| format!("open {}", path.display()))?);
        }
        let cgroups = files.iter().map(AsFd::as_fd).collect();
        let cookie = Parent::new_cookie();
        let command = Command { argv, env: environment(), fds, cgroups, cookie };
        let (pid, _) = self.processes.spawn(command).await?;
        self.process(name, pid, cookie, words)
    }

    async fn run_jailed(
        &self,
        name: String,
        argv: Vec<String>,
        fds: Vec<Option<BorrowedFd<'_>>>,
        words: &File,
        pid_file: &File,
    ) -> Result<Process> {
        let jailer = Parent::new_cookie();
        let command =
            Command { argv, env: environment(), fds, cgroups: Vec::new(), cookie: jailer };
        let (pid, since) = self.processes.spawn(command).await?;
        let started = self.process(format!("the jailer of {name}"), pid, jailer, words)?;
        let limit = self.jail.as_ref().map_or(KILL, |jail| jail.timeout());
        let Some(exit) = started.wait_for(limit).await? else {
            // Its child is in a PID namespace of its own, or not made yet: both go with it.
            let _ = started.kill().await;
            started.acknowledge().await;
            return Err(Error::Deadline { what: format!("the jail of {name}"), limit });
        };
        started.acknowledge().await;
        if exit.status != 0 {
            return Err(started.ended(exit));
        }
        let pid = last_words(pid_file).parse::<u32>().map_err(|_| {
            Error::State(format!("the jailer of {name} did not tell the pid of the program"))
        })?;
        let cookie = Parent::new_cookie();
        self.processes.watch(pid, since, cookie).await?;
        self.process(name, pid, cookie, words)
    }

    fn process(&self, name: String, pid: u32, cookie: u64, words: &File) -> Result<Process> {
        // One that has ended already has no start time; its exit is known by the cookie all the
        // same, and a start time of 0 names nobody.
        let identity = Identity::of(pid).unwrap_or(Identity { pid, start: 0 });
        let pidfd = identity.open();
        let record = Record { name, identity, cookie };
        let words = words.try_clone().doing(|| "duplicate a descriptor")?;
        Ok(Process { record, pidfd, words: Some(words), processes: self.processes.clone() })
    }
}

fn environment() -> Vec<String> {
    // Nothing of the daemon's own; a locale, so that messages are in one language.
    vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".into(), "LC_ALL=C".into()]
}

pub(crate) fn text(path: &std::path::Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::Invalid(format!("path {} is not UTF-8", path.display())))
}

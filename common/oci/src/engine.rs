//! OCI engines: the built-in one and any OCI command line (runc, crun, …).
//!
//! An engine is only ever *run*: by [`Processes`], which becomes the parent of what the engine
//! leaves behind and keeps its exit until somebody has written it down. Between commands nothing
//! of an engine stays in memory. What needs no engine is not done by one: signals go through
//! pidfds, process lists, freezing, limits and statistics through cgroups ([`crate::control`]),
//! and starting or deleting a container of the built-in engine is a connect or an unlink.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use kuasar_host::cgroup::{Layout, Warmer};
use kuasar_host::live::Live;
use serde::Deserialize;
use tokio::io::AsyncReadExt;

use crate::command::{self, Done, Unfinished};
use crate::control::{Control, OnHost};
use crate::observer::Observer;
use crate::place::Place;
use crate::processes::Processes;
use crate::spec::Descriptors;

/// First descriptor behind the standard streams.
pub const FIRST_FD: RawFd = 3;
/// Name of the built-in engine in the configuration.
pub const BUILTIN: &str = "builtin";
/// Name of the built-in engine without its own way of making containers: to compare the two.
pub const LIBCONTAINER: &str = "libcontainer";

/// Whether an engine of this name is built in.
pub fn is_builtin(name: &str) -> bool {
    matches!(name, BUILTIN | LIBCONTAINER)
}

/// One engine of the configuration.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// Program, as an absolute path or a name to be found in `PATH`.
    pub path: PathBuf,
    /// Passes `--systemd-cgroup`.
    #[serde(default)]
    pub systemd_cgroup: bool,
    /// Global arguments in front of the command.
    #[serde(default)]
    pub args: Vec<String>,
}

/// How long engine commands may take.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// `create`, `exec`, `checkpoint` and `restore`.
    #[serde(with = "kuasar_host::duration")]
    pub create: Duration,
    /// Everything else.
    #[serde(with = "kuasar_host::duration")]
    pub other: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { create: Duration::from_secs(60), other: Duration::from_secs(30) }
    }
}

/// What a daemon's configuration says of engines.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Command-line engines by name; none has one of the built-in engine's ([`is_builtin`]).
    pub engines: BTreeMap<String, EngineConfig>,
    /// How long an engine may take.
    pub timeouts: Limits,
    /// For how long after a pod's or a container's creation moves into cgroups are kept fast;
    /// zero: never.
    pub warm_cgroups: Duration,
}

impl Default for Settings {
    /// No command-line engine, and no cgroup is kept warm.
    fn default() -> Self {
        Self { engines: BTreeMap::new(), timeouts: Limits::default(), warm_cgroups: Duration::ZERO }
    }
}

/// What engines run with.
#[derive(Clone)]
pub struct Backend {
    /// Who runs them and reaps what they leave behind.
    pub processes: Arc<dyn Processes>,
    /// Counts at each call as it is then.
    pub settings: Live<Settings>,
    /// Program and first words of the built-in engine's command line, such as
    /// `/proc/N/fd/M oci`; see [`crate::selfexe`]. Without it there is no built-in engine.
    pub builtin: Option<Vec<String>>,
    /// Engines by name that have the built-in one's command line and files, but run something else
    /// in the containers that they make: program and first words, as [`Backend::builtin`].
    pub relatives: BTreeMap<String, Vec<String>>,
    /// Runs execs of the built-in engine in place of a command for each.
    pub execs: Option<Arc<dyn Execs>>,
    /// Is told how long commands took and what ended.
    pub observer: Arc<dyn Observer>,
    /// How running containers are handled.
    pub control: Arc<dyn Control>,
}

impl Backend {
    /// Without a built-in engine and an observer; containers are handled on the host.
    pub fn new(processes: Arc<dyn Processes>, settings: Live<Settings>) -> Self {
        Self {
            processes,
            settings,
            builtin: None,
            relatives: BTreeMap::new(),
            execs: None,
            observer: Arc::new(()),
            control: Arc::new(OnHost),
        }
    }
}

/// Who makes processes of execs from memory: the built-in engine in a process that stays
/// ([`crate::builtin::serve`]).
#[async_trait]
pub trait Execs: Send + Sync {
    /// Does what the built-in engine does with these words, `--root DIR exec …`, and these streams.
    /// Whoever reaps the process is asked for its exit by the cookie [`Left::watched`].
    ///
    /// # Errors
    /// As those of a command.
    async fn exec(
        &self,
        words: Vec<String>,
        streams: [Option<BorrowedFd<'_>>; 3],
        limit: Duration,
    ) -> std::result::Result<Left, Unfinished>;
}

/// All engines of a daemon.
pub struct Engines {
    backend: Backend,
    warmer: OnceLock<Warmer>,
}

impl std::fmt::Debug for Engines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engines").field("settings", &self.backend.settings).finish_non_exhaustive()
    }
}

/// A chosen engine.
#[derive(Debug, Clone)]
pub struct Engine {
    all: Arc<Engines>,
    name: String,
    cli: Option<EngineConfig>,
}

/// Standard streams of a new process.
#[derive(Debug)]
pub enum Streams<'a> {
    /// Standard input, output, error; `None` is `/dev/null`.
    Plain([Option<BorrowedFd<'a>>; 3]),
    /// A terminal whose master comes to this socket.
    Console(&'a Path),
}

/// A process that an engine has left behind.
#[derive(Debug, Clone, Copy)]
pub struct Left {
    /// Its pid.
    pub pid: u32,
    /// For [`Processes::watch`].
    pub since: u64,
    /// The cookie under which it is watched already.
    pub watched: Option<u64>,
}

impl Engines {
    /// The engines of `backend`.
    pub fn new(backend: Backend) -> Self {
        Self { backend, warmer: OnceLock::new() }
    }

    /// What they run with.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// `engine` is about to move processes into cgroups: see [`Warmer`]. Nothing is done for the
    /// built-in one and its relatives: processes that they make enter their group by themselves, or
    /// are in it from the start, and would wait for the first move of ours.
    pub fn expect_moves(&self, layout: &Layout, engine: &str) {
        let enters = engine == BUILTIN || self.backend.relatives.contains_key(engine);
        let span = self.backend.settings.get().warm_cgroups;
        if !enters && !span.is_zero() {
            self.warmer.get_or_init(|| Warmer::new(layout)).keep(span);
        }
    }

    fn limits(&self) -> Limits {
        self.backend.settings.get().timeouts
    }

    /// The engine with this name; otherwise the text names those that there are.
    pub fn get(self: &Arc<Self>, name: &str) -> std::result::Result<Engine, String> {
        let builtin = self.backend.builtin.as_ref();
        if is_builtin(name) && builtin.is_some() {
            return Ok(Engine { all: self.clone(), name: name.into(), cli: None });
        }
        if self.backend.relatives.contains_key(name) {
            return Ok(Engine { all: self.clone(), name: name.into(), cli: None });
        }
        let all = self.backend.settings.get();
        let Some(config) = all.engines.get(name) else {
            let names = builtin.map(|_| BUILTIN).into_iter();
            let names: Vec<_> = names.chain(all.engines.keys().map(String::as_str)).collect();
            return Err(format!("unknown engine {name:?}: configured are {}", names.join(", ")));
        };
        let path = kuasar_host::process::find_program(&config.path).ok_or_else(|| {
            format!("engine {name:?}: program {} is not installed", config.path.display())
        })?;
        let cli = Some(EngineConfig { path, ..config.clone() });
        Ok(Engine { all: self.clone(), name: name.into(), cli })
    }
}

impl Engine {
    /// Its name in the configuration.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is the built-in one, or a relative of it.
    pub fn is_builtin(&self) -> bool {
        self.cli.is_none()
    }

    /// Whether it asks systemd for cgroups.
    pub fn drives_systemd(&self) -> bool {
        self.cli.as_ref().is_some_and(|cli| cli.systemd_cgroup)
    }

    /// How it gets at descriptors named in the spec.
    pub fn descriptors(&self) -> Descriptors {
        if self.is_builtin() { Descriptors::Passed(FIRST_FD) } else { Descriptors::Ours }
    }

    /// Whether it makes containers' processes by itself, so that it wants to know their place.
    pub fn wants_place(&self) -> bool {
        self.all.backend.relatives.contains_key(&self.name)
    }

    /// Creates a container of `bundle`; `passed` are further descriptors, `place` is where its
    /// process is to be, if that is known.
    pub async fn create(
        &self,
        dir: &Path,
        id: &str,
        streams: &Streams<'_>,
        passed: &[BorrowedFd<'_>],
        place: Option<Place>,
    ) -> Result<Left> {
        let mut words = vec!["create".to_owned(), "--bundle".into(), text(dir)?];
        let pid_file = dir.join("init.pid");
        self.process(&mut words, streams, &pid_file)?;
        words.push(id.into());
        self.leave(dir, words, streams, passed, place, &pid_file).await
    }

    /// Runs `command`, which restores a container of `bundle`.
    pub(crate) async fn restore(
        &self,
        dir: &Path,
        id: &str,
        mut command: Vec<String>,
        streams: &Streams<'_>,
    ) -> Result<Left> {
        let pid_file = dir.join("init.pid");
        self.process(&mut command, streams, &pid_file)?;
        command.push(id.into());
        self.leave(dir, command, streams, &[], None, &pid_file).await
    }

    /// Runs a further process; `process` is the file with its description.
    pub async fn exec(
        &self,
        dir: &Path,
        id: &str,
        process: &Path,
        streams: &Streams<'_>,
    ) -> Result<Left> {
        let mut words =
            vec!["exec".to_owned(), "--detach".into(), "--process".into(), text(process)?];
        if let Some(execs) = self.all.backend.execs.as_ref().filter(|_| self.name == BUILTIN) {
            let root = text(&dir.join("engine"))?;
            words.splice(0..0, ["--root".to_owned(), root]);
            let given = match streams {
                Streams::Plain(plain) => *plain,
                Streams::Console(socket) => {
                    words.extend(["--console-socket".into(), text(socket)?]);
                    [None; 3]
                }
            };
            words.push(id.into());
            let left = execs.exec(words, given, self.all.limits().create).await;
            return left.map_err(|unfinished| self.unfinished("exec", unfinished));
        }
        let pid_file = process.with_extension("pid");
        self.process(&mut words, streams, &pid_file)?;
        words.push(id.into());
        let left = self.leave(dir, words, streams, &[], None, &pid_file).await;
        let _ = std::fs::remove_file(&pid_file);
        left
    }

    fn process(
        &self,
        words: &mut Vec<String>,
        streams: &Streams<'_>,
        pid_file: &Path,
    ) -> Result<()> {
        words.extend(["--pid-file".into(), text(pid_file)?]);
        if let Streams::Console(socket) = streams {
            words.extend(["--console-socket".into(), text(socket)?]);
        }
        Ok(())
    }

    async fn leave(
        &self,
        dir: &Path,
        words: Vec<String>,
        streams: &Streams<'_>,
        passed: &[BorrowedFd<'_>],
        place: Option<Place>,
        pid_file: &Path,
    ) -> Result<Left> {
        let mut fds: Vec<Option<BorrowedFd<'_>>> = match streams {
            Streams::Plain(plain) => plain.to_vec(),
            Streams::Console(_) => vec![None, None, None],
        };
        fds.extend(passed.iter().copied().map(Some));
        let limit = self.all.limits().create;
        let Done { since, watched } = self.run_in(dir, words, fds, place, limit).await?;
        let pid = std::fs::read_to_string(pid_file).map_err(|error| {
            Error::internal(format!("engine {} left no pid file", self.name), error)
        })?;
        let pid = pid.trim().parse::<u32>().ok().filter(|pid| *pid > 0).ok_or_else(|| {
            Error::internal(
                format!("engine {} wrote a pid file", self.name),
                format!("not a pid: {pid:?}"),
            )
        })?;
        Ok(Left { pid, since, watched })
    }

    /// Lets a created container run.
    pub async fn start(&self, dir: &Path, id: &str, has_hooks: bool) -> Result<()> {
        if self.is_builtin() && !has_hooks {
            let limit = self.all.limits().other;
            let reason = executed(id, start_builtin(dir, id)?, limit).await;
            return reason.map_or(Ok(()), |reason| Err(self.failed("start", &reason)));
        }
        self.run(dir, vec!["start".into(), id.into()], Vec::new(), self.all.limits().other)
            .await
            .map(drop)
    }

    /// Removes the engine's state of a container whose processes are gone. Idempotent.
    pub async fn delete(&self, dir: &Path, id: &str, has_hooks: bool) -> Result<()> {
        let state = dir.join("engine").join(id);
        if !state.exists() {
            return Ok(());
        }
        if self.is_builtin() && !has_hooks {
            return std::fs::remove_dir_all(&state)
                .map_err(|error| Error::internal(format!("remove {}", state.display()), error));
        }
        let words = vec!["delete".into(), "--force".into(), id.into()];
        self.run(dir, words, Vec::new(), self.all.limits().other).await.map(drop)
    }

    /// Any other command of a command-line engine (checkpoint, restore).
    pub async fn command(&self, dir: &Path, words: Vec<String>) -> Result<()> {
        self.run(dir, words, Vec::new(), self.all.limits().create).await.map(drop)
    }

    async fn run(
        &self,
        dir: &Path,
        words: Vec<String>,
        fds: Vec<Option<BorrowedFd<'_>>>,
        limit: Duration,
    ) -> Result<Done> {
        self.run_in(dir, words, fds, None, limit).await
    }

    /// Runs the engine and waits for its end.
    async fn run_in(
        &self,
        dir: &Path,
        words: Vec<String>,
        fds: Vec<Option<BorrowedFd<'_>>>,
        place: Option<Place>,
        limit: Duration,
    ) -> Result<Done> {
        let verb = words.first().cloned().unwrap_or_default();
        let log = dir.join("engine.log");
        let mut argv = match &self.cli {
            // An engine without a command line is only made where there is a built-in one.
            None => {
                let backend = &self.all.backend;
                let relative = backend.relatives.get(&self.name);
                let mut argv = relative.or(backend.builtin.as_ref()).cloned().unwrap_or_default();
                if self.name == LIBCONTAINER {
                    argv.push("--libcontainer".into());
                }
                argv
            }
            Some(cli) => {
                let mut argv = vec![text(&cli.path)?];
                argv.extend(cli.args.iter().cloned());
                argv.extend(["--log-format".into(), "json".into()]);
                if cli.systemd_cgroup {
                    argv.push("--systemd-cgroup".into());
                }
                argv
            }
        };
        argv.extend(["--root".into(), text(&dir.join("engine"))?, "--log".into(), text(&log)?]);
        argv.extend(words);
        let fds = if fds.is_empty() { vec![None, None, None] } else { fds };
        let processes = &self.all.backend.processes;
        command::run_in(processes, argv, fds, place, &log, limit)
            .await
            .map_err(|unfinished| self.unfinished(&verb, unfinished))
    }

    fn unfinished(&self, verb: &str, unfinished: Unfinished) -> Error {
        match unfinished {
            Unfinished::Failed(reason) => self.failed(verb, &reason),
            Unfinished::Spawn(error) => Error::internal(format!("run engine {}", self.name), error),
            Unfinished::Wait(error) => Error::internal("wait for the engine", error),
            Unfinished::Late(limit) => Error::DeadlineExceeded(format!(
                "engine {} did not finish {verb} within {limit:?}",
                self.name
            )),
        }
    }

    /// What `verb` could not be done for, in the engine's words.
    fn failed(&self, verb: &str, reason: &str) -> Error {
        // The image or the pod asks for a command that is not there: not the node's fault.
        let theirs = [
            "executable file not found",
            "no such file or directory",
            "permission denied",
            "is a directory",
        ];
        // What a relative runs is a file of the image, and this is how it begins to speak of it; what the host
        // could not do for it has an errno.
        let programs =
            self.all.backend.relatives.contains_key(&self.name) && !reason.contains("(os error ");
        let words = theirs.iter().any(|words| reason.contains(words));
        if reason.contains("exec: ") && (programs || words) {
            return Error::InvalidArgument(format!(
                "OCI runtime {verb} failed: {}: {reason}",
                self.name
            ));
        }
        Error::internal(format!("OCI runtime {verb} failed"), format!("{}: {reason}", self.name))
    }
}

fn text(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::InvalidArgument(format!("path {} is not UTF-8", path.display())))
}

/// The built-in engine's start: its init process waits in `accept` on `notify.sock`.
fn start_builtin(dir: &Path, id: &str) -> Result<std::os::unix::net::UnixStream> {
    use std::io::Write;
    let state = dir.join("engine").join(id);
    let wrap = |error: std::io::Error| {
        Error::internal(format!("start container {id}: its init process does not wait"), error)
    };
    // Reached through a descriptor: a socket's path may only have 107 bytes.
    let handle = std::fs::File::open(&state).map_err(wrap)?;
    let socket = format!("/proc/self/fd/{}/notify.sock", handle.as_raw_fd());
    let mut stream = std::os::unix::net::UnixStream::connect(socket).map_err(wrap)?;
    stream.write_all(b"start container").map_err(wrap)?;
    stream.shutdown(std::net::Shutdown::Write).map_err(wrap)?;
    // The state file is for people with `oci state`; we do not read it.
    let path = state.join("state.json");
    if let Ok(text) = std::fs::read_to_string(&path) {
        let running = text.replacen("\"status\":\"created\"", "\"status\":\"running\"", 1);
        let _ = std::fs::write(&path, running);
    }
    Ok(stream)
}

/// Most bytes of what an init says that cannot become its program.
const MAX_REASON: usize = 4096;

/// Waits until a started init has become its program: its end of the connection goes with the
/// execve. Before that a signal would meet the engine, as process 1 of its namespace without a
/// handler, and be lost; whoever starts and then stops a container means the program. An init that
/// is not there within `limit` (a frozen one) is started all the same. Answers why it could not become its
/// program, where it says that; these are words from inside of the container.
async fn executed(
    id: &str,
    stream: std::os::unix::net::UnixStream,
    limit: Duration,
) -> Option<String> {
    let mut said = Vec::new();
    let wait = async {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let mut stream = stream.take(MAX_REASON as u64);
        stream.read_to_end(&mut said).await
    };
    match tokio::time::timeout(limit, wait).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::debug!(container = id, %error, "cannot wait for its execve"),
        Err(_) => tracing::debug!(container = id, "its init has not become the program yet"),
    }
    Some(command::one_line(&String::from_utf8_lossy(&said))).filter(|words| !words.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_start_is_answered_when_the_init_has_become_its_program() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("engine/c");
        std::fs::create_dir_all(&state).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(state.join("notify.sock")).unwrap();
        let stream = start_builtin(dir.path(), "c").unwrap();
        let (theirs, _) = listener.accept().unwrap();
        let mut said = String::new();
        std::io::Read::read_to_string(&mut &theirs, &mut said).unwrap();
        assert_eq!(said, "start container");
        let limit = Duration::from_secs(30);
        let start = tokio::spawn(async move { executed("c", stream, limit).await });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!start.is_finished(), "its init is the engine still");
        drop(theirs);
        assert_eq!(start.await.unwrap(), None);
        // One that never gets there is not waited for beyond the limit.
        let stream = start_builtin(dir.path(), "c").unwrap();
        let (_theirs, _) = listener.accept().unwrap();
        assert_eq!(executed("c", stream, Duration::from_millis(1)).await, None);
        // One that cannot get there says why, in one line.
        let stream = start_builtin(dir.path(), "c").unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut theirs, b"exec: no \nmodule\n").unwrap();
        drop(theirs);
        let said = executed("c", stream, limit).await;
        assert_eq!(said.as_deref(), Some("exec: no module"));
    }
}

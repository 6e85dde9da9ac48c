//! Containers of one pod: the [`Runtime`] behind the pod's Task server.
//!
//! Nothing about a container is held in memory. What is needed later is in
//! `<sandbox>/containers/<id>/meta.json`, beside the edited `config.json` and the engine's state:
//! a daemon that starts again has lost nothing, and a hundred idle containers cost nothing.
//!
//! Exits come from [`Processes`]. The handle of a process in the Task server's journal is the
//! cookie under which its exit is kept until [`Runtime::exit_recorded`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use containerd_task::host::{blocking, internal, remove_dir};
use containerd_task::runtime::{
    AnyMessage, CreateContainer, Exit, ProcessIo, ProcessRef, Runtime, Spawned, StatsFlavor,
};
use futures::future::BoxFuture;
use kuasar_host::cgroup::Layout;
use kuasar_host::mount::IdMap;
use kuasar_host::spec::set_terminal;
use kuasar_host::{inside, process, record};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint;
use crate::console::Console;
use crate::control::{CGROUP_DEADLINE, Control, Target};
use crate::engine::{Engine, Engines, FIRST_FD, Left, Streams};
use crate::mapping::{Mapping, host_id};
use crate::observer::Observer;
use crate::payloads::{Candidate, Payloads};
use crate::place::{self, Place};
use crate::pod::Pod;
use crate::processes::{Processes, new_cookie};
use crate::spec;

/// What a container's later calls need.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Meta {
    engine: String,
    /// Whether hooks want the engine itself to start and delete.
    hooks: bool,
    /// `linux.cgroupsPath` as the engine got it.
    cgroup: String,
    /// Where the rootfs is mounted.
    rootfs: Option<PathBuf>,
    pid: u32,
    /// Until it has gone on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    restore: Option<Restore>,
}

/// Where a container is to go on from.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Restore {
    bundle: PathBuf,
    checkpoint: PathBuf,
}

/// A container before its engine has run.
struct Prepared {
    meta: Meta,
    /// Descriptors of the pod to pass on.
    passed: Vec<i32>,
    /// The edited spec.
    spec: Value,
}

/// The containers of one pod.
pub struct Containers {
    pod: Arc<Pod>,
    engines: Arc<Engines>,
    cgroups: Arc<Layout>,
    payloads: Option<Arc<dyn Payloads>>,
}

impl Containers {
    /// The containers of `pod`.
    pub fn new(pod: Arc<Pod>, engines: Arc<Engines>, cgroups: Arc<Layout>) -> Self {
        Self { pod, engines, cgroups, payloads: None }
    }

    /// The same; `payloads` says for each container which engine makes it.
    pub fn with_payloads(self, payloads: Arc<dyn Payloads>) -> Self {
        Self { payloads: Some(payloads), ..self }
    }

    fn processes(&self) -> &Arc<dyn Processes> {
        &self.engines.backend().processes
    }

    fn observer(&self) -> &Arc<dyn Observer> {
        &self.engines.backend().observer
    }

    fn control(&self) -> &dyn Control {
        self.engines.backend().control.as_ref()
    }

    fn engine(&self, name: &str) -> Result<Engine> {
        self.engines.get(name).map_err(Error::FailedPrecondition)
    }

    fn meta(&self, id: &str) -> Result<Meta> {
        let path = self.pod.container(id).join("meta.json");
        let text = std::fs::read(&path)
            .map_err(|_| Error::NotFound(format!("container {id} does not exist")))?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::internal(format!("read {}", path.display()), error))
    }

    fn target<'a>(&'a self, id: &'a str, dir: &'a Path, meta: &'a Meta) -> Target<'a> {
        Target {
            id,
            dir,
            pid: meta.pid,
            cgroup: &meta.cgroup,
            engine: &meta.engine,
            engines: &self.engines,
            layout: &self.cgroups,
        }
    }

    /// Follows a process that an engine has left behind.
    async fn follow(&self, left: Left) -> Result<(u64, BoxFuture<'static, Exit>)> {
        let cookie = left.watched.unwrap_or_else(new_cookie);
        if left.watched.is_none() {
            self.processes()
                .watch(left.pid, left.since, cookie)
                .await
                .map_err(|error| Error::internal("watch the process", error))?;
        }
        Ok((cookie, self.exit_of(cookie, left.pid)))
    }

    /// The exit of a process. If who reaps it is lost, the process itself is watched, and how it
    /// ended is not known.
    fn exit_of(&self, cookie: u64, pid: u32) -> BoxFuture<'static, Exit> {
        let (processes, observer) = (self.processes().clone(), self.observer().clone());
        Box::pin(async move {
            if let Ok(exit) = processes.exit_of(cookie).await {
                observer.exit();
                return exit;
            }
            if let Ok(pidfd) = process::pidfd_open(pid) {
                // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
                let ready = unsafe { tokio::io::unix::AsyncFd::register(pidfd) };
                if let Ok(ready) = ready {
                    let _ = ready.readable().await;
                }
            }
            observer.exit();
            Exit { status: 255, at: SystemTime::now() }
        })
    }

    /// Prepares bundle, rootfs and spec; synchronous work in one go. `edited` gets the container's
    /// directory and its spec, before the rootfs is there.
    fn prepare(
        observer: &dyn Observer,
        pod: &Pod,
        engine: &Engine,
        request: &CreateContainer,
        terminal: Option<Option<(u16, u16)>>,
        edited: impl FnOnce(&Path, &Value) -> Result<()>,
    ) -> Result<Prepared> {
        let dir = pod.container(&request.id);
        record::private_dir(&dir.join("engine"))
            .map_err(internal("make the container's directory"))?;
        let rootfs = request.bundle.join("rootfs");
        let (value, passed, cgroup) =
            Self::spec(pod, engine, &request.id, &request.bundle, terminal)?;
        let hooks = value.pointer("/hooks").and_then(Value::as_object);
        let meta = Meta {
            engine: engine.name().into(),
            hooks: hooks.is_some_and(|hooks| {
                hooks.contains_key("poststart") || hooks.contains_key("poststop")
            }),
            cgroup,
            rootfs: (!request.rootfs.is_empty()).then(|| rootfs.clone()),
            pid: 0,
            restore: request.checkpoint.as_ref().map(|checkpoint| Restore {
                bundle: request.bundle.clone(),
                checkpoint: checkpoint.clone(),
            }),
        };
        // From here on it is known what is to be undone.
        save(&dir, &meta)?;
        edited(&dir, &value)?;
        if !request.rootfs.is_empty() {
            let begun = Instant::now();
            let scratch = dir.join("layers");
            let map = pod.namespaces.user.as_ref();
            let map = map.map(|user| IdMap { userns: user.as_fd(), scratch: &scratch });
            kuasar_host::mount::mount_all_mapped(&request.rootfs, &rootfs, map)
                .map_err(internal("mount the rootfs"))?;
            observer.phase("rootfs", begun.elapsed());
        }
        let root =
            value.pointer("/root/path").and_then(Value::as_str).map_or(rootfs.as_path(), Path::new);
        if !root.is_dir() {
            return Err(Error::InvalidArgument(format!(
                "rootfs {} is no directory",
                root.display()
            )));
        }
        make_cwd(&value, &rootfs, pod.namespaces.user.is_some());
        Ok(Prepared { meta, passed, spec: value })
    }

    /// The spec as the engine gets it, the descriptors to pass on and the path of the cgroup.
    fn spec(
        pod: &Pod,
        engine: &Engine,
        id: &str,
        bundle: &Path,
        terminal: Option<Option<(u16, u16)>>,
    ) -> Result<(Value, Vec<i32>, String)> {
        let dir = pod.container(id);
        let mut loaded = kuasar_host::spec::Spec::load(&bundle.join("config.json"))
            .map_err(internal("read the bundle"))?;
        let rootfs = bundle.join("rootfs");
        let mut value = Value::Object(std::mem::take(loaded.value_mut()));
        let (files, shm) = (pod.dir.as_path(), pod.shm());
        let passed = spec::edit(&mut value, &pod.spec(files, &shm), &rootfs, engine.descriptors())
            .map_err(Error::InvalidArgument)?;
        if let Some(process) = value.get_mut("process").and_then(Value::as_object_mut) {
            set_terminal(process, terminal.is_some(), terminal.flatten());
        }
        if !engine.is_builtin() {
            checkpoint::annotate(&mut value, &dir);
        }
        let cgroup = cgroup_path(&mut value, pod, id, engine)?;
        Ok((value, passed, cgroup))
    }

    /// The engine's first process of a container that goes on from a checkpoint.
    async fn restore_inner(&self, container: &str, io: &ProcessIo) -> Result<Spawned> {
        let mut meta = self.meta(container)?;
        let from = meta.restore.clone().ok_or_else(|| {
            Error::FailedPrecondition(format!("container {container} is from no checkpoint"))
        })?;
        let engine = self.engine(&meta.engine)?;
        checkpoint::possible(&engine)?;
        self.engines.expect_moves(&self.cgroups, engine.name());
        let dir = self.pod.container(container);
        let given = match io {
            ProcessIo::Streams { stdin, stdout, stderr } => {
                [stdin, stdout, stderr].map(Option::is_some)
            }
            ProcessIo::Terminal { .. } => [true; 3],
        };
        let (pod, id, terminal) = (self.pod.clone(), container.to_owned(), terminal_of(io));
        let (engine_too, at) = (engine.clone(), dir.clone());
        let command = blocking(move || {
            // Anew: it names descriptors of this very process.
            let (value, ..) = Self::spec(&pod, &engine_too, &id, &from.bundle, terminal)?;
            write_spec(&at, &value)?;
            checkpoint::restore(&at, &from.checkpoint, given)
        })
        .await?;
        let begun = Instant::now();
        let made = match io {
            ProcessIo::Streams { stdin, stdout, stderr } => {
                let streams = plain(stdin, stdout, stderr);
                engine.restore(&dir, container, command, &streams).await.map(|left| (left, None))
            }
            ProcessIo::Terminal { size } => {
                let console = Console::listen(&self.pod.dir)?;
                let streams = Streams::Console(console.path());
                match engine.restore(&dir, container, command, &streams).await {
                    Ok(left) => Ok((left, Some(console.master(*size)?))),
                    Err(error) => Err(error),
                }
            }
        };
        let (left, master) =
            made.map_err(|error| explained(error, &dir, "restore.log", "CRIU's restore"))?;
        self.observer().phase("engine_restore", begun.elapsed());
        meta.pid = left.pid;
        meta.restore = None;
        save(&dir, &meta)?;
        let (handle, exit) = self.follow(left).await?;
        Ok(Spawned { pid: left.pid, handle, terminal: master, exit })
    }

    /// Undoes a create; errors only slow down who comes later, so they are logged.
    async fn undo(&self, id: &str) {
        if let Err(error) = self.delete(id, Path::new("")).await {
            tracing::warn!(container = id, error = %error.chain(), "cannot clean up after a failed create");
        }
    }

    /// Asks which engine makes a container, and records it; answers further descriptors for it.
    async fn choose(
        &self,
        payloads: &dyn Payloads,
        request: &CreateContainer,
        terminal: Option<Option<(u16, u16)>>,
        prepared: &mut Prepared,
    ) -> Result<(Engine, Vec<OwnedFd>)> {
        let Prepared { meta, passed, spec } = prepared;
        let rootfs = spec.pointer("/root/path").and_then(Value::as_str).unwrap_or_default();
        let candidate = Candidate {
            id: request.id.clone(),
            pod: self.pod.clone(),
            rootfs: PathBuf::from(rootfs),
            mounts: request.rootfs.clone(),
            descriptor: FIRST_FD + i32::try_from(passed.len()).unwrap_or_default(),
        };
        let chosen = payloads.choose(&candidate, spec).await?;
        let engine = self.engine(&chosen.engine)?;
        // What is recorded already removes whatever an engine of the same kind has made.
        let other_kind = engine.is_builtin() != self.engine(&meta.engine)?.is_builtin();
        meta.engine = chosen.engine;
        if !engine.is_builtin() {
            // A command line gets at descriptors in another way than the engine that it was prepared for.
            (*spec, *passed, meta.cgroup) =
                Self::spec(&self.pod, &engine, &request.id, &request.bundle, terminal)?;
        }
        // Small files in memory: not worth another thread.
        let dir = self.pod.container(&request.id);
        write_spec(&dir, spec)?;
        if other_kind {
            save(&dir, meta)?;
        }
        Ok((engine, chosen.descriptors))
    }

    async fn create_inner(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        let engine = self.engine(&self.pod.engine)?;
        self.engines.expect_moves(&self.cgroups, engine.name());
        let (pod, wanted, observer) = (self.pod.clone(), request.clone(), self.observer().clone());
        let (terminal, engine_too) = (terminal_of(&io), engine.clone());
        // Whichever engine is chosen, its group is the same one, and is made beside the rest.
        let cgroups = self.payloads.is_some().then(|| self.cgroups.clone());
        let is_final = self.payloads.is_none();
        let (prepared, place) = blocking(move || {
            let mut place = None;
            let edited = |dir: &Path, spec: &Value| {
                if let Some(cgroups) = cgroups {
                    place = Place::begin(spec, &cgroups)
                        .map_err(|error| Error::internal("the container's cgroup", error))?;
                }
                if is_final { write_spec(dir, spec) } else { Ok(()) }
            };
            let (pod, engine) = (pod.as_ref(), &engine_too);
            let prepared = Self::prepare(observer.as_ref(), pod, engine, &wanted, terminal, edited);
            Ok((prepared, place))
        })
        .await?;
        let chosen = async {
            let mut prepared = prepared?;
            let (engine, more) = match &self.payloads {
                Some(payloads) => {
                    self.choose(payloads.as_ref(), request, terminal, &mut prepared).await?
                }
                None => (engine, Vec::new()),
            };
            Ok((prepared, engine, more))
        };
        let chosen = chosen.await;
        let makes_it = chosen.as_ref().is_ok_and(|(_, engine, _)| engine.wants_place());
        let (place, unused) = if makes_it { (place, None) } else { (None, place) };
        // Who undoes it, or goes on without the place, finds the whole group.
        let made = place::made(unused).await;
        let (prepared, engine, more) = chosen?;
        made.map_err(|error| Error::internal("the container's cgroup", error))?;
        self.run_created(request, &io, prepared, (&engine, &more, place)).await
    }

    /// Has the engine make what is prepared, with further descriptors and at this place.
    async fn run_created(
        &self,
        request: &CreateContainer,
        io: &ProcessIo,
        prepared: Prepared,
        (engine, more, place): (&Engine, &[OwnedFd], Option<Place>),
    ) -> Result<Spawned> {
        let Prepared { mut meta, passed, .. } = prepared;
        let dir = self.pod.container(&request.id);
        // SAFETY: they belong to `self.pod`, which outlives this borrow.
        let passed: Vec<_> =
            passed.iter().map(|fd| unsafe { BorrowedFd::borrow_raw(*fd) }).collect();
        let passed: Vec<_> = passed.into_iter().chain(more.iter().map(AsFd::as_fd)).collect();
        let begun = Instant::now();
        let (left, master) = match io {
            ProcessIo::Streams { stdin, stdout, stderr } => {
                let streams = plain(stdin, stdout, stderr);
                (engine.create(&dir, &request.id, &streams, &passed, place).await?, None)
            }
            ProcessIo::Terminal { size } => {
                let console = Console::listen(&self.pod.dir)?;
                let streams = Streams::Console(console.path());
                let left = engine.create(&dir, &request.id, &streams, &passed, place).await?;
                (left, Some(console.master(*size)?))
            }
        };
        self.observer().phase("engine_create", begun.elapsed());
        meta.pid = left.pid;
        let pid = left.pid;
        // The record is written while sandbox-parent is asked.
        let (followed, saved) = tokio::join!(self.follow(left), async { save(&dir, &meta) });
        saved?;
        let (handle, exit) = followed?;
        Ok(Spawned { pid, handle, terminal: master, exit })
    }
}

/// Adds to an engine's error what CRIU has left in its log.
fn explained(error: Error, dir: &Path, log: &str, what: &str) -> Error {
    match (error, checkpoint::reason(dir, log)) {
        (Error::Internal { context, source }, Some(reason)) => {
            Error::internal(context, format!("{source}; {what}: {reason}"))
        }
        (error, _) => error,
    }
}

fn write_spec(dir: &Path, spec: &Value) -> Result<()> {
    let text =
        serde_json::to_vec(spec).map_err(|error| Error::internal("write the spec", error))?;
    record::write_file(&dir.join("config.json"), &text, 0o600).map_err(internal("write the spec"))
}

fn save(dir: &Path, meta: &Meta) -> Result<()> {
    let text =
        serde_json::to_vec(meta).map_err(|error| Error::internal("write meta.json", error))?;
    record::write_file(&dir.join("meta.json"), &text, 0o600).map_err(internal("write meta.json"))
}

fn terminal_of(io: &ProcessIo) -> Option<Option<(u16, u16)>> {
    match io {
        ProcessIo::Streams { .. } => None,
        ProcessIo::Terminal { size } => Some(*size),
    }
}

fn plain<'a>(
    stdin: &'a Option<OwnedFd>,
    stdout: &'a Option<OwnedFd>,
    stderr: &'a Option<OwnedFd>,
) -> Streams<'a> {
    Streams::Plain([stdin, stdout, stderr].map(|fd| fd.as_ref().map(AsFd::as_fd)))
}

/// The container's cgroup path; written into a spec that has none. For an engine that drives
/// cgroupfs, systemd's `slice:prefix:name` becomes the directory that systemd would use.
fn cgroup_path(spec: &mut Value, pod: &Pod, id: &str, engine: &Engine) -> Result<String> {
    let linux = spec
        .get_mut("linux")
        .and_then(Value::as_object_mut)
        .ok_or_else(|| Error::InvalidArgument("config.json has no linux section".into()))?;
    let given = linux.get("cgroupsPath").and_then(Value::as_str).unwrap_or_default();
    let path = if given.is_empty() { format!("/kuasar/{}/{id}", pod.id) } else { given.to_owned() };
    let path =
        if engine.drives_systemd() { path } else { kuasar_host::cgroup::expand_systemd(&path) };
    linux.insert("cgroupsPath".into(), json!(path));
    Ok(path)
}

/// runc makes a missing working directory, libcontainer does not. It is the container's root's, whom
/// the spec of a pod with a user namespace names where we are the ones to make it. One that cannot be made
/// is explained by who goes there.
fn make_cwd(spec: &Value, rootfs: &Path, user: bool) {
    let Some(cwd) = spec.pointer("/process/cwd").and_then(Value::as_str) else { return };
    let root = |at: &str| host_id(&Vec::<Mapping>::deserialize(spec.pointer(at)?).ok()?, 0);
    let owner = root("/linux/uidMappings").zip(root("/linux/gidMappings"));
    if user && owner.is_none() {
        return;
    }
    let Ok(root) = std::fs::File::open(rootfs) else { return };
    if let Err(error) = inside::target_of(&root, Path::new(cwd), inside::Want::Directory, owner) {
        tracing::debug!(error, "cannot make the working directory");
    }
}

#[async_trait]
impl Runtime for Containers {
    async fn create(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        let begun = Instant::now();
        let result = self.create_inner(request, io).await;
        if result.is_err() {
            self.undo(&request.id).await;
        }
        self.observer().phase("task_create", begun.elapsed());
        result
    }

    async fn prepare_restore(&self, request: &CreateContainer) -> Result<()> {
        let engine = self.engine(&self.pod.engine)?;
        checkpoint::possible(&engine)?;
        let (pod, wanted, observer) = (self.pod.clone(), request.clone(), self.observer().clone());
        let result = blocking(move || {
            checkpoint::check(wanted.checkpoint.as_deref().unwrap_or(Path::new("")))?;
            let terminal = wanted.terminal.then_some(None);
            let edited = |dir: &Path, spec: &Value| write_spec(dir, spec);
            Self::prepare(observer.as_ref(), &pod, &engine, &wanted, terminal, edited).map(drop)
        })
        .await;
        if result.is_err() {
            self.undo(&request.id).await;
        }
        result
    }

    async fn restore(&self, container: &str, io: ProcessIo) -> Result<Spawned> {
        self.restore_inner(container, &io).await
    }

    async fn start(&self, container: &str, _pid: u32) -> Result<()> {
        let called = Instant::now();
        let meta = self.meta(container)?;
        let begun = Instant::now();
        let engine = self.engine(&meta.engine)?;
        engine.start(&self.pod.container(container), container, meta.hooks).await?;
        self.observer().phase("engine_start", begun.elapsed());
        self.observer().phase("task_start", called.elapsed());
        Ok(())
    }

    async fn exec(
        &self,
        container: &str,
        exec: &str,
        spec: &[u8],
        io: ProcessIo,
    ) -> Result<Spawned> {
        let meta = self.meta(container)?;
        if let Some(payloads) = &self.payloads {
            payloads.check_exec(&meta.engine)?;
        }
        let engine = self.engine(&meta.engine)?;
        let dir = self.pod.container(container);
        let mut value: serde_json::Map<String, Value> = serde_json::from_slice(spec)
            .map_err(|error| Error::InvalidArgument(format!("the exec's process: {error}")))?;
        spec::plain_process(&mut value).map_err(Error::InvalidArgument)?;
        let terminal = terminal_of(&io);
        set_terminal(&mut value, terminal.is_some(), terminal.flatten());
        let text = serde_json::to_vec(&value).map_err(|error| Error::internal("exec", error))?;
        let file = dir.join(format!("exec-{exec}.json"));
        record::write_file(&file, &text, 0o600).map_err(internal("write the exec's process"))?;
        let begun = Instant::now();
        let result = async {
            match &io {
                ProcessIo::Streams { stdin, stdout, stderr } => {
                    let streams = plain(stdin, stdout, stderr);
                    Ok((engine.exec(&dir, container, &file, &streams).await?, None))
                }
                ProcessIo::Terminal { size } => {
                    let console = Console::listen(&self.pod.dir)?;
                    let streams = Streams::Console(console.path());
                    let left = engine.exec(&dir, container, &file, &streams).await?;
                    Ok((left, Some(console.master(*size)?)))
                }
            }
        }
        .await;
        let _ = std::fs::remove_file(&file);
        let (left, terminal) = result?;
        self.observer().phase("engine_exec", begun.elapsed());
        let (handle, exit) = self.follow(left).await?;
        Ok(Spawned { pid: left.pid, handle, terminal, exit })
    }

    async fn kill(&self, process: &ProcessRef, signal: i32, all: bool) -> Result<()> {
        let id = &process.container;
        let (meta, dir) = (self.meta(id)?, self.pod.container(id));
        let target = self.target(id, &dir, &meta);
        if all {
            return self.control().kill_all(&target, signal).await;
        }
        self.control().kill(&target, process, signal).await
    }

    async fn delete(&self, container: &str, _bundle: &Path) -> Result<()> {
        let dir = self.pod.container(container);
        if !dir.exists() {
            return Ok(());
        }
        let Ok(meta) = self.meta(container) else {
            return blocking(move || {
                // Layers of a rootfs, when a daemon died while it mounted them.
                kuasar_host::mount::unmount_below(&dir).map_err(internal("unmount layers"))?;
                remove_dir(&dir)
            })
            .await;
        };
        // Processes that the init of a shared PID namespace, or of the host's, has left behind.
        let cgroup = self.cgroups.group(&meta.cgroup).ok();
        if let Some(cgroup) = &cgroup {
            let _ = cgroup.signal_all(libc::SIGKILL);
        }
        if let Ok(engine) = self.engine(&meta.engine) {
            engine.delete(&dir, container, meta.hooks).await?;
        }
        blocking(move || {
            if let Some(cgroup) = &cgroup {
                cgroup.remove(CGROUP_DEADLINE).map_err(internal("remove the cgroup"))?;
            }
            if let Some(rootfs) = &meta.rootfs {
                kuasar_host::mount::unmount_below(rootfs)
                    .map_err(internal("unmount the rootfs"))?;
            }
            remove_dir(&dir)
        })
        .await
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        let (meta, dir) = (self.meta(container)?, self.pod.container(container));
        let pids = self.control().pids(&self.target(container, &dir, &meta)).await?;
        // containerd takes an empty list for a leaked shim.
        Ok(if pids.is_empty() { vec![meta.pid] } else { pids })
    }

    async fn pause(&self, container: &str) -> Result<()> {
        let (meta, dir) = (self.meta(container)?, self.pod.container(container));
        self.control().pause(&self.target(container, &dir, &meta)).await
    }

    async fn resume(&self, container: &str) -> Result<()> {
        let (meta, dir) = (self.meta(container)?, self.pod.container(container));
        self.control().resume(&self.target(container, &dir, &meta)).await
    }

    async fn checkpoint(
        &self,
        container: &str,
        path: &Path,
        options: Option<AnyMessage>,
    ) -> Result<()> {
        let meta = self.meta(container)?;
        let engine = self.engine(&meta.engine)?;
        checkpoint::possible(&engine)?;
        let dir = self.pod.container(container);
        let (command, image, notes) = checkpoint::dump(&dir, container, meta.pid, path, options)?;
        engine
            .command(&dir, command)
            .await
            .map_err(|error| explained(error, &dir, "dump.log", "CRIU's dump"))?;
        checkpoint::finish(&image, &notes)
    }

    async fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        let (meta, dir) = (self.meta(container)?, self.pod.container(container));
        self.control().update(&self.target(container, &dir, &meta), resources).await
    }

    async fn stats(&self, container: &str, flavor: StatsFlavor) -> Result<AnyMessage> {
        let (meta, dir) = (self.meta(container)?, self.pod.container(container));
        self.control().stats(&self.target(container, &dir, &meta), flavor).await
    }

    async fn oom_watch(&self, container: &str) -> Option<OwnedFd> {
        let (meta, dir) = (self.meta(container).ok()?, self.pod.container(container));
        self.control().oom_watch(&self.target(container, &dir, &meta)).await
    }

    fn oom_kills(&self, container: &str) -> u64 {
        let Ok(meta) = self.meta(container) else { return 0 };
        let dir = self.pod.container(container);
        self.control().oom_kills(&self.target(container, &dir, &meta))
    }

    async fn reattach(&self, process: &ProcessRef) -> Result<Option<BoxFuture<'static, Exit>>> {
        let watched = self
            .processes()
            .watched()
            .await
            .map_err(|error| Error::internal("ask which processes are watched", error))?;
        Ok(watched.contains(&process.handle).then(|| self.exit_of(process.handle, process.pid)))
    }

    async fn existing(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.pod.dir.join("containers")).into_iter().flatten();
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    async fn exit_recorded(&self, process: &ProcessRef) {
        self.processes().acknowledge(process.handle).await;
    }
}

#[cfg(test)]
#[cfg(all(feature = "builtin", feature = "parent"))]
#[path = "runtime_tests.rs"]
mod tests;

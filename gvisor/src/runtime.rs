//! Containers of one pod's sandbox: the [`Runtime`] behind the pod's Task server.
//!
//! `runsc` makes a container; everything after that is a call to the sentry ([`crate::sentry`]).
//! No process of `runsc` stays to wait for a container's or an exec's end. Instead a call "tell
//! me when it ends" is open on a connection of which sandbox-parent keeps a duplicate, and the
//! answer is looked at without being taken off the socket: a daemon that is killed at any moment
//! finds it again, until the end is in the journal and the connection is given up.
//!
//! gVisor takes a container's streams when it starts it, containerd gives them when it creates
//! it. Meanwhile sandbox-parent keeps them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use containerd_task::host::{blocking, internal, remove_dir};
use containerd_task::runtime::{
    AnyMessage, CreateContainer, Exit, ProcessIo, ProcessRef, Runtime, Spawned, StatsFlavor,
};
use futures::future::BoxFuture;
use kuasar_host::cgroup::{Cgroup, Layout};
use kuasar_host::process::{self, Identity};
use kuasar_host::record;
use kuasar_oci::console::Console;
use kuasar_oci::observer::Observer;
use kuasar_oci::pod::Pod;
use kuasar_pod::Metrics;
use sandbox_parent::client::Parent;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use crate::cli::{Own, Runsc};
use crate::sentry::{Receiver, Sentry, status};
use crate::urpc::{CallError, Connection};
use crate::{spec, stats};

/// Name of the root container's record beside those of containers; no container has such an id.
pub const ROOT: &str = "@sandbox";
/// How long a gofer may take to end after its container.
const GOFER: Duration = Duration::from_secs(2);
/// How long a cgroup may take to lose its killed processes.
const CGROUP_DEADLINE: Duration = Duration::from_secs(5);
/// Status of whatever ran in a sandbox that was killed.
const KILLED: u32 = 137;

/// What a container's later calls need.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Meta {
    /// `linux.cgroupsPath`: of the container's own cgroup, in which nothing runs.
    pub(crate) cgroup: String,
    /// Where the rootfs is mounted.
    pub(crate) rootfs: Option<PathBuf>,
    /// Name of its exit.
    pub(crate) handle: u64,
    /// It has a terminal, so gVisor has made it already.
    pub(crate) terminal: bool,
    /// It was started.
    pub(crate) started: bool,
    /// Its gofer.
    pub(crate) gofer: Option<Identity>,
    /// What it is to go on from.
    pub(crate) checkpoint: Option<PathBuf>,
}

type Streams = [Option<OwnedFd>; 3];

/// A container, while somebody waits for its end.
#[derive(Debug)]
struct Live {
    exit: watch::Sender<Option<Exit>>,
    /// Until it starts.
    streams: Option<Streams>,
}

/// The containers of one pod.
pub struct Containers {
    pub(crate) pod: Arc<Pod>,
    pub(crate) own: Own,
    pub(crate) runsc: Arc<Runsc>,
    /// Held while the sandbox itself is made to run.
    pub(crate) root: tokio::sync::Mutex<()>,
    cgroups: Arc<Layout>,
    live: Mutex<BTreeMap<String, Live>>,
    /// Exits that a recovery has taken up.
    reattached: Mutex<BTreeSet<u64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn parent_error(
    what: &str,
) -> impl FnOnce(sandbox_parent::client::ParentError) -> Error {
    let what = what.to_owned();
    move |error| Error::internal(what, error)
}

/// A failed call, where it is not what was to be expected.
pub(crate) fn called(what: impl Into<String>) -> impl FnOnce(CallError) -> Error {
    let what = what.into();
    move |error| match error {
        CallError::Gone => Error::NotFound(format!("{what}: {error}")),
        CallError::Late(_) => Error::DeadlineExceeded(format!("{what}: {error}")),
        other => Error::internal(what, other),
    }
}

fn now(status: u32) -> Exit {
    Exit { status, at: SystemTime::now() }
}

/// The end for which a connection waits. The answer stays in the socket.
pub(crate) async fn end_of(connection: Connection) -> Exit {
    let end = match connection.peek().await {
        Ok(answer) => now(status(&answer)),
        Err(CallError::Refused(_)) => now(255),
        // The sentry has ended, and with it all that ran in it.
        Err(_) => now(KILLED),
    };
    Metrics("gvisor").exit();
    end
}

pub(crate) fn save(dir: &Path, meta: &Meta) -> Result<()> {
    let text =
        serde_json::to_vec(meta).map_err(|error| Error::internal("write meta.json", error))?;
    record::write_file(&dir.join("meta.json"), &text, 0o600).map_err(internal("write meta.json"))
}

impl Containers {
    /// The containers of `pod`, whose sandbox is `own`.
    pub fn new(pod: Arc<Pod>, own: Own, runsc: Arc<Runsc>, cgroups: Arc<Layout>) -> Self {
        let (root, live, reattached) = Default::default();
        Self { pod, own, runsc, root, cgroups, live, reattached }
    }

    pub(crate) fn parent(&self) -> &Parent {
        self.runsc.parent()
    }

    pub(crate) fn sentry(&self) -> Sentry {
        self.runsc.sentry(&self.own.id)
    }

    pub(crate) fn sentry_pid(&self) -> u32 {
        // A sandbox that was never recorded has no containers.
        self.own.sentry.map_or(1, |sentry| sentry.pid)
    }

    pub(crate) fn meta(&self, id: &str) -> Result<Meta> {
        let path = self.pod.container(id).join("meta.json");
        let text = std::fs::read(&path)
            .map_err(|_| Error::NotFound(format!("container {id} does not exist")))?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::internal(format!("read {}", path.display()), error))
    }

    /// What a container is to runsc and to the sentry.
    pub(crate) fn name(&self, id: &str) -> String {
        self.own.name(id)
    }

    fn cgroup(&self, id: &str) -> Result<Cgroup> {
        let meta = self.meta(id)?;
        self.cgroups.group(&meta.cgroup).map_err(internal(format!("cgroup of container {id}")))
    }

    /// Where sentry and gofers are.
    fn root_cgroup(&self) -> Option<Cgroup> {
        self.cgroups.group(&self.own.cgroup).ok()
    }

    pub(crate) fn kept(&self, handle: u64) -> String {
        format!("{}/wait/{handle:016x}", self.pod.id)
    }

    fn kept_streams(&self, container: &str) -> String {
        format!("{}/streams/{container}/", self.pod.id)
    }

    /// Prepares bundle, rootfs and spec; synchronous work in one go.
    pub(crate) fn prepare(
        pod: &Pod,
        own: &Own,
        request: &CreateContainer,
        meta: &mut Meta,
    ) -> Result<()> {
        let dir = pod.container(&request.id);
        record::private_dir(&dir).map_err(internal("make the container's directory"))?;
        let source = request.bundle.join("config.json");
        let mut loaded =
            kuasar_host::spec::Spec::load(&source).map_err(internal("read the bundle"))?;
        loaded.set_terminal(meta.terminal);
        let rootfs = request.bundle.join("rootfs");
        let mut value = Value::Object(std::mem::take(loaded.value_mut()));
        meta.cgroup = spec::container(&mut value, pod, own, &request.id, &rootfs)
            .map_err(Error::InvalidArgument)?;
        meta.rootfs = (!request.rootfs.is_empty()).then(|| rootfs.clone());
        save(&dir, meta)?;
        if !request.rootfs.is_empty() {
            let begun = Instant::now();
            kuasar_host::mount::mount_all(&request.rootfs, &rootfs)
                .map_err(internal("mount the rootfs"))?;
            Metrics("gvisor").phase("rootfs", begun.elapsed());
        }
        let root =
            value.pointer("/root/path").and_then(Value::as_str).map_or(rootfs.as_path(), Path::new);
        if !root.is_dir() {
            return Err(Error::InvalidArgument(format!(
                "rootfs {} is no directory",
                root.display()
            )));
        }
        let text =
            serde_json::to_vec(&value).map_err(|error| Error::internal("write the spec", error))?;
        record::write_file(&dir.join("config.json"), &text, 0o600)
            .map_err(internal("write the spec"))
    }

    async fn create_inner(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        let handle = Parent::new_cookie();
        let terminal = matches!(io, ProcessIo::Terminal { .. });
        let mut meta = Meta { handle, terminal, ..Meta::default() };
        let (pod, own, wanted) = (self.pod.clone(), self.own.clone(), request.clone());
        blocking(move || Self::prepare(&pod, &own, &wanted, &mut meta)).await?;
        let dir = self.pod.container(&request.id);
        let (streams, terminal) = match io {
            ProcessIo::Streams { stdin, stdout, stderr } => {
                let streams = [stdin, stdout, stderr];
                for (number, stream) in streams.iter().enumerate() {
                    let Some(stream) = stream else { continue };
                    let name = format!("{}{number}", self.kept_streams(&request.id));
                    self.parent()
                        .keep(&name, stream.as_fd())
                        .await
                        .map_err(parent_error("keep the container's streams"))?;
                }
                (Some(streams), None)
            }
            ProcessIo::Terminal { size } => {
                self.wake().await?;
                let console = Console::listen(&self.pod.dir)?;
                let begun = Instant::now();
                let name = self.name(&request.id);
                self.runsc.create_container(&self.own, &dir, &name, console.path()).await?;
                Metrics("gvisor").phase("engine_create", begun.elapsed());
                (None, Some(console.master(size)?))
            }
        };
        let exit = self.expect(&request.id, streams);
        Ok(Spawned { pid: self.sentry_pid(), handle, terminal, exit })
    }

    /// Enters a container into the table; answers its end.
    pub(crate) fn expect(&self, id: &str, streams: Option<Streams>) -> BoxFuture<'static, Exit> {
        let (exit, mut end) = watch::channel(None);
        lock(&self.live).insert(id.to_owned(), Live { exit, streams });
        Box::pin(async move {
            let end = end.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
            end.unwrap_or_else(|| now(KILLED))
        })
    }

    /// The container has ended, or never will have run.
    fn ended(&self, id: &str, exit: Exit) {
        if let Some(live) = lock(&self.live).get(id) {
            live.exit.send_if_modified(|end| end.is_none() && end.replace(exit).is_none());
        }
    }

    /// The streams of a container that was created and not started.
    async fn streams(&self, id: &str) -> Result<Streams> {
        if let Some(streams) = lock(&self.live).get_mut(id).and_then(|live| live.streams.take()) {
            return Ok(streams);
        }
        let mut streams = [None, None, None];
        for (number, stream) in streams.iter_mut().enumerate() {
            let name = format!("{}{number}", self.kept_streams(id));
            *stream = self
                .parent()
                .fetch(&name)
                .await
                .map_err(parent_error("fetch the container's streams"))?;
        }
        Ok(streams)
    }

    /// From now on the container's end is known, also to a later daemon.
    pub(crate) async fn follow(&self, id: &str, handle: u64) -> Result<()> {
        let connection = self.sentry().dial().await.map_err(called("ask for the end"))?;
        self.parent()
            .keep(&self.kept(handle), connection.as_fd())
            .await
            .map_err(parent_error("keep the connection"))?;
        Sentry::ask_end(&connection, &self.name(id)).await.map_err(called("ask for the end"))?;
        self.watch(id, connection);
        Ok(())
    }

    fn watch(&self, id: &str, connection: Connection) {
        let Some(exit) = lock(&self.live).get(id).map(|live| live.exit.clone()) else { return };
        tokio::spawn(async move {
            let end = tokio::select! {
                end = end_of(connection) => end,
                // The container is deleted.
                () = exit.closed() => return,
            };
            exit.send_if_modified(|known| known.is_none() && known.replace(end).is_none());
        });
    }

    /// Undoes a create; errors only slow down who comes later, so they are logged.
    async fn undo(&self, id: &str) {
        if let Err(error) = self.delete(id, Path::new("")).await {
            tracing::warn!(container = id, error = %error.chain(), "cannot clean up after a failed create");
        }
    }

    /// An exec of which no journal knows: its daemon died before it could say that it runs.
    async fn end_unknown(&self, name: &str) {
        let Ok(Some(fd)) = self.parent().fetch(name).await else { return };
        let Ok(connection) = Connection::from_fd(fd) else { return };
        let answer = tokio::time::timeout(Duration::from_millis(10), connection.receive()).await;
        if let Ok(Ok(answer)) = answer
            && let Some(pid) = answer.as_u64().and_then(|pid| u32::try_from(pid).ok())
        {
            let sentry = self.sentry();
            for container in self.containers() {
                let name = self.name(&container);
                let _ = sentry.signal(&name, pid, libc::SIGKILL, Receiver::Process).await;
            }
        }
        let _ = self.parent().forget(name).await;
    }

    fn containers(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.pod.dir.join("containers")).into_iter().flatten();
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|id| id != ROOT)
            .collect()
    }
}

#[async_trait]
impl Runtime for Containers {
    async fn create(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        let begun = Instant::now();
        let result = self.create_inner(request, io).await;
        Metrics("gvisor").phase("container_create", begun.elapsed());
        if result.is_err() {
            self.undo(&request.id).await;
        }
        result
    }

    async fn prepare_restore(&self, request: &CreateContainer) -> Result<()> {
        let result = self.prepare_restored(request).await;
        if result.is_err() {
            self.undo(&request.id).await;
        }
        result
    }

    async fn restore(&self, container: &str, io: ProcessIo) -> Result<Spawned> {
        self.restore_inner(container, io).await
    }

    async fn start(&self, container: &str, _pid: u32) -> Result<()> {
        let mut meta = self.meta(container)?;
        let (dir, name) = (self.pod.container(container), self.name(container));
        let begun = Instant::now();
        if meta.terminal {
            self.runsc.start_container(&self.own, &dir, &name).await?;
        } else {
            self.wake().await?;
            let streams = self.streams(container).await?;
            let [stdin, stdout, stderr] = &streams;
            let streams = [stdin, stdout, stderr].map(|fd| fd.as_ref().map(AsFd::as_fd));
            self.runsc.run_container(&self.own, &dir, &name, streams).await?;
        }
        Metrics("gvisor").phase("engine_start", begun.elapsed());
        meta.started = true;
        meta.gofer = self.runsc.gofer(&self.own.id, &name);
        save(&dir, &meta)?;
        self.follow(container, meta.handle).await?;
        // The sandbox has them now, and a reader has to see their end when it gives them up.
        self.parent()
            .forget(&self.kept_streams(container))
            .await
            .map_err(parent_error("give up the container's streams"))?;
        Metrics("gvisor").phase("container_start", begun.elapsed());
        Ok(())
    }

    async fn exec(
        &self,
        container: &str,
        _exec: &str,
        spec: &[u8],
        io: ProcessIo,
    ) -> Result<Spawned> {
        self.exec_inner(container, spec, io).await
    }

    async fn kill(&self, process: &ProcessRef, signal: i32, all: bool) -> Result<()> {
        let id = &process.container;
        let meta = self.meta(id)?;
        if !meta.started && process.exec.is_empty() {
            // Nothing runs that could take a signal; those that end a process end it.
            if matches!(signal, libc::SIGKILL | libc::SIGTERM | libc::SIGINT | libc::SIGQUIT) {
                self.ended(id, now(128 + signal as u32));
            }
            return Ok(());
        }
        let gone = |words: &dyn std::fmt::Display| {
            Error::NotFound(format!("process of container {id} has ended: {words}"))
        };
        let (sentry, name) = (self.sentry(), self.name(id));
        let pid = if process.exec.is_empty() { 0 } else { process.pid };
        let sent = match (signal, all) {
            (0, _) => sentry.processes(&name).await.and_then(|pids| match pids.is_empty() {
                true => Err(CallError::Refused("no process".into())),
                false => Ok(()),
            }),
            (_, true) => sentry.signal(&name, 0, signal, Receiver::All).await,
            (_, false) => sentry.signal(&name, pid, signal, Receiver::Process).await,
        };
        match sent {
            Ok(()) => Ok(()),
            Err(CallError::Refused(words)) if words.contains("invalid argument") => {
                Err(Error::InvalidArgument(format!("unknown signal {signal}")))
            }
            Err(CallError::Refused(words)) => Err(gone(&words)),
            Err(error @ CallError::Gone) => Err(gone(&error)),
            Err(other) => Err(called("signal the process")(other)),
        }
    }

    fn unkillable_after(&self) -> Option<std::time::Duration> {
        Some(self.runsc.limits().other)
    }

    async fn end_kernel(&self) {
        if let Some(sentry) = self.own.sentry {
            sentry.kill();
        }
    }

    async fn resized(&self, process: &ProcessRef) {
        let pid = if process.exec.is_empty() { 0 } else { process.pid };
        let (sentry, name) = (self.sentry(), self.name(&process.container));
        // A sandbox reads the size from the host's terminal, and tells nobody by itself.
        if let Err(error) = sentry.signal(&name, pid, libc::SIGWINCH, Receiver::Foreground).await {
            tracing::debug!(container = process.container, %error, "the new size is not told");
        }
    }

    async fn delete(&self, container: &str, _bundle: &Path) -> Result<()> {
        let dir = self.pod.container(container);
        // Whoever waits still, of a container that never started, is told.
        self.ended(container, now(KILLED));
        lock(&self.live).remove(container);
        if !dir.exists() {
            return Ok(());
        }
        self.parent()
            .forget(&self.kept_streams(container))
            .await
            .map_err(parent_error("give up the container's streams"))?;
        let name = self.name(container);
        match self.sentry().destroy(&name).await {
            Ok(()) | Err(CallError::Gone | CallError::Refused(_)) => {}
            Err(other) => return Err(called("end the container")(other)),
        }
        let meta = self.meta(container).ok();
        let gofer = meta.as_ref().and_then(|meta| meta.gofer);
        let gofer = gofer.or_else(|| self.runsc.gofer(&self.own.id, &name));
        let handle = meta.as_ref().map(|meta| meta.handle);
        let (runsc, sandbox) = (self.runsc.clone(), self.own.id.clone());
        let cgroup = meta.as_ref().and_then(|meta| self.cgroups.group(&meta.cgroup).ok());
        blocking(move || {
            if let Some(pidfd) = gofer.and_then(Identity::open) {
                // It holds the rootfs, and ends by itself when the sandbox lets it go.
                if !process::pidfd_ended(pidfd.as_fd(), GOFER).unwrap_or(true) {
                    let _ = process::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
                    let _ = process::pidfd_ended(pidfd.as_fd(), GOFER);
                }
            }
            runsc.forget(&sandbox, Some(&name));
            if let Some(cgroup) = &cgroup {
                cgroup.remove(CGROUP_DEADLINE).map_err(internal("remove the cgroup"))?;
            }
            if let Some(rootfs) = meta.and_then(|meta| meta.rootfs) {
                kuasar_host::mount::unmount_below(&rootfs)
                    .map_err(internal("unmount the rootfs"))?;
            }
            remove_dir(&dir)
        })
        .await?;
        if let Some(handle) = handle {
            let _ = self.parent().forget(&self.kept(handle)).await;
        }
        Ok(())
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        self.meta(container)?;
        let pids = self.sentry().processes(&self.name(container)).await.unwrap_or_default();
        // containerd takes an empty list for a leaked shim.
        Ok(if pids.is_empty() { vec![self.sentry_pid()] } else { pids })
    }

    async fn pause(&self, container: &str) -> Result<()> {
        self.meta(container)?;
        self.sentry().pause().await.map_err(called("pause the sandbox"))
    }

    async fn resume(&self, container: &str) -> Result<()> {
        self.meta(container)?;
        self.sentry().resume().await.map_err(called("resume the sandbox"))
    }

    async fn checkpoint(
        &self,
        container: &str,
        path: &Path,
        options: Option<AnyMessage>,
    ) -> Result<()> {
        self.checkpoint_pod(container, path, options).await
    }

    async fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        let cgroup = self.cgroup(container)?;
        let resources = resources.to_vec();
        blocking(move || cgroup.update(&resources).map_err(internal("update resources"))).await
    }

    async fn stats(&self, container: &str, flavor: StatsFlavor) -> Result<AnyMessage> {
        let cgroup = self.cgroup(container)?;
        // Between exit and delete nobody answers for the container.
        let name = self.name(container);
        let usage = self.sentry().usage(&name).await.unwrap_or_default();
        let root = self.root_cgroup();
        blocking(move || Ok(stats::message(&cgroup, root.as_ref(), &usage, &name, flavor))).await
    }

    async fn oom_watch(&self, _container: &str) -> Option<OwnedFd> {
        self.root_cgroup()?.oom_watch()
    }

    fn oom_kills(&self, _container: &str) -> u64 {
        self.root_cgroup().map(|cgroup| cgroup.oom_kills()).unwrap_or_default()
    }

    async fn reattach(&self, process: &ProcessRef) -> Result<Option<BoxFuture<'static, Exit>>> {
        lock(&self.reattached).insert(process.handle);
        let kept = self
            .parent()
            .fetch(&self.kept(process.handle))
            .await
            .map_err(parent_error("fetch the connection"))?;
        let connection = kept.map(Connection::from_fd).transpose();
        let connection = connection.map_err(called("take the connection up"))?;
        if !process.exec.is_empty() {
            return Ok(connection
                .map(|connection| -> BoxFuture<'static, Exit> { Box::pin(end_of(connection)) }));
        }
        let id = &process.container;
        let Ok(meta) = self.meta(id) else { return Ok(None) };
        let end = self.expect(id, None);
        match connection {
            Some(connection) => self.watch(id, connection),
            // Started, and the daemon died before it could ask.
            None if meta.started => match self.follow(id, meta.handle).await {
                Ok(()) => {}
                Err(_) => return Ok(None),
            },
            // It waits for its start, as long as there is a sandbox.
            None if self.sentry().dial().await.is_err() => return Ok(None),
            None => {}
        }
        Ok(Some(end))
    }

    async fn existing(&self) -> Vec<String> {
        let prefix = format!("{}/wait/", self.pod.id);
        let taken = std::mem::take(&mut *lock(&self.reattached));
        let mut known: BTreeSet<String> = taken.iter().map(|handle| self.kept(*handle)).collect();
        let containers = self.containers();
        let metas = containers.iter().filter_map(|id| self.meta(id).ok());
        known.extend(metas.map(|meta| self.kept(meta.handle)));
        for name in self.parent().kept().await.unwrap_or_default() {
            if name.starts_with(&prefix) && !known.contains(&name) {
                self.end_unknown(&name).await;
            }
        }
        containers
    }

    async fn exit_recorded(&self, process: &ProcessRef) {
        let _ = self.parent().forget(&self.kept(process.handle)).await;
    }
}

//! Containers of one pod: the [`Runtime`] behind the pod's Task server, which has them made by
//! Quark's.
//!
//! The host prepares what is the host's: root file system, volumes, streams ([`crate::tree`],
//! [`crate::streams`]). The rest is forwarded ([`kuasar_forward::task`]). Nothing is held in
//! memory that a restart would miss: what a later call needs is in
//! `<sandbox>/containers/<id>/meta.json`, the tree can be found by path, the streams are kept by
//! sandbox-parent, and Quark knows how a process ended until it is told to delete it.
//!
//! What Quark does not do for single containers is the sandbox's: statistics and kills for want of
//! memory are those of its cgroup. Task.Shutdown is never forwarded: Quark ends by it.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use containerd_task::host::{blocking, internal, remove_dir};
use containerd_task::runtime::{
    AnyMessage, CreateContainer, Exit, Keeper, ProcessIo, ProcessRef, Runtime, Spawned, StatsFlavor,
};
use futures::future::BoxFuture;
use kuasar_daemon::tasks::ParentKeeper;
use kuasar_forward::stdio;
use kuasar_forward::task::{Tasks, V2, checked_pid};
use kuasar_host::cgroup::{Cgroup, Layout};
use kuasar_host::record;
use kuasar_oci::observer::Observer;
use kuasar_oci::pod::Pod;
use kuasar_oci::spec::plain_process;
use kuasar_pod::Metrics;
use kuasar_protos::shim::api;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::engine::{self, Quark};
use crate::flavor::Own;
use crate::spec::{self, Place};
use crate::streams::{self, Joined};
use crate::tree::Tree;

/// Name of the sandbox's own record beside those of containers; no container has such an id.
pub const ROOT: &str = "@sandbox";

/// What a container's later calls need. `cgroup` and `rootfs` are also read by `kuasar-pod`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Meta {
    /// `linux.cgroupsPath`: of a cgroup that Quark may have made for it.
    cgroup: String,
    /// It was started.
    started: bool,
}

/// The containers of one pod.
pub struct Containers {
    pod: Arc<Pod>,
    own: Own,
    cgroups: Arc<Layout>,
    tree: Tree,
    tasks: Tasks,
    keeper: Arc<dyn Keeper>,
    drain: std::time::Duration,
    /// How long a container may outlive its SIGKILL before Quark is killed.
    kill: std::time::Duration,
    /// Ends of containers that never ran: nobody else would tell them.
    unborn: Mutex<HashMap<String, watch::Sender<Option<Exit>>>>,
    /// Execs that a recovery has taken up.
    reattached: Mutex<BTreeSet<(String, String)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn save(dir: &Path, meta: &Meta) -> Result<()> {
    let text =
        serde_json::to_vec(meta).map_err(|error| Error::internal("write meta.json", error))?;
    record::write_file(&dir.join("meta.json"), &text, 0o600).map_err(internal("write meta.json"))
}

impl Containers {
    /// The containers of `pod`, whose sandbox is `own`; an exit waits `drain` for its output.
    pub fn new(
        pod: Arc<Pod>,
        own: Own,
        quark: &Quark,
        cgroups: Arc<Layout>,
        drain: std::time::Duration,
    ) -> Self {
        let gone = engine::gone(own.process.and_then(|process| process.open()));
        let client = quark.client(&own.short, gone);
        let tasks = Tasks::new(client, V2, quark.limits().create);
        let keeper = ParentKeeper::new(quark.parent().clone(), pod.id.clone());
        let (tree, keeper) = (Tree::new(&pod.dir), Arc::new(keeper));
        let (unborn, reattached) = (Mutex::default(), Mutex::default());
        // The answer may be late, and then the output.
        let kill = quark.limits().other.saturating_add(drain);
        Self { pod, own, cgroups, tree, tasks, keeper, drain, kill, unborn, reattached }
    }

    /// What the pod's pid is.
    fn pid(&self) -> u32 {
        // A sandbox that was never recorded has no containers.
        self.own.process.map_or(1, |process| process.pid)
    }

    fn meta(&self, id: &str) -> Result<Meta> {
        let path = self.pod.container(id).join("meta.json");
        let text = std::fs::read(&path)
            .map_err(|_| Error::NotFound(format!("container {id} does not exist")))?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::internal(format!("read {}", path.display()), error))
    }

    /// Where Quark is.
    fn cgroup(&self) -> Option<Cgroup> {
        self.cgroups.group(&self.own.cgroup).ok()
    }

    /// Prepares bundle, rootfs, volumes and spec; synchronous work in one go.
    fn prepare(
        pod: &Pod,
        pid: u32,
        tree: &Tree,
        request: &CreateContainer,
        terminal: bool,
    ) -> Result<()> {
        let id = &request.id;
        let dir = pod.container(id);
        record::private_dir(&dir).map_err(internal("make the container's directory"))?;
        save(&dir, &Meta::default())?;
        let source = request.bundle.join("config.json");
        let mut loaded =
            kuasar_host::spec::Spec::load(&source).map_err(internal("read the bundle"))?;
        loaded.set_terminal(terminal);
        let mut value = Value::Object(std::mem::take(loaded.value_mut()));
        let needs = spec::container(&mut value, pod, pid, id, &request.bundle)
            .map_err(Error::InvalidArgument)?;
        save(&dir, &Meta { cgroup: needs.cgroup, ..Meta::default() })?;
        let begun = Instant::now();
        tree.add_rootfs(id, &request.rootfs, &needs.rootfs)?;
        for volume in &needs.volumes {
            match &volume.place {
                Place::Rootfs(at) => {
                    tree.add_volume(id, &volume.source, at, volume.flags, volume.follows)?;
                }
                Place::Beside(name) => {
                    tree.add_beside(id, name, &volume.source, volume.flags, volume.follows)?;
                }
            }
        }
        Metrics("quark").phase("rootfs", begun.elapsed());
        let text =
            serde_json::to_vec(&value).map_err(|error| Error::internal("write the spec", error))?;
        tree.write_spec(id, &text)
    }

    async fn create_inner(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        let id = request.id.as_str();
        let (pod, pid, tree, wanted) =
            (self.pod.clone(), self.pid(), self.tree.clone(), request.clone());
        let streams = blocking(move || {
            let terminal = matches!(io, ProcessIo::Terminal { .. });
            Self::prepare(&pod, pid, &tree, &wanted, terminal)?;
            streams::prepare(&tree, &wanted.id, "", io)
        })
        .await?;
        let [stdin, stdout, stderr] = streams.names.clone();
        let question = api::CreateTaskRequest {
            id: id.into(),
            // As Quark's process sees it.
            bundle: format!("/{id}"),
            terminal: streams.terminal,
            stdin,
            stdout,
            stderr,
            ..api::CreateTaskRequest::default()
        };
        let begun = Instant::now();
        let pid = self.tasks.create(&question).await?;
        Metrics("quark").phase("engine_create", begun.elapsed());
        let joined = streams.join(&self.keeper).await?;
        Ok(self.spawned(id, "", pid, joined))
    }

    fn spawned(&self, container: &str, exec: &str, pid: u32, mut joined: Joined) -> Spawned {
        let terminal = joined.master.take();
        let exit = self.exit_of(container, exec, joined);
        Spawned { pid, handle: u64::from(pid), terminal, exit }
    }

    /// The exit of a process, after its output.
    fn exit_of(&self, container: &str, exec: &str, joined: Joined) -> BoxFuture<'static, Exit> {
        let Joined { input, outputs, hub, .. } = joined;
        if let Some(input) = input {
            let (tasks, container, exec) =
                (self.tasks.clone(), container.to_owned(), exec.to_owned());
            // Closed ends are all that Quark wants; the Task API wants to be told.
            tokio::spawn(async move {
                if input.await.is_ok() {
                    tasks.close_stdin(&container, &exec).await;
                }
            });
        }
        let told = self.tasks.exit_of(container, exec, outputs, self.keeper.clone(), self.drain);
        let unborn = exec.is_empty().then(|| {
            let (tell, unborn) = watch::channel(None);
            lock(&self.unborn).insert(container.to_owned(), tell);
            unborn
        });
        let (keeper, prefix) = (self.keeper.clone(), stdio::process_prefix(container, exec));
        Box::pin(async move {
            let never = async {
                if let Some(mut unborn) = unborn
                    && let Ok(exit) = unborn.wait_for(Option::is_some).await.map(|exit| *exit)
                {
                    return exit;
                }
                std::future::pending().await
            };
            let exit = tokio::select! {
                exit = told => exit,
                exit = never => {
                    // What is kept would keep readers waiting.
                    let _ = keeper.forget(&prefix).await;
                    exit.unwrap_or(Exit { status: 255, at: SystemTime::now() })
                }
            };
            if let Some(hub) = hub {
                streams::hang_up(&hub);
            }
            Metrics("quark").exit();
            exit
        })
    }

    /// The container has ended without ever having run.
    fn end_unborn(&self, id: &str, status: u32) {
        if let Some(tell) = lock(&self.unborn).get(id) {
            let exit = Exit { status, at: SystemTime::now() };
            tell.send_if_modified(|known| known.is_none() && known.replace(exit).is_none());
        }
    }

    async fn run_exec(
        &self,
        container: &str,
        exec: &str,
        process: &Map<String, Value>,
        io: ProcessIo,
    ) -> Result<Spawned> {
        let size = match &io {
            ProcessIo::Terminal { size } => *size,
            ProcessIo::Streams { .. } => None,
        };
        let (tree, id, name) = (self.tree.clone(), container.to_owned(), exec.to_owned());
        let streams = blocking(move || streams::prepare(&tree, &id, &name, io)).await?;
        let mut process = process.clone();
        kuasar_host::spec::set_terminal(&mut process, streams.terminal, size);
        self.tasks.exec(container, exec, &process, streams.terminal, streams.names.clone()).await?;
        let started = async {
            if let Some(size) = size {
                // A program without a screen size still runs.
                let _ = self.tasks.resize(container, exec, size).await;
            }
            let pid = checked_pid(self.tasks.start(container, exec).await?)?;
            let joined = streams.join(&self.keeper).await?;
            Ok(self.spawned(container, exec, pid, joined))
        };
        let started = started.await;
        if started.is_err() {
            self.tasks.undo_exec(container, exec).await;
        }
        started
    }

    async fn forget_streams(&self, container: &str, exec: &str) {
        let _ = self.keeper.forget(&stdio::process_prefix(container, exec)).await;
        let (tree, container, names) =
            (self.tree.clone(), container.to_owned(), streams::files(exec));
        let _ = tokio::task::spawn_blocking(move || tree.remove_fifos(&container, &names)).await;
    }
}

#[async_trait]
impl Runtime for Containers {
    async fn create(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        if request.checkpoint.is_some() {
            return Err(Error::Unimplemented(
                "Quark restores no checkpoints: create the container anew".into(),
            ));
        }
        let begun = Instant::now();
        let result = self.create_inner(request, io).await;
        Metrics("quark").phase("container_create", begun.elapsed());
        if result.is_err()
            && let Err(error) = self.delete(&request.id, Path::new("")).await
        {
            tracing::warn!(container = request.id, error = %error.chain(), "cannot clean up after a failed create");
        }
        result
    }

    async fn start(&self, container: &str, _pid: u32) -> Result<()> {
        let meta = self.meta(container)?;
        let begun = Instant::now();
        // Before: whoever comes after us asks Quark, which knows.
        save(&self.pod.container(container), &Meta { started: true, ..meta })?;
        self.tasks.start(container, "").await?;
        Metrics("quark").phase("container_start", begun.elapsed());
        Ok(())
    }

    async fn exec(
        &self,
        container: &str,
        exec: &str,
        spec: &[u8],
        io: ProcessIo,
    ) -> Result<Spawned> {
        let mut process: Map<String, Value> = serde_json::from_slice(spec)
            .map_err(|error| Error::InvalidArgument(format!("the exec's process: {error}")))?;
        plain_process(&mut process).map_err(Error::InvalidArgument)?;
        let begun = Instant::now();
        let result = self.run_exec(container, exec, &process, io).await;
        Metrics("quark").phase("engine_exec", begun.elapsed());
        if result.is_err() {
            self.forget_streams(container, exec).await;
        }
        result
    }

    async fn kill(&self, process: &ProcessRef, signal: i32, all: bool) -> Result<()> {
        let id = &process.container;
        let meta = self.meta(id)?;
        if !meta.started && process.exec.is_empty() {
            // Nothing runs that could take a signal; those that end a process end it.
            if matches!(signal, libc::SIGKILL | libc::SIGTERM | libc::SIGINT | libc::SIGQUIT) {
                self.end_unborn(id, 128 + signal as u32);
            }
            return Ok(());
        }
        self.tasks.kill(process, signal, all).await
    }

    fn unkillable_after(&self) -> Option<std::time::Duration> {
        Some(self.kill)
    }

    async fn end_kernel(&self) {
        if let Some(process) = self.own.process {
            process.kill();
        }
    }

    async fn delete(&self, container: &str, _bundle: &Path) -> Result<()> {
        // Whoever waits still, of a container that never started, is told.
        self.end_unborn(container, 137);
        lock(&self.unborn).remove(container);
        let dir = self.pod.container(container);
        if !dir.exists() {
            return Ok(());
        }
        self.tasks.delete(container).await?;
        self.keeper.forget(&stdio::container_prefix(container)).await?;
        let cgroup = self.meta(container).ok().filter(|meta| !meta.cgroup.is_empty());
        let cgroup = cgroup.and_then(|meta| self.cgroups.group(&meta.cgroup).ok());
        let (tree, id) = (self.tree.clone(), container.to_owned());
        blocking(move || {
            tree.remove_container(&id)?;
            if let Some(cgroup) = cgroup {
                let limit = std::time::Duration::from_secs(5);
                cgroup.remove(limit).map_err(internal("remove the container's cgroup"))?;
            }
            remove_dir(&dir)
        })
        .await
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        self.meta(container)?;
        Ok(self.tasks.pids(container, self.pid()).await)
    }

    async fn pause(&self, container: &str) -> Result<()> {
        self.tasks.pause(container).await
    }

    async fn resume(&self, container: &str) -> Result<()> {
        self.tasks.resume(container).await
    }

    async fn checkpoint(
        &self,
        _container: &str,
        _path: &Path,
        _options: Option<AnyMessage>,
    ) -> Result<()> {
        Err(Error::Unimplemented(
            "Quark makes no checkpoints of containers: use another runtime handler for this pod"
                .into(),
        ))
    }

    async fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        let resources: Map<String, Value> = serde_json::from_slice(resources)
            .map_err(|error| Error::InvalidArgument(format!("resources: {error}")))?;
        self.tasks.update(container, &resources).await
    }

    async fn stats(&self, container: &str, flavor: StatsFlavor) -> Result<AnyMessage> {
        self.meta(container)?;
        let none = || Error::FailedPrecondition("the sandbox has no cgroup to measure".into());
        let group = self.cgroup().ok_or_else(none)?;
        blocking(move || {
            Ok(match flavor {
                StatsFlavor::Native => group.metrics(),
                StatsFlavor::V1 => group.metrics_v1(),
            })
        })
        .await
    }

    async fn oom_watch(&self, _container: &str) -> Option<OwnedFd> {
        self.cgroup()?.oom_watch()
    }

    fn oom_kills(&self, _container: &str) -> u64 {
        self.cgroup().map(|cgroup| cgroup.oom_kills()).unwrap_or_default()
    }

    async fn resize(&self, process: &ProcessRef, width: u16, height: u16) -> Result<bool> {
        self.tasks.resize(&process.container, &process.exec, (width, height)).await?;
        Ok(true)
    }

    async fn reattach(&self, process: &ProcessRef) -> Result<Option<BoxFuture<'static, Exit>>> {
        let (container, exec) = (&process.container, &process.exec);
        if !exec.is_empty() {
            lock(&self.reattached).insert((container.clone(), exec.clone()));
        }
        let joined = streams::resume(&self.keeper, container, exec).await?;
        Ok(Some(self.exit_of(container, exec, joined)))
    }

    async fn existing(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.pod.dir.join("containers")).into_iter().flatten();
        let all: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|id| id != ROOT)
            .collect();
        let known = std::mem::take(&mut *lock(&self.reattached));
        for container in &all {
            for exec in self.tree.execs(container) {
                if !known.contains(&(container.clone(), exec.clone())) {
                    // Its daemon died before it could say that it runs.
                    self.tasks.undo_exec(container, &exec).await;
                    self.forget_streams(container, &exec).await;
                }
            }
        }
        all
    }

    async fn exit_recorded(&self, process: &ProcessRef) {
        if !process.exec.is_empty() {
            self.tasks.forget_exec(&process.container, &process.exec).await;
            self.forget_streams(&process.container, &process.exec).await;
        }
    }
}

//! Containers of one pod: the [`Runtime`] behind the pod's Task server, which has them made in the
//! guest.
//!
//! The host prepares what is the host's (root file system, volumes, streams), and everything else
//! is the guest's Task server's. Nothing is held in memory that a restart would miss: what a later
//! call needs is in `<sandbox>/containers/<id>/meta.json`, the share can be found by path, the
//! streams are kept by sandbox-parent, and the rest the guest knows.
//!
//! Process ids are the guest's. An exit is told when the guest says so and the output has come to
//! its end, or at once when the machine has ended: 137, as for any process that was killed.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use containerd_task::host::blocking;
use containerd_task::runtime::{
    AnyMessage, CreateContainer, Exit, Keeper, ProcessIo, ProcessRef, Runtime, Spawned, StatsFlavor,
};
use futures::future::BoxFuture;
use kuasar_forward::stdio::{self, Direction, Stream};
use kuasar_forward::task::{Tasks, any, checked_pid};
use kuasar_protos::shim::api;
use protobuf::MessageField;
use serde_json::{Map, Value};
use vmm_common::guest as wire;
use vmm_common::handshake::StreamKind;

use crate::block::{Disks, StorageConfig};
use crate::config::Sharing;
use crate::copy::volumes::Volumes;
use crate::growth::{Limits, Machine};
use crate::guest::{Guest, service};
use crate::prepare::{Host, Meta, Prepared};
use crate::spec;

/// A started pod, as its containers need it.
#[derive(Debug)]
pub struct Pod {
    /// Sandbox id.
    pub id: String,
    /// Private directory of the sandbox.
    pub dir: PathBuf,
    /// Pid that Start has answered.
    pub pid: u32,
    /// How long an exit waits for the output before it.
    pub drain: Duration,
    /// How long a container may take to be made or started in the guest.
    pub create: Duration,
    /// How long a container may outlive its SIGKILL before the machine is killed.
    pub kill: Duration,
}

/// Out-of-memory kills of a container.
struct OutOfMemory {
    kills: u64,
    /// Written at each.
    told: Option<OwnedFd>,
}

/// The containers of one pod.
pub struct Containers {
    pod: Pod,
    /// Where there still is one.
    machine: Option<Machine>,
    pub(crate) guest: Arc<Guest>,
    tasks: Tasks,
    pub(crate) keeper: Arc<dyn Keeper>,
    pub(crate) host: Arc<Host>,
    /// In a pod without a share.
    copies: Option<Arc<Volumes>>,
    oom: Mutex<HashMap<String, OutOfMemory>>,
}

/// The streams of a process: which, the guest's kind, our descriptor, the direction.
pub(crate) type Ends = Vec<(&'static str, StreamKind, OwnedFd, Direction)>;

/// Takes a process's streams apart: its descriptors, and the addresses that the guest is told.
pub(crate) fn ends(io: ProcessIo, container: &str, exec: &str) -> (Ends, [String; 3], bool) {
    let address = |kind: StreamKind| format!("vsock-stream://{container}/{exec}/{}", kind.word());
    let mut ends = Vec::new();
    let mut names = [const { String::new() }; 3];
    let terminal = match io {
        ProcessIo::Streams { stdin, stdout, stderr } => {
            let all = [
                ("stdin", StreamKind::Stdin, stdin, Direction::Input),
                ("stdout", StreamKind::Stdout, stdout, Direction::Output),
                ("stderr", StreamKind::Stderr, stderr, Direction::Output),
            ];
            for ((which, kind, fd, direction), name) in all.into_iter().zip(&mut names) {
                if let Some(fd) = fd {
                    *name = address(kind);
                    ends.push((which, kind, fd, direction));
                }
            }
            false
        }
        ProcessIo::Terminal { .. } => {
            let [stdin, stdout, _] = &mut names;
            *stdin = address(StreamKind::Terminal);
            stdout.clone_from(stdin);
            true
        }
    };
    (ends, names, terminal)
}

impl Containers {
    /// The containers of `pod` in `guest`, on a machine with these disks.
    pub(crate) fn new(
        pod: Pod,
        guest: Arc<Guest>,
        keeper: Arc<dyn Keeper>,
        machine: Option<Machine>,
        (storage, sharing): (StorageConfig, Sharing),
    ) -> Self {
        let copies = sharing
            .copying
            .clone()
            .map(|config| Volumes::new(&pod.id, guest.clone(), keeper.clone(), config))
            .map(Arc::new);
        let vm = machine.as_ref().map(|machine| machine.vm.clone());
        let disks = Disks::new(vm, &pod.dir);
        let host = Arc::new(Host::new(&pod.dir, pod.pid, disks, storage, sharing));
        let tasks = Tasks::new((**guest).clone(), service::TASK, pod.create);
        Self { pod, machine, guest, tasks, keeper, host, copies, oom: Mutex::default() }
    }

    /// The guest had this many more out-of-memory kills in a container.
    pub fn out_of_memory(&self, container: &str) {
        let mut all = self.oom.lock().unwrap_or_else(PoisonError::into_inner);
        // Only of containers that are there: a guest may invent names.
        if !all.contains_key(container) && !self.host.dir(container).exists() {
            return;
        }
        let one = all.entry(container.to_owned()).or_insert(OutOfMemory { kills: 0, told: None });
        one.kills += 1;
        if let Some(told) = &one.told {
            // Full only when nobody has looked at 2^64 - 2 of them.
            let _ = nix::unistd::write(told, &1_u64.to_ne_bytes());
        }
    }

    /// What the guest is told of a container, whose file systems, files and disks are there for it, and
    /// its record.
    pub(crate) async fn ready(
        &self,
        request: &CreateContainer,
        terminal: bool,
    ) -> Result<(wire::Container, Meta)> {
        let (host, wanted) = (self.host.clone(), request.clone());
        let Prepared { spec: text, root, needs, disks, meta } =
            blocking(move || host.prepare(&wanted, terminal)).await?;
        if let Some(copies) = &self.copies {
            copies.copy(&request.id, needs.copies).await?;
        }
        let others = || self.host.disks_of_others(&request.id);
        let told = self.host.disks.plug(&request.id, disks, others).await?;
        for dropped in &needs.dropped {
            tracing::warn!(container = %request.id, %dropped, "not for a VM: left out");
        }
        for storage in needs.storages {
            let question = wire::AddStorageRequest {
                storage: MessageField::some(storage),
                ..Default::default()
            };
            let _: wire::AddStorageResponse =
                self.guest.call_again(service::GUEST, "AddStorage", &question).await?;
        }
        if let Err(error) = self.make_room(&request.id, meta.limits).await {
            tracing::warn!(container = %request.id, error = %error.chain(),
                "the machine does not grow with its containers' limits");
        }
        let container = wire::Container {
            spec: text,
            rootfs: told.rootfs.unwrap_or(root),
            storages: told.storages,
            devices: told.devices,
            ..wire::Container::default()
        };
        Ok((container, meta))
    }

    /// Room on the machine for a container with these limits, beside the others.
    async fn make_room(&self, container: &str, limits: Limits) -> Result<()> {
        let Some(machine) = &self.machine else { return Ok(()) };
        let others = self.host.limits_of_others(container);
        machine.make_room(container, &self.guest, others.chain([limits])).await
    }

    /// MiB of huge pages that the pod and its containers want.
    pub(crate) fn huge(&self) -> u32 {
        let all = self.host.limits_of_others("");
        self.machine.as_ref().map_or(0, |machine| machine.huge(all))
    }

    async fn create_inner(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        let (ends, [stdin, stdout, stderr], terminal) = ends(io, &request.id, "");
        let (container, meta) = self.ready(request, terminal).await?;
        let options = any(vmm_common::CONTAINER_TYPE, &container)?;
        let question = api::CreateTaskRequest {
            id: request.id.clone(),
            terminal,
            stdin,
            stdout,
            stderr,
            options: MessageField::some(options),
            ..api::CreateTaskRequest::default()
        };
        let pid = self.tasks.create(&question).await?;
        self.host.save(&request.id, &Meta { pid, ..meta })?;
        self.spawned(&request.id, "", pid, ends, terminal).await
    }

    /// Joins a new process's streams, and follows it.
    async fn spawned(
        &self,
        container: &str,
        exec: &str,
        pid: u32,
        ends: Ends,
        terminal: bool,
    ) -> Result<Spawned> {
        let mut pumps = Vec::new();
        for (which, kind, engine, direction) in ends {
            let guest = self.guest.stream(container, exec, kind).await?;
            let name = stdio::name(container, exec, which);
            let pump = stdio::begin(&self.keeper, name, guest, engine, direction).await?;
            if direction == Direction::Output {
                pumps.push(pump);
            }
        }
        let terminal = match terminal {
            true => Some(self.guest.stream(container, exec, StreamKind::Terminal).await?),
            false => None,
        };
        let exit = self.exit_of(container, exec, pumps);
        Ok(Spawned { pid, handle: u64::from(pid), terminal, exit })
    }

    /// How long an exit waits for the output before it.
    pub(crate) fn drain(&self) -> Duration {
        self.pod.drain
    }

    /// The exit of a process, after its output.
    pub(crate) fn exit_of(
        &self,
        container: &str,
        exec: &str,
        outputs: Vec<Stream>,
    ) -> BoxFuture<'static, Exit> {
        let exit =
            self.tasks.exit_of(container, exec, outputs, self.keeper.clone(), self.pod.drain);
        let Some(copies) = self.copies.clone().filter(|_| exec.is_empty()) else { return exit };
        let (host, id) = (self.host.clone(), container.to_owned());
        Box::pin(async move {
            let exit = exit.await;
            // Before the engine hears of the exit: it reads the log then.
            if let Ok(meta) = host.meta(&id) {
                copies.bring_back(&id, &meta.copies).await;
            }
            exit
        })
    }

    /// Goes on with what an earlier daemon has followed for a container.
    pub(crate) async fn resume_copies(&self, container: &str) {
        if let (Some(copies), Ok(meta)) = (&self.copies, self.host.meta(container)) {
            copies.resume(container, &meta.copies).await;
        }
    }

    async fn undo(&self, id: &str) {
        if let Err(error) = self.delete(id, Path::new("")).await {
            tracing::warn!(container = id, error = %error.chain(), "cannot clean up after a failed create");
        }
    }
}

#[async_trait]
impl Runtime for Containers {
    async fn create(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        if request.checkpoint.is_some() {
            return Err(Error::Unimplemented(
                "restoring from a checkpoint is not supported in a VM; create the container anew"
                    .into(),
            ));
        }
        let result = self.create_inner(request, io).await;
        if result.is_err() {
            self.undo(&request.id).await;
        }
        result
    }

    async fn start(&self, container: &str, _pid: u32) -> Result<()> {
        self.tasks.start(container, "").await.map(drop)
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
        spec::process(&mut process)?;
        let size = match &io {
            ProcessIo::Terminal { size } => *size,
            ProcessIo::Streams { .. } => None,
        };
        let (ends, [stdin, stdout, stderr], terminal) = ends(io, container, exec);
        kuasar_host::spec::set_terminal(&mut process, terminal, size);
        self.tasks.exec(container, exec, &process, terminal, [stdin, stdout, stderr]).await?;
        let started = async {
            if let Some(size) = size {
                self.tasks.resize(container, exec, size).await?;
            }
            let pid = checked_pid(self.tasks.start(container, exec).await?)?;
            self.spawned(container, exec, pid, ends, terminal).await
        };
        match started.await {
            Ok(spawned) => Ok(spawned),
            Err(error) => {
                let _ = self.keeper.forget(&stdio::process_prefix(container, exec)).await;
                self.tasks.undo_exec(container, exec).await;
                Err(error)
            }
        }
    }

    async fn kill(&self, process: &ProcessRef, signal: i32, all: bool) -> Result<()> {
        self.tasks.kill(process, signal, all).await
    }

    fn unkillable_after(&self) -> Option<Duration> {
        Some(self.pod.kill)
    }

    async fn end_kernel(&self) {
        let Some(vm) = self.host.disks.machine() else { return };
        if let Err(error) = vm.stop(Duration::ZERO).await {
            tracing::error!(sandbox = self.pod.id, %error, "its machine cannot be killed");
        }
    }

    async fn delete(&self, container: &str, _bundle: &Path) -> Result<()> {
        self.tasks.delete(container).await?;
        self.keeper.forget(&stdio::container_prefix(container)).await?;
        self.oom.lock().unwrap_or_else(PoisonError::into_inner).remove(container);
        if let Some(copies) = &self.copies {
            copies.remove(container).await?;
        }
        if let Ok(meta) = self.host.meta(container) {
            let others = || self.host.disks_of_others(container);
            self.host.disks.unplug(&meta.disks, others).await;
        }
        let (host, id) = (self.host.clone(), container.to_owned());
        blocking(move || host.remove(&id)).await
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        let meta = self.host.meta(container)?;
        Ok(self.tasks.pids(container, meta.pid).await)
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
            "containers in a VM are not checkpointed: use a pod without VM".into(),
        ))
    }

    async fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        let mut resources: Map<String, Value> = serde_json::from_slice(resources)
            .map_err(|error| Error::InvalidArgument(format!("resources: {error}")))?;
        let meta = self.host.meta(container)?;
        let meta = Meta { limits: meta.limits.or(&resources), ..meta };
        self.host.save(container, &meta)?;
        self.make_room(container, meta.limits).await?;
        spec::resources(&mut resources);
        self.tasks.update(container, &resources).await
    }

    async fn stats(&self, container: &str, flavor: StatsFlavor) -> Result<AnyMessage> {
        self.tasks.stats(container, flavor).await
    }

    async fn oom_watch(&self, container: &str) -> Option<OwnedFd> {
        let flags =
            nix::sys::eventfd::EfdFlags::EFD_CLOEXEC | nix::sys::eventfd::EfdFlags::EFD_NONBLOCK;
        let told = nix::sys::eventfd::EventFd::from_value_and_flags(0, flags).ok()?;
        let ours = told.as_fd().try_clone_to_owned().ok()?;
        let mut all = self.oom.lock().unwrap_or_else(PoisonError::into_inner);
        let one = all.entry(container.to_owned()).or_insert(OutOfMemory { kills: 0, told: None });
        one.told = Some(ours);
        told.as_fd().try_clone_to_owned().ok()
    }

    fn oom_kills(&self, container: &str) -> u64 {
        let all = self.oom.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(container).map_or(0, |one| one.kills)
    }

    async fn resize(&self, process: &ProcessRef, width: u16, height: u16) -> Result<bool> {
        self.tasks.resize(&process.container, &process.exec, (width, height)).await?;
        Ok(true)
    }

    async fn reattach(&self, process: &ProcessRef) -> Result<Option<BoxFuture<'static, Exit>>> {
        let (container, exec) = (&process.container, &process.exec);
        let mut outputs = Vec::new();
        for (which, direction) in [
            ("stdin", Direction::Input),
            ("stdout", Direction::Output),
            ("stderr", Direction::Output),
        ] {
            let name = stdio::name(container, exec, which);
            let pump = stdio::resume(&self.keeper, name, direction).await?;
            if direction == Direction::Output {
                outputs.extend(pump);
            }
        }
        if exec.is_empty() {
            self.resume_copies(container).await;
        }
        Ok(Some(self.exit_of(container, exec, outputs)))
    }

    async fn existing(&self) -> Vec<String> {
        let mut all: Vec<String> = self.host.containers().collect();
        all.extend(self.host.share.containers());
        all.sort();
        all.dedup();
        all
    }

    async fn exit_recorded(&self, process: &ProcessRef) {
        if !process.exec.is_empty() {
            self.tasks.forget_exec(&process.container, &process.exec).await;
        }
    }
}

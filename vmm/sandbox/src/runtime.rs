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
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use containerd_task::runtime::{
    AnyMessage, CreateContainer, Exit, Keeper, ProcessIo, ProcessRef, Runtime, Spawned, StatsFlavor,
};
use futures::future::BoxFuture;
use kuasar_host::mount::{Mount, tree};
use kuasar_host::record;
use kuasar_protos::shim::api;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use vmm_common::guest as wire;
use vmm_common::handshake::StreamKind;

use crate::guest::{Guest, GuestError, service};
use crate::share::ShareTree;
use crate::spec::{self, Needs};
use crate::stdio::{self, Direction, Stream};

/// Most processes of a container that are listed.
const MAX_PIDS: usize = 65_536;
/// Most bytes of a container's statistics.
const MAX_STATS: usize = 1 << 20;
/// How long output of a machine that has ended may take to arrive: it is on this host already.
const LAST_OUTPUT: Duration = Duration::from_millis(50);
/// Between two attempts to ask a guest that is not reached.
const AGAIN: Duration = Duration::from_millis(200);

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
}

/// What a container's later calls need.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Meta {
    /// Pid of its first process in the guest.
    pid: u32,
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
    guest: Arc<Guest>,
    keeper: Arc<dyn Keeper>,
    share: ShareTree,
    oom: Mutex<HashMap<String, OutOfMemory>>,
}

fn host(what: impl Into<String>) -> impl FnOnce(kuasar_host::Error) -> Error {
    let what = what.into();
    move |error| match error {
        kuasar_host::Error::Invalid(text) => Error::InvalidArgument(format!("{what}: {text}")),
        other => Error::internal(what, other),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal("worker", error))?
}

/// The streams of a process: which, the guest's kind, our descriptor, the direction.
type Ends = Vec<(&'static str, StreamKind, OwnedFd, Direction)>;

/// Takes a process's streams apart: its descriptors, and the addresses that the guest is told.
fn ends(io: ProcessIo, container: &str, exec: &str) -> (Ends, [String; 3], bool) {
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
    /// The containers of `pod` in `guest`.
    pub fn new(pod: Pod, guest: Arc<Guest>, keeper: Arc<dyn Keeper>) -> Self {
        let share = ShareTree::new(&pod.dir);
        Self { pod, guest, keeper, share, oom: Mutex::default() }
    }

    fn dir(&self, id: &str) -> PathBuf {
        self.pod.dir.join("containers").join(id)
    }

    fn meta(&self, id: &str) -> Result<Meta> {
        let path = self.dir(id).join("meta.json");
        let text = std::fs::read(&path)
            .map_err(|_| Error::NotFound(format!("container {id} does not exist")))?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::internal(format!("read {}", path.display()), error))
    }

    /// The guest had this many more out-of-memory kills in a container.
    pub fn out_of_memory(&self, container: &str) {
        let mut all = self.oom.lock().unwrap_or_else(PoisonError::into_inner);
        // Only of containers that are there: a guest may invent names.
        if !all.contains_key(container) && !self.dir(container).exists() {
            return;
        }
        let one = all.entry(container.to_owned()).or_insert(OutOfMemory { kills: 0, told: None });
        one.kills += 1;
        if let Some(told) = &one.told {
            // Full only when nobody has looked at 2^64 - 2 of them.
            let _ = nix::unistd::write(told, &1_u64.to_ne_bytes());
        }
    }

    async fn ask<A: Message>(&self, method: &str, question: &impl Message) -> Result<A> {
        Ok(self.guest.call_again(service::TASK, method, question).await?)
    }

    /// A call that makes something: not repeated, and it may take longer.
    async fn make<A: Message>(&self, method: &str, question: &impl Message) -> Result<A> {
        let limit = Some(self.pod.create);
        Ok(self.guest.call_for(service::TASK, method, question, limit).await?)
    }

    /// Prepares root file system, volumes and spec; synchronous work in one go.
    fn prepare(
        pod_dir: &Path,
        sandbox_pid: u32,
        share: &ShareTree,
        request: &CreateContainer,
        terminal: bool,
    ) -> Result<(Vec<u8>, Needs)> {
        let id = &request.id;
        let dir = pod_dir.join("containers").join(id);
        record::private_dir(&dir).map_err(host("make the container's directory"))?;
        save(&dir, Meta::default())?;
        let source = request.bundle.join("config.json");
        let mut loaded = kuasar_host::spec::Spec::load(&source).map_err(host("read the bundle"))?;
        let mut value = std::mem::take(loaded.value_mut());
        let needs = spec::edit(&mut value, id, sandbox_pid)?;
        if let Some(process) = value.get_mut("process").and_then(Value::as_object_mut) {
            process.insert("terminal".into(), json!(terminal));
        }
        let mounts: Vec<Mount> = request
            .rootfs
            .iter()
            .map(|mount| Mount {
                kind: mount.kind.clone(),
                source: mount.source.clone(),
                target: mount.target.clone(),
                options: mount.options.clone(),
            })
            .collect();
        share.add_rootfs(id, &mounts, &request.bundle)?;
        for (number, volume) in needs.volumes.iter().enumerate() {
            let flags = tree::Flags {
                recursive: volume.recursive,
                read_only: volume.read_only,
                no_devices: true,
            };
            share.add_volume(id, number, &volume.source, volume.kind, flags)?;
        }
        let text =
            serde_json::to_vec(&value).map_err(|error| Error::internal("write the spec", error))?;
        Ok((text, needs))
    }

    async fn create_inner(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        let (ends, [stdin, stdout, stderr], terminal) = ends(io, &request.id, "");
        let (dir, pid, share) = (self.pod.dir.clone(), self.pod.pid, self.share.clone());
        let wanted = request.clone();
        let (text, needs) =
            blocking(move || Self::prepare(&dir, pid, &share, &wanted, terminal)).await?;
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
        let container = wire::Container {
            spec: text,
            rootfs: spec::rootfs(&request.id),
            ..wire::Container::default()
        };
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
        let answer: api::CreateTaskResponse = self.make("Create", &question).await?;
        let pid = checked_pid(answer.pid)?;
        save(&self.dir(&request.id), Meta { pid })?;
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

    /// The exit of a process, after its output.
    fn exit_of(
        &self,
        container: &str,
        exec: &str,
        outputs: Vec<Stream>,
    ) -> BoxFuture<'static, Exit> {
        let (guest, keeper, drain) = (self.guest.clone(), self.keeper.clone(), self.pod.drain);
        let prefix = stdio::process_prefix(container, exec);
        let question = api::WaitRequest {
            id: container.into(),
            exec_id: exec.into(),
            ..api::WaitRequest::default()
        };
        Box::pin(async move {
            let status = wait(&guest, &question).await;
            let at = SystemTime::now();
            let limit = if guest.is_gone() { LAST_OUTPUT } else { drain };
            let ends = outputs.into_iter().map(|output| output.finish(limit));
            futures::future::join_all(ends).await;
            // What is kept would keep readers waiting.
            if let Err(error) = keeper.forget(&prefix).await {
                tracing::error!(%prefix, "streams stay open: {}", error.chain());
            }
            Exit { status, at }
        })
    }

    async fn undo(&self, id: &str) {
        if let Err(error) = self.delete(id, Path::new("")).await {
            tracing::warn!(container = id, error = %error.chain(), "cannot clean up after a failed create");
        }
    }
}

/// Asks the guest how a process ended, for as long as it takes.
async fn wait(guest: &Guest, question: &api::WaitRequest) -> u32 {
    loop {
        let answer: std::result::Result<api::WaitResponse, _> =
            guest.call_for(service::TASK, "Wait", question, None).await;
        match answer {
            // Codes have eight bits; a guest may say anything.
            Ok(answer) => return answer.exit_status.min(255),
            Err(GuestError::Gone) => return 137,
            Err(error) if error.is_not_found() => return 255,
            Err(error) => {
                tracing::warn!(container = %question.id, exec = %question.exec_id, %error,
                    "its end is asked for again");
                tokio::select! {
                    () = guest.gone() => return 137,
                    () = tokio::time::sleep(AGAIN) => {}
                }
            }
        }
    }
}

fn save(dir: &Path, meta: Meta) -> Result<()> {
    let text =
        serde_json::to_vec(&meta).map_err(|error| Error::internal("write meta.json", error))?;
    record::write_file(&dir.join("meta.json"), &text, 0o600).map_err(host("write meta.json"))
}

fn any(kind: &str, message: &impl Message) -> Result<Any> {
    let value =
        message.write_to_bytes().map_err(|error| Error::internal("encode a request", error))?;
    Ok(Any { type_url: kind.into(), value, ..Any::default() })
}

fn checked_pid(pid: u32) -> Result<u32> {
    match pid {
        0 => Err(Error::internal("ask the guest", "it answered pid 0")),
        pid => Ok(pid),
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
        let question = api::StartRequest { id: container.into(), ..api::StartRequest::default() };
        self.make::<api::StartResponse>("Start", &question).await.map(drop)
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
        process.insert("terminal".into(), json!(terminal));
        if let Some((width, height)) = size {
            process.insert("consoleSize".into(), json!({ "width": width, "height": height }));
        }
        let value = serde_json::to_vec(&process).map_err(|error| Error::internal("exec", error))?;
        let kind = "types.containerd.io/opencontainers/runtime-spec/1/Process";
        let question = api::ExecProcessRequest {
            id: container.into(),
            exec_id: exec.into(),
            terminal,
            stdin,
            stdout,
            stderr,
            spec: MessageField::some(Any { type_url: kind.into(), value, ..Any::default() }),
            ..api::ExecProcessRequest::default()
        };
        self.make::<api::Empty>("Exec", &question).await?;
        let started = async {
            if let Some((width, height)) = size {
                let question = resize(container, exec, width, height);
                let _: api::Empty = self.ask("ResizePty", &question).await?;
            }
            let question = api::StartRequest {
                id: container.into(),
                exec_id: exec.into(),
                ..api::StartRequest::default()
            };
            let answer: api::StartResponse = self.make("Start", &question).await?;
            let pid = checked_pid(answer.pid)?;
            self.spawned(container, exec, pid, ends, terminal).await
        };
        match started.await {
            Ok(spawned) => Ok(spawned),
            Err(error) => {
                let _ = self.keeper.forget(&stdio::process_prefix(container, exec)).await;
                let kill = api::KillRequest {
                    id: container.into(),
                    exec_id: exec.into(),
                    signal: libc::SIGKILL as u32,
                    ..api::KillRequest::default()
                };
                // The first error is the one to report.
                let _ = self.ask::<api::Empty>("Kill", &kill).await;
                self.forget_exec(container, exec).await;
                Err(error)
            }
        }
    }

    async fn kill(&self, process: &ProcessRef, signal: i32, all: bool) -> Result<()> {
        let question = api::KillRequest {
            id: process.container.clone(),
            exec_id: process.exec.clone(),
            signal: u32::try_from(signal).unwrap_or_default(),
            all,
            ..api::KillRequest::default()
        };
        self.ask::<api::Empty>("Kill", &question).await.map(drop)
    }

    async fn delete(&self, container: &str, _bundle: &Path) -> Result<()> {
        let question = api::DeleteRequest { id: container.into(), ..api::DeleteRequest::default() };
        match self.make::<api::DeleteResponse>("Delete", &question).await {
            // Not there (any more), with the machine or without.
            Ok(_) | Err(Error::NotFound(_)) => {}
            // The guest is asked no more when the pod ends; what it holds goes with it.
            Err(error) if self.guest.is_gone() => {
                tracing::debug!(container, error = %error.chain(), "deleted without the guest");
            }
            Err(error) => return Err(error),
        }
        self.keeper.forget(&stdio::container_prefix(container)).await?;
        self.oom.lock().unwrap_or_else(PoisonError::into_inner).remove(container);
        let (share, dir, id) = (self.share.clone(), self.dir(container), container.to_owned());
        blocking(move || {
            share.remove_container(&id)?;
            match std::fs::remove_dir_all(&dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(Error::internal(format!("remove {}", dir.display()), error))
                }
                _ => Ok(()),
            }
        })
        .await
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        let meta = self.meta(container)?;
        let question = api::PidsRequest { id: container.into(), ..api::PidsRequest::default() };
        let answer: Result<api::PidsResponse> = self.ask("Pids", &question).await;
        let listed = answer.map(|answer| answer.processes).unwrap_or_default();
        let pids: Vec<u32> =
            listed.iter().map(|one| one.pid).filter(|pid| *pid != 0).take(MAX_PIDS).collect();
        // containerd takes an empty list for a leaked shim.
        Ok(if pids.is_empty() { vec![meta.pid.max(1)] } else { pids })
    }

    async fn pause(&self, container: &str) -> Result<()> {
        let question = api::PauseRequest { id: container.into(), ..api::PauseRequest::default() };
        self.ask::<api::Empty>("Pause", &question).await.map(drop)
    }

    async fn resume(&self, container: &str) -> Result<()> {
        let question = api::ResumeRequest { id: container.into(), ..api::ResumeRequest::default() };
        self.ask::<api::Empty>("Resume", &question).await.map(drop)
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
        spec::resources(&mut resources);
        let value =
            serde_json::to_vec(&resources).map_err(|error| Error::internal("update", error))?;
        let kind = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
        let question = api::UpdateTaskRequest {
            id: container.into(),
            resources: MessageField::some(Any { type_url: kind.into(), value, ..Any::default() }),
            ..api::UpdateTaskRequest::default()
        };
        self.ask::<api::Empty>("Update", &question).await.map(drop)
    }

    async fn stats(&self, container: &str, flavor: StatsFlavor) -> Result<AnyMessage> {
        const V1: &str = "io.containerd.cgroups.v1.Metrics";
        const V2: &str = "io.containerd.cgroups.v2.Metrics";
        let version = match flavor {
            StatsFlavor::Native => service::TASK,
            StatsFlavor::V1 => service::TASK_V2,
        };
        let question = api::StatsRequest { id: container.into(), ..api::StatsRequest::default() };
        let answer: api::StatsResponse = self.guest.call_again(version, "Stats", &question).await?;
        let stats = answer.stats.into_option().unwrap_or_default();
        // Another type would fail the list of all containers' statistics.
        let known = match flavor {
            StatsFlavor::Native => [V1, V2].contains(&stats.type_url.as_str()),
            StatsFlavor::V1 => stats.type_url == V1,
        };
        if !known || stats.value.len() > MAX_STATS {
            return Err(Error::internal("ask the guest", "it answered no cgroup statistics"));
        }
        Ok((stats.type_url, stats.value))
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
        let question = resize(&process.container, &process.exec, width, height);
        self.ask::<api::Empty>("ResizePty", &question).await?;
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
        Ok(Some(self.exit_of(container, exec, outputs)))
    }

    async fn existing(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.pod.dir.join("containers")).into_iter().flatten();
        let mut all: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        all.extend(self.share.containers());
        all.sort();
        all.dedup();
        all
    }

    async fn exit_recorded(&self, process: &ProcessRef) {
        if !process.exec.is_empty() {
            self.forget_exec(&process.container, &process.exec).await;
        }
    }
}

impl Containers {
    /// The guest may forget an exec that has ended.
    async fn forget_exec(&self, container: &str, exec: &str) {
        let question = api::DeleteRequest {
            id: container.into(),
            exec_id: exec.into(),
            ..api::DeleteRequest::default()
        };
        match self.ask::<api::DeleteResponse>("Delete", &question).await {
            Ok(_) | Err(Error::NotFound(_)) => {}
            Err(error) => tracing::debug!(container, exec, error = %error.chain(),
                "the guest goes on knowing an ended exec"),
        }
    }
}

fn resize(container: &str, exec: &str, width: u16, height: u16) -> api::ResizePtyRequest {
    api::ResizePtyRequest {
        id: container.into(),
        exec_id: exec.into(),
        width: width.into(),
        height: height.into(),
        ..api::ResizePtyRequest::default()
    }
}

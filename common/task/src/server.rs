//! The process table of one pod, and everything that changes it.
//!
//! * A container's operations that change it (`ops`) are done one at a time; reads never wait.
//! * A change is in the journal before it is answered. It is done in a task of its own, so that
//!   a client that hangs up in the middle leaves no half state.
//! * An exit goes: table → journal → runtime may forget → output drained → events → waiters.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use kuasar_protos::shim::events::task as ev;
use kuasar_protos::shim::types::mount as pm;
use kuasar_ttrpc::Services;
use protobuf::{EnumOrUnknown, MessageField};
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::events::{Event, EventSender, timestamp};
use crate::frame::{self, Decoder, Prefixed};
use crate::journal::{ContainerRecord, Journal, ProcessRecord, Status, Stdio};
use crate::runtime::{
    AnyMessage, CreateContainer, Exit, Keeper, ProcessIo, ProcessRef, Runtime, Spawned,
};
use crate::stdio::{self, Io, Streams};

/// Limits and identity of a [`TaskServer`].
#[derive(Clone)]
pub struct TaskOptions {
    /// containerd's namespace, for events (`k8s.io`).
    pub namespace: String,
    /// Id of the pod. Connect answers for it, too, as containerd asks in shim mode.
    pub sandbox_id: String,
    /// Pid that Connect answers as the shim's; never 0.
    pub shim_pid: u32,
    /// Most containers in the pod.
    pub max_containers: usize,
    /// Most execs of a container at the same time.
    pub max_execs: usize,
    /// How long an exit waits for its output to be read (terminal and streams).
    pub drain: Duration,
    /// Called at named points with the chance to fail; see the failpoints of the daemon.
    pub failpoint: fn(&str) -> std::result::Result<(), String>,
}

impl Default for TaskOptions {
    fn default() -> Self {
        Self {
            namespace: "k8s.io".into(),
            sandbox_id: String::new(),
            shim_pid: std::process::id(),
            max_containers: 512,
            max_execs: 1024,
            drain: Duration::from_secs(5),
            failpoint: |_| Ok(()),
        }
    }
}

pub(crate) struct Process {
    pub exec: String,
    state: Mutex<ProcessRecord>,
    io: Mutex<Io>,
    exited: watch::Sender<Option<Exit>>,
    size: Mutex<Option<(u16, u16)>>,
}

pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    fn new(exec: &str, record: ProcessRecord) -> Arc<Self> {
        Arc::new(Self {
            exec: exec.into(),
            exited: watch::Sender::new(record.exit),
            state: Mutex::new(record),
            io: Mutex::default(),
            size: Mutex::new(None),
        })
    }

    pub fn record(&self) -> ProcessRecord {
        lock(&self.state).clone()
    }
}

pub(crate) struct Container {
    pub id: String,
    pub bundle: PathBuf,
    ops: tokio::sync::Mutex<()>,
    processes: Mutex<BTreeMap<String, Arc<Process>>>,
    oom_published: AtomicU64,
    deleted: AtomicBool,
}

impl Container {
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        lock(&self.processes).get(exec).cloned().ok_or_else(|| {
            Error::NotFound(if exec.is_empty() {
                format!("container {} has no process", self.id)
            } else {
                format!("container {} has no exec {exec}", self.id)
            })
        })
    }

    fn reference(&self, p: &Process) -> ProcessRef {
        let r = lock(&p.state);
        ProcessRef {
            container: self.id.clone(),
            exec: p.exec.clone(),
            pid: r.pid,
            handle: r.handle,
        }
    }

    fn io_name(&self, exec: &str) -> String {
        format!("io/{}/{exec}/", self.id)
    }
}

/// The Task server of one pod.
pub struct TaskServer {
    pub(crate) runtime: Arc<dyn Runtime>,
    keeper: Arc<dyn Keeper>,
    journal: Arc<dyn Journal>,
    events: EventSender,
    pub(crate) options: TaskOptions,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    streams: Arc<Streams>,
    /// Ids whose create is under way.
    creating: Mutex<std::collections::HashSet<String>>,
    /// Set by [`TaskServer::serve`]; most daemons serve the pod's socket themselves.
    served: std::sync::OnceLock<Services>,
}

impl TaskServer {
    /// A server without containers.
    pub fn new(
        runtime: Arc<dyn Runtime>,
        keeper: Arc<dyn Keeper>,
        journal: Arc<dyn Journal>,
        events: EventSender,
        options: TaskOptions,
    ) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            keeper,
            journal,
            events,
            options,
            containers: Mutex::default(),
            streams: Arc::default(),
            creating: Mutex::default(),
            served: std::sync::OnceLock::new(),
        })
    }

    /// Starts to serve connections; `extra` are services beside Task and Streaming.
    ///
    /// # Errors
    /// When called twice.
    pub async fn serve(
        self: &Arc<Self>,
        extra: HashMap<String, ttrpc::r#async::Service>,
    ) -> Result<()> {
        let services = self.services().and(extra);
        self.served
            .set(services)
            .map_err(|_| Error::FailedPrecondition("this pod is served already".into()))
    }

    /// Serves one connection of the pod's socket.
    pub async fn connection(self: &Arc<Self>, mut socket: tokio::net::UnixStream) {
        let Ok((first, seen)) = frame::first_frame(&mut socket).await else { return };
        if is_stream_call(&first) {
            let mut decoder = Decoder::default();
            decoder.push(seen.get(frame::HEADER + first.body.len()..).unwrap_or_default());
            self.streams.accept(socket, decoder, first.stream).await;
        } else {
            // Not served yet: the connection ends.
            if let Some(services) = self.served.get().cloned() {
                let socket = Prefixed::new(seen, socket);
                tokio::spawn(kuasar_ttrpc::serve(socket, services, std::future::pending()));
            }
        }
    }

    /// The streams of this pod's processes, for connections that carry one each.
    pub fn streams(&self) -> &Arc<Streams> {
        &self.streams
    }

    fn hit(&self, point: &str) -> Result<()> {
        (self.options.failpoint)(point)
            .map_err(|e| Error::internal(format!("failpoint {point}"), e))
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("container {id:.130} is not known")))
    }

    /// Ids of the containers.
    pub fn containers(&self) -> Vec<String> {
        lock(&self.containers).keys().cloned().collect()
    }

    /// Pid of a container's init process, and how it ended if it has.
    pub fn init_of(&self, container: &str) -> Option<(u32, Option<Exit>)> {
        let c = lock(&self.containers).get(container).cloned()?;
        let record = c.process("").ok()?.record();
        Some((record.pid, record.exit))
    }

    /// Handles of all processes, ended or not, that a runtime may still know by them.
    pub fn handles(&self) -> Vec<u64> {
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        let of = |c: &Arc<Container>| -> Vec<u64> {
            lock(&c.processes).values().map(|p| lock(&p.state).handle).collect()
        };
        containers.iter().flat_map(of).collect()
    }

    /// Every process that is not known to have ended.
    pub fn processes(&self) -> Vec<ProcessRef> {
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        let mut all = Vec::new();
        for c in containers {
            for p in lock(&c.processes).values() {
                let r = c.reference(p);
                if r.pid != 0 && lock(&p.state).exit.is_none() {
                    all.push(r);
                }
            }
        }
        all
    }

    fn save(&self, c: &Container) -> Result<()> {
        let processes = lock(&c.processes).iter().map(|(k, p)| (k.clone(), p.record())).collect();
        self.journal.save(&ContainerRecord {
            id: c.id.clone(),
            bundle: c.bundle.clone(),
            processes,
            oom_kills: c.oom_published.load(Ordering::Relaxed),
            other: BTreeMap::new(),
        })
    }

    fn event(&self, event: &Event) {
        self.events.send(&self.options.namespace, event);
    }

    // ---- creation -----------------------------------------------------------------------

    pub(crate) async fn create(
        self: &Arc<Self>,
        request: CreateContainer,
        stdio: Stdio,
    ) -> Result<u32> {
        kuasar_host::id::check("container", &request.id)
            .map_err(|e| Error::InvalidArgument(e.to_string()))?;
        let id = request.id.clone();
        {
            let mut creating = lock(&self.creating);
            let containers = lock(&self.containers);
            if containers.contains_key(&id) || !creating.insert(id.clone()) {
                return Err(Error::AlreadyExists(format!("container {id} exists")));
            }
            if containers.len() + creating.len() > self.options.max_containers {
                creating.remove(&id);
                return Err(Error::ResourceExhausted(format!(
                    "the pod has {} containers, the most that are allowed",
                    self.options.max_containers
                )));
            }
        }
        let this = self.clone();
        let made = tokio::spawn(async move {
            let made = this.create_container(&request, stdio).await;
            lock(&this.creating).remove(&request.id);
            made
        })
        .await;
        made.unwrap_or_else(|e| {
            lock(&self.creating).remove(&id);
            Err(Error::internal("creating the container panicked", e))
        })
    }

    async fn create_container(
        self: &Arc<Self>,
        request: &CreateContainer,
        stdio: Stdio,
    ) -> Result<u32> {
        self.hit("task.create.before")?;
        let name = format!("io/{}/", request.id);
        let init = format!("{name}/");
        self.streams.expect_raw(&stdio)?;
        let names = stdio.clone();
        let made = async {
            if request.checkpoint.is_some() {
                return self.create_restored(request, stdio).await;
            }
            let (process_io, prepared) = stdio::open(&stdio, &init, &*self.keeper).await?;
            let spawned = self.runtime.create(request, process_io).await?;
            let process = Process::new(
                "",
                ProcessRecord {
                    pid: spawned.pid,
                    handle: spawned.handle,
                    status: Status::Created,
                    exit: None,
                    stdio,
                    spec: None,
                    stdin_closed: false,
                },
            );
            let container = Arc::new(Container {
                id: request.id.clone(),
                bundle: request.bundle.clone(),
                ops: tokio::sync::Mutex::default(),
                processes: Mutex::new(BTreeMap::from([(String::new(), process.clone())])),
                oom_published: AtomicU64::new(0),
                deleted: AtomicBool::new(false),
            });
            let ready = async {
                self.save(&container)?;
                *lock(&process.io) =
                    prepared.attach(spawned.terminal, &*self.keeper, &self.streams).await?;
                self.hit("task.create.after")
            };
            if let Err(e) = ready.await {
                let r = container.reference(&process);
                // Undo; the first error is the one to report.
                let _ = self.runtime.kill(&r, libc::SIGKILL, true).await;
                let _ = self.runtime.delete(&request.id, &request.bundle).await;
                self.runtime.exit_recorded(&r).await;
                self.journal.remove(&request.id);
                return Err(e);
            }
            lock(&self.containers).insert(request.id.clone(), container.clone());
            self.watch(container.clone(), process, spawned.exit);
            self.watch_oom(container).await;
            Ok(spawned.pid)
        }
        .await;
        match made {
            Ok(pid) => {
                self.event(&Event::Create(ev::TaskCreate {
                    container_id: request.id.clone(),
                    bundle: request.bundle.to_string_lossy().into_owned(),
                    rootfs: request.rootfs.iter().map(wire_mount).collect(),
                    pid,
                    checkpoint: request
                        .checkpoint
                        .as_ref()
                        .map(|p| p.to_string_lossy().into_owned())
                        .unwrap_or_default(),
                    ..ev::TaskCreate::default()
                }));
                Ok(pid)
            }
            Err(e) => {
                self.streams.forget_raw(&names);
                // What was kept for a container that is none is not worth a second error.
                let _ = self.keeper.forget(&name).await;
                Err(e)
            }
        }
    }

    /// A container that goes on from a checkpoint has no process before Start: CRIU lets it run
    /// as soon as it is there. Its stdio is opened then, as that of an exec is.
    async fn create_restored(&self, request: &CreateContainer, stdio: Stdio) -> Result<u32> {
        self.runtime.prepare_restore(request).await?;
        let record = ProcessRecord {
            pid: 0,
            handle: 0,
            status: Status::Created,
            exit: None,
            stdio,
            spec: None,
            stdin_closed: false,
        };
        let container = Arc::new(Container {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            ops: tokio::sync::Mutex::default(),
            processes: Mutex::new(BTreeMap::from([(String::new(), Process::new("", record))])),
            oom_published: AtomicU64::new(0),
            deleted: AtomicBool::new(false),
        });
        if let Err(e) = self.save(&container).and_then(|()| self.hit("task.create.after")) {
            let _ = self.runtime.delete(&request.id, &request.bundle).await;
            self.journal.remove(&request.id);
            return Err(e);
        }
        lock(&self.containers).insert(request.id.clone(), container);
        Ok(0)
    }

    /// Waits for a process's end in a task of its own.
    fn watch(self: &Arc<Self>, c: Arc<Container>, p: Arc<Process>, exit: BoxFuture<'static, Exit>) {
        let this = self.clone();
        tokio::spawn(async move {
            let exit = exit.await;
            this.ended(&c, &p, exit).await;
        });
    }

    async fn ended(&self, c: &Arc<Container>, p: &Arc<Process>, exit: Exit) {
        {
            let mut r = lock(&p.state);
            r.status = Status::Stopped;
            r.exit = Some(exit);
        }
        if !c.deleted.load(Ordering::Acquire) {
            if let Err(e) = self.save(c) {
                // The runtime still has the exit, so a restart finds it there.
                tracing::error!(container = %c.id, exec = %p.exec, "exit not recorded: {}", e.chain());
            } else {
                self.runtime.exit_recorded(&c.reference(p)).await;
            }
        }
        self.tell(c, p, exit).await;
    }

    /// Tells a recorded end, when everything that was written before it has been read.
    async fn tell(&self, c: &Arc<Container>, p: &Arc<Process>, exit: Exit) {
        let outputs = lock(&p.io).take_outputs();
        if !outputs.is_empty() {
            let aborts: Vec<_> =
                outputs.iter().map(tokio::task::JoinHandle::abort_handle).collect();
            let drained = futures::future::join_all(outputs);
            if tokio::time::timeout(self.options.drain, drained).await.is_err() {
                tracing::warn!(container = %c.id, exec = %p.exec, "output is not read: given up");
                aborts.iter().for_each(tokio::task::AbortHandle::abort);
            }
        }
        // Our ends go, so that readers see the end.
        *lock(&p.io) = Io::default();
        self.streams.forget_raw(&p.record().stdio);
        let _ = self.keeper.forget(&c.io_name(&p.exec)).await;
        self.publish_oom(c);
        self.event(&Event::Exit(ev::TaskExit {
            container_id: c.id.clone(),
            id: if p.exec.is_empty() { c.id.clone() } else { p.exec.clone() },
            pid: lock(&p.state).pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..ev::TaskExit::default()
        }));
        p.exited.send_replace(Some(exit));
    }

    fn publish_oom(&self, c: &Container) {
        let kills = self.runtime.oom_kills(&c.id);
        let told = c.oom_published.fetch_max(kills, Ordering::Relaxed);
        if kills > told {
            self.event(&Event::Oom(ev::TaskOOM {
                container_id: c.id.clone(),
                ..ev::TaskOOM::default()
            }));
        }
    }

    async fn watch_oom(self: &Arc<Self>, c: Arc<Container>) {
        let Some(fd) = self.runtime.oom_watch(&c.id).await else { return };
        let this = Arc::downgrade(self);
        let Ok(fd) = stdio::pump_register(fd) else { return };
        tokio::spawn(async move {
            let mut buf = [0u8; 512];
            while let Ok(mut guard) = fd.readable().await {
                let read = guard.try_io(|f| {
                    nix::unistd::read(f.get_ref(), &mut buf).map_err(std::io::Error::from)
                });
                let Some(server) = this.upgrade() else { return };
                if c.deleted.load(Ordering::Acquire) || matches!(read, Ok(Err(_))) {
                    return;
                }
                server.publish_oom(&c);
            }
        });
    }

    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let (this, c) = (self.clone(), self.container(id)?);
        let exec = exec.to_owned();
        tokio::spawn(async move {
            let _ops = c.ops.lock().await;
            let p = c.process(&exec)?;
            let record = p.record();
            if record.status != Status::Created {
                return Err(Error::FailedPrecondition(format!(
                    "cannot start: the process is {:?}",
                    record.status
                )));
            }
            this.hit("task.start.before")?;
            let pid = if exec.is_empty() && record.pid == 0 {
                let pid = this.start_late(&c, &p, &record).await?;
                this.watch_oom(c.clone()).await;
                pid
            } else if exec.is_empty() {
                this.runtime.start(&c.id, record.pid).await?;
                // It may have ended already.
                let mut r = lock(&p.state);
                if r.status == Status::Created {
                    r.status = Status::Running;
                }
                record.pid
            } else {
                let init = lock(&c.process("")?.state).status;
                if !matches!(init, Status::Running) {
                    return Err(Error::FailedPrecondition(format!("the container is {init:?}")));
                }
                this.start_late(&c, &p, &record).await?
            };
            this.save(&c)?;
            this.hit("task.start.after")?;
            let event = if exec.is_empty() {
                Event::Start(ev::TaskStart {
                    container_id: c.id.clone(),
                    pid,
                    ..ev::TaskStart::default()
                })
            } else {
                Event::ExecStarted(ev::TaskExecStarted {
                    container_id: c.id.clone(),
                    exec_id: exec,
                    pid,
                    ..ev::TaskExecStarted::default()
                })
            };
            this.event(&event);
            Ok(pid)
        })
        .await
        .unwrap_or_else(|e| Err(Error::internal("starting the process panicked", e)))
    }

    /// Starts what had no process before: an exec, or a container from a checkpoint.
    async fn start_late(
        self: &Arc<Self>,
        c: &Arc<Container>,
        p: &Arc<Process>,
        record: &ProcessRecord,
    ) -> Result<u32> {
        let name = c.io_name(&p.exec);
        let started = async {
            let (mut io, prepared) = stdio::open(&record.stdio, &name, &*self.keeper).await?;
            if let ProcessIo::Terminal { size } = &mut io {
                *size = *lock(&p.size);
            }
            let spec = record.spec.as_deref().unwrap_or_default().as_bytes();
            let spawned: Spawned = if p.exec.is_empty() {
                self.runtime.restore(&c.id, io).await?
            } else {
                self.runtime.exec(&c.id, &p.exec, spec, io).await?
            };
            {
                let mut r = lock(&p.state);
                r.pid = spawned.pid;
                r.handle = spawned.handle;
                r.status = Status::Running;
                r.spec = None;
            }
            let io = prepared.attach(spawned.terminal, &*self.keeper, &self.streams).await?;
            if let Some((w, h)) = *lock(&p.size) {
                // A program without a screen size still runs.
                let _ = io.resize(w, h);
            }
            *lock(&p.io) = io;
            self.watch(c.clone(), p.clone(), spawned.exit);
            Ok(spawned.pid)
        };
        match started.await {
            Ok(pid) => Ok(pid),
            Err(e) => {
                // It counts as ended, so that a Wait that is open ends, and Delete works.
                let exit = Exit { status: 255, at: SystemTime::now() };
                {
                    let mut r = lock(&p.state);
                    r.status = Status::Stopped;
                    r.exit = Some(exit);
                }
                p.exited.send_replace(Some(exit));
                self.streams.forget_raw(&record.stdio);
                let _ = self.keeper.forget(&name).await;
                Err(e)
            }
        }
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec: &str,
        stdio: Stdio,
        spec: String,
    ) -> Result<()> {
        kuasar_host::id::check("exec", exec).map_err(|e| Error::InvalidArgument(e.to_string()))?;
        let c = self.container(id)?;
        let _ops = c.ops.lock().await;
        self.hit("task.exec.before")?;
        {
            let mut processes = lock(&c.processes);
            if processes.contains_key(exec) {
                return Err(Error::AlreadyExists(format!("exec {exec} exists")));
            }
            if processes.len() > self.options.max_execs {
                return Err(Error::ResourceExhausted(format!(
                    "container {id} has {} execs, the most that are allowed",
                    self.options.max_execs
                )));
            }
            self.streams.expect_raw(&stdio)?;
            let record = ProcessRecord {
                pid: 0,
                handle: 0,
                status: Status::Created,
                exit: None,
                stdio,
                spec: Some(spec),
                stdin_closed: false,
            };
            processes.insert(exec.into(), Process::new(exec, record));
        }
        if let Err(e) = self.save(&c).and_then(|()| self.hit("task.exec.after")) {
            if let Some(p) = lock(&c.processes).remove(exec) {
                self.streams.forget_raw(&p.record().stdio);
            }
            return Err(e);
        }
        self.event(&Event::ExecAdded(ev::TaskExecAdded {
            container_id: id.into(),
            exec_id: exec.into(),
            ..ev::TaskExecAdded::default()
        }));
        Ok(())
    }

    // ---- the rest of a life ---------------------------------------------------------------

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<Exit> {
        let p = self.container(id)?.process(exec)?;
        let mut rx = p.exited.subscribe();
        let exit = rx.wait_for(Option::is_some).await.ok().and_then(|e| *e);
        exit.ok_or_else(|| Error::NotFound(format!("container {id} has been deleted")))
    }

    pub(crate) async fn kill(&self, id: &str, exec: &str, signal: i32, all: bool) -> Result<()> {
        let c = self.container(id)?;
        let p = c.process(exec)?;
        let r = p.record();
        let exec_ended = r.pid == 0 || r.exit.is_some();
        if exec_ended && !all {
            return Err(Error::NotFound("process already finished".into()));
        }
        if !(0..=64).contains(&signal) {
            return Err(Error::InvalidArgument(format!("there is no signal {signal}")));
        }
        match self.runtime.kill(&c.reference(&p), signal, all).await {
            // With `all` on an ended container there may be nobody left, which is what is wanted.
            Err(Error::NotFound(_)) if all => Ok(()),
            other => other,
        }
    }

    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let (this, c, exec) = (self.clone(), self.container(id)?, exec.to_owned());
        tokio::spawn(async move {
            let _ops = c.ops.lock().await;
            let p = c.process(&exec)?;
            let r = p.record();
            if r.exit.is_none() && r.status != Status::Created {
                return Err(Error::FailedPrecondition(format!(
                    "cannot delete: the process is {:?}, kill it first",
                    r.status
                )));
            }
            this.hit("task.delete.before")?;
            if exec.is_empty() {
                this.delete_container(&c, &p).await
            } else {
                this.delete_exec(&c, &p).await
            }
        })
        .await
        .unwrap_or_else(|e| Err(Error::internal("deleting the process panicked", e)))
    }

    async fn delete_exec(&self, c: &Arc<Container>, p: &Arc<Process>) -> Result<(u32, Exit)> {
        let r = p.record();
        if r.pid == 0 {
            // A server that died while it started this one may have left its streams.
            let _ = self.keeper.forget(&c.io_name(&p.exec)).await;
        }
        lock(&c.processes).remove(&p.exec);
        self.streams.forget(&p.exec);
        self.streams.forget_raw(&r.stdio);
        self.save(c)?;
        self.hit("task.delete.after")?;
        Ok((r.pid, r.exit.unwrap_or(Exit { status: 0, at: SystemTime::now() })))
    }

    async fn delete_container(
        self: &Arc<Self>,
        c: &Arc<Container>,
        p: &Arc<Process>,
    ) -> Result<(u32, Exit)> {
        let reference = c.reference(p);
        let mut exit = p.record().exit;
        if exit.is_none() && reference.pid != 0 {
            // Created and never started: it waits for a start that will not come.
            let _ = self.runtime.kill(&reference, libc::SIGKILL, true).await;
            let mut rx = p.exited.subscribe();
            let waited = tokio::time::timeout(self.options.drain, rx.wait_for(Option::is_some));
            exit = waited.await.ok().and_then(std::result::Result::ok).and_then(|e| *e);
        }
        self.publish_oom(c);
        c.deleted.store(true, Ordering::Release);
        if let Err(e) = self.runtime.delete(&c.id, &c.bundle).await {
            c.deleted.store(false, Ordering::Release);
            return Err(e);
        }
        let exit = exit.unwrap_or(Exit { status: 137, at: SystemTime::now() });
        for p in lock(&c.processes).values() {
            self.streams.forget_raw(&p.record().stdio);
            // Waits on execs that ended with the container.
            p.exited.send_if_modified(|e| e.is_none() && e.replace(exit).is_none());
        }
        let _ = self.keeper.forget(&format!("io/{}/", c.id)).await;
        self.journal.remove(&c.id);
        lock(&self.containers).remove(&c.id);
        self.streams.forget(&c.id);
        self.runtime.exit_recorded(&reference).await;
        self.hit("task.delete.after")?;
        self.event(&Event::Delete(ev::TaskDelete {
            container_id: c.id.clone(),
            pid: reference.pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..ev::TaskDelete::default()
        }));
        Ok((reference.pid, exit))
    }

    pub(crate) async fn resize(&self, id: &str, exec: &str, width: u32, height: u32) -> Result<()> {
        let c = self.container(id)?;
        let p = c.process(exec)?;
        let clamp = |v: u32| u16::try_from(v).unwrap_or(u16::MAX);
        let (width, height) = (clamp(width), clamp(height));
        *lock(&p.size) = Some((width, height));
        let process = c.reference(&p);
        // A process that does not run yet gets the size when it does.
        if process.pid != 0 && self.runtime.resize(&process, width, height).await? {
            return Ok(());
        }
        lock(&p.io).resize(width, height)?;
        if matches!(p.record().status, Status::Running) {
            self.runtime.resized(&process).await;
        }
        Ok(())
    }

    pub(crate) fn close_stdin(&self, id: &str, exec: &str) -> Result<()> {
        let c = self.container(id)?;
        let p = c.process(exec)?;
        let first = !std::mem::replace(&mut lock(&p.state).stdin_closed, true);
        lock(&p.io).close_stdin();
        if first {
            let (keeper, name) = (self.keeper.clone(), format!("{}stdin", c.io_name(exec)));
            tokio::spawn(async move {
                // Without it the process would never see the end of its input.
                if let Err(e) = keeper.forget(&name).await {
                    tracing::error!(%name, "kept input not closed: {}", e.chain());
                }
            });
            self.save(&c)?;
        }
        Ok(())
    }

    pub(crate) async fn set_paused(&self, id: &str, paused: bool) -> Result<()> {
        let c = self.container(id)?;
        let _ops = c.ops.lock().await;
        let p = c.process("")?;
        let now = lock(&p.state).status;
        let (from, to) = if paused {
            (Status::Running, Status::Paused)
        } else {
            (Status::Paused, Status::Running)
        };
        if now != from {
            return Err(Error::FailedPrecondition(format!("the container is {now:?}")));
        }
        if paused {
            self.runtime.pause(id).await?;
        } else {
            self.runtime.resume(id).await?;
        }
        {
            let mut r = lock(&p.state);
            if r.status == from {
                r.status = to;
            }
        }
        self.save(&c)?;
        let container_id = id.to_owned();
        self.event(&if paused {
            Event::Paused(ev::TaskPaused { container_id, ..ev::TaskPaused::default() })
        } else {
            Event::Resumed(ev::TaskResumed { container_id, ..ev::TaskResumed::default() })
        });
        Ok(())
    }

    pub(crate) async fn checkpoint(
        &self,
        id: &str,
        path: &str,
        options: Option<AnyMessage>,
    ) -> Result<()> {
        let c = self.container(id)?;
        let _ops = c.ops.lock().await;
        let now = lock(&c.process("")?.state).status;
        if !matches!(now, Status::Running | Status::Paused) {
            return Err(Error::FailedPrecondition(format!("the container is {now:?}")));
        }
        self.runtime.checkpoint(id, std::path::Path::new(path), options).await?;
        self.event(&Event::Checkpointed(ev::TaskCheckpointed {
            container_id: id.into(),
            checkpoint: path.into(),
            ..ev::TaskCheckpointed::default()
        }));
        Ok(())
    }

    // ---- whole pod ------------------------------------------------------------------------

    /// Removes containers of which the runtime has something and the journal nothing: a server
    /// died while it made them. Call after [`TaskServer::recover`], when nothing that the last
    /// server began is still under way.
    pub async fn sweep(&self) {
        for id in self.runtime.existing().await {
            if lock(&self.containers).contains_key(&id) || lock(&self.creating).contains(&id) {
                continue;
            }
            tracing::info!(container = %id, "removing what is left of an unfinished create");
            if let Err(e) = self.runtime.delete(&id, std::path::Path::new("")).await {
                tracing::error!(container = %id, "it cannot be removed: {}", e.chain());
            }
            let _ = self.keeper.forget(&format!("io/{id}/")).await;
        }
    }

    /// Kills every process of every container and waits until all have ended, at most `deadline`.
    ///
    /// # Errors
    /// [`Error::DeadlineExceeded`] when one would not end.
    pub async fn kill_all(&self, deadline: Duration) -> Result<()> {
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        for c in &containers {
            if let Ok(p) = c.process("")
                && lock(&p.state).pid != 0
            {
                // Ended ones answer NotFound; whoever is left shows below.
                let _ = self.runtime.kill(&c.reference(&p), libc::SIGKILL, true).await;
            }
        }
        let all = async {
            for c in &containers {
                let Ok(p) = c.process("") else { continue };
                if lock(&p.state).pid == 0 {
                    continue; // From a checkpoint, and not started.
                }
                let mut rx = p.exited.subscribe();
                let _ = rx.wait_for(Option::is_some).await;
            }
        };
        tokio::time::timeout(deadline, all).await.map_err(|_| {
            Error::DeadlineExceeded(format!("containers have not ended within {deadline:?}"))
        })
    }

    /// Deletes every container, dead or alive.
    ///
    /// # Errors
    /// The first one that failed; the others are deleted all the same.
    pub async fn delete_all(self: &Arc<Self>) -> Result<()> {
        let mut first = Ok(());
        for id in self.containers() {
            let Ok(c) = self.container(&id) else { continue };
            let Ok(p) = c.process("") else { continue };
            let _ops = c.ops.lock().await;
            let deleted = self.delete_container(&c, &p).await;
            if let Err(e) = deleted
                && !matches!(e, Error::NotFound(_))
                && first.is_ok()
            {
                first = Err(e);
            }
        }
        first
    }

    /// Takes up what the journal knows. Call before [`TaskServer::serve`].
    pub async fn recover(self: &Arc<Self>) {
        for record in self.journal.load() {
            let id = record.id.clone();
            let c = Arc::new(Container {
                id: record.id,
                bundle: record.bundle,
                ops: tokio::sync::Mutex::default(),
                processes: Mutex::default(),
                oom_published: AtomicU64::new(record.oom_kills),
                deleted: AtomicBool::new(false),
            });
            lock(&self.containers).insert(id, c.clone());
            for (exec, r) in record.processes {
                let p = Process::new(&exec, r.clone());
                lock(&c.processes).insert(exec.clone(), p.clone());
                if r.exit.is_none()
                    && let Err(e) = self.streams.expect_raw(&r.stdio)
                {
                    tracing::error!(container = %c.id, %exec, "streams are lost: {}", e.chain());
                }
                if r.pid == 0 {
                    continue;
                }
                let name = c.io_name(&exec);
                let streams = &self.streams;
                match stdio::recover(&r.stdio, r.stdin_closed, &name, &*self.keeper, streams).await
                {
                    Ok(io) => *lock(&p.io) = io,
                    Err(e) => {
                        tracing::error!(container = %c.id, %exec, "stdio is lost: {}", e.chain());
                    }
                }
                if let Some(exit) = r.exit {
                    // The last server may have died before it told: a second time does no harm.
                    p.exited.send_replace(None);
                    let (this, c) = (self.clone(), c.clone());
                    tokio::spawn(async move { this.tell(&c, &p, exit).await });
                    continue;
                }
                match self.runtime.reattach(&c.reference(&p)).await {
                    Ok(Some(exit)) => self.watch(c.clone(), p, exit),
                    other => {
                        if let Err(e) = other {
                            tracing::error!(container = %c.id, %exec, "process is lost: {}", e.chain());
                        }
                        let exit = Exit { status: 255, at: SystemTime::now() };
                        self.ended(&c, &p, exit).await;
                    }
                }
            }
            if lock(&c.processes).get("").is_some_and(|p| lock(&p.state).exit.is_none()) {
                self.watch_oom(c).await;
            }
        }
    }
}

fn is_stream_call(first: &frame::Frame) -> bool {
    first.kind == frame::REQUEST
        && <ttrpc::proto::Request as ttrpc::proto::Codec>::decode(&first.body).is_ok_and(
            |r: ttrpc::proto::Request| {
                r.service == "containerd.services.streaming.v1.Streaming" && r.method == "Stream"
            },
        )
}

fn wire_mount(m: &crate::runtime::Mount) -> pm::Mount {
    pm::Mount {
        type_: m.kind.clone(),
        source: m.source.clone(),
        target: m.target.clone(),
        options: m.options.clone(),
        ..pm::Mount::default()
    }
}

/// The wire's status of a process.
pub(crate) fn wire_status(s: Status) -> EnumOrUnknown<kuasar_protos::shim::types::task::Status> {
    use kuasar_protos::shim::types::task::Status as Wire;
    EnumOrUnknown::new(match s {
        Status::Created => Wire::CREATED,
        Status::Running => Wire::RUNNING,
        Status::Paused => Wire::PAUSED,
        Status::Stopped => Wire::STOPPED,
    })
}

/// Time of an exit, absent while there is none.
pub(crate) fn exit_time(
    e: Option<Exit>,
) -> MessageField<protobuf::well_known_types::timestamp::Timestamp> {
    e.map(|e| timestamp(e.at)).unwrap_or_default()
}

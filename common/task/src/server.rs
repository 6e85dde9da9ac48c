//! The process table of one pod, and everything that changes it.
//!
//! * A container's operations that change it (`ops`) are done one at a time; reads never wait.
//! * A change is in the journal before it is answered. It is done in a task of its own, so that
//!   a client that hangs up in the middle leaves no half state.
//! * An exit goes: table → journal → runtime may forget → output drained → events → waiters.

mod create;
mod end;
mod recovery;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kuasar_protos::shim::events::task as ev;
use kuasar_protos::shim::types::mount as pm;
use kuasar_ttrpc::Services;
use protobuf::{EnumOrUnknown, MessageField};
use tokio::sync::watch;

use crate::declared::Declared;
use crate::error::{Error, Result};
use crate::events::{Event, EventSender, timestamp};
use crate::frame::{self, Decoder, Prefixed};
use crate::journal::{ContainerRecord, Journal, ProcessRecord, Status};
use crate::runtime::{AnyMessage, Exit, Keeper, ProcessRef, Runtime};
use crate::stdio::{Io, Streams};

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
    /// It was sent SIGKILL, and somebody sees to its end.
    doomed: std::sync::atomic::AtomicBool,
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
            doomed: std::sync::atomic::AtomicBool::new(false),
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
    /// Held while the record is written: an exit may come beside anything, and an older record must
    /// not replace a newer one.
    saving: Mutex<()>,
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
    /// What the engine has announced.
    declared: Mutex<Arc<Declared>>,
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
            declared: Mutex::default(),
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

    /// The engine has announced these containers and execs, and no others any more. An exec that it
    /// has taken off the list is deleted once it has ended: iSulad deletes none itself.
    pub async fn declare(self: &Arc<Self>, list: Declared) {
        let before = self.expect(list);
        let list = self.declared();
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        for c in containers {
            let gone = |exec: &&String| before.has_exec(&c.id, exec) && !list.has_exec(&c.id, exec);
            let execs: Vec<String> = lock(&c.processes).keys().filter(gone).cloned().collect();
            for exec in execs {
                if let Err(e) = self.delete(&c.id, &exec).await {
                    tracing::debug!(container = %c.id, %exec, "not deleted yet: {}", e.chain());
                }
            }
        }
    }

    /// The same before there are containers: after a restart. Answers what was announced before.
    pub fn expect(&self, list: Declared) -> Arc<Declared> {
        std::mem::replace(&mut *lock(&self.declared), Arc::new(list))
    }

    pub(crate) fn declared(&self) -> Arc<Declared> {
        lock(&self.declared).clone()
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

    /// Whether the engine has containers here, or has announced some: they may be somebody else's,
    /// as a guest's.
    pub fn is_used(&self) -> bool {
        !lock(&self.containers).is_empty() || !self.declared().is_empty()
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

    /// What is known of each container, in the order of their ids.
    pub fn records(&self) -> Vec<ContainerRecord> {
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        let mut all: Vec<_> = containers.iter().map(|c| Self::record_of(c)).collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    fn record_of(c: &Container) -> ContainerRecord {
        let processes = lock(&c.processes).iter().map(|(k, p)| (k.clone(), p.record())).collect();
        ContainerRecord {
            id: c.id.clone(),
            bundle: c.bundle.clone(),
            processes,
            oom_kills: c.oom_published.load(Ordering::Relaxed),
            other: BTreeMap::new(),
        }
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
        let _one = lock(&c.saving);
        self.journal.save(&Self::record_of(c))
    }

    fn event(&self, event: &Event) {
        self.events.send(&self.options.namespace, &self.options.sandbox_id, event);
    }

    // ---- creation -----------------------------------------------------------------------

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
        if signal == libc::SIGKILL && exec.is_empty() && r.exit.is_none() {
            self.see_it_end(id, &p);
        }
        match self.runtime.kill(&c.reference(&p), signal, all).await {
            // With `all` on an ended container there may be nobody left, which is what is wanted.
            Err(Error::NotFound(_)) if all => Ok(()),
            other => other,
        }
    }

    /// Sees to it that a container which is sent SIGKILL ends, whatever its kernel says of it.
    fn see_it_end(&self, id: &str, p: &Process) {
        let Some(limit) = self.runtime.unkillable_after() else { return };
        if p.doomed.swap(true, std::sync::atomic::Ordering::Relaxed) {
            return;
        }
        let limit = limit.saturating_add(self.options.drain);
        let (runtime, id) = (self.runtime.clone(), id.to_owned());
        let mut exited = p.exited.subscribe();
        tokio::spawn(async move {
            if tokio::time::timeout(limit, exited.wait_for(Option::is_some)).await.is_err() {
                tracing::error!(
                    container = id,
                    ?limit,
                    "has not ended by SIGKILL: the kernel of its pod is ended"
                );
                runtime.end_kernel().await;
            }
        });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::FileJournal;
    use crate::runtime::NoKeeper;

    #[test]
    fn records_of_a_container_that_are_written_side_by_side_are_all_written() {
        let dir = tempfile::tempdir().unwrap();
        let server = TaskServer::new(
            Arc::new(crate::testing::Nothing),
            Arc::new(NoKeeper),
            Arc::new(FileJournal::new(dir.path()).unwrap()),
            EventSender::none(),
            TaskOptions::default(),
        );
        let container = Container {
            id: "c1".into(),
            bundle: PathBuf::new(),
            ops: tokio::sync::Mutex::default(),
            saving: Mutex::default(),
            processes: Mutex::default(),
            oom_published: AtomicU64::new(0),
            deleted: AtomicBool::new(false),
        };
        std::thread::scope(|threads| {
            for _ in 0..8 {
                threads.spawn(|| (0..200).for_each(|_| server.save(&container).unwrap()));
            }
        });
    }
}

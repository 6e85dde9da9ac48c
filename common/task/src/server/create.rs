//! How processes come: containers, execs, restored ones.

use super::{Container, Process, TaskServer, lock, wire_mount};
use crate::error::{Error, Result};
use crate::events::Event;
use crate::journal::{ProcessRecord, Status, Stdio};
use crate::runtime::{CreateContainer, Exit, ProcessIo, Spawned};
use crate::stdio;
use kuasar_protos::shim::events::task as ev;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

impl TaskServer {
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
        let work = Box::pin(async move {
            let made = this.create_container(&request, stdio).await;
            lock(&this.creating).remove(&request.id);
            made
        });
        let made = tokio::spawn(kuasar_trace::within(kuasar_trace::current(), work)).await;
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
            let (process_io, mut prepared) = stdio::open(&stdio, &init)?;
            let made = self.runtime.create(request, process_io);
            let (kept, spawned) = futures::join!(prepared.keep(&*self.keeper), made);
            let spawned = spawned?;
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
                saving: Mutex::default(),
                processes: Mutex::new(BTreeMap::from([(String::new(), process.clone())])),
                oom_published: AtomicU64::new(0),
                deleted: AtomicBool::new(false),
            });
            let ready = async {
                kept?;
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
            // Nothing runs in it before Start.
            let this = self.clone();
            tokio::spawn(async move { this.watch_oom(container).await });
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
            saving: Mutex::default(),
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

    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let (this, c) = (self.clone(), self.container(id)?);
        let exec = exec.to_owned();
        let work = Box::pin(async move {
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
        });
        tokio::spawn(kuasar_trace::within(kuasar_trace::current(), work))
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
            let (mut io, mut prepared) = stdio::open(&record.stdio, &name)?;
            if let ProcessIo::Terminal { size } = &mut io {
                *size = *lock(&p.size);
            }
            let spec = record.spec.as_deref().unwrap_or_default().as_bytes();
            let made = async {
                if p.exec.is_empty() {
                    self.runtime.restore(&c.id, io).await
                } else {
                    self.runtime.exec(&c.id, &p.exec, spec, io).await
                }
            };
            let (kept, spawned) = futures::join!(prepared.keep(&*self.keeper), made);
            let spawned: Spawned = spawned?;
            {
                let mut r = lock(&p.state);
                r.pid = spawned.pid;
                r.handle = spawned.handle;
                r.status = Status::Running;
                r.spec = None;
            }
            let attached = async {
                kept?;
                prepared.attach(spawned.terminal, &*self.keeper, &self.streams).await
            };
            let io = match attached.await {
                Ok(io) => io,
                Err(e) => {
                    // Nobody would hear of it again; the first error is the one to report.
                    let r = c.reference(p);
                    let _ = self.runtime.kill(&r, libc::SIGKILL, false).await;
                    self.runtime.exit_recorded(&r).await;
                    return Err(e);
                }
            };
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
}

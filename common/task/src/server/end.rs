//! How processes end: exits are recorded before they are told; and what is deleted.

use super::{Container, Process, TaskServer, lock};
use crate::error::{Error, Result};
use crate::events::{Event, timestamp};
use crate::journal::Status;
use crate::runtime::Exit;
use crate::stdio;
use crate::stdio::Io;
use futures::future::BoxFuture;
use kuasar_protos::shim::events::task as ev;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

impl TaskServer {
    /// Waits for a process's end in a task of its own.
    pub(super) fn watch(
        self: &Arc<Self>,
        c: Arc<Container>,
        p: Arc<Process>,
        exit: BoxFuture<'static, Exit>,
    ) {
        let this = self.clone();
        tokio::spawn(async move {
            let exit = exit.await;
            this.ended(&c, &p, exit).await;
        });
    }

    pub(super) async fn ended(&self, c: &Arc<Container>, p: &Arc<Process>, exit: Exit) {
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
    pub(super) async fn tell(&self, c: &Arc<Container>, p: &Arc<Process>, exit: Exit) {
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

    pub(super) async fn watch_oom(self: &Arc<Self>, c: Arc<Container>) {
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

    /// Deletes a container or, where it is named, an exec; answers its pid and how it ended.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] while it runs; [`Error::NotFound`].
    pub async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<(u32, Exit)> {
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

    pub(super) async fn delete_container(
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
}

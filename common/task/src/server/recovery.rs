//! Whole pods: taken up by a new daemon, swept, killed, deleted.

use super::{Container, Process, TaskServer, lock};
use crate::error::{Error, Result};
use crate::runtime::Exit;
use crate::stdio;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

impl TaskServer {
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
                saving: Mutex::default(),
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

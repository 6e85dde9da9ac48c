//! What a new daemon does before it listens.
//!
//! Every record says how far its sandbox had come. What was not answered yet (Creating,
//! Starting) is rolled back, because containerd has given it up; what was ordered (Stopping,
//! Removing) is done; what ran is taken up again. Sandboxes are recovered side by side and each
//! has a deadline: one that cannot be recovered is Stopped with status 255, so that the engine
//! removes it, and does not keep the others from coming back.

use std::sync::Arc;
use std::time::SystemTime;

use futures::StreamExt as _;

use crate::actor::{Actor, Left, guard};
use crate::controller::{Controller, Core};
use crate::endpoint::Opened;
use crate::error::Result;
use crate::sandboxer::{Recovered, SandboxExit, Started};
use crate::store::{Phase, Record};

impl Controller {
    /// Takes up all recorded sandboxes, removes what belongs to none, and lets connections to
    /// pods come. Called by [`Controller::serve`].
    ///
    /// # Errors
    /// When the state directory cannot be read or the pods' sockets cannot be taken over.
    pub async fn recover(&self) -> Result<()> {
        let since = std::time::Instant::now();
        let mut actors = Vec::new();
        let loaded = self.core.store.load()?;
        // Not ours to clear: what a newer version wrote, and what is more than the limit allows.
        let mut spared = loaded.newer;
        for record in loaded.records {
            adopt(&self.core, &record);
            let id = record.spec.id.clone();
            match self.core.register(record) {
                Ok(actor) => actors.push(actor),
                Err(e) => {
                    tracing::error!("a recorded sandbox is left alone: {}", e.chain());
                    spared.push(id);
                }
            }
        }
        let count = actors.len();
        let parallel = self.core.options.recover_parallel.max(1);
        futures::stream::iter(actors)
            .map(|actor| self.take_up(actor))
            .buffer_unordered(parallel)
            .for_each(|()| async {})
            .await;
        let mut known: Vec<String> = self.core.all().iter().map(|s| s.id.clone()).collect();
        let left = known.len();
        known.extend(spared.iter().cloned());
        let limit = self.core.options.stuck_timeout;
        let orphans = async { self.core.sandboxer.remove_orphans(&known).await };
        if let Err(e) = guard("removing what belongs to no sandbox", limit, orphans).await {
            tracing::error!("{}", e.chain());
        }
        self.core.endpoints.ready(&spared).await?;
        tracing::info!(sandboxes = count, left, took = ?since.elapsed(), "recovered");
        Ok(())
    }

    async fn take_up(&self, actor: Actor) {
        let id = actor.sandbox().id.clone();
        if actor.sandbox().record().bundle.is_some()
            && let Err(e) = self.serve_shim_mode(&id).await
        {
            tracing::error!(sandbox = id, "cannot serve its socket: {}", e.chain());
        }
        let left = actor.take_up().await;
        if left == Left::Gone {
            self.core.forget(&id);
            return;
        }
        if let Err(e) = self.core.endpoints.reopen(&id).await {
            tracing::error!(sandbox = id, "cannot make its socket again: {}", e.chain());
        }
        tokio::spawn(actor.run());
    }
}

/// Makes the pod's endpoint known, so that its connections wait instead of being refused.
fn adopt(core: &Arc<Core>, record: &Record) {
    let id = &record.spec.id;
    let path = record.address.strip_prefix("ttrpc+unix://").map(std::path::PathBuf::from);
    // Before Start only a shim has a socket, and its name follows from the id.
    let path =
        path.or_else(|| record.bundle.as_ref().and_then(|_| core.endpoints.default_path(id).ok()));
    let opened = record
        .bundle
        .as_ref()
        .map(|bundle| Opened { bundle: bundle.clone(), namespace: record.spec.namespace.clone() });
    if let Some(path) = path
        && let Err(e) = core.endpoints.adopt(id, &path, opened)
    {
        tracing::error!(sandbox = id, "cannot take over its socket: {}", e.chain());
    }
}

impl Actor {
    /// Brings one sandbox from its recorded phase to a settled one.
    async fn take_up(&self) -> Left {
        let (sandbox, core) = (self.sandbox(), self.core());
        let id = &sandbox.id;
        let record = sandbox.record();
        let settled = match record.phase {
            Phase::Creating | Phase::Starting => {
                tracing::info!(sandbox = id, phase = ?record.phase, "rolling back");
                return self.roll_back().await;
            }
            Phase::Removing => {
                tracing::info!(sandbox = id, "finishing its removal");
                return self.roll_back().await;
            }
            Phase::Created => return Left::Here,
            Phase::Ready => self.take_up_running(&record).await,
            Phase::Stopping => {
                tracing::info!(sandbox = id, "finishing its stop");
                self.take_up_tasks().await;
                self.stop(core.options.stop_timeout, None).await
            }
            Phase::Stopped => {
                self.take_up_tasks().await;
                Ok(())
            }
        };
        if let Err(e) = settled {
            tracing::error!(sandbox = id, "recovery: {}", e.chain());
        }
        self.serve_tasks(&sandbox.record()).await;
        Left::Here
    }

    async fn recovered(&self) -> Result<Recovered> {
        let ctx = self.sandbox().context(None);
        let call = async { self.core().sandboxer.recover(&ctx).await };
        guard("taking up the sandbox", self.core().options.recover_timeout, call).await
    }

    async fn take_up_running(&self, record: &Record) -> Result<()> {
        let unknown = || SandboxExit { status: 255, at: SystemTime::now() };
        match self.recovered().await {
            Ok(Recovered::Running(started)) => self.sandbox().commit(|r| {
                // What the sandboxer leaves out is as it was.
                let Started { pid, labels, spec, .. } = started;
                r.started.pid = pid;
                r.started.labels.extend(labels);
                r.started.spec = spec.or(r.started.spec.take());
            }),
            Ok(Recovered::Stopped(exit)) => {
                tracing::warn!(sandbox = record.spec.id, status = exit.status, "it has ended");
                self.sandbox().commit(|r| {
                    r.phase = Phase::Stopped;
                    r.exit = Some(exit);
                })
            }
            Err(e) => {
                self.sandbox().commit(|r| {
                    r.phase = Phase::Stopped;
                    r.exit = Some(unknown());
                })?;
                Err(e)
            }
        }
    }

    /// For a sandbox that is down or going down: only its tasks matter, for their exit codes.
    async fn take_up_tasks(&self) {
        if let Err(e) = self.recovered().await {
            tracing::warn!(sandbox = self.sandbox().id, "its tasks: {}", e.chain());
        }
    }

    async fn serve_tasks(&self, record: &Record) {
        if self.core().endpoints.path(&record.spec.id).is_none() {
            return; // Its endpoint is not ours.
        }
        if let Err(e) = self.provide_services().await {
            tracing::error!(sandbox = record.spec.id, "its task service: {}", e.chain());
        }
    }
}

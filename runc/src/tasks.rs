//! The Task server of one pod, wired to this daemon.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result};
use containerd_sandbox::sandboxer::SandboxContext;
use containerd_task::events::EventSender;
use containerd_task::journal::FileJournal;
use containerd_task::runtime::Keeper;
use containerd_task::{TaskOptions, TaskServer};
use sandbox_parent::client::Parent;

use crate::runtime::Containers;

/// The Task server of a pod.
#[derive(Clone)]
pub struct Tasks(pub Arc<TaskServer>);

fn internal(what: &'static str) -> impl FnOnce(containerd_task::error::Error) -> Error {
    move |error| Error::internal(what, error)
}

impl Tasks {
    /// A server for the containers of the sandbox in `ctx`; its journal is in the sandbox's
    /// directory.
    pub fn new(ctx: &SandboxContext, runtime: Containers, parent: Parent, events: EventSender) -> Result<Self> {
        let journal = FileJournal::new(&ctx.dir.join("tasks")).map_err(internal("open the pod's journal"))?;
        let mut options = TaskOptions {
            sandbox_id: ctx.spec.id.clone(),
            failpoint: kuasar_daemon::failpoint::hit,
            ..TaskOptions::default()
        };
        if !ctx.spec.namespace.is_empty() {
            options.namespace = ctx.spec.namespace.clone();
        }
        let keeper = ParentKeeper { parent, pod: ctx.spec.id.clone() };
        Ok(Self(TaskServer::new(Arc::new(runtime), Arc::new(keeper), Arc::new(journal), events, options)))
    }

    /// Kills every container and waits for their ends.
    pub async fn stop(&self, timeout: Duration) {
        // CRI sends no timeout; SIGKILL takes effect at once unless the kernel hangs.
        let deadline = if timeout.is_zero() { Duration::from_secs(10) } else { timeout };
        if let Err(error) = self.0.kill_all(deadline).await {
            tracing::warn!(error = %error.chain(), "containers outlive their pod's stop");
        }
    }

    /// Deletes every container.
    pub async fn remove(&self) {
        self.stop(Duration::ZERO).await;
        if let Err(error) = self.0.delete_all().await {
            tracing::warn!(error = %error.chain(), "a container was not deleted cleanly");
        }
    }
}

/// Descriptors of one pod's streams, kept by sandbox-parent.
struct ParentKeeper {
    parent: Parent,
    pod: String,
}

impl ParentKeeper {
    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.pod)
    }
}

#[async_trait]
impl Keeper for ParentKeeper {
    async fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> containerd_task::error::Result<()> {
        self.parent
            .keep(&self.name(name), fd.as_fd())
            .await
            .map_err(|error| containerd_task::error::Error::internal("keep a stream", error))
    }

    async fn fetch(&self, name: &str) -> containerd_task::error::Result<Option<OwnedFd>> {
        self.parent
            .fetch(&self.name(name))
            .await
            .map_err(|error| containerd_task::error::Error::internal("fetch a stream", error))
    }

    async fn forget(&self, prefix: &str) -> containerd_task::error::Result<()> {
        self.parent
            .forget(&self.name(prefix))
            .await
            .map_err(|error| containerd_task::error::Error::internal("forget a stream", error))
    }
}

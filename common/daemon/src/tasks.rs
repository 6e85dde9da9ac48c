//! The Task servers of all pods of a daemon.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_sandbox::TaskProbe;
use containerd_sandbox::error::{Error, Result};
use containerd_sandbox::sandboxer::SandboxContext;
use containerd_task::declared::{self, Declared};
use containerd_task::events::EventSender;
use containerd_task::journal::FileJournal;
use containerd_task::runtime::{Keeper, Runtime};
use containerd_task::{TaskOptions, TaskServer};
use sandbox_parent::client::Parent;

/// How long processes may take to die of SIGKILL: the kernel, not the container, decides that.
const KILLED: Duration = Duration::from_secs(10);

/// All pods' Task servers, by sandbox id.
pub struct TaskServers {
    parent: Parent,
    events: EventSender,
    options: TaskOptions,
    table: Mutex<HashMap<String, Tasks>>,
}

impl TaskServers {
    /// No server yet. `options` are those of every pod, without its identity.
    pub fn new(parent: Parent, events: EventSender, options: TaskOptions) -> Self {
        Self { parent, events, options, table: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Tasks>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the server for the containers of the sandbox in `ctx`. Its journal is in the
    /// sandbox's directory.
    ///
    /// # Errors
    /// When the journal cannot be used.
    pub fn make(&self, ctx: &SandboxContext, runtime: Arc<dyn Runtime>) -> Result<Tasks> {
        let journal = FileJournal::new(&ctx.dir.join("tasks"))
            .map_err(|error| Error::internal("open the pod's journal", error))?;
        let mut options = TaskOptions { sandbox_id: ctx.spec.id.clone(), ..self.options.clone() };
        if !ctx.spec.namespace.is_empty() {
            options.namespace = ctx.spec.namespace.clone();
        }
        let keeper = ParentKeeper::new(self.parent.clone(), ctx.spec.id.clone());
        let (keeper, journal) = (Arc::new(keeper), Arc::new(journal));
        let tasks = Tasks(TaskServer::new(runtime, keeper, journal, self.events.clone(), options));
        match announced(ctx) {
            Ok(list) => drop(tasks.0.expect(list)),
            // Of no use, and no reason to lose the pod's containers.
            Err(error) => tracing::warn!(sandbox = ctx.spec.id, "ignored: {error}"),
        }
        self.table().insert(ctx.spec.id.clone(), tasks.clone());
        Ok(tasks)
    }

    /// Takes over what an Update has announced of the pod's containers, if it has.
    ///
    /// # Errors
    /// InvalidArgument when that cannot be read; what was announced before counts on.
    pub async fn declare(&self, ctx: &SandboxContext, fields: &[String]) -> Result<()> {
        if !announces(fields) {
            return Ok(());
        }
        let list = announced(ctx)?;
        if let Some(tasks) = self.get(&ctx.spec.id) {
            tasks.0.declare(list).await;
        }
        Ok(())
    }

    /// The server of a pod.
    pub fn get(&self, pod: &str) -> Option<Tasks> {
        self.table().get(pod).cloned()
    }

    /// The same, and forgets it.
    pub fn take(&self, pod: &str) -> Option<Tasks> {
        self.table().remove(pod)
    }

    fn all(&self) -> Vec<Tasks> {
        self.table().values().cloned().collect()
    }

    /// After recovery: what the last daemon had begun and not recorded is ended and removed, and
    /// sandbox-parent forgets exits that nobody will ask for. Engines that still run get
    /// `patience` to finish first, so that nothing is removed under them. With `others`, pods of a
    /// newer daemon exist, whose exits are kept for it.
    ///
    /// # Errors
    /// When sandbox-parent does not answer.
    pub async fn sweep(&self, patience: Duration, others: bool) -> Result<()> {
        let ask = |error| Error::internal("ask sandbox-parent for its processes", error);
        let known: Vec<u64> = self.all().iter().flat_map(|tasks| tasks.0.handles()).collect();
        let watched = self.parent.watched().await.map_err(ask)?;
        let strangers: Vec<u64> = watched.into_iter().filter(|c| !known.contains(c)).collect();
        let ends = strangers.iter().map(|cookie| self.parent.exit_of(*cookie));
        // Those that do not end are processes of containers that nobody knows.
        let _ = tokio::time::timeout(patience, futures::future::join_all(ends)).await;
        for tasks in self.all() {
            tasks.0.sweep().await;
        }
        for cookie in strangers.into_iter().filter(|_| !others) {
            self.parent.acknowledge(cookie).await;
        }
        Ok(())
    }

    /// Looks a container up in all pods.
    pub fn probe(&self, container: &str) -> Option<TaskProbe> {
        self.all()
            .iter()
            .find_map(|tasks| tasks.0.init_of(container))
            .map(|(pid, exit)| TaskProbe { pid, exit: exit.map(|exit| (exit.status, exit.at)) })
    }

    /// Containers of all pods.
    pub fn containers(&self) -> usize {
        self.all().iter().map(|tasks| tasks.0.containers().len()).sum()
    }
}

/// Whether these fields of an Update are about what the engine announces.
pub fn announces(fields: &[String]) -> bool {
    let about = |field: &String| match field.split_once('.') {
        Some((what, key)) => what == "extensions" && key == declared::EXTENSION,
        None => field == "extensions",
    };
    fields.is_empty() || fields.iter().any(about)
}

/// What the engine has announced of the containers of the sandbox in `ctx`.
///
/// # Errors
/// InvalidArgument when that cannot be read.
pub fn announced(ctx: &SandboxContext) -> Result<Declared> {
    let text = ctx.spec.extensions.get(declared::EXTENSION).map(|(_, value)| value.as_slice());
    Declared::parse(text.unwrap_or_default()).map_err(|e| Error::InvalidArgument(e.to_string()))
}

/// The Task server of one pod. Cheap to clone.
#[derive(Clone)]
pub struct Tasks(Arc<TaskServer>);

impl Tasks {
    /// The server itself.
    pub fn server(&self) -> &Arc<TaskServer> {
        &self.0
    }

    /// Kills every container and waits for their ends, `timeout` or ten seconds.
    ///
    /// # Errors
    /// When some have not ended by then.
    pub async fn stop(&self, timeout: Duration) -> Result<()> {
        let deadline = if timeout.is_zero() { KILLED } else { timeout };
        self.0.kill_all(deadline).await.map_err(|error| {
            Error::DeadlineExceeded(format!("containers outlive their pod's stop: {error}"))
        })
    }

    /// Deletes every container.
    pub async fn remove(&self) {
        if let Err(error) = self.stop(Duration::ZERO).await {
            tracing::warn!(error = %error.chain(), "the pod is removed all the same");
        }
        if let Err(error) = self.0.delete_all().await {
            tracing::warn!(error = %error.chain(), "a container was not deleted cleanly");
        }
    }
}

/// Descriptors of one pod's streams, kept by sandbox-parent.
pub struct ParentKeeper {
    parent: Parent,
    pod: String,
}

impl ParentKeeper {
    /// Keeps for the pod with this id: every name begins with it.
    pub fn new(parent: Parent, pod: String) -> Self {
        Self { parent, pod }
    }

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

//! One task per sandbox: every change of its state happens here, one after the other.
//!
//! A request that changes something becomes a [`Job`] in the sandbox' bounded queue; the caller
//! waits for the reply and may leave at any time (deadline, cancelled request, lost connection).
//! The work goes on regardless. When Create or Start have succeeded and nobody is there to hear
//! it, they are rolled back: containerd has given the pod up then and will call nothing more.
//!
//! Readers never come here. They take the published [`Record`] as a whole.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use futures::FutureExt as _;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::controller::Core;
use crate::error::{Error, Result};
use crate::handle::{HandleSink, SandboxHandle};
use crate::options::Changed;
use crate::sandboxer::{SandboxContext, SandboxExit, SandboxSpec};
use crate::server::turned_on;
use crate::store::{Phase, Record, Store};
use crate::wire::panic_text;

/// Most requests that wait for one sandbox.
const QUEUE: usize = 32;

/// How long the client of a pod's own socket may take to read the answer to its Shutdown.
const LINGER: Duration = Duration::from_secs(5);

pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// Something to do with a sandbox.
pub(crate) enum Job {
    Create {
        deadline: Option<Instant>,
        reply: Reply<()>,
    },
    Start {
        deadline: Option<Instant>,
        reply: Reply<Arc<Record>>,
    },
    Stop {
        timeout: Duration,
        deadline: Option<Instant>,
        reply: Reply<()>,
    },
    /// `linger`: the request came over the pod's own socket, which must carry the answer.
    Shutdown {
        linger: bool,
        reply: Reply<()>,
    },
    Update {
        spec: Box<SandboxSpec>,
        fields: Vec<String>,
        reply: Reply<()>,
    },
}

/// A [`Job`], and the span of the request that it comes from.
pub(crate) type Order = (Job, Option<kuasar_trace::Scope>);

/// What all parts of the Controller share about one sandbox.
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    /// Boxed: a channel has room for 32 of them at once, and is mostly empty.
    pub(crate) jobs: mpsc::Sender<Box<Order>>,
    store: Arc<Store>,
    current: watch::Sender<Arc<Record>>,
    /// Serialises writers; true once the sandbox is gone and must not be written again.
    writing: Mutex<bool>,
    /// How it ended by itself, until its actor has looked.
    died: Mutex<Option<SandboxExit>>,
    died_told: Notify,
    /// Whether a call has named it since this daemon came.
    named: AtomicBool,
    changed: Option<Changed>,
    /// Span of the Create, which the Start of an engine that passes no trace belongs to.
    pub(crate) created: OnceLock<kuasar_trace::Context>,
}

impl Sandbox {
    /// The sandbox, and the queue for its actor.
    pub(crate) fn new(
        record: Record,
        store: Arc<Store>,
        changed: Option<Changed>,
    ) -> (Arc<Self>, mpsc::Receiver<Box<Order>>) {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let id = record.spec.id.clone();
        let sandbox = Self {
            dir: store.dir(&id),
            id,
            jobs,
            store,
            current: watch::channel(Arc::new(record)).0,
            writing: Mutex::new(false),
            died: Mutex::new(None),
            died_told: Notify::new(),
            named: AtomicBool::new(false),
            changed,
            created: OnceLock::new(),
        };
        (Arc::new(sandbox), queue)
    }

    /// All that is known now.
    pub(crate) fn record(&self) -> Arc<Record> {
        self.current.borrow().clone()
    }

    /// A call names it.
    pub(crate) fn name(&self) {
        self.named.store(true, Ordering::Relaxed);
    }

    /// Whether a call has named it since this daemon came.
    pub(crate) fn is_named(&self) -> bool {
        self.named.load(Ordering::Relaxed)
    }

    /// Follows the record.
    pub(crate) fn follow(&self) -> watch::Receiver<Arc<Record>> {
        self.current.subscribe()
    }

    /// Changes the record: on disk first, then for readers.
    pub(crate) fn commit(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let gone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if *gone {
            return Err(Error::NotFound(format!("sandbox {} is removed", self.id)));
        }
        let mut next = Record::clone(&self.record());
        change(&mut next);
        self.store.write(&next)?;
        self.publish(next);
        Ok(())
    }

    /// Shows readers a record, and tells of a new phase.
    fn publish(&self, next: Record) {
        let next = Arc::new(next);
        let before = self.current.send_replace(next.clone());
        if before.phase != next.phase
            && let Some(changed) = &self.changed
        {
            changed(&next);
        }
    }

    fn enter(&self, phase: Phase) -> Result<()> {
        let now = self.record().phase;
        if !now.may_become(phase) {
            return Err(Error::FailedPrecondition(format!(
                "sandbox {} is {now:?} and cannot become {phase:?}",
                self.id
            )));
        }
        self.commit(|r| r.phase = phase)
    }

    /// Removes directory and record for good, and ends every Wait.
    fn erase(&self, status: u32) -> Result<()> {
        let mut gone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        *gone = true;
        if let Err(e) = self.store.remove(&self.id) {
            *gone = false;
            return Err(e);
        }
        let mut last = Record::clone(&self.record());
        last.phase = Phase::Removing;
        last.exit.get_or_insert(SandboxExit { status, at: SystemTime::now() });
        self.publish(last);
        Ok(())
    }

    /// What a sandboxer's method gets.
    pub(crate) fn context(self: &Arc<Self>, deadline: Option<Instant>) -> SandboxContext {
        let record = self.record();
        SandboxContext {
            spec: record.spec.clone(),
            dir: self.dir.clone(),
            state: record.state.clone(),
            deadline,
            handle: SandboxHandle::new(self.clone()),
        }
    }
}

impl HandleSink for Sandbox {
    fn save(&self, state: serde_json::Value) -> Result<()> {
        self.commit(|r| r.state = state)
    }

    fn stage(&self, state: serde_json::Value) -> Result<()> {
        let gone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if *gone {
            return Err(Error::NotFound(format!("sandbox {} is removed", self.id)));
        }
        self.current.send_modify(|r| Arc::make_mut(r).state = state);
        Ok(())
    }

    fn exited(&self, exit: SandboxExit) {
        self.died.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(exit);
        self.died_told.notify_one();
    }
}

/// Runs a sandboxer's call: a panic in it or a call that never returns is an error of this
/// request alone.
pub(crate) async fn guard<T>(
    what: &str,
    limit: Duration,
    call: impl Future<Output = Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(limit, AssertUnwindSafe(call).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(Error::internal(format!("{what} panicked"), panic_text(panic))),
        Err(_) => Err(Error::DeadlineExceeded(format!("{what} did not end within {limit:?}"))),
    }
}

/// The task of one sandbox.
pub(crate) struct Actor {
    core: Arc<Core>,
    sandbox: Arc<Sandbox>,
    queue: mpsc::Receiver<Box<Order>>,
}

/// Whether the sandbox is still there after a job.
#[derive(PartialEq, Eq)]
pub(crate) enum Left {
    Here,
    Gone,
}

impl Actor {
    pub(crate) fn new(
        core: Arc<Core>,
        sandbox: Arc<Sandbox>,
        queue: mpsc::Receiver<Box<Order>>,
    ) -> Self {
        Self { core, sandbox, queue }
    }

    pub(crate) fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Works until the sandbox is gone or the daemon stops.
    pub(crate) async fn run(mut self) {
        let _alive = self.core.alive();
        let mut stopping = self.core.stopping();
        loop {
            let job = tokio::select! {
                biased;
                () = turned_on(&mut stopping) => return,
                // It may have been told before we came.
                () = self.sandbox.died_told.notified() => {
                    let exit = *self.sandbox.died.lock().unwrap_or_else(PoisonError::into_inner);
                    self.died(exit);
                    continue;
                }
                job = self.queue.recv() => job,
            };
            let Some(order) = job else { return };
            let (job, scope) = *order;
            if let Some(scope) = &scope {
                scope.note("kuasar.sandbox.id", &self.sandbox.id);
            }
            // Boxed: it is mostly idle, and then has the size of what it waits for alone.
            let work = Box::pin(self.work(job));
            if kuasar_trace::within(scope, work).await == Left::Gone {
                break;
            }
        }
        self.core.forget(&self.sandbox.id);
        self.queue.close();
        while let Some(order) = self.queue.recv().await {
            let gone = || Error::NotFound(format!("sandbox {} is removed", self.sandbox.id));
            // Whoever has left does not need the answer.
            let _ = match order.0 {
                Job::Shutdown { reply, .. } => reply.send(Ok(())).is_ok(),
                Job::Start { reply, .. } => reply.send(Err(gone())).is_ok(),
                Job::Create { reply, .. } | Job::Stop { reply, .. } | Job::Update { reply, .. } => {
                    reply.send(Err(gone())).is_ok()
                }
            };
        }
    }

    /// Answers a job. A removed sandbox is forgotten first, so that the caller may use its id
    /// again at once.
    fn answer<T>(&self, left: &Left, reply: Reply<T>, result: Result<T>) -> bool {
        if *left == Left::Gone {
            self.core.forget(&self.sandbox.id);
        }
        if let Err(e) = &result {
            tracing::warn!(sandbox = self.sandbox.id, "{}", e.chain());
        }
        reply.send(result).is_ok()
    }

    async fn work(&mut self, job: Job) -> Left {
        match job {
            Job::Create { deadline, reply } => {
                let made = self.create(deadline).await;
                self.finish("create", made, reply).await
            }
            Job::Start { deadline, reply } => {
                // A wrong Start is refused; only a failed one is rolled back.
                if let Err(e) = self.sandbox.enter(Phase::Starting) {
                    self.answer(&Left::Here, reply, Err(e));
                    return Left::Here;
                }
                let started = self.start(deadline).await;
                self.finish("start", started, reply).await
            }
            Job::Stop { timeout, deadline, reply } => {
                let stopped = self.stop(timeout, deadline).await;
                self.answer(&Left::Here, reply, stopped);
                Left::Here
            }
            Job::Shutdown { linger, reply } => {
                let done = self.remove(137, linger).await;
                let left = if done.is_ok() { Left::Gone } else { Left::Here };
                self.answer(&left, reply, done);
                left
            }
            Job::Update { spec, fields, reply } => {
                let updated = self.update(*spec, &fields).await;
                self.answer(&Left::Here, reply, updated);
                Left::Here
            }
        }
    }

    /// Answers Create or Start, or rolls back when it failed or nobody listens.
    async fn finish<T>(&self, what: &str, result: Result<T>, reply: Reply<T>) -> Left {
        let id = &self.sandbox.id;
        match result {
            Ok(value) => {
                if reply.send(Ok(value)).is_ok() {
                    return Left::Here;
                }
                tracing::warn!(sandbox = id, "the caller of {what} has left: rolling back");
                self.roll_back().await
            }
            Err(e) => {
                let left = self.roll_back().await;
                self.answer(&left, reply, Err(e));
                left
            }
        }
    }

    /// Undoes a Create or Start. When that fails, the sandbox stays in phase Removing and is
    /// tried again from time to time.
    pub(crate) async fn roll_back(&self) -> Left {
        match self.remove(255, true).await {
            Ok(()) => Left::Gone,
            Err(e) => {
                let why = e.chain();
                tracing::error!(sandbox = self.sandbox.id, "roll-back failed, will retry: {why}");
                Left::Here
            }
        }
    }

    async fn create(&self, caller: Option<Instant>) -> Result<()> {
        let _turn = self.core.start_turn().await;
        self.core.store.create(&self.sandbox.record())?;
        self.core.failpoint("sandbox.create.before")?;
        let ctx = self.sandbox.context(self.core.start_deadline(caller));
        let call = async { self.core.sandboxer.create(&ctx).await };
        guard("creating the sandbox", self.core.options.stuck_timeout, call).await?;
        self.sandbox.enter(Phase::Created)?;
        self.core.failpoint("sandbox.create.after")
    }

    async fn start(&self, caller: Option<Instant>) -> Result<Arc<Record>> {
        let _turn = self.core.start_turn().await;
        self.core.failpoint("sandbox.start.before")?;
        let ctx = self.sandbox.context(self.core.start_deadline(caller));
        let call = async { self.core.sandboxer.start(&ctx).await };
        let started = guard("starting the sandbox", self.core.options.stuck_timeout, call).await?;
        let shim = self.sandbox.record().bundle.is_some();
        let address = match &started.address {
            Some(address) if !shim => address.clone(),
            _ => {
                let (path, _) = self.core.endpoints.open(&self.sandbox.id, None).await?;
                self.provide_services().await?;
                format!("ttrpc+unix://{}", path.display())
            }
        };
        self.sandbox.commit(|r| {
            r.phase = Phase::Ready;
            r.address = address;
            r.started = started;
        })?;
        self.core.failpoint("sandbox.start.after")?;
        Ok(self.sandbox.record())
    }

    /// Gets the pod's services from the sandboxer and serves them.
    pub(crate) async fn provide_services(&self) -> Result<()> {
        let ctx = self.sandbox.context(None);
        let call = async { self.core.sandboxer.services(&ctx).await };
        let services =
            guard("making the pod's services", self.core.options.stuck_timeout, call).await?;
        self.core.endpoints.provide(&self.sandbox.id, services)
    }

    /// Idempotent: done is done, and what has failed is tried again.
    pub(crate) async fn stop(&self, timeout: Duration, deadline: Option<Instant>) -> Result<()> {
        let before = self.sandbox.record();
        if before.phase == Phase::Stopped && before.cleared {
            return Ok(());
        }
        self.core.failpoint("sandbox.stop.before")?;
        // One that has died by itself stays Stopped, but what is left of it must go.
        if before.phase != Phase::Stopped {
            self.sandbox.enter(Phase::Stopping)?;
        }
        let ctx = self.sandbox.context(deadline);
        let call = async { self.core.sandboxer.stop(&ctx, timeout).await };
        let limit = self.core.options.stuck_timeout.saturating_add(timeout);
        guard("stopping the sandbox", limit, call).await?;
        self.sandbox.commit(|r| {
            r.phase = Phase::Stopped;
            r.cleared = true;
            r.exit.get_or_insert(SandboxExit { status: 0, at: SystemTime::now() });
        })?;
        self.core.failpoint("sandbox.stop.after")
    }

    /// Removes every trace; `status` is for Waits when it has not ended before.
    pub(crate) async fn remove(&self, status: u32, linger: bool) -> Result<()> {
        self.core.failpoint("sandbox.shutdown.before")?;
        if self.sandbox.dir.exists() {
            self.sandbox.enter(Phase::Removing)?;
            let ctx = self.sandbox.context(None);
            let call = async { self.core.sandboxer.remove(&ctx).await };
            guard("removing the sandbox", self.core.options.stuck_timeout, call).await?;
        }
        self.core.failpoint("sandbox.shutdown.after")?;
        let id = &self.sandbox.id;
        let shim = self.sandbox.record().bundle.is_some();
        if shim && linger {
            self.core.endpoints.close_later(id, LINGER);
        } else {
            self.core.endpoints.close(id).await;
        }
        self.sandbox.erase(status)
    }

    async fn update(&self, spec: SandboxSpec, fields: &[String]) -> Result<()> {
        let before = self.sandbox.record();
        if before.phase == Phase::Removing {
            return Err(Error::FailedPrecondition(format!(
                "sandbox {} is being removed",
                self.sandbox.id
            )));
        }
        let spec = Arc::new(spec);
        let mut ctx = self.sandbox.context(None);
        ctx.spec = spec.clone();
        let call = async { self.core.sandboxer.update(&ctx, fields).await };
        guard("updating the sandbox", self.core.options.stuck_timeout, call).await?;
        self.sandbox.commit(|r| r.spec = spec)
    }

    /// The sandbox has ended by itself.
    fn died(&self, exit: Option<SandboxExit>) {
        let record = self.sandbox.record();
        let Some(exit) = exit else { return };
        if !matches!(record.phase, Phase::Ready | Phase::Stopping) {
            return;
        }
        tracing::warn!(sandbox = self.sandbox.id, status = exit.status, "it ended by itself");
        let change = |r: &mut Record| {
            r.phase = Phase::Stopped;
            r.exit = Some(exit);
        };
        if let Err(e) = self.sandbox.commit(change) {
            // Waits must end all the same; after a restart the sandboxer finds it dead again.
            tracing::error!(sandbox = self.sandbox.id, "cannot record its end: {}", e.chain());
            let mut next = Record::clone(&self.sandbox.record());
            change(&mut next);
            self.sandbox.publish(next);
        }
    }
}

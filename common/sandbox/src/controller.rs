//! The Controller's RPCs without a transport, and the table of sandboxes.
//!
//! Both gRPC and ttrpc, and the shim-mode service, end here with the same messages. Requests
//! that change something go to the sandbox' actor; the others read its published record.

use std::collections::HashMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use futures::FutureExt as _;
use kuasar_protos::controller as api;
use kuasar_protos::cri::PodSandboxConfig;
use kuasar_protos::types::{Metric, Platform};
use protobuf::{Message, MessageField};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::actor::{Actor, Job, Reply, Sandbox, guard};
use crate::endpoint::{Endpoints, PodSockets};
use crate::error::{Error, Result};
use crate::info;
use crate::options::ControllerOptions;
use crate::sandboxer::{
    DebugChange, DebugConsole, DebugProgram, SandboxSpec, Sandboxer, TemplateJob, TemplateList,
};
use crate::store::{Phase, Record, Store};
use crate::wire::{any, check_id, panic_text, timestamp};

/// Version of the Task API that our endpoints serve: below 3 containerd would start the shim
/// binary for every container.
const TASK_API: u32 = 3;

/// What the transport knows of a request.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// containerd's namespace; empty when the client sent none.
    pub namespace: String,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
}

pub(crate) struct Core {
    pub(crate) options: ControllerOptions,
    pub(crate) sandboxer: Arc<dyn Sandboxer>,
    pub(crate) store: Arc<Store>,
    pub(crate) endpoints: Endpoints,
    table: Mutex<HashMap<String, Arc<Sandbox>>>,
    starts: Semaphore,
    stopping: watch::Sender<bool>,
    /// When the first request of this daemon's time came.
    pub(crate) first_call: OnceLock<Instant>,
    /// Every actor holds a clone; the receiver sees the end of the last one.
    alive: Mutex<Option<mpsc::Sender<()>>>,
    ended: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Core {
    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Sandbox>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn forget(&self, id: &str) {
        self.table().remove(id);
    }

    pub(crate) fn alive(&self) -> Option<mpsc::Sender<()>> {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Waits for its turn among the starts that may run at the same time.
    pub(crate) async fn start_turn(&self) -> Option<SemaphorePermit<'_>> {
        self.starts.acquire().await.ok() // It is never closed.
    }

    pub(crate) fn start_deadline(&self, caller: Option<Instant>) -> Option<Instant> {
        let own = Instant::now() + self.options.start_timeout;
        Some(caller.map_or(own, |c| c.min(own)))
    }

    pub(crate) fn failpoint(&self, name: &'static str) -> Result<()> {
        match &self.options.failpoint {
            Some(hit) => hit(name).map_err(|e| Error::internal(format!("failpoint {name}"), e)),
            None => Ok(()),
        }
    }

    /// The sandbox that a call names.
    pub(crate) fn find(&self, id: &str) -> Result<Arc<Sandbox>> {
        let found = self.table().get(id).cloned();
        found.inspect(|sandbox| sandbox.name()).ok_or_else(|| {
            let shown: String = id.chars().take(kuasar_host::id::MAX_ID).collect();
            Error::NotFound(format!("sandbox {shown:?} is not known"))
        })
    }

    pub(crate) fn all(&self) -> Vec<Arc<Sandbox>> {
        self.table().values().cloned().collect()
    }

    /// Takes a sandbox into the table.
    pub(crate) fn register(self: &Arc<Self>, record: Record) -> Result<Actor> {
        let id = record.spec.id.clone();
        let mut table = self.table();
        if table.contains_key(&id) {
            return Err(Error::AlreadyExists(format!("sandbox {id} exists")));
        }
        let most = self.options.max_sandboxes;
        if table.len() >= most {
            return Err(Error::ResourceExhausted(format!(
                "{most} sandboxes exist, the configured limit (max_sandboxes)"
            )));
        }
        let (sandbox, queue) =
            Sandbox::new(record, self.store.clone(), self.options.changed.clone());
        table.insert(id, sandbox.clone());
        Ok(Actor::new(self.clone(), sandbox, queue))
    }
}

/// containerd's sandbox Controller. Cheap to clone.
#[derive(Clone)]
pub struct Controller {
    pub(crate) core: Arc<Core>,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Controller({})", self.core.options.dir.display())
    }
}

/// Reports a request to the observer, also when it is dropped half-way.
struct Seen<'a> {
    core: &'a Core,
    rpc: &'static str,
    since: Instant,
    code: tonic::Code,
}

impl Drop for Seen<'_> {
    fn drop(&mut self) {
        if let Some(observer) = &self.core.options.observer {
            observer(self.rpc, self.code, self.since.elapsed());
        }
    }
}

impl Controller {
    /// The pid that stands for a sandbox: containerd wants one that is not 0, and where the sandbox
    /// has no process the daemon's is it.
    pub(crate) fn pid(&self, id: &str) -> u32 {
        let pid = self.core.find(id).map(|s| s.record().started.pid);
        pid.ok().filter(|pid| *pid > 0).unwrap_or_else(std::process::id)
    }

    /// Opens the state directory; nothing is recovered or served yet.
    ///
    /// # Errors
    /// When the directory cannot be used: its owner, its permissions, or a name too long for
    /// unix sockets below it.
    pub fn new(
        options: ControllerOptions,
        sandboxer: Arc<dyn Sandboxer>,
        sockets: Arc<dyn PodSockets>,
    ) -> Result<Self> {
        let store = Store::open(&options.dir, options.max_quarantine)?;
        let endpoints = Endpoints::new(&options.dir, options.max_pod_backlog, sockets)?;
        let (alive, ended) = mpsc::channel(1);
        let core = Core {
            sandboxer,
            store: Arc::new(store),
            endpoints,
            table: Mutex::default(),
            starts: Semaphore::new(options.parallel_starts.max(1)),
            stopping: watch::channel(false).0,
            first_call: OnceLock::new(),
            alive: Mutex::new(Some(alive)),
            ended: Mutex::new(Some(ended)),
            options,
        };
        Ok(Self { core: Arc::new(core) })
    }

    /// Where connections to pods' sockets go.
    pub fn endpoints(&self) -> Endpoints {
        self.core.endpoints.clone()
    }

    /// Ids and phases of all sandboxes, for metrics and tools.
    pub fn sandboxes(&self) -> Vec<(String, Phase)> {
        self.core.all().iter().map(|s| (s.id.clone(), s.record().phase)).collect()
    }

    /// Records of all sandboxes, in the order of their ids, for tools.
    pub fn records(&self) -> Vec<Arc<Record>> {
        let mut all: Vec<Arc<Record>> = self.core.all().iter().map(|s| s.record()).collect();
        all.sort_by(|a, b| a.spec.id.cmp(&b.spec.id));
        all
    }

    /// Where a sandbox' console log is.
    ///
    /// # Errors
    /// NotFound; Unimplemented where sandboxes have no console.
    pub async fn console(&self, id: &str) -> Result<std::path::PathBuf> {
        let ctx = self.core.find(id)?.context(None);
        self.core.sandboxer.console(&ctx).await
    }

    /// Runs a program beside a sandbox' containers.
    ///
    /// # Errors
    /// NotFound; Unimplemented where sandboxes are no machines; the sandboxer's.
    pub async fn debug(&self, id: &str, what: DebugProgram) -> Result<DebugConsole> {
        let ctx = self.core.find(id)?.context(None);
        self.core.sandboxer.debug(&ctx, what).await
    }

    /// Changes such a session.
    ///
    /// # Errors
    /// NotFound; the sandboxer's.
    pub async fn steer_debug(&self, id: &str, session: &str, what: DebugChange) -> Result<()> {
        let ctx = self.core.find(id)?.context(None);
        self.core.sandboxer.steer_debug(&ctx, session, what).await
    }

    /// Saved machines that sandboxes start from.
    ///
    /// # Errors
    /// Unimplemented where there is no such thing; the sandboxer's.
    pub async fn templates(&self, what: TemplateJob) -> Result<TemplateList> {
        self.core.sandboxer.templates(what).await
    }

    /// Names of the records that are set aside because they cannot be read.
    pub fn quarantined(&self) -> Vec<String> {
        self.core.store.quarantined()
    }

    /// Removes what is set aside; answers the names of it.
    ///
    /// # Errors
    /// When something of it stays.
    pub async fn empty_quarantine(&self) -> Result<Vec<String>> {
        let store = self.core.store.clone();
        crate::error::blocking(move || store.empty_quarantine()).await
    }

    /// Stops all actors; operations that run have `drain_timeout` to end.
    pub(crate) async fn drain(&self) {
        self.core.stopping.send_replace(true);
        self.core.alive.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = self.core.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut ended) = ended
            && tokio::time::timeout(self.core.options.drain_timeout, ended.recv()).await.is_err()
        {
            tracing::warn!("some operations have not ended; the next start goes on with them");
        }
    }

    /// Tells the observer of work of the Controller's own, when the answer is dropped.
    pub(crate) fn observed(&self, what: &'static str) -> impl Drop + '_ {
        Seen { core: &self.core, rpc: what, since: Instant::now(), code: tonic::Code::Ok }
    }

    /// Runs one request: deadline, panic and observer are the same for all.
    pub(crate) async fn run<T>(
        &self,
        rpc: &'static str,
        call: &Call,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        self.core.first_call.get_or_init(Instant::now);
        let mut seen =
            Seen { core: &self.core, rpc, since: Instant::now(), code: tonic::Code::Cancelled };
        let work = AssertUnwindSafe(work).catch_unwind();
        let result = match call.deadline {
            Some(at) => tokio::time::timeout_at(at, work).await.unwrap_or_else(|_| {
                Ok(Err(Error::DeadlineExceeded(format!("{rpc} did not end in time"))))
            }),
            None => work.await,
        };
        let result = result.unwrap_or_else(|panic| {
            Err(Error::internal(format!("{rpc} panicked"), panic_text(panic)))
        });
        if let Err(error) = &result {
            kuasar_trace::failed(&format!("{:?}: {error}", error.code()));
        }
        seen.code = result.as_ref().map_or_else(Error::code, |_| tonic::Code::Ok);
        result
    }

    async fn submit<T>(&self, sandbox: &Sandbox, job: impl FnOnce(Reply<T>) -> Job) -> Result<T> {
        use mpsc::error::TrySendError;
        let (reply, answer) = oneshot::channel();
        let order = (job(reply), kuasar_trace::current());
        sandbox.jobs.try_send(Box::new(order)).map_err(|e| match e {
            TrySendError::Full(_) => Error::ResourceExhausted(format!(
                "too many requests wait for sandbox {}",
                sandbox.id
            )),
            TrySendError::Closed(_) => {
                Error::NotFound(format!("sandbox {} is removed", sandbox.id))
            }
        })?;
        answer.await.unwrap_or_else(|_| Err(Error::Unavailable("the daemon is stopping".into())))
    }

    /// Controller.Create.
    ///
    /// # Errors
    /// InvalidArgument, AlreadyExists, ResourceExhausted, or the sandboxer's; nothing is left.
    pub async fn create(
        &self,
        call: &Call,
        q: api::ControllerCreateRequest,
    ) -> Result<api::ControllerCreateResponse> {
        let opened = self.core.endpoints.opened(&q.sandbox_id);
        let id = q.sandbox_id.clone();
        let mut spec = spec_of(call, q, self.core.options.max_spec)?;
        if let Some(opened) = &opened
            && spec.namespace.is_empty()
        {
            spec.namespace.clone_from(&opened.namespace);
        }
        // A failed create is rolled back: it must not come to that for what is not ours.
        if self.core.find(&spec.id).is_err() && self.core.store.has(&spec.id) {
            return Err(Error::AlreadyExists(format!(
                "sandbox {id} has a record that this version cannot use: {}",
                self.core.store.dir(&id).display()
            )));
        }
        let actor = self.core.register(Record::new(spec, opened.map(|o| o.bundle)))?;
        let sandbox = actor.sandbox().clone();
        sandbox.name();
        if let Some(scope) = kuasar_trace::current() {
            let _ = sandbox.created.set(scope.context());
        }
        tokio::spawn(actor.run());
        let deadline = call.deadline;
        self.submit(&sandbox, |reply| Job::Create { deadline, reply }).await?;
        Ok(api::ControllerCreateResponse { sandbox_id: id, ..Default::default() })
    }

    /// Controller.Start.
    ///
    /// # Errors
    /// NotFound, FailedPrecondition, or the sandboxer's; after the latter nothing is left.
    pub async fn start(
        &self,
        call: &Call,
        q: api::ControllerStartRequest,
    ) -> Result<api::ControllerStartResponse> {
        let sandbox = self.core.find(&q.sandbox_id)?;
        if let Some(created) = sandbox.created.get() {
            kuasar_trace::join(*created);
        }
        let deadline = call.deadline;
        let r = self.submit(&sandbox, |reply| Job::Start { deadline, reply }).await?;
        let mut answer = api::ControllerStartResponse {
            sandbox_id: q.sandbox_id,
            pid: r.started.pid,
            created_at: timestamp(r.created_at),
            labels: r.started.labels.clone().into_iter().collect(),
            address: r.address.clone(),
            version: TASK_API,
            ..Default::default()
        };
        if let Some(spec) = &r.started.spec {
            answer.spec = MessageField::some(any(info::SPEC_TYPE, spec.clone()));
        }
        Ok(answer)
    }

    /// Controller.Platform. It does not depend on the sandbox, and an error would fail a whole
    /// stats listing: so an unknown id is answered, too.
    ///
    /// # Errors
    /// None.
    pub async fn platform(
        &self,
        _call: &Call,
        _q: api::ControllerPlatformRequest,
    ) -> Result<api::ControllerPlatformResponse> {
        let (os, architecture) = self.core.sandboxer.platform();
        Ok(api::ControllerPlatformResponse {
            platform: MessageField::some(Platform { os, architecture, ..Default::default() }),
            ..Default::default()
        })
    }

    /// Controller.Stop: when it returns, the engine takes the network away.
    ///
    /// # Errors
    /// NotFound, or the sandboxer's; the engine then tries again.
    pub async fn stop(
        &self,
        call: &Call,
        q: api::ControllerStopRequest,
    ) -> Result<api::ControllerStopResponse> {
        let sandbox = self.core.find(&q.sandbox_id)?;
        let timeout = match q.timeout_secs {
            0 => self.core.options.stop_timeout,
            secs => Duration::from_secs(secs.into()),
        };
        let deadline = call.deadline;
        self.submit(&sandbox, |reply| Job::Stop { timeout, deadline, reply }).await?;
        Ok(api::ControllerStopResponse::new())
    }

    /// Controller.Wait: answers when the sandbox has ended, at once when it has already. While
    /// the daemon ends it is never answered.
    ///
    /// # Errors
    /// NotFound.
    pub async fn wait(
        &self,
        _call: &Call,
        q: api::ControllerWaitRequest,
    ) -> Result<api::ControllerWaitResponse> {
        let mut records = self.core.find(&q.sandbox_id)?.follow();
        let exit = match records.wait_for(|r| r.exit.is_some()).await {
            Ok(record) => record.exit,
            Err(_) => None,
        };
        let Some(exit) = exit else {
            // The table is being dropped: the daemon ends.
            return std::future::pending().await;
        };
        Ok(api::ControllerWaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    /// Controller.Status.
    ///
    /// # Errors
    /// NotFound.
    pub async fn status(
        &self,
        _call: &Call,
        q: api::ControllerStatusRequest,
    ) -> Result<api::ControllerStatusResponse> {
        let sandbox = self.core.find(&q.sandbox_id)?;
        let r = sandbox.record();
        // While it is being stopped it is not known to be down, and CRI must call Stop again
        // when that fails.
        let ready = matches!(r.phase, Phase::Ready | Phase::Stopping);
        let mut answer = api::ControllerStatusResponse {
            sandbox_id: q.sandbox_id,
            pid: r.started.pid,
            state: if ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.into(),
            created_at: timestamp(r.created_at),
            address: r.address.clone(),
            version: TASK_API,
            ..Default::default()
        };
        if let Some(exit) = r.exit {
            answer.exited_at = timestamp(exit.at);
        }
        if q.verbose {
            let ctx = sandbox.context(None);
            let call = async { self.core.sandboxer.info(&ctx).await };
            // Whatever is wrong with it, the status itself is right.
            match guard("reading verbose info", self.core.options.read_timeout, call).await {
                Ok(more) => answer.info.extend(more),
                Err(e) => tracing::warn!(sandbox = sandbox.id, "{}", e.chain()),
            }
            answer.info.entry("info".into()).or_insert_with(|| info::sandbox_info(&r));
        }
        Ok(answer)
    }

    /// Controller.Shutdown: removes every trace. An unknown sandbox has none.
    ///
    /// # Errors
    /// The sandboxer's; the engine then tries again.
    pub async fn shutdown(
        &self,
        call: &Call,
        q: api::ControllerShutdownRequest,
    ) -> Result<api::ControllerShutdownResponse> {
        self.shut_down(call, &q.sandbox_id, false).await?;
        Ok(api::ControllerShutdownResponse::new())
    }

    pub(crate) async fn shut_down(&self, _call: &Call, id: &str, linger: bool) -> Result<()> {
        let done = match self.core.find(id) {
            Ok(sandbox) => self.submit(&sandbox, |reply| Job::Shutdown { linger, reply }).await,
            Err(e) => Err(e),
        };
        match done {
            Err(Error::NotFound(_)) => {
                if self.core.endpoints.opened(id).is_some() {
                    self.core.endpoints.close_later(id, Duration::from_secs(5));
                }
                Ok(())
            }
            done => done,
        }
    }

    /// Controller.Metrics.
    ///
    /// # Errors
    /// NotFound, or the sandboxer's.
    pub async fn metrics(
        &self,
        _call: &Call,
        q: api::ControllerMetricsRequest,
    ) -> Result<api::ControllerMetricsResponse> {
        let sandbox = self.core.find(&q.sandbox_id)?;
        let ctx = sandbox.context(None);
        let read = async { self.core.sandboxer.metrics(&ctx).await };
        let limit = self.core.options.read_timeout;
        let (type_url, value) = guard("reading metrics", limit, read).await?;
        let metric = Metric {
            timestamp: timestamp(SystemTime::now()),
            id: q.sandbox_id,
            data: MessageField::some(any(type_url, value)),
            ..Default::default()
        };
        Ok(api::ControllerMetricsResponse {
            metrics: MessageField::some(metric),
            ..Default::default()
        })
    }

    /// Controller.Update: `fields` are `labels`, `extensions`, or one key of either
    /// (`extensions.tasks`); none means both. Keys that are not sent stay.
    ///
    /// # Errors
    /// NotFound, InvalidArgument, ResourceExhausted, or the sandboxer's; nothing changes then.
    pub async fn update(
        &self,
        _call: &Call,
        q: api::ControllerUpdateRequest,
    ) -> Result<api::ControllerUpdateResponse> {
        let sandbox = self.core.find(&q.sandbox_id)?;
        let mut spec = SandboxSpec::clone(&sandbox.record().spec);
        let new = q.sandbox.unwrap_or_default();
        let all = ["labels".to_owned(), "extensions".to_owned()];
        for field in if q.fields.is_empty() { &all } else { q.fields.as_slice() } {
            let (what, key) = match field.split_once('.') {
                Some((what, key)) => (what, Some(key)),
                None => (field.as_str(), None),
            };
            let wanted = |k: &str| key.is_none_or(|key| key == k);
            match what {
                "labels" => spec.labels.extend(
                    new.labels
                        .iter()
                        .filter(|(k, _)| wanted(k))
                        .map(|(k, v)| (k.clone(), v.clone())),
                ),
                "extensions" => spec.extensions.extend(
                    new.extensions
                        .iter()
                        .filter(|(k, _)| wanted(k))
                        .map(|(k, v)| (k.clone(), (v.type_url.clone(), v.value.clone()))),
                ),
                _ => {
                    return Err(Error::InvalidArgument(format!(
                        "field {field:?} of a sandbox cannot be updated: labels and extensions can"
                    )));
                }
            }
        }
        check_size(&spec, self.core.options.max_spec)?;
        let (spec, fields) = (Box::new(spec), q.fields);
        self.submit(&sandbox, |reply| Job::Update { spec, fields, reply }).await?;
        Ok(api::ControllerUpdateResponse::new())
    }
}

/// Bounds what one sandbox may make us store.
fn check_size(spec: &SandboxSpec, most: usize) -> Result<()> {
    let extensions: usize = spec.extensions.values().map(|(u, v)| u.len() + v.len()).sum();
    let labels: usize = spec.labels.iter().map(|(k, v)| k.len() + v.len()).sum();
    let size = usize::try_from(spec.config.compute_size()).unwrap_or(usize::MAX);
    let size = size.saturating_add(extensions).saturating_add(labels);
    if size > most {
        return Err(Error::ResourceExhausted(format!(
            "the sandbox' configuration has {size} bytes; at most {most} are allowed"
        )));
    }
    Ok(())
}

/// Checks a Create and takes it apart.
fn spec_of(call: &Call, q: api::ControllerCreateRequest, most: usize) -> Result<SandboxSpec> {
    const CONFIG: &str = "runtime.v1.PodSandboxConfig";
    check_id(&q.sandbox_id)?;
    let invalid = |text: String| Error::InvalidArgument(text);
    let config = match q.options.into_option() {
        None => PodSandboxConfig::new(),
        Some(options) => {
            // containerd sends no prefix, iSulad no type at all; other clients may prefix it.
            let name = options.type_url.rsplit('/').next().unwrap_or_default();
            if !name.is_empty() && name != CONFIG {
                let shown: String = options.type_url.chars().take(128).collect();
                return Err(invalid(format!("options are a {shown:?}; expected {CONFIG}")));
            }
            PodSandboxConfig::parse_from_bytes(&options.value)
                .map_err(|e| invalid(format!("options are no {CONFIG}: {e}")))?
        }
    };
    let netns = std::path::Path::new(&q.netns_path);
    if !q.netns_path.is_empty() {
        let up = netns.components().any(|c| c == std::path::Component::ParentDir);
        if !netns.is_absolute() || up || q.netns_path.len() > 4095 || q.netns_path.contains('\0') {
            return Err(invalid("netns_path must be an absolute path without '..'".into()));
        }
        if let Err(e) = std::fs::metadata(netns) {
            return Err(invalid(format!("netns_path {}: {e}", q.netns_path)));
        }
    }
    let sandbox = q.sandbox.unwrap_or_default();
    let spec = SandboxSpec {
        id: q.sandbox_id,
        config,
        netns_path: q.netns_path,
        runtime: sandbox.runtime.as_ref().map(|r| r.name.clone()).unwrap_or_default(),
        labels: sandbox.labels.into_iter().collect(),
        extensions: sandbox
            .extensions
            .into_iter()
            .map(|(key, value)| (key, (value.type_url, value.value)))
            .collect(),
        namespace: call.namespace.clone(),
    };
    check_size(&spec, most)?;
    Ok(spec)
}

//! `kuasar.admin.v1.Admin` on the daemon's socket: what an operator's tool asks beyond what engines
//! ask. It is the same for every sandboxer, reads what the daemon knows and never its files, and
//! whoever may dial the socket may call it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_sandbox::Controller;
use containerd_sandbox::error::{Error, Result};
use containerd_sandbox::sandboxer::{DebugChange, DebugProgram, TemplateJob, TemplateList};
use containerd_sandbox::store::Record;
use containerd_task::events::{Event, EventSender, timestamp};
use containerd_task::journal::ContainerRecord;
use kuasar_protos::admin as api;
use kuasar_protos::admin_ttrpc as service;
use kuasar_ttrpc::Services;
use protobuf::Message;
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;

use crate::resident::Setup;
use crate::tasks::TaskServers;

/// A page of sandboxes ends when it has so many bytes: a ttrpc message has room for 4 MiB.
const PAGE: u64 = 1 << 20;
/// Events of one answer.
const MOST_EVENTS: usize = 512;
/// Longest time that a call waits for an event.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What has happened lately, in memory, bounded.
///
/// Numbers begin with the time (in microseconds) at which the daemon came, so that they grow over a
/// restart and a tool that follows need not notice one.
pub struct EventLog {
    kept: Mutex<VecDeque<api::Event>>,
    most: usize,
    /// The number before the first event of this daemon's time.
    first: u64,
    last: watch::Sender<u64>,
}

impl std::fmt::Debug for EventLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EventLog({})", self.kept().len())
    }
}

impl EventLog {
    /// Keeps the newest `most`.
    pub fn new(most: usize) -> Self {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let first = u64::try_from(now.as_micros()).unwrap_or(0);
        Self { kept: Mutex::default(), most, first, last: watch::Sender::new(first) }
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<api::Event>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, mut event: api::Event) {
        event.at = timestamp(SystemTime::now());
        let mut kept = self.kept();
        let number = *self.last.borrow() + 1;
        event.number = number;
        if kept.len() >= self.most {
            kept.pop_front();
        }
        kept.push_back(event);
        // Under the lock: numbers and events are never out of step.
        self.last.send_replace(number);
    }

    /// An event of a task.
    pub fn task(&self, namespace: &str, sandbox: &str, event: &Event) {
        let mut told = api::Event {
            namespace: namespace.into(),
            sandbox_id: sandbox.into(),
            topic: event.topic().into(),
            ..Default::default()
        };
        let (container, exec, pid, status) = match event {
            Event::Create(e) => (&e.container_id, "", e.pid, 0),
            Event::Start(e) => (&e.container_id, "", e.pid, 0),
            Event::Exit(e) => {
                let exec = if e.id == e.container_id { "" } else { e.id.as_str() };
                (&e.container_id, exec, e.pid, e.exit_status)
            }
            Event::Oom(e) => (&e.container_id, "", 0, 0),
            Event::Delete(e) => (&e.container_id, "", e.pid, e.exit_status),
            Event::ExecAdded(e) => (&e.container_id, e.exec_id.as_str(), 0, 0),
            Event::ExecStarted(e) => (&e.container_id, e.exec_id.as_str(), e.pid, 0),
            Event::Paused(e) => (&e.container_id, "", 0, 0),
            Event::Resumed(e) => (&e.container_id, "", 0, 0),
            Event::Checkpointed(e) => (&e.container_id, "", 0, 0),
        };
        (told.container_id, told.exec_id) = (container.clone(), exec.to_owned());
        (told.pid, told.exit_status) = (pid, status);
        self.push(told);
    }

    /// A sandbox has a new phase.
    pub fn sandbox(&self, record: &Record) {
        self.push(api::Event {
            namespace: record.spec.namespace.clone(),
            sandbox_id: record.spec.id.clone(),
            topic: format!("/sandbox/{}", phase(record)),
            pid: record.started.pid,
            exit_status: record.exit.map_or(0, |exit| exit.status),
            ..Default::default()
        });
    }

    /// Events after `after`, without waiting.
    fn since(&self, after: u64) -> api::EventsResponse {
        let kept = self.kept();
        let oldest = kept.front().map_or(0, |event| event.number);
        let mut answer = api::EventsResponse::new();
        // Of an earlier daemon's events nobody knows how many there were.
        if after >= self.first {
            answer.missed = oldest.saturating_sub(after + 1);
        }
        answer.events =
            kept.iter().filter(|event| event.number > after).take(MOST_EVENTS).cloned().collect();
        answer.last = answer.events.last().map_or(after, |event| event.number);
        answer
    }

    async fn events(&self, q: &api::EventsRequest) -> api::EventsResponse {
        let mut last = self.last.subscribe();
        if q.newest {
            let last = *last.borrow();
            return api::EventsResponse { last, ..Default::default() };
        }
        let wait = Duration::from_millis(q.wait_ms.into()).min(LONGEST_WAIT);
        // A number of a clock that was set back would never be reached.
        let after = q.after.min(*last.borrow());
        let _ = tokio::time::timeout(wait, last.wait_for(|last| *last > after)).await;
        self.since(after)
    }
}

fn phase(record: &Record) -> String {
    format!("{:?}", record.phase).to_lowercase()
}

/// What answers.
pub struct Admin {
    /// Kind of sandbox.
    pub kind: &'static str,
    /// Where the daemon lives.
    pub setup: Setup,
    /// The sandboxes.
    pub controller: Controller,
    /// Their containers.
    pub servers: Arc<TaskServers>,
    /// sandbox-parent's pid.
    pub parent: u32,
    /// Events for the engine.
    pub events: EventSender,
    /// What has happened lately.
    pub recent: Arc<EventLog>,
    /// When the daemon came.
    pub started: SystemTime,
}

/// The services for the daemon's socket.
pub fn services(admin: Admin) -> Services {
    service::create_admin(Arc::new(admin)).into()
}

fn container(record: &ContainerRecord) -> api::Container {
    let mut all = api::Container {
        id: record.id.clone(),
        bundle: record.bundle.display().to_string(),
        ..Default::default()
    };
    if let Some(init) = record.processes.get("") {
        all.pid = init.pid;
        all.status = format!("{:?}", init.status).to_lowercase();
        if let Some(exit) = init.exit {
            all.exit_status = exit.status;
            all.exited_at = timestamp(exit.at);
        }
    }
    let running = |(exec, p): &(&String, &containerd_task::journal::ProcessRecord)| -> bool {
        !exec.is_empty() && p.pid != 0 && p.exit.is_none()
    };
    all.execs = record.processes.iter().filter(running).count() as u32;
    all
}

impl Admin {
    fn sandbox(&self, r: &Record) -> api::Sandbox {
        let mut told = api::Sandbox {
            id: r.spec.id.clone(),
            namespace: r.spec.namespace.clone(),
            runtime: r.spec.runtime.clone(),
            phase: phase(r),
            pid: r.started.pid,
            created_at: timestamp(r.created_at),
            address: r.address.clone(),
            netns: r.spec.netns_path.clone(),
            cgroup: r.spec.config.linux.cgroup_parent.clone(),
            log_directory: r.spec.config.log_directory.clone(),
            labels: r.spec.config.labels.clone(),
            ..Default::default()
        };
        let pod = &r.spec.config.metadata;
        told.pod_name.clone_from(&pod.name);
        told.pod_namespace.clone_from(&pod.namespace);
        told.pod_uid.clone_from(&pod.uid);
        told.attempt = pod.attempt;
        if let Some(exit) = r.exit {
            told.exit_status = exit.status;
            told.exited_at = timestamp(exit.at);
        }
        if let Some(tasks) = self.servers.get(&r.spec.id) {
            told.containers = tasks.server().records().iter().map(container).collect();
        }
        told
    }

    fn list(&self, after: &str) -> api::ListResponse {
        let mut answer = api::ListResponse::new();
        let mut size = 0;
        for record in self.controller.records() {
            if record.spec.id.as_str() <= after {
                continue;
            }
            if size >= PAGE {
                answer.more = true;
                break;
            }
            let sandbox = self.sandbox(&record);
            size += sandbox.compute_size();
            answer.sandboxes.push(sandbox);
        }
        answer
    }

    async fn collect(&self, q: &api::CollectRequest) -> Result<api::CollectResponse> {
        let mut answer = api::CollectResponse::new();
        if q.dry_run {
            if q.quarantine {
                answer.quarantined = self.controller.quarantined();
            }
            return Ok(answer);
        }
        let ids = || -> Vec<String> {
            self.controller.sandboxes().into_iter().map(|(id, _)| id).collect()
        };
        let before = ids();
        self.controller.collect().await;
        let after = ids();
        answer.removed = before.into_iter().filter(|id| !after.contains(id)).collect();
        if q.quarantine {
            answer.quarantined = self.controller.empty_quarantine().await?;
        }
        Ok(answer)
    }

    fn templates(list: TemplateList) -> api::TemplatesResponse {
        let templates = list.templates.into_iter().map(|one| api::Template {
            key: one.key,
            bytes: one.bytes,
            made_at: timestamp(one.made_at),
            finished: one.finished,
            problem: one.problem.unwrap_or_default(),
            ..Default::default()
        });
        let pool = list.pool.map(|pool| api::Pool {
            wanted: pool.wanted,
            ready: pool.ready,
            refilled: pool.refilled,
            taken: pool.taken,
            missed: pool.missed,
            lost: pool.lost,
            hindrance: pool.hindrance.unwrap_or_default(),
            ..Default::default()
        });
        api::TemplatesResponse {
            pool: pool.into(),
            enabled: list.enabled,
            dir: list.dir.display().to_string(),
            templates: templates.collect(),
            ..Default::default()
        }
    }
}

fn refused(error: Error) -> ttrpc::Error {
    containerd_sandbox::ttrpc_error(&error)
}

#[async_trait]
impl service::Admin for Admin {
    async fn info(
        &self,
        _ctx: &TtrpcContext,
        _q: api::InfoRequest,
    ) -> ttrpc::Result<api::InfoResponse> {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(api::InfoResponse {
            kind: self.kind.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            dir: self.setup.dir.display().to_string(),
            listen: self.setup.listen.display().to_string(),
            metrics: self.setup.common.metrics_address(&self.setup.dir),
            pid: std::process::id(),
            parent_pid: self.parent,
            started_at: timestamp(self.started),
            sandboxes: count(self.controller.sandboxes().len()),
            max_sandboxes: self.setup.common.limits.max_sandboxes,
            containers: count(self.servers.containers()),
            events_dropped: self.events.dropped(),
            quarantined: self.controller.quarantined(),
            ..Default::default()
        })
    }

    async fn list(
        &self,
        _ctx: &TtrpcContext,
        q: api::ListRequest,
    ) -> ttrpc::Result<api::ListResponse> {
        Ok(self.list(&q.after))
    }

    async fn events(
        &self,
        _ctx: &TtrpcContext,
        q: api::EventsRequest,
    ) -> ttrpc::Result<api::EventsResponse> {
        Ok(self.recent.events(&q).await)
    }

    async fn collect(
        &self,
        _ctx: &TtrpcContext,
        q: api::CollectRequest,
    ) -> ttrpc::Result<api::CollectResponse> {
        self.collect(&q).await.map_err(refused)
    }

    async fn console(
        &self,
        _ctx: &TtrpcContext,
        q: api::ConsoleRequest,
    ) -> ttrpc::Result<api::ConsoleResponse> {
        let path = self.controller.console(&q.sandbox_id).await.map_err(refused)?;
        Ok(api::ConsoleResponse { path: path.display().to_string(), ..Default::default() })
    }

    async fn debug(
        &self,
        _ctx: &TtrpcContext,
        q: api::DebugRequest,
    ) -> ttrpc::Result<api::DebugResponse> {
        let terminal = q.terminal.then_some((q.width, q.height));
        let what = DebugProgram { args: q.args, terminal };
        let opened = self.controller.debug(&q.sandbox_id, what).await.map_err(refused)?;
        let path = opened.path.display().to_string();
        Ok(api::DebugResponse { session: opened.session, path, ..Default::default() })
    }

    async fn steer_debug(
        &self,
        _ctx: &TtrpcContext,
        q: api::SteerDebugRequest,
    ) -> ttrpc::Result<api::SteerDebugResponse> {
        use api::steer_debug_request::What;
        let what = match q.what {
            Some(What::Size(size)) => DebugChange::Size(size.width, size.height),
            Some(What::InputBytes(bytes)) => DebugChange::InputBytes(bytes),
            _ => {
                let text = "nothing is said of the session".into();
                return Err(refused(Error::InvalidArgument(text)));
            }
        };
        let steered = self.controller.steer_debug(&q.sandbox_id, &q.session, what).await;
        steered.map_err(refused)?;
        Ok(api::SteerDebugResponse::new())
    }

    async fn templates(
        &self,
        _ctx: &TtrpcContext,
        q: api::TemplatesRequest,
    ) -> ttrpc::Result<api::TemplatesResponse> {
        let what = match (q.verify, q.remove) {
            (key, _) if !key.is_empty() => TemplateJob::Verify(key),
            (_, key) if !key.is_empty() => TemplateJob::Remove(key),
            _ => TemplateJob::List,
        };
        self.controller.templates(what).await.map(Self::templates).map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(after: u64, wait_ms: u32) -> api::EventsRequest {
        api::EventsRequest { after, wait_ms, ..Default::default() }
    }

    #[tokio::test]
    async fn events_are_bounded_and_what_was_missed_is_counted() {
        let log = EventLog::new(3);
        let begin = log.events(&api::EventsRequest { newest: true, ..Default::default() }).await;
        for n in 0..5 {
            let topic = n.to_string();
            log.push(api::Event { topic, ..Default::default() });
        }
        let told = log.events(&ask(begin.last, 0)).await;
        let topics: Vec<&str> = told.events.iter().map(|e| e.topic.as_str()).collect();
        assert_eq!((topics, told.missed), (vec!["2", "3", "4"], 2));
        assert_eq!(told.last, begin.last + 5);
        assert!(log.events(&ask(told.last, 0)).await.events.is_empty());
        // A number from the future, of a clock that was set back.
        log.push(api::Event::new());
        assert!(log.events(&ask(u64::MAX, 0)).await.events.is_empty());
        assert_eq!(log.events(&ask(0, 0)).await.events.len(), 3);
    }

    #[tokio::test]
    async fn a_call_waits_for_the_next_event() {
        let log = Arc::new(EventLog::new(3));
        let from = *log.last.borrow();
        let waiting = tokio::spawn({
            let log = log.clone();
            async move { log.events(&ask(from, 30_000)).await }
        });
        tokio::task::yield_now().await;
        log.push(api::Event { topic: "now".into(), ..Default::default() });
        let told = waiting.await.unwrap();
        assert_eq!((told.events.len(), told.events[0].topic.as_str()), (1, "now"));
    }
}

//! The resident daemon: what is started in which order, and how it ends.
//!
//! 1. The state directory is made and locked: one daemon per directory.
//! 2. sandbox-parent is found, or started.
//! 3. Every pod is recovered. Only then the daemon's own socket is served and the service manager
//!    told: an engine that was answered earlier would take pods that are not recovered for dead.
//! 4. On SIGTERM connections are cut (a Wait that was *answered* would mean the end of a pod),
//!    running operations get a moment, and the process ends. Pods, their sockets and processes
//!    belong to sandbox-parent. While there are pods it also keeps the daemon's own socket, so
//!    that calls wait for the next daemon; without pods it gives that up, and calls are refused.
//! 5. If sandbox-parent is lost, the daemon ends with an error, to be started again: nothing
//!    that it could still do would be true.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_sandbox::sandboxer::Sandboxer;
use containerd_sandbox::{Controller, ControllerOptions};
use containerd_task::TaskOptions;
use containerd_task::events::EventSender;
use sandbox_parent::client::{Parent, ParentError, ParentOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::admin::{Admin, EventLog};
use crate::common::CommonConfig;
use crate::diagnosis;
use crate::logging::LevelHandle;
use crate::peer::Allowed;
use crate::registry::{Counter, Gauge};
use crate::sockets::{self, ParentSockets};
use crate::tasks::TaskServers;

/// Why a daemon cannot run, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ResidentError {
    /// A setting has no sense.
    #[error("configuration: {0}")]
    Config(String),
    /// The state directory cannot be used.
    #[error("state directory {}", .0.display())]
    Directory(PathBuf, #[source] kuasar_host::Error),
    /// Another user has it.
    #[error("{0}")]
    Foreign(diagnosis::Problem),
    /// Another daemon uses it.
    #[error("{}", diagnosis::used_by_another(.0))]
    Locked(PathBuf),
    /// A daemon runs, and something was asked that needs it away.
    #[error("a daemon is running in {}: stop it first", .0.display())]
    Running(PathBuf),
    /// sandbox-parent is not to be ended.
    #[error("sandbox-parent keeps pods: remove them first, or say --force")]
    KeepsPods,
    /// sandbox-parent's program is nowhere.
    #[error(
        "sandbox-parent is neither beside this program nor in PATH: install it, or set parent_binary"
    )]
    NoParent,
    /// sandbox-parent cannot be started or does not answer.
    #[error("sandbox-parent")]
    Parent(#[from] ParentError),
    /// It ended, or another daemon has taken it over.
    #[error("sandbox-parent is lost: it ended, or another daemon has taken it over")]
    ParentLost,
    /// A socket cannot be served.
    #[error("cannot serve {what}")]
    Socket {
        /// Which.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The sandboxer cannot be made.
    #[error("{0}")]
    Sandboxer(String),
    /// Recovery failed as a whole.
    #[error("recovery")]
    Recovery(#[source] containerd_sandbox::error::Error),
}

/// Where a daemon lives and what it is called.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Kind of sandbox, as in `runc-sandboxer`: label of the metrics.
    pub kind: &'static str,
    /// State directory.
    pub dir: PathBuf,
    /// Socket that engines dial.
    pub listen: PathBuf,
    /// Shared settings.
    pub common: CommonConfig,
}

impl Setup {
    /// Command line before configuration before defaults (`/run/kuasar-<kind>`).
    pub fn new(kind: &'static str, args: &crate::args::DaemonArgs, common: CommonConfig) -> Self {
        let dir = args.dir.clone().or(common.dir.clone());
        let dir = dir.unwrap_or_else(|| format!("/run/kuasar-{kind}").into());
        let listen = args.listen.clone().or(common.listen.clone());
        let listen = listen.unwrap_or_else(|| dir.join("sandboxer.sock"));
        Self { kind, dir, listen, common }
    }
}

/// What a sandboxer is made from.
pub struct Parts {
    /// The companion process.
    pub parent: Parent,
    /// Whether it was started by this daemon: then no pod of an earlier one is alive.
    pub fresh: bool,
    /// The Task servers of all pods; the sandboxer makes and takes them.
    pub servers: Arc<TaskServers>,
}

/// Idle for so long, the daemon gives memory back.
const QUIET: Duration = Duration::from_millis(400);

static REQUESTS: Counter =
    Counter { name: "kuasar_requests_total", labels: &["sandboxer", "rpc", "code"] };
static MEMORY: Gauge =
    Gauge { name: "kuasar_process_memory_bytes", labels: &["sandboxer", "process"] };

/// sandbox-parent's program.
fn parent_binary(common: &CommonConfig) -> Result<PathBuf, ResidentError> {
    if let Some(path) = &common.parent_binary {
        return Ok(path.clone());
    }
    let name = "sandbox-parent";
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name(name));
    if let Some(beside) = beside.filter(|path| path.is_file()) {
        return Ok(beside);
    }
    kuasar_host::process::find_program(Path::new(name)).ok_or(ResidentError::NoParent)
}

/// sandbox-parent's bounds follow from ours. It outlives the limits that it was started with, so
/// there is always room for the usual number of pods, and for sockets of pods that are just going.
fn parent_options(common: &CommonConfig, dir: PathBuf, binary: PathBuf) -> ParentOptions {
    // Its tables end there.
    const MOST: u32 = 60_000;
    let usual = ParentOptions::new(dir, binary);
    let sandboxes = common.limits.max_sandboxes;
    let room = |each: u32, least: u32| sandboxes.saturating_mul(each).clamp(least, MOST);
    ParentOptions {
        timeout: common.timeouts.parent,
        max_connections: common.limits.max_pod_connections,
        pods: room(2, usual.pods),
        // Namespaces of a pod, and the streams of some containers in it.
        kept: room(16, usual.kept),
        watched: room(8, usual.watched),
        hold: common.timeouts.hold,
        ..usual
    }
}

/// A pod has some six descriptors here. After sandbox-parent is started, which passes the limit
/// that it has found on to containers.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Held as long as the daemon runs. One that is just ending gets a moment.
async fn lock(dir: &Path, patience: Duration) -> Result<std::fs::File, ResidentError> {
    let path = dir.join("daemon.lock");
    let failed = |source| {
        let context = format!("open {}", path.display());
        ResidentError::Directory(dir.to_owned(), kuasar_host::Error::Io { context, source })
    };
    let file = {
        use std::os::unix::fs::OpenOptionsExt;
        let mut how = std::fs::OpenOptions::new();
        how.write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?
    };
    let until = tokio::time::Instant::now() + patience;
    loop {
        // SAFETY: an open descriptor, and a flag.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(file);
        }
        if tokio::time::Instant::now() >= until {
            return Err(ResidentError::Locked(dir.to_owned()));
        }
        // flock(2) has no deadline of its own.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Ends the sandbox-parent of a directory in which no daemon runs; without `force` only when it
/// keeps no pod.
///
/// # Errors
/// [`ResidentError::Running`] while a daemon runs: its sandbox-parent is not to be taken over.
/// [`ResidentError::KeepsPods`]; [`ResidentError::Parent`] when there is none, for example.
pub async fn shutdown_parent(
    dir: &Path,
    timeout: Duration,
    force: bool,
) -> Result<(), ResidentError> {
    let _lock = lock(dir, Duration::ZERO).await.map_err(|error| match error {
        ResidentError::Locked(dir) => ResidentError::Running(dir),
        other => other,
    })?;
    let (parent, _connections) = Parent::connect(dir, timeout).await?;
    // What it keeps for a daemon (its socket, when that was killed) is no pod.
    parent.forget(&format!("{}/", sockets::OWN_GROUP)).await?;
    parent.shutdown(force).await.map_err(|error| match error.failure() {
        Some((libc::EBUSY, _)) => ResidentError::KeepsPods,
        _ => ResidentError::Parent(error),
    })
}

fn controller_options(
    setup: &Setup,
    servers: Arc<TaskServers>,
    recent: Arc<EventLog>,
) -> ControllerOptions {
    let (l, t) = (&setup.common.limits, &setup.common.timeouts);
    let size = |n: u32| n as usize;
    let allowed = Allowed::with(&setup.common.allowed_uids);
    let kind = setup.kind;
    let known = servers.clone();
    ControllerOptions {
        dir: setup.dir.clone(),
        socket: setup.listen.clone(),
        start_timeout: t.start,
        stop_timeout: t.stop,
        stuck_timeout: t.stuck,
        read_timeout: t.read,
        recover_timeout: t.recover,
        recover_parallel: size(l.parallel_recoveries),
        parallel_starts: size(l.parallel_starts),
        max_sandboxes: size(l.max_sandboxes),
        max_spec: size(l.max_sandbox_bytes),
        max_connections: size(l.max_connections),
        max_streams: l.max_streams,
        max_pod_backlog: size(l.max_pod_backlog),
        hello_timeout: t.hello,
        max_message: size(l.max_message_bytes),
        open_timeout: t.opened,
        unstarted_timeout: t.unstarted,
        drain_timeout: t.finish,
        max_quarantine: size(l.max_quarantine),
        peer_check: Some(Arc::new(move |peer| allowed.permits(peer.uid()))),
        failpoint: Some(Arc::new(crate::failpoint::hit)),
        observer: Some(Arc::new(move |rpc, code, took| {
            crate::metrics::book(rpc, took);
            REQUESTS.add(&[kind, rpc, &format!("{code:?}")], 1);
        })),
        changed: Some(Arc::new(move |record| recent.sandbox(record))),
        busy: Some(Arc::new(move |pod| {
            known.get(pod).is_some_and(|tasks| tasks.server().is_used())
        })),
        tasks: Some(Arc::new(move |container| servers.probe(container))),
    }
}

/// Runs until SIGTERM. `make` makes the sandboxer; `reload` reads the configuration again and
/// answers the shared part, of which the log level is taken over.
///
/// # Errors
/// See [`ResidentError`].
pub async fn run<S, M, R>(
    setup: Setup,
    level: LevelHandle,
    make: M,
    reload: R,
) -> Result<(), ResidentError>
where
    S: Sandboxer,
    M: FnOnce(&Parts) -> Result<S, String>,
    R: Fn() -> Result<CommonConfig, String> + Clone + Send + 'static,
{
    setup.common.check().map_err(ResidentError::Config)?;
    let (common, dir) = (&setup.common, setup.dir.clone());
    let (what, own) = ("state directory", nix::unistd::geteuid().as_raw());
    if let Some(problem) = diagnosis::owned_by_another(what, &dir, own) {
        return Err(ResidentError::Foreign(problem));
    }
    if let Some(problem) = diagnosis::open_to_others(what, &dir, 0o700) {
        // Said all the same: somebody has opened it, and may do so again.
        tracing::warn!("{problem} (done)");
    }
    kuasar_host::record::private_dir(&dir)
        .map_err(|error| ResidentError::Directory(dir.clone(), error))?;
    let _lock = lock(&dir, common.timeouts.finish + Duration::from_secs(2)).await?;
    let options = parent_options(common, dir.clone(), parent_binary(common)?);
    let traces = crate::traces::start(&common.tracing, &format!("{}-sandboxer", setup.kind))
        .map_err(ResidentError::Config)?;
    let (parent, connections, fresh) = Parent::connect_or_spawn(&options).await?;
    tracing::info!(pid = parent.pid(), fresh, "sandbox-parent");
    raise_descriptor_limit();
    let unsent = common.limits.max_unsent_events as usize;
    let recent = Arc::new(EventLog::new(common.limits.max_recent_events as usize));
    let events = match common.events() {
        "" => EventSender::none(),
        path => EventSender::containerd(PathBuf::from(path), unsent),
    };
    let seen = recent.clone();
    let events = events.tapped(Arc::new(move |ns, sandbox, event| seen.task(ns, sandbox, event)));
    let tasks = TaskOptions {
        max_containers: common.limits.max_containers as usize,
        max_execs: common.limits.max_execs as usize,
        drain: common.timeouts.output,
        failpoint: crate::failpoint::hit,
        ..TaskOptions::default()
    };
    let servers = Arc::new(TaskServers::new(parent.clone(), events.clone(), tasks));
    let parts = Parts { parent: parent.clone(), fresh, servers: servers.clone() };
    let sandboxer = Arc::new(make(&parts).map_err(ResidentError::Sandboxer)?);
    let pods = Arc::new(ParentSockets::new(parent.clone()).await?);
    let options = controller_options(&setup, servers.clone(), recent.clone());
    let controller =
        Controller::new(options, sandboxer.clone(), pods).map_err(ResidentError::Recovery)?;
    let pump =
        sockets::pump(connections, controller.endpoints(), servers.clone(), common.timeouts.hello);
    let mut pump = tokio::spawn(pump);
    let wanted = level.clone();
    let mut stop = crate::signals::handle(move || {
        let (reload, level) = (reload.clone(), wanted.clone());
        async move {
            let common = tokio::task::spawn_blocking(reload).await.map_err(|e| e.to_string())??;
            level.set(common.log_level.as_deref().unwrap_or("info"))
        }
    })
    .map_err(|source| ResidentError::Socket { what: "signals".into(), source })?;
    controller.recover().await.map_err(ResidentError::Recovery)?;
    let listener = sockets::own(&parent, &setup.listen).await.map_err(|source| {
        ResidentError::Socket { what: setup.listen.display().to_string(), source }
    })?;
    serve_metrics(&setup, &controller, &servers, &parent, &events);
    tokio::spawn(watch(parent.clone(), setup.listen.clone()));
    tracing::info!(listen = %setup.listen.display(), "ready");
    crate::notify::send("READY=1");
    crate::memory::trim();
    tokio::spawn(crate::memory::trim_when_idle(QUIET));
    if !common.events().is_empty() {
        // Without events there is another engine.
        tokio::spawn(diagnosis::warn_of_containerd());
    }
    let (ended, shutdown) = tokio::sync::watch::channel(false);
    let admin = crate::admin::services(Admin {
        kind: setup.kind,
        setup: setup.clone(),
        controller: controller.clone(),
        servers: servers.clone(),
        parent: parent.pid(),
        events,
        recent,
        started: std::time::SystemTime::now(),
    });
    let serving = controller.serve_with(listener, admin, shutdown);
    tokio::pin!(serving);
    let lost = tokio::select! {
        () = stop.wait() => false,
        _ = &mut pump => true,
        // Does not come: it ends only when it is told to, below. It must not be polled again.
        () = &mut serving => return Ok(()),
    };
    ended.send_replace(true);
    serving.await;
    if lost {
        return Err(ResidentError::ParentLost);
    }
    sandboxer.finish().await;
    if controller.sandboxes().is_empty() {
        sockets::give_up(&parent).await;
    }
    traces.finish(common.timeouts.finish).await;
    tracing::info!("ended");
    Ok(())
}

/// Tells the watchdog that we are alive as long as sandbox-parent answers and our own socket
/// does: a connection is accepted and gets the server's first HTTP/2 frame.
async fn watch(parent: Parent, listen: PathBuf) {
    crate::notify::watchdog(|| async { parent.status().await.is_ok() && answers(&listen).await })
        .await;
}

/// Whether a gRPC server answers at this socket.
pub async fn answers(path: &Path) -> bool {
    let ask = async {
        let mut socket = tokio::net::UnixStream::connect(path).await?;
        // RFC 9113, section 3.4: the preface and an empty SETTINGS frame; the server's comes back.
        socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
        let mut header = [0; 9];
        socket.read_exact(&mut header).await?;
        Ok::<bool, std::io::Error>(header.get(3) == Some(&4))
    };
    ask.await.unwrap_or(false)
}

fn serve_metrics(
    setup: &Setup,
    controller: &Controller,
    servers: &Arc<TaskServers>,
    parent: &Parent,
    events: &EventSender,
) {
    let address = setup.common.metrics_address(&setup.dir);
    if address.is_empty() {
        return;
    }
    let (kind, controller, servers) = (setup.kind, controller.clone(), servers.clone());
    let (parent, events) = (parent.clone(), events.clone());
    let text = move || {
        let (controller, servers) = (controller.clone(), servers.clone());
        let (parent, events) = (parent.clone(), events.clone());
        async move {
            let own = std::process::id();
            for (name, pid) in [("daemon", own), ("sandbox-parent", parent.pid())] {
                if let Some(memory) = crate::metrics::process_memory(pid) {
                    MEMORY.set(&[kind, name], memory.pss as f64);
                }
            }
            let kept = parent.status().await.unwrap_or_default();
            let gauges = [
                ("kuasar_sandboxes", controller.sandboxes().len() as u64),
                ("kuasar_containers", servers.containers() as u64),
                ("kuasar_parent_descriptors", kept.kept.into()),
                ("kuasar_parent_processes", kept.watched.into()),
                ("kuasar_parent_connections", kept.connections.into()),
                ("kuasar_parent_parked_calls", kept.parked.into()),
            ];
            let mut counters = vec![
                ("kuasar_events_dropped_total", events.dropped()),
                ("kuasar_parent_refused_total", kept.refused),
            ];
            if let Some((sent, dropped)) = crate::traces::counters() {
                counters.push(("kuasar_trace_spans_total", sent));
                counters.push(("kuasar_trace_spans_dropped_total", dropped));
            }
            crate::metrics::render(kind, &gauges, &counters)
        }
    };
    tokio::spawn(async move {
        // Metrics are no reason to refuse pods: without them the daemon goes on.
        if let Err(error) = crate::metrics::serve(&address, text).await {
            tracing::error!(%address, %error, "metrics are not served");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sandbox_parent_is_not_taken_from_a_running_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = lock(dir.path(), Duration::ZERO).await.unwrap();
        let ask = || shutdown_parent(dir.path(), Duration::from_millis(100), false);
        assert!(matches!(ask().await, Err(ResidentError::Running(_))));
        drop(daemon);
        assert!(matches!(ask().await, Err(ResidentError::Parent(_))));
    }

    #[test]
    fn sandbox_parent_has_room_for_what_the_limits_allow() {
        let with = |max_sandboxes| {
            let mut common = CommonConfig::default();
            common.limits.max_sandboxes = max_sandboxes;
            let options = parent_options(&common, "/d".into(), "/b".into());
            (options.pods, options.kept, options.watched)
        };
        assert_eq!(with(1), (4096, 32_768, 16_384));
        assert_eq!(with(1024), (4096, 32_768, 16_384));
        assert_eq!(with(4096), (8192, 60_000, 32_768));
    }
}

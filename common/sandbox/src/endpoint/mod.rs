//! The pods' sockets: where they are, who listens, and what answers.
//!
//! The listening socket is made here and given to [`PodSockets`] (sandbox-parent), which accepts
//! on it, outlives us and hands every connection to [`Endpoints::connection`]. There it is served
//! at once, by a task of its own; connections of a pod whose services are not there yet (it is
//! still being recovered) wait in a bounded list. Beside its connections a pod costs nothing here
//! but its entry in a table.

mod socket;
mod switch;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use switch::Switch;

use crate::error::{Error, Result};
use crate::sandboxer::PodServices;

/// Owns the pods' listening sockets, across restarts of the daemon.
#[async_trait]
pub trait PodSockets: Send + Sync + 'static {
    /// Accepts on `listener` for this pod from now on, and passes connections to
    /// [`Endpoints::connection`].
    async fn listen(&self, pod: &str, listener: OwnedFd) -> io::Result<()>;

    /// Stops that and closes the pod's connections. Fine for an unknown pod.
    async fn unlisten(&self, pod: &str) -> io::Result<()>;

    /// Whether a socket of this pod is still held for us from an earlier daemon.
    async fn is_listening(&self, pod: &str) -> io::Result<bool>;

    /// Forgets every pod that is not in `known`, as far as it can tell them.
    async fn retain(&self, known: &[String]) -> io::Result<()>;

    /// All pods are known to [`Endpoints`]: connections may be passed on.
    async fn ready(&self) -> io::Result<()>;
}

/// What the shim binary said when it opened a pod's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Opened {
    /// containerd's bundle of the sandbox.
    pub(crate) bundle: PathBuf,
    /// containerd's namespace.
    pub(crate) namespace: String,
}

struct Pod {
    path: PathBuf,
    services: Option<PodServices>,
    /// Connections that came before the services.
    waiting: Vec<UnixStream>,
    cut: Arc<Switch>,
    opened: Option<Opened>,
    /// Where the services go that come only with Start, when the socket is served before.
    late: Option<Late>,
    since: Instant,
    /// It stays only for answers that are on their way.
    closing: bool,
}

impl Pod {
    /// Serves a connection in a task of its own.
    fn serve(&self, stream: UnixStream, services: PodServices) {
        let ready = stream.set_nonblocking(true);
        let stream = match ready.and_then(|()| tokio::net::UnixStream::from_std(stream)) {
            Ok(stream) => stream,
            Err(e) => return tracing::warn!("a connection to a pod could not be used: {e}"),
        };
        let cut = self.cut.clone();
        let cut = async move { cut.turned_on().await };
        tokio::spawn(kuasar_ttrpc::serve(stream, services, cut));
    }
}

/// Services of a pod whose socket is served already.
pub(crate) type Late = Arc<OnceLock<PodServices>>;

struct Inner {
    dir: PathBuf,
    backlog: usize,
    sockets: Arc<dyn PodSockets>,
    pods: Mutex<HashMap<String, Pod>>,
}

/// All pods' endpoints. Cheap to clone.
#[derive(Clone)]
pub struct Endpoints(Arc<Inner>);

impl std::fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Endpoints({})", self.0.dir.display())
    }
}

impl Endpoints {
    pub(crate) fn new(dir: &Path, backlog: usize, sockets: Arc<dyn PodSockets>) -> Result<Self> {
        let dir = dir.join("pods");
        // Fail at the start, not at the first pod, when the directory's name is too long.
        socket::path(&dir, "-")?;
        kuasar_host::record::private_dir(&dir)
            .map_err(|e| Error::internal("cannot make the directory of pod sockets", e))?;
        let pods = Mutex::default();
        Ok(Self(Arc::new(Inner { dir, backlog: backlog.max(1), sockets, pods })))
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<String, Pod>> {
        self.0.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection to a pod's socket. One of an unknown pod, or too many, is closed.
    pub fn connection(&self, pod: &str, stream: UnixStream) {
        let mut pods = self.pods();
        let Some(entry) = pods.get_mut(pod) else {
            return tracing::warn!(sandbox = pod, "a connection for an unknown pod was closed");
        };
        match &entry.services {
            Some(services) => entry.serve(stream, services.clone()),
            None if entry.waiting.len() < self.0.backlog => entry.waiting.push(stream),
            None => tracing::warn!(sandbox = pod, "too many connections wait: closed one"),
        }
    }

    /// The socket of a pod, if it has one.
    pub fn path(&self, pod: &str) -> Option<PathBuf> {
        self.pods().get(pod).map(|p| p.path.clone())
    }

    /// Where [`Self::open`] puts a pod's socket.
    pub(crate) fn default_path(&self, pod: &str) -> Result<PathBuf> {
        socket::path(&self.0.dir, pod)
    }

    pub(crate) fn opened(&self, pod: &str) -> Option<Opened> {
        self.pods().get(pod)?.opened.clone()
    }

    /// Pods whose socket was opened by a shim at least `age` ago.
    pub(crate) fn opened_before(&self, age: Duration) -> Vec<String> {
        let pods = self.pods();
        let old = pods.iter().filter(|(_, p)| p.opened.is_some() && p.since.elapsed() >= age);
        old.map(|(id, _)| id.clone()).collect()
    }

    /// Makes the pod known, without a socket. False when it was already.
    fn register(&self, pod: &str, path: PathBuf, opened: Option<Opened>) -> Result<bool> {
        let mut pods = self.pods();
        if pods.contains_key(pod) {
            return Ok(false);
        }
        if let Some((other, _)) = pods.iter().find(|(_, p)| p.path == path) {
            return Err(Error::FailedPrecondition(format!(
                "the socket name {} is taken by sandbox {other}: create it with another id",
                path.display()
            )));
        }
        let entry = Pod {
            path,
            services: None,
            waiting: Vec::new(),
            cut: Arc::default(),
            opened,
            late: None,
            since: Instant::now(),
            closing: false,
        };
        pods.insert(pod.to_owned(), entry);
        Ok(true)
    }

    /// Makes the pod's socket and has it listened on; answers its path, and whether it is new.
    pub(crate) async fn open(&self, pod: &str, opened: Option<Opened>) -> Result<(PathBuf, bool)> {
        let path = socket::path(&self.0.dir, pod)?;
        if self.pods().get(pod).is_some_and(|p| p.closing) {
            self.close(pod).await;
        }
        let new = self.register(pod, path.clone(), opened)?;
        if new && let Err(e) = self.bind(pod, &path).await {
            self.close(pod).await;
            return Err(e);
        }
        Ok((path, new))
    }

    async fn bind(&self, pod: &str, path: &Path) -> Result<()> {
        let failed = |e| Error::internal(format!("cannot make the socket {}", path.display()), e);
        if let Some(dir) = path.parent() {
            kuasar_host::record::private_dir(dir).map_err(|e| failed(io::Error::other(e)))?;
        }
        let listener = kuasar_host::socket::bind_private(path).map_err(failed)?;
        let given = self.0.sockets.listen(pod, listener).await;
        given.map_err(|e| Error::internal("cannot hand over the pod's socket", e))
    }

    /// Makes a recovered pod known; its connections wait for [`Self::serve`].
    pub(crate) fn adopt(&self, pod: &str, path: &Path, opened: Option<Opened>) -> Result<()> {
        self.register(pod, path.to_owned(), opened).map(drop)
    }

    /// Makes the socket of an adopted pod again when nobody has kept it.
    pub(crate) async fn reopen(&self, pod: &str) -> Result<()> {
        let held = self.0.sockets.is_listening(pod).await;
        if held.map_err(|e| Error::internal("cannot ask for the pod's socket", e))? {
            return Ok(());
        }
        let Some(path) = self.path(pod) else { return Ok(()) };
        tracing::warn!(sandbox = pod, "nobody has kept its socket: making it again");
        self.bind(pod, &path).await
    }

    /// Serves the connections that wait and those that come. Once per pod.
    pub(crate) fn serve(&self, pod: &str, services: PodServices) -> Result<()> {
        let mut pods = self.pods();
        let entry = pods
            .get_mut(pod)
            .ok_or_else(|| Error::Unavailable(format!("sandbox {pod} is being removed")))?;
        if entry.services.is_some() {
            return Err(Error::FailedPrecondition(format!(
                "the socket of sandbox {pod} is served already"
            )));
        }
        for stream in std::mem::take(&mut entry.waiting) {
            entry.serve(stream, services.clone());
        }
        entry.services = Some(services);
        Ok(())
    }

    /// Serves `early` now; [`Self::provide`] adds the rest through `late`.
    pub(crate) fn serve_early(&self, pod: &str, early: PodServices, late: Late) -> Result<()> {
        if let Some(entry) = self.pods().get_mut(pod) {
            entry.late = Some(late);
        }
        self.serve(pod, early)
    }

    /// The services of a started or recovered pod.
    pub(crate) fn provide(&self, pod: &str, services: PodServices) -> Result<()> {
        let late = self.pods().get(pod).and_then(|p| p.late.clone());
        match late {
            None => self.serve(pod, services),
            Some(late) => late.set(services).map_err(|_| {
                Error::FailedPrecondition(format!("sandbox {pod} has its services already"))
            }),
        }
    }

    /// Removes the pod's socket and cuts its connections.
    pub(crate) async fn close(&self, pod: &str) {
        let entry = self.pods().remove(pod);
        if let Err(e) = self.0.sockets.unlisten(pod).await {
            tracing::warn!(sandbox = pod, "cannot give up its socket: {e}");
        }
        if let Some(entry) = entry {
            socket::remove(&entry.path);
            entry.cut.turn_on();
        }
    }

    /// The same, but an answer that is on its way to a client of this very socket still gets
    /// there: the client has up to `grace` to hang up.
    pub(crate) fn close_later(&self, pod: &str, grace: Duration) {
        let (endpoints, pod) = (self.clone(), pod.to_owned());
        let mut since = None;
        if let Some(entry) = self.pods().get_mut(&pod) {
            entry.closing = true;
            since = Some(entry.since);
            socket::remove(&entry.path);
        }
        tokio::spawn(async move {
            tokio::time::sleep(grace).await;
            // Not a new one of the same name.
            if endpoints.pods().get(&pod).map(|p| p.since) == since {
                endpoints.close(&pod).await;
            }
        });
    }

    /// After recovery: forgets foreign pods, except those that are `spared`, and lets connections
    /// come.
    pub(crate) async fn ready(&self, spared: &[String]) -> Result<()> {
        let mut known: Vec<String> = self.pods().keys().cloned().collect();
        known.extend(spared.iter().cloned());
        let wrap = |e| Error::internal("cannot take over the pods' sockets", e);
        self.0.sockets.retain(&known).await.map_err(wrap)?;
        let parent = |path: &Path| path.parent().map(Into::into);
        let mut used: Vec<PathBuf> = self.pods().values().filter_map(|p| parent(&p.path)).collect();
        let sockets = spared.iter().filter_map(|id| self.default_path(id).ok());
        used.extend(sockets.filter_map(|path| parent(&path)));
        for entry in std::fs::read_dir(&self.0.dir).into_iter().flatten().flatten() {
            if used.contains(&entry.path()) {
                continue;
            }
            socket::remove(&entry.path().join(socket::NAME));
            // The directory is mostly named for the pod. Who holds its socket may not be able to
            // list them, but can be told.
            if let Some(pod) = entry.file_name().to_str() {
                self.0.sockets.unlisten(pod).await.map_err(wrap)?;
            }
        }
        self.0.sockets.ready().await.map_err(wrap)
    }

    /// Cuts every connection at once; nothing is answered any more.
    pub(crate) fn cut_all(&self) {
        for (_, pod) in self.pods().drain() {
            pod.cut.turn_on();
        }
    }
}

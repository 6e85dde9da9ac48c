//! Every limit and time of the Controller, in one place.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Called at named points (`sandbox.create.before`, `sandbox.start.after`, …); an error makes
/// the request fail there. For tests.
pub type Failpoint = Arc<dyn Fn(&'static str) -> Result<(), String> + Send + Sync>;

/// Told of every finished request: RPC, code, duration.
pub type Observer = Arc<dyn Fn(&'static str, tonic::Code, Duration) + Send + Sync>;

/// Whether a client with this user, group and pid may connect.
pub type PeerCheck = Arc<dyn Fn(&tokio::net::unix::UCred) -> bool + Send + Sync>;

/// What a daemon knows of a container, for `containerd-shim-… delete`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TaskProbe {
    /// Its pid.
    pub pid: u32,
    /// Status and time of its end; `None` while it runs.
    pub exit: Option<(u32, SystemTime)>,
}

/// Whether the sandbox with this id has containers.
pub type Busy = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// Told of every change of a sandbox' phase, and of its removal, with the record after it. Must not
/// block.
pub type Changed = Arc<dyn Fn(&crate::store::Record) + Send + Sync>;

/// Looks up a container by id.
pub type TaskLookup = Arc<dyn Fn(&str) -> Option<TaskProbe> + Send + Sync>;

/// Limits, times and hooks of a [`crate::Controller`].
#[derive(Clone)]
pub struct ControllerOptions {
    /// State directory: `sandboxes/`, `quarantine/` and `pods/` are made in it, 0700.
    pub dir: PathBuf,
    /// Socket that engines dial.
    pub socket: PathBuf,
    /// How long Create and Start may take when the caller sets no deadline (iSulad sets none).
    pub start_timeout: Duration,
    /// Grace for a Stop that says `timeout_secs = 0` (containerd always does).
    pub stop_timeout: Duration,
    /// A sandboxer's call that takes longer is given up and counts as failed, so that the
    /// sandbox can still be removed.
    pub stuck_timeout: Duration,
    /// How long verbose info and metrics may take.
    pub read_timeout: Duration,
    /// How long one sandbox may take to be recovered.
    pub recover_timeout: Duration,
    /// Sandboxes that are recovered at the same time.
    pub recover_parallel: usize,
    /// Create and Start calls that run at the same time.
    pub parallel_starts: usize,
    /// Most sandboxes; one more is ResourceExhausted.
    pub max_sandboxes: usize,
    /// Most bytes of one sandbox' configuration and extensions together.
    pub max_spec: usize,
    /// Most connections to the socket at the same time.
    pub max_connections: usize,
    /// Most requests in flight on one gRPC connection. One Wait per sandbox is always open, so
    /// this is well above `max_sandboxes`.
    pub max_streams: u32,
    /// Most connections to pod sockets that wait to be served, per pod.
    pub max_pod_backlog: usize,
    /// A connection that says nothing for so long is closed.
    pub hello_timeout: Duration,
    /// Largest gRPC message in bytes, either way; ttrpc's own limit is 4 MiB.
    pub max_message: usize,
    /// A socket that a shim opened and no CreateSandbox followed is closed after this time.
    pub open_timeout: Duration,
    /// A sandbox that was created and not started is removed after this time, and so is a
    /// recovered one that no call names: containerd calls nothing when it has given up.
    pub unstarted_timeout: Duration,
    /// How long running operations may go on after shutdown.
    pub drain_timeout: Duration,
    /// Most quarantined records that are kept.
    pub max_quarantine: usize,
    /// Which peers may connect; by default root and our own user.
    pub peer_check: Option<PeerCheck>,
    /// Points at which tests make things go wrong.
    pub failpoint: Option<Failpoint>,
    /// Told of every request, and of `Collect`, the Controller's own look for what nobody came back for.
    pub observer: Option<Observer>,
    /// Knows the containers, for the shim binary's `delete`.
    pub tasks: Option<TaskLookup>,
    /// Told of every change of phase, for operators' tools.
    pub changed: Option<Changed>,
    /// Whether a sandbox has containers; one that has is never removed unasked.
    pub busy: Option<Busy>,
}

impl Default for ControllerOptions {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            dir: "/run/kuasar".into(),
            socket: "/run/kuasar/sandboxer.sock".into(),
            start_timeout: s(120),
            stop_timeout: s(10),
            stuck_timeout: s(300),
            read_timeout: s(5),
            recover_timeout: s(30),
            recover_parallel: 16,
            parallel_starts: 32,
            max_sandboxes: 1024,
            max_spec: 8 << 20,
            max_connections: 128,
            max_streams: 4096,
            max_pod_backlog: 256,
            hello_timeout: s(10),
            max_message: 16 << 20,
            open_timeout: s(120),
            unstarted_timeout: s(60),
            drain_timeout: s(3),
            max_quarantine: 64,
            peer_check: None,
            failpoint: None,
            observer: None,
            tasks: None,
            changed: None,
            busy: None,
        }
    }
}

impl std::fmt::Debug for ControllerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControllerOptions")
            .field("dir", &self.dir)
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

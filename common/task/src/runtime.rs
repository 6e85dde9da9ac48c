//! The border between the Task API and whatever runs containers underneath.
//!
//! The Task server (this crate) owns everything the protocol demands: the process table, states,
//! waits, stdio, events, the journal. A [`Runtime`] only makes processes and touches them: an OCI
//! engine on the host, a wasm engine, or a forwarder into a guest. It keeps no table of its own
//! and may be called for different containers at the same time; for one container the server
//! calls one method at a time, except [`Runtime::kill`], [`Runtime::pids`] and
//! [`Runtime::stats`], which may come at any moment.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::SystemTime;

use async_trait::async_trait;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::error::Result;

pub use kuasar_host::mount::Mount;

/// What [`Runtime::create`] is asked to make.
#[derive(Debug, Clone)]
pub struct CreateContainer {
    /// Container id, checked.
    pub id: String,
    /// containerd's bundle directory; it holds `config.json` and an empty `rootfs/`.
    pub bundle: PathBuf,
    /// What to mount on `rootfs/`, in order; empty when the spec's root is ready.
    pub rootfs: Vec<Mount>,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    /// Checkpoint directory to restore from, if any. What is in it is not to be trusted.
    pub checkpoint: Option<PathBuf>,
    /// Type and value of the request's `options`, unread.
    pub options: Option<(String, Vec<u8>)>,
}

/// The standard streams of a new process.
///
/// Descriptors are given to the process as they are: for FIFO stdio they are the engine's FIFOs
/// themselves, so that nothing is copied and nothing can be lost. `None` means `/dev/null`.
#[derive(Debug)]
pub enum ProcessIo {
    /// No terminal: up to three descriptors.
    Streams {
        /// Standard input.
        stdin: Option<OwnedFd>,
        /// Standard output.
        stdout: Option<OwnedFd>,
        /// Standard error.
        stderr: Option<OwnedFd>,
    },
    /// A terminal: the runtime makes the pty in the container and answers its master in
    /// [`Spawned::terminal`].
    Terminal {
        /// Initial size in columns and rows, when a resize came before start.
        size: Option<(u16, u16)>,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, or 128 + signal number. 255 when it is not known.
    pub status: u32,
    /// When it was reaped.
    pub at: SystemTime,
}

/// A process that the runtime has made.
pub struct Spawned {
    /// Its pid in the pid namespace of the Task server; never 0.
    pub pid: u32,
    /// Opaque handle by which the runtime finds the process's exit again after a restart
    /// (journalled with the process and given back in [`ProcessRef::handle`]).
    pub handle: u64,
    /// Pty master, for [`ProcessIo::Terminal`].
    pub terminal: Option<OwnedFd>,
    /// Resolves once, when the process has ended.
    pub exit: BoxFuture<'static, Exit>,
}

/// Names a process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// Container id.
    pub container: String,
    /// Exec id; empty for the container's init process.
    pub exec: String,
    /// Pid as answered in [`Spawned::pid`].
    pub pid: u32,
    /// Handle as answered in [`Spawned::handle`].
    pub handle: u64,
}

/// Which cgroup metrics a caller understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatsFlavor {
    /// Whatever the host has (containerd understands both).
    Native,
    /// cgroup v1 messages with all parts present (iSulad).
    V1,
}

/// A typed, opaque message: `type_url` and value of a protobuf `Any`.
pub type AnyMessage = (String, Vec<u8>);

/// Makes and touches containers. See the module text for who may call what when.
///
/// Errors: every method answers [`crate::error::Error`] with the variant that maps to the right
/// gRPC code; a failed [`Runtime::create`] or [`Runtime::exec`] has cleaned up after itself.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Prepares the rootfs and creates the container, its init process waiting for
    /// [`Runtime::start`].
    async fn create(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned>;

    /// Prepares a container that is to go on from `request.checkpoint`: checks, and makes
    /// everything but its processes, the rootfs included (who called changes it before Start).
    /// [`Runtime::restore`] follows, perhaps by another server.
    ///
    /// # Errors
    /// [`crate::error::Error::Unimplemented`] where checkpoints cannot be restored.
    async fn prepare_restore(&self, request: &CreateContainer) -> Result<()> {
        let _ = request;
        Err(crate::error::Error::Unimplemented("checkpoints cannot be restored here".into()))
    }

    /// Lets a container that was prepared from a checkpoint go on.
    async fn restore(&self, container: &str, io: ProcessIo) -> Result<Spawned> {
        let (_, _) = (container, io);
        Err(crate::error::Error::Unimplemented("checkpoints cannot be restored here".into()))
    }

    /// Lets the init process run.
    async fn start(&self, container: &str, pid: u32) -> Result<()>;

    /// Runs a further process in a running container. `spec` is the OCI `process` object (JSON).
    async fn exec(
        &self,
        container: &str,
        exec: &str,
        spec: &[u8],
        io: ProcessIo,
    ) -> Result<Spawned>;

    /// Sends a signal; with `all`, to every process of the container. Signal 0 probes.
    async fn kill(&self, process: &ProcessRef, signal: i32, all: bool) -> Result<()>;

    /// How long a container's init may outlive SIGKILL before [`Runtime::end_kernel`] is called, where
    /// containers run on a kernel of their own; [`crate::TaskOptions::drain`], for which an exit waits
    /// for its output, comes on top. `None` where the host's kernel kills.
    fn unkillable_after(&self) -> Option<std::time::Duration> {
        None
    }

    /// Ends the kernel that the containers of this pod run on, and with it all of them: it has not
    /// ended one that was sent SIGKILL. It hangs, or it says what is not so; either way the engine,
    /// which stops containers before their pod, would never get to the pod.
    async fn end_kernel(&self) {}

    /// The terminal of a running process has a new size. The kernel tells its own processes; a
    /// kernel of another kind has to be told.
    async fn resized(&self, process: &ProcessRef) {
        let _ = process;
    }

    /// Removes what [`Runtime::create`] made: engine state, cgroup, mounts. Idempotent.
    async fn delete(&self, container: &str, bundle: &std::path::Path) -> Result<()>;

    /// The host pids of the container's processes.
    async fn pids(&self, container: &str) -> Result<Vec<u32>>;

    /// Freezes all processes.
    async fn pause(&self, container: &str) -> Result<()>;

    /// Thaws all processes.
    async fn resume(&self, container: &str) -> Result<()>;

    /// Writes a checkpoint below `path`.
    async fn checkpoint(
        &self,
        container: &str,
        path: &std::path::Path,
        options: Option<AnyMessage>,
    ) -> Result<()>;

    /// Applies OCI `LinuxResources` (JSON) to the running container.
    async fn update(&self, container: &str, resources: &[u8]) -> Result<()>;

    /// cgroup metrics as an `Any` whose type URL is exactly `io.containerd.cgroups.v1.Metrics` or
    /// `io.containerd.cgroups.v2.Metrics`. Must also answer between exit and delete.
    async fn stats(&self, container: &str, flavor: StatsFlavor) -> Result<AnyMessage>;

    /// A descriptor that becomes readable when the container may have had an out-of-memory kill;
    /// `None` where the runtime cannot tell.
    async fn oom_watch(&self, container: &str) -> Option<OwnedFd>;

    /// How many out-of-memory kills the container has had. Cheap: asked at every exit, so that
    /// TaskOOM is published before the exit is.
    fn oom_kills(&self, container: &str) -> u64;

    /// Changes the size of a process's terminal, in columns and rows. `false`: this runtime has
    /// nothing to say to that, and the server asks the pty itself.
    async fn resize(&self, process: &ProcessRef, width: u16, height: u16) -> Result<bool> {
        let _ = (process, width, height);
        Ok(false)
    }

    /// After a restart of the server: takes up a journalled process again. `None` when nobody
    /// knows how the process ended and it is not alive (it counts as exited with 255).
    async fn reattach(&self, process: &ProcessRef) -> Result<Option<BoxFuture<'static, Exit>>>;

    /// Ids of all containers of which something exists, whole or not. Asked after a restart.
    async fn existing(&self) -> Vec<String>;

    /// The exit of this process is in the journal now; the runtime may forget it.
    async fn exit_recorded(&self, process: &ProcessRef);
}

/// Keeps descriptors while the server is away (sandbox-parent's third duty). Names are unique per
/// container and stream, for example `io/<container>/<exec>/stdout`.
#[async_trait]
pub trait Keeper: Send + Sync + 'static {
    /// Keeps a duplicate of `fd` under `name`, replacing an older one.
    async fn keep(&self, name: &str, fd: std::os::fd::BorrowedFd<'_>) -> Result<()>;
    /// A duplicate of the descriptor kept under `name`.
    async fn fetch(&self, name: &str) -> Result<Option<OwnedFd>>;
    /// Forgets every name that starts with `prefix`.
    async fn forget(&self, prefix: &str) -> Result<()>;
}

/// A [`Keeper`] that keeps nothing: for a guest, where the server is PID 1 and never restarts.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoKeeper;

#[async_trait]
impl Keeper for NoKeeper {
    async fn keep(&self, _name: &str, _fd: std::os::fd::BorrowedFd<'_>) -> Result<()> {
        Ok(())
    }
    async fn fetch(&self, _name: &str) -> Result<Option<OwnedFd>> {
        Ok(None)
    }
    async fn forget(&self, _prefix: &str) -> Result<()> {
        Ok(())
    }
}

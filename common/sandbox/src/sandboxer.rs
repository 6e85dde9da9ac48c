//! The border between the Controller and a kind of sandbox.
//!
//! The Controller (this crate) owns the protocol: ids, states, the durable store, waits,
//! deadlines, roll-back, recovery. A [`Sandboxer`] makes and removes one kind of sandbox. For one
//! sandbox the Controller calls one method at a time (its actor); for different sandboxes calls
//! run side by side. [`Sandboxer::info`], [`Sandboxer::metrics`] and [`Sandboxer::platform`] only
//! read and may come at any moment.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use kuasar_protos::cri::PodSandboxConfig;

use crate::error::{Error, Result};

/// What a sandbox was created with; never changes afterwards, except by Update.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    /// Sandbox id, checked.
    pub id: String,
    /// The pod as CRI describes it; the default value when the engine gave none.
    pub config: PodSandboxConfig,
    /// Network namespace path; empty for host network.
    pub netns_path: String,
    /// `runtime_type` of the runtime handler, empty when the engine does not say.
    pub runtime: String,
    /// Labels of the sandbox.
    pub labels: BTreeMap<String, String>,
    /// Extensions of the sandbox by key: type URL and value.
    pub extensions: BTreeMap<String, (String, Vec<u8>)>,
    /// containerd's namespace (`k8s.io`); empty when the engine does not say (iSulad).
    pub namespace: String,
}

/// What the sandboxer's methods get to work with.
#[derive(Clone)]
pub struct SandboxContext {
    /// The sandbox.
    pub spec: Arc<SandboxSpec>,
    /// Private state directory (0700) of this sandbox; removed by the Controller after
    /// [`Sandboxer::remove`].
    pub dir: PathBuf,
    /// The sandboxer's own durable state as it last saved it (JSON), `Null` at first.
    pub state: serde_json::Value,
    /// When the caller stops waiting, if it said so.
    pub deadline: Option<tokio::time::Instant>,
    /// Saves state and reports the sandbox's end.
    pub handle: crate::SandboxHandle,
}

/// A running sandbox, as Start answers it.
#[derive(Debug, Clone, Default)]
pub struct Started {
    /// Pid that stands for the sandbox; 0 where there is no process.
    pub pid: u32,
    /// Labels such as `selinux_label`.
    pub labels: BTreeMap<String, String>,
    /// Endpoint override, for example `ttrpc+vsock://3:1024`; `None` is the pod socket.
    pub address: Option<String>,
    /// OCI spec of the sandbox as JSON, for NRI in containerd 2.3 and later.
    pub spec: Option<Vec<u8>>,
}

/// How a sandbox ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SandboxExit {
    /// Exit status; 0 after an ordered stop, 137 after a kill, 255 when not known.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// What became of a sandbox while the daemon was away.
pub enum Recovered {
    /// It runs; its tasks have been taken up again.
    Running(Started),
    /// It has ended.
    Stopped(SandboxExit),
}

/// What an operator wants to run beside a sandbox' containers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugProgram {
    /// Arguments; empty: those of the configuration.
    pub args: Vec<String>,
    /// Columns and rows of its terminal; without one it has pipes.
    pub terminal: Option<(u32, u32)>,
}

/// A program that runs beside a sandbox' containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebugConsole {
    /// Its name.
    pub session: String,
    /// Socket that takes one connection.
    pub path: PathBuf,
}

/// What changes of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugChange {
    /// Its terminal has so many columns and rows.
    Size(u32, u32),
    /// Its input has so many bytes.
    InputBytes(u64),
}

/// What an operator asks of templates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateJob {
    /// Which there are.
    List,
    /// The same, after one was compared with what is known of it.
    Verify(String),
    /// The same, after one was removed.
    Remove(String),
}

/// Saved machines, as an operator sees them.
#[derive(Debug, Clone, Default)]
pub struct TemplateList {
    /// Whether sandboxes start from them.
    pub enabled: bool,
    /// Where they are.
    pub dir: PathBuf,
    /// Each of them.
    pub templates: Vec<TemplateInfo>,
    /// Machines that are kept ready, when there are to be some.
    pub pool: Option<PoolInfo>,
}

/// Machines that are ready before a sandbox is started, as an operator sees them. Numbers of
/// events count from the daemon's start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolInfo {
    /// How many there are to be.
    pub wanted: u32,
    /// How many there are.
    pub ready: u32,
    /// Machines that were made ready.
    pub refilled: u64,
    /// Sandboxes that got one.
    pub taken: u64,
    /// Sandboxes for which there was none.
    pub missed: u64,
    /// Machines that ended, or hung, before a sandbox asked for them.
    pub lost: u64,
    /// Why none are kept.
    pub hindrance: Option<String>,
}

/// A saved machine.
#[derive(Debug, Clone)]
pub struct TemplateInfo {
    /// Its name: a digest of what it was made from.
    pub key: String,
    /// Size on disk, in bytes.
    pub bytes: u64,
    /// When it was made.
    pub made_at: SystemTime,
    /// Whether its making has ended.
    pub finished: bool,
    /// What [`TemplateJob::Verify`] has found.
    pub problem: Option<String>,
}

/// The ttrpc services of one pod's socket (Task v2 and v3, runtime Sandbox).
pub type PodServices = kuasar_ttrpc::Services;

/// Makes and removes one kind of sandbox. See the module text for who calls what when.
#[async_trait]
pub trait Sandboxer: Send + Sync + 'static {
    /// Checks the request and makes what must exist before Start. On error nothing is left.
    async fn create(&self, ctx: &SandboxContext) -> Result<()>;

    /// Starts the sandbox. On error nothing is left but what [`Sandboxer::remove`] removes.
    async fn start(&self, ctx: &SandboxContext) -> Result<Started>;

    /// The services of the pod's socket. Called after a successful Start and after recovery.
    async fn services(&self, ctx: &SandboxContext) -> Result<PodServices>;

    /// Ends every process of the sandbox and takes it off the network namespace. Idempotent;
    /// when it returns the engine tears the network down.
    async fn stop(&self, ctx: &SandboxContext, timeout: Duration) -> Result<()>;

    /// Removes every trace. Called without a prior stop, too, and after a failed create or
    /// start. Idempotent.
    async fn remove(&self, ctx: &SandboxContext) -> Result<()>;

    /// Takes up a recorded sandbox after a restart of the daemon.
    async fn recover(&self, ctx: &SandboxContext) -> Result<Recovered>;

    /// Removes what belongs to no recorded sandbox (a daemon that died between two steps).
    /// Called once, after recovery, with the ids that exist. Among them are those that a newer
    /// version has recorded, for which `recover` was not called: nothing of theirs is to go.
    async fn remove_orphans(&self, known: &[String]) -> Result<()>;

    /// Additional entries for Status' `info` (verbose); values are JSON texts.
    async fn info(&self, ctx: &SandboxContext) -> Result<BTreeMap<String, String>>;

    /// cgroup metrics of the sandbox: type URL and value.
    async fn metrics(&self, ctx: &SandboxContext) -> Result<(String, Vec<u8>)>;

    /// Applies changed extensions (`fields` as the engine sent them). `ctx.spec` is new already.
    async fn update(&self, ctx: &SandboxContext, fields: &[String]) -> Result<()>;

    /// Where the sandbox' console log is; operators may read it.
    async fn console(&self, _ctx: &SandboxContext) -> Result<PathBuf> {
        Err(Error::Unimplemented(
            "sandboxes of this kind have no console: only machines of vmm-sandboxer have one"
                .into(),
        ))
    }

    /// Runs a program beside the containers of a sandbox that is a machine.
    async fn debug(&self, _ctx: &SandboxContext, _what: DebugProgram) -> Result<DebugConsole> {
        Err(Error::Unimplemented(
            "sandboxes of this kind have no debug console: only machines of vmm-sandboxer have one"
                .into(),
        ))
    }

    /// Changes a session of [`Sandboxer::debug`].
    async fn steer_debug(
        &self,
        _ctx: &SandboxContext,
        session: &str,
        _what: DebugChange,
    ) -> Result<()> {
        Err(Error::NotFound(format!("there is no debug session {session:.40?}")))
    }

    /// Saved machines that sandboxes start from.
    async fn templates(&self, _what: TemplateJob) -> Result<TemplateList> {
        Err(Error::Unimplemented(
            "sandboxes of this kind start from no templates: only those of vmm-sandboxer do".into(),
        ))
    }

    /// The daemon ends in order: what belongs to no sandbox, and would be of no use to the next
    /// daemon, ends with it. After a crash it is [`Sandboxer::remove_orphans`] that removes it.
    async fn finish(&self) {}

    /// Platform as Go names it: operating system and architecture.
    fn platform(&self) -> (String, String) {
        let arch = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "riscv64" => "riscv64",
            other => other,
        };
        ("linux".into(), arch.into())
    }
}

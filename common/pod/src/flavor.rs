//! The border between a pod of namespaces and what runs in it.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_sandbox::error::Result;
use containerd_sandbox::sandboxer::{SandboxContext, SandboxSpec};
use containerd_task::runtime::Runtime;
use kuasar_oci::pod::Pod;
use serde_json::{Map, Value};

/// What a daemon's configuration says of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodSettings {
    /// Size of a pod's `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Lets unprivileged processes of pods bind low ports and send pings, as containerd does.
    pub unprivileged_ports: bool,
}

impl Default for PodSettings {
    /// As containerd does it: 64 MiB, and unprivileged ports.
    fn default() -> Self {
        Self { shm_size: 64 << 20, unprivileged_ports: true }
    }
}

/// What is chosen for a pod when it is created, for good.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Engine of its containers, by name: [`Pod::engine`].
    pub engine: String,
    /// First value of what the flavor wants to be durable; `Null` for nothing.
    pub own: Value,
}

/// What one kind of sandboxer adds to a pod of namespaces.
///
/// Calls for one pod come one at a time, in the order of the Controller: `choose`, `up`, `down`
/// (maybe more than once), `removed`; after a restart of the daemon `recovered` takes the place of
/// `up`.
///
/// A flavor's descriptors of a pod may be kept by sandbox-parent as `<id>/ns/<name>`, which are
/// forgotten after `down`, or `<id>/<name>`, which are forgotten after `removed`.
///
/// A runtime that is not [`kuasar_oci::runtime::Containers`] writes
/// `<sandbox>/containers/<id>/meta.json` with `cgroup` (as in `linux.cgroupsPath`) and `rootfs`
/// (where one is mounted): by them containers are ended and cleared that no runtime knows any more.
#[async_trait]
pub trait Flavor: Send + Sync + 'static {
    /// Name of the kind, such as `runc`: key of its entry in Status' `info`.
    fn name(&self) -> &'static str;

    /// Whether containers live in the pod's host namespaces. A kernel of its own has namespaces of
    /// its own: none are made, and sysctls are the flavor's to apply.
    fn in_namespaces(&self) -> bool {
        true
    }

    /// Pid that stands for the pod, where the init of a shared PID namespace does not; 0 for none.
    fn pid(&self, own: &Value) -> u32 {
        let _ = own;
        0
    }

    /// Asked at each Create and Start.
    fn settings(&self) -> PodSettings;

    /// Checks what the pod asks for, and chooses. Nothing has been made yet.
    async fn choose(&self, spec: &SandboxSpec) -> Result<Choice>;

    /// The containers of a pod that is up, or that has been: containerd also asks how containers
    /// of a stopped pod have ended, and deletes them. `own` is what is recorded.
    fn runtime(&self, pod: Arc<Pod>, own: &Value) -> Result<Arc<dyn Runtime>>;

    /// A pod starts, its containers come next, made by `engine`.
    fn expect_containers(&self, _engine: &str) {}

    /// The pod's namespaces are there, kept and recorded. Whatever is started here is reported by
    /// [`watch_end`](crate::sandboxer::watch_end) when its end is the pod's end. A changed `own`
    /// is recorded. On error [`Flavor::down`] and [`Flavor::removed`] clean up.
    async fn up(&self, ctx: &SandboxContext, pod: &Pod, own: &mut Value) -> Result<()> {
        let _ = (ctx, pod, own);
        Ok(())
    }

    /// The pod stops: its containers have ended, its namespaces are released next. Also called
    /// when a pod is removed without a stop. Idempotent.
    async fn down(&self, ctx: &SandboxContext, own: &Value) -> Result<()> {
        let _ = (ctx, own);
        Ok(())
    }

    /// The containers are deleted, the sandbox's directory goes next. Idempotent.
    async fn removed(&self, ctx: &SandboxContext, own: &Value) -> Result<()> {
        let _ = (ctx, own);
        Ok(())
    }

    /// The daemon takes a recorded pod up again. `whole` says whether its namespaces are there and
    /// its init lives; answers whether the flavor's own part lives, too. Otherwise the pod is down,
    /// and what is left of the flavor's part is ended here.
    async fn recovered(
        &self,
        ctx: &SandboxContext,
        pod: &Pod,
        own: &Value,
        whole: bool,
    ) -> Result<bool> {
        let _ = (ctx, pod, own);
        Ok(whole)
    }

    /// sandbox-parent keeps something of pod `id`, which no record names; it is forgotten next.
    async fn orphaned(&self, id: &str) {
        let _ = id;
    }

    /// The daemon has taken up the pods `known`, and cleared what others have left that it can see:
    /// what is the flavor's of pods that have gone may go.
    async fn swept(&self, known: &[String]) {
        let _ = known;
    }

    /// More members for the entry in `info` of a verbose Status, within `timeouts.read`.
    async fn info(&self, ctx: &SandboxContext, own: &Value) -> Map<String, Value> {
        let _ = (ctx, own);
        Map::new()
    }
}

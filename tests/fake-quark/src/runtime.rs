//! Containers of the fake: bundles of the tree, made by the built-in engine.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use containerd_task::runtime::{
    AnyMessage, CreateContainer, Exit, ProcessIo, ProcessRef, Runtime, Spawned, StatsFlavor,
};
use futures::future::BoxFuture;
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_host::record;
use kuasar_oci::engine::{BUILTIN, Backend, Engines, Settings};
use kuasar_oci::pod::{Modes, Namespaces, Pod};
use kuasar_oci::runtime::Containers;
use kuasar_oci::selfexe::SelfExe;
use serde_json::{Value, json};
use vmm_task::reaper::Reaper;

/// Where the fake keeps what is its own, on its own tmpfs.
const DIR: &str = "/run/fake";

/// The containers of one sandbox, and whether it kills none of them and says that it does.
pub struct FakeContainers(Containers, bool);

fn not_here<T>(what: &str) -> Result<T> {
    Err(Error::Unimplemented(format!("CommonContainer::{what}")))
}

impl FakeContainers {
    /// None yet.
    ///
    /// # Errors
    /// When there are no control groups.
    pub fn new(id: &str, spares: bool, reaper: Reaper, exe: &SelfExe) -> Result<Self> {
        let layout = Layout::detect().map_err(|e| Error::internal("find control groups", e))?;
        let mut backend = Backend::new(Arc::new(reaper), Live::new(Settings::default()));
        backend.builtin = Some(vec![exe.path(), "oci".into()]);
        let pod = Pod {
            id: id.into(),
            dir: DIR.into(),
            netns: String::new(),
            // This process lives in the pod's.
            modes: Modes { host_network: true, host_ipc: true, host_pid: false, shared_pid: false },
            engine: BUILTIN.into(),
            namespaces: Namespaces::default(),
        };
        let engines = Arc::new(Engines::new(backend));
        Ok(Self(Containers::new(Arc::new(pod), engines, Arc::new(layout)), spares))
    }

    /// The bundle with paths as the engine wants them.
    fn bundle(request: &CreateContainer) -> Result<CreateContainer> {
        let theirs = Path::new("/").join(&request.id);
        let text = std::fs::read(theirs.join("config.json"))
            .map_err(|error| Error::internal("read the bundle", error))?;
        let mut spec: Value =
            serde_json::from_slice(&text).map_err(|e| Error::internal("read the bundle", e))?;
        let rootfs = theirs.join("rootfs");
        if let Some(root) = spec.get_mut("root").and_then(Value::as_object_mut) {
            root.insert("path".into(), json!(rootfs));
        }
        // They are in the root file system already: the engine is to add none of its own.
        if let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) {
            for name in ["etc/hostname", "etc/hosts", "etc/resolv.conf"] {
                mounts.push(json!({
                    "destination": format!("/{name}"), "type": "bind",
                    "source": rootfs.join(name), "options": ["rbind"],
                }));
            }
        }
        let bundle = Path::new(DIR).join("bundles").join(&request.id);
        let failed = |error| Error::internal("write the bundle", error);
        record::private_dir(&bundle).map_err(failed)?;
        record::write_file(&bundle.join("config.json"), spec.to_string().as_bytes(), 0o600)
            .map_err(failed)?;
        Ok(CreateContainer { bundle, rootfs: Vec::new(), ..request.clone() })
    }
}

#[async_trait]
impl Runtime for FakeContainers {
    async fn create(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        self.0.create(&Self::bundle(request)?, io).await
    }

    async fn start(&self, container: &str, pid: u32) -> Result<()> {
        self.0.start(container, pid).await
    }

    async fn exec(
        &self,
        container: &str,
        exec: &str,
        spec: &[u8],
        io: ProcessIo,
    ) -> Result<Spawned> {
        self.0.exec(container, exec, spec, io).await
    }

    async fn kill(&self, process: &ProcessRef, signal: i32, all: bool) -> Result<()> {
        if self.1 && signal == libc::SIGKILL {
            return Ok(());
        }
        self.0.kill(process, signal, all).await
    }

    async fn delete(&self, container: &str, bundle: &Path) -> Result<()> {
        self.0.delete(container, bundle).await
    }

    async fn pids(&self, _container: &str) -> Result<Vec<u32>> {
        not_here("pids")
    }

    async fn pause(&self, _container: &str) -> Result<()> {
        not_here("pause")
    }

    async fn resume(&self, _container: &str) -> Result<()> {
        not_here("resume")
    }

    async fn checkpoint(&self, _: &str, _: &Path, _: Option<AnyMessage>) -> Result<()> {
        not_here("checkpoint")
    }

    async fn update(&self, _container: &str, _resources: &[u8]) -> Result<()> {
        not_here("update")
    }

    async fn stats(&self, _container: &str, _flavor: StatsFlavor) -> Result<AnyMessage> {
        Ok(("io.containerd.cgroups.v1.Metrics".into(), Vec::new()))
    }

    async fn oom_watch(&self, _container: &str) -> Option<OwnedFd> {
        None
    }

    fn oom_kills(&self, _container: &str) -> u64 {
        0
    }

    async fn reattach(&self, _: &ProcessRef) -> Result<Option<BoxFuture<'static, Exit>>> {
        Ok(None)
    }

    async fn existing(&self) -> Vec<String> {
        Vec::new()
    }

    async fn exit_recorded(&self, process: &ProcessRef) {
        self.0.exit_recorded(process).await;
    }
}

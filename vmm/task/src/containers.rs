//! Containers in the guest: the runtime behind the Task server.
//!
//! The host sends what a container is in the options of its Task.Create, as a
//! [`guest::Container`]: its spec, where its root filesystem is, and what is to be mounted for it.
//! Each container has storages of its own, mounted before it is created and unmounted when it is
//! deleted; nothing of one is looked up for another. The rest is `kuasar-oci` and its built-in
//! engine, with this guest as the pod.
//!
//! In the spec `/proc/0/ns/pid` is the pod's shared PID namespace. Network, IPC and UTS are the
//! guest's own whatever the spec says, and the cgroup is named here.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use containerd_task::host::remove_dir;
use containerd_task::runtime::{
    AnyMessage, CreateContainer, Exit, ProcessIo, ProcessRef, Runtime, Spawned, StatsFlavor,
};
use futures::future::BoxFuture;
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_host::record;
use kuasar_oci::engine::{Backend, Engines, Settings};
use kuasar_oci::execs::ExecServer;
use kuasar_oci::pod::{Modes, Namespaces, Pod};
use kuasar_oci::processes::Processes;
use kuasar_oci::runtime::Containers;
use kuasar_oci::selfexe::SelfExe;
use protobuf::Message;
use serde_json::{Value, json};
use vmm_common::{CONTAINER_TYPE, guest};

use crate::boot::{DIR, POD_NAME};
use crate::limits;
use crate::reaper::Reaper;
use crate::storage::{Plan, take_away};
use crate::{devices, hugepages};

/// Files of the pod that containers see below `/etc`.
pub const POD_DIR: &str = "/run/kuasar/pod";

/// First argument of this program for the process that makes execs' processes.
pub const EXECS: &str = "execs";
/// Where compiled seccomp profiles are kept: containers and execs of a pod mostly share one.
const FILTERS: &str = "/run/kuasar/filters";

/// The containers of this guest; there are none before [`GuestContainers::set_pod`].
pub struct GuestContainers {
    inner: OnceLock<Containers>,
    engines: Arc<Engines>,
    /// Keeps the program that engines are run from.
    exe: SelfExe,
    /// What is mounted for a container, in order.
    mounted: Mutex<HashMap<String, Vec<PathBuf>>>,
}

impl GuestContainers {
    /// Without a pod.
    ///
    /// # Errors
    /// When our own program cannot be held.
    pub fn new(reaper: Reaper) -> std::io::Result<Self> {
        let exe = SelfExe::open("vmm-task")?;
        let reaper: Arc<dyn Processes> = Arc::new(reaper);
        let mut backend = Backend::new(reaper.clone(), Live::new(Settings::default()));
        backend.observer = Arc::new(crate::spans::Phases);
        let options = vec!["--seccomp-cache".to_owned(), FILTERS.into()];
        let mut builtin = vec![exe.path(), "oci".into()];
        builtin.extend(options.iter().cloned());
        backend.builtin = Some(builtin);
        let server = vec![exe.path(), EXECS.into()];
        backend.execs = Some(Arc::new(ExecServer::new(reaper, server, options)));
        let engines = Arc::new(Engines::new(backend));
        Ok(Self { inner: OnceLock::new(), engines, exe, mounted: Mutex::default() })
    }

    /// Path of our own program, which nobody can write to.
    pub fn program(&self) -> String {
        self.exe.path()
    }

    /// Containers may be made from now on. `init` is the shared PID namespace and the pid of its
    /// first process.
    ///
    /// # Errors
    /// When there are no control groups.
    pub fn set_pod(&self, id: &str, init: Option<(OwnedFd, u32)>) -> Result<()> {
        let layout = Layout::detect().map_err(|e| Error::internal("find control groups", e))?;
        let shared_pid = init.is_some();
        let (pid, init) = init.map_or((None, 0), |(fd, pid)| (Some(fd), pid));
        let pod = Pod {
            id: id.into(),
            dir: POD_DIR.into(),
            netns: String::new(),
            // The guest is the pod.
            modes: Modes { host_network: true, host_ipc: true, host_pid: false, shared_pid },
            engine: kuasar_oci::engine::BUILTIN.into(),
            namespaces: Namespaces { pid, init, ..Namespaces::default() },
        };
        let containers = Containers::new(Arc::new(pod), self.engines.clone(), Arc::new(layout));
        self.inner
            .set(containers)
            .map_err(|_| Error::AlreadyExists("the pod has been set up already".into()))
    }

    fn inner(&self) -> Result<&Containers> {
        let none = || Error::FailedPrecondition("the pod has not been set up yet".into());
        self.inner.get().ok_or_else(none)
    }

    fn put(&self, id: &str, mounted: Vec<PathBuf>) {
        let mut table = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if mounted.is_empty() {
            table.remove(id);
        } else {
            table.insert(id.into(), mounted);
        }
    }

    fn take(&self, id: &str) -> Vec<PathBuf> {
        let mut table = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        table.remove(id).unwrap_or_default()
    }

    /// Unmounts what was mounted for a container. What cannot go now is kept for the next time.
    async fn unmount(&self, id: &str) -> Result<()> {
        let mut mounted = self.take(id);
        let (left, result) = tokio::task::spawn_blocking(move || {
            while let Some(path) = mounted.last() {
                if let Err(error) = take_away(path) {
                    return (mounted, Err(error));
                }
                mounted.pop();
            }
            let dir = mounted;
            (dir, Ok(()))
        })
        .await
        .map_err(|error| Error::internal("worker", error))?;
        self.put(id, left);
        result
    }

    async fn prepare(&self, request: &CreateContainer) -> Result<CreateContainer> {
        let container = container_of(request)?;
        if container.storages.len() > limits::STORAGES {
            return Err(Error::ResourceExhausted("the container has too many storages".into()));
        }
        let mut spec = edit(&container.spec, &container.rootfs, &request.id)?;
        let devices = devices::check(&container)?;
        // All are checked before the first one is mounted.
        let plans: Vec<Plan> = container.storages.iter().map(Plan::new).collect::<Result<_>>()?;
        let mut mounted = Vec::with_capacity(plans.len());
        for plan in plans {
            match plan.mount().await {
                Ok(path) => mounted.push(path),
                Err(error) => {
                    self.put(&request.id, mounted);
                    return Err(error);
                }
            }
            self.put(&request.id, mounted.clone());
        }
        devices::add(&mut spec, &devices)?;
        let resources = spec.pointer_mut("/linux/resources").and_then(Value::as_object_mut);
        resources.map(hugepages::for_container).transpose()?;
        let spec =
            serde_json::to_vec(&spec).map_err(|error| Error::internal("write the spec", error))?;
        let bundle = bundle(&request.id);
        record::private_dir(&bundle)
            .and_then(|()| record::write_file(&bundle.join("config.json"), &spec, 0o600))
            .map_err(|error| Error::internal("write the bundle", error))?;
        Ok(CreateContainer { bundle, rootfs: Vec::new(), options: None, ..request.clone() })
    }
}

fn bundle(id: &str) -> PathBuf {
    Path::new(DIR).join("containers").join(id)
}

fn container_of(request: &CreateContainer) -> Result<guest::Container> {
    let Some((url, value)) = &request.options else {
        return Err(Error::InvalidArgument(format!("options are missing: {CONTAINER_TYPE}")));
    };
    if url.rsplit('/').next() != Some(CONTAINER_TYPE) {
        return Err(Error::InvalidArgument(format!(
            "options are a {url:.100}, expected {CONTAINER_TYPE}"
        )));
    }
    guest::Container::parse_from_bytes(value)
        .map_err(|error| Error::InvalidArgument(format!("{CONTAINER_TYPE}: {error}")))
}

/// The spec with its root and its cgroup as they are in the guest.
fn edit(spec: &[u8], rootfs: &str, id: &str) -> Result<Value> {
    let wrong = |why: &str| Error::InvalidArgument(format!("the container's spec: {why}"));
    let mut spec: Value =
        serde_json::from_slice(spec).map_err(|error| wrong(&error.to_string()))?;
    let object = spec.as_object_mut().ok_or_else(|| wrong("it is no JSON object"))?;
    let path = Path::new(rootfs);
    let plain = path.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
    if !plain || !path.starts_with(DIR) || path == Path::new(DIR) {
        return Err(wrong(&format!("rootfs {rootfs:.200?} is not below {DIR}")));
    }
    let root = object.entry("root").or_insert_with(|| json!({}));
    root.as_object_mut()
        .ok_or_else(|| wrong("root is no object"))?
        .insert("path".into(), json!(rootfs));
    let linux = object.entry("linux").or_insert_with(|| json!({}));
    linux
        .as_object_mut()
        .ok_or_else(|| wrong("linux is no object"))?
        .insert("cgroupsPath".into(), json!(format!("{POD_NAME}/{id}")));
    Ok(spec)
}

#[async_trait]
impl Runtime for GuestContainers {
    async fn create(&self, request: &CreateContainer, io: ProcessIo) -> Result<Spawned> {
        let inner = self.inner()?;
        let made = async { inner.create(&self.prepare(request).await?, io).await }.await;
        if made.is_err() {
            // The first error is the one to report.
            if let Err(error) = self.unmount(&request.id).await {
                tracing::warn!(container = %request.id, "a storage stays: {}", error.chain());
            }
            let _ = std::fs::remove_dir_all(bundle(&request.id));
        }
        made
    }

    async fn start(&self, container: &str, pid: u32) -> Result<()> {
        self.inner()?.start(container, pid).await
    }

    async fn exec(
        &self,
        container: &str,
        exec: &str,
        spec: &[u8],
        io: ProcessIo,
    ) -> Result<Spawned> {
        self.inner()?.exec(container, exec, spec, io).await
    }

    async fn kill(&self, process: &ProcessRef, signal: i32, all: bool) -> Result<()> {
        self.inner()?.kill(process, signal, all).await
    }

    async fn delete(&self, container: &str, _bundle: &Path) -> Result<()> {
        let bundle = bundle(container);
        self.inner()?.delete(container, &bundle).await?;
        self.unmount(container).await?;
        remove_dir(&bundle)
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        self.inner()?.pids(container).await
    }

    async fn pause(&self, container: &str) -> Result<()> {
        self.inner()?.pause(container).await
    }

    async fn resume(&self, container: &str) -> Result<()> {
        self.inner()?.resume(container).await
    }

    async fn checkpoint(
        &self,
        container: &str,
        path: &Path,
        options: Option<AnyMessage>,
    ) -> Result<()> {
        self.inner()?.checkpoint(container, path, options).await
    }

    async fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        let wrong = |error| Error::InvalidArgument(format!("resources: {error}"));
        let mut resources = serde_json::from_slice(resources).map_err(wrong)?;
        hugepages::for_container(&mut resources)?;
        let resources = serde_json::to_vec(&resources);
        let resources = resources.map_err(|error| Error::internal("write the resources", error))?;
        self.inner()?.update(container, &resources).await
    }

    async fn stats(&self, container: &str, flavor: StatsFlavor) -> Result<AnyMessage> {
        self.inner()?.stats(container, flavor).await
    }

    async fn oom_watch(&self, container: &str) -> Option<OwnedFd> {
        self.inner().ok()?.oom_watch(container).await
    }

    fn oom_kills(&self, container: &str) -> u64 {
        self.inner().map(|inner| inner.oom_kills(container)).unwrap_or_default()
    }

    async fn reattach(&self, _: &ProcessRef) -> Result<Option<BoxFuture<'static, Exit>>> {
        // PID 1 does not restart.
        Ok(None)
    }

    async fn existing(&self) -> Vec<String> {
        Vec::new()
    }

    async fn exit_recorded(&self, process: &ProcessRef) {
        if let Ok(inner) = self.inner() {
            inner.exit_recorded(process).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spec_gets_its_root_and_its_cgroup() {
        let spec = br#"{"process":{"args":["x"]},"root":{"path":"/host","readonly":true},
            "linux":{"cgroupsPath":"a.slice:b:c","x":1},"unknown":2}"#;
        let edited = edit(spec, "/run/kuasar/share/c/rootfs", "c").unwrap();
        assert_eq!(edited["root"], json!({"path": "/run/kuasar/share/c/rootfs", "readonly": true}));
        assert_eq!(edited["linux"], json!({"cgroupsPath": "/pod/c", "x": 1}));
        assert_eq!(edited["unknown"], 2);
        for rootfs in ["", "/", "/run/kuasar", "/run/kuasar/../../etc", "x", "/etc"] {
            assert!(matches!(edit(spec, rootfs, "c"), Err(Error::InvalidArgument(_))), "{rootfs}");
        }
        for spec in ["", "[]", "{\"root\":1}", "{\"linux\":[]}"] {
            assert!(edit(spec.as_bytes(), "/run/kuasar/r", "c").is_err(), "{spec}");
        }
    }

    #[test]
    fn only_our_own_options_make_a_container() {
        let request = |options| CreateContainer {
            id: "c".into(),
            bundle: "/b".into(),
            rootfs: Vec::new(),
            terminal: false,
            checkpoint: None,
            options,
        };
        assert!(container_of(&request(None)).is_err());
        assert!(container_of(&request(Some(("x.Options".into(), Vec::new())))).is_err());
        let bytes = guest::Container { rootfs: "/r".into(), ..Default::default() };
        let bytes = bytes.write_to_bytes().unwrap();
        for url in ["kuasar.vmm.v1.Container", "type.googleapis.com/kuasar.vmm.v1.Container"] {
            let container = container_of(&request(Some((url.into(), bytes.clone())))).unwrap();
            assert_eq!(container.rootfs, "/r");
        }
        let mut random = crate::testing::Random(9);
        for _ in 0..2000 {
            let _ = container_of(&request(Some((CONTAINER_TYPE.into(), random.bytes(64)))));
        }
    }
}

//! Pods whose containers are WebAssembly: nothing runs in them but containers.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result};
use containerd_sandbox::sandboxer::SandboxSpec;
use containerd_task::runtime::Runtime;
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_oci::engine::{BUILTIN, Engines};
use kuasar_oci::pod::Pod;
use kuasar_oci::runtime::Containers;
use kuasar_pod::{Choice, Flavor, PodSettings, files};
use kuasar_protos::cri::Protocol;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::compile::Compiler;
use crate::config::{Config, PORT_ANNOTATION};
use crate::payloads::{Modules, WASMTIME};
use crate::worker::Workers;

/// What is recorded of a pod.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Own {
    /// Port by the pod's annotation.
    asked_port: Option<u16>,
    /// The one port that the pod's containers say that they have.
    only_port: Option<u16>,
}

/// Chooses for pods, and makes the containers' runtime.
pub struct Wasm {
    config: Live<Config>,
    engines: Arc<Engines>,
    workers: Arc<Workers>,
    compiler: Arc<Compiler>,
    cgroups: Arc<Layout>,
}

impl Wasm {
    /// With the configuration as it is at each call.
    pub fn new(
        config: Live<Config>,
        engines: Arc<Engines>,
        workers: Arc<Workers>,
        compiler: Arc<Compiler>,
        cgroups: Arc<Layout>,
    ) -> Self {
        Self { config, engines, workers, compiler, cgroups }
    }

    /// Starts the worker, so that no container has to wait for it. Not when the daemon starts:
    /// without pods there is none, and recovery waits for what sandbox-parent runs.
    fn warm_up(&self) {
        if self.workers.worker().known().is_some() {
            return;
        }
        let workers = self.workers.clone();
        tokio::spawn(async move {
            match workers.worker().hello().await {
                Ok(hello) => {
                    tracing::info!(
                        engine = hello.engine,
                        version = hello.version,
                        "worker is warm"
                    );
                }
                Err(error) => tracing::error!(%error, "no worker: containers cannot be made"),
            }
        });
    }
}

/// A port in an annotation.
pub fn port(text: &str) -> std::result::Result<u16, String> {
    text.trim().parse().ok().filter(|port| *port != 0).ok_or_else(|| {
        format!("{PORT_ANNOTATION}: {text:.40?} is no port: a number from 1 to 65535 is")
    })
}

#[async_trait]
impl Flavor for Wasm {
    fn name(&self) -> &'static str {
        "wasm"
    }

    fn settings(&self) -> PodSettings {
        let config = self.config.get();
        PodSettings { shm_size: config.shm_size, unprivileged_ports: config.unprivileged_ports }
    }

    async fn choose(&self, spec: &SandboxSpec) -> Result<Choice> {
        if files::has_userns(&spec.config) {
            return Err(Error::InvalidArgument(
                "pods with a user namespace do not run here, where every container has an \
                 unprivileged process: hostUsers: true"
                    .into(),
            ));
        }
        let config = self.config.get();
        let asked = spec.config.annotations.get(PORT_ANNOTATION).filter(|_| config.heeds_port);
        let asked_port =
            asked.map(|text| port(text)).transpose().map_err(Error::InvalidArgument)?;
        let mut ports = spec
            .config
            .port_mappings
            .iter()
            .filter(|mapping| mapping.protocol.enum_value_or_default() == Protocol::TCP)
            .filter_map(|mapping| u16::try_from(mapping.container_port).ok())
            .filter(|port| *port != 0);
        let only_port = ports.next().filter(|_| ports.next().is_none());
        let own = serde_json::to_value(Own { asked_port, only_port })
            .map_err(|error| Error::internal("record the pod", error))?;
        self.warm_up();
        // Of containers that turn out to be none of ours.
        Ok(Choice { engine: BUILTIN.into(), own })
    }

    fn runtime(&self, pod: Arc<Pod>, own: &Value) -> Result<Arc<dyn Runtime>> {
        let own: Own = serde_json::from_value(own.clone()).unwrap_or_default();
        let modules = Modules::new(
            self.config.clone(),
            self.workers.clone(),
            self.compiler.clone(),
            own.asked_port,
            own.only_port,
        );
        let containers = Containers::new(pod, self.engines.clone(), self.cgroups.clone());
        Ok(Arc::new(containers.with_payloads(Arc::new(modules))))
    }

    fn expect_containers(&self) {
        self.engines.expect_moves(&self.cgroups);
    }

    fn info(&self, _own: &Value) -> Map<String, Value> {
        let mut info = Map::new();
        let version = self.workers.worker().known().map(|hello| hello.version.clone());
        info.insert("engine".into(), json!({ "name": WASMTIME, "version": version }));
        info
    }
}

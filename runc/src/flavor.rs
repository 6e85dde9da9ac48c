//! Pods whose containers are made by runc-class engines: nothing runs in them but containers.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result};
use containerd_sandbox::sandboxer::SandboxSpec;
use containerd_task::runtime::Runtime;
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_oci::engine::Engines;
use kuasar_oci::pod::Pod;
use kuasar_oci::runtime::Containers;
use kuasar_pod::{Choice, Flavor, PodSettings, files};
use serde_json::Value;

use crate::config::Config;

/// Chooses the engine of a pod.
pub struct Runc {
    config: Live<Config>,
    engines: Arc<Engines>,
    cgroups: Arc<Layout>,
}

impl Runc {
    /// With the configuration as it is at each call.
    pub fn new(config: Live<Config>, engines: Arc<Engines>, cgroups: Arc<Layout>) -> Self {
        Self { config, engines, cgroups }
    }
}

#[async_trait]
impl Flavor for Runc {
    fn name(&self) -> &'static str {
        "runc"
    }

    fn settings(&self) -> PodSettings {
        let config = self.config.get();
        PodSettings { shm_size: config.shm_size, unprivileged_ports: config.unprivileged_ports }
    }

    async fn choose(&self, spec: &SandboxSpec) -> Result<Choice> {
        let config = self.config.get();
        let has_userns = files::has_userns(&spec.config);
        let engine = config.engine_of(&spec.runtime, &spec.config.annotations, has_userns);
        self.engines.get(engine).map_err(Error::InvalidArgument)?;
        Ok(Choice { engine: engine.to_owned(), ..Choice::default() })
    }

    fn runtime(&self, pod: Arc<Pod>, _own: &Value) -> Result<Arc<dyn Runtime>> {
        Ok(Arc::new(Containers::new(pod, self.engines.clone(), self.cgroups.clone())))
    }

    fn expect_containers(&self, engine: &str) {
        self.engines.expect_moves(&self.cgroups, engine);
    }
}

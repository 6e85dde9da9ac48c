//! Pods whose containers are WebAssembly: nothing runs in them but containers.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result};
use containerd_sandbox::sandboxer::{SandboxContext, SandboxSpec};
use containerd_task::runtime::Runtime;
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_oci::engine::{BUILTIN, Engines};
use kuasar_oci::pod::Pod;
use kuasar_oci::runtime::Containers;
use kuasar_pod::{Choice, Flavor, PodSettings};
use kuasar_protos::cri::Protocol;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use wasm_common::job::{self, Budget, Job};

use crate::compile::Compiler;
use crate::config::{
    Config, ENGINE_ANNOTATION, ENGINES, FUEL_ANNOTATION, PORT_ANNOTATION, TIME_ANNOTATION, WASMTIME,
};
use crate::origins::{self, Origins};
use crate::payloads::{Asked, Modules};
use crate::worker::Workers;

/// What is recorded of a pod.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Own {
    /// Sandbox id.
    id: String,
    /// Engine of its modules; empty is Wasmtime's, of records of a version that had no other.
    engine: String,
    /// What its programs may spend, by the pod's annotations.
    budget: Budget,
    /// Port by the pod's annotation.
    asked_port: Option<u16>,
    /// The one port that the pod's containers say that they have.
    only_port: Option<u16>,
}

impl Own {
    fn of(own: &Value) -> Self {
        let mut own: Self = serde_json::from_value(own.clone()).unwrap_or_default();
        if own.engine.is_empty() {
            own.engine = WASMTIME.into();
        }
        own
    }
}

/// Chooses for pods, and makes the containers' runtime.
pub struct Wasm {
    config: Live<Config>,
    engines: Arc<Engines>,
    workers: Arc<Workers>,
    compiler: Arc<Compiler>,
    cgroups: Arc<Layout>,
    /// What Status tells of, by the pod's id.
    pods: Mutex<HashMap<String, Arc<Told>>>,
}

/// What Status tells of a pod's containers.
struct Told {
    /// Their directories.
    dir: PathBuf,
    /// Their images.
    origins: Origins,
}

/// Most containers of a pod that are told of in Status.
const MAX_SHOWN: usize = 64;

impl Wasm {
    /// With the configuration as it is at each call.
    pub fn new(
        config: Live<Config>,
        engines: Arc<Engines>,
        workers: Arc<Workers>,
        compiler: Arc<Compiler>,
        cgroups: Arc<Layout>,
    ) -> Self {
        Self { config, engines, workers, compiler, cgroups, pods: Mutex::default() }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<String, Arc<Told>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine of a pod: by its annotation, by its runtime handler, or the configuration's.
    fn engine(&self, spec: &SandboxSpec) -> Result<String> {
        let config = self.config.get();
        let asked = spec.config.annotations.get(ENGINE_ANNOTATION);
        let Some(engine) = asked.filter(|_| config.heeds(ENGINE_ANNOTATION)) else {
            return Ok(config.runtimes.get(&spec.runtime).unwrap_or(&config.engine).clone());
        };
        if !ENGINES.contains(&engine.as_str()) {
            return Err(Error::InvalidArgument(format!(
                "{ENGINE_ANNOTATION}: {engine:.40?} is no engine: {}",
                ENGINES.join(", ")
            )));
        }
        Ok(engine.clone())
    }

    /// Starts Wasmtime's worker, so that no container has to wait for it. Not when the daemon starts:
    /// without pods there is none, and recovery waits for what sandbox-parent runs.
    fn warm_up(&self) {
        let known = self.workers.worker(WASMTIME).is_ok_and(|worker| worker.known().is_some());
        if known {
            return;
        }
        let workers = self.workers.clone();
        tokio::spawn(async move {
            let Ok(worker) = workers.worker(WASMTIME) else { return };
            match worker.hello().await {
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

/// What the pod's annotations, or a container's, say of its budget, where they count; `of` answers
/// an annotation by its name.
pub fn budget<'a>(
    config: &Config,
    of: impl Fn(&str) -> Option<&'a str>,
    otherwise: Budget,
) -> std::result::Result<Budget, String> {
    let asked = |name: &str| of(name).filter(|_| config.heeds(name)).map(str::trim);
    let mut budget = otherwise;
    if let Some(text) = asked(FUEL_ANNOTATION) {
        budget.fuel = text.parse().ok().filter(|fuel| *fuel > 0).ok_or_else(|| {
            format!("{FUEL_ANNOTATION}: {text:.40?}: a number of units, at least 1")
        })?;
    }
    if let Some(text) = asked(TIME_ANNOTATION) {
        let time = kuasar_host::duration::parse(text)
            .map_err(|reason| format!("{TIME_ANNOTATION}: {text:.40?}: {reason}"))?;
        budget.time = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        if budget.time == 0 {
            return Err(format!("{TIME_ANNOTATION}: {text:.40?}: at least 1ms"));
        }
    }
    Ok(budget)
}

/// What is known of a pod's containers, written down in their directories; and the names of their images.
fn modules(dir: &Path) -> (Map<String, Value>, BTreeMap<String, String>) {
    let read = |path: PathBuf| -> Option<Value> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    };
    let (mut all, mut names) = (Map::new(), BTreeMap::new());
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten().take(MAX_SHOWN) {
        let Some(spec) = read(entry.path().join("config.json")) else { continue };
        let Some(text) = crate::spec::annotation(&spec, job::ANNOTATION) else { continue };
        let Ok(job) = Job::from_json(text) else { continue };
        let shown = json!({
            "path": job.path,
            "digest": format!("sha256:{}", job.digest),
            "kind": job.kind,
            "form": job.form,
        });
        let id = entry.file_name().to_string_lossy().into_owned();
        if let Some(name) = crate::spec::annotation(&spec, origins::NAME) {
            names.insert(id.clone(), name.to_owned());
        }
        all.insert(id, shown);
    }
    (all, names)
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
        let config = self.config.get();
        let engine = self.engine(spec)?;
        if engine != WASMTIME {
            // It may not be there: better said of the pod than of each container.
            let worker = self.workers.worker(&engine);
            let worker = worker.map_err(|error| Error::FailedPrecondition(error.to_string()))?;
            worker.hello().await.map_err(|error| Error::FailedPrecondition(error.to_string()))?;
        }
        let annotations = &spec.config.annotations;
        let asked = annotations.get(PORT_ANNOTATION).filter(|_| config.heeds(PORT_ANNOTATION));
        let asked_port =
            asked.map(|text| port(text)).transpose().map_err(Error::InvalidArgument)?;
        let of = |name: &str| annotations.get(name).map(String::as_str);
        let budget = budget(&config, of, Budget::default()).map_err(Error::InvalidArgument)?;
        let mut ports = spec
            .config
            .port_mappings
            .iter()
            .filter(|mapping| mapping.protocol.enum_value_or_default() == Protocol::TCP)
            .filter_map(|mapping| u16::try_from(mapping.container_port).ok())
            .filter(|port| *port != 0);
        let only_port = ports.next().filter(|_| ports.next().is_none());
        let own =
            Own { id: spec.id.clone(), engine: engine.clone(), budget, asked_port, only_port };
        let own =
            serde_json::to_value(own).map_err(|error| Error::internal("record the pod", error))?;
        if engine == WASMTIME {
            self.warm_up();
        }
        // Of containers that turn out to be none of ours.
        Ok(Choice { engine: BUILTIN.into(), own })
    }

    fn runtime(&self, pod: Arc<Pod>, own: &Value) -> Result<Arc<dyn Runtime>> {
        let own = Own::of(own);
        let told = Told { dir: pod.dir.join("containers"), origins: Origins::default() };
        self.pods().insert(pod.id.clone(), Arc::new(told));
        let modules = Modules::new(
            self.config.clone(),
            self.workers.clone(),
            self.compiler.clone(),
            Asked {
                engine: own.engine,
                budget: own.budget,
                port: own.asked_port,
                only_port: own.only_port,
            },
        );
        let containers = Containers::new(pod, self.engines.clone(), self.cgroups.clone());
        Ok(Arc::new(containers.with_payloads(Arc::new(modules))))
    }

    async fn removed(&self, _ctx: &SandboxContext, own: &Value) -> Result<()> {
        self.pods().remove(&Own::of(own).id);
        Ok(())
    }

    async fn info(&self, ctx: &SandboxContext, own: &Value) -> Map<String, Value> {
        let own = Own::of(own);
        let mut info = Map::new();
        let worker = self.workers.worker(&own.engine).ok();
        let version = worker.and_then(|worker| worker.known()).map(|hello| hello.version.clone());
        info.insert("engine".into(), json!({ "name": own.engine, "version": version }));
        let told = self.pods().get(&own.id).cloned();
        if let Some(told) = told {
            let (mut modules, names) = modules(&told.dir);
            let containerd = self.config.get().containerd.clone();
            told.origins.add(&containerd, &ctx.spec.namespace, &names, &mut modules).await;
            info.insert("modules".into(), Value::Object(modules));
        }
        info
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_count_where_they_are_allowed() {
        let annotations = [(FUEL_ANNOTATION, "1000"), (TIME_ANNOTATION, "1m30s")];
        let of = |name: &str| annotations.iter().find(|(key, _)| *key == name).map(|(_, v)| *v);
        let none = Budget::default();
        let mut config = Config::default();
        assert_eq!(budget(&config, of, none), Ok(none));
        config.heeds = vec![FUEL_ANNOTATION, TIME_ANNOTATION];
        assert_eq!(budget(&config, of, none), Ok(Budget { fuel: 1000, time: 90_000 }));
        let pods = Budget { fuel: 1, time: 2 };
        assert_eq!(budget(&config, |_| None, pods), Ok(pods));
        for bad in ["0", "-1", "x", ""] {
            let error = budget(&config, |_| Some(bad), none).unwrap_err();
            assert!(error.contains(FUEL_ANNOTATION), "{error}");
        }
    }
}

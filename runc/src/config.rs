//! The configuration file of `runc-sandboxer`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::engine::{BUILTIN, EngineConfig};

/// Annotation by which a pod chooses its engine, where the configuration allows it.
pub const ENGINE_ANNOTATION: &str = "io.kuasar.runc.engine";

/// `runc-sandboxer.toml`. Every key has a default; unknown keys are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,runc_sandboxer=debug`.
    pub log_level: String,
    /// Engine of pods that choose none: `builtin`, or a name of `[engines]`.
    pub engine: String,
    /// Command-line engines by name. `runc` and `crun` are there by default.
    pub engines: BTreeMap<String, EngineConfig>,
    /// Engine by `runtime_type` of the runtime handler.
    pub runtimes: BTreeMap<String, String>,
    /// Pod annotations that are heeded, for example `io.kuasar.runc.engine`.
    pub allowed_annotations: Vec<String>,
    /// Seconds that an engine may take to create a container or start an exec.
    pub create_timeout_secs: u64,
    /// Seconds that any other engine command may take.
    pub command_timeout_secs: u64,
    /// Seconds that sandbox-parent may take to answer.
    pub parent_timeout_secs: u64,
    /// sandbox-parent's program; empty: beside our own, then in `PATH`.
    pub parent_binary: PathBuf,
    /// Most connections of containerd that sandbox-parent relays at the same time.
    pub max_connections: u32,
    /// Size of a pod's `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Lets unprivileged processes of pods bind low ports and send pings, as containerd does.
    pub unprivileged_ports: bool,
    /// containerd's ttrpc socket for events; empty: no events.
    pub events_address: String,
    /// Where Prometheus metrics are served: a socket path or a loopback `address:port`; empty: nowhere.
    pub metrics_address: String,
}

impl Default for Config {
    fn default() -> Self {
        let cli = |name: &str| {
            let path = PathBuf::from(name);
            (name.to_owned(), EngineConfig { path, systemd_cgroup: false, args: Vec::new() })
        };
        Self {
            log_level: "info".into(),
            engine: BUILTIN.into(),
            engines: BTreeMap::from([cli("runc"), cli("crun")]),
            runtimes: BTreeMap::new(),
            allowed_annotations: Vec::new(),
            create_timeout_secs: 60,
            command_timeout_secs: 30,
            parent_timeout_secs: 10,
            parent_binary: PathBuf::new(),
            max_connections: 16_384,
            shm_size: 64 << 20,
            unprivileged_ports: true,
            events_address: "/run/containerd/containerd.sock.ttrpc".into(),
            metrics_address: String::new(),
        }
    }
}

impl Config {
    /// Time limits of engine commands.
    pub fn limits(&self) -> crate::engine::Limits {
        crate::engine::Limits {
            create: Duration::from_secs(self.create_timeout_secs),
            other: Duration::from_secs(self.command_timeout_secs),
        }
    }

    /// What is wrong with it, in words that name the key.
    pub fn check(&self) -> Result<(), String> {
        let known = |name: &str| name == BUILTIN || self.engines.contains_key(name);
        if !known(&self.engine) {
            return Err(format!("engine = {:?} is neither builtin nor in [engines]", self.engine));
        }
        for (runtime, name) in &self.runtimes {
            if !known(name) {
                return Err(format!("runtimes.{runtime:?} = {name:?} is neither builtin nor in [engines]"));
            }
        }
        if self.engines.contains_key(BUILTIN) {
            return Err("engines.builtin: this name is the built-in engine's".into());
        }
        for (key, value) in [
            ("create_timeout_secs", self.create_timeout_secs),
            ("command_timeout_secs", self.command_timeout_secs),
            ("parent_timeout_secs", self.parent_timeout_secs),
        ] {
            if value == 0 || value > 3600 {
                return Err(format!("{key} = {value}: 1 to 3600 is allowed"));
            }
        }
        if self.shm_size < 4096 {
            return Err(format!("shm_size = {}: at least 4096 bytes", self.shm_size));
        }
        Ok(())
    }

    /// The engine for a pod: by annotation where allowed, by runtime type, or the default. It is
    /// a name of the table, which is looked up later; a pod cannot name a program.
    pub fn engine_of<'a>(
        &'a self,
        runtime: &str,
        annotations: &'a std::collections::HashMap<String, String>,
    ) -> &'a str {
        let allowed = self.allowed_annotations.iter().any(|name| name == ENGINE_ANNOTATION);
        match annotations.get(ENGINE_ANNOTATION).filter(|_| allowed) {
            Some(name) => name,
            None => self.runtimes.get(runtime).unwrap_or(&self.engine),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn an_annotation_counts_only_where_it_is_allowed() {
        let annotations = HashMap::from([(ENGINE_ANNOTATION.to_owned(), "crun".to_owned())]);
        let mut config = Config::default();
        assert_eq!(config.engine_of("", &annotations), "builtin");
        config.allowed_annotations = vec![ENGINE_ANNOTATION.into()];
        assert_eq!(config.engine_of("", &annotations), "crun");
    }

    #[test]
    fn a_runtime_type_may_have_its_engine() {
        let config: Config =
            toml::from_str("[runtimes]\n\"io.containerd.kuasar-crun.v1\" = \"crun\"\n").unwrap();
        config.check().unwrap();
        assert_eq!(config.engine_of("io.containerd.kuasar-crun.v1", &HashMap::new()), "crun");
        assert_eq!(config.engine_of("other", &HashMap::new()), "builtin");
    }

    #[test]
    fn mistakes_are_named() {
        let check = |text: &str| toml::from_str::<Config>(text).unwrap().check().unwrap_err();
        assert!(check("engine = \"podman\"").contains("podman"));
        assert!(check("create_timeout_secs = 0").contains("create_timeout_secs"));
        assert!(toml::from_str::<Config>("engin = 1").is_err());
    }
}

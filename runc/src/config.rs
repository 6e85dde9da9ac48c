//! The configuration file of `runc-sandboxer`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_daemon::common::CommonConfig;
use kuasar_oci::engine::{BUILTIN, EngineConfig, LIBCONTAINER, Limits, Settings, is_builtin};
use serde::{Deserialize, Deserializer};

/// Annotation by which a pod chooses its engine, where the configuration allows it.
pub const ENGINE_ANNOTATION: &str = "io.kuasar.runc.engine";

/// What `runc-sandboxer.toml` has beside [`CommonConfig`]. Every key has a default; unknown keys
/// are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Engine of pods that choose none: `builtin`, `libcontainer` (the built-in one without its own
    /// way of making containers), or a name of `[engines]`.
    pub engine: String,
    /// Command-line engines by name. `runc` and `crun` are there unless they are given.
    #[serde(deserialize_with = "engines")]
    pub engines: BTreeMap<String, EngineConfig>,
    /// Engine by `runtime_type` of the runtime handler.
    pub runtimes: BTreeMap<String, String>,
    /// Engine of pods with a user namespace, in place of the built-in one: that one looks mount
    /// sources up as the pod's users, who may not enter the directories of other users' volumes,
    /// and makes no id-mapped mounts. Has to be in `[engines]`.
    pub userns_engine: String,
    /// How long an engine may take.
    pub engine_timeouts: Limits,
    /// For how long after a pod's or a container's creation moves into cgroups are kept fast;
    /// `0s`: never.
    #[serde(with = "kuasar_host::duration")]
    pub warm_cgroups: Duration,
    /// For how long no exec has been asked for when the process ends that makes those of the built-in
    /// engine; `0s`: a program runs for each.
    #[serde(with = "kuasar_host::duration")]
    pub exec_server_idle: Duration,
    /// Size of a pod's `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Lets unprivileged processes of pods bind low ports and send pings, as containerd does.
    pub unprivileged_ports: bool,
    /// From [`CommonConfig::allowed_annotations`]: whether [`ENGINE_ANNOTATION`] counts.
    #[serde(skip)]
    pub heeds_annotation: bool,
}

/// `runc` and `crun`, as they are found in `PATH`.
fn default_engines() -> BTreeMap<String, EngineConfig> {
    let cli = |name: &str| {
        let path = PathBuf::from(name);
        (name.to_owned(), EngineConfig { path, systemd_cgroup: false, args: Vec::new() })
    };
    BTreeMap::from([cli("runc"), cli("crun")])
}

/// What is given, beside the defaults.
fn engines<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, EngineConfig>, D::Error> {
    let mut all = default_engines();
    all.extend(BTreeMap::deserialize(d)?);
    Ok(all)
}

impl Default for Config {
    fn default() -> Self {
        Self {
            engine: BUILTIN.into(),
            engines: default_engines(),
            runtimes: BTreeMap::new(),
            userns_engine: "runc".into(),
            engine_timeouts: Limits::default(),
            warm_cgroups: Duration::from_millis(250),
            exec_server_idle: Duration::from_secs(5),
            shm_size: 64 << 20,
            unprivileged_ports: true,
            heeds_annotation: false,
        }
    }
}

impl Config {
    /// Reads and checks a file with its drop-ins; without one the defaults.
    ///
    /// # Errors
    /// A text that names file, line and key.
    pub fn load(file: Option<&Path>) -> Result<(CommonConfig, Self), String> {
        let adopt = |common: &CommonConfig, own: &mut Self| {
            own.heeds_annotation = common.heeds(ENGINE_ANNOTATION);
        };
        kuasar_daemon::config::load_checked(file, adopt, Self::check)
    }

    /// What is wrong with it, in words that name the key.
    pub fn check(&self) -> Result<(), String> {
        let known = |name: &str| is_builtin(name) || self.engines.contains_key(name);
        if !known(&self.engine) {
            return Err(format!("engine = {:?} is neither builtin nor in [engines]", self.engine));
        }
        for (runtime, name) in &self.runtimes {
            if !known(name) {
                return Err(format!(
                    "runtimes.{runtime:?} = {name:?} is neither builtin nor in [engines]"
                ));
            }
        }
        if let Some(name) = [BUILTIN, LIBCONTAINER].iter().find(|n| self.engines.contains_key(**n))
        {
            return Err(format!("engines.{name}: this name is the built-in engine's"));
        }
        if !self.engines.contains_key(&self.userns_engine) {
            return Err(format!("userns_engine = {:?} is not in [engines]", self.userns_engine));
        }
        for (key, value) in
            [("create", self.engine_timeouts.create), ("other", self.engine_timeouts.other)]
        {
            if value.is_zero() || value > Duration::from_secs(3600) {
                return Err(format!("engine_timeouts.{key}: more than nothing and at most 1h"));
            }
        }
        if self.warm_cgroups > Duration::from_secs(10) {
            return Err("warm_cgroups: at most 10s".into());
        }
        let idle = self.exec_server_idle;
        if idle.subsec_nanos() != 0 || idle > Duration::from_secs(3600) {
            return Err("exec_server_idle: whole seconds, at most 1h".into());
        }
        if self.shm_size < 4096 {
            return Err(format!("shm_size = {}: at least 4096 bytes", self.shm_size));
        }
        Ok(())
    }

    /// What of it is the engines'.
    pub fn engine_settings(&self) -> Settings {
        Settings {
            engines: self.engines.clone(),
            timeouts: self.engine_timeouts,
            warm_cgroups: self.warm_cgroups,
        }
    }

    /// The engine for a pod: by annotation where allowed, by runtime type, or the default; never
    /// the built-in one for a pod with a user namespace. It is a name of the table, which is
    /// looked up later; a pod cannot name a program.
    pub fn engine_of<'a>(
        &'a self,
        runtime: &str,
        annotations: &'a std::collections::HashMap<String, String>,
        has_userns: bool,
    ) -> &'a str {
        match self.chosen(runtime, annotations) {
            name if has_userns && is_builtin(name) => &self.userns_engine,
            name => name,
        }
    }

    fn chosen<'a>(
        &'a self,
        runtime: &str,
        annotations: &'a std::collections::HashMap<String, String>,
    ) -> &'a str {
        match annotations.get(ENGINE_ANNOTATION).filter(|_| self.heeds_annotation) {
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
        assert_eq!(config.engine_of("", &annotations, false), "builtin");
        config.heeds_annotation = true;
        assert_eq!(config.engine_of("", &annotations, false), "crun");
    }

    #[test]
    fn a_runtime_type_may_have_its_engine() {
        let config: Config =
            toml::from_str("[runtimes]\n\"io.containerd.kuasar-crun.v1\" = \"crun\"\n").unwrap();
        config.check().unwrap();
        assert_eq!(
            config.engine_of("io.containerd.kuasar-crun.v1", &HashMap::new(), false),
            "crun"
        );
        assert_eq!(config.engine_of("other", &HashMap::new(), false), "builtin");
        assert_eq!(config.engine_of("other", &HashMap::new(), true), "runc");
        let config: Config = toml::from_str("engine = 'libcontainer'").unwrap();
        config.check().unwrap();
        assert_eq!(config.engine_of("other", &HashMap::new(), false), "libcontainer");
        assert_eq!(config.engine_of("other", &HashMap::new(), true), "runc");
    }

    #[test]
    fn engines_are_added_to_the_defaults() {
        let config: Config =
            toml::from_str("[engines.youki]\npath = '/y'\n[engines.runc]\npath = '/r'\n").unwrap();
        config.check().unwrap();
        let path = |name: &str| config.engines[name].path.clone();
        assert_eq!((path("youki"), path("runc")), ("/y".into(), "/r".into()));
        assert_eq!(path("crun"), PathBuf::from("crun"));
        assert!(Config::default().engines.keys().eq(["crun", "runc"]));
    }

    #[test]
    fn mistakes_are_named() {
        let check = |text: &str| toml::from_str::<Config>(text).unwrap().check().unwrap_err();
        assert!(check("engine = \"podman\"").contains("podman"));
        assert!(check("engine_timeouts = { create = '0s' }").contains("engine_timeouts.create"));
        assert!(check("[engines.libcontainer]\npath = '/x'").contains("engines.libcontainer"));
        assert!(toml::from_str::<Config>("engin = 1").is_err());
    }
}

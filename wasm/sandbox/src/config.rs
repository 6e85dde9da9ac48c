//! The configuration file of `wasm-sandboxer`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_daemon::common::CommonConfig;
use kuasar_oci::engine::{EngineConfig, Limits, Settings};
use serde::Deserialize;
use wasm_common::job::Budget;
use wasm_common::kind::Kind;
use wasm_common::wire;

/// Annotation by which a pod or a container names the port of a component that answers requests;
/// it counts where the configuration allows it.
pub const PORT_ANNOTATION: &str = "io.kuasar.wasm.http-port";
/// Annotation by which a pod chooses its engine.
pub const ENGINE_ANNOTATION: &str = "io.kuasar.wasm.engine";
/// Annotation by which a pod or a container bounds what its program may do, in fuel.
pub const FUEL_ANNOTATION: &str = "io.kuasar.wasm.fuel";
/// Annotation by which a pod or a container bounds how long its program may run.
pub const TIME_ANNOTATION: &str = "io.kuasar.wasm.time-budget";
/// Name of the engine that is built in.
pub const WASMTIME: &str = "wasmtime";
/// Name of the engine that is loaded at run time.
pub const WASMEDGE: &str = "wasmedge";
/// Name of Wasmtime with WASI-NN, a program of its own.
pub const WASMTIME_NN: &str = "wasmtime-nn";
/// Names of all engines.
pub const ENGINES: [&str; 3] = [WASMTIME, WASMEDGE, WASMTIME_NN];

/// The key of [`Config::userns_engine`], which is the engine's name, too.
pub const USERNS_ENGINE: &str = "userns_engine";

/// What `wasm-sandboxer.toml` has beside [`CommonConfig`]. Every key has a default; unknown keys
/// are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Engine of pods that choose none: one of [`ENGINES`].
    pub engine: String,
    /// Engine by `runtime_type` of the runtime handler.
    pub runtimes: BTreeMap<String, String>,
    /// The program that runs WebAssembly: an absolute path, or a name that is looked up beside
    /// this program, then in `PATH`.
    pub worker: PathBuf,
    /// How long a worker may take to be warm.
    #[serde(with = "kuasar_host::duration")]
    pub worker_timeout: Duration,
    /// For how long no container has been asked for when the next one's process is made beforehand, in
    /// milliseconds; nothing for never. Counts from the worker's next start on.
    #[serde(with = "kuasar_host::duration")]
    pub spare_after: Duration,
    /// Runs containers whose entrypoint is no WebAssembly with the built-in OCI engine.
    pub native_containers: bool,
    /// The OCI command line that runs them in pods with a user namespace, in place of the built-in
    /// engine: that one looks mount sources up as the pod's users.
    pub userns_engine: EngineConfig,
    /// Compiled code.
    pub cache: CacheConfig,
    /// Compiling.
    pub compiler: CompilerConfig,
    /// Components that answer requests.
    pub http: HttpConfig,
    /// How programs end on a signal: with their process (`process`), or as if they had trapped
    /// (`epoch`), which takes code that asks in each loop whether it is to.
    pub interruption: Interruption,
    /// Most threads of one program beside its first.
    pub max_threads: u32,
    /// The engine Wasmtime.
    pub wasmtime: WasmtimeConfig,
    /// The engine WasmEdge.
    pub wasmedge: WasmEdgeConfig,
    /// Wasmtime with WASI-NN.
    pub wasi_nn: WasiNnConfig,
    /// containerd, as it is asked for images.
    pub containerd: ContainerdConfig,
    /// How long an engine may take.
    pub engine_timeouts: Limits,
    /// Size of a pod's `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Lets unprivileged processes of pods bind low ports and send pings, as containerd does.
    pub unprivileged_ports: bool,
    /// From [`CommonConfig::allowed_annotations`]: which of ours count.
    #[serde(skip)]
    pub heeds: Vec<&'static str>,
}

/// How programs end on a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interruption {
    /// With their process.
    Process,
    /// By Wasmtime's epoch.
    Epoch,
}

/// The engine Wasmtime.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WasmtimeConfig {
    /// Runs components of WASI 0.3, which Wasmtime calls experimental.
    pub wasi_0_3: bool,
}

/// The engine WasmEdge.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WasmEdgeConfig {
    /// The program that runs it: as [`Config::worker`].
    pub worker: PathBuf,
    /// WasmEdge's library: a soname, or an absolute path.
    pub library: String,
    /// Directory of plugins that are loaded; empty for none.
    pub plugins: String,
    /// Compiles modules; otherwise they are interpreted.
    pub compile: bool,
    /// Runs shared objects that images have, compiled by `wasmedge compile`: native code.
    pub image_code: bool,
}

/// Wasmtime with WASI-NN.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WasiNnConfig {
    /// The program that runs it: as [`Config::worker`].
    pub worker: PathBuf,
    /// ONNX Runtime's library: a soname, or an absolute path.
    pub library: String,
}

impl Default for WasiNnConfig {
    fn default() -> Self {
        Self { worker: "wasm-worker-nn".into(), library: "libonnxruntime.so.1.23".into() }
    }
}

impl Default for WasmEdgeConfig {
    fn default() -> Self {
        Self {
            worker: "wasm-worker-wasmedge".into(),
            library: "libwasmedge.so.0".into(),
            plugins: String::new(),
            compile: true,
            image_code: false,
        }
    }
}

/// containerd, as it is asked what kind of an image a container came from.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerdConfig {
    /// Its socket; empty for never.
    pub address: PathBuf,
    /// How long a verbose Status may wait for all answers together.
    #[serde(with = "kuasar_host::duration")]
    pub timeout: Duration,
}

impl Default for ContainerdConfig {
    fn default() -> Self {
        Self { address: "/run/containerd/containerd.sock".into(), timeout: Duration::from_secs(1) }
    }
}

/// Compiled code.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Its directory, this daemon's alone.
    pub dir: PathBuf,
    /// Most bytes in it; what was not used for longest goes first.
    pub size: u64,
}

/// Compiling.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CompilerConfig {
    /// Largest module in bytes.
    pub max_module: u64,
    /// Most memory in bytes.
    pub memory: u64,
    /// How long one module may take, in time and in processor time.
    #[serde(with = "kuasar_host::duration")]
    pub timeout: Duration,
    /// Modules that are compiled at the same time.
    pub jobs: usize,
    /// User and group that the compiler becomes.
    pub uid: u32,
}

/// Components that answer requests.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Port where neither annotation, environment nor pod names one.
    pub port: u16,
    /// Environment variable of the container that names it; empty for none.
    pub port_env: String,
    /// Connections to one component at the same time.
    pub max_connections: u32,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { dir: "/var/cache/kuasar-wasm".into(), size: 1 << 30 }
    }
}

impl Default for CompilerConfig {
    fn default() -> Self {
        Self {
            max_module: 256 << 20,
            memory: 4 << 30,
            timeout: Duration::from_secs(60),
            jobs: 2,
            uid: 65534,
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self { port: 8080, port_env: "PORT".into(), max_connections: 128 }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            engine: WASMTIME.into(),
            runtimes: BTreeMap::new(),
            worker: "wasm-worker".into(),
            worker_timeout: Duration::from_secs(10),
            spare_after: Duration::from_millis(wire::SPARE_AFTER_MS.into()),
            native_containers: true,
            userns_engine: EngineConfig {
                path: "runc".into(),
                systemd_cgroup: false,
                args: Vec::new(),
            },
            cache: CacheConfig::default(),
            compiler: CompilerConfig::default(),
            http: HttpConfig::default(),
            interruption: Interruption::Process,
            max_threads: 64,
            wasmtime: WasmtimeConfig::default(),
            wasmedge: WasmEdgeConfig::default(),
            wasi_nn: WasiNnConfig::default(),
            containerd: ContainerdConfig::default(),
            engine_timeouts: Limits::default(),
            shm_size: 64 << 20,
            unprivileged_ports: true,
            heeds: Vec::new(),
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
            own.heeds = [PORT_ANNOTATION, ENGINE_ANNOTATION, FUEL_ANNOTATION, TIME_ANNOTATION]
                .into_iter()
                .filter(|name| common.heeds(name))
                .collect();
            // Otherwise the rest of what a verbose Status has would be lost with the answer.
            own.containerd.timeout = own.containerd.timeout.min(common.timeouts.read / 2);
        };
        kuasar_daemon::config::load_checked(file, adopt, Self::check)
    }

    /// What is wrong with it, in words that name the key.
    pub fn check(&self) -> Result<(), String> {
        const HOUR: Duration = Duration::from_secs(3600);
        for (key, value) in [
            ("worker_timeout", self.worker_timeout),
            ("compiler.timeout", self.compiler.timeout),
            ("containerd.timeout", self.containerd.timeout),
            ("engine_timeouts.create", self.engine_timeouts.create),
            ("engine_timeouts.other", self.engine_timeouts.other),
        ] {
            if value.is_zero() || value > HOUR {
                return Err(format!("{key}: more than nothing and at most 1h"));
            }
        }
        let engines =
            self.runtimes.iter().map(|(kind, engine)| (format!("runtimes.{kind}"), engine));
        for (key, engine) in engines.chain([("engine".to_owned(), &self.engine)]) {
            if !ENGINES.contains(&engine.as_str()) {
                return Err(format!("{key} = {engine:?}: one of {}", ENGINES.join(", ")));
            }
        }
        if self.spare_after > Duration::from_secs(60)
            || !self.spare_after.subsec_nanos().is_multiple_of(1_000_000)
        {
            return Err("spare_after: whole milliseconds, at most 1m".into());
        }
        if self.max_threads > 4096 {
            return Err("max_threads: at most 4096".into());
        }
        for (key, library) in [
            ("wasmedge.library", &self.wasmedge.library),
            ("wasi_nn.library", &self.wasi_nn.library),
        ] {
            if library.is_empty() {
                return Err(format!("{key}: a soname or a path"));
            }
        }
        if !self.wasmedge.plugins.is_empty() && !self.wasmedge.plugins.starts_with('/') {
            return Err("wasmedge.plugins: an absolute path, or \"\" for none".into());
        }
        if self.shm_size < 4096 {
            return Err(format!("shm_size = {}: at least 4096 bytes", self.shm_size));
        }
        if !self.cache.dir.is_absolute() {
            return Err(format!("cache.dir = {:?}: an absolute path", self.cache.dir));
        }
        let containerd = &self.containerd.address;
        if !containerd.as_os_str().is_empty() && !containerd.is_absolute() {
            return Err("containerd.address: an absolute path, or \"\" for never".into());
        }
        if self.compiler.memory < 256 << 20 {
            return Err("compiler.memory: at least 268435456 bytes".into());
        }
        if !(1..=64).contains(&self.compiler.jobs) {
            return Err("compiler.jobs: 1 to 64".into());
        }
        if self.compiler.max_module < 8 || self.compiler.max_module > 1 << 30 {
            return Err("compiler.max_module: 8 to 1073741824 bytes".into());
        }
        if self.compiler.uid == 0 {
            return Err("compiler.uid: not root, modules are not to be trusted".into());
        }
        if self.http.port == 0 {
            return Err("http.port: 1 to 65535".into());
        }
        if !(1..=10_000).contains(&self.http.max_connections) {
            return Err("http.max_connections: 1 to 10000".into());
        }
        Ok(())
    }

    /// What of it is the engines'.
    pub fn engine_settings(&self) -> Settings {
        Settings {
            engines: BTreeMap::from([(USERNS_ENGINE.into(), self.userns_engine.clone())]),
            timeouts: self.engine_timeouts,
            // Every process of a container's enters its cgroup by itself.
            warm_cgroups: Duration::ZERO,
        }
    }

    /// How Wasmtime's code is made for a program: [`Budget::variant`].
    pub fn variant(&self, budget: &Budget, kind: Kind) -> String {
        let interruptible = self.interruption == Interruption::Epoch;
        if kind == Kind::Component && self.wasmtime.wasi_0_3 {
            return budget.variant_p3(interruptible);
        }
        budget.variant(interruptible).to_owned()
    }

    /// Whether one of our annotations counts.
    pub fn heeds(&self, annotation: &str) -> bool {
        self.heeds.contains(&annotation)
    }

    /// The worker's program of an engine.
    ///
    /// # Errors
    /// When it is nowhere; the text says what to do.
    pub fn worker_program(&self, engine: &str) -> Result<PathBuf, String> {
        let (key, worker) = match engine {
            WASMEDGE => ("wasmedge.worker", &self.wasmedge.worker),
            WASMTIME_NN => ("wasi_nn.worker", &self.wasi_nn.worker),
            _ => ("worker", &self.worker),
        };
        let beside = std::env::current_exe().ok();
        let beside = beside.as_deref().and_then(Path::parent).map(|dir| dir.join(worker));
        let is_name = worker.components().count() == 1;
        beside
            .filter(|path| is_name && path.is_file())
            .or_else(|| kuasar_host::process::find_program(worker))
            .ok_or_else(|| {
                format!(
                    "{} is neither beside this program nor in PATH: install it, or set {key}",
                    worker.display()
                )
            })
    }

    /// What an engine's worker gets behind its other arguments.
    pub fn worker_words(&self, engine: &str) -> Vec<String> {
        match engine {
            WASMEDGE => vec![self.wasmedge.library.clone(), self.wasmedge.plugins.clone()],
            WASMTIME_NN => vec![self.wasi_nn.library.clone()],
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_has_every_default() {
        let text = include_str!("../../../packaging/wasm-sandboxer.toml");
        let switched_on: String = text
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if !rest.starts_with(' ') => rest,
                _ => line,
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("wasm-sandboxer.toml");
        std::fs::write(&file, switched_on).unwrap();
        let (common, config) = Config::load(Some(&file)).unwrap();
        let default = Config::default();
        assert_eq!(format!("{config:?}"), format!("{default:?}"));
        // What is made of other keys where it is not set.
        let unset = CommonConfig {
            listen: None,
            dir: None,
            log_level: None,
            metrics_listen: None,
            events_address: None,
            parent_binary: None,
            ..common.clone()
        };
        assert_eq!(unset, CommonConfig::default());
        assert_eq!(common.events(), CommonConfig::default().events());
        let run = Path::new("/run/kuasar-wasm");
        assert_eq!(common.dir.as_deref(), Some(run));
        assert_eq!(common.metrics_address(run), CommonConfig::default().metrics_address(run));
        // Every field is a key or a table, by the name that it prints. This one is in no file.
        let printed = format!("{default:#?}");
        let fields = printed.lines().filter_map(|line| Some(line.trim().split_once(": ")?.0));
        for field in fields.filter(|field| *field != "heeds") {
            // A table that needs one of its keys is off with them.
            let ways =
                [format!("\n#{field} = "), format!("\n[{field}]\n"), format!("\n#[{field}]\n")];
            assert!(ways.iter().any(|way| text.contains(way)), "{field}");
        }
    }

    #[test]
    fn components_alone_are_compiled_for_wasi_0_3() {
        let mut config = Config::default();
        let of = |config: &Config, kind| config.variant(&Budget { fuel: 1, time: 0 }, kind);
        assert_eq!(of(&config, Kind::Component), "fuel");
        config.wasmtime.wasi_0_3 = true;
        assert_eq!(of(&config, Kind::Component), "fuel+p3");
        assert_eq!(of(&config, Kind::Module), "fuel");
    }

    #[test]
    fn mistakes_are_named() {
        let check = |text: &str| toml::from_str::<Config>(text).unwrap().check().unwrap_err();
        assert!(check("[compiler]\nuid = 0").contains("compiler.uid"));
        assert!(check("[compiler]\njobs = 0").contains("compiler.jobs"));
        assert!(check("[cache]\ndir = 'x'").contains("cache.dir"));
        assert!(check("containerd.address = 'x'").contains("containerd.address"));
        assert!(check("containerd.timeout = '0s'").contains("containerd.timeout"));
        assert!(toml::from_str::<Config>("containerd.address = ''").unwrap().check().is_ok());
        assert!(check("[http]\nport = 0").contains("http.port"));
        assert!(check("engine = 'v8'").contains("wasmtime, wasmedge"));
        assert!(check("[runtimes]\nx = 'v8'").contains("runtimes.x"));
        assert!(check("[wasmedge]\nplugins = 'x'").contains("wasmedge.plugins"));
        assert!(check("worker_timeout = '0s'").contains("worker_timeout"));
        assert!(check("spare_after = '61s'").contains("spare_after"));
        assert!(check("spare_after = '1500us'").contains("spare_after"));
        assert!(toml::from_str::<Config>("spare_after = '0s'").unwrap().check().is_ok());
        assert!(toml::from_str::<Config>("wurker = 1").is_err());
    }
}

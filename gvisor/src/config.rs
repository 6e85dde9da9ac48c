//! The configuration file of `gvisor-sandboxer`, and the flags that a pod gets from it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_daemon::common::CommonConfig;
use kuasar_oci::engine::Limits;
use serde::{Deserialize, Serialize};

/// Prefix of the annotations by which a pod chooses flags, where the configuration allows it.
pub const ANNOTATION_PREFIX: &str = "io.kuasar.gvisor.";

/// What `gvisor-sandboxer.toml` has beside [`CommonConfig`]. Every key has a default; unknown keys
/// are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// gVisor's program and its flags.
    pub runsc: RunscConfig,
    /// How long gVisor may take: `create` is starting a sandbox, too, and `other` each answer of one.
    pub runsc_timeouts: Limits,
    /// For how long after a pod's or a container's creation moves into cgroups are kept fast;
    /// `0s`: never.
    #[serde(with = "kuasar_host::duration")]
    pub warm_cgroups: Duration,
    /// Size of a pod's `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Sysctls that a pod may ask for and does not get: gVisor's kernel has none of them.
    pub ignored_sysctls: Vec<String>,
    /// Port-forwards of one pod at the same time.
    pub max_forwards: usize,
    /// From [`CommonConfig::allowed_annotations`]: those of ours that count, without the prefix.
    #[serde(skip)]
    pub heeded: Vec<String>,
}

/// gVisor's program and its flags, as `runsc flags` describes them.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunscConfig {
    /// Program, as an absolute path or a name to be found in `PATH`.
    pub path: PathBuf,
    /// Where system calls are caught: `systrap`, `kvm` or `ptrace`.
    pub platform: String,
    /// `sandbox` (gVisor's own network stack), `host` (the stack of the pod's network namespace)
    /// or `none`.
    pub network: String,
    /// Where writes to a root file system go: `none`, or `root:self`, `root:memory`,
    /// `root:dir=PATH`, or the same with `all:`.
    pub overlay2: String,
    /// `exclusive` or `shared`: whether others on the host change a root file system meanwhile.
    pub file_access: String,
    /// The same for volumes.
    pub file_access_mounts: String,
    /// Unix sockets of the host that are in volumes: `none`, `open`, `create` or `all`.
    pub host_uds: String,
    /// FIFOs of the host that are in volumes: `none` or `open`.
    pub host_fifo: String,
    /// Lets containers that have CAP_NET_RAW open raw sockets.
    pub net_raw: bool,
    /// Applies the seccomp profiles of pods to their containers, inside the sandbox.
    pub oci_seccomp: bool,
    /// Asks systemd for cgroups.
    pub systemd_cgroup: bool,
    /// Logs of the sandboxes for debugging, below this directory; empty: none.
    pub debug_log: PathBuf,
    /// Logs system calls, too; wants `debug_log`.
    pub strace: bool,
    /// Address of a `runsc metric-server` that is to find the sandboxes; empty: none.
    pub metric_server: String,
    /// The sandbox waits for a container that goes on from a checkpoint, or is started without one.
    pub restore: bool,
    /// Further global flags.
    pub args: Vec<String>,
}

impl Default for RunscConfig {
    fn default() -> Self {
        Self {
            path: "runsc".into(),
            platform: "systrap".into(),
            network: "sandbox".into(),
            overlay2: "root:self".into(),
            file_access: "exclusive".into(),
            file_access_mounts: "shared".into(),
            host_uds: "none".into(),
            host_fifo: "none".into(),
            net_raw: false,
            oci_seccomp: true,
            systemd_cgroup: false,
            debug_log: PathBuf::new(),
            strace: false,
            metric_server: String::new(),
            restore: false,
            args: Vec::new(),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            runsc: RunscConfig::default(),
            runsc_timeouts: Limits::default(),
            warm_cgroups: Duration::from_millis(250),
            shm_size: 64 << 20,
            ignored_sysctls: Vec::new(),
            max_forwards: 64,
            heeded: Vec::new(),
        }
    }
}

/// Which network a pod has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// gVisor's own stack; it takes the addresses off the pod's network namespace.
    #[default]
    Sandbox,
    /// The host kernel's stack in the pod's network namespace.
    Host,
    /// Loopback alone.
    None,
}

/// Flags of one pod, for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flags {
    /// In front of every command.
    pub args: Vec<String>,
    /// Which network.
    pub network: Network,
    /// Which platform.
    pub platform: String,
    /// It waits for a checkpoint: gVisor restores into no sandbox that has run.
    pub restore: bool,
}

type Check = fn(&str) -> bool;

fn is_bool(value: &str) -> bool {
    matches!(value, "true" | "false")
}

fn is_overlay(value: &str) -> bool {
    // No directory of the host by a pod's word.
    value == "none"
        || value.split_once(':').is_some_and(|(what, medium)| {
            matches!(what, "root" | "all") && matches!(medium, "self" | "memory")
        })
}

/// What a pod may choose: name of the flag, values in words, check.
const CHOICES: &[(&str, &str, Check)] = &[
    ("platform", "systrap, kvm or ptrace", |value| matches!(value, "systrap" | "kvm" | "ptrace")),
    ("network", "sandbox, host or none", |value| matches!(value, "sandbox" | "host" | "none")),
    ("overlay2", "none, or root or all, a colon, and self or memory", is_overlay),
    ("file-access", "exclusive or shared", |value| matches!(value, "exclusive" | "shared")),
    ("file-access-mounts", "exclusive or shared", |value| matches!(value, "exclusive" | "shared")),
    ("host-uds", "none, open, create or all", |value| {
        matches!(value, "none" | "open" | "create" | "all")
    }),
    ("host-fifo", "none or open", |value| matches!(value, "none" | "open")),
    ("net-raw", "true or false", is_bool),
    ("oci-seccomp", "true or false", is_bool),
    ("strace", "true or false", is_bool),
    ("restore", "true or false", is_bool),
];

/// gVisor has no overlay over a root file system that others change.
fn files(access: &str, overlay: &str) -> Result<(), String> {
    match access == "shared" && overlay != "none" {
        true => Err(format!(
            "file-access = \"shared\" wants overlay2 = \"none\", and it is {overlay:.100?}"
        )),
        false => Ok(()),
    }
}

impl Config {
    /// Reads and checks a file with its drop-ins; without one the defaults.
    ///
    /// # Errors
    /// A text that names file, line and key.
    pub fn load(file: Option<&Path>) -> Result<(CommonConfig, Self), String> {
        let adopt = |common: &CommonConfig, own: &mut Self| {
            let ours = CHOICES.iter().map(|(name, ..)| *name);
            own.heeded = ours
                .filter(|name| common.heeds(&format!("{ANNOTATION_PREFIX}{name}")))
                .map(str::to_owned)
                .collect();
        };
        kuasar_daemon::config::load_checked(file, adopt, Self::check)
    }

    /// What is wrong with it, in words that name the key.
    ///
    /// # Errors
    /// The first value without sense.
    pub fn check(&self) -> Result<(), String> {
        let runsc = &self.runsc;
        for (key, values, good, value) in self.chosen() {
            // An administrator may name a directory.
            let dir = value.split_once(":dir=").map(|(_, dir)| Path::new(dir));
            let good = good(&value) || (key == "overlay2" && dir.is_some_and(Path::is_absolute));
            if !good {
                let key = key.replace('-', "_");
                return Err(format!("runsc.{key} = {value:?}: {values}"));
            }
        }
        files(&runsc.file_access, &runsc.overlay2).map_err(|text| format!("runsc.{text}"))?;
        if !runsc.debug_log.as_os_str().is_empty() && !runsc.debug_log.is_absolute() {
            return Err(format!("runsc.debug_log = {:?}: an absolute path", runsc.debug_log));
        }
        if runsc.strace && runsc.debug_log.as_os_str().is_empty() {
            return Err(
                "runsc.strace: system calls are logged below runsc.debug_log: set it".into()
            );
        }
        if let Some(flag) = runsc.args.iter().find(|flag| !flag.starts_with('-')) {
            return Err(format!("runsc.args: {flag:?} is no flag"));
        }
        let has = |flag: &str| {
            let is = |arg: &String| arg.trim_start_matches('-').split('=').next() == Some(flag);
            runsc.args.iter().any(is)
        };
        for flag in ["root", "log", "log-format", "rootless", "TESTONLY-unsafe-nonroot"] {
            if has(flag) {
                return Err(format!("runsc.args: --{flag} is the daemon's own"));
            }
        }
        // What the daemon itself has to know, and what a pod's annotation may change.
        let keys = CHOICES.iter().map(|(name, ..)| *name);
        for flag in keys.chain(["systemd-cgroup", "metric-server", "debug", "debug-log"]) {
            if has(flag) {
                let key = match flag {
                    "debug" => "debug_log".to_owned(),
                    flag => flag.replace('-', "_"),
                };
                return Err(format!("runsc.args: --{flag} has a key of its own, runsc.{key}"));
            }
        }
        let limits = &self.runsc_timeouts;
        for (key, value) in [("create", limits.create), ("other", limits.other)] {
            if value.is_zero() || value > Duration::from_secs(3600) {
                return Err(format!("runsc_timeouts.{key}: more than nothing and at most 1h"));
            }
        }
        if self.warm_cgroups > Duration::from_secs(10) {
            return Err("warm_cgroups: at most 10s".into());
        }
        if self.shm_size < 4096 {
            return Err(format!("shm_size = {}: at least 4096 bytes", self.shm_size));
        }
        Ok(())
    }

    /// What the file says for each choice: name, values, check, value.
    fn chosen(&self) -> impl Iterator<Item = (&'static str, &'static str, Check, String)> {
        let runsc = &self.runsc;
        CHOICES.iter().map(|(name, values, check)| {
            let value = match *name {
                "platform" => runsc.platform.clone(),
                "network" => runsc.network.clone(),
                "overlay2" => runsc.overlay2.clone(),
                "file-access" => runsc.file_access.clone(),
                "file-access-mounts" => runsc.file_access_mounts.clone(),
                "host-uds" => runsc.host_uds.clone(),
                "host-fifo" => runsc.host_fifo.clone(),
                "net-raw" => runsc.net_raw.to_string(),
                "oci-seccomp" => runsc.oci_seccomp.to_string(),
                "strace" => runsc.strace.to_string(),
                _ => runsc.restore.to_string(),
            };
            (*name, *values, *check, value)
        })
    }

    /// Flags of a pod: from the file, and from its annotations where they are allowed.
    ///
    /// # Errors
    /// A text that names the annotation and its values.
    pub fn flags(
        &self,
        annotations: &HashMap<String, String>,
        host_network: bool,
    ) -> Result<Flags, String> {
        let mut args = Vec::new();
        let (mut network, mut platform, mut restore) = (Network::Sandbox, String::new(), false);
        let (mut access, mut overlay) = (String::new(), String::new());
        for (name, values, good, mut value) in self.chosen() {
            let heeded = self.heeded.iter().any(|heeded| heeded == name);
            let asked = annotations.get(&format!("{ANNOTATION_PREFIX}{name}"));
            if let Some(asked) = asked.filter(|_| heeded) {
                if !good(asked) {
                    return Err(format!(
                        "annotation {ANNOTATION_PREFIX}{name} = {asked:.100?}: {values}"
                    ));
                }
                value.clone_from(asked);
            }
            match name {
                // gVisor's own stack has nothing to take its addresses from there.
                "network" if host_network && value == "sandbox" => value = "host".into(),
                "strace" if value == "true" && self.runsc.debug_log.as_os_str().is_empty() => {
                    return Err(format!(
                        "annotation {ANNOTATION_PREFIX}strace: runsc.debug_log is not set"
                    ));
                }
                _ => {}
            }
            match name {
                "network" => {
                    network = match value.as_str() {
                        "host" => Network::Host,
                        "none" => Network::None,
                        _ => Network::Sandbox,
                    }
                }
                "platform" => platform.clone_from(&value),
                "file-access" => access.clone_from(&value),
                "overlay2" => overlay.clone_from(&value),
                // Not a flag of runsc: another command.
                "restore" => {
                    restore = value == "true";
                    continue;
                }
                _ => {}
            }
            args.push(format!("--{name}={value}"));
        }
        files(&access, &overlay).map_err(|text| format!("annotation {ANNOTATION_PREFIX}{text}"))?;
        let runsc = &self.runsc;
        if runsc.systemd_cgroup {
            args.push("--systemd-cgroup".into());
        }
        if !runsc.metric_server.is_empty() {
            args.push(format!("--metric-server={}", runsc.metric_server));
        }
        if !runsc.debug_log.as_os_str().is_empty() {
            args.push("--debug".into());
            args.push(format!("--debug-log={}/", runsc.debug_log.display()));
        }
        args.extend(runsc.args.iter().cloned());
        Ok(Flags { args, network, platform, restore })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Config {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn the_defaults_are_good_and_become_flags() {
        let config = Config::default();
        config.check().unwrap();
        let flags = config.flags(&HashMap::new(), false).unwrap();
        assert_eq!((flags.network, flags.platform.as_str()), (Network::Sandbox, "systrap"));
        for flag in ["--platform=systrap", "--network=sandbox", "--oci-seccomp=true"] {
            assert!(flags.args.iter().any(|arg| arg == flag), "{flag}");
        }
        let flags = config.flags(&HashMap::new(), true).unwrap();
        assert_eq!(flags.network, Network::Host);
        assert!(flags.args.iter().any(|arg| arg == "--network=host"));
    }

    #[test]
    fn an_annotation_counts_where_it_is_allowed_and_has_a_known_value() {
        let name = |name: &str| format!("{ANNOTATION_PREFIX}{name}");
        let asked = |key: &str, value: &str| HashMap::from([(name(key), value.to_owned())]);
        let mut config = Config::default();
        let platform = |config: &Config, asked: &HashMap<_, _>| {
            config.flags(asked, false).map(|flags| flags.platform)
        };
        assert_eq!(platform(&config, &asked("platform", "ptrace")).unwrap(), "systrap");
        config.heeded = vec!["platform".into(), "overlay2".into()];
        assert_eq!(platform(&config, &asked("platform", "ptrace")).unwrap(), "ptrace");
        let error = platform(&config, &asked("platform", "xen")).unwrap_err();
        assert!(error.contains("io.kuasar.gvisor.platform") && error.contains("kvm"), "{error}");
        assert!(platform(&config, &asked("overlay2", "all:memory")).is_ok());
        // A path of the host is the administrator's to choose.
        assert!(platform(&config, &asked("overlay2", "root:dir=/etc")).is_err());
        assert!(parse("[runsc]\noverlay2 = \"root:dir=/var/tmp\"").check().is_ok());
    }

    #[test]
    fn each_key_becomes_its_flag_and_so_does_its_annotation() {
        let table: &[(&str, &str, &str)] = &[
            ("platform", "\"kvm\"", "kvm"),
            ("network", "\"none\"", "none"),
            ("overlay2", "\"all:memory\"", "all:memory"),
            ("file-access", "\"shared\"", "shared"),
            ("file-access-mounts", "\"exclusive\"", "exclusive"),
            ("host-uds", "\"open\"", "open"),
            ("host-fifo", "\"open\"", "open"),
            ("net-raw", "true", "true"),
            ("oci-seccomp", "false", "false"),
            ("strace", "true", "true"),
        ];
        // All of them, and one that is no flag.
        assert_eq!(table.len() + 1, CHOICES.len());
        for (name, written, value) in table {
            let key = name.replace('-', "_");
            // gVisor has no overlay over a file system that others change.
            let more = if *name == "file-access" { "overlay2 = \"none\"\n" } else { "" };
            let text = format!("[runsc]\ndebug_log = \"/d\"\n{more}{key} = {written}");
            let config = parse(&text);
            config.check().unwrap();
            let flag = format!("--{name}={value}");
            let has = |config: &Config, asked: &HashMap<_, _>| {
                let flags = config.flags(asked, false).unwrap();
                let count = flags.args.iter().filter(|arg| **arg == flag).count();
                assert!(count < 2, "{flag} twice");
                count == 1
            };
            assert!(has(&config, &HashMap::new()), "{flag}");
            let mut config = parse(&format!("[runsc]\ndebug_log = \"/d\"\n{more}"));
            let asked =
                HashMap::from([(format!("{ANNOTATION_PREFIX}{name}"), (*value).to_owned())]);
            assert!(!has(&config, &asked), "{flag} without leave");
            config.heeded = vec![(*name).to_owned()];
            assert!(has(&config, &asked), "{flag} by annotation");
            let asked = HashMap::from([(format!("{ANNOTATION_PREFIX}{name}"), "what".to_owned())]);
            let error = config.flags(&asked, false).unwrap_err();
            assert!(error.contains(&format!("{ANNOTATION_PREFIX}{name}")), "{error}");
        }
        let config = parse(
            "[runsc]\ndebug_log = \"/d\"\nmetric_server = \"/m\"\nsystemd_cgroup = true\n\
             restore = true\nargs = [\"--directfs=false\"]",
        );
        config.check().unwrap();
        let flags = config.flags(&HashMap::new(), false).unwrap();
        let wanted = [
            "--debug",
            "--debug-log=/d/",
            "--metric-server=/m",
            "--systemd-cgroup",
            "--directfs=false",
        ];
        for flag in wanted {
            assert!(flags.args.iter().any(|arg| arg == flag), "{flag}");
        }
        assert!(flags.restore && !flags.args.iter().any(|arg| arg.contains("restore")));
        // System calls are logged nowhere without a directory.
        let config = Config { heeded: vec!["strace".into()], ..Config::default() };
        let asked = HashMap::from([(format!("{ANNOTATION_PREFIX}strace"), "true".to_owned())]);
        assert!(config.flags(&asked, false).unwrap_err().contains("debug_log"));
    }

    #[test]
    fn a_mistake_is_named_with_its_key() {
        for (text, words) in [
            ("[runsc]\nplatform = \"xen\"", "runsc.platform"),
            ("[runsc]\nfile_access = \"x\"", "runsc.file_access"),
            ("[runsc]\nfile_access = \"shared\"", "overlay2 = \"none\""),
            ("[runsc]\noverlay2 = \"root:dir=x\"", "runsc.overlay2"),
            ("[runsc]\nargs = [\"--root=/x\"]", "--root is the daemon's own"),
            ("[runsc]\nargs = [\"x\"]", "is no flag"),
            ("[runsc]\nargs = [\"--platform=kvm\"]", "runsc.platform"),
            ("[runsc]\nargs = [\"-systemd-cgroup\"]", "runsc.systemd_cgroup"),
            ("[runsc]\nargs = [\"--debug\"]", "runsc.debug_log"),
            ("[runsc]\nstrace = true", "debug_log"),
            ("[runsc]\ndebug_log = \"x\"", "absolute"),
            ("[runsc_timeouts]\ncreate = \"0s\"", "runsc_timeouts.create"),
            ("warm_cgroups = \"1h\"", "warm_cgroups"),
            ("shm_size = 1", "shm_size"),
        ] {
            let error = parse(text).check().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert!(toml::from_str::<Config>("[runsc]\nplatfrom = \"kvm\"").is_err());
    }
}

//! The configuration file of `quark-sandboxer`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_daemon::common::CommonConfig;
use serde::Deserialize;

/// What `quark-sandboxer.toml` has beside [`CommonConfig`]. Every key has a default; unknown keys
/// are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Quark's program.
    pub quark: QuarkConfig,
    /// How long Quark may take.
    pub quark_timeouts: Limits,
    /// Size of a pod's `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Sysctls that a pod may ask for and does not get: Quark's kernel has none of them.
    pub ignored_sysctls: Vec<String>,
    /// From [`CommonConfig`]: how long an exit waits for the output before it.
    #[serde(skip)]
    pub drain: Duration,
}

/// Quark's program.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuarkConfig {
    /// Program, as an absolute path or a name to be found in `PATH`.
    pub path: PathBuf,
    /// Further arguments in front of `sandbox`.
    pub args: Vec<String>,
    /// The device by which Quark makes virtual machines.
    pub kvm: PathBuf,
}

/// How long Quark may take.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Starting a sandbox: until its Task server answers.
    #[serde(with = "kuasar_host::duration")]
    pub start: Duration,
    /// Making, starting or deleting a container or an exec.
    #[serde(with = "kuasar_host::duration")]
    pub create: Duration,
    /// Any other answer.
    #[serde(with = "kuasar_host::duration")]
    pub other: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let minute = Duration::from_secs(60);
        Self { start: minute, create: minute, other: Duration::from_secs(30) }
    }
}

impl Default for QuarkConfig {
    fn default() -> Self {
        Self { path: "quark".into(), args: Vec::new(), kvm: "/dev/kvm".into() }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            quark: QuarkConfig::default(),
            quark_timeouts: Limits::default(),
            shm_size: 64 << 20,
            ignored_sysctls: Vec::new(),
            drain: Duration::from_secs(5),
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
            own.drain = common.timeouts.output;
        };
        kuasar_daemon::config::load_checked(file, adopt, Self::check)
    }

    /// What is wrong with it, in words that name the key.
    ///
    /// # Errors
    /// The first value without sense.
    pub fn check(&self) -> Result<(), String> {
        if self.quark.path.as_os_str().is_empty() {
            return Err("quark.path: the program quark, as a name or an absolute path".into());
        }
        if !self.quark.kvm.is_absolute() {
            return Err(format!("quark.kvm = {:?}: an absolute path", self.quark.kvm));
        }
        for own in ["-r", "--root", "sandbox"] {
            if self.quark.args.iter().any(|arg| arg == own) {
                return Err(format!("quark.args: {own} is the daemon's own"));
            }
        }
        let limits = &self.quark_timeouts;
        for (key, value) in
            [("start", limits.start), ("create", limits.create), ("other", limits.other)]
        {
            if value.is_zero() || value > Duration::from_secs(3600) {
                return Err(format!("quark_timeouts.{key}: more than nothing and at most 1h"));
            }
        }
        if self.shm_size < 4096 {
            return Err(format!("shm_size = {}: at least 4096 bytes", self.shm_size));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_good_and_what_has_no_sense_is_named() {
        Config::default().check().unwrap();
        for (text, key) in [
            ("[quark]\npath = \"\"", "quark.path"),
            ("[quark]\nkvm = \"kvm\"", "quark.kvm"),
            ("[quark]\nargs = [\"-r\"]", "quark.args"),
            ("[quark_timeouts]\nstart = \"0s\"", "quark_timeouts.start"),
            ("shm_size = 1", "shm_size"),
        ] {
            let error = toml::from_str::<Config>(text).unwrap().check().unwrap_err();
            assert!(error.contains(key), "{text}: {error}");
        }
        assert!(toml::from_str::<Config>("[quark]\nwhat = 1").is_err());
    }

    #[test]
    fn the_packaged_configuration_names_every_default() {
        let text = include_str!("../../packaging/quark-sandboxer.toml");
        let plain = |line: &str| line.starts_with('#') && !line.starts_with("# ");
        let on: String = text
            .lines()
            .map(|line| if plain(line) { line.trim_start_matches('#') } else { line })
            .filter(|line| !line.starts_with('#'))
            .map(|line| format!("{line}\n"))
            .collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), on).unwrap();
        let (_, own) = Config::load(Some(file.path())).unwrap();
        assert_eq!(format!("{own:?}"), format!("{:?}", Config::default()));
    }
}

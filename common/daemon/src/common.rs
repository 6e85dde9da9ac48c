//! The settings that every daemon has, with their defaults and bounds.
//!
//! A daemon keeps them in its configuration's top level beside its own: see
//! [`crate::config::load_with_common`].

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use kuasar_host::duration;
use serde::{Deserialize, Serialize};

pub use crate::traces::Tracing;

/// Most connections to all pods' sockets.
const MAX_POD_CONNECTIONS: u32 = 60_000;
/// Most events that are kept.
const MAX_RECENT_EVENTS: u32 = 65_536;
/// Most sandboxes.
const MAX_SANDBOXES: u32 = 4096;
/// Longest time that calls wait for a daemon.
const MAX_HOLD: Duration = Duration::from_secs(600);

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line; with priorities under systemd.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
    /// As `text`, with journald's priority prefixes always.
    Journal,
}

/// Settings that all daemons share.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CommonConfig {
    /// Socket of the sandbox Controller: a path. Unset: `<dir>/sandboxer.sock`.
    pub listen: Option<PathBuf>,
    /// State directory, on a tmpfs. Unset: `/run/kuasar-<kind>`.
    pub dir: Option<PathBuf>,
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter. Unset: `info`.
    pub log_level: Option<String>,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Where metrics are served: a path or a loopback `address:port`; empty: nowhere. Unset:
    /// `<dir>/metrics.sock`.
    pub metrics_listen: Option<String>,
    /// containerd's ttrpc socket, to which task events go; empty: nowhere. Unset:
    /// `/run/containerd/containerd.sock.ttrpc`.
    pub events_address: Option<String>,
    /// sandbox-parent's program. Unset: beside the daemon's own, then in `PATH`.
    pub parent_binary: Option<PathBuf>,
    /// Users that may connect beside root and the daemon's own.
    pub allowed_uids: Vec<u32>,
    /// Pod annotations that are heeded; all others are ignored.
    pub allowed_annotations: Vec<String>,
    /// Bounds of what a peer can make grow.
    pub limits: Limits,
    /// How long things outside may take.
    pub timeouts: Timeouts,
    /// Traces for an OpenTelemetry collector.
    pub tracing: Tracing,
}

impl CommonConfig {
    /// Keys of the top level, by which [`crate::config`] tells them from a daemon's own.
    pub const KEYS: [&'static str; 12] = [
        "listen",
        "dir",
        "log_level",
        "log_format",
        "metrics_listen",
        "events_address",
        "parent_binary",
        "allowed_uids",
        "allowed_annotations",
        "limits",
        "timeouts",
        "tracing",
    ];

    /// Where metrics are served when the state directory is `dir`; empty: nowhere.
    pub fn metrics_address(&self, dir: &Path) -> String {
        let default = || dir.join("metrics.sock").display().to_string();
        self.metrics_listen.clone().unwrap_or_else(default)
    }

    /// Where task events go; empty: nowhere.
    pub fn events(&self) -> &str {
        self.events_address.as_deref().unwrap_or("/run/containerd/containerd.sock.ttrpc")
    }

    /// Whether a pod's annotation is heeded.
    pub fn heeds(&self, annotation: &str) -> bool {
        self.allowed_annotations.iter().any(|a| a == annotation)
    }

    /// What is wrong with the values, in words that name the key.
    ///
    /// # Errors
    /// The first value without sense.
    pub fn check(&self) -> Result<(), String> {
        self.tracing.check()?;
        crate::logging::check(self.log_level.as_deref().unwrap_or("info"))?;
        let metrics = self.metrics_listen.as_deref().unwrap_or_default();
        if !metrics.is_empty() {
            crate::metrics::check(metrics).map_err(|e| format!("metrics_listen: {e}"))?;
        }
        let l = &self.limits;
        for (key, value) in [
            ("max_message_bytes", l.max_message_bytes),
            ("max_connections", l.max_connections),
            ("max_pod_connections", l.max_pod_connections),
            ("max_pod_backlog", l.max_pod_backlog),
            ("max_streams", l.max_streams),
            ("max_sandboxes", l.max_sandboxes),
            ("max_sandbox_bytes", l.max_sandbox_bytes),
            ("max_containers", l.max_containers),
            ("max_execs", l.max_execs),
            ("max_unsent_events", l.max_unsent_events),
            ("max_recent_events", l.max_recent_events),
            ("parallel_starts", l.parallel_starts),
            ("parallel_recoveries", l.parallel_recoveries),
        ] {
            if value == 0 {
                return Err(format!("limits.{key} = 0: at least 1 is needed"));
            }
        }
        // sandbox-parent's tables end there, and memory.
        for (key, value, most) in [
            ("max_pod_connections", l.max_pod_connections, MAX_POD_CONNECTIONS),
            ("max_sandboxes", l.max_sandboxes, MAX_SANDBOXES),
            ("max_recent_events", l.max_recent_events, MAX_RECENT_EVENTS),
        ] {
            if value > most {
                return Err(format!("limits.{key} = {value}: at most {most}"));
            }
        }
        if l.max_streams < l.max_sandboxes {
            return Err(format!(
                "limits.max_streams = {} is less than limits.max_sandboxes = {}: containerd keeps \
                 one call open for each sandbox",
                l.max_streams, l.max_sandboxes
            ));
        }
        let t = &self.timeouts;
        for (key, value) in [
            ("start", t.start),
            ("stop", t.stop),
            ("stuck", t.stuck),
            ("read", t.read),
            ("recover", t.recover),
            ("opened", t.opened),
            ("unstarted", t.unstarted),
            ("finish", t.finish),
            ("output", t.output),
            ("parent", t.parent),
            ("hello", t.hello),
        ] {
            if value.is_zero() || value > Duration::from_secs(86_400) {
                return Err(format!("timeouts.{key}: more than nothing and at most 24h"));
            }
        }
        if t.hold > MAX_HOLD {
            return Err("timeouts.hold: at most 10m, or 0s".into());
        }
        Ok(())
    }
}

/// Bounds of what a peer can make grow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Largest gRPC message in bytes, either way. containerd's own bound is 16 MiB; that of ttrpc
    /// is 4 MiB and fixed.
    pub max_message_bytes: u32,
    /// Connections to the daemon's socket at the same time.
    pub max_connections: u32,
    /// Connections to all pods' sockets at the same time: one per container and per stream.
    pub max_pod_connections: u32,
    /// Connections to one pod's socket that wait to be served.
    pub max_pod_backlog: u32,
    /// Calls at the same time on one gRPC connection.
    pub max_streams: u32,
    /// Sandboxes.
    pub max_sandboxes: u32,
    /// Bytes of one sandbox' configuration and extensions together.
    pub max_sandbox_bytes: u32,
    /// Containers of one pod.
    pub max_containers: u32,
    /// Execs of one container that are not deleted.
    pub max_execs: u32,
    /// Events that wait for containerd; beyond, the oldest are dropped and counted.
    pub max_unsent_events: u32,
    /// Events that are kept for `kuasar-ctl events`; some 300 bytes each.
    pub max_recent_events: u32,
    /// Sandboxes that are created or started at the same time; others wait their turn.
    pub parallel_starts: u32,
    /// Sandboxes that are taken up at the same time when the daemon starts.
    pub parallel_recoveries: u32,
    /// Unreadable records that are kept for a look.
    pub max_quarantine: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message_bytes: 16 << 20,
            max_connections: 256,
            max_pod_connections: 16_384,
            max_pod_backlog: 256,
            max_streams: 4096,
            max_sandboxes: 1024,
            max_sandbox_bytes: 8 << 20,
            max_containers: 512,
            max_execs: 1024,
            max_unsent_events: 4096,
            max_recent_events: 256,
            parallel_starts: 32,
            parallel_recoveries: 16,
            max_quarantine: 64,
        }
    }
}

/// How long things outside may take where the caller gives no deadline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// Create, and Start, of a sandbox.
    #[serde(with = "duration")]
    pub start: Duration,
    /// Grace of a Stop that names none (containerd never does).
    #[serde(with = "duration")]
    pub stop: Duration,
    /// A step of a sandbox that takes longer counts as failed.
    #[serde(with = "duration")]
    pub stuck: Duration,
    /// Verbose status and metrics.
    #[serde(with = "duration")]
    pub read: Duration,
    /// Taking up one sandbox when the daemon starts.
    #[serde(with = "duration")]
    pub recover: Duration,
    /// A socket that a shim opened and no sandbox followed is closed after this time.
    #[serde(with = "duration")]
    pub opened: Duration,
    /// A sandbox that was created and not started is removed after this time, and so is an empty
    /// one that the engine does not name after a restart of the daemon.
    #[serde(with = "duration")]
    pub unstarted: Duration,
    /// What runs when the daemon is told to end.
    #[serde(with = "duration")]
    pub finish: Duration,
    /// How long an exit waits for its output to be read (terminals and streams).
    #[serde(with = "duration")]
    pub output: Duration,
    /// Answers of sandbox-parent.
    #[serde(with = "duration")]
    pub parent: Duration,
    /// How long a new connection may say nothing.
    #[serde(with = "duration")]
    pub hello: Duration,
    /// How long calls to a pod's socket wait for a daemon while there is none; `0s`: they are
    /// refused at once. Counts when sandbox-parent is started.
    #[serde(with = "duration")]
    pub hold: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            start: s(120),
            stop: s(10),
            stuck: s(300),
            read: s(5),
            recover: s(30),
            opened: s(120),
            unstarted: s(60),
            finish: s(3),
            output: s(5),
            parent: s(10),
            hello: s(10),
            hold: s(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_come_back_from_their_own_text_and_the_keys_are_all() {
        let c = CommonConfig { listen: Some("/a".into()), dir: Some("/b".into()), ..sample() };
        let text = toml::to_string(&c).unwrap();
        assert_eq!(toml::from_str::<CommonConfig>(&text).unwrap(), c);
        let table: toml::Table = text.parse().unwrap();
        assert!(table.keys().all(|k| CommonConfig::KEYS.contains(&k.as_str())));
        assert_eq!(table.len(), CommonConfig::KEYS.len());
    }

    #[test]
    fn values_without_sense_are_named() {
        CommonConfig::default().check().unwrap();
        for (text, key) in [
            ("[limits]\nmax_execs = 0", "limits.max_execs"),
            ("[limits]\nmax_streams = 100", "limits.max_streams"),
            ("[limits]\nmax_sandboxes = 4097\nmax_streams = 5000", "limits.max_sandboxes"),
            ("[limits]\nmax_pod_connections = 60001", "limits.max_pod_connections"),
            ("[timeouts]\nstop = '0s'", "timeouts.stop"),
            ("[timeouts]\nstuck = '25h'", "timeouts.stuck"),
            ("[timeouts]\nhold = '601s'", "timeouts.hold"),
            ("[tracing]\nendpoint = 'here:4318'", "tracing.endpoint"),
            ("log_level = 'info,a=loud'", "log_level"),
            ("metrics_listen = '0.0.0.0:9000'", "metrics_listen"),
            ("metrics_listen = 'run/m.sock'", "metrics_listen"),
        ] {
            let error = toml::from_str::<CommonConfig>(text).unwrap().check().unwrap_err();
            assert!(error.contains(key), "{error}");
        }
        for good in ["", "/run/m.sock", "127.0.0.1:9000", "[::1]:9000"] {
            let metrics_listen = Some(good.to_owned());
            CommonConfig { metrics_listen, ..CommonConfig::default() }.check().unwrap();
        }
    }

    fn sample() -> CommonConfig {
        CommonConfig {
            log_level: Some("info".into()),
            metrics_listen: Some("/m".into()),
            events_address: Some("/e".into()),
            parent_binary: Some("/p".into()),
            ..CommonConfig::default()
        }
    }
}

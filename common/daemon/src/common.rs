//! The settings that every daemon has, with their defaults and bounds.
//!
//! A daemon keeps them in its configuration's top level beside its own: see
//! [`crate::config::load_with_common`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

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
    /// Socket of the sandbox Controller: a path. Unset: the daemon's own default.
    pub listen: Option<PathBuf>,
    /// State directory, on a tmpfs. Unset: the daemon's own default.
    pub dir: Option<PathBuf>,
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter. Unset: `info`.
    pub log_level: Option<String>,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Where metrics are served: a path or a loopback `address:port`. Unset: `<dir>/metrics.sock`.
    pub metrics_listen: Option<String>,
    /// Users that may connect beside root and the daemon's own.
    pub allowed_uids: Vec<u32>,
    /// Bounds of what a peer can make grow.
    pub limits: Limits,
    /// How long things outside may take.
    pub timeouts: Timeouts,
}

impl CommonConfig {
    /// Keys of the top level, by which [`crate::config`] tells them from a daemon's own.
    pub const KEYS: [&'static str; 8] = [
        "listen",
        "dir",
        "log_level",
        "log_format",
        "metrics_listen",
        "allowed_uids",
        "limits",
        "timeouts",
    ];

    /// Where metrics are served when the state directory is `dir`.
    pub fn metrics_address(&self, dir: &Path) -> String {
        let default = || dir.join("metrics.sock").display().to_string();
        self.metrics_listen.clone().unwrap_or_else(default)
    }
}

/// Bounds of what a peer can make grow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Largest message, in bytes. containerd's own bound is 16 MiB.
    pub max_message_bytes: u32,
    /// Connections at the same time, per socket.
    pub max_connections: u32,
    /// How long a connection may take to send its first bytes.
    #[serde(with = "duration")]
    pub idle_header_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message_bytes: 16 << 20,
            max_connections: 256,
            idle_header_timeout: Duration::from_secs(10),
        }
    }
}

/// How long things outside may take where the caller gives no deadline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// Making a sandbox.
    #[serde(with = "duration")]
    pub create: Duration,
    /// Starting it until its task server answers.
    #[serde(with = "duration")]
    pub start: Duration,
    /// Stopping it, after which it is killed.
    #[serde(with = "duration")]
    pub stop: Duration,
    /// Finding the pods again after a restart of the daemon.
    #[serde(with = "duration")]
    pub recover: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            create: Duration::from_secs(30),
            start: Duration::from_secs(60),
            stop: Duration::from_secs(30),
            recover: Duration::from_secs(60),
        }
    }
}

/// Durations as text with units, such as `250ms`, `10s`, `1m30s`; for `#[serde(with = …)]`.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Parses a duration; a number needs its unit: `us`, `ms`, `s`, `m` or `h`.
    ///
    /// # Errors
    /// A text that says what would be right.
    pub fn parse(text: &str) -> Result<Duration, String> {
        let wrong = || format!("{text:?} is no duration: use for example \"500ms\", \"10s\", \"1m30s\"");
        let (mut total, mut rest) = (Duration::ZERO, text.trim());
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
            let (number, tail) = rest.split_at(digits);
            let unit_end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit_end);
            let n: u64 = number.parse().map_err(|_| wrong())?;
            let micros: u64 = match unit.trim() {
                "us" => 1,
                "ms" => 1_000,
                "s" => 1_000_000,
                "m" => 60_000_000,
                "h" => 3_600_000_000,
                _ => return Err(wrong()),
            };
            let part = n.checked_mul(micros).map(Duration::from_micros).ok_or_else(wrong)?;
            total = total.checked_add(part).ok_or_else(wrong)?;
            rest = tail;
        }
        Ok(total)
    }

    /// For serde.
    ///
    /// # Errors
    /// See [`parse`].
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        parse(&String::deserialize(d)?).map_err(D::Error::custom)
    }

    /// For serde.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(value: &Duration, s: S) -> Result<S::Ok, S::Error> {
        let micros = value.as_micros();
        let text = match micros {
            m if m % 1_000_000 == 0 => format!("{}s", m / 1_000_000),
            m if m % 1_000 == 0 => format!("{}ms", m / 1_000),
            m => format!("{m}us"),
        };
        s.serialize_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        let ms = |t| duration::parse(t).map(|d| d.as_millis());
        assert_eq!(ms("250ms"), Ok(250));
        assert_eq!(ms("1m30s"), Ok(90_000));
        assert_eq!(ms("2 h"), Ok(7_200_000));
        for bad in ["", "5", "s", "1x", "-1s", "1.5s", "99999999999999999999s", "18446744073709551615h"] {
            assert!(ms(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn defaults_come_back_from_their_own_text_and_the_keys_are_all() {
        let c = CommonConfig { listen: Some("/a".into()), dir: Some("/b".into()), ..sample() };
        let text = toml::to_string(&c).unwrap();
        assert_eq!(toml::from_str::<CommonConfig>(&text).unwrap(), c);
        let table: toml::Table = text.parse().unwrap();
        assert!(table.keys().all(|k| CommonConfig::KEYS.contains(&k.as_str())));
        assert_eq!(table.len(), CommonConfig::KEYS.len());
    }

    fn sample() -> CommonConfig {
        CommonConfig {
            log_level: Some("info".into()),
            metrics_listen: Some("/m".into()),
            ..CommonConfig::default()
        }
    }
}

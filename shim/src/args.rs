//! The command line as Go's `flag` package reads it: `-name value`, `-name=value`, one dash or
//! two, switches without a value, and the action last.

use std::path::PathBuf;

use crate::Error;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Version,
    Info,
    Start,
    Delete,
}

/// The command line, read.
#[derive(Debug)]
pub(crate) struct Args {
    pub(crate) action: Action,
    pub(crate) namespace: String,
    pub(crate) id: String,
    bundle: Option<PathBuf>,
}

impl Args {
    pub(crate) fn parse(words: impl Iterator<Item = String>) -> Result<Self, Error> {
        let usage = |text: String| {
            Error::Usage(format!(
                "{text}; use -v, -info, or [-namespace -id -bundle …] start|delete"
            ))
        };
        let mut action = None;
        let (mut namespace, mut id, mut bundle) = (String::new(), String::new(), None);
        let mut words = words;
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix('-') else {
                action = match word.as_str() {
                    "start" => Some(Action::Start),
                    "delete" => Some(Action::Delete),
                    other => return Err(usage(format!("unknown command {other:?}"))),
                };
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (flag, mut given) = match flag.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = || {
                given
                    .take()
                    .or_else(|| words.next())
                    .ok_or_else(|| usage(format!("-{flag} needs a value")))
            };
            match flag {
                "v" | "version" => action = Some(Action::Version),
                "info" => action = Some(Action::Info),
                "debug" => {} // Nothing more to say.
                "namespace" => namespace = value()?,
                "id" => id = value()?,
                "bundle" => bundle = Some(value()?.into()),
                // What containerd says to shims that publish events; the daemon does that.
                "address" | "publish-binary" | "socket" => drop(value()?),
                other => return Err(usage(format!("unknown flag -{other}"))),
            }
        }
        let action = action.ok_or_else(|| usage("no command".into()))?;
        Ok(Self { action, namespace, id, bundle })
    }

    /// The bundle; containerd's own working directory for us is the default.
    pub(crate) fn bundle(&self) -> Result<PathBuf, Error> {
        match &self.bundle {
            Some(path) => Ok(path.clone()),
            None => std::env::current_dir()
                .map_err(|source| Error::Io { what: "no bundle and no working directory", source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Error> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerds_command_lines_are_understood() {
        let a = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/c -id abc -debug start",
        )
        .unwrap();
        assert_eq!((a.action, &*a.namespace, &*a.id), (Action::Start, "k8s.io", "abc"));
        let a = parse("--namespace=x --id=y --bundle=/b delete").unwrap();
        assert_eq!((a.action, a.bundle().unwrap()), (Action::Delete, "/b".into()));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn nonsense_is_refused_with_the_usage() {
        for bad in ["", "-id", "stop", "-frobnicate start"] {
            assert!(parse(bad).unwrap_err().to_string().contains("use -v"), "{bad}");
        }
    }
}

//! What goes wrong, and the exit code of each.

use std::path::{Path, PathBuf};

/// Result of this program's parts.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line asks for something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// No daemon answers.
    #[error("no daemon answers at {}: {why}", .address.display())]
    Unreachable {
        /// Its socket.
        address: PathBuf,
        /// What happened instead.
        why: String,
    },
    /// What was named does not exist.
    #[error("{0}")]
    NotFound(String),
    /// A daemon has refused.
    #[error("{text}")]
    Refused {
        /// gRPC's code.
        code: ttrpc::Code,
        /// In the daemon's words.
        text: String,
    },
    /// Something of the host.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Anything else.
    #[error("{0}")]
    Failed(String),
    /// `check` has found something, and has said so.
    #[error("something is missing or wrong")]
    Findings,
    /// Whoever read our output has gone.
    #[error("nobody reads the output")]
    Closed,
    /// Not an error: a process has ended with this code.
    #[error("exit code {0}")]
    Exit(u8),
}

impl Error {
    /// The exit code of the program; docs/kuasar-ctl.md has the table.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Refused { .. } | Self::Io { .. } | Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Unreachable { .. } => 3,
            Self::NotFound(_) => 4,
            Self::Findings => 5,
            Self::Closed => 0,
            Self::Exit(code) => *code,
        }
    }

    /// The same for commands that answer a process' own exit code: ours is 125 there.
    pub fn exit_code_beside_process(&self) -> u8 {
        match self {
            Self::Exit(code) => *code,
            Self::Closed => 0,
            Self::Usage(_) => 2,
            _ => 125,
        }
    }

    /// Wraps an error of the host.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// The same for something that was done to a path.
    pub fn at(doing: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        Self::io(format!("{doing} {}", path.display()))
    }
}

impl From<kuasar_host::Error> for Error {
    fn from(error: kuasar_host::Error) -> Self {
        let source = std::error::Error::source(&error).map(|s| format!(": {s}"));
        Self::Failed(format!("{error}{}", source.unwrap_or_default()))
    }
}

impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(s) if s.code() == ttrpc::Code::NOT_FOUND => {
                Self::NotFound(s.message)
            }
            ttrpc::Error::RpcStatus(s) => Self::Refused { code: s.code(), text: s.message },
            other => Self::Failed(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_own_code_is_passed_on_and_our_failures_are_125() {
        assert_eq!(Error::Exit(7).exit_code_beside_process(), 7);
        assert_eq!(Error::NotFound("x".into()).exit_code_beside_process(), 125);
        assert_eq!(Error::NotFound("x".into()).exit_code(), 4);
        assert_eq!(Error::Usage("x".into()).exit_code_beside_process(), 2);
    }
}

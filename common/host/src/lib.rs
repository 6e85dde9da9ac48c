//! What sandboxers do to a host: cgroups, mounts, namespaces, safe paths, durable records and
//! lossless edits of OCI specs. Synchronous; callers move blocking work off their async threads.

pub mod cgroup;
pub mod dns;
pub mod id;
pub mod mount;
pub mod namespace;
pub mod process;
pub mod record;
pub mod safe_path;
pub mod spec;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something could not be done to the host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{context}")]
    Io {
        /// What was being done.
        context: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A value from outside is not acceptable; the text says what would be.
    #[error("{0}")]
    Invalid(String),
    /// A record is torn, of another kind, or of a newer version.
    #[error("{0}")]
    Record(String),
}

impl Error {
    /// `errno`, where a system call failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Adds what was being done to a failed system call.
pub trait Context<T> {
    /// `context` is only made on failure.
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::Io { context: context().into(), source: e.into() })
    }
}

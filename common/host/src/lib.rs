//! What sandboxers do to a host: cgroups, mounts, namespaces, safe paths, durable records and
//! lossless edits of OCI specs. Synchronous; callers move blocking work off their async threads.

pub mod capability;
pub mod cgroup;
pub mod dns;
pub mod duration;
pub mod id;
pub mod inside;
pub mod live;
pub mod loopback;
pub mod mount;
pub mod namespace;
pub mod netlink;
pub mod packet;
pub mod process;
pub mod record;
pub mod safe_path;
pub mod socket;
pub mod spec;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod xattr;

use std::path::PathBuf;

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
    /// A value from outside asks for something that this host or this program does not do.
    #[error("{0}")]
    Unsupported(String),
    /// A record is cut off or no JSON: quarantine it.
    #[error("{0} is torn: {1}")]
    Torn(PathBuf, String),
    /// A record is whole but not of the kind that is expected here: quarantine it.
    #[error("{0} is foreign: {1}")]
    Foreign(PathBuf, String),
    /// A record was written by a newer program: leave it where it is.
    #[error("{path} is a record of version {found}; this program knows {known} and older")]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that this program reads.
        known: u32,
    },
    /// Something outside did not happen in time.
    #[error("{0}")]
    Deadline(String),
}

/// What a caller can do about an [`Error`]: the kinds that map onto gRPC codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is wrong.
    Invalid,
    /// What was named does not exist.
    NotFound,
    /// It exists already.
    Exists,
    /// This program may not.
    Denied,
    /// Memory, disk, descriptors or another limit is used up.
    Exhausted,
    /// This host or this program cannot.
    Unsupported,
    /// It did not happen in time.
    Deadline,
    /// Stored data is damaged or not ours.
    DataLoss,
    /// Anything else.
    Internal,
}

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid(_) => Kind::Invalid,
            Self::Unsupported(_) => Kind::Unsupported,
            Self::Torn(..) | Self::Foreign(..) | Self::TooNew { .. } => Kind::DataLoss,
            Self::Deadline(_) => Kind::Deadline,
            Self::Io { source, .. } => match source.raw_os_error() {
                Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::ENXIO) => Kind::NotFound,
                Some(libc::EEXIST) => Kind::Exists,
                Some(libc::EPERM | libc::EACCES | libc::EROFS) => Kind::Denied,
                Some(libc::ENOSPC | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EDQUOT) => {
                    Kind::Exhausted
                }
                Some(libc::ENOSYS | libc::EOPNOTSUPP) => Kind::Unsupported,
                Some(libc::EINVAL | libc::ELOOP | libc::EXDEV | libc::ENAMETOOLONG) => {
                    Kind::Invalid
                }
                _ => Kind::Internal,
            },
        }
    }

    /// `errno`, where a system call failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Bytes in hexadecimal digits, small letters.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// An error with the whole chain of its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
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

#[cfg(test)]
mod tests {
    #[test]
    fn every_byte_has_two_digits() {
        assert_eq!(super::hex(&[0, 0x0f, 0xa0, 0xff]), "000fa0ff");
        assert_eq!(super::hex(&[]), "");
    }
}

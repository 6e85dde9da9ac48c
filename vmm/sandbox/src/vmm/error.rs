//! Why a VMM could not do something, and what that is in the codes of the engines' protocols.

use std::io;
use std::time::Duration;

use super::Kind;

/// Result of the VMM layer.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something could not be done with a VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VMM, or this machine type of it, cannot.
    #[error("{vmm} cannot {what}: {way_out}")]
    Unsupported {
        /// The VMM, with its machine type where that matters.
        vmm: String,
        /// What was asked for.
        what: String,
        /// What to do instead.
        way_out: String,
    },
    /// The description of the machine is wrong; the text says what would be right.
    #[error("{0}")]
    Invalid(String),
    /// All slots, ports or descriptors of this machine are taken.
    #[error("{0}")]
    Exhausted(String),
    /// No such device in this machine.
    #[error("the machine has no device {0}")]
    NoDevice(String),
    /// A device of this name is there already.
    #[error("the machine has a device {0} already")]
    DeviceExists(String),
    /// A program is missing on this host.
    #[error("program {0} is not installed: set its path in the configuration")]
    NoProgram(String),
    /// A VMM or helper ended where it should have run on.
    #[error("{program} has ended with status {status}{}", words(said))]
    Ended {
        /// Which program.
        program: String,
        /// Exit code, or 128 + signal.
        status: u32,
        /// The last of what it wrote to its standard error, cleaned and bounded; may be empty.
        said: String,
    },
    /// The VMM answered a command with an error.
    #[error("{vmm} refused {command}: {reason}")]
    Refused {
        /// The VMM.
        vmm: Kind,
        /// Command or request.
        command: String,
        /// Its words, cleaned and bounded.
        reason: String,
    },
    /// What it sent is not its protocol.
    #[error("{vmm} does not speak its protocol: {reason}")]
    Protocol {
        /// The VMM.
        vmm: Kind,
        /// What was wrong.
        reason: String,
    },
    /// It did not answer, or not do it, in time.
    #[error("{what} did not happen within {limit:?}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// The machine has ended.
    #[error("the machine has ended")]
    Gone,
    /// The stored state of the machine does not fit: another program's, or another version's.
    #[error("cannot take up the machine again: {0}")]
    State(String),
    /// A system call failed.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// sandbox-parent could not do its part.
    #[error("cannot {what}")]
    Parent {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: sandbox_parent::client::ParentError,
    },
    /// Something on the host could not be done.
    #[error(transparent)]
    Host(#[from] kuasar_host::Error),
}

fn words(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(": {said}") }
}

/// Adds what was being done to a failed system call.
pub(crate) trait Doing<T> {
    /// `what` is only made on failure; it follows the word "cannot".
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::Io { what: what().into(), source: e.into() })
    }
}

/// The kinds that map onto gRPC codes.
enum Code {
    Invalid,
    NotFound,
    Exists,
    Exhausted,
    Unimplemented,
    Deadline,
    Precondition,
    Unavailable,
    Internal,
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::Invalid(_) => Code::Invalid,
            Self::Exhausted(_) => Code::Exhausted,
            Self::NoDevice(_) => Code::NotFound,
            Self::DeviceExists(_) => Code::Exists,
            Self::NoProgram(_) | Self::Gone | Self::State(_) => Code::Precondition,
            Self::Deadline { .. } => Code::Deadline,
            Self::Parent { source: sandbox_parent::client::ParentError::Timeout(_), .. } => {
                Code::Deadline
            }
            Self::Parent { source: sandbox_parent::client::ParentError::Lost, .. } => {
                Code::Unavailable
            }
            Self::Host(error) => match error.kind() {
                kuasar_host::Kind::Invalid => Code::Invalid,
                kuasar_host::Kind::Exhausted => Code::Exhausted,
                kuasar_host::Kind::Unsupported => Code::Unimplemented,
                kuasar_host::Kind::Deadline => Code::Deadline,
                _ => Code::Internal,
            },
            Self::Io { source, .. } => match source.raw_os_error() {
                Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSPC | libc::EDQUOT) => {
                    Code::Exhausted
                }
                _ => Code::Internal,
            },
            Self::Ended { .. }
            | Self::Refused { .. }
            | Self::Protocol { .. }
            | Self::Parent { .. } => Code::Internal,
        }
    }

    /// The whole chain of causes in one line.
    pub fn chain(&self) -> String {
        kuasar_host::chain(self)
    }
}

/// Both servers have the same variants, one for each gRPC code that engines act on.
macro_rules! to_server {
    ($server:path) => {
        impl From<Error> for $server {
            fn from(error: Error) -> Self {
                match error.code() {
                    Code::Invalid => Self::InvalidArgument(error.chain()),
                    Code::NotFound => Self::NotFound(error.chain()),
                    Code::Exists => Self::AlreadyExists(error.chain()),
                    Code::Exhausted => Self::ResourceExhausted(error.chain()),
                    Code::Unimplemented => Self::Unimplemented(error.chain()),
                    Code::Deadline => Self::DeadlineExceeded(error.chain()),
                    Code::Precondition => Self::FailedPrecondition(error.chain()),
                    Code::Unavailable => Self::Unavailable(error.chain()),
                    Code::Internal => Self::internal("virtual machine", error),
                }
            }
        }
    };
}

to_server!(containerd_task::error::Error);
to_server!(containerd_sandbox::error::Error);

/// Makes words of a VMM or a guest fit for an error or a log: one line, no control characters,
/// at most `most` characters, the last ones.
pub(crate) fn clean(words: &[u8], most: usize) -> String {
    let text = String::from_utf8_lossy(words);
    let text = text.trim();
    let skip = text.chars().count().saturating_sub(most);
    text.chars().skip(skip).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unsupported_is_told_as_unimplemented_with_the_way_out() {
        let error = Error::Unsupported {
            vmm: "qemu microvm".into(),
            what: "plug a disk".into(),
            way_out: "use machine q35".into(),
        };
        let error = containerd_task::error::Error::from(error);
        assert!(matches!(&error, containerd_task::error::Error::Unimplemented(text)
            if text == "qemu microvm cannot plug a disk: use machine q35"));
    }

    #[test]
    fn a_guests_words_are_bounded_and_of_one_line() {
        assert_eq!(clean(b"a\nb\x1b[31m", 80), "a b [31m");
        assert_eq!(clean("äöü".repeat(100).as_bytes(), 3), "äöü");
        assert_eq!(clean(b"\xff", 3), "\u{fffd}");
    }
}

//! Why a guest did not do something.

use std::time::Duration;

/// Most characters of a guest's text that get into an error or a log.
const QUOTED: usize = 300;

/// Why a guest did not do something.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The connection could not be made, or broke. The call may have been done.
    #[error("the guest cannot be reached: {0}")]
    Broken(String),
    /// The guest answered an error.
    #[error("{message}")]
    Refused {
        /// Its code.
        code: ttrpc::Code,
        /// Its words, bounded and cleaned.
        message: String,
    },
    /// The answer makes no sense.
    #[error("the guest answered nonsense: {0}")]
    Nonsense(String),
    /// No answer in time.
    #[error("the guest did not answer {what} within {limit:?}")]
    Deadline {
        /// What was asked.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// The guest has ended: its machine, or the process that it is.
    #[error("the machine has ended")]
    Gone,
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, GuestError>;

impl GuestError {
    /// Whether the guest does not know what was asked for.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: ttrpc::Code::NOT_FOUND, .. })
    }
}

impl From<GuestError> for containerd_task::error::Error {
    fn from(error: GuestError) -> Self {
        use ttrpc::Code;
        match error {
            GuestError::Refused { code, message } => match code {
                Code::NOT_FOUND => Self::NotFound(message),
                Code::ALREADY_EXISTS => Self::AlreadyExists(message),
                Code::INVALID_ARGUMENT => Self::InvalidArgument(message),
                Code::FAILED_PRECONDITION => Self::FailedPrecondition(message),
                Code::RESOURCE_EXHAUSTED => Self::ResourceExhausted(message),
                Code::UNIMPLEMENTED => Self::Unimplemented(message),
                Code::DEADLINE_EXCEEDED => Self::DeadlineExceeded(message),
                Code::UNAVAILABLE => Self::Unavailable(message),
                _ => Self::internal("in the guest", message),
            },
            GuestError::Deadline { .. } => Self::DeadlineExceeded(error.to_string()),
            GuestError::Broken(_) => Self::Unavailable(error.to_string()),
            GuestError::Gone => Self::NotFound(error.to_string()),
            GuestError::Nonsense(_) => Self::internal("ask the guest", error),
        }
    }
}

impl From<GuestError> for containerd_sandbox::error::Error {
    fn from(error: GuestError) -> Self {
        use ttrpc::Code;
        match error {
            GuestError::Refused { code, message } => match code {
                Code::INVALID_ARGUMENT => Self::InvalidArgument(message),
                Code::FAILED_PRECONDITION => Self::FailedPrecondition(message),
                Code::RESOURCE_EXHAUSTED => Self::ResourceExhausted(message),
                Code::UNIMPLEMENTED => Self::Unimplemented(message),
                _ => Self::internal("in the guest", message),
            },
            GuestError::Deadline { .. } => Self::DeadlineExceeded(error.to_string()),
            other => Self::internal("ask the guest", other),
        }
    }
}

/// A guest's words, fit to be shown.
pub fn clean(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let mut cut: String = text.chars().take(QUOTED).map(plain).collect();
    if text.chars().nth(QUOTED).is_some() {
        cut.push('…');
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_words_are_cut_and_cleaned() {
        assert_eq!(clean("a\nb\u{1b}c"), "a b c");
        assert_eq!(clean(&"x".repeat(1000)).chars().count(), QUOTED + 1);
    }
}

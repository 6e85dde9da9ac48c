//! Errors of the Task server and their gRPC codes.

use ttrpc::Code;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a Task request failed. Each variant is one gRPC code, because callers act on codes
/// (engine-contract: NotFound and FailedPrecondition change what containerd does).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The container, exec or stream is not known.
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The request itself is wrong; the text says what to change.
    #[error("{0}")]
    InvalidArgument(String),
    /// The request does not fit the present state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// A bound was reached.
    #[error("{0}")]
    ResourceExhausted(String),
    /// Not supported by this runtime or host; the text names the way out.
    #[error("{0}")]
    Unimplemented(String),
    /// Somebody did not answer in time.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// Try again later.
    #[error("{0}")]
    Unavailable(String),
    /// Everything else.
    #[error("{context}")]
    Internal {
        /// What was being done.
        context: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// Wraps `source` with what was being done.
    pub fn internal(
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Internal { context: context.into(), source: source.into() }
    }

    /// The gRPC code of this error.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::ResourceExhausted(_) => Code::RESOURCE_EXHAUSTED,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::DeadlineExceeded(_) => Code::DEADLINE_EXCEEDED,
            Self::Unavailable(_) => Code::UNAVAILABLE,
            Self::Internal { .. } => Code::INTERNAL,
        }
    }

    /// The whole chain of causes in one line.
    pub fn chain(&self) -> String {
        kuasar_host::chain(self)
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.chain()))
    }
}

//! Errors of the sandbox Controller and their gRPC codes.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a Controller request failed. Each variant is one gRPC code, because engines act on codes
/// (engine-contract §1.5).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sandbox is not known.
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
    /// Not supported by this sandboxer or host; the text names the way out.
    #[error("{0}")]
    Unimplemented(String),
    /// Somebody did not answer in time.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// The daemon is starting or stopping: try again.
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

/// Runs work that waits for the kernel on a thread for such work.
///
/// # Errors
/// Its own; [`Error::Internal`] when it panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let scope = kuasar_trace::current();
    tokio::task::spawn_blocking(move || kuasar_trace::carry(scope, work))
        .await
        .map_err(|error| Error::internal("worker", error))?
}

impl Error {
    /// Wraps `source` with what was being done.
    pub fn internal(
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Internal { context: context.into(), source: source.into() }
    }

    /// The gRPC code of this error, as both transports number it.
    pub fn code(&self) -> tonic::Code {
        match self {
            Self::NotFound(_) => tonic::Code::NotFound,
            Self::AlreadyExists(_) => tonic::Code::AlreadyExists,
            Self::InvalidArgument(_) => tonic::Code::InvalidArgument,
            Self::FailedPrecondition(_) => tonic::Code::FailedPrecondition,
            Self::ResourceExhausted(_) => tonic::Code::ResourceExhausted,
            Self::Unimplemented(_) => tonic::Code::Unimplemented,
            Self::DeadlineExceeded(_) => tonic::Code::DeadlineExceeded,
            Self::Unavailable(_) => tonic::Code::Unavailable,
            Self::Internal { .. } => tonic::Code::Internal,
        }
    }

    /// The whole chain of causes in one line.
    pub fn chain(&self) -> String {
        kuasar_host::chain(self)
    }
}

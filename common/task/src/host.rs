//! For who implements [`Runtime`](crate::runtime::Runtime): work that waits, errors of the host, and
//! directories of containers.

use std::io::ErrorKind;
use std::path::Path;

use crate::error::{Error, Result};

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

/// An error of the host while `what` was done: what is invalid is the request's fault.
pub fn internal(what: impl Into<String>) -> impl FnOnce(kuasar_host::Error) -> Error {
    let what = what.into();
    move |error| match error {
        kuasar_host::Error::Invalid(text) => Error::InvalidArgument(format!("{what}: {text}")),
        other => Error::internal(what, other),
    }
}

/// Removes a directory with all that is in it. One that is not there is removed.
///
/// # Errors
/// [`Error::Internal`], which names it.
pub fn remove_dir(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::internal(format!("remove {}", dir.display()), error))
        }
        _ => Ok(()),
    }
}

//! SIGTERM and SIGINT end the daemon; SIGHUP makes it read its configuration again.
//!
//! Ending means: take no new work, finish what is answered soon, leave the pods running.

use std::future::Future;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Tells all parts of a daemon that it ends. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Whether the daemon ends.
    pub fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when the daemon ends.
    pub async fn wait(&mut self) {
        // An error means that the sender is gone: then it ends too.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

/// Starts to handle signals. `reload` runs for each SIGHUP, one at a time; the service manager is
/// told before and after. SIGPIPE is ignored by Rust's start-up already.
///
/// # Errors
/// When a handler cannot be installed.
pub fn handle<F, R>(reload: F) -> std::io::Result<Stop>
where
    F: Fn() -> R + Send + 'static,
    R: Future<Output = Result<(), String>> + Send,
{
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let mut hup = signal(SignalKind::hangup())?;
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => break,
                _ = int.recv() => break,
                _ = hup.recv() => {
                    crate::notify::reloading();
                    match reload().await {
                        Ok(()) => tracing::info!("configuration read again"),
                        Err(e) => tracing::error!("configuration is unchanged: {e}"),
                    }
                    crate::notify::send("READY=1");
                }
            }
        }
        crate::notify::send("STOPPING=1");
        // Nobody listens any more when the daemon has ended by itself.
        let _ = stop.send(true);
        // Kept, so that a second signal does not end the process in the middle of its clean-up.
        std::future::pending::<()>().await;
    });
    Ok(Stop(stopped))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn hup_reloads_and_term_stops() {
        let reloads = Arc::new(AtomicU32::new(0));
        let counter = reloads.clone();
        let mut stop = handle(move || {
            let counter = counter.clone();
            async move {
                counter.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
        })
        .unwrap();
        let raise = |s| nix::sys::signal::raise(s).unwrap();
        raise(nix::sys::signal::SIGHUP);
        for _ in 0..500 {
            if reloads.load(Ordering::SeqCst) == 1 {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(reloads.load(Ordering::SeqCst), 1);
        assert!(!stop.is_set());
        raise(nix::sys::signal::SIGTERM);
        stop.wait().await;
        assert!(stop.is_set());
    }
}

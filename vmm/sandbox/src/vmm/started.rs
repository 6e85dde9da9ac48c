//! What a start has made so far, to be undone when it fails.

use std::sync::Arc;

use super::process::Process;
use super::{Processes, console};

/// Undone when it is dropped with something in it.
#[derive(Default)]
pub(super) struct Started {
    /// Processes that run.
    pub processes: Vec<Process>,
    /// Names of kept descriptors: who keeps them, and the machine's id.
    pub forget: Option<(Arc<dyn Processes>, String)>,
}

impl Drop for Started {
    fn drop(&mut self) {
        let processes = std::mem::take(&mut self.processes);
        let forget = self.forget.take();
        if processes.is_empty() && forget.is_none() {
            return;
        }
        for process in &processes {
            process.signal(libc::SIGKILL);
        }
        tokio::spawn(async move {
            for process in processes {
                if let Err(error) = process.kill().await {
                    tracing::error!(%error, "a process of a failed start is left");
                }
                process.acknowledge().await;
            }
            if let Some((processes, id)) = forget {
                console::forget(&*processes, &id).await;
            }
        });
    }
}
